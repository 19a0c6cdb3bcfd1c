//! Forged and replayed probes.
//!
//! ```text
//!   east1 (pod) ─┐
//!   east2 (pod) ─┼─ switch
//!   mallory ─────┘  has recorded probes and echoes, and sends in the name of east2's overlay address
//! ```

use std::{
    fs,
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use integration::{Host, await_until, ping, topology::TwoSites};

use super::{CHANGE, Pair, WATCH, watch};

/// The bytes that identify a probe, and its length.
const MAGIC: &[u8] = b"mshp";
const LENGTH: usize = 40;
/// Where in it the kind is: 1 is a probe, 2 an echo.
const KIND: usize = 5;
const PORT: u16 = 51821;

#[test]
fn forged_and_replayed_probes_prove_nothing_and_a_flood_of_them_gets_few_echoes() {
    let sites = TwoSites::new("abuse");
    let mallory = sites.lab.host("mallory");
    mallory.connect(&sites.east.switch, &["192.0.2.66/24"]);
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    pair.await_direct();
    let [a, b] = &pair.nodes;
    let (to, from) = (pair.overlay(0, true), pair.overlay(1, true));
    let [probe, echo] = record(&pair, from, to);
    mallory.ip(&[&format!("addr add {from}/32 dev lo"), &format!("route add {to}/32 via 192.0.2.11 src {from}")]);
    let socket = mallory.enter(|| UdpSocket::bind((from, PORT))).expect("a socket");
    let echoes = format!("ip saddr {to} udp sport {PORT} @th,104,8 2 counter");

    // A flood of what looks right, and of what does not.
    pair.switch_rules(&echoes);
    let mut forged = probe.clone();
    forged[LENGTH - 1] ^= 1;
    let start = Instant::now();
    for _ in 0..10_000 {
        for message in [&probe[..], &echo, &forged, &probe[..LENGTH - 1], &[0; 1200]] {
            // A full buffer only makes it a smaller flood.
            let _ = socket.send_to(message, (to, PORT));
        }
    }
    let answered = counted(&pair);
    // Until they were counted: what had not been read when the flood ended was answered afterwards.
    let spent = start.elapsed();
    // 20 a second, for the seconds that have begun, and what earlier probes have left.
    let most = 20 * (spent.as_secs() + 4);
    assert!(answered <= most, "{answered} echoes within {spent:?}");
    pair.await_direct();

    // Nothing of east2's comes direct any more; its old echoes come again and again.
    let genuine = mac_of(b.host());
    pair.switch_rules(&format!("ether saddr {genuine} ip saddr 10.244.0.0/16 counter drop\n{echoes}"));
    let replay = || {
        for message in [&echo[..], &forged] {
            let _ = socket.send_to(message, (to, PORT));
        }
    };
    await_until("east1 to leave the direct path", CHANGE, || {
        replay();
        a.peer(b.name()).filter(|peer| peer["path"] == "wireguard").map(drop)
    });
    watch(WATCH, || {
        replay();
        let peer = a.peer(b.name()).expect("the peer is there");
        assert_eq!(peer["path"], "wireguard", "{peer}");
    });

    // A probe that comes out of the tunnel is no probe: east2's own host sends one there.
    await_until("the tunnel to carry packets", CHANGE, || (ping(b.host(), to).lost() == 0).then_some(()));
    pair.switch_rules(&format!("ether saddr {genuine} ip saddr 10.244.0.0/16 counter drop\n{echoes}"));
    let inside = b.host().enter(|| UdpSocket::bind((from, 0))).expect("a socket");
    for _ in 0..10 {
        inside.send_to(&probe, (to, PORT)).expect("sent into the tunnel");
    }
    // What is sent after them has come, so they have.
    await_until("what was sent after them to come", CHANGE, || (ping(b.host(), to).lost() == 0).then_some(()));
    watch(Duration::from_secs(2), || assert_eq!(counted(&pair), 0, "a probe from the tunnel got an echo"));
    pair.switch_rules("");
    pair.await_direct();
}

/// A probe and an echo that went from one overlay address to the other.
fn record(pair: &Pair, from: IpAddr, to: IpAddr) -> [Vec<u8>; 2] {
    let (_tcpdump, file) = pair.sites.east.switch.capture("udp port 51821");
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else { panic!("IPv4 is recorded") };
    await_until("a probe and an echo to be recorded", CHANGE, || {
        let bytes = fs::read(&file).ok()?;
        let message = |kind: u8| {
            bytes.windows(LENGTH).enumerate().find_map(|(at, message)| {
                // The last 8 bytes of the IPv4 header are the addresses; UDP's has 8.
                let addresses = bytes.get(at.checked_sub(16)?..at - 8)?;
                let right = message.starts_with(MAGIC) && message[KIND] == kind;
                (right && addresses[..4] == from.octets() && addresses[4..] == to.octets()).then(|| message.to_vec())
            })
        };
        Some([message(1)?, message(2)?])
    })
}

/// Packets that the last rule of the switch has counted.
fn counted(pair: &Pair) -> u64 {
    let text = pair.sites.east.switch.run("nft list table bridge lab").stdout;
    let packets = text.lines().rev().find_map(|line| line.split_once("counter packets ")).expect("a counter");
    packets.1.split_whitespace().next().and_then(|count| count.parse().ok()).expect("a number")
}

fn mac_of(host: &Host) -> String {
    let link = host.run("ip -o link show eth0").stdout;
    link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).expect("a MAC address").to_owned()
}
