//! Seeded histories of several nodes on a model of etcd: crashes, partitions, pauses, lost and late calls, expiring
//! leases, and keys deleted by an operator. No clock, no threads: a failing seed is reproducible.

mod clones;
mod histories;
mod liveness;
mod networks;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use etcd_schema::{Cluster, Key, NodeRecord, PublicKey, Readiness, SubnetKey, SubnetLease};
use mesh::{problem::ProblemCode, records::Revision};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    event_queue::EventQueue,
    model::EtcdModel,
    types::{Entry, KeyListing, WatchEvent, Write},
};

const CONFIG: &str = r#"{"Network": "10.0.0.0/24", "SubnetLen": 28, "LeaseTTL": 20,
    "EnableIPv6": true, "IPv6Network": "fd00::/56", "IPv6SubnetLen": 64}"#;

/// The same and that of a cluster.
const CLUSTERS: &str = r#"{"Networks": [{"cidr": "10.0.0.0/24", "SubnetLen": 28}, {"cidr": "fd00::/56", "SubnetLen": 64},
    {"cidr": "10.42.0.0/24", "SubnetLen": 28, "cluster": "west"}], "LeaseTTL": 20}"#;

/// The same, where Kubernetes allocates in the cluster.
const BY_KUBERNETES: &str = r#"{"Networks": [{"cidr": "10.0.0.0/24", "SubnetLen": 28},
    {"cidr": "fd00::/56", "SubnetLen": 64}, {"cidr": "10.42.0.0/24", "SubnetLen": 28, "cluster": "west",
    "Allocate": "kubernetes"}], "LeaseTTL": 20}"#;

struct Sim {
    seed: u64,
    /// What the operator puts back where a history deletes it.
    config: &'static str,
    rng: StdRng,
    now: Instant,
    start: Instant,
    etcd: EtcdModel,
    nodes: Vec<Node>,
    queue: EventQueue<What>,
    /// Calls may be lost or late.
    faults: bool,
    reservations: BTreeSet<String>,
    owners: BTreeMap<String, Option<NodeId>>,
    checked: Revision,
    /// Every key with every node that ever owned it.
    granted: BTreeSet<(String, NodeId)>,
    /// What etcd may be restored from.
    backups: Vec<EtcdModel>,
}

struct Node {
    id: NodeId,
    facts: LocalFacts,
    /// The running process; effects of earlier ones are dropped.
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
    incarnation: u64,
    /// Whether it ever acted as the node.
    acted: bool,
    /// What RUN holds: the last process that held the identity here.
    predecessor: Option<u64>,
}

#[derive(Debug)]
enum What {
    Arrive { node: usize, process: u64, call: CallId, what: Call, lost_answer: bool },
    Answer { node: usize, process: u64, call: CallId, answer: CallAnswer },
    Deliver { node: usize, process: u64, upto: Revision },
    List { node: usize, process: u64 },
    Start { node: usize },
}

pub(crate) fn facts(number: u8) -> LocalFacts {
    LocalFacts {
        name: format!("node-{number}").parse().unwrap(),
        site: None,
        cluster: Cluster::default(),
        public_key: PublicKey::from_bytes([number + 9; 32]),
        next_public_key: None,
        listen_port: 51820,
        endpoints: Vec::new(),
        addresses: Vec::new(),
        vteps: Vec::new(),
        public_ipv4: Some(Ipv4Addr::new(192, 0, 2, number + 1)),
        public_ipv6: None,
        version: "1".into(),
        readiness: None,
    }
}

fn lost(what: &Call) -> CallAnswer {
    let error = CallError::Indeterminate("lost".into());
    match what {
        Call::Grant { .. } => CallAnswer::Granted(Err(error)),
        Call::KeepAlive { .. } => CallAnswer::KeptAlive(Err(error)),
        Call::Transact(_) => CallAnswer::Committed(Err(error)),
    }
}

impl Sim {
    fn new(seed: u64, nodes: u8) -> Self {
        let start = Instant::now();
        let mut sim = Self {
            seed,
            config: CONFIG,
            rng: StdRng::seed_from_u64(seed),
            now: start,
            start,
            etcd: EtcdModel::new(),
            nodes: Vec::new(),
            queue: EventQueue::default(),
            faults: false,
            reservations: BTreeSet::new(),
            owners: BTreeMap::new(),
            checked: 0,
            granted: BTreeSet::new(),
            backups: Vec::new(),
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
                incarnation: 0,
                acted: false,
                predecessor: None,
            });
        }
        sim
    }

    fn at(&mut self, after: Duration, what: What) {
        self.queue.put(self.now + after, what);
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
        node_state.incarnation = incarnation;
        let identity = Identity {
            id: node_state.id.clone(),
            boot_id: "b".into(),
            start_count: node_state.process,
            incarnation,
            predecessor: node_state.predecessor,
        };
        node_state.membership = Some(Membership::new(
            now,
            identity,
            node_state.facts.clone(),
            node_state.cached,
            node_state.attached,
            seed,
        ));
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
        n.acted |= membership.holds_identity();
        if membership.may_write(self.now) {
            n.predecessor = Some(n.incarnation);
        } else if let MembershipState::Cloned { .. } = membership.state() {
            n.predecessor = None;
        }
        if let Some(subnet) = membership.subnet() {
            let used = (Key::Subnet(subnet).to_string(), n.id.clone());
            assert!(self.granted.contains(&used), "seed {}: {used:?} is used, and never was the node's", self.seed);
        }
        if let MembershipState::Joined { subnet } = membership.state() {
            assert_eq!(membership.subnet(), Some(*subnet), "seed {}", self.seed);
        }
        let deadlines = membership.next_deadline().into_iter().chain(n.store.next_deadline());
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
                    Call::Grant { ttl } => CallAnswer::Granted(Ok(self.etcd.grant(self.now, ttl))),
                    Call::KeepAlive { lease } => CallAnswer::KeptAlive(self.etcd.keep_alive(self.now, lease)),
                    Call::Transact(transaction) => CallAnswer::Committed(self.etcd.transact(&transaction)),
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
                    CallAnswer::Committed(Err(CallError::Indeterminate(_)))
                        | CallAnswer::Granted(Err(CallError::Indeterminate(_)))
                        | CallAnswer::KeptAlive(Err(CallError::Indeterminate(_)))
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
                let listing = self.etcd.list();
                let n = &mut self.nodes[node];
                n.connected = true;
                n.delivered = listing.revision;
                n.store.on_list(self.now, listing.clone());
                if n.store.awaits_list() {
                    n.store.on_list(self.now, listing);
                }
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

    fn restore(&mut self, backup: &EtcdModel) {
        if self.rng.random() {
            self.etcd.becomes_another_cluster();
        }
        self.go_back(backup);
    }

    /// etcd goes back to `backup`: connections break, calls under way are lost, answers under way still arrive.
    fn go_back(&mut self, backup: &EtcdModel) {
        self.etcd.restore(backup, self.now);
        self.checked = self.etcd.revision;
        self.owners.clear();
        for (key, entry) in &self.etcd.keys {
            if let Ok(Key::Subnet(_)) = Key::parse(key) {
                self.owners.insert(key.clone(), SubnetLease::parse(&entry.value).ok().and_then(|lease| lease.node));
            }
        }
        for arrival in self.queue.take_out(|what| matches!(what, What::Arrive { .. })) {
            if let What::Arrive { node, process, call, what, lost_answer: false } = arrival {
                let answer = lost(&what);
                self.at(Duration::ZERO, What::Answer { node, process, call, answer });
            }
        }
        for node in 0..self.nodes.len() {
            self.disconnect(node);
        }
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
                .chain(self.queue.next_time())
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
            while let Some(what) = self.queue.take_due(self.now) {
                self.happen(what);
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
        match self.rng.random_range(0..16) {
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
                self.operator_puts("config", self.config);
            }
            11 => {
                let backup = self.etcd.clone();
                self.backups.push(backup);
            }
            12 if !self.backups.is_empty() => {
                let index = self.rng.random_range(0..self.backups.len());
                // Later ones are of a history that is over.
                self.backups.truncate(index + 1);
                let backup = self.backups[index].clone();
                self.restore(&backup);
            }
            13 if self.config == BY_KUBERNETES => {
                let (node, which) = (2 * self.rng.random_range(1..3), self.rng.random_range(0..2));
                self.sync_reserves(node, which);
                self.step(node, Input::Idle(BTreeSet::from([0, 1].map(|which| block(node, which)))));
            }
            14 => self.sync_frees(node),
            _ => self.disconnect(node),
        }
    }

    /// A block is reserved, if it is free.
    fn sync_reserves(&mut self, node: usize, which: usize) {
        let (key, id) = (Key::Subnet(block(node, which)).to_string(), self.nodes[node].id.clone());
        if self.owners.get(&key).is_none_or(|owner| owner.as_ref().is_none_or(|owner| *owner == id)) {
            let value = format!(r#"{{"Node": "{id}", "KubernetesNode": "west/node-{node}"}}"#);
            self.operator_puts(&key, &value);
        }
    }

    /// The subnets of a node without a sign of life are given up.
    fn sync_frees(&mut self, node: usize) {
        let alive = Key::Alive(self.nodes[node].id.clone()).to_string();
        for key in self.subnets_of(node).into_iter().map(str::to_owned).collect::<Vec<_>>() {
            if !self.reservations.contains(&key) && !self.etcd.keys.contains_key(&alive) {
                self.operator_puts(&key, r#"{"Freed": {"cluster": "west", "at": 1}}"#);
            }
        }
    }

    fn operator_deletes_all(&mut self) {
        let writes = self.etcd.keys.keys().filter(|key| !self.reservations.contains(*key));
        let writes = writes.map(|key| Write::Delete { key: key.clone() }).collect();
        self.etcd.transact(&Transaction { compares: vec![], writes }).unwrap();
        self.changed(true);
    }

    /// Whether etcd holds the record of the running process under a lease that it keeps alive.
    fn shows_life(&self, node: usize) -> bool {
        let id = &self.nodes[node].id;
        let Some(entry) = self.etcd.keys.get(&Key::Alive(id.clone()).to_string()) else { return false };
        let start = etcd_schema::Alive::parse(&entry.value).ok().map(|alive| alive.start_count);
        start == Some(self.nodes[node].process) && entry.lease.is_some_and(|lease| self.etcd.has_lease(lease))
    }

    fn subnets_of(&self, node: usize) -> Vec<&str> {
        self.owners
            .iter()
            .filter(|(_, owner)| owner.as_ref() == Some(&self.nodes[node].id))
            .map(|(key, _)| key.as_str())
            .collect()
    }
}

/// One of two podCIDRs of a node.
fn block(node: usize, which: usize) -> SubnetKey {
    format!("10.42.0.{}-28", 16 * (node + 5 * which)).parse().unwrap()
}

/// A node and a copy of it: the same id, another process.
fn with_copy(wait: Duration) -> Sim {
    with_copy_of(1, wait)
}

fn with_copy_of(seed: u64, wait: Duration) -> Sim {
    let mut sim = Sim::new(seed, 2);
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

fn joined(sim: &Sim, node: usize) -> bool {
    matches!(state_of(sim, node), MembershipState::Joined { .. })
}

fn cloned(sim: &Sim, node: usize) -> bool {
    matches!(state_of(sim, node), MembershipState::Cloned { .. })
}

fn has_problem(sim: &Sim, node: usize, code: ProblemCode) -> bool {
    sim.nodes[node].membership.as_ref().unwrap().problems("/meshd").iter().any(|problem| problem.code == code)
}

fn entry(key: &str, value: &str) -> Entry {
    Entry { key: key.into(), value: value.as_bytes().into(), create_revision: 3, mod_revision: 5, lease: None }
}

/// A node that was killed, restarted, and has been running for a second.
fn restarted() -> Sim {
    let mut sim = Sim::new(2, 1);
    sim.operator_puts("config", CONFIG);
    sim.start(0);
    sim.run(Duration::from_secs(100));
    sim.crash(0);
    sim.start(0);
    sim.run(sim.elapsed() + Duration::from_secs(1));
    assert!(joined(&sim, 0), "{:?}", state_of(&sim, 0));
    sim
}

const ALIVE: &str = "alive/n0";

/// A record of a process that started `start` times from the same state directory.
fn foreign(start: u64, incarnation: u64) -> String {
    format!(r#"{{"bootId": "x", "startCount": {start}, "incarnation": {incarnation}}}"#)
}

fn is_own(sim: &Sim) -> bool {
    let entry = &sim.etcd.keys[ALIVE];
    let alive = etcd_schema::Alive::parse(&entry.value).ok();
    entry.lease.is_some() && alive.is_some_and(|alive| alive.boot_id == "b")
}

/// How many seeds are tried.
fn histories(usually: u64) -> u64 {
    std::env::var("MESHD_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(usually)
}
