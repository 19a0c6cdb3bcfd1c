//! State of other programs stays untouched; other programs' firewalls.

use std::process::Command;

use mesh::kernel_state::SeenOthers;

use super::{
    namespace::{isolated, try_run},
    *,
};

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
        desired.floor = Floor::default();
        settle(&kernel, &desired).await;
        assert_eq!(picture(), before);
        let cleanup = kernel.cleanup().await.unwrap();
        assert_eq!(cleanup.failures, []);
        assert_eq!(picture(), before);
    });
}

/// An earlier version's rule, by another mark, and its table of another shape: both are replaced.
#[test]
fn what_an_earlier_version_left_is_replaced() {
    isolated(|| async {
        topology();
        for family in ["-4", "-6"] {
            run(&format!("ip {family} rule add fwmark 0x6d736864 lookup 15858 priority 15800 protocol 158"));
        }
        for line in [
            "nft add table inet meshd",
            "nft add set inet meshd direct4 { type ipv4_addr . ifname; flags interval; }",
            "nft add element inet meshd direct4 { 10.244.2.0/24 . eth0 }",
        ] {
            run(line);
        }
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        for family in ["-4", "-6"] {
            let rules = run(&format!("ip {family} rule show"));
            assert_eq!(rules.matches("fwmark").count(), 1, "{rules}");
            assert!(rules.contains("fwmark 0x1046 lookup 15858"), "{rules}");
        }
        assert!(run("nft list set inet meshd direct4").contains("10.244.2.0/24 . \"eth0\" . 192.0.2.2"));
    });
}

/// The bits that other programs act upon by default; docs/operations.md names the programs.
#[test]
fn the_mark_of_probes_meets_nobody_elses_bits() {
    for (whose, bits) in [
        ("kube-proxy and kubelet", 0x4000 | 0x8000),
        ("portmap", 0x2000),
        ("Calico", 0xffff_0000),
        ("Cilium", 0xffff_0f00),
        ("Istio", 0x539),
        ("AWS VPC CNI", 0x80),
        ("Weave", 0x6_0000),
        ("Tailscale", 0xff_0000),
        ("OpenShift SDN", 0x1),
    ] {
        assert_eq!(PROBE_MARK & bits, 0, "{whose}");
    }
}

/// A foreign route in the very place of one of ours is not overwritten: it is named.
#[test]
fn a_foreign_route_with_our_metric_is_named() {
    isolated(|| async {
        topology();
        run("ip route add 10.244.2.0/24 via 192.0.2.9 metric 158 proto static");
        run("ip -6 route add fd42:244:0:2::/64 via 2001:db8::9 metric 158 proto static");
        let (kernel, _state) = kernel();
        let report = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
        let problems: Vec<_> = report.failures.iter().map(|f| f.problem.clone()).collect();
        assert_eq!(problems, [FailureCause::Foreign, FailureCause::Foreign]);
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
                ("inet", "firewalld", "filter_FORWARD", Some(FirewallProgram::Firewalld)),
                ("ip", "filter", "FORWARD", Some(FirewallProgram::Docker)),
                ("ip6", "filter", "FORWARD", Some(FirewallProgram::Ufw)),
            ]
        );
        for drop in &report.foreign_drops {
            assert!(drop.remedy.contains("--forward-accept"), "{}", drop.remedy);
        }
        let remedy = &report.foreign_drops[1].remedy;
        assert!(remedy.contains("10.244.0.0/16") && !remedy.contains("fd42"), "{remedy}");
        // Where the owner's own words are followed, it is not named any longer. ufw and firewalld would make these
        // rules.
        assert!(Command::new("sh").args(["-c", remedy]).status().unwrap().success(), "{remedy}");
        run("ip6tables-nft -N ufw6-user-forward");
        run("ip6tables-nft -A FORWARD -j ufw6-user-forward");
        run("ip6tables-nft -A ufw6-user-forward -s fd42:244::/48 -j ACCEPT");
        run("nft add chain inet firewalld filter_FWD_trusted");
        run("nft insert rule inet firewalld filter_FORWARD ip saddr 10.244.0.0/16 goto filter_FWD_trusted");
        run("nft insert rule inet firewalld filter_FORWARD ip6 saddr fd42:244::/48 goto filter_FWD_trusted");
        let left = |report: &PassReport| -> Vec<String> {
            report.foreign_drops.iter().map(|drop| drop.family.clone()).collect()
        };
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

fn sh(command: &str) {
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
}

/// What masquerades packets between pods, in iptables' words and in nftables', is named with the command that ends it.
#[test]
fn rules_that_give_pods_packets_another_source_are_named() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        // What other programs have there by default takes none of them.
        for line in [
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "-N KUBE-POSTROUTING",
            "-A POSTROUTING -m comment --comment rules -j KUBE-POSTROUTING",
            "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
            "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
            "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
            "-A POSTROUTING -m mark --mark 0x2000/0x2000 -j MASQUERADE",
            "-A POSTROUTING -m addrtype --dst-type LOCAL -j MASQUERADE",
            "-A POSTROUTING -p udp -j MASQUERADE",
        ] {
            run(&format!("iptables-nft -t nat {line}"));
        }
        run("nft add table ip kube-proxy");
        run("nft add chain ip kube-proxy post { type nat hook postrouting priority 100 ; }");
        run("nft add rule ip kube-proxy post meta mark and 0x4000 == 0 return");
        run("nft add rule ip kube-proxy post masquerade");
        assert_eq!(settle(&kernel, &desired()).await.met, []);

        run("iptables-nft -t nat -A POSTROUTING -m addrtype ! --dst-type LOCAL ! -d 10.10.0.0/16 -j MASQUERADE");
        run("nft add table ip6 other");
        run("nft add chain ip6 other post { type nat hook postrouting priority 100 ; }");
        run("nft add rule ip6 other post fib daddr type != local ip6 daddr != fd00:10::/64 masquerade");
        let report = settle(&kernel, &desired()).await;
        let named: Vec<_> = report.met.iter().map(|met| (met.effect, met.table.as_str(), met.chain.as_str())).collect();
        assert_eq!(
            named,
            [(RuleEffect::Translates, "ip nat", "POSTROUTING"), (RuleEffect::Translates, "ip6 other", "post")]
        );
        for met in &report.met {
            sh(&met.remedy);
        }
        assert_eq!(settle(&kernel, &desired()).await.met, []);
    });
}

/// Probes are of no connection: what lets in answers only drops them.
#[test]
fn rules_that_drop_probes_are_named() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        run("nft add table inet f");
        run("nft add chain inet f in { type filter hook input priority 0 ; policy drop ; }");
        run("nft add rule inet f in ct state established,related accept");
        run("nft add chain inet f out { type filter hook output priority 0 ; }");
        run("nft add rule inet f out oifname eth0 udp dport 51821 drop");
        let report = settle(&kernel, &desired()).await;
        let named: Vec<_> = report.met.iter().map(|met| (met.effect, met.table.as_str(), met.chain.as_str())).collect();
        assert_eq!(named, [(RuleEffect::Drops, "inet f", "out"), (RuleEffect::Drops, "inet f", "in")]);
        for met in &report.met {
            sh(&met.remedy);
        }
        assert_eq!(settle(&kernel, &desired()).await.met, []);
    });
}

/// The route of probes and the guard go by their mark. What other programs write there is named, in iptables' words and
/// in nftables', with the command that ends it.
#[test]
fn rules_that_rewrite_the_mark_of_probes_are_named() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        // Marks for others' packets, at others' places, or of connections, of which a probe has none.
        for line in [
            "-t nat -A OUTPUT -p udp -j MARK --set-mark 0x7",
            "-t mangle -A OUTPUT -p tcp -j MARK --set-mark 0x7",
            "-t mangle -A OUTPUT -j CONNMARK --restore-mark",
            "-t mangle -A OUTPUT -j MARK --or-mark 0x1000",
            "-t mangle -A FORWARD -j MARK --set-mark 0x7",
        ] {
            run(&format!("iptables-nft {line}"));
        }
        run("nft add table inet late");
        run("nft add chain inet late c { type filter hook postrouting priority 95 ; }");
        run("nft add rule inet late c meta mark set 7");
        assert_eq!(settle(&kernel, &desired()).await.met, []);

        run("iptables-nft -t mangle -N wan");
        run("iptables-nft -t mangle -A wan -j MARK --set-xmark 0x100/0xff00");
        run("iptables-nft -t mangle -A OUTPUT -j wan");
        run("nft add table inet vpn");
        run("nft add chain inet vpn post { type filter hook postrouting priority -150 ; }");
        run("nft add rule inet vpn post meta nfproto ipv6 meta mark set meta mark or 0x80000");
        let report = settle(&kernel, &desired()).await;
        let named: Vec<_> = report.met.iter().map(|met| (met.effect, met.table.as_str(), met.chain.as_str())).collect();
        assert_eq!(named, [(RuleEffect::Remarks, "ip mangle", "wan"), (RuleEffect::Remarks, "inet vpn", "post")]);
        for met in &report.met {
            sh(&met.remedy);
        }
        assert_eq!(settle(&kernel, &desired()).await.met, []);
    });
}

/// Some programs change elements of large sets all the time: neither is a pass made for it, nor are they listed.
#[test]
fn elements_of_others_sets_are_no_news() {
    isolated(|| async {
        topology();
        run("nft add table inet big");
        run("nft add set inet big s { type ipv4_addr ; }");
        run("nft add chain inet big c { type filter hook forward priority 0 ; }");
        run("nft add rule inet big c ip saddr @s drop");
        let (mut kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        let mut watch = kernel.watch().unwrap();
        let nft = std::mem::replace(&mut kernel.nft, Nft::with_program("false"));
        run("nft add element inet big s { 192.0.2.99 }");
        settled(&kernel, &desired()).await;
        // A rule is, and it is reported first.
        run("nft add rule inet big c tcp dport 25 drop");
        let mut events = watch.next().await;
        // Of a link that has just come up the kernel may tell up to a second later.
        while !(events.ruleset || events.foreign_ruleset) {
            events = watch.next().await;
        }
        let of_rules = KernelEvents { links: false, addresses: false, routes: false, ..events };
        assert!(of_rules.foreign_ruleset && of_rules.can_wait(), "{events:?}");
        assert_eq!(
            kernel.reconcile(&desired(), OthersRules::Read).await.unwrap().failures.len(),
            1,
            "it is listed again"
        );
        kernel.nft = nft;
        settled(&kernel, &desired()).await;
    });
}

/// An `nft` that does this in the shell first. While there is a file `fails`, rulesets cannot be listed.
fn wrapped(state: &tempfile::TempDir, first: &str) -> Nft {
    use std::os::unix::fs::PermissionsExt as _;
    let [text, program, fails] = ["text", "nft", "fails"].map(|name| state.path().join(name));
    let fails = format!("case \"$*\" in *ruleset*) [ ! -e {} ] || exit 1 ;; esac", fails.display());
    std::fs::write(&text, format!("#!/bin/sh\n{first}\n{fails}\nexec nft \"$@\"\n")).unwrap();
    std::fs::set_permissions(&text, std::fs::Permissions::from_mode(0o755)).unwrap();
    // By another process: a file that is open for writing in a child that another test begins now cannot be run.
    run(&format!("cp {} {}", text.display(), program.display()));
    Nft::with_program(program.to_string_lossy().into_owned().leak())
}

/// The lines that were added to a file since the last time.
fn added(log: PathBuf) -> impl FnMut() -> Vec<String> {
    move || {
        let lines = std::fs::read_to_string(&log).unwrap_or_default();
        let _ = std::fs::remove_file(&log);
        lines.lines().map(str::to_owned).collect()
    }
}

/// `nft`, and what it was asked to list since the last time.
fn counting(state: &tempfile::TempDir) -> (Nft, impl FnMut() -> Vec<String>) {
    let log = state.path().join("listed");
    let first = format!("case \"$*\" in *list*) echo \"$*\" >>{} ;; esac", log.display());
    (wrapped(state, &first), added(log))
}

/// `nft`, and how many bytes each listing since the last time took of the kernel, as nft's own trace of it shows.
fn weighing(state: &tempfile::TempDir) -> (Nft, impl FnMut() -> Vec<usize>) {
    let log = state.path().join("weighed");
    let first = format!("case \"$*\" in *list*) nft --debug=netlink \"$@\" 2>&1 | wc -c >>{} ;; esac", log.display());
    let mut lines = added(log);
    (wrapped(state, &first), move || lines().iter().map(|line| line.trim().parse().unwrap()).collect())
}

/// However large another program's set is: of what it holds nothing is read, whatever that program changes.
#[test]
fn a_large_foreign_set_is_never_read() {
    isolated(|| async {
        topology();
        let (mut kernel, state) = kernel();
        let elements: Vec<String> =
            (0..100_000u32).map(|n| std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string()).collect();
        let file = state.path().join("big");
        let set = format!("set s {{\ntype ipv4_addr;\nelements = {{ {} }}\n}}", elements.join(", "));
        let chain = "chain c {\ntype filter hook forward priority 0;\nip saddr @s drop;\n}";
        std::fs::write(&file, format!("table inet big {{\n{set}\n{chain}\n}}\n")).unwrap();
        run(&format!("nft -f {}", file.display()));
        let (nft, mut weighed) = weighing(&state);
        kernel.nft = nft;
        settle(&kernel, &desired()).await;
        for port in 1..=3 {
            run(&format!("nft add element inet big s {{ 192.0.2.{port} }}"));
            run(&format!("nft add rule inet big c tcp dport {port} drop"));
            let report = kernel.reconcile(&desired(), OthersRules::Read).await.unwrap();
            assert_eq!((&report.others, &report.failures[..]), (&SeenOthers::Read, &[][..]));
        }
        kernel.drops().await.unwrap();
        let weighed = weighed();
        // The elements alone are megabytes.
        assert!(weighed.len() >= 9 && weighed.iter().all(|bytes| *bytes < 100_000), "{weighed:?}");
    });
}

/// However often other programs change their rules: they are listed when the caller lets them be, without the elements
/// of their sets, and nothing else of theirs ever is.
#[test]
fn others_rules_are_listed_at_the_callers_pace_and_without_elements() {
    isolated(|| async {
        topology();
        run("nft add table inet big");
        run("nft add set inet big s { type ipv4_addr ; elements = { 192.0.2.98, 192.0.2.99 } ; }");
        run("nft add chain inet big c { type filter hook forward priority 0 ; }");
        let (mut kernel, state) = kernel();
        let (nft, mut listed) = counting(&state);
        kernel.nft = nft;
        settle(&kernel, &desired()).await;
        assert!(listed().iter().any(|line| line == "-j -t list ruleset inet"));
        settled(&kernel, &desired()).await;
        listed();
        let own = "-j list table inet meshd";
        for port in 1..=20 {
            run(&format!("nft add rule inet big c tcp dport {port} drop"));
            let report = kernel.reconcile(&desired(), OthersRules::Keep).await.unwrap();
            assert_eq!(
                (&report.others, &report.failures[..], &report.changes[..]),
                (&SeenOthers::Kept, &[][..], &[][..])
            );
        }
        assert_eq!(listed(), [own; 20]);
        run("nft chain inet big c { policy drop ; }");
        let report = settle(&kernel, &desired()).await;
        assert_eq!((report.others, report.foreign_drops.len()), (SeenOthers::Read, 1));
        assert_eq!(listed(), [own, "-j list chains", "-j -t list ruleset inet"]);
        settled(&kernel, &desired()).await;
        assert_eq!(listed(), Vec::<String>::new());
        kernel.drops().await.unwrap();
        assert_eq!(listed(), [own]);
        // What could not be read is tried again at the caller's pace, too, and named until then.
        run("nft add rule inet big c tcp dport 99 drop");
        std::fs::write(state.path().join("fails"), "").unwrap();
        for (others, seen) in [(OthersRules::Read, SeenOthers::Read), (OthersRules::Keep, SeenOthers::Kept)] {
            let report = kernel.reconcile(&desired(), others).await.unwrap();
            assert_eq!((report.others, report.failures.len(), report.foreign_drops.len()), (seen, 1, 1));
        }
        assert_eq!(listed(), [own, "-j list chains", "-j -t list ruleset inet", own]);
        std::fs::remove_file(state.path().join("fails")).unwrap();
        settle(&kernel, &desired()).await;
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
