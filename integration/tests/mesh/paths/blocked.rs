//! Networks that do not carry what goes direct.
//!
//! ```text
//!   east1 (pod) ─┐
//!                ├─ switch, which drops some of what passes
//!   east2 (pod) ─┘
//! ```

use std::time::Duration;

use integration::{await_until, topology::TwoSites};

use super::{CHANGE, DROP_FOREIGN_SOURCES, Pair, WATCH, reason, route_to, set_rules, watch};

/// What may pass until a broken path is noticed, and as much again for a machine that is busy.
const UNNOTICED: Duration = Duration::from_secs(25);

#[test]
fn a_switch_that_drops_foreign_sources_keeps_a_pair_in_the_tunnel_until_it_stops() {
    let sites = TwoSites::new("cloud");
    set_rules(&sites.east.switch, DROP_FOREIGN_SOURCES);
    let pair = Pair::start_on(sites, |meshd| meshd.site("east"));
    pair.await_both("wireguard");
    pair.ping_all();
    watch(WATCH, || {
        for (node, other) in pair.ends() {
            let peer = node.peer(other.name()).expect("the peer is there");
            assert_eq!(peer["path"], "wireguard", "{peer}");
            assert!(peer["reason"].as_str().is_some_and(|reason| reason.contains("no echo")), "{peer}");
        }
    });
    pair.switch_rules("");
    pair.await_direct();
    pair.ping_all();
    for (node, other) in pair.ends() {
        assert_eq!(reason(node, other.name()), "");
    }
}

#[test]
fn a_path_change_both_ways_costs_running_traffic_no_more_than_retransmissions() {
    let pair = Pair::direct("change");
    let traffic = pair.traffic();
    traffic.await_progress();
    pair.switch_rules(DROP_FOREIGN_SOURCES);
    pair.await_both("wireguard");
    traffic.await_progress();
    pair.switch_rules("");
    pair.await_direct();
    traffic.await_progress();
    traffic.finish(UNNOTICED);
    assert!(pair.changes().iter().all(|changes| *changes >= 2), "to the tunnel and back is logged");
}

/// The way back alone loses nothing at all.
#[test]
fn from_the_tunnel_to_direct_nothing_is_lost() {
    let pair = Pair::direct("upgrade");
    pair.switch_rules(DROP_FOREIGN_SOURCES);
    pair.await_both("wireguard");
    pair.ping_all();
    let traffic = pair.traffic();
    traffic.await_progress();
    pair.switch_rules("");
    pair.await_direct();
    traffic.await_progress();
    traffic.finish(Duration::ZERO);
}

/// East1's end is made to think that its direct path is broken, by losing the echoes to it alone: kind 2 in byte 5 of
/// the datagram. Probes of east2 are answered, so that it stays direct.
#[test]
fn two_ends_that_disagree_reach_each_other_all_the_same() {
    let pair = Pair::direct("disagree");
    let traffic = pair.traffic();
    traffic.await_progress();
    let to = [pair.overlay(0, true), pair.overlay(0, false)];
    pair.switch_rules(&format!(
        "ip daddr {} udp sport 51821 @th,104,8 2 counter drop
         ip6 daddr {} udp sport 51821 @th,104,8 2 counter drop",
        to[0], to[1]
    ));
    let [a, b] = &pair.nodes;
    a.await_path(b.name(), "wireguard", CHANGE);
    traffic.await_progress();
    // The path above is that of the family that changes first.
    await_until("IPv4 to leave the direct path", CHANGE, || {
        route_to(a.host(), pair.pods[1].v4()).contains(a.interface()).then_some(())
    });
    watch(WATCH, || {
        let peer = b.peer(a.name()).expect("the peer is there");
        assert_eq!(peer["path"], "direct", "{peer}");
    });
    assert!(route_to(b.host(), pair.pods[0].v4()).contains("via 192.0.2.11"));
    traffic.await_progress();
    pair.switch_rules("");
    pair.await_direct();
    traffic.await_progress();
    // Nothing but echoes was dropped.
    traffic.finish(Duration::ZERO);
}

#[test]
fn each_family_has_its_own_path() {
    let pair = Pair::direct("families");
    let traffic = pair.traffic();
    traffic.await_progress();
    pair.switch_rules("ip6 saddr fd42:244::/48 counter drop");
    pair.await_both("wireguard");
    pair.ping_all();
    watch(WATCH, || {
        for (nth, (node, other)) in pair.ends().into_iter().enumerate() {
            let [v4, v6] = [pair.pods[1 - nth].v4(), pair.pods[1 - nth].v6()];
            assert!(route_to(node.host(), v4).contains("via 192.0.2."), "IPv4 stays direct");
            assert!(route_to(node.host(), v6).contains(node.interface()), "IPv6 goes by the tunnel");
            assert!(reason(node, other.name()).starts_with("IPv6: "), "{}", reason(node, other.name()));
        }
    });
    traffic.await_progress();
    // IPv6 loses what its switch drops until that is noticed, and IPv4 nothing.
    traffic.finish_each([Duration::ZERO, UNNOTICED]);
}
