//! The node as a state machine: inputs → effects.
//!
//! [`NodeCore::step`] returns [`Effect`]s to carry out in order, then at most one [`Work`], whose outcome is the next
//! input. A pass:
//!
//! ```text
//! Pass ─▶ [TUN gone: ReopenTun] ─▶ AwaitPolicies ─▶ plan ─▶ [other table: ApplyTable]
//!      ─▶ [differs, or a look: Reconcile] ─▶ SubnetEnv ─▶ Show
//! ```
//!
//! The path agents choose paths. The prober and this core share them, so each step borrows them.
//!
//! ```text
//! plan ─▶ candidates ─▶ PathAgents ─▶ paths, probes
//! ```
//!
//! Invariants: routes and peers derive only from records that the node may act on, and only once rules judge every
//! packet on them. Until then the kernel keeps the state of the earlier run, whose fallback routes keep pods' packets
//! from leaving in clear text.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use control_core::{
    core::{CacheInfo, ControlStatus},
    membership::MembershipState,
};
use ipnet::IpNet;
use mesh::{
    address::prefixes,
    interface::InterfaceName,
    kernel_state::{Desired, SeenOthers},
    path::PathAgents,
    plan::{Local, Plan},
    problem::Problem,
    records::Records,
    tunnel_table::TunnelTable,
};

use crate::{
    interface::{Done, Effect, Effects, Input, NodeStart, PassOutcome, Reconciled, SubnetEnvChange, Work},
    mesh_state::{MeshState, Stance},
    pace::Pace,
    problems,
};

/// Delay before failed work is retried.
const RETRY: Duration = Duration::from_secs(1);
/// Longest time that the first routes wait for policies to be in force.
const POLICIES_FIRST: Duration = Duration::from_secs(5);
/// Settings change in bursts, at boot or by `sysctl --system`: they are read once the burst is over.
const SETTINGS_SETTLE: Duration = Duration::from_secs(5);

/// State of the node's decisions.
#[derive(Debug)]
pub struct NodeCore {
    mesh: MeshState,
    local: Local,
    cache: Option<CacheInfo>,
    /// Nothing is decided before this is known.
    status: Option<ControlStatus>,
    pods: Vec<InterfaceName>,
    /// Peers to call as soon as the tunnel has them.
    to_call: Vec<String>,
    /// The table in the tunnel, and the tunnel's refusals.
    table: Option<TunnelTable>,
    tunnel_problems: Vec<Problem>,
    /// The last state applied to the kernel, and the kernel's refusals.
    desired: Option<Desired>,
    kernel_problems: Vec<Problem>,
    /// Other programs may have changed the kernel's state since.
    look: bool,
    /// When other programs' rules and settings are read.
    others: Pace,
    retry_at: Option<Instant>,
    /// When attached containers are counted again, while the node leaves a subnet.
    attached_at: Option<Instant>,
    tun_gone: bool,
    /// The first routes have waited for the policies.
    policies_awaited: bool,
    stage: PassStage,
    /// Start of the last pass, and time of the last step.
    began: Instant,
    stepped: Instant,
}

/// The work whose outcome is next.
#[derive(Debug, Default)]
enum PassStage {
    #[default]
    Idle,
    ReopeningTun {
        due: bool,
    },
    AwaitingPolicies {
        due: bool,
    },
    ApplyingTable {
        due: bool,
        plan: Box<Plan>,
    },
    Reconciling {
        plan: Box<Plan>,
        began: Instant,
        look: bool,
    },
    KeepingSubnetEnv(Box<Plan>),
}

impl NodeCore {
    /// The node at the start of its daemon.
    #[must_use]
    pub fn new(now: Instant, start: NodeStart) -> Self {
        let NodeStart { id, observed, accepted, talking, cache, local } = start;
        Self {
            mesh: MeshState::new(now, id, observed, accepted),
            local,
            cache,
            status: None,
            pods: Vec::new(),
            to_call: talking,
            table: None,
            tunnel_problems: Vec::new(),
            desired: None,
            kernel_problems: Vec::new(),
            look: true,
            others: Pace::new(now),
            retry_at: None,
            attached_at: None,
            tun_gone: false,
            policies_awaited: false,
            stage: PassStage::Idle,
            began: now,
            stepped: now,
        }
    }

    /// The mesh as this node knows it and acts on it.
    #[must_use]
    pub const fn mesh(&self) -> &MeshState {
        &self.mesh
    }

    /// This machine.
    #[must_use]
    pub const fn local(&self) -> &Local {
        &self.local
    }

    /// The table in the tunnel.
    #[must_use]
    pub const fn table(&self) -> Option<&TunnelTable> {
        self.table.as_ref()
    }

    /// When the next [`Pass`](Input::Pass) is due at the latest. A deadline that the last pass could not serve, for
    /// example because the node may not act, is postponed by a second, or the loop would spin.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [self.mesh.next_deadline(), self.retry_at, self.attached_at, self.others.due()];
        let served = |at| if at <= self.began { self.stepped + RETRY } else { at };
        deadlines.into_iter().flatten().map(served).min()
    }

    /// Reads whether containers hold addresses of this node's subnets, also of one that was lost.
    fn read_attached(&self) -> Effect {
        let subnet = self.status.as_ref().and_then(|status| match &status.state {
            MembershipState::SubnetLost { subnet, .. } => Some(*subnet),
            _ => status.subnet,
        });
        let own = self.mesh.topology().own_subnets.iter().copied();
        Effect::ReadAttached { subnet, earlier: own.filter(|own| Some(*own) != subnet).collect() }
    }

    /// Handles an input and returns what to do. An outcome that no work awaits changes nothing.
    pub fn step(&mut self, now: Instant, input: Input, agents: &mut PathAgents) -> Effects {
        self.stepped = now;
        let mut out = Effects::default();
        let done = match input {
            Input::Pass => {
                // A pass in progress uses the newest inputs.
                if matches!(self.stage, PassStage::Idle) {
                    self.begin(now, &mut out);
                }
                return out;
            }
            Input::Done(done) => done,
            other => {
                self.observe(now, other, agents, &mut out);
                return out;
            }
        };
        match (std::mem::take(&mut self.stage), done) {
            (PassStage::ReopeningTun { due }, Done::TunReopened(reopened)) => {
                self.tun_gone = !reopened;
                self.look = true;
                if !reopened {
                    self.retry_at = Some(now + RETRY);
                }
                self.may_act(now, due, &mut out);
            }
            (PassStage::AwaitingPolicies { due }, Done::Policies { guarded: true }) => {
                self.plan(now, due, agents, &mut out);
            }
            (PassStage::AwaitingPolicies { .. }, Done::Policies { guarded: false }) => {
                self.retry_at = Some(now + RETRY);
                wait(problems::pods_not_guarded(), &mut out);
            }
            (PassStage::ApplyingTable { due, plan }, Done::TableApplied(refused)) => {
                self.tunnel_problems = refused;
                self.table = Some(plan.tunnel.clone());
                self.call(&plan, &mut out);
                self.reconcile(now, due, plan, &mut out);
            }
            (PassStage::Reconciling { plan, began, look }, Done::Reconciled(reconciled)) => {
                if reconciled.routes {
                    agents.routes_applied(now);
                }
                self.reconciled(now, began, look, reconciled);
                self.desired = Some(plan.kernel.clone());
                self.keep_subnet_env(plan, &mut out);
            }
            (PassStage::KeepingSubnetEnv(plan), Done::SubnetEnv(problem)) => self.show(plan, problem, &mut out),
            (stage, _) => self.stage = stage,
        }
        out
    }

    fn observe(&mut self, now: Instant, input: Input, agents: &mut PathAgents, out: &mut Effects) {
        match input {
            Input::Records(records) => self.apply_records(&records, out),
            Input::Status(status) => self.status = Some(*status),
            Input::Local(local) => self.local = *local,
            Input::Pods(interfaces) => self.pods = interfaces,
            Input::PeerMtus(mtus) => self.peer_mtus(&mtus, agents),
            Input::TunGone => self.tun_gone = true,
            Input::OthersChanged { settings } => {
                self.others.changed(if settings { now + SETTINGS_SETTLE } else { now });
            }
            Input::KernelChanged { addresses } => {
                self.look = true;
                if addresses {
                    out.at_once.extend([Effect::ReadUnderlay, self.read_attached()]);
                }
            }
            Input::Sweep => {
                self.look = true;
                out.at_once.extend([Effect::ReadUnderlay, self.read_attached()]);
            }
            Input::Pass | Input::Done(_) => {}
        }
    }

    /// Takes over the records that the node may act on.
    fn apply_records(&mut self, records: &Records, out: &mut Effects) {
        let usable = self.cache.is_some_and(|cache| cache.usable);
        out.at_once.extend(self.mesh.apply_records(records, usable).into_iter().map(Effect::Restarted));
    }

    /// Only MTUs below the device's: otherwise a larger MTU of a new config would not reach the routes.
    fn peer_mtus(&self, mtus: &BTreeMap<String, u16>, agents: &mut PathAgents) {
        let Some(table) = &self.table else { return };
        agents.on_mtu(|peer| mtus.get(&peer.to_string()).copied().filter(|mtu| *mtu < table.mtu));
    }

    fn begin(&mut self, now: Instant, out: &mut Effects) {
        self.began = now;
        let due = self.retry_at.is_some_and(|at| at <= now);
        if due {
            self.retry_at = None;
        }
        self.look |= self.others.take_due(now);
        if self.tun_gone {
            self.stage = PassStage::ReopeningTun { due };
            out.work = Some(Work::ReopenTun);
        } else {
            self.may_act(now, due, out);
        }
    }

    /// Whether this node acts, and with which identity.
    fn may_act(&mut self, now: Instant, due: bool, out: &mut Effects) {
        let Some(status) = self.status.clone() else { return wait(problems::waiting_for_etcd(self.cache), out) };
        let leaves = self.mesh.resolver().topology().own_subnets.len() > usize::from(status.subnet.is_some());
        let leaves = leaves || matches!(status.state, MembershipState::SubnetLost { .. });
        // The kernel does not report other programs' routes: they are polled until the last container is gone.
        self.attached_at = leaves.then(|| now + RETRY);
        if leaves || self.retry_at.is_some() {
            out.at_once.push(self.read_attached());
        }
        match self.mesh.stance(&status) {
            Stance::Uninformed => wait(problems::waiting_for_etcd(self.cache), out),
            Stance::Unconfirmed => wait(problems::identity_unconfirmed(), out),
            Stance::Cloned | Stance::Acts => {
                self.mesh.act_on(&status);
                out.at_once.push(Effect::TellEnforcement);
                // Wait once: the policies in force may so far only deny everything.
                let first = !std::mem::replace(&mut self.policies_awaited, true);
                self.stage = PassStage::AwaitingPolicies { due };
                out.work = Some(Work::AwaitPolicies(if first { POLICIES_FIRST } else { Duration::ZERO }));
            }
        }
    }

    fn plan(&mut self, now: Instant, due: bool, agents: &mut PathAgents, out: &mut Effects) {
        let revision = agents.revision();
        let mut plan = Box::new(self.mesh.plan(now, &self.local, agents));
        if agents.revision() != revision {
            out.at_once.push(Effect::TellEnforcement);
        }
        plan.kernel.pods.clone_from(&self.pods);
        if self.table.as_ref() == Some(&plan.tunnel) {
            self.call(&plan, out);
            return self.reconcile(now, due, plan, out);
        }
        out.work = Some(Work::ApplyTable(plan.tunnel.clone()));
        self.stage = PassStage::ApplyingTable { due, plan };
    }

    /// Calls the peers that an earlier run talked to, once.
    fn call(&mut self, plan: &Plan, out: &mut Effects) {
        if !self.to_call.is_empty() && !plan.tunnel.peers.is_empty() {
            out.at_once.push(Effect::Call(std::mem::take(&mut self.to_call)));
        }
    }

    fn reconcile(&mut self, now: Instant, due: bool, plan: Box<Plan>, out: &mut Effects) {
        let look = std::mem::take(&mut self.look) || due;
        if !look && self.desired.as_ref() == Some(&plan.kernel) {
            return self.keep_subnet_env(plan, out);
        }
        let desired = Box::new(plan.kernel.clone());
        out.work = Some(Work::Reconcile { desired, look, others: self.others.others(now) });
        self.stage = PassStage::Reconciling { plan, began: now, look };
    }

    fn reconciled(&mut self, now: Instant, began: Instant, look: bool, reconciled: Reconciled) {
        let Reconciled { problems, failed, no_tun, routes: _, others } = reconciled;
        match others {
            Some(SeenOthers::Read) => self.others.read(began, now),
            Some(SeenOthers::Kept) => self.others.left_out(),
            Some(SeenOthers::Unchanged) if look => self.others.nothing_new(),
            Some(SeenOthers::Unchanged) | None => {}
        }
        self.kernel_problems = problems;
        self.tun_gone |= no_tun;
        if failed {
            self.retry_at = Some(now + RETRY);
        }
    }

    fn keep_subnet_env(&mut self, plan: Box<Plan>, out: &mut Effects) {
        let in_use = self.status.as_ref().and_then(|status| status.subnet);
        let subnets: Vec<IpNet> = self.mesh.topology().subnets_of_new(in_use).iter().flat_map(prefixes).collect();
        let lost = self.status.as_ref().is_some_and(|status| {
            matches!(
                status.state,
                MembershipState::SubnetLost { .. }
                    | MembershipState::NoNetwork { .. }
                    | MembershipState::AwaitingBlock { .. }
                    | MembershipState::Removed
                    | MembershipState::Cloned { .. }
            )
        });
        let change = match (subnets.is_empty(), lost) {
            (false, _) => {
                let networks = self.mesh.topology().networks().collect();
                SubnetEnvChange::Write { networks, subnets, mtu: plan.mtu }
            }
            (true, true) => SubnetEnvChange::Remove,
            // The subnet may come back: the file stays.
            (true, false) => return self.show(plan, None, out),
        };
        out.work = Some(Work::SubnetEnv(change));
        self.stage = PassStage::KeepingSubnetEnv(plan);
    }

    fn show(&self, plan: Box<Plan>, subnet_env: Option<Problem>, out: &mut Effects) {
        let mut problems: Vec<Problem> = self.tunnel_problems.iter().chain(&self.kernel_problems).cloned().collect();
        if self.local.underlay.is_empty() {
            problems.push(problems::no_underlay());
        }
        problems.extend(subnet_env);
        out.at_once.push(Effect::Show(Box::new(PassOutcome { plan: Some(*plan), problems })));
    }
}

/// The end of a pass that leaves the kernel as it is.
fn wait(problem: Problem, out: &mut Effects) {
    out.at_once.push(Effect::Show(Box::new(PassOutcome { plan: None, problems: vec![problem] })));
}

#[cfg(test)]
mod tests;
