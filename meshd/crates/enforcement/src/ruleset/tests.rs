use std::{
    net::IpAddr,
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, unshare};
use policy::{
    engine::{Engine, ObjectName, PolicyState},
    nft::LocalPod,
    object::{NetworkPolicy, PodObject},
};

use super::*;

/// Runs `test` in a network namespace of its own.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn frame(closed: bool) -> Frame {
    Frame {
        judged_by_tunnel: vec!["meshd0".to_owned()],
        networks: vec!["10.244.0.0/16".parse().unwrap(), "fd42:244::/48".parse().unwrap()],
        own: vec!["10.244.1.0/24".parse().unwrap(), "fd42:244:0:1::/64".parse().unwrap()],
        overlay: vec!["10.244.1.0".parse().unwrap(), "fd42:244:0:1:ffff:ffff:ffff:ffff".parse().unwrap()],
        unknown_closed: [closed; 2],
        audit: false,
        log_group: 9,
        ports: [(
            "veth1".to_owned(),
            PodPort {
                addresses: vec!["10.244.1.10".parse().unwrap(), "fd42:244:0:1::1".parse().unwrap()],
                allowed_sources: closed.then(|| "192.0.2.0/24".parse().unwrap()).into_iter().collect(),
                mac: Some([2, 0, 0, 0, 0, 1]),
                in_mesh: true,
            },
        )]
        .into(),
        bridges: closed.then_some([2, 0, 0, 0, 0, 9]).into_iter().collect(),
        isolated: closed.then(|| "veth1".to_owned()).into_iter().collect(),
        displaced: BTreeSet::new(),
        switched_judged: !closed,
    }
}

/// A world with a number of pods, and their rules.
struct Fixture {
    engine: Engine,
    pods: Vec<LocalPod>,
}

impl Fixture {
    fn new(pods: u8) -> Self {
        let mut world = Self { engine: Engine::new(), pods: Vec::new() };
        world.engine.set_networks(vec!["10.244.0.0/16".parse().unwrap()].into());
        for number in 0..pods {
            let addresses: Vec<IpAddr> = vec![
                format!("10.244.1.{}", number + 10).parse().unwrap(),
                format!("fd42:244:0:1::{number}1").parse().unwrap(),
            ];
            let pod = PodObject { addresses: addresses.clone(), ..PodObject::default() };
            world.engine.put_pod(ObjectName::new("shop", format!("p{number}")), pod, 1);
            world.pods.push(LocalPod { addresses });
        }
        world
    }

    fn policy(&mut self, spec: &serde_json::Value) {
        self.policy_called("p", spec);
    }

    fn policy_called(&mut self, name: &str, spec: &serde_json::Value) {
        let policy = PolicyState::Valid(NetworkPolicy::parse(spec).unwrap());
        self.engine.put_policy(ObjectName::new("shop", name), &policy);
    }

    fn ruleset(&mut self) -> Ruleset {
        self.engine.commit(1);
        self.engine.ruleset(&self.pods)
    }
}

fn port(port: u16) -> serde_json::Value {
    serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{"ports": [{"port": port}],
        "from": [{"podSelector": {}}, {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}}]}]})
}

#[test]
fn a_change_leads_to_what_a_start_would_make() {
    isolated(|| {
        // nft lists things in the order in which they were made.
        let listed = |name: &str| {
            let tables = ["inet", "bridge"].map(|family| run("nft", &["list", "table", family, name]));
            let text = tables.concat().replace(name, "T");
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        let mut changed = RuleTable::new("changed".to_owned());
        let mut world = Fixture::new(2);
        let ruleset = world.ruleset();
        changed.put(&frame(false), ruleset).unwrap();
        assert!(changed.is_whole().unwrap());
        world.policy(&port(80));
        let ruleset = world.ruleset();
        changed.put(&frame(true), ruleset.clone()).unwrap();
        assert!(changed.is_whole().unwrap());
        let mut fresh = RuleTable::new("fresh".to_owned());
        fresh.put(&frame(true), ruleset.clone()).unwrap();
        assert_eq!(listed("changed"), listed("fresh"));
        // Another run takes over what this one left.
        let mut taken_over = RuleTable::new("changed".to_owned());
        taken_over.put(&frame(true), ruleset).unwrap();
        assert_eq!(listed("changed"), listed("fresh"));
        assert!(taken_over.is_whole().unwrap());
    });
}

#[test]
fn the_same_again_is_no_transaction_and_what_others_remove_is_seen() {
    isolated(|| {
        let mut table = RuleTable::new("t".to_owned());
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        let ruleset = world.ruleset();
        table.put(&frame(true), ruleset.clone()).unwrap();
        let before = Generation::now().unwrap();
        table.put(&frame(true), ruleset.clone()).unwrap();
        assert_eq!(Generation::now().unwrap(), before);
        run("nft", &["add table inet stranger"]);
        assert!(table.is_whole().unwrap(), "that is another table");
        let listed = || ["inet", "bridge"].map(|family| run("nft", &["list", "table", family, "t"]));
        let before = listed();
        for removal in [
            "flush chain inet t forward",
            "flush chain inet t in_10_244_1_10",
            "delete element inet t pods4 { 10.244.1.10 }",
            "add element inet t pods4 { 10.244.1.11 }",
            "add element inet t judged_forward4 { 10.244.1.11 . 10.244.1.10 . tcp . 81 }",
            "insert rule inet t recall_forward accept",
            "flush map inet t ingress4",
            "insert rule inet t forward accept",
            "flush map bridge t ports",
            "delete table bridge t",
            "flush ruleset",
            "delete table inet t",
        ] {
            run("nft", &[removal]);
            assert!(!table.is_whole().unwrap(), "{removal}");
            table.put(&frame(true), ruleset.clone()).unwrap();
            assert!(table.is_whole().unwrap());
            assert_eq!(listed(), before, "{removal}");
        }
        // Also when it happens between two changes without a look.
        run("nft", &["flush map inet t ingress4"]);
        world.policy(&port(81));
        let ruleset = world.ruleset();
        table.put(&frame(true), ruleset).unwrap();
        assert_eq!(listed()[0].matches("10.244.1.10 : jump").count(), 4);
    });
}

#[test]
fn rules_bear_their_policy_and_one_under_another_name_keeps_the_verdicts() {
    isolated(|| {
        let mut table = RuleTable::new("t".to_owned());
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        table.put(&frame(true), world.ruleset()).unwrap();
        let verdict = "element inet t judged_forward4 { 10.244.1.11 . 10.244.1.10 . tcp . 81 }";
        let listed = |what: &[&str]| run("nft", &[&["list"], what].concat());
        let policies = |chain: &str, of: &str| listed(&["chain", "inet", "t", chain]).matches(of).count();
        assert_eq!(policies("in_10_244_1_10", "comment \"NetworkPolicy shop/p\""), 4);
        assert_eq!(policies("out_10_244_1_10", "comment \"isolated by NetworkPolicy shop/p\""), 1);
        let mut judged_again = |name: &str, port_number: u16| {
            // As if the rules had allowed a flow.
            let mut monitor = table.held.take().unwrap();
            apply_and_look(&format!("add {verdict}\n"), &mut monitor.monitor).unwrap();
            table.held = Some(monitor);
            world.engine.delete_policy(&ObjectName::new("shop", "p"));
            world.policy_called(name, &port(port_number));
            table.put(&frame(true), world.ruleset()).unwrap();
            assert!(table.is_whole().unwrap());
            listed(&["set", "inet", "t", "judged_forward4"]).matches("10.244.1.11 . 10.244.1.10").count() == 0
        };
        assert!(!judged_again("q", 80));
        assert_eq!(policies("in_10_244_1_10", "comment \"NetworkPolicy shop/q\""), 4);
        assert_eq!(policies("in_10_244_1_10", "shop/p"), 0);
        assert!(judged_again("q", 81));
    });
}

/// Between the last look and the end of a change of our own, when the numbers of rules and the names of sets are as they
/// should be.
#[test]
fn what_others_do_during_a_change_is_not_taken_for_ours() {
    isolated(|| {
        let mut table = RuleTable::new("t".to_owned());
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        table.put(&frame(true), world.ruleset()).unwrap();
        let mut monitor = NftMonitor::open("t").unwrap();
        let mut change = |foreign: &str, port: u16| {
            run("nft", &[foreign]);
            let text = format!("add element inet t judged_forward4 {{ 10.244.1.11 . 10.244.1.10 . tcp . {port} }}\n");
            apply_and_look(&text, &mut monitor).unwrap()
        };
        assert_eq!(change("add table inet stranger", 1), TableActivity::Ours);
        for (port, foreign) in [
            (2, "delete element inet t pods4 { 10.244.1.10 }"),
            (3, "flush map inet t ingress4"),
            (4, "delete table bridge t"),
        ] {
            assert_eq!(change(foreign, port), TableActivity::Others, "{foreign}");
        }
    });
}

/// Another program fills a large set at once: none of those events concerns our tables, so nothing is closed.
#[test]
fn a_large_set_of_others_is_no_change_of_the_table() {
    isolated(|| {
        let mut table = RuleTable::new("t".to_owned());
        table.put(&frame(true), Fixture::new(1).ruleset()).unwrap();
        run("nft", &["add table inet stranger; add set inet stranger s { type ipv4_addr; }"]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("elements");
        let elements: Vec<String> =
            (0..200_000u32).map(|n| std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string()).collect();
        std::fs::write(&file, format!("add element inet stranger s {{ {} }}", elements.join(", "))).unwrap();
        run("nft", &["-f", &file.to_string_lossy()]);
        assert!(table.is_whole().unwrap());
    });
}

/// What version 0.1 left: verdicts in connection marks, and a check of sources behind conntrack's reassembly.
const EARLIER: &str = r#"
table inet t {
    set pods4 { type ipv4_addr; elements = { 10.244.1.10 }; }
    set pods6 { type ipv6_addr; }
    set s_1 { type ipv4_addr; flags interval; elements = { 10.244.1.0/24 }; }
    chain refused_in { counter drop; }
    chain refused_out { counter drop; }
    chain allowed_in { ct direction original limit rate 50/second log group 9 prefix "meshd allowed ingress"; }
    chain allowed_out { }
    chain in_10_244_1_10 {
        ct state invalid,untracked goto refused_in
        ct mark and 0x7f000000 == 0x1000000 return
        ct direction original ct original ip saddr @s_1 tcp dport { 80 } ct mark set ct mark and 0x80ffffff or 0x1000000 goto allowed_in
        goto refused_in
    }
    map ingress4 { type ipv4_addr : verdict; elements = { 10.244.1.10 : jump in_10_244_1_10 }; }
    chain forward {
        type filter hook forward priority -5; policy accept;
        ct reply ip saddr vmap @ingress4
    }
    chain input {
        type filter hook input priority -5; policy accept;
        ct state related meta l4proto { icmp, icmpv6 } return
    }
    chain rewritten { type filter hook postrouting priority 110; policy accept; }
    chain anti_spoof { type filter hook prerouting priority -300; policy accept; iifname "veth1" ip saddr != 10.244.1.10 drop; }
}
"#;

#[test]
fn a_table_of_an_earlier_version_is_taken_over_at_once() {
    isolated(|| {
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        run("nft", &[EARLIER]);
        let mut table = RuleTable::new("t".to_owned());
        let before = Generation::now().unwrap();
        table.close(&frame(true)).unwrap();
        assert_eq!(Generation::now().unwrap(), before, "its rules are in force until there are others");
        let ruleset = world.ruleset();
        table.put(&frame(true), ruleset.clone()).unwrap();
        // The new sets, and then everything at once: in between nothing would be judged.
        assert_eq!(Generation::now().unwrap(), before.after(2));
        assert!(table.is_whole().unwrap());
        let listed = |name: &str| {
            let text = run("nft", &["list", "table", "inet", name]).replace(&format!("inet {name} "), "inet T ");
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        RuleTable::new("fresh".to_owned()).put(&frame(true), ruleset).unwrap();
        assert_eq!(listed("t"), listed("fresh"));
    });
}

/// A kernel may publish the elements of interval sets after the rules that use them: a set that denies would be empty for
/// a moment.
#[test]
fn the_first_rules_meet_sets_that_were_published_before() {
    isolated(|| {
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        let ruleset = world.ruleset();
        let wanted: BTreeSet<String> = ruleset.kernel_sets().collect();
        assert!(!wanted.is_empty());
        let mut refused = ruleset.clone();
        refused.maps.entry("ingress4").or_default().insert("10.244.1.9".parse().unwrap(), "no_such_chain".to_owned());
        let mut table = RuleTable::new("t".to_owned());
        table.close(&frame(true)).unwrap();
        let before = Generation::now().unwrap();
        assert!(table.put(&frame(true), refused).is_err());
        // The sets are there, and the rules are those that close.
        assert_eq!(Generation::now().unwrap(), before.after(1));
        let listing = list("inet", "t").unwrap().unwrap();
        assert!(
            wanted.iter().all(|name| listing.sets.contains_key(name)) && listing.chains.contains_key(CLOSED),
            "{listing:?}"
        );
        table.close(&frame(true)).unwrap();
        assert_eq!(Generation::now().unwrap(), before.after(1), "they are not laid again");
        // Their names are taken now.
        table.put(&frame(true), ruleset.clone()).unwrap();
        assert_eq!(Generation::now().unwrap(), before.after(2));
        assert!(table.is_whole().unwrap());
        let mut fresh = RuleTable::new("fresh".to_owned());
        let before = Generation::now().unwrap();
        fresh.put(&frame(true), ruleset).unwrap();
        assert_eq!(Generation::now().unwrap(), before.after(2));
        assert!(fresh.is_whole().unwrap());
        let of = |name| list("inet", name).unwrap();
        assert_eq!(of("t"), of("fresh"));
    });
}

/// LXD and libvirt join bridges by a veth: neighbour discovery and router advertisements pass there.
#[test]
fn a_bridges_own_link_local_address_passes_to_another_bridge() {
    isolated(|| {
        for kind in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{kind}/accept_dad"), "0").unwrap();
        }
        run("ip", &["link", "add", "br1", "address", "02:00:00:00:00:09", "type", "bridge"]);
        run("ip", &["link", "add", "br2", "type", "bridge"]);
        run("ip", &["link", "add", "to2", "master", "br1", "type", "veth", "peer", "name", "to1"]);
        run("ip", &["link", "set", "to1", "master", "br2"]);
        for link in ["br1", "br2", "to1", "to2"] {
            run("ip", &["link", "set", link, "up"]);
        }
        let index = |link: &str| nix::net::if_::if_nametoindex(link).unwrap();
        let group: std::net::Ipv6Addr = "ff02::77".parse().unwrap();
        let socket = std::net::UdpSocket::bind("[::]:5353").unwrap();
        socket.join_multicast_v6(&group, index("br2")).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
        let own = std::net::SocketAddrV6::new("fe80::ff:fe00:9".parse().unwrap(), 0, 0, index("br1"));
        // The kernel assigns it a moment after a port of the bridge is up.
        let bound = |_| {
            let socket = std::net::UdpSocket::bind(own);
            socket.inspect_err(|_| thread::sleep(std::time::Duration::from_millis(10))).ok()
        };
        let from = (0..1000).find_map(bound).expect("br1 gets no link-local address");
        from.set_multicast_loop_v6(false).unwrap();
        let arrives = |tries: usize, word: &[u8]| {
            (0..tries).any(|_| {
                // Ports of a bridge forward only a moment after they are up.
                from.send_to(word, std::net::SocketAddrV6::new(group, 5353, 0, index("br1"))).unwrap();
                // What was sent under the earlier rules may come as late as now.
                let mut heard = [0; 8];
                while let Ok((length, _)) = socket.recv_from(&mut heard) {
                    if heard[..length] == *word {
                        return true;
                    }
                }
                false
            })
        };
        assert!(arrives(50, b"bare"), "without rules");
        let mut world = Fixture::new(1);
        world.policy(&port(80));
        let ruleset = world.ruleset();
        let mut table = RuleTable::new("t".to_owned());
        table.put(&frame(true), ruleset.clone()).unwrap();
        assert!(arrives(50, b"judged"), "{}", run("nft", &["list", "table", "bridge", "t"]));
        // A pod's port is not the bridge's.
        let mut of_pod = frame(true);
        of_pod.ports.insert("to1".to_owned(), PodPort { mac: Some([2, 0, 0, 0, 0, 2]), ..PodPort::default() });
        table.put(&of_pod, ruleset).unwrap();
        assert!(!arrives(3, b"pod"));
    });
}

/// What is listed can be read again, as operators do who keep `nft list ruleset` for the next boot.
#[test]
fn what_nft_lists_it_can_read() {
    isolated(|| {
        let mut world = Fixture::new(2);
        world.policy(&serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": [{"port": 80}, {"port": 8000, "endPort": 8100}, {"port": 53, "protocol": "UDP"}]}],
            "egress": [{"ports": [{"port": "web"}, {"protocol": "SCTP"}], "to": [{"podSelector": {}}]}]}));
        let ruleset = world.ruleset();
        RuleTable::new("t".to_owned()).put(&frame(true), ruleset).unwrap();
        let list = || run("nft", &["list", "table", "inet", "t"]);
        let listed = list();
        run("nft", &["delete table inet t"]);
        run("nft", &[&listed]);
        assert_eq!(list(), listed);
    });
}

#[test]
fn before_the_first_picture_nothing_passes_but_what_an_earlier_run_left() {
    isolated(|| {
        let closes = || run("nft", &["list", "table", "inet", "t"]).contains("ip daddr 10.244.1.0/24 drop");
        let mut first = RuleTable::new("t".to_owned());
        first.close(&frame(true)).unwrap();
        assert!(closes());
        // What stands is left alone, whatever else the kernel refused meanwhile: its counters tell what was dropped.
        let stands = Generation::now().unwrap();
        let mut refused = Fixture::new(1).ruleset();
        refused.maps.entry("ingress4").or_default().insert("10.244.1.9".parse().unwrap(), "no_such_chain".to_owned());
        assert!(first.put(&frame(true), refused).is_err());
        first.close(&frame(true)).unwrap();
        assert_eq!(Generation::now().unwrap(), stands);
        run("nft", &["flush chain inet t forward"]);
        assert!(!closes());
        first.close(&frame(true)).unwrap();
        assert!(closes());
        // Another subnet, also by another run.
        let other = Frame { own: vec!["10.244.7.0/24".parse().unwrap()], ..frame(true) };
        RuleTable::new("t".to_owned()).close(&other).unwrap();
        assert!(!closes());
        first.close(&frame(true)).unwrap();
        assert!(closes());
        let mut world = Fixture::new(1);
        let ruleset = world.ruleset();
        first.put(&frame(false), ruleset.clone()).unwrap();
        assert!(!closes() && first.is_whole().unwrap());
        // A pod that stays behind in a subnet that was this node's is not judged as the present owner of its address.
        let displaced: BTreeSet<IpAddr> = ["10.244.9.7".parse().unwrap(), "fd42:244:0:9::7".parse().unwrap()].into();
        first.put(&Frame { displaced, ..frame(false) }, ruleset.clone()).unwrap();
        let listed = run("nft", &["list", "table", "inet", "t"]);
        assert_eq!(["10.244.9.7 drop", "fd42:244:0:9::7 drop"].map(|rule| listed.matches(rule).count()), [4, 4]);
        first.put(&frame(false), ruleset.clone()).unwrap();
        assert!(!run("nft", &["list", "table", "inet", "t"]).contains("10.244.9.7"));
        // The rules of an earlier run stand until there is a picture.
        let before = Generation::now().unwrap();
        let mut second = RuleTable::new("t".to_owned());
        second.close(&frame(true)).unwrap();
        assert_eq!(Generation::now().unwrap(), before);
        for removal in ["flush chain inet t forward", "flush chain inet t refused_in", "flush ruleset"] {
            run("nft", &[removal]);
            second.close(&frame(true)).unwrap();
            assert!(closes(), "{removal}");
            RuleTable::new("t".to_owned()).put(&frame(false), ruleset.clone()).unwrap();
        }
    });
}
