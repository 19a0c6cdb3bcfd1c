//! What scenarios rest on: underlay, sniffer, NAT and relay do what they say.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use integration::{Fate, Impairment, Lab, Lane, Ping, Pod, Sniffer, await_until, ping, topology::TwoSites};

const DEADLINE: Duration = Duration::from_secs(30);
const PODS: [&str; 2] = ["10.244.0.0/16", "fd42:244::/48"];

/// One pod per host, `10.244.N.9` and `fd42:244:0:N::9`, and a route to it on every host, by the site's own switch.
fn pods_with_static_routes(sites: &TwoSites) -> Vec<Pod> {
    let pods: Vec<Pod> = sites
        .hosts()
        .enumerate()
        .map(|(nth, host)| {
            host.enable_forwarding();
            let addresses = [format!("10.244.{nth}.9"), format!("fd42:244:0:{nth}::9")];
            host.pod("p", &addresses.map(|text| text.parse::<IpAddr>().unwrap()))
        })
        .collect();
    for (first, site) in [(0, &sites.east), (2, &sites.west)] {
        for (here, there) in [(0, 1), (1, 0)] {
            let nth = first + there;
            site.hosts[here].route(&format!("10.244.{nth}.0/24"), &format!("via {}", site.v4(there)));
            site.hosts[here].route(&format!("fd42:244:0:{nth}::/64"), &format!("via {}", site.v6(there)));
        }
    }
    pods
}

/// [`TwoSites`], and nothing in the clear between its sites.
#[test]
fn two_sites_are_connected_and_only_the_underlay_is_seen_between_them() {
    let sites = TwoSites::new("two_sites");
    let sniffer = sites.router.sniff(&PODS.map(|prefix| prefix.parse().unwrap()));
    for (nth, host) in sites.east.hosts.iter().enumerate() {
        for target in [sites.west.v4(nth), sites.west.v6(nth), "203.0.113.10".to_owned(), "2001:db8:3::10".to_owned()] {
            ping(host, target).assert_all_answered();
        }
    }
    let pods = pods_with_static_routes(&sites);
    for (from, to) in [(0, 1), (1, 0), (2, 3), (3, 2)] {
        ping(&pods[from], pods[to].v4()).assert_all_answered();
        ping(&pods[from], pods[to].v6()).assert_all_answered();
    }
    assert!(sniffer.frames() > 0);
    let (capture, file) = sites.router.capture("icmp");
    ping(&sites.east.hosts[0], sites.west.v4(0)).assert_all_answered();
    capture.term(Duration::from_secs(10));
    let read = sites.router.run_args(&["tcpdump", "-n", "-r", &file.to_string_lossy()]);
    assert!(read.stdout.contains("192.0.2.11 > 198.51.100.11: ICMP echo request"), "{}", read.describe());
    sniffer.assert_clean();

    // Flooded to the router, because the switch knows no such neighbour, but not for it.
    let flooded = &sites.east.hosts[0];
    flooded.ip(&["neigh add 192.0.2.99 lladdr 02:00:00:00:00:99 dev eth0"]);
    flooded.route("10.244.99.0/24", "via 192.0.2.99");
    Ping::new("10.244.99.9").count(1).wait(Duration::from_millis(100)).run(&pods[0]).assert_none_answered();
    sniffer.assert_clean();

    // What a node does that has no rule against it: pod packets follow its default route.
    Ping::new(pods[2].v4()).count(1).wait(Duration::from_millis(100)).run(&pods[0]).assert_none_answered();
    await_seen(&sniffer, pods[0].v4());
    Ping::new(pods[0].v6()).count(1).wait(Duration::from_millis(100)).run(&pods[3]).assert_none_answered();
    await_seen(&sniffer, pods[3].v6());
    // The router's own answers (unreachable) quote the packet, but they leave; only what comes in is looked at.
    sniffer.assert_clean();
}

/// Waits until the sniffer has seen this address: on a busy machine a packet is on its way for a while.
#[track_caller]
fn await_seen(sniffer: &Sniffer, address: IpAddr) {
    await_until(&format!("{address} to be seen"), DEADLINE, || {
        sniffer.take_violations().iter().any(|violation| violation.address == address).then_some(())
    });
}

/// ```text
///   inside ──┤ home ├── nat ──┤ outside ├── server
/// ```
#[test]
fn a_nat_rewrites_and_forgets() {
    let lab = Lab::new("nat");
    let (home, street) = (lab.switch("home"), lab.switch("street"));
    let (inside, nat, server) = (lab.host("inside"), lab.nat("nat"), lab.host("server"));
    inside.connect(&home, &["192.168.1.2/24"]);
    nat.connect(&home, &["192.168.1.1/24"]);
    let outside = nat.connect(&street, &["192.0.2.1/24"]);
    server.connect(&street, &["192.0.2.9/24"]);
    server.route("192.168.1.0/24", "via 192.0.2.1");
    inside.route("default", "via 192.168.1.1");
    nat.masquerade(&outside);
    nat.set_udp_timeout(Duration::from_secs(60));
    assert_eq!(nat.read_sysctl("net/netfilter/nf_conntrack_udp_timeout"), "60");

    let far = server.enter(|| UdpSocket::bind("192.0.2.9:7")).unwrap();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    let near = inside.enter(|| UdpSocket::bind("192.168.1.2:5555")).unwrap();
    near.set_read_timeout(Some(DEADLINE)).unwrap();
    near.send_to(b"hello", "192.0.2.9:7").unwrap();
    let mut bytes = [0; 16];
    let (length, seen) = far.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..length], seen.ip().to_string().as_str()), (&b"hello"[..], "192.0.2.1"));
    far.send_to(b"back", seen).unwrap();
    assert_eq!(near.recv(&mut bytes).unwrap(), 4);

    nat.forget_mappings();
    far.send_to(b"too late", seen).unwrap();
    near.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(near.recv(&mut bytes).is_err());
    Ping::new("192.168.1.2").count(1).wait(Duration::from_millis(200)).run(&server).assert_none_answered();
}

/// [`TwoSites`] with a third site behind a NAT.
#[test]
fn a_site_behind_a_nat_gets_out_and_nobody_gets_in() {
    let sites = TwoSites::with_hosts("home", 1);
    let (_nat, home) = sites.add_home(2);
    for host in &home.hosts {
        ping(host, sites.east.v4(0)).assert_all_answered();
        ping(host, sites.west.v6(0)).assert_all_answered();
        ping(host, "203.0.113.10").assert_all_answered();
    }
    for address in [home.v4(0), home.v6(0)] {
        Ping::new(address).count(1).wait(Duration::from_millis(200)).run(&sites.east.hosts[0]).assert_none_answered();
    }
}

/// [`TwoSites`], the line of site east made bad.
#[test]
fn the_relay_delays_loses_by_its_seed_and_reorders() {
    const COUNT: u32 = 100;
    let sites = TwoSites::with_hosts("relay", 1);
    let (east, west) = (&sites.east.hosts[0], sites.west.v4(0));
    ping(east, &west).assert_all_answered();

    let delay = Duration::from_millis(30);
    sites.relay.set(Impairment { delay, ..Impairment::default() });
    // The relay is a thread that may have to wait for a processor, and the answers with it.
    let patient = || Ping::new(&west).wait(Duration::from_secs(5));
    let report = patient().count(5).run(east);
    report.assert_all_answered();
    assert!(report.answers.iter().all(|(_, time)| *time >= 2 * delay), "{report:?}");

    // Only requests can be lost, and the seed says which.
    let bad = Impairment { loss: 0.3, seed: 7, ..Impairment::default() };
    sites.relay.set_each(bad, Impairment::default());
    let report = patient().count(COUNT).interval(Duration::from_millis(2)).run(east);
    let mut lane = Lane::new(bad);
    let arriving: Vec<u32> = (1..=COUNT).filter(|_| lane.packet(Instant::now(), 98) != Fate::Lost).collect();
    let answered: Vec<u32> = report.answers.iter().map(|(number, _)| *number).collect();
    assert_eq!(answered, arriving);
    let [from_east, towards_east] = sites.relay.counts();
    assert_eq!(u64::from(report.lost()), from_east.lost);
    assert_eq!(towards_east.lost, 0);

    let bad = Impairment { delay: Duration::from_millis(20), reorder: 0.2, seed: 7, ..Impairment::default() };
    sites.relay.set_each(bad, Impairment::default());
    let report = patient().count(COUNT).interval(Duration::from_millis(2)).run(east);
    report.assert_all_answered();
    assert!(!report.answers.is_sorted_by_key(|(number, _)| *number), "{report:?}");

    sites.relay.bypass();
    ping(east, &west).assert_all_answered();
}
