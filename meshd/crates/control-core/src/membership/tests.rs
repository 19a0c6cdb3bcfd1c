//! Seeded histories of several nodes on a model of etcd: crashes, partitions, pauses, lost and late calls, expiring
//! leases, and keys deleted by an operator. No clock, no threads: a failing seed is reproducible.

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

/// A backup is restored that is older than the last start of a node, and that many writes are missing from.
#[test]
fn a_node_that_started_since_the_backup_shows_life_in_a_restored_etcd() {
    for seed in 0..20 {
        let mut sim = Sim::new(seed, 2);
        sim.operator_puts("config", CONFIG);
        sim.start(0);
        sim.start(1);
        sim.run(Duration::from_secs(5));
        let backup = sim.etcd.clone();
        for _ in 0..50 {
            sim.operator_puts("config", CONFIG);
        }
        sim.crash(0);
        sim.start(0);
        sim.run(Duration::from_secs(10));
        sim.restore(&backup);
        sim.run(Duration::from_secs(15));
        for node in 0..2 {
            assert!(sim.shows_life(node), "seed {seed}: {node} is {:?}", state_of(&sim, node));
            assert!(joined(&sim, node), "seed {seed}: {node} is {:?}", state_of(&sim, node));
        }
    }
}

/// etcd loses the last writes that it answered, and comes back at the revision that the node has seen: it does not
/// count as another one.
#[test]
fn what_was_answered_and_is_lost_is_written_again() {
    let mut losses = 0;
    for seed in 0..4 {
        for millis in 0..500 {
            let mut sim = Sim::new(seed, 1);
            sim.operator_puts("config", CONFIG);
            sim.start(0);
            let mut states = BTreeMap::new();
            for _ in 0..millis {
                states.insert(sim.etcd.revision, sim.etcd.clone());
                sim.run(sim.elapsed() + Duration::from_millis(1));
            }
            let seen = sim.nodes[0].store.revision();
            let Some(state) = states.get(&seen).filter(|_| seen < sim.etcd.revision) else { continue };
            losses += 1;
            sim.go_back(state);
            sim.run(sim.elapsed() + Duration::from_secs(8));
            assert_eq!(sim.nodes[0].store.lineage_changes(), 0);
            assert!(sim.shows_life(0) && joined(&sim, 0), "seed {seed}, {millis} ms: {:?}", state_of(&sim, 0));
        }
    }
    assert!(losses > 0);
}

/// The transaction that takes a subnet, once it is under way; its key and lease.
fn take_under_way(sim: &Sim) -> Option<(Transaction, String, LeaseId)> {
    sim.queue.events().find_map(|event| {
        let What::Arrive { what: Call::Transact(transaction), .. } = event else { return None };
        transaction.writes.iter().find_map(|write| match write {
            Write::Put { key, lease: Some(lease), .. } if key.starts_with("subnets/") => {
                Some((transaction.clone(), key.clone(), *lease))
            }
            _ => None,
        })
    })
}

#[test]
fn in_an_etcd_that_went_back_unseen_no_subnet_is_overwritten() {
    let mut sim = Sim::new(5, 1);
    sim.operator_puts("config", CONFIG);
    let mut older = sim.etcd.clone();
    for _ in 0..5 {
        sim.operator_puts("peers/p", "{}");
    }
    sim.start(0);
    let (take, key, lease) = loop {
        sim.run(sim.elapsed() + Duration::from_millis(1));
        if let Some(found) = take_under_way(&sim) {
            break found;
        }
    };
    while !older.has_lease(lease) {
        older.grant(sim.now, ALIVE_TTL);
    }
    let theirs = Write::Put { key, value: r#"{"Node": "other"}"#.into(), lease: None };
    older.transact(&Transaction { compares: vec![], writes: vec![theirs] }).unwrap();
    let before = older.keys.clone();
    assert!(!older.transact(&take).unwrap().succeeded);
    assert_eq!(older.keys, before);
}

/// One of two podCIDRs of a node.
fn block(node: usize, which: usize) -> SubnetKey {
    format!("10.42.0.{}-28", 16 * (node + 5 * which)).parse().unwrap()
}

fn history(seed: u64) {
    let mut sim = Sim::new(seed, 5);
    let clusters = seed % 2 == 1;
    if clusters {
        sim.config = if seed % 4 == 1 { CLUSTERS } else { BY_KUBERNETES };
        sim.nodes[2].facts.cluster = "west".parse().unwrap();
        sim.nodes[4].facts.cluster = "west".parse().unwrap();
    }
    sim.operator_puts("config", sim.config);
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
    if sim.config == BY_KUBERNETES {
        sim.run(sim.elapsed() + Duration::from_secs(20));
        for node in [2, 4] {
            let drawn = sim.subnets_of(node).into_iter().find(|key| {
                let subnet: SubnetKey = key.strip_prefix("subnets/").unwrap().parse().unwrap();
                ![0, 1].map(|which| block(node, which)).contains(&subnet)
            });
            assert_eq!(drawn, None, "seed {seed}");
            sim.sync_reserves(node, 0);
            sim.step(node, Input::Idle(BTreeSet::from([0, 1].map(|which| block(node, which)))));
        }
    }
    sim.run(sim.elapsed() + Duration::from_secs(90));
    for node in 0..sim.nodes.len() {
        let n = &sim.nodes[node];
        let state = n.membership.as_ref().unwrap().state();
        let MembershipState::Joined { subnet } = state else {
            panic!("seed {seed}: {} is {state:?}", n.id);
        };
        let key = Key::Subnet(*subnet).to_string();
        let config = std::sync::Arc::clone(&n.store.records().config.as_ref().unwrap().value);
        assert_eq!(config.cluster_around(subnet), Some(&n.facts.cluster), "seed {seed}: {} has {key}", n.id);
        assert_eq!(sim.subnets_of(node), [key.as_str()], "seed {seed}: {} at {:?}", n.id, n.store.revision());
        let record = n.store.get(&Key::Node(n.id.clone()).to_string()).and_then(|kept| kept.get::<NodeRecord>());
        assert_eq!(record.unwrap().version, n.facts.version, "seed {seed}");
        assert!(sim.shows_life(node), "seed {seed}: {} counts as off", n.id);
    }
    for key in &sim.reservations {
        assert!(sim.etcd.keys[key].lease.is_none(), "seed {seed}: {key} has a lease");
    }
}

/// How many seeds are tried.
fn histories(usually: u64) -> u64 {
    std::env::var("MESHD_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(usually)
}

#[test]
fn no_history_gives_a_subnet_two_owners_and_all_come_to_rest() {
    for seed in 0..histories(300) {
        history(seed);
    }
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

#[test]
fn a_copy_of_a_node_yields_and_changes_nothing() {
    let mut sim = with_copy(Duration::from_secs(100));
    let before = sim.etcd.keys["nodes/n0"].clone();
    sim.run(Duration::from_secs(300));
    assert!(cloned(&sim, 1) && has_problem(&sim, 1, ProblemCode::Cloned), "{:?}", state_of(&sim, 1));
    assert!(joined(&sim, 0), "{:?}", state_of(&sim, 0));
    assert_eq!(sim.etcd.keys["nodes/n0"], before);
    assert!(!sim.nodes[1].acted, "it never acts as the node");
}

/// What a process may do before it has written anything: with what it finds under `alive/ID`, and the process that ran
/// here before it.
#[test]
fn a_restart_acts_as_the_node_at_once_and_a_possible_copy_waits_for_etcd() {
    let start = Instant::now();
    let listing = |found: Option<u64>| KeyListing {
        entries: found.into_iter().map(|incarnation| entry(ALIVE, &foreign(1, incarnation))).collect(),
        revision: 7,
        ..KeyListing::default()
    };
    for (predecessor, found, at_once) in [
        (Some(7), Some(7), true),
        (Some(7), None, true),
        (Some(7), Some(8), false),
        (None, Some(7), false),
        (None, None, false),
    ] {
        let identity =
            Identity { id: "n0".parse().unwrap(), boot_id: "b".into(), start_count: 2, incarnation: 1, predecessor };
        for reads_etcd in [true, false] {
            let mut membership = Membership::new(start, identity.clone(), facts(0), None, false, 1);
            let mut store = Store::default();
            let mut input = Input::Tick;
            if reads_etcd {
                store.on_list(start, listing(found));
                input = Input::Connected;
            }
            membership.step(start, input, &store);
            let case = (predecessor, found, reads_etcd);
            assert_eq!(membership.holds_identity(), at_once && reads_etcd, "{case:?}");
            assert!(!membership.may_write(start), "{case:?}");
            // Without a word from etcd it goes on all the same: sooner where only a restart is likely, and etcd names
            // no other.
            let names_another = reads_etcd && found.is_some_and(|found| Some(found) != predecessor);
            let limit = if predecessor.is_some() && !names_another { RESUMED } else { UNCONFIRMED };
            if !membership.holds_identity() {
                assert!(reads_etcd || membership.next_deadline() == Some(start + limit), "{case:?}");
                membership.step(start + limit - Duration::from_millis(1), Input::Tick, &store);
                assert!(!membership.holds_identity(), "{case:?}");
                membership.step(start + limit, Input::Tick, &store);
                assert!(membership.holds_identity(), "{case:?}");
            }
        }
    }
}

fn entry(key: &str, value: &str) -> Entry {
    Entry { key: key.into(), value: value.as_bytes().into(), create_revision: 3, mod_revision: 5, lease: None }
}

#[test]
fn of_two_copies_that_start_together_one_stays() {
    for millis in [0, 1, 5, 50, 200, 999, 1001] {
        let mut sim = with_copy(Duration::from_millis(millis));
        sim.run(Duration::from_secs(300));
        let yielded = [0, 1].map(|node| cloned(&sim, node));
        assert_ne!(yielded[0], yielded[1], "{millis}: {:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
        let stays = usize::from(yielded[0]);
        assert!(joined(&sim, stays), "{millis}: {:?}", state_of(&sim, stays));
    }
}

#[test]
fn a_copy_resumes_once_the_other_is_gone_and_not_while_that_restarts() {
    let mut sim = with_copy(Duration::from_secs(100));
    sim.run(Duration::from_secs(150));
    // An upgrade of the original is over long before its record expires.
    sim.crash(0);
    sim.run(Duration::from_secs(160));
    sim.start(0);
    sim.run(Duration::from_secs(300));
    assert!(joined(&sim, 0) && cloned(&sim, 1), "{:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
    sim.crash(0);
    sim.run(Duration::from_secs(340));
    assert!(joined(&sim, 1), "{:?}", state_of(&sim, 1));
    // The one that comes back started later now.
    sim.start(0);
    sim.run(Duration::from_secs(400));
    assert!(cloned(&sim, 0) && joined(&sim, 1), "{:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
}

#[test]
fn a_copy_that_took_the_place_of_a_node_that_was_away_yields_when_that_comes_back() {
    let mut sim = with_copy(Duration::from_secs(100));
    // Before the copy is heard of, the first is cut off for long.
    sim.nodes[0].reachable = false;
    sim.disconnect(0);
    sim.run(Duration::from_secs(200));
    assert!(joined(&sim, 1), "{:?}", state_of(&sim, 1));
    sim.nodes[0].reachable = true;
    sim.run(Duration::from_secs(300));
    assert!(joined(&sim, 0), "{:?}", state_of(&sim, 0));
    assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
}

#[test]
fn in_an_etcd_that_was_replaced_a_copy_leaves_the_first_word_to_the_original() {
    for original_comes in [true, false] {
        let mut sim = with_copy(Duration::from_secs(100));
        sim.run(Duration::from_secs(200));
        assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
        // The copy reaches the new one first.
        sim.nodes[0].reachable = false;
        sim.restore(&EtcdModel::new());
        sim.operator_puts("config", CONFIG);
        sim.run(sim.elapsed() + ALIVE_TTL - Duration::from_secs(5));
        assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
        sim.nodes[0].reachable = original_comes;
        sim.run(sim.elapsed() + Duration::from_secs(20));
        assert_eq!([joined(&sim, 0), cloned(&sim, 1)], [true, original_comes], "{:?}", state_of(&sim, 1));
        let alive = etcd_schema::Alive::parse(&sim.etcd.keys[ALIVE].value).unwrap();
        assert_eq!(alive.incarnation, sim.nodes[usize::from(!original_comes)].incarnation);
    }
}

/// Not by what it was before it yielded, and however long it has heard nothing.
#[test]
fn a_clone_acts_as_the_node_again_once_its_own_record_stands() {
    let mut sim = restarted();
    for _ in 0..2 {
        sim.operator_puts(ALIVE, &foreign(1, 7));
        sim.run(sim.elapsed() + UNCONFIRMED * 2);
    }
    assert!(cloned(&sim, 0));
    sim.operator_deletes(ALIVE);
    let holds = |sim: &Sim| sim.nodes[0].membership.as_ref().unwrap().holds_identity();
    while !sim.etcd.keys.contains_key(ALIVE) {
        assert!(!holds(&sim), "{:?}", state_of(&sim, 0));
        sim.run(sim.elapsed() + Duration::from_millis(1));
    }
    sim.run(sim.elapsed() + Duration::from_millis(100));
    assert!(holds(&sim) && is_own(&sim));
}

/// The record of the original may go while its process runs: by an operator's hand, or because that has lost etcd.
#[test]
fn a_clone_that_loses_etcd_before_its_own_record_stands_does_not_act() {
    let (mut stood, mut closed) = (0, 0);
    for seed in 0..histories(200) {
        let mut sim = with_copy_of(seed, Duration::from_secs(100));
        sim.run(Duration::from_secs(150));
        assert!(cloned(&sim, 1), "seed {seed}: {:?}", state_of(&sim, 1));
        let holds = |sim: &Sim| sim.nodes[1].membership.as_ref().unwrap().holds_identity();
        sim.nodes[0].reachable = false;
        sim.disconnect(0);
        sim.operator_deletes(ALIVE);
        let until = sim.millis(0..1_000);
        sim.run(sim.elapsed() + until);
        sim.nodes[1].reachable = false;
        sim.disconnect(1);
        sim.run(sim.elapsed() + UNCONFIRMED * 5);
        let is_there = sim.etcd.keys.contains_key(ALIVE);
        assert!(is_there || !holds(&sim), "seed {seed}: {:?}", state_of(&sim, 1));
        stood += usize::from(is_there);
        closed += usize::from(!is_there && !cloned(&sim, 1));
        sim.nodes[1].reachable = true;
        sim.run(sim.elapsed() + ALIVE_TTL * 2);
        assert!(holds(&sim) && joined(&sim, 1), "seed {seed}: {:?}", state_of(&sim, 1));
    }
    assert!(stood > 0 && closed > 0, "{stood} {closed}");
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

#[test]
fn readiness_is_published_as_it_changes() {
    let mut sim = restarted();
    for readiness in [
        Some(Readiness::Ready),
        Some(Readiness::NotReady { reason: "policy: late".to_owned() }),
        Some(Readiness::Ready),
    ] {
        sim.nodes[0].facts.readiness.clone_from(&readiness);
        let facts = sim.nodes[0].facts.clone();
        sim.step(0, Input::Facts(Box::new(facts)));
        sim.run(sim.elapsed() + Duration::from_secs(1));
        let alive = etcd_schema::Alive::parse(&sim.etcd.keys[ALIVE].value).unwrap();
        assert_eq!((alive.readiness, &alive.reads[..]), (readiness, &["k8s".to_owned()][..]));
        assert!(joined(&sim, 0) && is_own(&sim) && !has_problem(&sim, 0, ProblemCode::AliveOverwritten));
    }
    // Once: what is there already is not written again.
    let written = sim.etcd.keys[ALIVE].mod_revision;
    sim.run(sim.elapsed() + Duration::from_secs(100));
    assert_eq!(sim.etcd.keys[ALIVE].mod_revision, written);
}

/// What a process wrote just before its end may arrive when the next one has listed already.
#[test]
fn a_late_write_of_the_process_before_is_no_clone() {
    let start = Instant::now();
    for (found, is_clone) in [(7, false), (8, true)] {
        let identity = Identity {
            id: "n0".parse().unwrap(),
            boot_id: "b".into(),
            start_count: 2,
            incarnation: 1,
            predecessor: Some(7),
        };
        let mut membership = Membership::new(start, identity, facts(0), None, false, 1);
        let mut store = Store::default();
        let listing =
            KeyListing { entries: vec![entry(ALIVE, &foreign(1, found))], revision: 7, ..KeyListing::default() };
        store.on_list(start, listing);
        membership.step(start, Input::Connected, &store);
        let late = Entry { mod_revision: 8, ..entry(ALIVE, &foreign(1, found)) };
        store.changed(start, vec![WatchEvent::Put(late)]);
        membership.step(start, Input::Store, &store);
        assert_eq!(matches!(membership.state(), MembershipState::Cloned { .. }), is_clone, "{found}");
    }
}

#[test]
fn one_foreign_write_soon_after_a_restart_is_put_back_and_reported() {
    for value in [foreign(1, 7), foreign(9, 7), "nonsense".to_owned(), String::new()] {
        let mut sim = restarted();
        sim.operator_puts(ALIVE, &value);
        sim.run(sim.elapsed() + Duration::from_secs(5));
        assert!(joined(&sim, 0) && is_own(&sim), "{value}: {:?}", state_of(&sim, 0));
        assert!(has_problem(&sim, 0, ProblemCode::AliveOverwritten), "{value}");
        sim.run(sim.elapsed() + ALIVE_TTL);
        assert!(!has_problem(&sim, 0, ProblemCode::AliveOverwritten), "{value}: over after a while");
    }
}

#[test]
fn a_deleted_record_and_a_copy_of_it_without_lease_are_put_back() {
    let mut sim = restarted();
    sim.operator_deletes(ALIVE);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim));
    let value = String::from_utf8(sim.etcd.keys[ALIVE].value.to_vec()).unwrap();
    sim.operator_puts(ALIVE, &value);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim), "it has its lease again");
}

#[test]
fn foreign_writes_of_different_incarnations_prove_no_clone() {
    let mut sim = restarted();
    for incarnation in 0..20 {
        sim.operator_puts(ALIVE, &foreign(1, incarnation));
        sim.run(sim.elapsed() + Duration::from_secs(2));
        assert!(joined(&sim, 0), "{incarnation}: {:?}", state_of(&sim, 0));
    }
    sim.run(sim.elapsed() + Duration::from_secs(10));
    assert!(is_own(&sim));
}

#[test]
fn a_second_write_of_one_incarnation_decides_by_the_records_and_is_forgotten_after_a_while() {
    for (start, gap, yields) in [(1, 10, true), (9, 10, false), (1, 40, false)] {
        let mut sim = restarted();
        for _ in 0..2 {
            sim.operator_puts(ALIVE, &foreign(start, 7));
            sim.run(sim.elapsed() + Duration::from_secs(gap));
        }
        assert_eq!(cloned(&sim, 0), yields, "start {start}, {gap} s: {:?}", state_of(&sim, 0));
        assert_eq!(joined(&sim, 0), !yields, "start {start}, {gap} s: {:?}", state_of(&sim, 0));
        // No daemon is behind it: a daemon's record has a lease.
        sim.run(sim.elapsed() + ALIVE_TTL * 2);
        assert!(joined(&sim, 0) && is_own(&sim), "start {start}, {gap} s: {:?}", state_of(&sim, 0));
    }
}

#[test]
fn a_clone_waits_without_a_call_until_the_record_is_deleted() {
    let mut sim = restarted();
    for _ in 0..2 {
        sim.operator_puts(ALIVE, &foreign(1, 7));
        sim.run(sim.elapsed() + Duration::from_secs(5));
    }
    assert!(cloned(&sim, 0));
    sim.operator_deletes(ALIVE);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim), "{:?}", state_of(&sim, 0));
}

/// The shell asks for the deadline some time after a step.
#[test]
fn what_falls_due_after_a_step_stays_due_until_the_next_one() {
    let mut sim = restarted();
    let Node { membership: Some(membership), store, .. } = &mut sim.nodes[0] else { panic!("it runs") };
    let due = membership.next_deadline().unwrap();
    assert_eq!(membership.step(due - Duration::from_millis(1), Input::Store, store), []);
    assert_eq!(membership.next_deadline(), Some(due));
    let effects = membership.step(due, Input::Tick, store);
    assert!(matches!(effects[..], [Effect::Call(_, Call::KeepAlive { .. })]), "{effects:?}");
    assert!(membership.next_deadline() > Some(due));
}

/// A node and two copies of it that crash, restart and lose their connection, while etcd is replaced now and then: once
/// all is quiet, one of them goes on.
#[test]
fn of_clones_exactly_one_goes_on_whatever_happened() {
    for seed in 0..histories(200) {
        let mut sim = Sim::new(seed, 3);
        sim.operator_puts("config", CONFIG);
        for node in 1..3 {
            sim.nodes[node].id = sim.nodes[0].id.clone();
            sim.nodes[node].facts = sim.nodes[0].facts.clone();
        }
        for node in 0..3 {
            let delay = sim.millis(0..40_000);
            sim.at(delay, What::Start { node });
        }
        sim.faults = true;
        for _ in 0..20 {
            let gap = sim.millis(10..15_000);
            sim.run(sim.elapsed() + gap);
            let node = sim.rng.random_range(0..3);
            match sim.rng.random_range(0..7) {
                0 | 1 => {
                    sim.crash(node);
                    let away = sim.millis(1..50_000);
                    sim.at(away, What::Start { node });
                }
                2 => {
                    sim.restore(&EtcdModel::new());
                    sim.operator_puts("config", CONFIG);
                }
                3 | 4 => {
                    sim.nodes[node].reachable = !sim.nodes[node].reachable;
                    sim.disconnect(node);
                }
                _ => sim.operator_puts(ALIVE, &foreign(seed % 4, seed)),
            }
        }
        sim.faults = false;
        for node in 0..3 {
            sim.nodes[node].reachable = true;
            sim.at(Duration::ZERO, What::Start { node });
        }
        sim.run(sim.elapsed() + Duration::from_secs(200));
        let states: Vec<_> = (0..3).map(|node| state_of(&sim, node)).collect();
        let going_on = (0..3).filter(|node| joined(&sim, *node)).count();
        let waiting = (0..3).filter(|node| cloned(&sim, *node)).count();
        assert_eq!((going_on, waiting), (1, 2), "seed {seed}: {states:?}");
    }
}

/// Two nodes may have one address, behind NATs of two sites.
#[test]
fn a_reservation_by_address_is_for_nodes_of_that_networks_cluster() {
    let mut sim = Sim::new(3, 2);
    sim.operator_puts("config", CLUSTERS);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.nodes[1].facts.public_ipv4 = sim.nodes[0].facts.public_ipv4;
    sim.operator_puts("subnets/10.0.0.48-28", r#"{"PublicIP": "192.0.2.1"}"#);
    sim.start(1);
    sim.run(Duration::from_secs(20));
    let MembershipState::Joined { subnet } = state_of(&sim, 1) else { panic!("{:?}", state_of(&sim, 1)) };
    assert!(Key::Subnet(*subnet).to_string().starts_with("subnets/10.42.0."), "{subnet:?}");
}

#[test]
fn each_node_draws_from_the_networks_of_its_cluster_and_waits_for_them() {
    let mut sim = Sim::new(7, 3);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.nodes[2].facts.cluster = "north".parse().unwrap();
    sim.operator_puts("config", CONFIG);
    (0..3).for_each(|node| sim.start(node));
    sim.run(Duration::from_secs(5));
    assert!(joined(&sim, 0));
    let cluster = "west".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::NoNetwork { cluster });
    assert!(has_problem(&sim, 1, ProblemCode::NoNetwork));

    sim.operator_puts("config", CLUSTERS);
    sim.run(Duration::from_secs(10));
    let network = "10.42.0.0/24".parse::<ipnet::Ipv4Net>().unwrap();
    let MembershipState::Joined { subnet } = state_of(&sim, 1) else { panic!("{:?}", state_of(&sim, 1)) };
    assert!(subnet.v6.is_none() && network.contains(&subnet.v4.unwrap()), "{subnet:?}");
    assert!(has_problem(&sim, 2, ProblemCode::NoNetwork));
    // A node that changes its cluster moves once nothing is attached.
    sim.nodes[0].attached = true;
    let before = sim.nodes[0].cached.unwrap();
    sim.step(0, Input::Attached(true));
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    let facts = Box::new(sim.nodes[0].facts.clone());
    sim.step(0, Input::Facts(facts));
    sim.run(Duration::from_secs(20));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: before });
    assert!(has_problem(&sim, 0, ProblemCode::SubnetOutdated));
}

/// As sync reserves it for the node with this number.
fn reserve(sim: &mut Sim, block: &str, number: usize) {
    let value = format!(r#"{{"Node": "n{number}", "KubernetesNode": "west/node-{number}"}}"#);
    sim.operator_puts(&format!("subnets/{block}"), &value);
}

#[test]
fn a_node_waits_for_its_block_and_never_draws() {
    let mut sim = Sim::new(11, 2);
    sim.nodes[1].facts.cluster = "west".parse().unwrap();
    sim.operator_puts("config", BY_KUBERNETES);
    (0..2).for_each(|node| sim.start(node));
    sim.run(Duration::from_secs(60));
    assert!(joined(&sim, 0), "a node of no cluster draws");
    let cluster = "west".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::AwaitingBlock { cluster });
    assert!(has_problem(&sim, 1, ProblemCode::AwaitingBlock));
    assert!(sim.subnets_of(1).is_empty());
    assert!(sim.etcd.keys.contains_key("nodes/n1"), "sync finds it by its record");
    // Another node's block, and one of another cluster's sync, are not this node's.
    reserve(&mut sim, "10.42.0.32-28", 0);
    sim.operator_puts("subnets/10.0.0.64-28", r#"{"KubernetesNode": "west/node-1"}"#);
    sim.run(Duration::from_secs(70));
    assert!(!joined(&sim, 1));
    // Of any length.
    reserve(&mut sim, "10.42.0.128-26", 1);
    sim.run(Duration::from_secs(80));
    let subnet = "10.42.0.128-26".parse().unwrap();
    assert_eq!(*state_of(&sim, 1), MembershipState::Joined { subnet });
    assert!(!has_problem(&sim, 1, ProblemCode::SubnetOutdated));
    let entry = &sim.etcd.keys["subnets/10.42.0.128-26"];
    assert!(entry.lease.is_none() && String::from_utf8_lossy(&entry.value).contains("west/node-1"), "{entry:?}");
}

/// The key of a block that the Node gets again is as old as it was.
#[test]
fn a_block_that_is_reserved_again_is_the_newest() {
    let mut sim = Sim::new(13, 1);
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    sim.nodes[0].attached = true;
    sim.operator_puts("config", BY_KUBERNETES);
    sim.start(0);
    for block in ["10.42.0.32-28", "10.42.0.64-28", "10.42.0.32-28"] {
        reserve(&mut sim, block, 0);
        sim.run(sim.elapsed() + Duration::from_secs(10));
        assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: block.parse().unwrap() });
    }
}

#[test]
fn a_changed_block_is_used_at_once_and_the_old_one_goes_with_its_last_attachment() {
    let mut sim = Sim::new(12, 1);
    sim.nodes[0].facts.cluster = "west".parse().unwrap();
    sim.nodes[0].attached = true;
    // It drew one before Kubernetes was to say.
    sim.operator_puts("config", CLUSTERS);
    sim.start(0);
    sim.run(Duration::from_secs(10));
    let drawn = Key::Subnet(sim.nodes[0].cached.unwrap()).to_string();
    sim.operator_puts("config", BY_KUBERNETES);
    sim.run(Duration::from_secs(20));
    assert!(joined(&sim, 0) && has_problem(&sim, 0, ProblemCode::SubnetOutdated), "it lives on what it has");
    let mut before = drawn;
    let mut free = (1..16).map(|n| format!("10.42.0.{}-28", n * 16)).filter(|block| !before.ends_with(&**block));
    for block in [free.next().unwrap(), free.next().unwrap()] {
        reserve(&mut sim, &block, 0);
        sim.run(sim.elapsed() + Duration::from_secs(10));
        let subnet: SubnetKey = block.parse().unwrap();
        assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet });
        assert!(sim.etcd.keys.contains_key(&before), "pods have addresses of {before}");
        let idle = BTreeSet::from([before.strip_prefix("subnets/").unwrap().parse().unwrap()]);
        sim.step(0, Input::Idle(idle));
        sim.run(sim.elapsed() + Duration::from_secs(10));
        assert!(!sim.etcd.keys.contains_key(&before), "{before} is without attachments");
        assert_eq!(sim.subnets_of(0), [format!("subnets/{block}")]);
        sim.step(0, Input::Idle(BTreeSet::new()));
        before = format!("subnets/{block}");
    }
}

/// Each node's podCIDR is what the other one drew before: a node without pods gives way.
#[test]
fn drawn_subnets_give_way_to_podcidrs_that_are_the_others() {
    let mut sim = Sim::new(14, 2);
    sim.operator_puts("config", CLUSTERS);
    for node in 0..2 {
        sim.nodes[node].facts.cluster = "west".parse().unwrap();
        sim.start(node);
    }
    sim.run(Duration::from_secs(20));
    let drawn: Vec<String> = (0..2).map(|node| Key::Subnet(sim.nodes[node].cached.unwrap()).to_string()).collect();
    sim.nodes[0].attached = true;
    sim.step(0, Input::Attached(true));
    sim.operator_puts("config", BY_KUBERNETES);
    sim.run(Duration::from_secs(30));
    assert_eq!(sim.subnets_of(0), [&*drawn[0]], "pods have addresses of it");
    assert!(joined(&sim, 0) && !joined(&sim, 1));
    let idle = |key: &str| Input::Idle(BTreeSet::from([key.strip_prefix("subnets/").unwrap().parse().unwrap()]));
    sim.step(1, idle(&drawn[1]));
    sim.run(Duration::from_secs(40));
    assert!(sim.subnets_of(1).is_empty() && !sim.etcd.keys.contains_key(&drawn[1]));
    // The podCIDR of node 0 is free now; its drawn one goes with its last pod.
    reserve(&mut sim, drawn[1].strip_prefix("subnets/").unwrap(), 0);
    sim.run(Duration::from_secs(50));
    sim.step(0, idle(&drawn[0]));
    sim.run(Duration::from_secs(60));
    assert_eq!(sim.subnets_of(0), [&*drawn[1]]);
    reserve(&mut sim, drawn[0].strip_prefix("subnets/").unwrap(), 1);
    sim.run(Duration::from_secs(70));
    assert!((0..2).all(|node| joined(&sim, node)));
    assert_eq!(sim.subnets_of(1), [&*drawn[0]]);
}

#[test]
fn what_a_node_gave_up_is_drawn_last_and_goes_back_to_it_if_it_returns() {
    let mut sim = Sim::new(13, 3);
    sim.operator_puts("config", r#"{"Network": "10.0.0.0/24", "SubnetLen": 28}"#);
    for n in 4..16 {
        sim.operator_puts(&format!("subnets/10.0.0.{}-28", n * 16), "{}");
    }
    let freed = r#"{"Freed": {"cluster": "west", "at": 1}}"#;
    sim.operator_puts("subnets/10.0.0.16-28", freed);
    sim.operator_puts("subnets/10.0.0.32-29", freed);
    sim.start(0);
    sim.run(Duration::from_secs(10));
    assert_eq!(sim.subnets_of(0), ["subnets/10.0.0.48-28"], "the only one that is free");
    sim.start(1);
    sim.run(Duration::from_secs(20));
    sim.start(2);
    sim.run(Duration::from_secs(30));
    let mut owned = [sim.subnets_of(1), sim.subnets_of(2)].concat();
    owned.sort_unstable();
    assert_eq!(owned, ["subnets/10.0.0.16-28", "subnets/10.0.0.32-28"]);
    assert!(!sim.etcd.keys.contains_key("subnets/10.0.0.32-29"));
    // Its block was given up while it was cut off, and nothing has it: it is its own again.
    let own = sim.nodes[0].cached.unwrap();
    sim.operator_puts("subnets/10.0.0.48-28", freed);
    sim.run(Duration::from_secs(50));
    assert_eq!(*state_of(&sim, 0), MembershipState::Joined { subnet: own });
    assert_eq!(sim.subnets_of(0), ["subnets/10.0.0.48-28"]);
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
            assert_eq!(sim.nodes[node].store.records().nodes.len(), usize::from(nodes));
        }
        assert!(!sim.etcd.keys.contains_key("config"), "that one is the operator's");
    }
}
