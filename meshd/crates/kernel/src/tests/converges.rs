//! A pass creates the state; a second one changes nothing; deleted objects are restored.

use super::{
    namespace::{isolated, try_run},
    *,
};

#[test]
fn makes_everything_and_then_is_quiet() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let desired = desired();
        let report = settle(&kernel, &desired).await;
        assert!(!report.changes.is_empty());
        assert_eq!(report.foreign_drops, []);
        settled(&kernel, &desired).await;

        let link = run("ip link show meshd0");
        assert!(link.contains("mtu 1420") && link.contains("qlen 1000") && link.contains(",UP"));
        let addresses = run("ip addr show meshd0");
        assert!(addresses.contains("inet 10.244.1.0/32"), "{addresses}");
        assert!(addresses.contains("fd42:244:0:1:ffff:ffff:ffff:ffff/128"));
        assert!(!addresses.contains("fe80"), "{addresses}");

        // No program has the device open here, so it has no carrier.
        let routes = run("ip route show proto 158").replace("linkdown ", "");
        for line in [
            "unreachable 10.244.0.0/16 metric 4000000158",
            "10.244.2.0/24 via 192.0.2.2 dev eth0 src 10.244.1.0 metric 158",
            "10.244.3.0/24 dev meshd0 scope link src 10.244.1.0 metric 158 mtu 1380",
            "unreachable 10.244.4.0/24 metric 158",
        ] {
            assert!(routes.contains(line), "{line} not in\n{routes}");
        }
        let routes = run("ip -6 route show proto 158").replace("linkdown ", "");
        for line in [
            "unreachable fd42:244::/48 dev lo metric 4000000158",
            "fd42:244:0:2::/64 via 2001:db8::2 dev eth0 src fd42:244:0:1:ffff:ffff:ffff:ffff metric 158",
            "fd42:244:0:3::/64 dev meshd0 src fd42:244:0:1:ffff:ffff:ffff:ffff metric 158 mtu 1380",
            "unreachable fd42:244:0:4::/64 dev lo metric 158",
        ] {
            assert!(routes.contains(line), "{line} not in\n{routes}");
        }
        for family in ["-4", "-6"] {
            let rules = run(&format!("ip {family} rule show"));
            assert!(rules.contains("15800:\tfrom all fwmark 0x1046 lookup 15858 proto 158"), "{rules}");
        }
        let probes = run("ip route show table 15858");
        assert!(probes.contains("unreachable default"), "{probes}");
        assert!(probes.contains("10.244.2.0 via 192.0.2.2 dev eth0"), "{probes}");
    });
}

/// What someone took away by hand, and how the state looked before.
#[test]
fn puts_back_what_others_remove() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let desired = desired();
        settle(&kernel, &desired).await;
        let picture = || {
            [
                "ip route show table all proto 158",
                "ip -6 route show table all proto 158",
                "ip rule show",
                "ip -6 rule show",
                "ip -br addr show meshd0",
                "nft -s list table inet meshd",
            ]
            .map(run)
        };
        let before = picture();
        for damage in [
            "ip route del 10.244.3.0/24",
            "ip -6 route del fd42:244:0:2::/64",
            "ip route del unreachable 10.244.0.0/16",
            "ip -6 route del unreachable fd42:244::/48",
            "ip route flush table 15858",
            "ip rule del priority 15800",
            "ip -6 rule del priority 15800",
            "ip addr flush dev meshd0",
            "ip link set meshd0 down",
            "ip link set meshd0 mtu 1300",
            "ip link set meshd0 txqueuelen 500",
            "nft delete table inet meshd",
            "nft flush chain inet meshd guard",
            "nft flush set inet meshd networks4",
            "nft delete element inet meshd direct6 { fd42:244:0:2::/64 . eth0 . 2001:db8::2 }",
            "nft add element inet meshd direct4 { 10.244.9.0/24 . eth0 . 192.0.2.9 }",
            "nft insert rule inet meshd guard accept",
            "nft add chain inet meshd guard { policy drop ; }",
            "nft add chain inet meshd stray",
            "sysctl -qw net.ipv4.ip_forward=0",
            "sysctl -qw net.ipv6.conf.all.forwarding=0",
            "ip link del meshd0",
        ] {
            run(damage);
            if damage == "ip link del meshd0" {
                add_tun();
            }
            let report = settle(&kernel, &desired).await;
            assert!(!report.changes.is_empty(), "{damage}");
            assert_eq!(picture(), before, "{damage}");
            settled(&kernel, &desired).await;
        }
        assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "1");
        assert_eq!(run("sysctl -n net.ipv6.conf.all.forwarding").trim(), "1");
    });
}

#[test]
fn withdraws_what_is_wanted_no_more() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        let mut less = desired();
        less.routes = routes([less.routes[&net("10.244.2.0/24")].clone()]);
        less.probes.clear();
        less.overlay.truncate(1);
        less.floor.networks.truncate(1);
        less.firewall = Firewall { networks: vec![net("10.245.0.0/16"), net("10.244.0.0/15")], ..Firewall::default() };
        settle(&kernel, &less).await;
        settled(&kernel, &less).await;
        assert_eq!(run("ip -6 route show table all proto 158"), "");
        assert_eq!(run("ip route show proto 158").lines().count(), 2);
        assert!(!run("ip -6 rule show").contains("15858"));
        assert!(run("nft list set inet meshd networks4").contains("{ 10.244.0.0/15 }"));
    });
}

#[test]
fn reports_a_missing_device_and_keeps_the_rest() {
    isolated(|| async {
        topology();
        run("ip link del meshd0");
        let (kernel, _state) = kernel();
        let desired = desired();
        let report = kernel.reconcile(&desired, OthersRules::Read).await.unwrap();
        assert_eq!(report.failures, [Failure { what: "device meshd0".to_owned(), problem: FailureCause::NoTun }]);
        let routes = run("ip route show proto 158");
        assert!(routes.contains("unreachable 10.244.0.0/16"), "{routes}");
        assert!(routes.contains("unreachable 10.244.4.0/24"), "{routes}");
        assert!(!try_run("ip route get 10.244.3.7").1);
        add_tun();
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
    });
}

#[test]
fn a_device_of_another_kind_is_not_ours() {
    isolated(|| async {
        topology();
        run("ip link del meshd0");
        run("ip link add meshd0 type bridge");
        run("ip addr add 198.51.100.1/24 dev meshd0");
        let (kernel, _state) = kernel();
        let report = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
        assert_eq!(report.failures.len(), 1);
        assert_eq!(report.failures[0].problem, FailureCause::NoTun);
        kernel.cleanup().await.unwrap();
        assert!(run("ip addr show meshd0").contains("198.51.100.1/24"));
    });
}

/// One bad route is that route's failure, and what stood there before leads nowhere now.
#[test]
fn one_failure_does_not_stop_the_others() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut bad = desired();
        settle(&kernel, &bad).await;
        route_to(&mut bad, "10.244.2.0/24").via = RouteVia::Neighbour { via: addr("192.0.2.2"), dev: name("gone0") };
        route_to(&mut bad, "fd42:244:0:2::/64").via = direct("2001:db8:ffff::1");
        bad.put_route(route("10.244.5.0/24", RouteVia::Tunnel));
        let report = kernel.reconcile(&bad, OthersRules::Read).await.unwrap();
        let problems: Vec<_> = report.failures.iter().map(|f| &f.problem).collect();
        assert!(
            matches!(problems.as_slice(), [FailureCause::NoDevice { .. }, FailureCause::Kernel { .. }]),
            "{problems:?}"
        );
        assert!(report.failures.iter().all(|f| !f.remedy().is_empty()));
        let routes = run("ip route show proto 158");
        assert!(routes.contains("unreachable 10.244.2.0/24"), "{routes}");
        assert!(routes.contains("10.244.5.0/24 dev meshd0"), "{routes}");
    });
}

/// A table of our name with another shape, such as another version's, is replaced in one step.
#[test]
fn a_table_of_another_shape_is_made_anew() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        run("nft add table inet meshd");
        run("nft add set inet meshd networks4 { type inet_service ; }");
        run("nft add chain inet meshd x { type filter hook input priority 0 ; }");
        run("nft add rule inet meshd x tcp dport @networks4 accept");
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        assert!(!run("nft list table inet meshd").contains("tcp dport"));
    });
}

/// Without its firewall a node opens no path: the floor stands, the rest waits.
#[test]
fn without_a_firewall_no_path_opens() {
    isolated(|| async {
        topology();
        for program in ["/bin/false", "/nonexistent/nft"] {
            let (mut kernel, _state) = kernel();
            kernel.nft = Nft::with_program(program);
            let report = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
            assert!(
                report.failures.iter().any(|f| matches!(f.problem, FailureCause::Firewall { .. })),
                "{:?}",
                report.failures
            );
            assert!(report.failures.iter().any(|f| f.problem == FailureCause::NoFirewall));
            let routes = run("ip route show table all proto 158");
            assert!(routes.contains("unreachable 10.244.0.0/16"), "{routes}");
            assert!(!routes.contains("dev meshd0"), "{routes}");
            assert!(!routes.contains("via"), "{routes}");
            assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "0");
        }
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
    });
}

/// The second pass over unchanged state is silent on the kernel's own channels.
#[test]
fn an_unchanged_state_is_left_alone() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut watch = kernel.watch().unwrap();
        settle(&kernel, &desired()).await;
        mark();
        let first = until_marked(&mut watch).await;
        assert!(first.routes && first.rules && first.addresses && first.ruleset, "{first:?}");
        unmark();
        until_marked(&mut watch).await;
        for _ in 0..3 {
            settled(&kernel, &desired()).await;
        }
        mark();
        let events = until_marked(&mut watch).await;
        let nothing_of_ours = !(events.routes || events.rules || events.addresses || events.ruleset || events.resync);
        assert!(nothing_of_ours, "{events:?}");
    });
}

/// Changes that no pass makes, one on either channel.
fn mark() {
    run("nft add table ip marker");
    run("ip link add marker type bridge");
}

fn unmark() {
    run("nft delete table ip marker");
    run("ip link del marker");
}

/// All events up to the marks.
async fn until_marked(watch: &mut KernelWatch) -> KernelEvents {
    let mut seen = KernelEvents::default();
    while !(seen.links && seen.foreign_ruleset) {
        let new = watch.next().await;
        seen = KernelEvents {
            links: seen.links | new.links,
            addresses: seen.addresses | new.addresses,
            routes: seen.routes | new.routes,
            rules: seen.rules | new.rules,
            vteps: seen.vteps | new.vteps,
            neighbours: seen.neighbours | new.neighbours,
            settings: seen.settings | new.settings,
            ruleset: seen.ruleset | new.ruleset,
            policy_ruleset: seen.policy_ruleset | new.policy_ruleset,
            ruleset_volume: seen.ruleset_volume | new.ruleset_volume,
            foreign_ruleset: seen.foreign_ruleset | new.foreign_ruleset,
            resync: seen.resync | new.resync,
        };
    }
    seen
}

/// Nested, neighbouring and overlapping prefixes come and go in any order: each change is one that nft takes, and what
/// it lists afterwards is what was written.
#[test]
fn sets_follow_any_change() {
    let prefixes = [
        "10.244.0.0/16",
        "10.244.0.0/24",
        "10.244.1.0/24",
        "10.244.0.0/23",
        "10.244.1.7/32",
        "10.0.0.0/8",
        "fd42:244::/48",
        "fd42:244::/64",
        "fd42:244:0:1::/64",
        "fd42:244::/63",
        "fd42:244:0:1::7/128",
    ]
    .map(net);
    isolated(move || async move {
        topology();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        // A fixed sequence of choices (Knuth's linear congruential generator).
        let mut state = 1u64;
        let mut choice = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        for _ in 0..40 {
            let firewall = &mut desired.firewall;
            let mut pick = || prefixes.iter().copied().filter(|_| choice() % 2 == 0).collect::<Vec<_>>();
            firewall.networks = pick();
            firewall.own = pick();
            firewall.direct = ["192.0.2.2", "192.0.2.3", "2001:db8::2"]
                .into_iter()
                .flat_map(|hop| pick().into_iter().map(move |prefix| PrefixVia { prefix, ..via("::/0", hop) }))
                .collect();
            firewall.accepted = ["eth0", "far"]
                .into_iter()
                .flat_map(|dev| pick().into_iter().map(move |prefix| PrefixOn { prefix, dev: name(dev) }))
                .collect();
            settle(&kernel, &desired).await;
            settled(&kernel, &desired).await;
        }
    });
}

/// A pass runs `nft` only when somebody has committed something since: every node of a mesh makes a pass for every
/// record that changes, and for every pod of its own that comes or goes.
#[test]
fn lists_the_ruleset_again_only_when_it_has_changed() {
    isolated(|| async {
        topology();
        let (mut kernel, _state) = kernel();
        let mut desired = desired();
        settle(&kernel, &desired).await;
        let nft = std::mem::replace(&mut kernel.nft, Nft::with_program("false"));
        settled(&kernel, &desired).await;

        // What this pass itself commits is no news to the next one.
        kernel.nft = nft;
        desired.firewall.direct.push(via("10.244.9.0/24", "192.0.2.9"));
        settle(&kernel, &desired).await;
        kernel.nft = Nft::with_program("false");
        settled(&kernel, &desired).await;

        // Policies change with every pod, in tables that a pass has nothing to do with.
        let table = policy_table("meshd");
        run(&format!("nft add table inet {table}"));
        run(&format!("nft add chain inet {table} forward {{ type filter hook forward priority 0; policy drop; }}"));
        run(&format!("nft add table bridge {table}"));
        let report = kernel.reconcile(&desired, OthersRules::Read).await.unwrap();
        assert_eq!((report.changes.len(), report.failures.len(), report.foreign_drops.len()), (0, 0, 0), "{report:?}");

        // Others' tables count too: one of them may drop what is forwarded.
        run("nft add table ip other");
        let report = kernel.reconcile(&desired, OthersRules::Read).await.unwrap();
        assert_eq!(report.failures.len(), 1, "{report:?}");
        kernel.nft = nft;
        settled(&kernel, &desired).await;
        run("nft add chain ip other forward { type filter hook forward priority 0; policy drop; }");
        run("nft delete element inet meshd direct4 { 10.244.9.0/24 . \"eth0\" . 192.0.2.9 }");
        let report = kernel.reconcile(&desired, OthersRules::Read).await.unwrap();
        assert_eq!(report.foreign_drops.len(), 1, "{report:?}");
        assert_eq!(report.changes.len(), 1, "{report:?}");
    });
}

/// What differs is followed without reading the kernel's state, and comes to what a pass that reads all of it comes to.
#[test]
fn follows_what_changed() {
    isolated(|| async {
        let (kernel, _state, mut desired) = standing().await;
        let follow = async |desired: &Desired| {
            let report = kernel.apply_changes(desired, OthersRules::Read).await.unwrap();
            assert_eq!(report.failures, []);
            report.changes.len()
        };
        assert_eq!(follow(&desired).await, 0);
        desired.put_route(route("10.244.5.0/24", RouteVia::Tunnel));
        assert_eq!(follow(&desired).await, 1);
        desired.put_route(route("10.244.5.0/24", RouteVia::Unreachable));
        desired.routes.remove(&net("10.244.3.0/24"));
        assert_eq!(follow(&desired).await, 2);
        // A direct path needs the firewall, too.
        desired.put_route(route("10.244.6.0/24", direct("192.0.2.6")));
        desired.firewall.direct.push(via("10.244.6.0/24", "192.0.2.6"));
        assert_eq!(follow(&desired).await, 2);
        settled(&kernel, &desired).await;
        // It does not look: what others do is put right by a pass that does.
        run("ip route del 10.244.6.0/24");
        assert_eq!(follow(&desired).await, 0);
        assert_eq!(settle(&kernel, &desired).await.changes.len(), 1);
        // The device is no matter for it: a whole pass makes that.
        desired.tun.mtu = 1400;
        assert!(follow(&desired).await >= 1);
        settled(&kernel, &desired).await;
    });
}

/// After a failure nothing is taken for granted.
#[test]
fn what_failed_is_tried_again_whatever_changed() {
    isolated(|| async {
        let (kernel, _state, mut desired) = standing().await;
        desired.put_route(route("10.244.5.0/24", direct("198.51.100.7")));
        let report = kernel.apply_changes(&desired, OthersRules::Read).await.unwrap();
        assert_eq!(report.failures.len(), 1, "the next hop is on no link");
        run("ip addr add 198.51.100.1/24 dev eth0");
        let report = kernel.apply_changes(&desired, OthersRules::Read).await.unwrap();
        assert_eq!((report.failures, report.changes.len()), (vec![], 1));
        settled(&kernel, &desired).await;
    });
}
