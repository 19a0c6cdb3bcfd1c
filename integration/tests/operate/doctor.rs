//! Faults are named, with the command that mends them: each is made, seen, mended by what was printed, and gone.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//!                               └── nat ── home ── home1
//! ```

use std::{collections::BTreeSet, process::Command};

use integration::{
    Meshd, MeshdNode, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::Value;

use crate::{SOON, json, mesh};

fn findings(node: &MeshdNode) -> Vec<Value> {
    json(node, &["doctor"]).0["findings"].as_array().unwrap().clone()
}

#[track_caller]
fn await_named(node: &MeshdNode, code: &str) -> Value {
    await_ok(&format!("{code} to be named"), SOON, || {
        let all = findings(node);
        all.iter().find(|finding| finding["code"] == code).cloned().ok_or_else(|| format!("{all:?}"))
    })
}

#[track_caller]
fn await_gone(node: &MeshdNode, code: &str) {
    await_ok(&format!("{code} to be gone"), SOON, || {
        let all = findings(node);
        if all.iter().any(|finding| finding["code"] == code) { Err(format!("{all:?}")) } else { Ok(()) }
    });
}

/// Sees the fault named, does what the remedy says, and sees it gone.
#[track_caller]
fn mends(node: &MeshdNode, code: &str) {
    let remedy = await_named(node, code)["remedy"].as_str().unwrap().to_owned();
    node.host().run_args(&["sh", "-c", &remedy]);
    await_gone(node, code);
}

#[test]
fn each_fault_of_a_machine_is_named_and_mended_by_what_it_says() {
    let mesh = mesh("doctor", 1);
    let east1 = mesh.node("east1");
    let host = east1.host();
    await_ok("nothing to be wrong", SOON, || {
        let (examined, code) = json(east1, &["doctor"]);
        if code == 0 { Ok(()) } else { Err(examined.to_string()) }
    });
    assert!(json(east1, &["doctor"]).0["etcd"][0].as_str().unwrap().contains(" 3."), "etcd's version is told");

    host.nft(
        "table inet strict { chain in { type filter hook input priority 0; policy drop; \
         ct state established,related accept; meta l4proto { icmp, icmpv6 } accept; }; }",
    );
    mends(east1, "udp_port_may_be_closed");
    host.nft("delete table inet strict");

    let [v4, ..] = &east1.subnets()[..] else { panic!("no subnets") };
    let elsewhere = if v4.to_string().starts_with("10.244.200.") { "10.244.201.0/24" } else { "10.244.200.0/24" };
    host.ip(&[&format!("route add {elsewhere} dev eth0")]);
    mends(east1, "foreign_route");

    host.nft("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }");
    await_named(east1, "foreign_forward_drop");
    host.nft("delete table ip filter");
    await_gone(east1, "foreign_forward_drop");

    // The daemon puts these back by itself before long: then there is nothing left to mend.
    for (key, bad, code) in
        [("net/ipv4/ip_forward", "0", "forwarding_off"), ("net/ipv4/conf/eth0/rp_filter", "1", "rp_filter_strict")]
    {
        await_ok(&format!("{code} to be named"), SOON, || {
            host.sysctl(key, bad);
            let all = findings(east1);
            all.iter().any(|finding| finding["code"] == code).then_some(()).ok_or_else(|| format!("{all:?}"))
        });
        let remedy =
            format!("sysctl -w {}={}", key.replace('/', "."), if code == "forwarding_off" { "1" } else { "2" });
        host.run(&remedy);
        await_gone(east1, code);
    }

    let cache = east1.state_dir().join("cache");
    let file = std::fs::read_dir(&cache).unwrap().flatten().next().unwrap().path();
    let touch = |when: &str| assert!(Command::new("touch").args(["-d", when]).arg(&file).status().unwrap().success());
    touch("+2 hours");
    await_named(east1, "clock_went_back");
    touch("now");
    await_gone(east1, "clock_went_back");

    east1.term();
    let (examined, code) = json(east1, &["doctor"]);
    assert_eq!((code, &examined["daemon"]), (3, &false.into()), "{examined}");
    let codes: BTreeSet<&str> =
        examined["findings"].as_array().unwrap().iter().filter_map(|finding| finding["code"].as_str()).collect();
    assert!(codes.contains("daemon_not_reachable"), "{codes:?}");
}

#[test]
fn a_peer_that_is_away_a_nat_and_a_dead_member_are_named() {
    let sites = TwoSites::with_hosts("doctor-peers", 1);
    let (_nat, home) = sites.add_home(1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    let home1 = Meshd::on(&home.hosts[0], &mesh.etcd)
        .endpoints(format!("{},http://203.0.113.10:9", mesh.etcd.endpoints()))
        .site("home")
        .args("--endpoint none")
        .start();
    home1.await_ready(SOON);
    await_named(&home1, "etcd_member_unreachable");
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
