//! What is not ours is never touched; and other people's firewalls.

use std::process::Command;

use super::namespace::{isolated, try_run};
use super::*;

#[test]
fn others_routes_rules_and_tables_stay() {
    isolated(|| async {
        topology();
        let foreign = [
            "ip route add 10.244.2.0/24 via 192.0.2.9 metric 50000",
            "ip route add 10.244.9.0/24 via 192.0.2.9 proto static",
            "ip route add 10.244.0.0/16 via 192.0.2.9 metric 77 proto bird",
            "ip -6 route add fd42:244:0:2::/64 via 2001:db8::9 metric 2000",
            "ip -6 route add fd42:244:0:9::/64 via 2001:db8::9",
            "ip -6 route add fd42:244:0:4::/64 via 2001:db8::9 metric 159",
            "ip rule add fwmark 0x6d736864 lookup 77 priority 15801",
            "nft add table inet other",
            "nft add chain inet other c { type filter hook forward priority 0 ; }",
            "nft add rule inet other c ip saddr 10.244.0.0/16 accept",
            "ip addr add 192.0.2.77/24 dev eth0",
        ];
        for line in foreign {
            run(line);
        }
        let picture = || {
            let routes = run("ip route show table all") + &run("ip -6 route show table all");
            let mut routes: Vec<_> = routes
                .lines()
                .filter(|l| !l.contains("proto 158") && !l.contains("meshd0"))
                // The device's own overlay addresses bring entries of the local table.
                .filter(|l| !l.contains("local"))
                .map(str::to_owned)
                .collect();
            routes.sort();
            let rules = run("ip rule show") + &run("ip -6 rule show");
            let rules: Vec<_> = rules.lines().filter(|l| !l.contains("proto 158")).map(str::to_owned).collect();
            let addresses = run("ip -br addr show eth0");
            (routes, rules, addresses, run("nft list table inet other"))
        };
        let before = picture();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        assert_eq!(picture(), before);
        desired.routes = routes([]);
        desired.floor.clear();
        settle(&kernel, &desired).await;
        assert_eq!(picture(), before);
        let cleanup = kernel.cleanup().await.unwrap();
        assert_eq!(cleanup.failures, []);
        assert_eq!(picture(), before);
    });
}

/// A foreign route in the very place of one of ours is not overwritten: it is named.
#[test]
fn a_foreign_route_with_our_metric_is_named() {
    isolated(|| async {
        topology();
        run("ip route add 10.244.2.0/24 via 192.0.2.9 metric 158 proto static");
        run("ip -6 route add fd42:244:0:2::/64 via 2001:db8::9 metric 158 proto static");
        let (kernel, _state) = kernel();
        let report = kernel.reconcile(&desired()).await.unwrap();
        let problems: Vec<_> = report.failures.iter().map(|f| f.problem.clone()).collect();
        assert_eq!(problems, [Problem::Foreign, Problem::Foreign]);
        assert!(report.failures[0].what.contains("10.244.2.0/24"));
        let route = run("ip route show 10.244.2.0/24");
        assert!(route.contains("via 192.0.2.9"), "{route}");
        let route = run("ip -6 route show fd42:244:0:2::/64");
        assert!(route.contains("via 2001:db8::9"), "{route}");
    });
}

/// IPv6 lets routes share destination and metric: siblings with our protocol number are brought back to one.
#[test]
fn appended_siblings_are_removed() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let desired = desired();
        settle(&kernel, &desired).await;
        let before = run("ip -6 route show proto 158");
        run("ip -6 route append fd42:244:0:2::/64 via 2001:db8::7 dev eth0 metric 158 proto 158");
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        assert_eq!(run("ip -6 route show proto 158"), before);
    });
}

/// FORWARD as Docker's engine leaves it, for both families; ufw's and firewalld's shapes.
fn hostile_firewalls() {
    for line in [
        "iptables-nft -P FORWARD DROP",
        "iptables-nft -N DOCKER-USER",
        "iptables-nft -A FORWARD -j DOCKER-USER",
        "ip6tables-nft -N ufw6-before-forward",
        "ip6tables-nft -A FORWARD -j ufw6-before-forward",
        "ip6tables-nft -P FORWARD DROP",
        "nft add table inet firewalld",
        "nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 ; }",
        "nft add rule inet firewalld filter_FORWARD ct state established accept",
        "nft add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited",
        "nft add table inet harmless",
        "nft add chain inet harmless c { type filter hook forward priority 0 ; }",
        "nft add rule inet harmless c tcp dport 25 drop",
    ] {
        run(line);
    }
}

#[test]
fn foreign_drops_are_named_with_their_remedy() {
    isolated(|| async {
        topology();
        hostile_firewalls();
        let (kernel, _state) = kernel();
        let report = settle(&kernel, &desired()).await;
        let named: Vec<_> = report
            .foreign_drops
            .iter()
            .map(|d| (d.family.as_str(), d.table.as_str(), d.chain.as_str(), d.owner))
            .collect();
        assert_eq!(
            named,
            [
                ("ip", "filter", "FORWARD", Some(Owner::Docker)),
                ("ip6", "filter", "FORWARD", Some(Owner::Ufw)),
                ("inet", "firewalld", "filter_FORWARD", Some(Owner::Firewalld)),
            ]
        );
        for drop in &report.foreign_drops {
            assert!(drop.remedy.contains("--forward-accept"), "{}", drop.remedy);
        }
        assert!(report.foreign_drops[0].remedy.contains("10.244.0.0/16"));
        assert!(!report.foreign_drops[0].remedy.contains("fd42"));
        // Where the owner's own words are followed, it is not named any longer. ufw and firewalld would make these rules.
        let remedy = &report.foreign_drops[0].remedy;
        assert!(Command::new("sh").args(["-c", remedy]).status().unwrap().success(), "{remedy}");
        run("ip6tables-nft -N ufw6-user-forward");
        run("ip6tables-nft -A FORWARD -j ufw6-user-forward");
        run("ip6tables-nft -A ufw6-user-forward -s fd42:244::/48 -j ACCEPT");
        run("nft add chain inet firewalld filter_FWD_trusted");
        run("nft insert rule inet firewalld filter_FORWARD ip saddr 10.244.0.0/16 goto filter_FWD_trusted");
        run("nft insert rule inet firewalld filter_FORWARD ip6 saddr fd42:244::/48 goto filter_FWD_trusted");
        let left =
            |report: &Report| -> Vec<String> { report.foreign_drops.iter().map(|drop| drop.family.clone()).collect() };
        let half = settle(&kernel, &desired()).await;
        assert_eq!(left(&half), ["ip6"], "what goes there is dropped still");
        run("ip6tables-nft -A ufw6-user-forward -d fd42:244::/48 -j ACCEPT");
        assert_eq!(left(&settle(&kernel, &desired()).await), Vec::<String>::new());
    });
}

#[test]
fn forward_accept_answers_with_one_tagged_rule_and_takes_it_back() {
    isolated(|| async {
        topology();
        hostile_firewalls();
        let ruleset = || run("nft -s list ruleset");
        let before = ruleset();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        desired.forward_accept = true;
        let report = settle(&kernel, &desired).await;
        assert_eq!(report.foreign_drops, []);
        settled(&kernel, &desired).await;
        let rules = run("iptables-nft -S FORWARD");
        assert_eq!(rules.lines().nth(1), Some("-A FORWARD -m comment --comment meshd -j MESHD-FORWARD"), "{rules}");
        let rules = run("iptables-nft -S MESHD-FORWARD");
        assert!(rules.contains("-s 10.244.0.0/16") && rules.contains("-d 10.244.0.0/16"));
        let rules = run("nft list chain inet firewalld filter_FORWARD");
        assert_eq!(rules.matches("jump MESHD-FORWARD").count(), 1, "{rules}");

        // Someone flushes it, as a reload does; someone adds the rule twice.
        run("iptables-nft -F FORWARD");
        run("nft flush chain inet firewalld MESHD-FORWARD");
        run("ip6tables-nft -A FORWARD -m comment --comment meshd -j MESHD-FORWARD");
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        assert_eq!(run("iptables-nft -S FORWARD").matches("MESHD").count(), 1);

        // The mesh gets another network.
        desired.firewall.networks.push(net("10.99.0.0/24"));
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        assert!(run("iptables-nft -S MESHD-FORWARD").contains("-d 10.99.0.0/24"));

        run("iptables-nft -A FORWARD -j DOCKER-USER");
        desired.forward_accept = false;
        let report = settle(&kernel, &desired).await;
        assert_eq!(report.foreign_drops.len(), 3);
        settled(&kernel, &desired).await;
        desired.forward_accept = true;
        settle(&kernel, &desired).await;
        assert_eq!(kernel.cleanup().await.unwrap().failures, []);
        let without = |s: String| {
            let mut lines: Vec<_> = s.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(without(ruleset()), without(before));
    });
}

#[test]
fn legacy_iptables_are_named_while_they_drop() {
    isolated(|| async {
        topology();
        // Loads the old tables into this namespace, where the kernel still has them.
        if !try_run("iptables-legacy -S FORWARD").1 {
            return;
        }
        let (kernel, _state) = kernel();
        assert_eq!(settle(&kernel, &desired()).await.foreign_drops, [], "they are loaded and drop nothing");
        run("iptables-legacy -P FORWARD DROP");
        let report = settle(&kernel, &desired()).await;
        assert_eq!(report.foreign_drops.len(), 1);
        assert_eq!(report.foreign_drops[0].family, "iptables-legacy");
        // What the remedy says helps.
        for direction in ["-s", "-d"] {
            let rule = format!("iptables-legacy -I FORWARD {direction} 10.244.0.0/16 -j ACCEPT");
            assert!(report.foreign_drops[0].remedy.contains(&rule), "{}", report.foreign_drops[0].remedy);
            run(&rule);
        }
        assert_eq!(settle(&kernel, &desired()).await.foreign_drops, []);
    });
}
