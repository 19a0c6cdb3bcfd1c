//! Packets of any kind are joined such that cutting gives as many back. Run with `cargo +nightly fuzz run join` in
//! `meshd/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel::fuzzing::join;

fuzz_target!(|input: &[u8]| join(input));
