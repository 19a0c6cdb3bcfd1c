//! Super-packets of any kind are cut into whole packets that hold the same payload. Run with `cargo +nightly fuzz run
//! cut` in `meshd/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel::fuzzing::cut;

fuzz_target!(|input: &[u8]| cut(input));
