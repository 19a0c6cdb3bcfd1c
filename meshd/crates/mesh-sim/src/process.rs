//! A running daemon: the cores of one node, and the state of their shells.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use control_core::{
    core::{CacheInfo, ControlCore, ControlStatus, SessionNumber},
    membership::{Identity, Membership},
    store::Store,
};
use etcd_schema::NodeId;
use ipnet::IpNet;
use mesh::{
    address::Family,
    kernel_state::{PrefixOn, RouteVia, SeenOthers},
    path::{MacAddress, PathAgents, PathId},
    plan::{Local, Observed, Plan, UnderlayLink},
    records::{Records, Revision},
    tunnel_table::TunnelTable,
};
use node_core::{Done, Effect, Effects, Input, NodeCore, NodeStart, Reconciled, Stance, Work};
use rand::{Rng as _, rngs::StdRng};

use crate::machine::{KernelRefusal, Machine, PORT};

/// A running daemon.
pub(crate) struct Process {
    /// Effects of earlier processes are not this one's.
    pub(crate) number: u64,
    pub(crate) incarnation: u64,
    pub(crate) control: ControlCore,
    pub(crate) node: NodeCore,
    pub(crate) agents: PathAgents,
    pub(crate) records: Arc<Records>,
    pub(crate) status: ControlStatus,
    pub(crate) session: Option<SessionNumber>,
    pub(crate) sessions: SessionNumber,
    pub(crate) delivered: Revision,
    /// A stream keeps its order.
    pub(crate) deliver_after: Instant,
    pub(crate) audit_under_way: bool,
    pub(crate) table: TunnelTable,
    /// Rules stand that no packet passes unjudged.
    pub(crate) guarded: bool,
    /// When something of each peer's came through the tunnel.
    pub(crate) heard: HashMap<NodeId, Instant>,
    /// Paths over which an echo has come back, and next hops that were in use before this process started.
    pub(crate) echoed: BTreeSet<PathId>,
    pub(crate) resumed: BTreeSet<IpAddr>,
    /// The records that the last table was made of.
    pub(crate) planned_records: Arc<Records>,
    pub(crate) planned_stance: Option<Stance>,
}

/// What a pass did.
pub(crate) struct PassResult {
    /// The observations that it planned with.
    pub(crate) observed: Observed,
    pub(crate) plan: Plan,
    pub(crate) before: TunnelTable,
}

impl Process {
    pub(crate) fn start(now: Instant, wall: Duration, machine: &mut Machine, rng: &mut StdRng) -> Self {
        machine.starts += 1;
        let identity = Identity {
            id: machine.id.clone(),
            boot_id: "b".into(),
            start_count: machine.starts,
            incarnation: rng.random(),
            predecessor: machine.note,
        };
        let incarnation = identity.incarnation;
        let mut store = Store::new("/meshd");
        let (mut previous, mut cache_usable) = (None, false);
        if let Some((content, written_at)) = &machine.disk {
            // A clock that went back makes a cache new.
            let age = wall.saturating_sub(*written_at);
            (previous, cache_usable) = (content.subnet, content.lease_ttl.is_some_and(|ttl| age <= ttl));
            store = store.with_cache(content.revision, content.entries.clone(), now).recall(content.evidence.clone());
        }
        let membership =
            Membership::new(now, identity, machine.facts.clone(), previous, machine.attached, rng.random());
        let control =
            ControlCore::new(now, control_core::core::Start { store, membership, cache_usable, hands_on: false });
        let (records, status) = (control.records(), control.status().clone());
        let direct = machine.kernel.routes.iter().filter_map(|route| match &route.via {
            RouteVia::Neighbour { via, .. } => Some((route.dst, *via)),
            _ => None,
        });
        let direct: Vec<(IpNet, IpAddr)> = direct.collect();
        let observed = Observed::default();
        let link = UnderlayLink {
            name: "eth0".parse().unwrap(),
            index: 2,
            mtu: 1500,
            addresses: vec![IpNet::new(machine.address.into(), 24).unwrap()],
        };
        let accepted: Vec<PrefixOn> =
            direct.iter().map(|(prefix, _)| PrefixOn { prefix: *prefix, dev: link.name.clone() }).collect();
        let local = Local {
            vteps: BTreeMap::new(),
            site: machine.facts.site.as_ref().map(ToString::to_string),
            underlay: BTreeMap::from([(Family::V4, link)]),
            has_endpoint: true,
            listen_port: PORT,
            protected: vec![(machine.address.into(), "this node's address".to_owned())],
            ip_masq: false,
            forward_accept: false,
        };
        let age = machine.disk.as_ref().map(|(_, written_at)| wall.saturating_sub(*written_at));
        let cache = age.map(|age| CacheInfo { age, usable: cache_usable });
        let start = NodeStart { id: machine.id.clone(), observed, accepted, talking: Vec::new(), cache, local };
        let mut process = Self {
            number: machine.starts,
            incarnation,
            node: NodeCore::new(now, start),
            control,
            resumed: direct.iter().map(|(_, via)| *via).collect(),
            agents: PathAgents::after(direct),
            planned_records: Arc::clone(&records),
            records,
            status,
            session: None,
            sessions: 0,
            delivered: 0,
            deliver_after: now,
            audit_under_way: false,
            table: TunnelTable::default(),
            guarded: false,
            heard: HashMap::new(),
            echoed: BTreeSet::new(),
            planned_stance: None,
        };
        process.take(now, Input::Records(Arc::clone(&process.records)));
        process
    }

    /// Steps the node, which only takes note.
    pub(crate) fn take(&mut self, now: Instant, input: Input) {
        self.node.step(now, input, &mut self.agents);
    }

    /// When something is due.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        let deadlines = [self.control.next_deadline(), self.agents.next_timer(), self.node.next_deadline()];
        deadlines.into_iter().flatten().min()
    }

    /// A pass of the node's main loop. `None`: the kernel stays as it is.
    pub(crate) fn pass(
        &mut self,
        now: Instant,
        machine: &mut Machine,
        neighbours: &HashMap<IpAddr, MacAddress>,
        rng: &mut StdRng,
    ) -> Option<PassResult> {
        self.take(now, Input::Status(Box::new(self.status.clone())));
        if self.agents.resumes() {
            self.agents.set_neighbours(neighbours.iter().map(|(address, mac)| ((2, *address), *mac)).collect());
        }
        let mut observed = Observed::default();
        let mut input = Input::Pass;
        loop {
            // What the plan of this step would be made with.
            if let Input::Done(Done::Policies { .. }) = &input {
                observed = self.node.mesh().observed().clone();
            }
            let Effects { at_once, work } = self.node.step(now, input, &mut self.agents);
            let mut plan = None;
            for effect in at_once {
                if let Effect::Show(outcome) = effect {
                    plan = outcome.plan;
                }
            }
            match work {
                Some(work) => input = Input::Done(self.work(work, machine, rng)),
                None => {
                    let plan = plan?;
                    let targets = self.agents.targets();
                    self.echoed.retain(|path| targets.peers.contains_key(path));
                    let before = std::mem::replace(&mut self.table, plan.tunnel.clone());
                    return Some(PassResult { observed, plan, before });
                }
            }
        }
    }

    fn work(&mut self, work: Work, machine: &mut Machine, rng: &mut StdRng) -> Done {
        match work {
            Work::ReopenTun => Done::TunReopened(true),
            Work::AwaitPolicies(_) => {
                self.guarded |= machine.kernel.refuses != KernelRefusal::Policies;
                Done::Policies { guarded: self.guarded }
            }
            Work::ApplyTable(_) => Done::TableApplied(Vec::new()),
            Work::Reconcile { desired, .. } => {
                let applied = machine.kernel.apply(&desired, rng);
                let others = Some(SeenOthers::Unchanged);
                Done::Reconciled(Reconciled { failed: !applied, routes: applied, others, ..Reconciled::default() })
            }
            Work::SubnetEnv(_) => Done::SubnetEnv(None),
        }
    }
}
