//! The mesh as one node knows it, the part that it may act on, and the plan that follows.

use std::{collections::HashMap, time::Instant};

use control_core::{core::ControlStatus, membership::MembershipState};
use cow_map::CowMap;
use etcd_schema::{Alive, NodeId};
use mesh::{
    address::{overlap, prefixes},
    kernel_state::PrefixOn,
    path::PathAgents,
    plan::{Local, Observed, Plan, Planner},
    records::{Record, Records},
    resolver::TopologyResolver,
    topology::{PeerId, Topology},
};

use super::{direct_sources::DirectSources, retired_vxlan::RetiredVxlan};

/// What a node may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stance {
    /// There was never a topology to act on: the kernel stays as an earlier run left it.
    Uninformed,
    /// Another daemon may have the identity: the kernel stays as an earlier run left it.
    Unconfirmed,
    /// Another daemon has the identity: nothing to send, and nothing to answer with.
    Cloned,
    /// It acts as the node.
    Acts,
}

/// The mesh as one node sees it.
#[derive(Debug)]
pub struct MeshState {
    id: NodeId,
    known: bool,
    resolver: TopologyResolver,
    /// The resolver's as this node may act on it, see [`Self::act_on`].
    topology: Topology,
    cloned: bool,
    planner: Planner,
    accepted: DirectSources,
    retired: RetiredVxlan,
    alive: CowMap<NodeId, Record<Alive>>,
    /// Boot and start of each node as they were last seen, also while it shows no sign of life.
    starts: HashMap<NodeId, (String, u64)>,
    observed: Observed,
}

impl MeshState {
    /// The node `id` as its daemon starts. `accepted`: the sources that an earlier run accepted direct.
    pub(crate) fn new(
        now: Instant,
        id: NodeId,
        observed: Observed,
        accepted: impl IntoIterator<Item = PrefixOn>,
    ) -> Self {
        Self {
            known: false,
            resolver: TopologyResolver::new(id.clone()),
            topology: Topology::default(),
            cloned: false,
            planner: Planner::default(),
            accepted: DirectSources::at_start(accepted, now),
            retired: RetiredVxlan::default(),
            alive: CowMap::default(),
            starts: HashMap::new(),
            observed,
            id,
        }
    }

    /// Takes in what etcd says, as far as it may be acted on. Returns the peers whose daemon has restarted: this node's
    /// session with them predates that.
    pub(crate) fn apply_records(&mut self, records: &Records, cache_usable: bool) -> Vec<PeerId> {
        if !records.synced && !cache_usable {
            return Vec::new();
        }
        self.known = true;
        self.resolver.apply(records);
        let restarted = self.restarted(records);
        self.alive = records.alive.clone();
        restarted
    }

    /// That a peer shows no sign of life, or comes back as it was, is no restart.
    fn restarted(&mut self, records: &Records) -> Vec<PeerId> {
        let mut restarted = Vec::new();
        for id in records.alive.changes(&self.alive) {
            let Some(record) = records.alive.get(id).filter(|_| *id != self.id) else { continue };
            let start = (record.value.boot_id.clone(), record.value.start_count);
            if self.starts.insert(id.clone(), start.clone()).is_some_and(|before| before != start) {
                restarted.push(PeerId::Node(id.clone()));
            }
        }
        let members = &self.resolver.topology().members;
        if self.starts.len() > 2 * members.len() + 16 {
            self.starts.retain(|id, _| members.get(&PeerId::Node(id.clone())).is_some());
        }
        restarted
    }

    /// What this node may do.
    #[must_use]
    pub fn stance(&self, status: &ControlStatus) -> Stance {
        match (self.known, &status.state) {
            (false, _) => Stance::Uninformed,
            (true, MembershipState::Cloned { .. }) => Stance::Cloned,
            (true, _) if status.holds_identity => Stance::Acts,
            (true, _) => Stance::Unconfirmed,
        }
    }

    /// Takes the mesh as this node may act on it now.
    pub(crate) fn act_on(&mut self, status: &ControlStatus) {
        self.topology = self.resolver.topology().clone();
        self.cloned = self.stance(status) == Stance::Cloned;
        if self.cloned {
            // External peers' prefixes stay guarded.
            self.topology.own_subnets.clear();
            self.topology.members = CowMap::default();
        } else {
            self.keep_own_subnet(status);
        }
    }

    /// Own subnets while another program has deleted the key, until it is put back: what is in use stays in use.
    fn keep_own_subnet(&mut self, status: &ControlStatus) {
        let stays = matches!(
            status.state,
            MembershipState::Joining | MembershipState::Joined { .. } | MembershipState::Connecting
        );
        let Some(subnet) = status.subnet.filter(|_| stays) else { return };
        if !self.topology.own_subnets.is_empty() || self.topology.network.is_none() {
            return;
        }
        let mut held = self.topology.members.values().flat_map(|member| member.prefixes());
        if !held.any(|held| prefixes(&subnet).any(|own| overlap(&own, &held))) {
            self.topology.own_subnets.push(subnet);
        }
    }

    /// What everything must become.
    pub(crate) fn plan(&mut self, now: Instant, local: &Local, agents: &mut PathAgents) -> Plan {
        let mut plan = self.planner.plan(now, &self.topology, local, &self.observed, agents);
        if self.cloned {
            plan.tunnel.peers = CowMap::default();
        } else {
            self.accepted.linger(&mut plan.kernel.firewall.accepted, &plan.owners, now);
            self.retired.linger(&mut plan.kernel.vxlan, &plan.owners, now);
        }
        self.observed.programmed = plan.kernel.floor.clone();
        plan
    }

    /// When a plan of the same mesh is another one.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.accepted.next_deadline().into_iter().chain(self.retired.next_deadline()).min()
    }

    /// What is known of earlier plans.
    #[must_use]
    pub const fn observed(&self) -> &Observed {
        &self.observed
    }

    /// All that etcd says, with what this node may not act on.
    #[must_use]
    pub fn resolver(&self) -> &TopologyResolver {
        &self.resolver
    }

    /// The mesh as this node acts on it.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Nodes that show a sign of life in etcd.
    #[must_use]
    pub fn alive(&self) -> &CowMap<NodeId, Record<Alive>> {
        &self.alive
    }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
