//! Any text as the inside of a YAML value: no panic, and no answer longer than a screen.

#![no_main]

use etcd_schema::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let config = format!("Network: 10.244.0.0/16\nnew:\n  {text}");
    for value in [text, config.as_str()] {
        if let Err(refused) = check("config", value.as_bytes()) {
            assert!(refused.to_string().len() < 40_000);
        }
    }
});
