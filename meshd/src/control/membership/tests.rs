//! Seeded histories of several nodes on a model of etcd: crashes, partitions, pauses, lost and late calls, leases
//! that run out, keys that an operator deletes. No clock, no threads: a failing seed fails again.

use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::{Duration, Instant},
};

use etcd_schema::{Key, PublicKey, SubnetKey, SubnetLease};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{model::Etcd, *};
use crate::control::{
    session::WatchEvent,
    types::{Revision, Write},
};

const CONFIG: &str = r#"{"Network": "10.0.0.0/24", "SubnetLen": 28, "LeaseTTL": 20,
    "EnableIPv6": true, "IPv6Network": "fd00::/56", "IPv6SubnetLen": 64}"#;

struct Sim {
    seed: u64,
    rng: StdRng,
    now: Instant,
    start: Instant,
    etcd: Etcd,
    nodes: Vec<Node>,
    queue: BinaryHeap<Due>,
    sequence: u64,
    /// Calls may be lost or late.
    faults: bool,
    reservations: BTreeSet<String>,
    owners: BTreeMap<String, Option<NodeId>>,
    checked: Revision,
    /// Every key with every node that ever owned it.
    granted: BTreeSet<(String, NodeId)>,
}

struct Node {
    id: NodeId,
    facts: LocalFacts,
    /// Process of this number runs; effects of earlier ones are nobody's.
    process: u64,
    membership: Option<Membership>,
    store: Store,
    connected: bool,
    reachable: bool,
    delivered: Revision,
    deliver_after: Instant,
    paused_until: Instant,
    wakes_at: Option<Instant>,
    attached: bool,
    /// What the cache on disk holds.
    cached: Option<SubnetKey>,
}

#[derive(Debug)]
enum What {
    Arrive { node: usize, process: u64, call: CallId, what: Call, lost_answer: bool },
    Answer { node: usize, process: u64, call: CallId, answer: Answer },
    Deliver { node: usize, process: u64, upto: Revision },
    List { node: usize, process: u64 },
    Start { node: usize },
}

struct Due {
    at: Instant,
    sequence: u64,
    what: What,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

fn facts(number: u8) -> LocalFacts {
    LocalFacts {
        name: format!("node-{number}").parse().unwrap(),
        site: None,
        public_key: PublicKey::from_bytes([number + 9; 32]),
        next_public_key: None,
        listen_port: 51820,
        endpoints: Vec::new(),
        addresses: Vec::new(),
        public_ipv4: Some(Ipv4Addr::new(192, 0, 2, number + 1)),
        public_ipv6: None,
        version: "1".into(),
    }
}

impl Sim {
    fn new(seed: u64, nodes: u8) -> Self {
        let start = Instant::now();
        let mut sim = Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            now: start,
            start,
            etcd: Etcd::new(),
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
            faults: false,
            reservations: BTreeSet::new(),
            owners: BTreeMap::new(),
            checked: 0,
            granted: BTreeSet::new(),
        };
        for number in 0..nodes {
            sim.nodes.push(Node {
                id: format!("n{number}").parse().unwrap(),
                facts: facts(number),
                process: 0,
                membership: None,
                store: Store::default(),
                connected: false,
                reachable: true,
                delivered: 0,
                deliver_after: start,
                paused_until: start,
                wakes_at: None,
                attached: false,
                cached: None,
            });
        }
        sim
    }

    fn at(&mut self, after: Duration, what: What) {
        self.sequence += 1;
        self.queue.push(Due { at: self.now + after, sequence: self.sequence, what });
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }

    fn operator_puts(&mut self, key: &str, value: &str) {
        let put = Write::Put { key: key.into(), value: value.into(), lease: None };
        self.etcd.transact(&Transaction { compares: vec![], writes: vec![put] }).unwrap();
        self.changed(true);
    }

    fn operator_deletes(&mut self, key: &str) {
        let delete = Write::Delete { key: key.into() };
        self.etcd.transact(&Transaction { compares: vec![], writes: vec![delete] }).unwrap();
        self.changed(true);
    }

    fn start(&mut self, node: usize) {
        let seed = self.rng.random();
        let incarnation = self.rng.random();
        let now = self.now;
        let node_state = &mut self.nodes[node];
        node_state.process += 1;
        let identity =
            Identity { id: node_state.id.clone(), boot_id: "b".into(), start_count: node_state.process, incarnation };
        node_state.membership =
            Some(Membership::new(identity, node_state.facts.clone(), node_state.cached, node_state.attached, seed));
        node_state.store = Store::default();
        node_state.connected = false;
        node_state.deliver_after = now;
        self.reconnect(node);
    }

    fn crash(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.process += 1;
        node.membership = None;
        node.wakes_at = None;
        node.connected = false;
    }

    fn reconnect(&mut self, node: usize) {
        let delay = self.millis(1..200);
        let process = self.nodes[node].process;
        self.at(delay, What::List { node, process });
    }

    fn disconnect(&mut self, node: usize) {
        if std::mem::take(&mut self.nodes[node].connected) {
            self.step(node, Input::Disconnected);
        }
        self.reconnect(node);
    }

    fn step(&mut self, node: usize, input: Input) {
        let n = &mut self.nodes[node];
        let Some(membership) = &mut n.membership else { return };
        let effects = membership.step(self.now, input, &n.store);
        if n.store.lists() > 0 {
            n.cached = membership.subnet();
        }
        if let Some(subnet) = membership.subnet() {
            let used = (Key::Subnet(subnet).to_string(), n.id.clone());
            assert!(self.granted.contains(&used), "seed {}: {used:?} is used, and never was the node's", self.seed);
        }
        if let MembershipState::Joined { subnet } = membership.state() {
            assert_eq!(membership.subnet(), Some(*subnet), "seed {}", self.seed);
        }
        let deadlines = membership.next_deadline(self.now).into_iter().chain(n.store.next_deadline());
        n.wakes_at = deadlines.min().map(|at| at.max(n.paused_until));
        for effect in effects {
            match effect {
                Effect::Relist => self.disconnect(node),
                Effect::Call(call, what) => self.send(node, call, what),
            }
        }
    }

    fn send(&mut self, node: usize, call: CallId, what: Call) {
        let process = self.nodes[node].process;
        let there = self.millis(1..30);
        let lost = |what: &Call| {
            let error = Err(CallError::Indeterminate("lost".into()));
            match what {
                Call::Grant { .. } => Answer::Granted(Err(CallError::Indeterminate("lost".into()))),
                Call::KeepAlive { .. } => Answer::KeptAlive(Err(CallError::Indeterminate("lost".into()))),
                Call::Transact(_) => Answer::Committed(error),
            }
        };
        let fate = if !self.nodes[node].reachable {
            0
        } else if self.faults {
            self.rng.random_range(0..20)
        } else {
            19
        };
        let deadline = Duration::from_secs(5);
        match fate {
            // Never arrives.
            0 => {
                let answer = lost(&what);
                self.at(deadline, What::Answer { node, process, call, answer });
            }
            // Happens, or happens late, even after the caller gave up: the answer is lost.
            1 | 2 => {
                let answer = lost(&what);
                let late = if fate == 1 { there } else { self.millis(1..12_000) };
                self.at(deadline, What::Answer { node, process, call, answer });
                self.at(late, What::Arrive { node, process, call, what, lost_answer: true });
            }
            _ => self.at(there, What::Arrive { node, process, call, what, lost_answer: false }),
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Arrive { node, process, call, what, lost_answer } => {
                let answer = match what {
                    Call::Grant { ttl } => Answer::Granted(Ok(self.etcd.grant(self.now, ttl))),
                    Call::KeepAlive { lease } => Answer::KeptAlive(self.etcd.keep_alive(self.now, lease)),
                    Call::Transact(transaction) => Answer::Committed(self.etcd.transact(&transaction)),
                };
                self.changed(false);
                if !lost_answer {
                    let back = self.millis(1..30);
                    self.at(back, What::Answer { node, process, call, answer });
                }
            }
            What::Answer { node, process, call, answer } if self.nodes[node].process == process => {
                if self.postpone(node, |process| What::Answer { node, process, call, answer: answer.clone() }) {
                    return;
                }
                let lost = matches!(
                    &answer,
                    Answer::Committed(Err(CallError::Indeterminate(_)))
                        | Answer::Granted(Err(CallError::Indeterminate(_)))
                        | Answer::KeptAlive(Err(CallError::Indeterminate(_)))
                );
                self.step(node, Input::Answer(call, answer));
                if lost {
                    self.disconnect(node);
                }
            }
            What::Deliver { node, process, upto } if self.nodes[node].process == process => {
                if !self.nodes[node].connected || self.postpone(node, |process| What::Deliver { node, process, upto }) {
                    return;
                }
                let n = &mut self.nodes[node];
                let events = self.etcd.events(n.delivered, upto);
                n.delivered = n.delivered.max(upto);
                if !events.is_empty() {
                    n.store.changed(self.now, events);
                    self.step(node, Input::Store);
                }
            }
            What::List { node, process } if self.nodes[node].process == process && !self.nodes[node].connected => {
                if self.postpone(node, |process| What::List { node, process }) {
                    return;
                }
                if !self.nodes[node].reachable {
                    self.reconnect(node);
                    return;
                }
                let (revision, entries) = (self.etcd.revision, self.etcd.keys.values().cloned().collect());
                let n = &mut self.nodes[node];
                n.connected = true;
                n.delivered = revision;
                n.store.listed(self.now, revision, entries);
                self.step(node, Input::Connected);
                self.step(node, Input::Store);
            }
            What::Start { node } if self.nodes[node].membership.is_none() => self.start(node),
            _ => {}
        }
    }

    /// A paused process takes in what came once it goes on.
    fn postpone(&mut self, node: usize, what: impl Fn(u64) -> What) -> bool {
        let left = self.nodes[node].paused_until.saturating_duration_since(self.now);
        if left.is_zero() {
            return false;
        }
        self.at(left, what(self.nodes[node].process));
        true
    }

    /// etcd may have changed: checks every new revision and tells the watchers.
    fn changed(&mut self, by_operator: bool) {
        let events = self.etcd.events(self.checked, self.etcd.revision);
        if events.is_empty() {
            return;
        }
        self.checked = self.etcd.revision;
        for event in events {
            let Ok(Key::Subnet(_)) = Key::parse(event.key()) else { continue };
            match event {
                WatchEvent::Put(entry) => {
                    let node = SubnetLease::parse(&entry.value).ok().and_then(|lease| lease.node);
                    if let Some(node) = &node {
                        self.granted.insert((entry.key.clone(), node.clone()));
                    }
                    let before = self.owners.insert(entry.key.clone(), node.clone());
                    if let (Some(Some(before)), false) = (before, by_operator) {
                        assert_eq!(Some(before), node, "seed {}: {} was overwritten", self.seed, entry.key);
                    }
                }
                WatchEvent::Delete { key, .. } => {
                    self.owners.remove(&key);
                    let freed = self.reservations.contains(&key) && !by_operator;
                    assert!(!freed, "seed {}: the reservation {key} was freed", self.seed);
                }
            }
        }
        let subnets: Vec<SubnetKey> = self
            .etcd
            .keys
            .keys()
            .filter_map(|key| match Key::parse(key) {
                Ok(Key::Subnet(subnet)) => Some(subnet),
                _ => None,
            })
            .collect();
        for (i, a) in subnets.iter().enumerate() {
            for b in &subnets[i + 1..] {
                assert!(!a.overlaps(b), "seed {}: {a:?} and {b:?} at {}", self.seed, self.etcd.revision);
            }
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].connected {
                let delay = self.millis(1..40);
                // A stream keeps the order.
                let at = (self.now + delay).max(self.nodes[node].deliver_after);
                self.nodes[node].deliver_after = at;
                let (process, upto) = (self.nodes[node].process, self.etcd.revision);
                self.at(at.saturating_duration_since(self.now), What::Deliver { node, process, upto });
            }
        }
    }

    fn run(&mut self, until: Duration) {
        let end = self.start + until;
        for turn in 0.. {
            assert!(turn < 2_000_000, "seed {}: never comes to rest", self.seed);
            let next = self
                .nodes
                .iter()
                .filter_map(|node| node.wakes_at)
                .chain(self.queue.peek().map(|due| due.at))
                .chain(self.etcd.next_expiry())
                .chain([end])
                .min()
                .unwrap();
            self.now = self.now.max(next);
            if self.now >= end {
                return;
            }
            self.etcd.expire(self.now);
            self.changed(false);
            while self.queue.peek().is_some_and(|due| due.at <= self.now) {
                let due = self.queue.pop().unwrap();
                self.happen(due.what);
            }
            for node in 0..self.nodes.len() {
                if self.nodes[node].wakes_at.is_some_and(|at| at <= self.now) {
                    self.nodes[node].store.tick(self.now);
                    self.step(node, Input::Tick);
                }
            }
        }
    }

    fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    fn disturb(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len());
        match self.rng.random_range(0..12) {
            0 | 1 => {
                self.crash(node);
                let away = if self.rng.random() { self.millis(1..2000) } else { self.millis(1..60_000) };
                self.at(away, What::Start { node });
            }
            2 | 3 => {
                self.nodes[node].reachable = !self.nodes[node].reachable;
                if !self.nodes[node].reachable {
                    self.disconnect(node);
                }
            }
            4 => {
                let pause = self.millis(1..60_000);
                self.nodes[node].paused_until = self.now + pause;
            }
            5 => {
                let ours: Vec<_> = self
                    .etcd
                    .keys
                    .keys()
                    .filter(|key| *key != "config" && !self.reservations.contains(*key))
                    .cloned()
                    .collect();
                if !ours.is_empty() {
                    let key = ours[self.rng.random_range(0..ours.len())].clone();
                    self.operator_deletes(&key);
                }
            }
            6 => {
                self.nodes[node].attached = !self.nodes[node].attached;
                let attached = self.nodes[node].attached;
                self.step(node, Input::Attached(attached));
            }
            7 => {
                // A cache that was lost.
                self.crash(node);
                self.nodes[node].cached = None;
                self.at(Duration::from_millis(500), What::Start { node });
            }
            8 => {
                self.nodes[node].facts.version.push('x');
                let facts = self.nodes[node].facts.clone();
                self.step(node, Input::Facts(Box::new(facts)));
            }
            9 => {
                // An operator gives a subnet away while its node rewrites the record.
                let given = self.subnets_of(node).into_iter().find(|key| !self.reservations.contains(*key));
                if let Some(key) = given.map(str::to_owned) {
                    self.nodes[node].facts.listen_port += 1;
                    let facts = self.nodes[node].facts.clone();
                    self.step(node, Input::Facts(Box::new(facts)));
                    self.operator_puts(&key, r#"{"Node": "other"}"#);
                }
            }
            10 => {
                // Everything deleted but what is reserved; the configuration comes back later than the rest.
                self.operator_deletes_all();
                let while_away = self.millis(1..40_000);
                self.run(self.elapsed() + while_away);
                self.operator_puts("config", CONFIG);
            }
            _ => self.disconnect(node),
        }
    }

    fn operator_deletes_all(&mut self) {
        let writes = self.etcd.keys.keys().filter(|key| !self.reservations.contains(*key));
        let writes = writes.map(|key| Write::Delete { key: key.clone() }).collect();
        self.etcd.transact(&Transaction { compares: vec![], writes }).unwrap();
        self.changed(true);
    }

    fn subnets_of(&self, node: usize) -> Vec<&str> {
        self.owners
            .iter()
            .filter(|(_, owner)| owner.as_ref() == Some(&self.nodes[node].id))
            .map(|(key, _)| key.as_str())
            .collect()
    }
}

fn history(seed: u64) {
    let mut sim = Sim::new(seed, 5);
    sim.operator_puts("config", CONFIG);
    for (key, value) in [
        ("subnets/10.0.0.32-28", r#"{"PublicIP": "192.0.2.2"}"#),
        ("subnets/10.0.0.48-29&fd00:0:0:4::-63", "{}"),
        ("subnets/10.0.0.128-28&fd00:0:0:9::-64", r#"{"Node": "n3"}"#),
    ] {
        sim.reservations.insert(key.into());
        sim.operator_puts(key, value);
    }
    for node in 0..sim.nodes.len() {
        let delay = sim.millis(0..3000);
        sim.at(delay, What::Start { node });
    }
    sim.faults = true;
    while sim.elapsed() < Duration::from_secs(180) {
        let gap = sim.millis(10..8000);
        sim.run(sim.elapsed() + gap);
        sim.disturb();
    }
    // Now the faults stop, and what was given away is free again.
    let given: Vec<_> = sim
        .owners
        .iter()
        .filter(|(_, owner)| owner.as_ref().is_some_and(|owner| owner.as_str() == "other"))
        .map(|(key, _)| key.clone())
        .collect();
    for key in given {
        sim.operator_deletes(&key);
    }
    sim.faults = false;
    for node in 0..sim.nodes.len() {
        sim.nodes[node].reachable = true;
        sim.nodes[node].paused_until = sim.now;
        sim.nodes[node].attached = false;
        sim.step(node, Input::Attached(false));
        sim.at(Duration::ZERO, What::Start { node });
    }
    sim.run(sim.elapsed() + Duration::from_secs(90));
    for node in 0..sim.nodes.len() {
        let n = &sim.nodes[node];
        let state = n.membership.as_ref().unwrap().state();
        let MembershipState::Joined { subnet } = state else {
            panic!("seed {seed}: {} is {state:?}", n.id);
        };
        let key = Key::Subnet(*subnet).to_string();
        assert_eq!(sim.subnets_of(node), [key.as_str()], "seed {seed}: {} at {:?}", n.id, n.store.revision());
        let record = n.store.get(&Key::Node(n.id.clone()).to_string()).and_then(|kept| kept.node());
        assert_eq!(record.unwrap().version, n.facts.version, "seed {seed}");
    }
    for key in &sim.reservations {
        assert!(sim.etcd.keys[key].lease.is_none(), "seed {seed}: {key} has a lease");
    }
}

#[test]
fn no_history_gives_a_subnet_two_owners_and_all_come_to_rest() {
    let histories = std::env::var("MESHD_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    for seed in 0..histories {
        history(seed);
    }
}

/// A node and a copy of it: the same id, another process.
fn with_copy(wait: Duration) -> Sim {
    let mut sim = Sim::new(1, 2);
    sim.operator_puts("config", CONFIG);
    sim.nodes[1].id = sim.nodes[0].id.clone();
    sim.nodes[1].facts = sim.nodes[0].facts.clone();
    sim.nodes[1].facts.version = "copy".into();
    sim.start(0);
    sim.run(wait);
    sim.nodes[1].cached = sim.nodes[0].cached;
    sim.start(1);
    sim
}

fn state_of(sim: &Sim, node: usize) -> &MembershipState {
    sim.nodes[node].membership.as_ref().unwrap().state()
}

#[test]
fn a_copy_of_a_node_refuses_and_changes_nothing() {
    let mut sim = with_copy(Duration::from_secs(100));
    let before = sim.etcd.keys["nodes/n0"].clone();
    sim.run(Duration::from_secs(300));
    assert!(matches!(state_of(&sim, 1), MembershipState::Refused { .. }), "{:?}", state_of(&sim, 1));
    assert!(matches!(state_of(&sim, 0), MembershipState::Joined { .. }), "{:?}", state_of(&sim, 0));
    assert_eq!(sim.etcd.keys["nodes/n0"], before);
}

#[test]
fn of_two_copies_that_start_together_one_stays() {
    let mut sim = with_copy(Duration::from_millis(5));
    sim.run(Duration::from_secs(300));
    let refused = [0, 1].map(|node| matches!(state_of(&sim, node), MembershipState::Refused { .. }));
    assert_ne!(refused[0], refused[1], "{:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
}

#[test]
fn a_node_that_was_away_yields_to_the_copy_that_took_its_place() {
    let mut sim = with_copy(Duration::from_secs(100));
    // Before the copy is heard of, the first is cut off for long.
    sim.nodes[0].reachable = false;
    sim.disconnect(0);
    sim.run(Duration::from_secs(200));
    assert!(matches!(state_of(&sim, 1), MembershipState::Joined { .. }), "{:?}", state_of(&sim, 1));
    sim.nodes[0].reachable = true;
    sim.run(Duration::from_secs(300));
    assert!(matches!(state_of(&sim, 0), MembershipState::Refused { .. }), "{:?}", state_of(&sim, 0));
    assert!(matches!(state_of(&sim, 1), MembershipState::Joined { .. }), "{:?}", state_of(&sim, 1));
}

#[test]
fn a_lost_subnet_is_not_taken_back_by_force_and_a_new_one_waits_for_the_pods() {
    let mut sim = Sim::new(3, 1);
    sim.operator_puts("config", CONFIG);
    sim.nodes[0].attached = true;
    sim.start(0);
    sim.run(Duration::from_secs(10));
    let own = sim.nodes[0].cached.unwrap();
    sim.nodes[0].reachable = false;
    sim.disconnect(0);
    sim.run(Duration::from_secs(60));
    assert!(!sim.etcd.keys.contains_key(&Key::Subnet(own).to_string()));
    // While it is cut off it goes on as before.
    assert_eq!(sim.nodes[0].membership.as_ref().unwrap().subnet(), Some(own));
    let half = format!("subnets/{}-29", own.v4.unwrap().network());
    sim.operator_puts(&half, r#"{"Node": "other"}"#);
    sim.nodes[0].reachable = true;
    sim.run(Duration::from_secs(120));
    assert!(matches!(state_of(&sim, 0), MembershipState::SubnetLost { .. }));
    // It is free again before the pods are gone: then it is this node's again.
    sim.operator_deletes(&half);
    sim.run(Duration::from_secs(130));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: own });
}

#[test]
fn nodes_put_everything_back_but_config_when_all_of_it_was_deleted() {
    for nodes in [1, 4] {
        let mut sim = Sim::new(4, nodes);
        sim.operator_puts("config", CONFIG);
        for node in 0..sim.nodes.len() {
            sim.nodes[node].attached = true;
            sim.start(node);
        }
        sim.run(Duration::from_secs(10));
        let subnets: Vec<_> = sim.nodes.iter().map(|node| node.cached.unwrap()).collect();
        sim.operator_deletes_all();
        // Longer than withdrawals wait.
        sim.run(Duration::from_secs(60));
        for (node, subnet) in subnets.into_iter().enumerate() {
            assert_eq!(*state_of(&sim, node), MembershipState::Joined { subnet });
            assert_eq!(sim.subnets_of(node), [Key::Subnet(subnet).to_string()]);
            assert_eq!(sim.nodes[node].store.view().nodes.len(), usize::from(nodes));
        }
        assert!(!sim.etcd.keys.contains_key("config"), "that one is the operator's");
    }
}
