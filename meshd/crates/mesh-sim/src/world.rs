//! The mesh, its etcd, its networks, and the order in which things happen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use control_core::{
    core::{Effect, Input, SessionNumber},
    event_queue::EventQueue,
    membership::{Call, CallAnswer, CallId},
    model::EtcdModel,
    types::{CallError, KeyListing, Transaction, WatchEvent, Write},
};
use mesh::{
    path::{MacAddress, PathId},
    records::Revision,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::{history::EtcdHistory, machine::Machine, process::Process};

/// The configuration of the mesh.
pub(crate) const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "SubnetLen": 24, "LeaseTTL": 40}"#;

/// How long a call waits for its answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// A simulated mesh.
pub struct MeshSim {
    pub(crate) seed: u64,
    pub(crate) rng: StdRng,
    pub(crate) now: Instant,
    pub(crate) begin: Instant,
    pub(crate) etcd: EtcdModel,
    pub(crate) machines: Vec<Machine>,
    pub(crate) processes: Vec<Option<Process>>,
    /// When each process wants to be stepped.
    wakes: Vec<Option<Instant>>,
    queue: EventQueue<What>,
    /// Calls may be lost or late.
    pub(crate) faults: bool,
    /// What etcd may be restored from.
    pub(crate) backups: Vec<EtcdModel>,
    pub(crate) history: EtcdHistory,
    /// Steps so far.
    pub steps: u64,
}

#[derive(Debug)]
pub(crate) enum What {
    Start { node: usize },
    Connect { node: usize, process: u64 },
    Arrive { node: usize, process: u64, call: PendingCall, lost_answer: bool },
    Take { node: usize, process: u64, input: Box<Input> },
    Deliver { node: usize, process: u64, session: SessionNumber, upto: Revision },
    Audit { node: usize, process: u64, session: SessionNumber },
    Audited { node: usize, process: u64, session: SessionNumber, listing: KeyListing, since: Revision },
    Echo { node: usize, process: u64, path: PathId, nonce: u128, mac: MacAddress },
}

/// A call on a session.
#[derive(Debug)]
pub(crate) struct PendingCall {
    id: CallId,
    call: Call,
    session: SessionNumber,
}

impl MeshSim {
    /// A mesh of so many nodes, all of them off, on up to eight underlay networks.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "a simulation begins at any instant")]
    pub fn new(seed: u64, nodes: u8) -> Self {
        let begin = Instant::now();
        let machines: Vec<Machine> = (0..nodes).map(|number| Machine::new(number, number % 8)).collect();
        let mut world = Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            now: begin,
            begin,
            etcd: EtcdModel::new(),
            processes: machines.iter().map(|_| None).collect(),
            wakes: vec![None; machines.len()],
            machines,
            queue: EventQueue::default(),
            faults: false,
            backups: Vec::new(),
            history: EtcdHistory::default(),
            steps: 0,
        };
        world.operator_puts("config", CONFIG);
        world
    }

    pub(crate) fn at(&mut self, after: Duration, what: What) {
        self.queue.put(self.now + after, what);
    }

    pub(crate) fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }

    /// The wall clock of a machine.
    pub(crate) fn wall(&self, node: usize) -> Duration {
        self.machines[node].clock + (self.now - self.begin)
    }

    pub(crate) fn operator(&mut self, writes: Vec<Write>) {
        self.etcd.transact(&Transaction { compares: vec![], writes }).unwrap();
        self.etcd_changed(true);
    }

    pub(crate) fn operator_puts(&mut self, key: &str, value: &str) {
        self.operator(vec![Write::Put { key: key.into(), value: value.into(), lease: None }]);
    }

    /// Lets this much time pass.
    pub(crate) fn pass_time(&mut self, time: Duration) {
        let end = self.now + time;
        for turn in 0.. {
            assert!(turn < 5_000_000, "seed {}: never comes to rest", self.seed);
            let wakes = self.wakes.iter().flatten().copied();
            let next = wakes.chain(self.queue.next_time()).chain(self.etcd.next_expiry()).chain([end]);
            self.now = self.now.max(next.min().unwrap());
            if self.now >= end {
                return;
            }
            self.etcd.expire(self.now);
            self.etcd_changed(false);
            while let Some(what) = self.queue.take_due(self.now) {
                self.happen(what);
            }
            for node in 0..self.machines.len() {
                if self.wakes[node].is_some_and(|at| at <= self.now) {
                    self.wake(node);
                }
            }
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Start { node } => self.start(node),
            What::Connect { node, process } if self.runs(node, process) => self.connect(node),
            What::Arrive { node, process, call, lost_answer } => self.arrive(node, process, call, lost_answer),
            What::Take { node, process, input } if self.runs(node, process) => self.take(node, *input),
            What::Deliver { node, process, session, upto } if self.runs(node, process) => {
                self.deliver(node, session, upto);
            }
            What::Audit { node, process, session } if self.stands(node, process, session) => {
                let since = self.processes[node].as_ref().unwrap().delivered;
                let listing = self.etcd.list();
                self.at(DEADLINE, What::Audited { node, process, session, listing, since });
            }
            What::Audited { node, process, session, listing, since } if self.stands(node, process, session) => {
                let running = self.processes[node].as_mut().unwrap();
                running.audit_under_way = false;
                let deleted = self.etcd.events(since, running.delivered).into_iter().filter_map(|event| match event {
                    WatchEvent::Delete { key, .. } => Some(key),
                    WatchEvent::Put(_) => None,
                });
                let deleted_since: BTreeSet<String> = deleted.collect();
                self.take(node, Input::Audited { listing, deleted_since });
            }
            What::Echo { node, process, path, nonce, mac } if self.runs(node, process) => {
                let now = self.now;
                let running = self.processes[node].as_mut().unwrap();
                if running.agents.on_echo(now, &path, nonce, Some(mac)) {
                    running.echoed.insert(path);
                }
                self.pass_if_changed(node);
            }
            _ => {}
        }
    }

    fn runs(&self, node: usize, process: u64) -> bool {
        self.processes[node].as_ref().is_some_and(|running| running.number == process)
    }

    fn stands(&self, node: usize, process: u64, session: SessionNumber) -> bool {
        self.runs(node, process) && self.processes[node].as_ref().unwrap().session == Some(session)
    }

    /// Starts the daemon, if it is off.
    pub(crate) fn start(&mut self, node: usize) {
        if self.processes[node].is_some() {
            return;
        }
        let wall = self.wall(node);
        let process = Process::start(self.now, wall, &mut self.machines[node], &mut self.rng);
        let number = process.number;
        self.processes[node] = Some(process);
        self.take(node, Input::Started);
        let delay = self.millis(1..200);
        self.at(delay, What::Connect { node, process: number });
    }

    pub(crate) fn crash(&mut self, node: usize) {
        self.processes[node] = None;
        self.wakes[node] = None;
    }

    fn connect(&mut self, node: usize) {
        let running = self.processes[node].as_mut().unwrap();
        if running.session.is_some() {
            return;
        }
        let number = running.number;
        if !self.machines[node].etcd_reachable {
            let (member, error) = ("http://e1:2379".to_owned(), "connection refused".into());
            self.take(node, Input::Disconnected { member, error });
            let delay = self.millis(100..5000);
            self.at(delay, What::Connect { node, process: number });
            return;
        }
        running.sessions += 1;
        running.session = Some(running.sessions);
        running.delivered = self.etcd.revision;
        running.deliver_after = self.now;
        running.audit_under_way = false;
        let (session, listing) = (running.sessions, self.etcd.list());
        self.take(node, Input::Connected { member: "http://e1:2379".into(), session });
        if self.stands(node, number, session) {
            self.take(node, Input::Listed(listing));
        }
    }

    pub(crate) fn disconnect(&mut self, node: usize) {
        let Some(running) = &mut self.processes[node] else { return };
        if running.session.take().is_none() {
            return;
        }
        let process = running.number;
        self.take(node, Input::Disconnected { member: "http://e1:2379".into(), error: "no answer within 5s".into() });
        let delay = self.millis(1..500);
        self.at(delay, What::Connect { node, process });
    }

    fn deliver(&mut self, node: usize, session: SessionNumber, upto: Revision) {
        let running = self.processes[node].as_mut().unwrap();
        if running.session != Some(session) {
            return;
        }
        let events = self.etcd.events(running.delivered, upto);
        running.delivered = running.delivered.max(upto);
        if !events.is_empty() {
            self.take(node, Input::Changed(events));
        }
    }

    fn arrive(&mut self, node: usize, process: u64, asked: PendingCall, lost_answer: bool) {
        let PendingCall { id, call, session } = asked;
        let answer = match call {
            Call::Grant { ttl } => CallAnswer::Granted(Ok(self.etcd.grant(self.now, ttl))),
            Call::KeepAlive { lease } => CallAnswer::KeptAlive(self.etcd.keep_alive(self.now, lease)),
            Call::Transact(transaction) => CallAnswer::Committed(self.etcd.transact(&transaction)),
        };
        self.etcd_changed(false);
        if !lost_answer {
            let back = self.millis(1..30);
            let input = Box::new(Input::Answer(id, answer, session));
            self.at(back, What::Take { node, process, input });
        }
    }

    fn call(&mut self, node: usize, id: CallId, call: Call) {
        let running = self.processes[node].as_ref().unwrap();
        let (process, session) = (running.number, running.session.unwrap_or_default());
        let there = self.millis(1..30);
        let fate = if !self.machines[node].etcd_reachable {
            0
        } else if self.faults {
            self.rng.random_range(0..20)
        } else {
            19
        };
        if fate <= 2 {
            let input = Box::new(Input::Answer(id, lost(&call), session));
            self.at(DEADLINE, What::Take { node, process, input });
        }
        // Never arrives; happens, or happens late, and the answer is lost; happens.
        let late = self.millis(1..12_000);
        let asked = PendingCall { id, call, session };
        match fate {
            0 => {}
            1 => self.at(there, What::Arrive { node, process, call: asked, lost_answer: true }),
            2 => self.at(late, What::Arrive { node, process, call: asked, lost_answer: true }),
            _ => self.at(there, What::Arrive { node, process, call: asked, lost_answer: false }),
        }
    }

    /// Steps the control plane of a node, and passes over what follows.
    pub(crate) fn take(&mut self, node: usize, input: Input) {
        self.steps += 1;
        let now = self.now;
        let Some(running) = &mut self.processes[node] else { return };
        let effects = running.control.step(now, input);
        let mut look = false;
        for effect in effects {
            look |= matches!(effect, Effect::Publish(_) | Effect::Status(_));
            self.perform(node, effect);
        }
        if look {
            self.pass(node);
        }
        self.schedule(node);
    }

    fn perform(&mut self, node: usize, effect: Effect) {
        let wall = self.wall(node);
        let Some(running) = &mut self.processes[node] else { return };
        let process = running.number;
        match effect {
            Effect::Publish(records) => {
                self.history.withdraws(self.seed, &running.records, &records);
                running.take(self.now, node_core::Input::Records(std::sync::Arc::clone(&records)));
                running.records = records;
            }
            Effect::Status(status) => running.status = *status,
            Effect::Call(id, call) => self.call(node, id, call),
            Effect::Suspect(session) if running.session == Some(session) => self.disconnect(node),
            Effect::ListAgain if !running.audit_under_way => {
                if let Some(session) = running.session {
                    running.audit_under_way = true;
                    let soon = self.millis(2000..6000);
                    self.at(soon, What::Audit { node, process, session });
                }
            }
            Effect::WriteCache => {
                self.machines[node].disk = Some((running.control.cache(), wall));
                let took = Duration::from_millis(self.rng.random_range(1..10));
                let input = Box::new(Input::CacheWritten(took));
                self.at(took, What::Take { node, process, input });
            }
            Effect::NoteIdentity(holds) => self.machines[node].note = holds.then_some(running.incarnation),
            _ => {}
        }
    }

    /// A node's deadline has passed.
    fn wake(&mut self, node: usize) {
        let now = self.now;
        let running = self.processes[node].as_mut().unwrap();
        if running.control.next_deadline().is_some_and(|at| at <= now) {
            self.take(node, Input::Tick);
        }
        self.probe(node);
        let running = self.processes[node].as_mut().unwrap();
        let due = running.node.next_deadline().is_some_and(|at| at <= now);
        if due {
            self.pass(node);
        }
        self.pass_if_changed(node);
    }

    /// Sends the probes that are due; what is there answers.
    fn probe(&mut self, node: usize) {
        let now = self.now;
        let running = self.processes[node].as_ref().unwrap();
        if running.agents.next_timer().is_none_or(|at| at > now) {
            return;
        }
        let neighbours = self.neighbours(node);
        let running = self.processes[node].as_mut().unwrap();
        let process = running.number;
        let mut sent = Vec::new();
        let mut called = Vec::new();
        let targets = running.agents.targets();
        for (path, at) in running.agents.due(now) {
            let next_hop = targets.peers.get(&path).map(|target| target.next_hop);
            running.agents.on_neighbour(&path, next_hop.and_then(|next_hop| neighbours.get(&next_hop).copied()));
            running.heard.get(&path.0).into_iter().for_each(|heard| running.agents.on_authenticated(&path, *heard));
            let due = running.agents.poll(at, &path, self.rng.random());
            if due.call {
                called.push(path.0.clone());
            }
            sent.extend(due.probe.map(|nonce| (path, nonce)));
        }
        running.agents.polled(now);
        for peer in called {
            if self.find(|machine| machine.id == peer).is_some_and(|other| self.processes[other].is_some()) {
                self.processes[node].as_mut().unwrap().heard.insert(peer, now);
            }
        }
        for (path, nonce) in sent {
            let Some(other) = self.find(|machine| machine.id == path.0) else { continue };
            let answers = self.link(node, other)
                && self.processes[other].as_ref().is_some_and(|peer| !peer.agents.targets().own.is_empty());
            if answers && !(self.faults && self.rng.random_range(0..20) == 0) {
                let mac = self.machines[other].mac;
                let back = self.millis(1..20);
                self.at(back, What::Echo { node, process, path, nonce, mac });
            }
        }
    }

    /// Whether two machines reach each other on the underlay network that both are on.
    pub(crate) fn link(&self, one: usize, other: usize) -> bool {
        let (one, other) = (&self.machines[one], &self.machines[other]);
        one.lan == other.lan && one.lan_up && other.lan_up
    }

    pub(crate) fn find(&self, is: impl Fn(&Machine) -> bool) -> Option<usize> {
        self.machines.iter().position(is)
    }

    /// The neighbours that a machine's kernel knows.
    fn neighbours(&self, node: usize) -> HashMap<IpAddr, MacAddress> {
        let here = (0..self.machines.len()).filter(|other| *other != node && self.link(node, *other));
        here.map(|other| (IpAddr::V4(self.machines[other].address), self.machines[other].mac)).collect()
    }

    fn pass_if_changed(&mut self, node: usize) {
        let running = self.processes[node].as_mut().unwrap();
        if running.agents.has_changed() {
            self.pass(node);
        }
        self.schedule(node);
    }

    pub(crate) fn pass(&mut self, node: usize) {
        let neighbours = self.neighbours(node);
        let now = self.now;
        let Some(running) = &mut self.processes[node] else { return };
        let passed = running.pass(now, &mut self.machines[node], &neighbours, &mut self.rng);
        self.check(node, passed.as_ref());
    }

    fn schedule(&mut self, node: usize) {
        // As the shells, which rest a moment when what is due stays due.
        self.wakes[node] = self.processes[node]
            .as_ref()
            .and_then(Process::wakes_at)
            .map(|at| if at <= self.now { self.now + Duration::from_millis(20) } else { at });
    }

    /// etcd may have changed: checks every new revision, and tells the watchers.
    pub(crate) fn etcd_changed(&mut self, by_operator: bool) {
        if !self.history.take(self.seed, &self.etcd, by_operator) {
            return;
        }
        for node in 0..self.machines.len() {
            let Some(session) = self.processes[node].as_ref().and_then(|running| running.session) else { continue };
            let delay = self.millis(1..40);
            let running = self.processes[node].as_mut().unwrap();
            let at = (self.now + delay).max(running.deliver_after);
            running.deliver_after = at;
            let (process, upto, now) = (running.number, self.etcd.revision, self.now);
            self.at(at.saturating_duration_since(now), What::Deliver { node, process, session, upto });
        }
    }

    /// etcd goes back to `backup`: connections break, calls under way are lost, answers under way still arrive.
    pub(crate) fn restore(&mut self, backup: &EtcdModel) {
        self.etcd.restore(backup, self.now);
        self.history.restored(&self.etcd);
        for arrival in self.queue.take_out(|what| matches!(what, What::Arrive { .. })) {
            if let What::Arrive { node, process, call: PendingCall { id, call, session }, lost_answer: false } = arrival
            {
                let input = Box::new(Input::Answer(id, lost(&call), session));
                self.at(Duration::ZERO, What::Take { node, process, input });
            }
        }
        for node in 0..self.machines.len() {
            self.disconnect(node);
        }
    }

    /// The last value of each key that starts with `prefix`, by key.
    pub(crate) fn keys_below(&self, prefix: &str) -> BTreeMap<&str, &[u8]> {
        let below = self.etcd.keys.iter().filter(|(key, _)| key.starts_with(prefix));
        below.map(|(key, entry)| (key.as_str(), &*entry.value)).collect()
    }
}

fn lost(call: &Call) -> CallAnswer {
    let error = CallError::Indeterminate("lost".into());
    match call {
        Call::Grant { .. } => CallAnswer::Granted(Err(error)),
        Call::KeepAlive { .. } => CallAnswer::KeptAlive(Err(error)),
        Call::Transact(_) => CallAnswer::Committed(Err(error)),
    }
}
