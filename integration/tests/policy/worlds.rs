//! The rules that the engine makes of generated worlds, in a real kernel, with real packets, against a naive reading of
//! the specification.
//!
//! ```text
//!   outside ── router: forwards everything back to outside, through the rules
//! ```

#[path = "../../../policy/tests/reference/generate.rs"]
pub(crate) mod generate;
#[path = "../../../policy/tests/reference/model.rs"]
pub(crate) mod model;

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Write as _,
    net::IpAddr,
    time::{Duration, Instant},
};

use generate::{Both, Dice, PORTS, address, source};
use integration::{Host, Lab, Wire};
use policy::{
    engine::{Flow, Side},
    nft::{ALLOWED, LocalPod, REFUSED, Ruleset, transactions},
};

use crate::{
    SOON,
    raw::{ipv4, sctp_init},
};

const TABLE: &str = "inet t";
/// Of the two ends, and the source of frames that the router does not track.
const MACS: [&str; 3] = ["02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"];
/// Worlds, states of each, and packets in each state.
const SIZE: (u64, usize, usize) = (6, 8, 150);

/// What leads packets to the chains of pods, as in the daemon's own table.
fn frame() -> String {
    let mut text = format!("add table {TABLE}\nadd chain {TABLE} forward {{ type filter hook forward priority 0; }}\n");
    for chain in REFUSED.iter().chain(&ALLOWED) {
        let _ = writeln!(text, "add chain {TABLE} {chain}");
    }
    for chain in REFUSED {
        let _ = writeln!(text, "add rule {TABLE} {chain} drop");
    }
    let _ = writeln!(text, "add chain {TABLE} raw {{ type filter hook prerouting priority raw; }}");
    let _ = writeln!(text, "add rule {TABLE} raw ether saddr {} notrack", MACS[2]);
    text
}

fn dispatch() -> String {
    let mut text = String::new();
    for (ip, digit) in [("ip", 4), ("ip6", 6)] {
        let _ = writeln!(text, "add rule {TABLE} forward ct original {ip} saddr vmap @egress{digit}");
        let _ = writeln!(text, "add rule {TABLE} forward ct reply {ip} saddr vmap @ingress{digit}");
        let untracked = "ct state invalid,untracked";
        let _ = writeln!(text, "add rule {TABLE} forward {untracked} {ip} saddr vmap @packet_egress{digit}");
        let _ = writeln!(text, "add rule {TABLE} forward {untracked} {ip} daddr vmap @packet_ingress{digit}");
    }
    text
}

fn router(lab: &Lab) -> (Host, Wire) {
    let (outside, router) = (lab.host("outside"), lab.host("router"));
    let [far, near] = outside.join(&router, ["192.168.9.1/24", "192.168.9.2/24"]);
    let (far, near) = (far.name(), near.name());
    outside.ip(&[&format!("link set {far} address {}", MACS[0])]);
    router.ip(&[
        &format!("link set {near} address {}", MACS[1]),
        &format!("neigh add 192.168.9.1 lladdr {} dev {near} nud permanent", MACS[0]),
        &format!("neigh add fe80::99 lladdr {} dev {near} nud permanent", MACS[0]),
        &format!("route add default via 192.168.9.1 dev {near}"),
        &format!("route add default via fe80::99 dev {near}"),
    ]);
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        (&format!("net/ipv4/conf/{near}/rp_filter"), "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        (&format!("net/ipv4/conf/{near}/send_redirects"), "0"),
        ("net/netfilter/nf_conntrack_checksum", "0"),
    ] {
        router.sysctl(name, value);
    }
    (router, Wire::on(&outside, far))
}

/// An Ethernet frame with the first packet of a flow, whose last four bytes are its number. Every second one is not
/// tracked.
fn first_packet(flow: &Flow, number: u32) -> Vec<u8> {
    let source_port = 1024 + u16::try_from(number % 60_000).unwrap();
    let ports = || [source_port.to_be_bytes(), flow.port.unwrap_or(0).to_be_bytes()].concat();
    let mut payload = match flow.protocol {
        6 => [ports(), vec![0; 8], vec![0x50, 2, 0x10, 0, 0, 0, 0, 0]].concat(),
        17 => [ports(), vec![0, 12, 0, 0]].concat(),
        // The number is that of its first data: nothing may follow an INIT.
        132 => sctp_init(source_port, flow.port.unwrap_or(0))[..28].to_vec(),
        // An echo request, where it is ICMP.
        protocol => {
            [vec![if protocol == 58 { 128 } else { 8 }, 0, 0, 0], source_port.to_be_bytes().to_vec(), vec![0, 1]]
                .concat()
        }
    };
    payload.extend(number.to_be_bytes());
    let octet = |text: &str| u8::from_str_radix(text, 16).unwrap();
    let mac = |mac: &str| mac.split(':').map(octet).collect::<Vec<u8>>();
    let mut frame = [mac(MACS[1]), mac(if number.is_multiple_of(2) { MACS[0] } else { MACS[2] })].concat();
    let length = u16::try_from(payload.len()).unwrap();
    match (flow.source, flow.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend([0x08, 0x00]);
            let header = &ipv4(source.into(), destination.into(), flow.protocol, &payload)[..20];
            frame.extend(header);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([flow.protocol, 64]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        _ => panic!("two families"),
    }
    frame.extend(payload);
    frame
}

/// Which of these come back. The last one does, and is the last that is awaited.
fn forwarded(wire: &mut Wire, frames: &[Vec<u8>]) -> BTreeSet<u32> {
    let number = |frame: &[u8]| frame.last_chunk().map(|bytes| u32::from_be_bytes(*bytes));
    // A router that sends a packet back to where it came from tells its source so, and quotes the packet.
    let ends = |frame: &[u8]| match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(26..34).map(<[u8]>::to_vec),
        _ => frame.get(22..54).map(<[u8]>::to_vec),
    };
    let sent: HashSet<Option<Vec<u8>>> = frames.iter().map(|frame| ends(frame)).collect();
    let last = number(frames.last().unwrap()).unwrap();
    wire.send(frames);
    let deadline = Instant::now() + SOON;
    let mut come = BTreeSet::new();
    while !come.contains(&last) {
        assert!(Instant::now() < deadline, "not even the packet comes back that nothing refuses");
        let frames = wire.receive(Duration::from_secs(1)).unwrap();
        come.extend(frames.iter().filter(|frame| sent.contains(&ends(frame))).filter_map(|frame| number(frame)));
    }
    come
}

#[test]
fn the_kernel_agrees_with_the_specification_on_generated_worlds() {
    let (seeds, states, packets) = SIZE;
    let mut verdicts = [0; 2];
    let mut number = 0;
    for seed in 1..=seeds {
        let lab = Lab::new("policy-worlds");
        let (router, mut wire) = router(&lab);
        let mut dice = if seed % 3 == 0 { Dice::of_one_cluster(seed) } else { Dice::new(seed) };
        let mut both = Both::new();
        // A packet without ports is of the same flow as the one before, which the daemon would have judged again.
        let mut portless = HashSet::new();
        let mut in_force = ruleset(&mut both);
        let first = transactions(TABLE, &Ruleset::default(), &mut in_force);
        router.nft(&(frame() + &first.sets + &first.rules + &dispatch()));
        for state in 0..states {
            for _ in 0..if state == 0 { 50 } else { 1 + dice.roll(4) } {
                both.change(&mut dice);
            }
            let mut after = ruleset(&mut both);
            let change = transactions(TABLE, &in_force, &mut after);
            for text in [change.sets, change.rules].iter().filter(|text| !text.is_empty()) {
                router.nft(text);
            }
            in_force = after;
            let mut flows = Vec::new();
            while flows.len() < packets {
                let (source, destination) = (source(&mut dice), address(&mut dice));
                let itself = both.world.owner(source).is_some_and(|pod| pod.ips.contains(&destination));
                if source.is_ipv4() != destination.is_ipv4() || source == destination || itself {
                    continue;
                }
                let icmp = if source.is_ipv4() { 1 } else { 58 };
                let protocol = dice.pick(&[6, 6, 17, 132, icmp, 47]);
                let port = matches!(protocol, 6 | 17 | 132).then(|| dice.pick(&PORTS));
                if protocol == 47 && !portless.insert((source.min(destination), source.max(destination))) {
                    continue;
                }
                flows.push(Flow { source, destination, protocol, port });
            }
            let first = number;
            let mut frames: Vec<Vec<u8>> = flows
                .iter()
                .map(|flow| {
                    number += 1;
                    first_packet(flow, number)
                })
                .collect();
            number += 1;
            let (source, destination) = ("198.51.100.1".parse().unwrap(), "198.51.100.2".parse().unwrap());
            let witness = Flow { source, destination, protocol: 17, port: Some(9) };
            frames.push(first_packet(&witness, number));
            let expected: Vec<bool> = flows
                .iter()
                .map(|flow| [Side::Egress, Side::Ingress].iter().all(|side| both.world.allowed(*side, flow)))
                .collect();
            let mut come = forwarded(&mut wire, &frames);
            // One that is lost, or overtaken by the last one, on a busy machine: what rules refuse is refused again.
            let missing = (first + 1..).zip(&expected).zip(&frames);
            let missing = missing.filter(|((nth, expected), _)| **expected && !come.contains(nth));
            let mut again: Vec<Vec<u8>> = missing.map(|(_, frame)| frame.clone()).collect();
            if !again.is_empty() {
                number += 1;
                again.push(first_packet(&witness, number));
                come.extend(forwarded(&mut wire, &again));
            }
            for ((nth, flow), expected) in (first + 1..).zip(&flows).zip(expected) {
                verdicts[usize::from(expected)] += 1;
                assert_eq!(
                    come.contains(&nth),
                    expected,
                    "seed {seed}, state {state}, {flow:?}\n{}\n{:#?}",
                    router.run("nft list ruleset").stdout,
                    both.world
                );
            }
        }
    }
    // Both happen often, or nothing was compared.
    let [refused, allowed] = verdicts;
    assert!(refused > 500 && allowed > 500, "{refused} refused, {allowed} allowed");
}

/// What the kernel is to do, with every pod on this node.
fn ruleset(both: &mut Both) -> Ruleset {
    both.engine.commit(both.age);
    let addresses: BTreeSet<IpAddr> = both.world.pods.iter().flat_map(|pod| pod.ips.iter().copied()).collect();
    let owned = addresses.into_iter().filter(|address| both.world.owner(*address).is_some());
    let local: Vec<LocalPod> = owned.map(|address| LocalPod { addresses: vec![address] }).collect();
    let rules = both.engine.ruleset(&local);
    both.rules = rules.clone();
    rules
}
