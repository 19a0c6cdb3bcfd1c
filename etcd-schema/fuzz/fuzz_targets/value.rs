//! Any bytes as the value of each kind of key: no panic, and what is accepted is accepted again once rewritten.
//!
//! The first byte picks the key, the rest is the value.

#![no_main]

use etcd_schema::{
    Alive, Attachment, Key, NetworkConfig, NodeRecord, OutsidePeer, Removed, SubnetLease, check,
};
use libfuzzer_sys::fuzz_target;

const KEYS: [&str; 9] = [
    "config",
    "subnets/10.244.3.0-24",
    "subnets/10.244.3.0-24&fd42:244:0:3::-64",
    "subnets/fd42:244:0:3::-64",
    "nodes/a",
    "removed/a",
    "alive/a",
    "peers/a",
    "endpoints/a/b/c",
];

fuzz_target!(|data: &[u8]| {
    let Some((pick, value)) = data.split_first() else { return };
    let key = KEYS[usize::from(*pick) % KEYS.len()];
    let Ok(checked) = check(key, value) else { return };
    assert!(!checked.summary.chars().any(char::is_control));
    let rewritten = match checked.key {
        Key::Config => NetworkConfig::parse(value).map(|v| v.to_json()),
        Key::Subnet(_) => SubnetLease::parse(value).map(|v| v.to_json()),
        Key::Node(_) => NodeRecord::parse(value).map(|v| v.to_json()),
        Key::Removed(_) => Removed::parse(value).map(|v| v.to_json()),
        Key::Alive(_) => Alive::parse(value).map(|v| v.to_json()),
        Key::Peer(_) => OutsidePeer::parse(value).map(|v| v.to_json()),
        Key::Endpoint(..) => Attachment::parse(value).map(|v| v.to_json()),
        _ => return,
    };
    let again = check(key, &rewritten.expect("check accepted it")).expect("a rewrite is valid");
    assert_eq!(again.summary, checked.summary);
});
