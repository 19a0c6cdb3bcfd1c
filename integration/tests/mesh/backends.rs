//! Backends in clear text: vxlan and host-gw, and a mesh that changes from one to another.
//!
//! ```text
//!   east1 (pod) ─┐                                 ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │                └─ west2 (pod)
//!                               etcd
//! ```

use std::{net::IpAddr, time::Duration};

use integration::{
    Flow, Iperf, Ping, TcpCheck, await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::{
    SOON,
    mtu::{await_carries, whole},
};

/// The default network with this backend.
fn config(backend: &str) -> String {
    let (before, _) = CONFIG.split_once(r#""Backend""#).unwrap();
    format!(r#"{before}"Backend": {backend}}}"#)
}

fn start(title: &str, backend: &str) -> Mesh {
    Mesh::start_on(TwoSites::new(title), &config(backend), |meshd| meshd)
}

/// Packets of this size are carried whole and larger ones are answered with it, by TCP too.
#[track_caller]
fn assert_mtu(mesh: &Mesh, from: &str, to: &str, mtu: u16) {
    let (from, to) = (mesh.pod(from), mesh.pod(to));
    for address in to.addresses() {
        await_carries(from, *address, mtu);
        let report = whole(*address, mtu + 1).run(from);
        report.assert_none_answered();
        let size = mtu.to_string();
        assert!(report.text.contains(&size) || report.text.contains("Message too long"), "{}", report.text);
        assert!(Iperf::new(*address).seconds(1).run(from, to).bits_per_second > 1e6);
    }
}

#[test]
fn vxlan_carries_all_pairs_and_plain_routes_those_on_one_subnet() {
    let mesh = start("vxlan", r#"{"Type": "vxlan", "VNI": 7, "DirectRouting": true}"#);
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    mesh.node("east1").await_path("west1", "vxlan", SOON);
    mesh.await_all_reach_each_other();
    for node in &mesh.nodes {
        node.await_status("to be well", SOON, |status| status["state"] == "running");
    }
    // 14 + 8 + 8 + 40 bytes around a packet of IPv6, and one MTU on every path.
    assert_mtu(&mesh, "east1", "west1", 1430);
    assert_mtu(&mesh, "east1", "east2", 1430);
    assert!(!mesh.sniffer.take_violations().is_empty(), "it is in clear text");
}

#[test]
fn without_direct_routing_all_pairs_take_vxlan() {
    let mesh = start("vxlan-only", r#"{"Type": "vxlan"}"#);
    mesh.await_all_reach_each_other();
    for (from, to) in [("east1", "east2"), ("west2", "east1")] {
        assert_eq!(mesh.node(from).peer(to).unwrap()["path"], "vxlan");
    }
    // What others take away is back within a second or so, and no packet waits for longer.
    let east = mesh.node("east1");
    let host = east.host();
    let (remote, address) = (mesh.pod("west1"), mesh.pod("west1").addresses()[0]);
    let overlay: Vec<IpAddr> = mesh.node("west1").overlay();
    for line in [
        "ip link del flannel.1".to_owned(),
        "ip link set flannel.1 down".to_owned(),
        format!("ip neigh del {} dev flannel.1", overlay[0]),
        "nft flush chain inet meshd vxlan_inner".to_owned(),
    ] {
        host.run(&line);
        await_ok(&format!("{remote} to answer after {line}", remote = remote.name()), SOON, || {
            let report = Ping::new(address).run(mesh.pod("east1"));
            if report.lost() == 0 { Ok(()) } else { Err(report.text) }
        });
    }
    await_until("the rule to be back", SOON, || {
        let rules = host.run("nft list chain inet meshd vxlan_inner").stdout;
        rules.contains("vteps4").then_some(())
    });
    assert!(!mesh.sniffer.take_violations().is_empty(), "it is in clear text");
}

#[test]
fn with_host_gw_a_peer_is_direct_or_unreachable_with_the_reason() {
    let mesh = start("host-gw", r#"{"Type": "host-gw"}"#);
    for site in ["east", "west"] {
        let (one, two) = (format!("{site}1"), format!("{site}2"));
        mesh.node(&one).await_path(&two, "direct", SOON);
        mesh.node(&two).await_path(&one, "direct", SOON);
        assert_mtu(&mesh, &one, &two, 1500);
    }
    let peer = mesh.node("east1").await_path("west1", "unreachable", SOON);
    let reason = peer["reason"].as_str().unwrap();
    assert!(reason.contains("not on a subnet of this node's"), "{reason}");
    for address in mesh.pod("west1").addresses() {
        Ping::new(*address).run(mesh.pod("east1")).assert_none_answered();
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn a_mesh_changes_its_backend_while_it_runs() {
    let mesh = start("backend-changes", r#"{"Type": "wireguard"}"#);
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("west1", "wireguard", SOON);
    // Connections and echoes go on while it changes: both families, between the sites and inside of one.
    let (from, others) = (mesh.pod("east1"), ["west1", "east2"].map(|node| mesh.pod(node)));
    let ends: Vec<_> =
        others.into_iter().flat_map(|to| to.addresses().iter().map(move |address| (to, *address))).collect();
    let streams: Vec<_> = ends.iter().map(|(to, address)| TcpCheck::start(from, to, *address, 1 << 20)).collect();
    let echoes: Vec<_> = ends.iter().map(|(_, at)| (*at, Flow::icmp(from, *at, Duration::from_millis(10)))).collect();
    for (backend, path) in [
        (r#"{"Type": "vxlan", "DirectRouting": true}"#, "vxlan"),
        (r#"{"Type": "vxlan", "VNI": 9, "Port": 4789}"#, "vxlan"),
        (r#"{"Type": "wireguard"}"#, "wireguard"),
    ] {
        mesh.etcd.put("/meshd/config", &config(backend));
        for node in &mesh.nodes {
            for other in &mesh.nodes {
                if node.name()[..4] != other.name()[..4] {
                    node.await_path(other.name(), path, SOON);
                }
            }
        }
        mesh.await_all_reach_each_other();
    }
    for (address, echoes) in echoes {
        println!("echoes to {address} during three changes: {}", echoes.finish());
    }
    for stream in streams {
        stream.await_progress(SOON);
        stream.finish().assert_intact();
    }
    // They stay a while for packets under way.
    for node in &mesh.nodes {
        await_until("the VXLAN devices to go", SOON, || {
            let links = node.host().run("ip -o link show").stdout;
            (!links.contains("flannel")).then_some(())
        });
    }
    // Nothing in clear text once it is WireGuard's again.
    drop(mesh.sniffer.take_violations());
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}
