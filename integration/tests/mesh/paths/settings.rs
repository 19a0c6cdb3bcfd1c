//! What operators set: whether to go direct at all, sites, reverse path filters.
//!
//! ```text
//!   east1 (pod) ─┐
//!                ├─ switch ──── router ──── store (etcd)
//!   east2 (pod) ─┘
//! ```

use std::time::Duration;

use integration::{
    Meshd, await_until,
    topology::{CONFIG, TwoSites},
};

use super::{CHANGE, Pair, READY, WATCH, route_to, watch};

#[test]
fn direct_routing_is_turned_off_and_on_under_traffic() {
    let pair = Pair::direct("direct-routing");
    let traffic = pair.traffic();
    traffic.await_progress();
    let off = CONFIG.replace(r#""Type": "wireguard""#, r#""Type": "wireguard", "DirectRouting": false"#);
    assert_ne!(off, CONFIG);
    let accepted = |nth: usize| {
        let host = pair.nodes[nth].host();
        let subnet = pair.nodes[1 - nth].subnets()[0];
        host.run("nft list set inet meshd accepted4").stdout.contains(&subnet.to_string())
    };
    assert!(accepted(0) && accepted(1));
    pair.etcd.put("/meshd/config", &off);
    await_until("both to stop sending direct", CHANGE, || {
        let by_tunnel = |nth: usize| {
            let node = &pair.nodes[nth];
            route_to(node.host(), pair.pods[1 - nth].v4()).contains(node.interface())
        };
        (by_tunnel(0) && by_tunnel(1)).then_some(())
    });
    assert!(accepted(0) || accepted(1), "what is under way is accepted for a while");
    traffic.await_progress();
    await_until("both to accept nothing direct", CHANGE, || (!accepted(0) && !accepted(1)).then_some(()));
    watch(WATCH, || {
        for (node, other) in pair.ends() {
            let peer = node.peer(other.name()).expect("the peer is there");
            assert_eq!(peer["path"], "wireguard", "{peer}");
        }
    });
    traffic.await_progress();
    pair.etcd.put("/meshd/config", CONFIG);
    pair.await_direct();
    assert!(accepted(0) && accepted(1));
    traffic.await_progress();
    traffic.finish(Duration::ZERO);
}

#[test]
fn nodes_without_a_site_are_never_direct_and_a_restart_with_one_changes_that() {
    let pair = Pair::start_on(TwoSites::new("no-site"), |meshd| meshd);
    pair.await_both("wireguard");
    pair.ping_all();
    watch(WATCH, || {
        for (node, other) in pair.ends() {
            let peer = node.peer(other.name()).expect("the peer is there");
            assert_eq!(peer["path"], "wireguard", "{peer}");
        }
    });
    for (nth, node) in pair.nodes.iter().enumerate() {
        node.term();
        node.set_site(Some("east"));
        node.start();
        node.await_ready(READY);
        assert_eq!(node.status()["site"], "east", "node {nth}");
    }
    pair.await_direct();
    pair.ping_all();
    let traffic = pair.traffic();
    traffic.await_progress();
    pair.nodes[0].term();
    pair.nodes[0].set_site(None);
    pair.nodes[0].start();
    pair.nodes[0].await_ready(READY);
    pair.await_both("wireguard");
    traffic.await_progress();
    // What comes direct is refused until the other end knows.
    traffic.finish(Duration::from_secs(25));
}

#[test]
fn strict_reverse_path_filters_let_probes_pass_and_come_back_with_cleanup() {
    let sites = TwoSites::new("rp-filter");
    let strict = |host: &integration::Host| {
        for of in ["all", "default", "lo", "eth0"] {
            host.sysctl(&format!("net/ipv4/conf/{of}/rp_filter"), "1");
        }
    };
    sites.east.hosts.iter().for_each(strict);
    let pair = Pair::start_on(sites, |meshd: Meshd| meshd.site("east"));
    pair.await_direct();
    pair.ping_all();
    // While one end is in the tunnel and the other sends direct, packets come by another way than replies go.
    pair.switch_rules(&format!("ip daddr {} udp sport 51821 counter drop", pair.overlay(0, true)));
    pair.nodes[0].await_path("east2", "wireguard", CHANGE);
    pair.ping_all();
    pair.switch_rules("");
    pair.await_direct();
    let node = &pair.nodes[0];
    assert_eq!(node.host().read_sysctl("net/ipv4/conf/eth0/rp_filter"), "2");
    node.term();
    let cleaned = node.cleanup(&["--force"]);
    assert!(cleaned.success(), "{}", cleaned.describe());
    for of in ["all", "default", "lo", "eth0"] {
        assert_eq!(node.host().read_sysctl(&format!("net/ipv4/conf/{of}/rp_filter")), "1", "{of}");
    }
}
