//! The core in virtual time, on a model of the kernel that refuses, loses rules and is tampered with.

use std::collections::BTreeMap;

use attachments::AttachmentTable;
use cni::daemon::{Attach, Attached, Begin, PodReference};
use control_core::objects::{Item, ObjectChanges, ObjectRecord};
use etcd_schema::Key;
use mesh::topology::PeerId;
use policy::{
    engine::PolicyState,
    object::{NetworkPolicy, PodObject},
    objects::Object,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{NodeFacts, input};

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Inspect,
    ReadHost,
    Close,
    Put,
    Forget,
    LoadFlows,
}

/// The policy thread's machine: carries out effects, and checks what must be true at each.
struct Machine {
    core: PolicyCore,
    now: Instant,
    rng: StdRng,
    seed: u64,
    /// Work that fails: always, or once in so many times.
    fails: BTreeMap<Kind, u32>,
    /// Another program changed the tables while they were put.
    tampers: bool,
    /// How long each work takes.
    takes: Duration,
    /// What the kernel's tables hold: rules that close, or those put.
    closed: Option<Frame>,
    put: Option<Frame>,
    /// The kernel's tables are not what was put, and the core was not told yet.
    unnoticed: bool,
    /// Whose connections conntrack has, of an earlier owner.
    stale: BTreeSet<IpAddr>,
    host: Host,
    gate: Option<ActivePolicy>,
    applied: Applied,
    shown: Host,
    unmatched: Unmatched,
    swept: usize,
    /// All that was done since this was last emptied.
    done: Vec<String>,
    /// Interfaces of each table of attachments, by generation.
    tables: BTreeMap<u64, BTreeSet<String>>,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let options = Options {
            node: "own".parse().unwrap(),
            judged_by_tunnel: vec!["meshd0".to_owned()],
            table: "meshd_policy".to_owned(),
            last_subnets: vec!["10.244.9.0/24".parse().unwrap()],
            log_group: 1,
        };
        Self {
            core: PolicyCore::new(now, options),
            now,
            rng: StdRng::seed_from_u64(seed),
            seed,
            fails: BTreeMap::new(),
            tampers: false,
            takes: Duration::ZERO,
            closed: None,
            put: None,
            unnoticed: false,
            stale: BTreeSet::new(),
            host: Host { switched_judged: true, ..Host::default() },
            gate: None,
            applied: Applied::default(),
            shown: Host::default(),
            unmatched: Unmatched::default(),
            swept: 0,
            done: Vec::new(),
            tables: BTreeMap::from([(0, BTreeSet::new())]),
        }
    }

    /// One that is started, knows everything, and has it in force.
    fn in_force(seed: u64) -> Self {
        let mut machine = Self::new(seed);
        machine.step(Input::Started);
        machine.receive(mesh(3));
        machine.receive(machine.table(1, &[]));
        machine.receive(objects(5, true, &[]));
        assert!(machine.gate.is_some());
        machine.done.clear();
        machine
    }

    fn step(&mut self, input: Input) {
        let mut input = Some(input);
        while let Some(happened) = input.take() {
            let Effects { at_once, work } = self.core.step(self.now, happened);
            at_once.into_iter().for_each(|effect| self.perform(effect));
            input = work.map(|work| {
                self.now += self.takes;
                Input::Done(self.work(work))
            });
        }
    }

    fn receive(&mut self, pending: PendingInput) {
        if let Some(table) = &pending.attachments {
            let interfaces = table.attachments.values().filter_map(|attached| attached.attach.as_ref());
            self.tables.insert(table.generation, interfaces.map(|attach| attach.interface.clone()).collect());
        }
        self.step(Input::Received(Box::new(pending)));
    }

    /// Time passes, and every deadline within it is kept.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.core.next_deadline(false).filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.receive(PendingInput::default());
        }
        self.now = self.now.max(end);
    }

    fn table(&self, generation: u64, pods: &[u8]) -> PendingInput {
        let attached = pods.iter().map(|host| attached(*host)).collect();
        let table =
            AttachmentTable { generation: self.tables.keys().max().unwrap() + generation, attachments: attached };
        PendingInput { attachments: Some(Arc::new(table)), ..PendingInput::default() }
    }

    fn fail(&mut self, kind: Kind) -> bool {
        let one_in = self.fails.get(&kind).copied();
        one_in.is_some_and(|one_in| self.rng.random_range(0..one_in) == 0)
    }

    fn work(&mut self, work: Work) -> Done {
        let (kind, seed) = (kind(&work), self.seed);
        self.done.push(format!("{kind:?}"));
        let failed = self.fail(kind);
        let io = || io::Error::from_raw_os_error(libc::ENOBUFS);
        let error = || RulesetError::from(io());
        match work {
            Work::Inspect if failed => {
                (self.unnoticed, self.put) = (false, None);
                Done::Inspected(Err(error()))
            }
            Work::Inspect => {
                let whole = self.put.is_some() && !self.unnoticed;
                if !whole {
                    (self.unnoticed, self.put) = (false, None);
                }
                Done::Inspected(Ok(whole))
            }
            Work::ReadHost { before, .. } if failed => Done::HostRead(before),
            Work::ReadHost { .. } => Done::HostRead(self.host.clone()),
            Work::Close(_) if failed => Done::Closed(Err(error())),
            Work::Close(frame) => {
                assert!(self.gate.is_none(), "seed {seed}: the gate is open over rules that close");
                self.closed = Some(*frame);
                Done::Closed(Ok(()))
            }
            Work::Put(..) if std::mem::take(&mut self.tampers) => {
                (self.unnoticed, self.put) = (false, None);
                Done::Put(Err(RulesetError::Tampered))
            }
            Work::Put(..) if failed => Done::Put(Err(error())),
            Work::Put(frame, _) => {
                assert!(self.core.world().is_complete(), "seed {seed}: an incomplete picture is put in force");
                (self.put, self.closed, self.unnoticed) = (Some(*frame), None, false);
                Done::Put(Ok(()))
            }
            Work::Forget(_) if failed => Done::Forgotten(Err(io())),
            Work::Forget(addresses) => {
                assert!(self.put.is_some(), "seed {seed}: the old rules let new connections be made meanwhile");
                self.stale.retain(|address| !addresses.contains(address));
                Done::Forgotten(Ok(()))
            }
            Work::LoadFlows { .. } => {
                assert!(self.gate.is_none(), "seed {seed}: flows are judged before those of the kernel are known");
                Done::FlowsLoaded(if failed { Err(io()) } else { Ok(()) })
            }
        }
    }

    fn perform(&mut self, effect: Effect) {
        let seed = self.seed;
        match effect {
            Effect::CloseGate => {
                self.done.push("CloseGate".to_owned());
                self.gate = None;
            }
            Effect::OpenGate(in_force) => {
                self.done.push("OpenGate".to_owned());
                let put = self.put.as_ref().unwrap_or_else(|| panic!("seed {seed}: the kernel holds no rules"));
                assert_eq!(put.own, in_force.mesh.own, "seed {seed}: the kernel's rules are of another mesh");
                let moved = self.core.world().moved();
                assert!(moved.is_empty(), "seed {seed}: connections of earlier owners of {moved:?} go on");
                assert!(self.stale.is_empty(), "seed {seed}: connections of earlier owners of {:?}", self.stale);
                self.gate = Some(in_force);
            }
            Effect::Publish(applied) => {
                assert!(applied != self.applied, "seed {seed}: the same again");
                if applied.guarded && (!self.applied.guarded || applied.generation > self.applied.generation) {
                    let stands = self.closed.is_some() || self.put.is_some();
                    assert!(stands, "seed {seed}: no rules guard the pods");
                }
                if applied.generation > self.applied.generation || applied.attachments > self.applied.attachments {
                    assert!(self.gate.is_some() && !applied.refused, "seed {seed}: {applied:?} is not in force");
                    let ports: BTreeSet<String> = self.put.iter().flat_map(|put| put.ports.keys().cloned()).collect();
                    assert_eq!(
                        ports, self.tables[&applied.attachments],
                        "seed {seed}: attachments are acknowledged early"
                    );
                }
                self.applied = applied;
            }
            Effect::ShowHost(host) => self.shown = host,
            Effect::ShowUnmatched(unmatched) => self.unmatched = unmatched,
            Effect::GiveBackMemory => self.done.push("GiveBackMemory".to_owned()),
            Effect::Sweep(count) => self.swept += count,
        }
    }

    fn done(&mut self) -> String {
        std::mem::take(&mut self.done).join(" ")
    }
}

const fn kind(work: &Work) -> Kind {
    match work {
        Work::Inspect => Kind::Inspect,
        Work::ReadHost { .. } => Kind::ReadHost,
        Work::Close(_) => Kind::Close,
        Work::Put(..) => Kind::Put,
        Work::Forget(_) => Kind::Forget,
        Work::LoadFlows { .. } => Kind::LoadFlows,
    }
}

/// The mesh, with this node's subnet 10.244.NUMBER.0/24.
fn mesh(number: u8) -> PendingInput {
    let own: Vec<IpNet> = vec![format!("10.244.{number}.0/24").parse().unwrap()];
    let node = NodeFacts { name: "one".into(), prefixes: own.clone().into(), ..NodeFacts::default() };
    let nodes = [(PeerId::Node("own".parse().unwrap()), Arc::new(node))].into_iter().collect();
    let networks = vec!["10.244.0.0/16".parse().unwrap()];
    PendingInput {
        mesh: Some(Arc::new(MeshFacts { networks, own, nodes, ..MeshFacts::default() })),
        ..PendingInput::default()
    }
}

/// A pod attached as 10.244.3.HOST.
fn attached(host: u8) -> (cni::environment::AttachmentName, Arc<Attached>) {
    let name = format!("p{host}");
    let attach = Attach {
        pod: PodReference { namespace: "shop".to_owned(), name: name.clone(), uid: None, labels: BTreeMap::new() },
        addresses: vec![IpAddr::from([10, 244, 3, host])],
        interface: format!("veth{host}"),
        mac: Some([2, 0, 0, 0, 0, host]),
        allowed_sources: Vec::new(),
    };
    let begin = Begin { network: "mesh".to_owned(), netns: "/x".to_owned(), netns_inode: None, interface: None };
    let attached = Attached {
        container_id: name,
        ifname: "eth0".to_owned(),
        begin,
        allocated: Vec::new(),
        attach: Some(attach),
        boot_id: "b".to_owned(),
    };
    (attached.name(), Arc::new(attached))
}

fn objects(revision: i64, complete: bool, changes: &[(&str, Option<Object>)]) -> PendingInput {
    let record = |object: &Object| ObjectRecord {
        item: Item::new(input::PolicyRecord::Object(object.clone())),
        create_revision: 5,
        held: false,
    };
    let changes: ObjectChanges =
        changes.iter().map(|(key, object)| (Key::parse(key).unwrap(), object.as_ref().map(record))).collect();
    PendingInput { changes, revision: Some(revision), complete, ..PendingInput::default() }
}

fn policy() -> Option<Object> {
    let spec = serde_json::json!({"podSelector": {}});
    Some(Object::NetworkPolicy(PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap())))
}

fn pod(host: u8) -> Option<Object> {
    Some(Object::Pod(PodObject { addresses: vec![IpAddr::from([10, 244, 3, host])], ..PodObject::default() }))
}

fn look() -> PendingInput {
    PendingInput { look: true, ..PendingInput::default() }
}

#[test]
fn pods_are_closed_until_all_is_known_and_flows_are_loaded_before_the_gate_opens() {
    let mut machine = Machine::new(1);
    machine.step(Input::Started);
    assert_eq!(machine.done(), "Close");
    let closed = |machine: &Machine| machine.closed.as_ref().map(|frame| frame.own.len());
    assert_eq!((closed(&machine), machine.applied.guarded), (Some(1), true), "where pods were in an earlier run");
    machine.receive(mesh(3));
    assert_eq!(machine.done(), "ReadHost Close");
    assert_eq!(closed(&machine), Some(2), "its own subnet is closed too");
    machine.receive(machine.table(1, &[7]));
    assert_eq!(machine.done(), "ReadHost Close");
    machine.receive(objects(4, false, &[("networkpolicies/shop/p", policy())]));
    assert_eq!((machine.done().as_str(), machine.applied.generation), ("ReadHost Close", 0));
    machine.receive(objects(5, true, &[]));
    assert_eq!(machine.done(), "ReadHost Close Put LoadFlows OpenGate");
    let Applied { revision, generation, policies, pods, attachments, refused, guarded, .. } = machine.applied;
    assert_eq!((revision, generation, policies, pods, attachments), (5, 1, 1, 1, 1));
    assert!(guarded && !refused);
    assert_eq!(machine.shown, machine.host);
}

#[test]
fn a_revision_without_change_is_published_and_nothing_is_put() {
    let mut machine = Machine::in_force(1);
    machine.receive(objects(9, false, &[]));
    assert_eq!((machine.done().as_str(), machine.applied.revision), ("", 9));
    machine.receive(PendingInput::default());
    assert_eq!(machine.done(), "");
    machine.receive(look());
    assert_eq!(machine.done(), "Inspect ReadHost", "all is as it was put");
    machine.host.bridges = [[2, 0, 0, 0, 0, 9]].into();
    machine.receive(look());
    assert_eq!(machine.done(), "Inspect ReadHost Put OpenGate", "rules depend on the bridges");
    assert_eq!(machine.shown, machine.host);
}

#[test]
fn rules_that_were_removed_close_the_gate_until_they_are_back() {
    for unreadable in [false, true] {
        let mut machine = Machine::in_force(1);
        machine.unnoticed = true;
        if unreadable {
            machine.fails.insert(Kind::Inspect, 1);
        }
        machine.receive(look());
        assert_eq!(machine.done(), "Inspect CloseGate ReadHost Put OpenGate");
        assert!(!machine.applied.refused);
    }
}

#[test]
fn what_the_kernel_refuses_is_tried_each_second_and_what_was_in_force_stays() {
    let mut machine = Machine::in_force(1);
    machine.fails.insert(Kind::Put, 1);
    machine.host.ipvs = true;
    machine.receive(objects(6, false, &[("pods/shop/a", pod(7))]));
    assert_eq!(machine.done(), "ReadHost Put");
    assert!(machine.gate.is_some() && machine.applied.refused);
    assert_eq!((machine.applied.revision, machine.applied.generation), (5, 1), "not in force");
    assert_ne!(machine.shown, machine.host, "status does not show what rules are missing for");
    // Foreign changes meanwhile are seen when it is tried again.
    machine.receive(look());
    assert_eq!(machine.done(), "ReadHost");
    machine.receive(objects(7, false, &[]));
    assert_eq!((machine.done().as_str(), machine.applied.revision), ("", 5));
    machine.pass(Duration::from_millis(999));
    assert_eq!(machine.done(), "");
    machine.pass(Duration::from_millis(2001));
    assert_eq!(machine.done(), "Put Put Put");
    machine.fails.clear();
    machine.pass(RETRY);
    assert_eq!(machine.done(), "Put OpenGate");
    assert_eq!((machine.applied.revision, machine.applied.refused, machine.applied.pods), (7, false, 1));
    assert_eq!(machine.shown, machine.host);
    assert_eq!(machine.core.next_deadline(false), None, "an idle node is not woken");
}

#[test]
fn tables_that_another_program_changes_meanwhile_judge_nothing() {
    let mut machine = Machine::in_force(1);
    machine.tampers = true;
    machine.receive(objects(6, false, &[("pods/shop/a", pod(7))]));
    assert_eq!(machine.done(), "ReadHost Put CloseGate");
    assert!(machine.applied.refused && machine.gate.is_none());
    machine.pass(RETRY);
    assert_eq!(machine.done(), "Put OpenGate");
}

#[test]
fn connections_of_an_address_with_another_owner_go_before_it_is_judged() {
    let mut machine = Machine::in_force(1);
    machine.receive(machine.table(1, &[7]));
    assert_eq!(machine.done(), "ReadHost Put Forget OpenGate");
    machine.fails.insert(Kind::Forget, 1);
    machine.stale.insert(IpAddr::from([10, 244, 3, 7]));
    machine.receive(machine.table(1, &[]));
    assert_eq!(machine.done(), "ReadHost Put Forget");
    assert!(machine.applied.refused);
    assert_eq!(machine.applied.attachments, 2, "the DEL is not acknowledged");
    machine.fails.clear();
    machine.pass(RETRY);
    assert_eq!(machine.done(), "Put Forget OpenGate");
    assert_eq!(machine.applied.attachments, 3);
}

#[test]
fn a_kernel_that_cannot_close_leaves_the_pods_unguarded_and_is_asked_again() {
    let mut machine = Machine::new(1);
    machine.fails.insert(Kind::Close, 1);
    machine.step(Input::Started);
    assert!(!machine.applied.guarded);
    machine.receive(mesh(3));
    machine.pass(Duration::from_secs(2));
    assert_eq!(machine.done(), "Close ReadHost Close Close Close");
    machine.fails.clear();
    machine.pass(RETRY);
    assert_eq!((machine.done().as_str(), machine.applied.guarded), ("Close", true));
    // Rules that can be put although those that close could not.
    machine.fails.insert(Kind::Close, 1);
    machine.receive(machine.table(1, &[]));
    machine.receive(objects(5, true, &[]));
    assert_eq!(machine.done(), "ReadHost Close ReadHost Close Put LoadFlows OpenGate");
    assert_eq!((machine.applied.guarded, machine.core.next_deadline(false)), (true, None));
}

#[test]
fn flows_that_cannot_be_listed_do_not_keep_policies_out_of_force() {
    let mut machine = Machine::new(1);
    machine.fails.insert(Kind::LoadFlows, 1);
    machine.step(Input::Started);
    machine.receive(PendingInput { mesh: mesh(3).mesh, ..machine.table(1, &[]) });
    machine.takes = Duration::from_millis(5);
    machine.receive(objects(5, true, &[]));
    assert!(machine.gate.is_some() && !machine.applied.refused);
    assert_eq!(machine.applied.took, Duration::from_millis(15), "Close, Put, LoadFlows");
}

#[test]
fn memory_is_given_back_and_flows_are_swept() {
    let mut machine = Machine::in_force(1);
    let many: Vec<String> = (0..MANY).map(|nth| format!("pods/shop/p{nth}")).collect();
    let many: Vec<(&str, Option<Object>)> = many.iter().map(|key| (key.as_str(), None)).collect();
    machine.receive(objects(6, false, &many));
    assert_eq!(machine.core.next_deadline(false), Some(machine.now + GIVE_BACK));
    machine.done.clear();
    machine.pass(GIVE_BACK);
    assert_eq!((machine.done().as_str(), machine.swept), ("GiveBackMemory", SWEPT));
    assert_eq!(machine.core.next_deadline(true), Some(machine.now + SWEEP));
    machine.now += SWEEP;
    machine.receive(PendingInput::default());
    assert_eq!((machine.done().as_str(), machine.swept), ("", 2 * SWEPT));
}

#[test]
fn an_attachment_without_its_pod_is_shown() {
    let mut machine = Machine::in_force(1);
    let (name, mut own) = attached(7);
    Arc::make_mut(&mut own).attach.as_mut().unwrap().pod.uid = Some("u".to_owned());
    let table = AttachmentTable { generation: 9, attachments: [(name, own)].into() };
    machine.receive(PendingInput { attachments: Some(Arc::new(table)), ..PendingInput::default() });
    let later = machine.now + Duration::from_secs(60);
    assert_eq!(machine.unmatched.problems(later).count(), 1);
}

/// Its rules keep it from sending with a pod's address.
#[test]
fn an_attachment_with_an_address_of_elsewhere_is_acknowledged_once_rules_know_its_interface() {
    let mut machine = Machine::in_force(1);
    machine.receive(mesh(4));
    machine.done.clear();
    machine.receive(machine.table(1, &[7]));
    assert_eq!(machine.done(), "ReadHost Put OpenGate");
    machine.receive(machine.table(1, &[]));
    assert_eq!((machine.done().as_str(), machine.applied.attachments), ("ReadHost Put OpenGate", 3));
}

#[test]
fn an_outcome_that_no_work_awaits_changes_nothing() {
    let mut machine = Machine::in_force(1);
    machine.step(Input::Done(Done::Put(Ok(()))));
    machine.step(Input::Done(Done::Inspected(Ok(false))));
    assert_eq!(machine.done(), "");
    machine.receive(look());
    assert_eq!(machine.done(), "Inspect ReadHost");
}

/// Whatever comes while the kernel refuses this and that, [`Machine`]'s assertions are true at each effect, and all is in
/// force a second after the kernel refuses nothing more.
#[test]
fn whatever_the_kernel_refuses_nothing_is_judged_early_and_all_comes_into_force() {
    let seeds = std::env::var("MESHD_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    for seed in 0..seeds {
        history(seed);
    }
}

fn history(seed: u64) {
    let mut machine = Machine::new(seed);
    let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(7919));
    let kinds = [Kind::Inspect, Kind::ReadHost, Kind::Close, Kind::Put, Kind::Forget, Kind::LoadFlows];
    for kind in kinds {
        if rng.random() {
            machine.fails.insert(kind, rng.random_range(1..5));
        }
    }
    machine.takes = Duration::from_millis(rng.random_range(0..300));
    machine.step(Input::Started);
    let (mut pods, mut revision) = (BTreeSet::new(), 1);
    for _ in 0..40 {
        event(&mut machine, &mut rng, &mut pods, &mut revision);
    }
    machine.fails.clear();
    machine.tampers = false;
    machine.receive(PendingInput { complete: true, look: true, ..mesh(3) });
    machine.receive(machine.table(1, &pods.iter().copied().collect::<Vec<_>>()));
    machine.pass(RETRY + SWEEP);
    let Applied { generation, attachments, refused, guarded, .. } = machine.applied;
    assert!(machine.gate.is_some() && generation > 0 && guarded && !refused, "seed {seed}: {:?}", machine.applied);
    assert_eq!(Some(&attachments), machine.tables.keys().max(), "seed {seed}");
    assert_eq!(machine.applied.revision, machine.core.world().revision(), "seed {seed}");
    assert_eq!(machine.shown, machine.host, "seed {seed}");
    machine.done.clear();
    machine.receive(PendingInput::default());
    assert_eq!(machine.done(), "", "seed {seed}: a second pass over the same state");
}

fn event(machine: &mut Machine, rng: &mut StdRng, pods: &mut BTreeSet<u8>, revision: &mut i64) {
    *revision += 1;
    let host = rng.random_range(1..6);
    match rng.random_range(0..10) {
        0 => machine.receive(mesh(rng.random_range(3..5))),
        1 | 2 => {
            if !pods.remove(&host) {
                pods.insert(host);
            }
            // Those before it may have left connections behind.
            if machine.gate.is_some() && machine.core.world().mesh().is_some_and(|mesh| mesh.own == mesh_own(3)) {
                machine.stale.insert(IpAddr::from([10, 244, 3, host]));
            }
            machine.receive(machine.table(1, &pods.iter().copied().collect::<Vec<_>>()));
        }
        3 => machine.receive(objects(*revision, rng.random(), &[("networkpolicies/shop/p", policy())])),
        4 => machine.receive(objects(*revision, rng.random(), &[("networkpolicies/shop/p", None)])),
        5 => machine.receive(objects(*revision, true, &[])),
        6 => {
            machine.unnoticed = machine.put.is_some();
            machine.receive(look());
        }
        7 => machine.tampers = machine.put.is_some(),
        8 => {
            machine.host.bridges = [[2, 0, 0, 0, 0, host]].into();
            machine.receive(look());
        }
        _ => machine.pass(Duration::from_millis(rng.random_range(1..3000))),
    }
}

fn mesh_own(number: u8) -> Vec<IpNet> {
    vec![format!("10.244.{number}.0/24").parse().unwrap()]
}
