//! Faults on the way to other nodes.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//!                               └── nat ── home ── home1
//! ```

use integration::{
    Meshd, MeshdNode, await_ok, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::json;

use super::{await_gone, await_named, await_well, findings, mends};
use crate::{SOON, mesh};

#[test]
fn a_peer_that_is_away_and_a_nat() {
    let sites = TwoSites::with_hosts("doctor-peers", 1);
    let (_nat, home) = sites.add_home(1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    // It says that it is reached where no packet from outside gets to it.
    let home1 = Meshd::on(&home.hosts[0], &mesh.etcd).site("home").start();
    home1.await_ready(SOON);
    let pod = home1.pod("pod");
    let east1 = mesh.node("east1");
    await_ok("home1 to call", SOON, || {
        let report = ping(&pod, mesh.pod("east1").v4());
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    let nat = await_named(east1, "nat_in_the_way");
    assert!(nat["cause"].as_str().unwrap().contains("home1"), "{nat}");
    assert!(nat["remedy"].as_str().unwrap().contains("endpoint = \"none\""), "{nat}");
    home1.term();
    let home1 = Meshd::on(&home.hosts[0], &mesh.etcd)
        .copy_state(home1.state_dir())
        .site("home")
        .args("--endpoint none")
        .start();
    home1.await_ready(SOON);
    await_gone(east1, "nat_in_the_way");
    mesh.node("west1").kill9();
    await_ok("the peer that is away to be told from a closed port", SOON * 2, || {
        let all = findings(east1);
        let named = all.iter().find(|finding| finding["code"] == "udp_not_through");
        let cause = named.and_then(|finding| finding["cause"].as_str()).unwrap_or_default();
        if cause.contains("west1") && cause.contains("no process is listening") {
            Ok(())
        } else {
            Err(format!("{all:?}"))
        }
    });
}

/// Two nodes that are up and do not reach each other: seen in all that is looked at, and told from a node that is down.
#[test]
fn a_firewall_between_the_sites() {
    let sites = TwoSites::with_hosts("doctor-closed", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    let counts = |node: &MeshdNode| node.status()["peers"].clone();
    east1.await_status("to count its peer", SOON, |status| {
        status["peers"] == json!({"direct": 0, "vxlan": 0, "wireguard": 1, "unreachable": 0, "offline": 0})
    });
    mesh.sites
        .router
        .nft("table inet fault { chain forward { type filter hook forward priority 0; udp dport 51820 drop; }; }");
    let lost = east1.await_status("to name the peer", SOON * 3, |status| {
        let _ = ping(mesh.pod("east1"), mesh.pod("west1").v4());
        status["problems"].as_array().unwrap().iter().any(|problem| problem["code"] == "peers_unreachable")
    });
    let problem = lost["problems"].as_array().unwrap().iter().find(|problem| problem["code"] == "peers_unreachable");
    let problem = problem.unwrap();
    assert!(problem["cause"].as_str().unwrap().contains("west1 (no answer to handshakes)"), "{problem}");
    assert!(problem["remedy"].as_str().unwrap().starts_with("meshctl ping west1"), "{problem}");
    assert_eq!((&lost["state"], counts(east1)["unreachable"].as_u64()), (&json!("degraded"), Some(1)));
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(4));
    let peer = east1.peer("west1").unwrap();
    assert_eq!((&peer["path"], &peer["reason"]), (&json!("unreachable"), &json!("no answer to handshakes")));
    assert!(east1.meshctl(&["routes"]).stdout.contains("remedy  meshctl ping west1"));
    let closed = await_named(east1, "udp_not_through");
    assert!(closed["remedy"].as_str().unwrap().contains("open UDP port 51820"), "{closed}");
    mesh.sites.router.nft("delete table inet fault");
    await_gone(east1, "udp_not_through");
    mesh.await_all_reach_each_other();
    await_ok("nothing to be wrong", SOON, || {
        let checked = east1.meshctl(&["status", "--check"]);
        if checked.code() == Some(0) { Ok(()) } else { Err(checked.describe()) }
    });

    // A node that is down is no fault of this one.
    west1.kill9();
    let down = east1.await_status("to miss the peer", SOON * 4, |status| {
        let _ = ping(mesh.pod("east1"), mesh.pod("west1").v4());
        status["peers"]["unreachable"] == 1 && status["state"] == "running"
    });
    assert_eq!(down["problems"], json!([]));
    let peer = east1.peer("west1").unwrap();
    assert!(peer["remedy"].as_str().unwrap().contains("meshctl node remove west1"), "{peer}");
}

/// In both families, with a peer that is direct: routes and rules of the mesh's own are no finding.
#[test]
fn a_healthy_mesh_with_direct_peers_is_clean() {
    let mesh = mesh("doctor-direct", 2);
    for (from, to) in [("east1", "east2"), ("east2", "east1"), ("west1", "west2"), ("west2", "west1")] {
        mesh.node(from).await_path(to, "direct", SOON * 2);
    }
    for node in &mesh.nodes {
        await_well(node);
    }
}

/// Another program's rule gives pods' packets the node's source.
#[test]
fn pods_that_are_masqueraded() {
    let mesh = mesh("doctor-masquerade", 1);
    let east1 = mesh.node("east1");
    await_well(east1);
    for tool in ["iptables-nft", "ip6tables-nft"] {
        let but = if tool == "iptables-nft" { "10.10.0.0/16" } else { "fd00:10::/64" };
        let rule = format!("-t nat -A POSTROUTING -m addrtype ! --dst-type LOCAL ! -d {but} -j MASQUERADE");
        east1.host().run(&format!("{tool} {rule}"));
        let named = await_named(east1, "pods_masqueraded");
        assert!(named["cause"].as_str().unwrap().contains("POSTROUTING"), "{named}");
        east1.await_status("to name it", SOON, |status| {
            status["problems"].as_array().unwrap().iter().any(|problem| problem["code"] == "pods_masqueraded")
        });
        mends(east1, "pods_masqueraded");
    }
    await_well(east1);
}

#[test]
fn what_is_narrower_than_the_mesh_believes() {
    let mesh = mesh("doctor-mtu", 1);
    let (east1, store) = (mesh.node("east1"), &mesh.sites.store);
    await_well(east1);
    // A provider's line in between, which says so.
    let west = mesh.sites.router.run("ip -o addr show to 198.51.100.1").stdout;
    let west = west.split_whitespace().nth(1).unwrap();
    mesh.sites.router.run(&format!("ip link set {west} mtu 1400"));
    mesh.await_all_reach_each_other();
    let narrow = await_ok("the narrow path to be named", SOON * 2, || {
        // What is too long for the line is what finds it out.
        integration::Ping::new(mesh.pod("west1").v4()).size(1380).run(mesh.pod("east1"));
        let all = findings(east1);
        all.iter().find(|finding| finding["code"] == "path_mtu").cloned().ok_or_else(|| format!("{all:?}"))
    });
    assert!(narrow["cause"].as_str().unwrap().contains("west1"), "{narrow}");
    // etcdctl is where the operator is.
    store.run_args(&[
        "sh",
        "-c",
        &format!("export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s\n{}", narrow["remedy"].as_str().unwrap()),
    ]);
    await_gone(east1, "path_mtu");
    mesh.await_all_reach_each_other();
    assert!(mesh.etcd.get("/meshd/config").unwrap().contains("\"MTU\""));

    mesh.sites.east.interfaces[0].set_mtu(1300);
    mends(east1, "mtu_beyond_interface");
    mesh.await_all_reach_each_other();
}

#[test]
fn networks_that_overlap_with_the_machines_own() {
    let mesh = mesh("doctor-overlap", 1);
    let (east1, host) = (mesh.node("east1"), mesh.node("east1").host());
    await_well(east1);
    // Outside of every node's subnet.
    let subnets: Vec<_> = mesh.nodes.iter().flat_map(MeshdNode::subnets).collect();
    let is_free = |net: &String| !subnets.iter().any(|subnet| subnet.to_string().starts_with(&format!("{net}.")));
    let inside = (200..=255).map(|third| format!("10.244.{third}")).find(is_free).expect("a free subnet");
    // Its own address inside of the mesh's network: nothing may be programmed.
    let address = format!("{inside}.7");
    mesh.sites.east.interfaces[0].add_address(&format!("{address}/30"));
    let overlap = await_named(east1, "covers_underlay");
    assert!(overlap["cause"].as_str().unwrap().contains(&address), "{overlap}");
    assert!(overlap["remedy"].as_str().unwrap().starts_with("meshctl check config FILE"), "{overlap}");
    mesh.sites.east.interfaces[0].remove_address(&format!("{address}/30"));
    await_gone(east1, "covers_underlay");
    mesh.await_all_reach_each_other();

    // Somebody's bridge, within the network and around it.
    host.ip(&["link add docker0 type bridge", "link set docker0 up", &format!("addr add {inside}.1/28 dev docker0")]);
    mends(east1, "networks_overlap");
    host.ip(&["addr add 10.245.0.1/15 dev docker0"]);
    mends(east1, "networks_overlap");
    // In the very place of a peer's prefix, and by a rule, as a VPN's.
    let [west, ..] = &mesh.node("west1").subnets()[..] else { panic!("no subnets") };
    host.ip(&[&format!("route add {west} dev docker0 metric 1")]);
    mends(east1, "foreign_route");
    host.ip(&["route add 10.0.0.0/8 dev docker0 table 99", "rule add to 10.0.0.0/8 lookup 99 priority 100"]);
    let led = await_named(east1, "foreign_route");
    assert!(led["cause"].as_str().unwrap().contains("of peer west1 to docker0"), "{led}");
    host.ip(&["rule del priority 100"]);
    await_gone(east1, "foreign_route");
    mesh.await_all_reach_each_other();
}

#[test]
fn a_mesh_of_one_family_needs_nothing_of_the_other() {
    for (title, config) in [
        ("doctor-v4", r#"{"Network": "10.244.0.0/16"}"#),
        ("doctor-v6", r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#),
    ] {
        let mesh = Mesh::start_on(TwoSites::with_hosts(title, 1), config, |meshd| meshd);
        mesh.await_all_reach_each_other();
        await_well(mesh.node("east1"));
    }
}
