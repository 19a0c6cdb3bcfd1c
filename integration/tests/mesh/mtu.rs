//! How large packets may be, and who gets the error when they are too large.
//!
//! ```text
//!   east1 (pod) ─┐                                 ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │                └─ west2 (pod)
//!                               etcd
//! ```

use std::{
    collections::BTreeMap,
    net::{IpAddr, TcpListener, TcpStream},
};

use integration::{
    Iperf, Namespace, Ping, Pod, TcpCheck, await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::SOON;

/// An echo request of this size, headers and all, that must not be fragmented.
pub(crate) fn whole(address: IpAddr, size: u16) -> Ping {
    let headers = if address.is_ipv4() { 28 } else { 48 };
    Ping::new(address).size(size - headers).option("-M do")
}

#[track_caller]
pub(crate) fn await_carries(from: &Namespace, address: IpAddr, size: u16) {
    await_ok(&format!("{size} bytes from {} to {address}", from.name()), SOON, || {
        let report = whole(address, size).run(from);
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
}

/// The largest segments that each SYN and SYN/ACK to and from `pod` offered, while `traffic` went.
fn offered(pod: &Pod, traffic: impl Fn()) -> Vec<u16> {
    let (capture, file) = pod.capture("tcp");
    traffic();
    let file = file.to_string_lossy().into_owned();
    let segments = || -> Vec<u16> {
        let text = pod.run(&format!("tcpdump -nn -v -r {file}")).stdout;
        // The options of SYNs only: nothing else has an mss. One that is sent again has the same ends and flags.
        let offers = text.lines().filter_map(|line| {
            let (head, rest) = line.split_once(" > ")?;
            let (to, _) = rest.split_once(", cksum")?;
            let size = rest.split_once("mss ")?.1.split(|c: char| !c.is_ascii_digit()).next()?;
            Some(((head.split_whitespace().next_back()?, to), size.parse::<u16>().ok()?))
        });
        offers.collect::<BTreeMap<(&str, &str), u16>>().into_values().collect()
    };
    let segments = await_until("the SYNs of four connections", SOON, || Some(segments()).filter(|all| all.len() >= 8));
    drop(capture);
    segments
}

#[track_caller]
fn connect(from: &Namespace, to: &Namespace, address: IpAddr) {
    let listener = to.enter(|| TcpListener::bind((address, 0))).unwrap();
    let target = listener.local_addr().unwrap();
    let _client = from.enter(|| TcpStream::connect_timeout(&target, SOON)).unwrap();
    let _server = listener.accept().unwrap();
}

/// 1420 by either path: what fits passes whole, what does not is refused with the size that would; the largest segment
/// of TCP is clamped on both kinds of path, for pods that believe in 1500.
#[test]
fn by_default_1420_on_either_path() {
    let mesh = Mesh::start("mtu-default");
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    mesh.node("west1").await_path("west2", "direct", SOON);
    let from = mesh.pod("east1");
    for node in ["east2", "west1"] {
        for address in mesh.pod(node).addresses() {
            await_carries(from, *address, 1420);
            let report = whole(*address, 1421).run(from);
            report.assert_none_answered();
            assert!(report.text.contains("1420"), "{}", report.text);
        }
    }
    for pod in &mesh.pods {
        pod.set_mtu(1500);
    }
    for node in ["east2", "west1"] {
        let to = mesh.pod(node);
        let segments = offered(to, || {
            for address in to.addresses() {
                connect(from, to, *address);
            }
            for address in from.addresses() {
                connect(to, from, *address);
            }
        });
        // What `to` sends is seen before the clamp: two SYNs and two SYN/ACKs of its own believe in 1500.
        let (mut all, mut clamped) = (segments.clone(), vec![1380, 1360, 1380, 1360]);
        all.sort_unstable();
        clamped.sort_unstable();
        assert_eq!(all[..4], clamped[..], "{node}: {segments:?}");
        // A packet of 1500 bytes is answered by its node, or by the pod's own kernel once it knows.
        for address in to.addresses() {
            let report = whole(*address, 1500).run(from);
            report.assert_none_answered();
            assert!(report.text.contains("1420"), "{node}: {}", report.text);
        }
    }
    mesh.sniffer.assert_clean();
}

/// Jumbo frames underneath, and a `Backend.MTU` that uses them.
#[test]
fn a_jumbo_underlay_is_used_when_configured() {
    let sites = TwoSites::with_hosts("mtu-jumbo", 1);
    for name in ["east1", "east", "relay-east", "router", "west", "west1"] {
        let namespace = format!("{}-{name}", sites.lab.id());
        let links = sites.store.run(&format!("ip -n {namespace} -o link show")).stdout;
        for link in links.lines().filter_map(|line| line.split([':', '@']).nth(1)).map(str::trim) {
            if link != "lo" {
                sites.store.run(&format!("ip -n {namespace} link set {link} mtu 9000"));
            }
        }
    }
    let config = CONFIG.replace(r#""Type": "wireguard""#, r#""Type": "wireguard", "MTU": 8920"#);
    let mesh = Mesh::start_on(sites, &config, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (from, to) = (mesh.pod("east1"), mesh.pod("west1"));
    for address in to.addresses() {
        await_carries(from, *address, 8920);
        let report = whole(*address, 8921).run(from);
        report.assert_none_answered();
        assert!(report.text.contains("8920"), "{}", report.text);
        assert!(Iperf::new(*address).seconds(1).run(from, to).bits_per_second > 1e6);
    }
    mesh.sniffer.assert_clean();
}

/// `Backend.MTU` larger than the machines' own interface: the system says so, and the routes follow.
#[test]
fn an_mtu_beyond_the_interface_is_found_out() {
    let config = CONFIG.replace(r#""Type": "wireguard""#, r#""Type": "wireguard", "MTU": 8920"#);
    let mesh = Mesh::start_on(TwoSites::with_hosts("mtu-beyond", 1), &config, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (from, to) = (mesh.pod("east1"), mesh.pod("west1"));
    streams_both_ways(from, to);
    for address in to.addresses() {
        await_carries(from, *address, 1420);
    }
    await_route_mtu(&mesh, "east1", to, 1440);
}

/// A link in the middle carries 1399: the router says so, the routes to that peer follow, and pods are told. 1339 is no
/// multiple of 16: padding stays within (N6).
#[test]
fn a_narrow_link_on_the_way_lowers_the_routes() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("mtu-narrow", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    narrow(&mesh, 1399);
    let (from, to) = (mesh.pod("east1"), mesh.pod("west1"));
    streams_both_ways(from, to);
    for (node, pod, other) in [("east1", from, to), ("west1", to, from)] {
        for address in other.addresses() {
            await_carries(pod, *address, 1339);
        }
        let _ = whole(other.v4(), 1420).run(pod);
        await_route_mtu(&mesh, node, other, 1339);
        for address in other.addresses() {
            let report = whole(*address, 1340).run(pod);
            report.assert_none_answered();
            assert!(report.text.contains("1339"), "{}", report.text);
        }
    }
}

/// A link in the middle carries 1300: less than IPv6 needs inside, so the routes stay at 1280, outer packets may be
/// fragmented, and the peer's reason says so.
#[test]
fn a_very_narrow_link_fragments_outside_and_keeps_1280_inside() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("mtu-1300", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    narrow(&mesh, 1300);
    let (from, to) = (mesh.pod("east1"), mesh.pod("west1"));
    streams_both_ways(from, to);
    for (node, pod, other) in [("east1", from, to), ("west1", to, from)] {
        for address in other.addresses() {
            await_carries(pod, *address, 1280);
        }
        let _ = whole(other.v4(), 1420).run(pod);
        await_route_mtu(&mesh, node, other, 1280);
        let peer = if node == "east1" { "west1" } else { "east1" };
        await_ok("the peer's reason to say so", SOON, || {
            let peer = mesh.node(node).peer(peer).ok_or("no peer")?;
            let says = peer["reason"].as_str().is_some_and(|reason| reason.contains("fragmented"));
            if says { Ok(()) } else { Err(peer.to_string()) }
        });
    }
}

/// `Backend.MTU` put while the mesh runs: device, routes and `subnet.env` follow, down and up again.
#[test]
fn a_new_mtu_in_etcd_is_followed() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("mtu-live", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (from, to) = (mesh.pod("east1"), mesh.pod("west1"));
    for mtu in [1300, 1420] {
        let config = CONFIG.replace(r#""Type": "wireguard""#, &format!(r#""Type": "wireguard", "MTU": {mtu}"#));
        mesh.etcd.put("/meshd/config", &config);
        for node in &mesh.nodes {
            await_until(&format!("subnet.env of {} to say {mtu}", node.name()), SOON, || {
                node.subnet_env("FLANNEL_MTU").filter(|text| *text == mtu.to_string())
            });
            await_ok(&format!("the device of {} to follow", node.name()), SOON, || {
                let link = node.host().run(&format!("ip link show {}", node.interface())).stdout;
                if link.contains(&format!("mtu {mtu} ")) { Ok(()) } else { Err(link) }
            });
        }
        // What the pod has learned of the path before.
        from.run("ip -4 route flush cache");
        from.run("ip -6 route flush cache");
        for address in to.addresses() {
            await_carries(from, *address, mtu);
        }
        let report = whole(to.v4(), mtu + 1).run(from);
        report.assert_none_answered();
        assert!(report.text.contains(&mtu.to_string()), "{}", report.text);
    }
}

/// Lets the router carry this much at most, in both directions and families, and say so.
fn narrow(mesh: &Mesh, mtu: u16) {
    let router = &mesh.sites.router;
    for net in ["192.0.2.0/24", "198.51.100.0/24", "2001:db8:1::/64", "2001:db8:2::/64"] {
        let (family, how) = if net.contains(':') { ("-6", "metric 1 mtu") } else { ("-4", "scope link mtu lock") };
        let line = router.run(&format!("ip {family} route show {net}")).stdout;
        let words: Vec<&str> = line.split_whitespace().collect();
        let dev = words[words.iter().position(|word| *word == "dev").unwrap() + 1];
        router.run(&format!("ip {family} route replace {net} dev {dev} proto kernel {how} {mtu}"));
        router.run_args(&["ip", family, "route", "flush", "cache"]);
    }
}

/// TCP that fills packets makes its way in both families and directions.
#[track_caller]
fn streams_both_ways(from: &Namespace, to: &Pod) {
    for address in to.addresses() {
        let stream = TcpCheck::start(from, to, *address, 4 << 20);
        let enough = |received: [u64; 2]| received.iter().all(|bytes| *bytes > 2 << 20);
        await_until("two megabytes each way", SOON, || {
            assert_eq!(stream.fault(), None);
            enough(stream.received()).then_some(())
        });
        stream.finish().assert_intact();
    }
}

/// Waits until the node's routes to the pod's subnets have this MTU.
#[track_caller]
fn await_route_mtu(mesh: &Mesh, node: &str, pod: &Pod, mtu: u16) {
    let node = mesh.node(node);
    for address in pod.addresses() {
        await_ok(&format!("a route to {address} with MTU {mtu}"), SOON, || {
            let family = if address.is_ipv6() { "-6" } else { "-4" };
            let route = format!("ip {family} route show match {address} dev {}", node.interface());
            let route = node.host().run(&route).stdout;
            if route.contains(&format!("mtu {mtu}")) { Ok(()) } else { Err(route) }
        });
    }
}
