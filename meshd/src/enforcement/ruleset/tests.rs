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
        tun: "meshd0".to_owned(),
        networks: vec!["10.244.0.0/16".parse().unwrap(), "fd42:244::/48".parse().unwrap()],
        own: vec!["10.244.1.0/24".parse().unwrap(), "fd42:244:0:1::/64".parse().unwrap()],
        overlay: vec!["10.244.1.0".parse().unwrap(), "fd42:244:0:1:ffff:ffff:ffff:ffff".parse().unwrap()],
        unknown_closed: [closed; 2],
        audit: false,
        log_group: 9,
        ports: [("veth1".to_owned(), vec!["10.244.1.10".parse().unwrap(), "fd42:244:0:1::1".parse().unwrap()])].into(),
        displaced: BTreeSet::new(),
        switched_judged: !closed,
    }
}

/// A world with a number of pods, and their rules.
struct World {
    engine: Engine,
    pods: Vec<LocalPod>,
}

impl World {
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
        let policy = PolicyState::Valid(NetworkPolicy::parse(spec).unwrap());
        self.engine.put_policy(ObjectName::new("shop", "p"), &policy);
    }

    fn ruleset(&mut self, before: &Ruleset) -> Ruleset {
        self.engine.commit(1);
        self.engine.ruleset(&self.pods, &DEFAULT_MARKS, before)
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
        let mut changed = RuleTable::new("changed".to_owned(), DEFAULT_MARKS);
        let mut world = World::new(2);
        let ruleset = world.ruleset(changed.ruleset());
        changed.put(&frame(false), ruleset).unwrap();
        assert!(changed.is_whole().unwrap());
        world.policy(&port(80));
        let ruleset = world.ruleset(changed.ruleset());
        changed.put(&frame(true), ruleset.clone()).unwrap();
        assert!(changed.is_whole().unwrap());
        let mut fresh = RuleTable::new("fresh".to_owned(), DEFAULT_MARKS);
        fresh.put(&frame(true), ruleset.clone()).unwrap();
        assert_eq!(listed("changed"), listed("fresh"));
        // Another run takes over what this one left.
        let mut taken_over = RuleTable::new("changed".to_owned(), DEFAULT_MARKS);
        taken_over.put(&frame(true), ruleset).unwrap();
        assert_eq!(listed("changed"), listed("fresh"));
        assert!(taken_over.is_whole().unwrap());
    });
}

#[test]
fn the_same_again_is_no_transaction_and_what_others_remove_is_seen() {
    isolated(|| {
        let mut table = RuleTable::new("t".to_owned(), DEFAULT_MARKS);
        let mut world = World::new(1);
        world.policy(&port(80));
        let ruleset = world.ruleset(table.ruleset());
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
        // Also when it happens between two changes that nobody looks after.
        run("nft", &["flush map inet t ingress4"]);
        world.policy(&port(81));
        let ruleset = world.ruleset(table.ruleset());
        table.put(&frame(true), ruleset).unwrap();
        assert_eq!(listed()[0].matches("10.244.1.10 : jump").count(), 2);
    });
}

#[test]
fn before_the_first_picture_nothing_passes_but_what_an_earlier_run_left() {
    isolated(|| {
        let closes = || run("nft", &["list", "table", "inet", "t"]).contains("ip daddr 10.244.1.0/24 drop");
        let mut first = RuleTable::new("t".to_owned(), DEFAULT_MARKS);
        first.close(&frame(true)).unwrap();
        assert!(closes());
        // Another subnet, also by another run.
        let other = Frame { own: vec!["10.244.7.0/24".parse().unwrap()], ..frame(true) };
        RuleTable::new("t".to_owned(), DEFAULT_MARKS).close(&other).unwrap();
        assert!(!closes());
        first.close(&frame(true)).unwrap();
        assert!(closes());
        let mut world = World::new(1);
        let ruleset = world.ruleset(first.ruleset());
        first.put(&frame(false), ruleset.clone()).unwrap();
        assert!(!closes() && first.is_whole().unwrap());
        // A pod that stays behind in a subnet that was this node's is not judged as whoever has its address now.
        let displaced: BTreeSet<IpAddr> = ["10.244.9.7".parse().unwrap(), "fd42:244:0:9::7".parse().unwrap()].into();
        first.put(&Frame { displaced, ..frame(false) }, ruleset.clone()).unwrap();
        let listed = run("nft", &["list", "table", "inet", "t"]);
        assert_eq!(["10.244.9.7 drop", "fd42:244:0:9::7 drop"].map(|rule| listed.matches(rule).count()), [3, 3]);
        first.put(&frame(false), ruleset.clone()).unwrap();
        assert!(!run("nft", &["list", "table", "inet", "t"]).contains("10.244.9.7"));
        // The rules of an earlier run stand until there is a picture.
        let before = Generation::now().unwrap();
        let mut second = RuleTable::new("t".to_owned(), DEFAULT_MARKS);
        second.close(&frame(true)).unwrap();
        assert_eq!(Generation::now().unwrap(), before);
        for removal in ["flush chain inet t forward", "flush chain inet t refused_in", "flush ruleset"] {
            run("nft", &[removal]);
            second.close(&frame(true)).unwrap();
            assert!(closes(), "{removal}");
            RuleTable::new("t".to_owned(), DEFAULT_MARKS).put(&frame(false), ruleset.clone()).unwrap();
        }
    });
}
