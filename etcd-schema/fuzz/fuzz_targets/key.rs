//! Any text as a key: no panic, and what is accepted is written back as it was read.

#![no_main]

use etcd_schema::Key;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(key) = Key::parse(text) {
        assert_eq!(key.to_string(), text);
    }
});
