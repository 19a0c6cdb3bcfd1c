//! Faults on the way to other nodes.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//!                               └── nat ── home ── home1
//! ```

use integration::{
    Meshd, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};

use super::{await_gone, await_named, await_well, findings, mends};
use crate::{SOON, mesh};

#[test]
fn a_peer_that_is_away_and_a_nat() {
    let sites = TwoSites::with_hosts("doctor-peers", 1);
    let (_nat, home) = sites.add_home(1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    let home1 = Meshd::on(&home.hosts[0], &mesh.etcd).site("home").args("--endpoint none").start();
    home1.await_ready(SOON);
    let east1 = mesh.node("east1");
    let nat = await_named(east1, "nat_in_the_way");
    assert!(nat["cause"].as_str().unwrap().contains("home1"), "{nat}");
    mesh.node("west1").kill9();
    await_ok("the peer that is away to be told from a closed port", SOON * 2, || {
        let all = findings(east1);
        let named = all.iter().find(|finding| finding["code"] == "udp_not_through");
        let cause = named.and_then(|finding| finding["cause"].as_str()).unwrap_or_default();
        if cause.contains("west1") && cause.contains("nobody listens") { Ok(()) } else { Err(format!("{all:?}")) }
    });
}

#[test]
fn a_firewall_between_the_sites() {
    let mesh = mesh("doctor-closed", 1);
    let east1 = mesh.node("east1");
    mesh.sites
        .router
        .nft("table inet fault { chain forward { type filter hook forward priority 0; udp dport 51820 drop; }; }");
    let closed = await_named(east1, "udp_not_through");
    assert!(closed["remedy"].as_str().unwrap().contains("open UDP 51820"), "{closed}");
    mesh.sites.router.nft("delete table inet fault");
    await_gone(east1, "udp_not_through");
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
    store.run_args(&["sh", "-c", &format!("export ETCDCTL_API=3\n{}", narrow["remedy"].as_str().unwrap())]);
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
    let east1 = mesh.node("east1");
    await_well(east1);
    mesh.sites.east.interfaces[0].add_address("10.244.255.7/30");
    let overlap = await_named(east1, "covers_underlay");
    assert!(overlap["cause"].as_str().unwrap().contains("10.244.255.7"), "{overlap}");
    assert!(overlap["remedy"].as_str().unwrap().starts_with("meshctl check config FILE"), "{overlap}");
    mesh.sites.east.interfaces[0].remove_address("10.244.255.7/30");
    await_gone(east1, "covers_underlay");
    mesh.await_all_reach_each_other();
}
