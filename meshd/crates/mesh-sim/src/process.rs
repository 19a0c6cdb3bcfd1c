//! A daemon that runs: the cores of one node, and what its shells keep for them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use control_core::{
    core::{ControlCore, ControlStatus, SessionNumber, Start},
    membership::{Identity, Membership},
    store::Store,
};
use etcd_schema::NodeId;
use ipnet::IpNet;
use mesh::{
    address::Family,
    kernel_state::{Desired, PrefixOn, RouteVia},
    path::{MacAddress, PathAgents},
    plan::{Local, Observed, Plan, UnderlayLink},
    records::{Revision, View},
    target::{PathId, Targets},
    tunnel_table::Table,
};
use node_core::{NodeCore, Stance};
use rand::{Rng as _, rngs::StdRng};

use crate::machine::{Machine, PORT, Refusal};

/// How long to wait before trying again what the kernel refused.
const RETRY: Duration = Duration::from_secs(1);

/// A running daemon.
pub(crate) struct Process {
    /// Effects of earlier processes are not this one's.
    pub(crate) number: u64,
    pub(crate) incarnation: u64,
    pub(crate) control: ControlCore,
    pub(crate) node: NodeCore,
    pub(crate) agents: PathAgents,
    pub(crate) local: Local,
    pub(crate) view: Arc<View>,
    pub(crate) status: ControlStatus,
    pub(crate) cache_usable: bool,
    pub(crate) session: Option<SessionNumber>,
    pub(crate) sessions: SessionNumber,
    pub(crate) delivered: Revision,
    /// A stream keeps its order.
    pub(crate) deliver_after: Instant,
    pub(crate) audit_under_way: bool,
    pub(crate) targets: Targets,
    pub(crate) table: Table,
    pub(crate) desired: Option<Desired>,
    pub(crate) plan: Option<Plan>,
    pub(crate) retry_at: Option<Instant>,
    /// When something of each peer's came through the tunnel.
    pub(crate) heard: HashMap<NodeId, Instant>,
    /// Paths over which an echo has come back, and those that were in use before this process started.
    pub(crate) echoed: BTreeSet<PathId>,
    pub(crate) resumed: BTreeSet<PathId>,
    /// The view that the last table was made of.
    pub(crate) planned_view: Arc<View>,
    pub(crate) planned_stance: Option<Stance>,
}

/// What a pass did.
pub(crate) struct Passed {
    /// The observations that it planned with.
    pub(crate) observed: Observed,
    pub(crate) plan: Plan,
    pub(crate) before: Table,
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
        let control = ControlCore::new(now, Start { store, membership, cache_usable, hands_on: false });
        let (view, status) = (control.view(), control.status().clone());
        let direct = machine.kernel.routes.iter().filter_map(|route| match &route.via {
            RouteVia::Neighbour { via, .. } => Some((route.dst, *via)),
            _ => None,
        });
        let observed = Observed { direct_at_start: direct.collect(), ..Observed::default() };
        let link = UnderlayLink {
            name: "eth0".parse().unwrap(),
            index: 2,
            mtu: 1500,
            addresses: vec![IpNet::new(machine.address.into(), 24).unwrap()],
        };
        let accepted: Vec<PrefixOn> = observed
            .direct_at_start
            .iter()
            .map(|(prefix, _)| PrefixOn { prefix: *prefix, dev: link.name.clone() })
            .collect();
        let local = Local {
            site: machine.facts.site.as_ref().map(ToString::to_string),
            underlay: BTreeMap::from([(Family::V4, link)]),
            has_endpoint: true,
            listen_port: PORT,
            protected: vec![(machine.address.into(), "this node's address".to_owned())],
            ip_masq: false,
            forward_accept: false,
        };
        let mut process = Self {
            number: machine.starts,
            incarnation,
            node: NodeCore::new(now, machine.id.clone(), observed, accepted),
            control,
            agents: PathAgents::default(),
            local,
            planned_view: Arc::clone(&view),
            view,
            status,
            cache_usable,
            session: None,
            sessions: 0,
            delivered: 0,
            deliver_after: now,
            audit_under_way: false,
            targets: Targets::default(),
            table: Table::default(),
            desired: None,
            plan: None,
            retry_at: None,
            heard: HashMap::new(),
            echoed: BTreeSet::new(),
            resumed: BTreeSet::new(),
            planned_stance: None,
        };
        process.node.see(&process.view, cache_usable);
        process
    }

    /// When something is due.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        let deadlines =
            [self.control.next_deadline(), self.agents.next_timer(), self.retry_at, self.node.next_deadline()];
        deadlines.into_iter().flatten().min()
    }

    /// A pass of the node's main loop. `None`: the kernel stays as it is.
    pub(crate) fn pass(
        &mut self,
        now: Instant,
        machine: &mut Machine,
        neighbours: &HashMap<std::net::IpAddr, MacAddress>,
        rng: &mut StdRng,
    ) -> Option<Passed> {
        let due = self.retry_at.is_some_and(|at| at <= now);
        if due {
            self.retry_at = None;
        }
        let stance = self.node.stance(&self.status);
        if matches!(stance, Stance::Uninformed | Stance::Unconfirmed) {
            return None;
        }
        self.node.act_on(&self.status);
        if machine.kernel.refuses == Refusal::Policies && self.desired.is_none() {
            self.retry_at = Some(now + RETRY);
            return None;
        }
        let targets = self.node.targets(&self.local);
        if targets != self.targets {
            let resumes = !self.node.observed.direct_at_start.is_empty();
            self.agents.set_targets(now, targets.clone(), |target| {
                neighbours.get(&target.next_hop).copied().filter(|_| resumes)
            });
            self.echoed.retain(|path| targets.peers.contains_key(path));
            let was_direct = targets.peers.iter().filter(|(_, target)| target.was_direct);
            self.resumed.extend(was_direct.map(|(path, _)| path.clone()));
            self.targets = targets;
        }
        self.node.observed.paths = self.agents.states();
        self.agents.take_changed();
        let observed = self.node.observed.clone();
        let plan = self.node.plan(now, &self.local);
        let before = std::mem::replace(&mut self.table, plan.tunnel.clone());
        if due || self.desired.as_ref() != Some(&plan.kernel) {
            if machine.kernel.apply(&plan.kernel, rng) {
                self.agents.routes_applied(now);
            } else {
                self.retry_at = Some(now + RETRY);
            }
            self.desired = Some(plan.kernel.clone());
        }
        self.plan = Some(plan.clone());
        Some(Passed { observed, plan, before })
    }
}
