//! Events about other programs' changes.

use super::{namespace::isolated, *};

/// Waits until `wanted` shows.
async fn until(watch: &mut KernelWatch, mut wanted: impl FnMut(&KernelEvents) -> bool) {
    while !wanted(&watch.next().await) {}
}

#[test]
fn every_kind_of_change_is_told() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        let mut watch = kernel.watch().unwrap();
        run("ip link set meshd0 mtu 1400");
        until(&mut watch, |e| e.links).await;
        run("ip addr add 192.0.2.50/24 dev eth0");
        until(&mut watch, |e| e.addresses).await;
        run("ip route del 10.244.3.0/24");
        until(&mut watch, |e| e.routes).await;
        run("ip -6 route del fd42:244:0:3::/64");
        until(&mut watch, |e| e.routes).await;
        run("ip -6 rule del priority 15800");
        until(&mut watch, |e| e.rules).await;
        run("ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent");
        until(&mut watch, |e| e.neighbours).await;
        run("nft delete element inet meshd direct4 { 10.244.2.0/24 . eth0 . 192.0.2.2 }");
        until(&mut watch, |e| e.ruleset && !e.foreign_ruleset).await;
        run("sysctl -qw net.ipv4.conf.eth0.forwarding=0");
        until(&mut watch, |e| e.settings && e.calls_for_reconcile()).await;
        run("nft add table ip other");
        until(&mut watch, |e| e.foreign_ruleset && !e.ruleset).await;
        run("nft flush ruleset");
        until(&mut watch, |e| e.ruleset).await;
        run("ip link del meshd0");
        until(&mut watch, |e| e.links && e.calls_for_reconcile()).await;
    });
}

/// Else every change that is followed would be answered by a look at everything.
#[test]
fn routes_that_this_process_changes_are_no_news() {
    isolated(|| async {
        let (kernel, _state, mut desired) = standing().await;
        let mut watch = kernel.watch().unwrap();
        desired.put_route(route("10.244.5.0/24", RouteVia::Tunnel));
        desired.put_route(route("fd42:244:0:5::/64", RouteVia::Unreachable));
        desired.routes.remove(&net("10.244.3.0/24"));
        assert_eq!(kernel.apply_changes(&desired, OthersRules::Read).await.unwrap().changes.len(), 3);
        run("ip rule add lookup 77 priority 77");
        let mut routes = false;
        until(&mut watch, |events| {
            routes |= events.routes;
            events.rules
        })
        .await;
        assert!(!routes);
    });
}

/// If the socket overruns, the reader gets an event to check everything, and the watch goes on.
#[test]
fn an_overrun_is_a_resync() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut watch = kernel.watch().unwrap();
        let mut batch = String::new();
        for i in 0..20_000u32 {
            let (a, b) = (i / 250, i % 250);
            batch.push_str(&format!("route add 10.{a}.{b}.0/24 dev eth0\n"));
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();
        run("ip link set eth0 up");
        run(&format!("ip -batch {}", file.path().display()));
        until(&mut watch, |e| e.resync).await;
        run("ip rule add lookup 77 priority 77");
        until(&mut watch, |e| e.rules).await;
    });
}
