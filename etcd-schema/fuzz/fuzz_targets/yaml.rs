//! Any text as the inside of a YAML value: no panic, and no answer longer than a screen.

#![no_main]

use etcd_schema::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let config = format!("Network: 10.244.0.0/16\nnew:\n  {text}");
    let pod = format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: b\n  namespace: a\nspec: {text}");
    for (key, value) in [("config", text), ("config", config.as_str()), ("pods/a/b", pod.as_str())] {
        if let Err(refused) = check(key, value.as_bytes()) {
            assert!(refused.to_string().len() < 40_000);
        }
    }
});
