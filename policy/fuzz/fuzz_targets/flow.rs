//! Any packets through a flow table: no panic, never more flows than there is room for, and a packet that passed as
//! part of a flow passes again. Run with `cargo +nightly fuzz run flow` in `policy/`.
#![no_main]

use std::time::Instant;

use packet::Packet;
use libfuzzer_sys::fuzz_target;
use policy::{
    engine::Engine,
    flow::{FlowTable, Judgement, Limits, Passed},
    
};

fuzz_target!(|packets: Vec<(bool, Vec<u8>)>| {
    let classifier = Engine::new().commit(1);
    let now = Instant::now();
    let limits = Limits { flows: 8, fragments: 4, ..Limits::default() };
    let mut table = FlowTable::new(limits, 1, now);
    for (outbound, bytes) in &packets {
        let Ok(packet) = Packet::parse(bytes) else { continue };
        let judged = if *outbound {
            table.outbound(&*classifier, &packet, bytes, now)
        } else {
            match table.inbound(&*classifier, &packet, bytes, 0, now) {
                Judgement::Ask(_) => table.answered(&*classifier, &packet, bytes, false, now),
                judged => judged,
            }
        };
        assert!(table.len() <= limits.flows);
        if judged == Judgement::Pass(Passed::Related) {
            assert!(table.inbound(&*classifier, &packet, bytes, 0, now).passes());
        }
    }
});
