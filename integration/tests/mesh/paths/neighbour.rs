//! Neighbours whose daemon, or whose machine, is away.
//!
//! ```text
//!   east1 (pod) ─┐
//!                ├─ switch
//!   east2 (pod) ─┘ killed, restarted, unplugged
//! ```

use std::time::Duration;

use super::{CHANGE, Pair, READY, WATCH, changes, reason, watch};

#[test]
fn a_neighbour_whose_daemon_is_killed_is_reached_direct_as_before() {
    let pair = Pair::direct("killed");
    let [a, b] = &pair.nodes;
    let traffic = pair.traffic();
    traffic.await_progress();
    let before = changes(a);
    let monitor = b.host().monitor("route");
    let look = || {
        let peer = a.peer(b.name()).expect("the peer is there");
        assert_eq!(peer["path"], "direct", "{peer}");
    };
    b.kill9();
    watch(WATCH, look);
    traffic.await_progress();
    b.start();
    b.await_ready(READY);
    pair.await_direct();
    watch(WATCH, look);
    traffic.await_progress();
    traffic.finish(Duration::ZERO);
    assert_eq!(changes(a), before, "no path at the other end changed");
    let log = monitor.log();
    assert!(!log.contains("10.244.") && !log.contains("fd42:244:"), "the restart changed routes:\n{log}");
}

#[test]
fn a_neighbour_that_is_gone_is_unreachable_and_comes_back() {
    let pair = Pair::direct("gone");
    let [a, b] = &pair.nodes;
    let site = &pair.sites.east;
    site.interfaces[1].down();
    a.await_path(b.name(), "unreachable", CHANGE);
    assert!(reason(a, b.name()).contains("no answer on the direct path"), "{}", reason(a, b.name()));
    site.interfaces[1].up();
    site.interfaces[1].add_address(&format!("{}/64", site.v6(1)));
    b.host().route("default", &format!("via {}", site.router_v4()));
    b.host().route("default", &format!("via {}", site.router_v6()));
    pair.await_direct();
    pair.ping_all();
}
