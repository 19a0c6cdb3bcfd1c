//! Any bytes: the parser must not panic, and must not look beyond the length that a packet states.
//! Run with `cargo +nightly fuzz run packet` in `policy/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use packet::Packet;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = Packet::parse(bytes) {
        let total = usize::from(packet.total_len);
        assert!(usize::from(packet.payload_offset) <= total);
        assert_eq!(Packet::parse(&bytes[..total]), Ok(packet));
    }
});
