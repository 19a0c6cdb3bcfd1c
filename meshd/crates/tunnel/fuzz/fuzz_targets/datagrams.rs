//! Datagrams and TUN packets of any kind, between and beside two connected nodes: no panic, and nothing is delivered
//! that is not from the peer's prefixes to the node's own. Run with `cargo +nightly fuzz run datagrams` in `meshd/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel::fuzzing::Pair;

fuzz_target!(|input: &[u8]| Pair::connected().play(input));
