//! Traffic of every kind through the tunnel, over IPv4 and over IPv6 (N1 to N4).
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!                         sniffs │
//!                              etcd
//! ```

use std::net::IpAddr;

use integration::{
    Iperf, Namespace, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::{SOON, underlay::ipv6_underlay};

#[test]
fn pings_and_streams_over_ipv4() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("traffic-ipv4", 1), CONFIG, |meshd| meshd);
    carries_all_kinds(&mesh, "198.51.100.11:");
}

#[test]
fn pings_and_streams_over_ipv6() {
    carries_all_kinds(&ipv6_underlay("traffic-ipv6", 1), "[2001:db8:2::11]:");
}

#[track_caller]
fn carries_all_kinds(mesh: &Mesh, endpoint: &str) {
    mesh.await_all_reach_each_other();
    let west = mesh.node("east1").await_path("west1", "wireguard", SOON);
    assert!(west["endpoint"].as_str().is_some_and(|at| at.starts_with(endpoint)), "{west}");
    let (east, west) = (mesh.pod("east1"), mesh.pod("west1"));
    for (from, to) in [(east, west), (west, east)] {
        echoes_come_back(mesh, from, to.v4(), 10, &["-f"]);
        echoes_come_back(mesh, from, to.v6(), 10, &["-f"]);
    }
    for address in [west.v4(), west.v6()] {
        // In fragments, each of which goes its own way through the tunnel.
        echoes_come_back(mesh, east, address, 2, &["-s", "65000", "-i", "0.1"]);
        let many = Iperf::new(address).seconds(1).streams(50).run(east, west);
        assert!(many.bits_per_second > 1e5, "{}", many.report["end"]);
        for udp in [false, true] {
            let iperf = Iperf::new(address).seconds(1).option("--bidir");
            let iperf = if udp { iperf.udp(0) } else { iperf };
            let report = iperf.run(east, west).report;
            let received =
                if udp { ["sum", "sum_bidir_reverse"] } else { ["sum_received", "sum_received_bidir_reverse"] };
            for sum in received {
                let sum = &report["end"][sum];
                let bytes = sum["bytes"].as_f64().unwrap_or_default();
                let lost = sum["lost_percent"].as_f64().unwrap_or_default();
                assert!(bytes > 1e5 && lost < 100.0, "to {address}, UDP {udp}: {sum}");
            }
        }
    }
    for node in &mesh.nodes {
        let status = node.status();
        for fault in ["in_unauthentic", "in_inner_malformed", "in_wrong_source", "in_wrong_destination"] {
            assert_eq!(crate::outside_peer::drops(&status, fault), 0, "{status}");
        }
    }
    mesh.sniffer.assert_clean();
}

/// Sends this many echo requests, and waits until the kernel of `from` has taken as many echoes in, whole and with the
/// right checksum. Its count is asked, not `ping`, whose socket loses echoes on a busy machine.
#[track_caller]
fn echoes_come_back(mesh: &Mesh, from: &Namespace, address: IpAddr, count: u64, options: &[&str]) {
    let counter = if address.is_ipv4() { "IcmpInEchoReps" } else { "Icmp6InEchoReplies" };
    let echoes = || -> u64 {
        let text = from.run(&format!("nstat -asz {counter}")).stdout;
        let line = text.lines().find_map(|line| line.strip_prefix(counter)).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
    };
    let before = echoes();
    let (number, to) = (count.to_string(), address.to_string());
    let output = from.run_args(&[&["ping", "-n", "-c", &number, "-W", "30"], options, &[&to]].concat());
    await_ok(&format!("{count} echoes from {address}"), SOON, || {
        let now = echoes();
        let drops = || mesh.nodes.iter().map(|node| node.status()["drops"].to_string()).collect::<Vec<_>>();
        let why = || format!("{} came\n{}\ndrops: {:?}", now - before, output.describe(), drops());
        if now >= before + count { Ok(()) } else { Err(why()) }
    });
}
