//! The flows, streams and measurements that scenarios use, and the other WireGuard implementations.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{net::IpAddr, time::Duration};

use integration::{
    Flow, Host, Impairment, Implementation, Iperf, Lab, TcpCheck, WireguardPeer, await_ok, await_until, key_pair,
    measure::{Datagrams, Packing},
    ping,
    topology::TwoSites,
};

const DEADLINE: Duration = Duration::from_secs(90);
const PACE: Duration = Duration::from_millis(5);

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// [`TwoSites`], the cable of `west1` pulled for a while.
#[test]
fn flows_notice_what_is_lost_and_streams_survive_it() {
    let sites = TwoSites::with_hosts("flows", 1);
    let (east, west) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    let (v4, v6) = (address(&sites.west.v4(0)), address(&sites.west.v6(0)));
    let quiet = [Flow::udp(east, west, v4, PACE), Flow::udp(east, west, v6, PACE), Flow::icmp(east, v6, PACE)];
    for flow in &quiet {
        flow.await_answer(DEADLINE);
    }
    for flow in quiet {
        let report = flow.finish();
        report.assert_nothing_lost();
        assert!(report.sent > 0 && report.duplicates == 0);
    }

    let udp = Flow::udp(east, west, v4, PACE);
    let icmp = Flow::icmp(east, v4, PACE);
    let stream = TcpCheck::start(east, west, v4, 1 << 20);
    for flow in [&udp, &icmp] {
        flow.await_answer(DEADLINE);
    }
    stream.await_progress(DEADLINE);
    sites.relay.set(Impairment { loss: 1.0, ..Impairment::default() });
    let before = udp.so_far().sent;
    await_until("packets into the gap", DEADLINE, || (udp.so_far().sent > before + 40).then_some(()));
    sites.relay.set(Impairment::default());
    for flow in [&udp, &icmp] {
        flow.await_answer(DEADLINE);
    }
    stream.await_progress(DEADLINE);
    for report in [udp.finish(), icmp.finish()] {
        assert!(report.lost >= 20 && report.longest_gap >= 20 * PACE, "{report}");
    }
    stream.finish().assert_intact();
}

/// [`TwoSites`]: what a slow flow of datagrams is said to have lost is what the path has lost, however they are packed.
#[test]
fn a_part_of_a_super_datagram_that_is_not_due_yet_is_not_lost() {
    let sites = TwoSites::with_hosts("packed", 1);
    let (east, west) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    for (packing, pack) in [(Packing::Single, 1), (Packing::Segmented, 47)] {
        let flow = Datagrams::new(east, west, address(&sites.west.v4(0)), 1372, packing);
        // What a busy machine still has under way when the flow ends counts as lost: again.
        let report = await_ok("a flow of which all arrives", DEADLINE, || {
            let report = flow.send(4000.0, Duration::from_millis(300));
            if report.received == report.sent { Ok(report) } else { Err(format!("{report:?}")) }
        });
        assert!(report.sent > 0, "{report:?}");
        assert_eq!((report.wanted % pack, report.sent % pack), (0, 0), "{report:?}");
    }
}

/// [`TwoSites`]: a stream that is reset is noticed.
#[test]
fn a_broken_stream_is_noticed() {
    let sites = TwoSites::with_hosts("broken_stream", 1);
    let (east, west) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    let stream = TcpCheck::start(east, west, address(&sites.west.v4(0)), 1 << 20);
    stream.await_progress(DEADLINE);
    let cut = "table inet cut {
        chain forward {
            type filter hook forward priority filter
            meta l4proto tcp reject with tcp reset
        }
    }";
    sites.router.nft(cut);
    await_until("a fault", DEADLINE, || stream.fault());
    assert!(stream.finish().fault.is_some());
}

/// [`TwoSites`], the line of site east 20 Mbit/s.
#[test]
fn iperf_measures_what_the_relay_lets_through() {
    let sites = TwoSites::with_hosts("iperf", 1);
    let (east, west) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    sites.relay.set(Impairment { rate: Some(20_000_000), ..Impairment::default() });
    for iperf in
        [Iperf::new(address(&sites.west.v4(0))).seconds(1), Iperf::new(address(&sites.west.v6(0))).seconds(1).reverse()]
    {
        // A server that has to wait for a processor finds more than a second's worth at once.
        let throughput = await_ok("what the line carries to be measured", DEADLINE, || {
            let throughput = iperf.run(east, west);
            let is_right = throughput.bits_per_second > 0.0 && throughput.bits_per_second < 25e6;
            if is_right { Ok(throughput) } else { Err(format!("{throughput:?}")) }
        });
        assert!(throughput.retransmits.is_some());
    }
    // What the server's socket has room for, should it have to wait.
    let throughput = Iperf::new(address(&sites.west.v4(0))).seconds(1).udp(500_000).run(east, west);
    assert_eq!(throughput.lost_datagrams, Some(0));
}

/// ```text
///   a (wireguard-go) ──┤ lan ├── b (boringtun-cli)
/// ```
#[test]
fn other_implementations_talk_to_each_other() {
    let lab = Lab::new("implementations");
    let switch = lab.switch("lan");
    let (a, b) = (lab.host("a"), lab.host("b"));
    a.connect(&switch, &["192.0.2.1/24"]);
    b.connect(&switch, &["192.0.2.2/24"]);
    let (a_private, a_public) = key_pair(&a);
    let (b_private, b_public) = key_pair(&b);
    let start = |host: &Host, implementation, own: &str, private: &str, public: &str, peer: &str, endpoint: &str| {
        let wireguard = WireguardPeer::start(host, implementation, &[&format!("{own}/24")]);
        wireguard.setconf(&format!(
            "[Interface]\nPrivateKey = {private}\nListenPort = 51820\nAddress = {own}/24\n\
             [Peer]\nPublicKey = {public}\nAllowedIPs = {peer}/32\nEndpoint = {endpoint}:51820\n"
        ));
        wireguard
    };
    let first = start(&a, Implementation::WireguardGo, "10.9.0.1", &a_private, &b_public, "10.9.0.2", "192.0.2.2");
    let second = start(&b, Implementation::BoringtunCli, "10.9.0.2", &b_private, &a_public, "10.9.0.1", "192.0.2.1");
    await_ok("the handshake, and echoes", DEADLINE, || {
        let report = ping(&a, "10.9.0.2");
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    for wireguard in [&first, &second] {
        let transfer = wireguard.show("transfer");
        assert!(transfer.split_whitespace().skip(1).all(|bytes| bytes != "0"), "{transfer}");
    }
}

/// How fast the engaged relay is; a figure to look at, not a condition.
#[test]
#[ignore = "a measurement: cargo test -p integration --test traffic -- --ignored --nocapture"]
fn how_fast_is_the_relay() {
    let sites = TwoSites::with_hosts("relay_speed", 1);
    let (east, west) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    let iperf = Iperf::new(address(&sites.west.v4(0))).seconds(3);
    println!("bypassed: {:.0} Mbit/s", iperf.run(east, west).bits_per_second / 1e6);
    sites.relay.set(Impairment::default());
    println!("engaged:  {:.0} Mbit/s", iperf.run(east, west).bits_per_second / 1e6);
    println!("reverse:  {:.0} Mbit/s", iperf.clone().reverse().run(east, west).bits_per_second / 1e6);
    sites.relay.set(Impairment { delay: Duration::from_millis(5), ..Impairment::default() });
    println!("5 ms:     {:.0} Mbit/s", iperf.run(east, west).bits_per_second / 1e6);
}

/// How long it takes to set the topology up and take it down.
#[test]
#[ignore = "a measurement: cargo test -p integration --test traffic -- --ignored --nocapture"]
fn how_fast_is_the_lab() {
    let start = std::time::Instant::now();
    let sites = TwoSites::new("lab_speed");
    println!("two sites: {:?}", start.elapsed());
    let start = std::time::Instant::now();
    let etcd = sites.start_etcd(1);
    println!("etcd:      {:?}", start.elapsed());
    let start = std::time::Instant::now();
    drop((etcd, sites));
    println!("gone:      {:?}", start.elapsed());
}
