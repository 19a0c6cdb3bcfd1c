//! Cases that the worlds in `tests/worlds` cannot express: separate directions, the kernel's answers, bounds.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use packet::{Packet, protocol};
use proptest::prelude::*;

use super::{ConntrackQueryLimits, Dropped, FlowTable, Judgement, Limits, Origin, Passed, Rules, Tuple};
use crate::engine::{Cause, Flow, Verdict};

/// Allows flows to these ports.
struct Ports {
    generation: u64,
    open: &'static [u16],
}

impl Rules for Ports {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn judge(&self, _: Origin, flow: &Flow) -> Verdict {
        Verdict { allowed: flow.port.is_some_and(|port| self.open.contains(&port)), cause: Cause::NoPolicy }
    }

    fn owners(&self, _: &Flow) -> (u32, u32) {
        (0, 0)
    }

    fn unchanged_since(&self, _: Origin, _: &Flow) -> u64 {
        self.generation()
    }
}

const OPEN: Ports = Ports { generation: 1, open: &[80, 53] };

fn packet(number: u8, source: (u8, u16), destination: (u8, u16), flags: u8) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, number, 0, 0, 10, 0, 0, source.0, 10, 0, 0, destination.0];
    bytes.extend(source.1.to_be_bytes());
    bytes.extend(destination.1.to_be_bytes());
    if number == protocol::UDP {
        bytes.extend([0, 20, 0, 0]);
    } else {
        bytes.extend([0; 8]);
        bytes.extend([0x50, flags]);
    }
    bytes.resize(40, 0);
    bytes
}

struct Bench {
    table: FlowTable,
    now: Instant,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        let now = Instant::now();
        Self { table: FlowTable::new(limits, 1, now), now }
    }

    /// Lets all flows expire.
    fn expire(&mut self) {
        self.now += Duration::from_secs(6 * 24 * 3600);
        self.table.sweep(self.now, 1 << 16);
    }

    fn inbound(&mut self, rules: &impl Rules, bytes: &[u8]) -> Judgement {
        self.table.inbound(rules, &Packet::parse(bytes).unwrap(), bytes, 1, self.now)
    }

    fn outbound(&mut self, rules: &impl Rules, bytes: &[u8]) -> Judgement {
        self.table.outbound(rules, &Packet::parse(bytes).unwrap(), bytes, self.now)
    }

    fn answered(&mut self, rules: &impl Rules, bytes: &[u8], yes: bool) -> Judgement {
        self.table.answered(rules, &Packet::parse(bytes).unwrap(), bytes, yes, self.now)
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

#[test]
fn what_a_local_pod_began_is_answered_without_a_question() {
    let mut bench = Bench::new(Limits::default());
    let rules = Ports { generation: 1, open: &[53] };
    assert!(bench.outbound(&rules, &packet(17, (1, 4000), (2, 53), 0)).passes());
    assert_eq!(bench.inbound(&rules, &packet(17, (2, 53), (1, 4000), 0)), Judgement::Pass(Passed::Established));
}

#[test]
fn a_packet_that_the_kernel_let_pass_makes_no_flow_that_the_rules_refuse() {
    let mut bench = Bench::new(Limits::default());
    let rules = Ports { generation: 1, open: &[53] };
    assert_eq!(
        bench.outbound(&rules, &packet(17, (1, 4000), (2, 54), 0)),
        Judgement::Pass(Passed::Untracked),
        "the kernel's rules may be older or newer than these"
    );
    assert!(bench.table.is_empty());
    let reply = packet(17, (2, 54), (1, 4000), 0);
    assert!(matches!(bench.inbound(&rules, &reply), Judgement::Ask(_)));
    assert_eq!(bench.answered(&rules, &reply, true), Judgement::Drop(Dropped::Tombstone));
    // The kernel's rules were newer: these follow.
    let rules = Ports { generation: 2, open: &[54] };
    assert_eq!(bench.inbound(&rules, &reply), Judgement::Pass(Passed::Established));
}

#[test]
fn a_flow_of_conntrack_that_the_rules_refuse_passes_neither_at_once_nor_later() {
    for (number, flags) in [(protocol::TCP, ACK), (protocol::UDP, 0), (132, 0)] {
        let mut bench = Bench::new(Limits::default());
        let reply = packet(number, (2, 443), (1, 4000), flags);
        assert!(matches!(bench.inbound(&OPEN, &reply), Judgement::Ask(_)));
        assert_eq!(bench.answered(&OPEN, &reply, true), Judgement::Drop(Dropped::Tombstone), "protocol {number}");
        // The kernel's entry may be gone by now: it is not asked again.
        assert_eq!(bench.inbound(&OPEN, &reply), Judgement::Drop(Dropped::Tombstone));
        assert_eq!(
            bench.outbound(&OPEN, &packet(number, (1, 4000), (2, 443), flags)),
            Judgement::Drop(Dropped::Tombstone)
        );
        let allows = Ports { generation: 2, open: &[443] };
        assert_eq!(bench.inbound(&allows, &reply), Judgement::Pass(Passed::Established));
    }
}

#[test]
fn a_reset_that_conntrack_knows_opens_no_connection_for_days() {
    let mut bench = Bench::new(Limits::default());
    let rules = Ports { generation: 1, open: &[443] };
    let reset = packet(6, (2, 443), (1, 4000), RST | ACK);
    assert!(matches!(bench.inbound(&rules, &reset), Judgement::Ask(_)));
    assert!(bench.answered(&rules, &reset, true).passes());
    bench.now += Duration::from_secs(11);
    let late = packet(6, (2, 443), (1, 4000), ACK);
    assert!(matches!(bench.inbound(&rules, &late), Judgement::Ask(_)));
}

/// Lets this node's pods begin flows to ports below 10, and others begin flows to them from 20 on; each only to those
/// whose bit is set.
struct Bits(u64, u32);

impl Rules for Bits {
    fn generation(&self) -> u64 {
        self.0
    }

    fn judge(&self, origin: Origin, flow: &Flow) -> Verdict {
        let port = u32::from(flow.port.unwrap_or(0));
        let right = (port < 10) == (origin == Origin::Local);
        Verdict { allowed: right && self.1 & 1 << port != 0, cause: Cause::NoPolicy }
    }

    fn owners(&self, _: &Flow) -> (u32, u32) {
        (0, 0)
    }

    fn unchanged_since(&self, _: Origin, _: &Flow) -> u64 {
        self.generation()
    }
}

proptest! {
    /// The specification of what comes in: whatever was before, and whatever conntrack says, the rules of now allow
    /// somebody to have begun it.
    #[test]
    fn nothing_comes_in_that_the_present_rules_refuse_either_end_to_begin(
        steps in prop::collection::vec((0..9_u8, 0..4_u16, 20..24_u16, any::<bool>(), any::<u32>()), 1..200),
        seed: u32,
    ) {
        let mut bench = Bench::new(Limits { flows: 64, ..Limits::default() });
        let mut rules = Bits(1, seed);
        for (what, theirs, ours, yes, random) in steps {
            let number = if random & 1 == 0 { protocol::TCP } else { protocol::UDP };
            let flags = [SYN, ACK, SYN | ACK, FIN | ACK, RST | ACK][random as usize % 5];
            let incoming = packet(number, (2, theirs), (1, ours), flags);
            let tuple = Tuple::of(&Packet::parse(&incoming).unwrap());
            match what {
                0 => rules = Bits(rules.0 + 1, random),
                1 => bench.now += Duration::from_secs(u64::from(random % 700)),
                2 if yes => drop(bench.table.insert_known(&rules, &tuple, Origin::Remote, random & 2 == 0, bench.now)),
                2 => {
                    let reversed = tuple.reversed();
                    let _ = bench.table.insert_known(&rules, &reversed, Origin::Local, random & 2 == 0, bench.now);
                }
                3 | 4 => drop(bench.outbound(&rules, &packet(number, (1, ours), (2, theirs), flags))),
                _ => {
                    let mut judgement = bench.inbound(&rules, &incoming);
                    if let Judgement::Ask(_) = judgement {
                        judgement = bench.answered(&rules, &incoming, yes);
                    }
                    let allowed = rules.judge(Origin::Remote, &tuple.flow()).allowed
                        || rules.judge(Origin::Local, &tuple.reversed().flow()).allowed;
                    prop_assert!(allowed || !judgement.passes(), "{tuple:?} under {:b}: {judgement:?}", rules.1);
                }
            }
        }
    }
}

#[test]
fn the_middle_of_an_outgoing_connection_makes_no_flow() {
    let mut bench = Bench::new(Limits::default());
    let middle = packet(6, (1, 80), (2, 4000), ACK);
    assert_eq!(bench.outbound(&OPEN, &middle), Judgement::Pass(Passed::Untracked));
    assert!(bench.table.is_empty(), "which end began it only the kernel knows");
}

#[test]
fn the_kernel_is_asked_before_a_refusal_and_its_yes_makes_a_flow() {
    let mut bench = Bench::new(Limits::default());
    let rules = Ports { generation: 1, open: &[443] };
    let reply = packet(6, (2, 443), (1, 4000), ACK);
    let asked = Tuple {
        source: IpAddr::from([10, 0, 0, 2]),
        destination: IpAddr::from([10, 0, 0, 1]),
        protocol: 6,
        source_port: 443,
        destination_port: 4000,
        answer: false,
    };
    assert_eq!(bench.inbound(&rules, &reply), Judgement::Ask(asked));
    assert_eq!(bench.answered(&rules, &reply, true), Judgement::Pass(Passed::Established));
    assert_eq!(bench.inbound(&rules, &reply), Judgement::Pass(Passed::Established));
    // A SYN is no reply, whatever the kernel knows.
    assert!(matches!(bench.inbound(&rules, &packet(6, (2, 443), (1, 4001), SYN)), Judgement::Drop(Dropped::Policy(_))));
}

#[test]
fn a_no_stands_for_a_while_and_questions_are_limited() {
    let asks = ConntrackQueryLimits { total: 3, per_peer: 2 };
    let mut bench = Bench::new(Limits { asks, ..Limits::default() });
    let strange = |port| packet(17, (2, 9), (1, port), 0);
    assert!(matches!(bench.inbound(&OPEN, &strange(1)), Judgement::Ask(_)));
    assert!(matches!(bench.answered(&OPEN, &strange(1), false), Judgement::Drop(Dropped::Policy(_))));
    assert!(matches!(bench.inbound(&OPEN, &strange(1)), Judgement::Drop(Dropped::Policy(_))));
    assert!(matches!(bench.inbound(&OPEN, &strange(2)), Judgement::Ask(_)));
    assert!(matches!(bench.inbound(&OPEN, &strange(3)), Judgement::Drop(_)), "two a second for one peer");
    bench.now += Duration::from_secs(6);
    assert!(matches!(bench.inbound(&OPEN, &strange(1)), Judgement::Ask(_)));
    assert_eq!(bench.table.counters().asked, 3);
}

/// An ICMP echo request or reply.
fn echo(kind: u8, source: u8, destination: u8, identifier: u16) -> Vec<u8> {
    let mut bytes = packet(protocol::ICMP, (source, 0), (destination, 0), 0);
    bytes[20..24].copy_from_slice(&[kind, 0, 0, 0]);
    bytes[24..26].copy_from_slice(&identifier.to_be_bytes());
    bytes
}

#[test]
fn a_ping_whose_identifier_is_its_type_lets_no_ping_of_the_other_end_in() {
    for identifier in [7, 8, 0] {
        let mut bench = Bench::new(Limits::default());
        assert!(bench.outbound(&Owner(1), &echo(8, 1, 2, identifier)).passes());
        assert_eq!(bench.inbound(&Owner(1), &echo(0, 2, 1, identifier)), Judgement::Pass(Passed::Established));
        let foreign = echo(8, 2, 1, identifier);
        // The kernel is asked about a request only to say no.
        let judgement = match bench.inbound(&Owner(1), &foreign) {
            Judgement::Ask(_) => bench.answered(&Owner(1), &foreign, false),
            judgement => judgement,
        };
        assert!(matches!(judgement, Judgement::Drop(Dropped::Policy(_))), "identifier {identifier}: {judgement:?}");
        // A reply without a request begins no flow either.
        let mut bench = Bench::new(Limits::default());
        assert!(!bench.inbound(&Owner(1), &echo(0, 2, 1, identifier)).passes());
    }
}

#[test]
fn a_full_table_keeps_old_flows_and_refuses_new_ones() {
    let mut bench = Bench::new(Limits { flows: 4, ..Limits::default() });
    let flow = |port| packet(17, (2, port), (1, 53), 0);
    for port in 1..=4 {
        assert!(bench.inbound(&OPEN, &flow(port)).passes());
    }
    assert_eq!(bench.inbound(&OPEN, &flow(5)), Judgement::Drop(Dropped::TableFull));
    assert!(bench.inbound(&OPEN, &flow(1)).passes());
    assert_eq!((bench.table.len(), bench.table.counters().refused_full), (4, 1));
    bench.now += Duration::from_secs(31);
    assert!(bench.inbound(&OPEN, &flow(5)).passes(), "what has expired makes room");
}

#[test]
fn one_source_leaves_room_for_others() {
    let mut bench = Bench::new(Limits { flows: 64, per_source: 3, ..Limits::default() });
    let flow = |source, port| packet(17, (source, port), (1, 53), 0);
    for port in 1..=3 {
        assert!(bench.inbound(&OPEN, &flow(2, port)).passes());
    }
    assert_eq!(bench.inbound(&OPEN, &flow(2, 4)), Judgement::Drop(Dropped::TableFull));
    assert!(bench.inbound(&OPEN, &flow(2, 3)).passes(), "what it has begun goes on");
    assert!(bench.inbound(&OPEN, &flow(3, 1)).passes());
    // Whoever is the lower end: what is counted is who began.
    for port in 1..=3 {
        assert!(bench.outbound(&OPEN, &packet(17, (1, 4000 + port), (9, 53), 0)).passes());
    }
    assert!(bench.inbound(&OPEN, &flow(9, 1)).passes(), "answering is not beginning");
    bench.now += Duration::from_secs(31);
    assert!(bench.inbound(&OPEN, &flow(2, 4)).passes(), "what has expired does not count");
    bench.expire();
    assert!(bench.table.is_empty());
    for port in 1..=3 {
        assert!(bench.inbound(&OPEN, &flow(2, port)).passes());
    }
}

#[test]
fn known_flows_are_judged_at_their_next_packet() {
    let mut bench = Bench::new(Limits::default());
    let tuple = |port| Tuple {
        source: IpAddr::from([10, 0, 0, 2]),
        destination: IpAddr::from([10, 0, 0, 1]),
        protocol: 6,
        source_port: 4000,
        destination_port: port,
        answer: false,
    };
    assert!(bench.table.insert_known(&OPEN, &tuple(80), Origin::Remote, true, bench.now));
    assert!(bench.table.insert_known(&OPEN, &tuple(81), Origin::Remote, true, bench.now));
    assert_eq!(bench.inbound(&OPEN, &packet(6, (2, 4000), (1, 80), ACK)), Judgement::Pass(Passed::Established));
    assert_eq!(bench.inbound(&OPEN, &packet(6, (2, 4000), (1, 81), ACK)), Judgement::Drop(Dropped::Tombstone));
    assert_eq!(bench.outbound(&OPEN, &packet(6, (1, 81), (2, 4000), ACK)), Judgement::Drop(Dropped::Tombstone));
}

/// Lets pods of this node begin any flow, and no other host; the pod with 10.0.0.1 is this one.
struct Owner(u32);

impl Rules for Owner {
    fn generation(&self) -> u64 {
        u64::from(self.0)
    }

    fn judge(&self, origin: Origin, _: &Flow) -> Verdict {
        Verdict { allowed: origin == Origin::Local, cause: Cause::NoPolicy }
    }

    fn owners(&self, flow: &Flow) -> (u32, u32) {
        let owner = |address| if address == IpAddr::from([10, 0, 0, 1]) { self.0 } else { 0 };
        (owner(flow.source), owner(flow.destination))
    }

    fn unchanged_since(&self, _: Origin, _: &Flow) -> u64 {
        self.generation()
    }
}

#[test]
fn a_known_flow_is_none_of_whoever_has_its_address_next() {
    let begun = || Tuple::of(&Packet::parse(&packet(protocol::UDP, (1, 53), (2, 4000), 0)).unwrap());
    let reply = packet(protocol::UDP, (2, 4000), (1, 53), 0);
    let mut bench = Bench::new(Limits::default());
    assert!(bench.table.insert_known(&Owner(1), &begun(), Origin::Local, true, bench.now));
    assert_eq!(bench.inbound(&Owner(1), &reply), Judgement::Pass(Passed::Established), "a reply to who has begun it");
    let mut bench = Bench::new(Limits::default());
    assert!(bench.table.insert_known(&Owner(1), &begun(), Origin::Local, true, bench.now));
    assert!(!bench.inbound(&Owner(2), &reply).passes(), "the address was another's when it was begun");
}

#[test]
fn packets_of_one_flow_share_a_look_up() {
    let mut bench = Bench::new(Limits::default());
    let bytes = packet(17, (2, 1), (1, 53), 0);
    for _ in 0..5 {
        assert!(bench.inbound(&OPEN, &bytes).passes());
    }
    assert_eq!(bench.table.counters().shared_lookups, 4);
}

#[test]
fn many_flows_come_and_go() {
    let mut bench = Bench::new(Limits { flows: 512, ..Limits::default() });
    let mut live: std::collections::BTreeSet<u16> = std::collections::BTreeSet::new();
    let mut state = 1u32;
    for _ in 0..20_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let port = 1 + (state >> 16) as u16 % 600;
        if state & 0x8000 == 0 {
            let passes = bench.inbound(&OPEN, &packet(17, (2, port), (1, 53), 0)).passes();
            assert_eq!(passes, live.contains(&port) || live.len() < 512);
            if passes {
                live.insert(port);
            }
        } else if state & 0x4000 == 0 && live.remove(&port) {
            let tuple = Tuple::of(&Packet::parse(&packet(17, (2, port), (1, 53), 0)).unwrap());
            let place = bench.table.store.find(&super::Key::new(&tuple).0).unwrap();
            bench.table.forget(place);
        }
        assert_eq!(bench.table.len(), live.len());
    }
    bench.expire();
    assert!(bench.table.is_empty());
}
