//! Session renewal under traffic in both directions.

use std::{collections::BTreeSet, time::Instant};

use super::{
    super::DropReason,
    harness::{Node, SECOND, Wire, packet, pair, settle},
};

const ROUNDS: u32 = 20;

/// Full-sized packets from one side, numbered on from `sent`.
fn burst(from: &str, to: &str, sent: &mut Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let burst: Vec<Vec<u8>> = (0..64)
        .map(|n| {
            let mut packet = packet(from, to, 1400);
            packet[28..32].copy_from_slice(&(sent.len() as u32 + n).to_be_bytes());
            packet
        })
        .collect();
    sent.extend(burst.iter().cloned());
    burst
}

#[test]
fn a_session_that_is_renewed_under_load_loses_and_reorders_nothing() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let first = a.send(start, &[packet("10.1.0.5", "10.2.0.5", 60)]);
    settle(start, &mut [&mut a, &mut b], first);
    b.delivered.clear();
    let (mut sent_by_a, mut sent_by_b) = (Vec::new(), Vec::new());
    let mut sessions = BTreeSet::new();
    for round in 0..ROUNDS {
        // No sooner would another initiation be sent.
        let now = start + SECOND * 6 * (round + 1);
        let mut both = |a: &mut Node, b: &mut Node| {
            let forth = a.send(now, &burst("10.1.0.5", "10.2.0.5", &mut sent_by_a));
            sessions.extend(forth.iter().map(|datagram| datagram.bytes[4..8].to_vec()));
            (forth, b.send(now, &burst("10.2.0.5", "10.1.0.5", &mut sent_by_b)))
        };
        // Under way while the handshake is: what was sealed before it, during it, and after it.
        let a_calls = round % 2 == 0;
        let before = both(&mut a, &mut b);
        let initiation = if a_calls { a.initiate(now, "b") } else { b.initiate(now, "a") };
        assert_eq!(initiation.len(), 1, "in round {round}");
        let response = if a_calls { b.receive(now, &initiation) } else { a.receive(now, &initiation) };
        let during = both(&mut a, &mut b);
        let confirmation = if a_calls { a.receive(now, &response) } else { b.receive(now, &response) };
        let after = both(&mut a, &mut b);
        let (to_b, to_a) = if a_calls { (confirmation, Vec::new()) } else { (Vec::new(), confirmation) };
        let arrive = |node: &mut Node, bursts: [&[Wire]; 4]| {
            for datagrams in bursts {
                assert_eq!(node.receive(now, datagrams), [], "in round {round}");
            }
        };
        arrive(&mut b, [&before.0, &during.0, &to_b, &after.0]);
        arrive(&mut a, [&before.1, &during.1, &to_a, &after.1]);
    }
    assert_eq!(a.delivered.len(), sent_by_b.len());
    assert!(b.delivered == sent_by_a && a.delivered == sent_by_b);
    assert!(sessions.len() >= ROUNDS as usize, "{} sessions", sessions.len());
    for reason in [DropReason::InReplayed, DropReason::InNoSession, DropReason::InUnauthentic] {
        assert_eq!((a.dropped(reason), b.dropped(reason)), (0, 0), "{reason:?}");
    }
}
