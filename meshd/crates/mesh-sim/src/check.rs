//! The invariants, checked after each step.

use std::{collections::BTreeSet, net::IpAddr};

use control_core::membership::MembershipState;
use etcd_schema::{Key, SubnetKey};
use ipnet::IpNet;
use mesh::{
    address::{Family, overlap, prefixes},
    kernel_state::RouteVia,
    path::DirectState,
    plan::plan,
    topology::PeerId,
    tunnel_table::TunnelTable,
};
use node_core::Stance;
use rand::Rng as _;

use crate::{process::PassResult, world::MeshSim};

/// One pass in so many is compared with a plan from nothing.
const ORACLE: u32 = 16;

impl MeshSim {
    /// What must be true of a node after a step.
    pub(crate) fn check(&mut self, node: usize, passed: Option<&PassResult>) {
        self.check_kernel(node);
        let Some(passed) = passed else { return };
        let (seed, id) = (self.seed, self.machines[node].id.clone());
        one_owner(seed, &passed.plan.tunnel);
        self.check_proofs(node, passed);
        let running = self.processes[node].as_ref().unwrap();
        assert!(running.guarded, "seed {seed}: {id}: peers and routes stand before rules that judge their packets");
        let stance = running.node.mesh().stance(&running.status);
        if running.planned_stance == Some(stance) && stance == Stance::Acts {
            self.check_peers_stay(node, passed);
        }
        let running = self.processes[node].as_mut().unwrap();
        (running.planned_records, running.planned_stance) = (std::sync::Arc::clone(&running.records), Some(stance));
        if stance == Stance::Acts && self.rng.random_range(0..ORACLE) == 0 {
            let running = self.processes[node].as_ref().unwrap();
            let (topology, local) = (running.node.mesh().topology(), running.node.local());
            let mut fresh = plan(self.now, topology, local, &passed.observed, &mut running.agents.clone());
            fresh.kernel.firewall.accepted.clone_from(&passed.plan.kernel.firewall.accepted);
            assert_eq!(
                fresh.kernel, passed.plan.kernel,
                "seed {seed}: {id}: the kernel's plan is not that from nothing"
            );
            assert_eq!(
                fresh.tunnel, passed.plan.tunnel,
                "seed {seed}: {id}: the tunnel's plan is not that from nothing"
            );
            let mut resolver = mesh::resolver::TopologyResolver::new(id.clone());
            resolver.apply(&running.records);
            assert_eq!(
                resolver.topology().members,
                running.node.mesh().resolver().topology().members,
                "seed {seed}: {id}: the topology is not that from nothing"
            );
        }
    }

    /// Invariant 1, of what the kernel holds, whichever program put it there.
    fn check_kernel(&self, node: usize) {
        let (seed, machine) = (self.seed, &self.machines[node]);
        let kernel = &machine.kernel;
        for route in &kernel.routes {
            let id = &machine.id;
            assert!(
                kernel.floor.prefixes().any(|net| net.contains(&route.dst)),
                "seed {seed}: {id}: no fallback lies under {}",
                route.dst
            );
            if let RouteVia::Neighbour { via, .. } = &route.via {
                let guarded = kernel.guarded.iter().any(|net| net.contains(&route.dst));
                assert!(guarded, "seed {seed}: {id}: no guard for {}", route.dst);
                let on_link = self.find(|other| IpAddr::V4(other.address) == *via).map(|at| self.machines[at].lan);
                assert_eq!(on_link, Some(machine.lan), "seed {seed}: {id}: {via} is on no link of it");
            }
        }
    }

    /// Invariant 1: what goes direct is proven, or was in use before a restart, and its sources are accepted.
    fn check_proofs(&self, node: usize, passed: &PassResult) {
        let (seed, id) = (self.seed, &self.machines[node].id);
        let running = self.processes[node].as_ref().unwrap();
        let targets = running.agents.targets();
        for route in passed.plan.kernel.routes.values() {
            let RouteVia::Neighbour { via, dev } = &route.via else { continue };
            let Some(PeerId::Node(owner)) = passed.plan.owners.get(&route.dst) else {
                panic!("seed {seed}: {id}: {} has no owner and goes direct", route.dst);
            };
            let path = (owner.clone(), Family::V4);
            let target = targets.peers.get(&path);
            assert_eq!(
                target.map(|target| target.next_hop),
                Some(*via),
                "seed {seed}: {id}: {} is not probed",
                route.dst
            );
            let proven = running.echoed.contains(&path) || running.resumed.contains(via);
            let state = running.agents.state(&path);
            let holds = proven && state == Some(DirectState::Direct);
            assert!(holds, "seed {seed}: {id}: {} goes direct unproven: {state:?}", route.dst);
            let firewall = &passed.plan.kernel.firewall;
            let accepts = firewall.accepted.iter().any(|on| on.prefix == route.dst && on.dev == *dev);
            let opens = firewall.direct.iter().any(|direct| direct.prefix == route.dst && direct.via == *via);
            assert!(accepts && opens, "seed {seed}: {id}: the guard does not know {}", route.dst);
        }
        let networks: Vec<IpNet> = passed.plan.kernel.floor.prefixes().copied().collect();
        let known = passed.observed.programmed.prefixes().all(|net| networks.contains(net));
        assert!(known, "seed {seed}: {id}: the fallback routes go");
    }

    /// Invariant 4: a peer whose records, and whose rivals', are the same stays in the tunnel with its keys.
    fn check_peers_stay(&self, node: usize, passed: &PassResult) {
        let (seed, id) = (self.seed, &self.machines[node].id);
        let running = self.processes[node].as_ref().unwrap();
        let (before, after) = (&running.planned_records, &running.records);
        if before.config != after.config {
            return;
        }
        let changed: BTreeSet<PeerId> = {
            let ids = after.nodes.changes(&before.nodes).into_iter().cloned().map(PeerId::Node);
            let leases = after.subnets.changes(&before.subnets).into_iter();
            let of = |key: &SubnetKey| {
                let records = [before.subnets.get(key), after.subnets.get(key)];
                records.into_iter().flatten().filter_map(|record| record.value.node.clone()).map(PeerId::Node).collect()
            };
            ids.chain(leases.flat_map(|key: &SubnetKey| -> Vec<PeerId> { of(key) })).collect()
        };
        let moved: Vec<IpNet> = after.subnets.changes(&before.subnets).into_iter().flat_map(prefixes).collect();
        for (name, peer) in passed.before.peers.iter() {
            let Some(owner) = PeerId::named(name).filter(|owner| !changed.contains(owner)) else { continue };
            let now = passed.plan.tunnel.peers.get(name);
            let same = now.is_some_and(|now| now.keys == peer.keys && now.allowed == peer.allowed);
            let rival = peer.allowed.iter().any(|net| moved.iter().any(|other| overlap(net, other)));
            assert!(same || rival, "seed {seed}: {id}: the session with {owner} goes although nothing of it changed");
        }
    }

    /// What must be true when all is at rest.
    pub(crate) fn check_rest(&self) {
        let seed = self.seed;
        for (node, machine) in self.machines.iter().enumerate() {
            let running = self.processes[node].as_ref().unwrap_or_else(|| panic!("seed {seed}: {} is off", machine.id));
            let state = &running.status.state;
            let MembershipState::Joined { subnet } = state else { panic!("seed {seed}: {} is {state:?}", machine.id) };
            let key = Key::Subnet(*subnet).to_string();
            let id = machine.id.to_string();
            assert!(self.history.subnets_of(&id).eq([&key]), "seed {seed}: {id} leases more than {key}");
            assert_eq!(running.status.problems, [], "seed {seed}: {id}");
            assert_eq!(*running.records.problems, [], "seed {seed}: {id}");
            assert!(self.keys_below("alive/").contains_key(format!("alive/{id}").as_str()), "seed {seed}: {id} is off");
        }
        for from in 0..self.machines.len() {
            for to in (0..self.machines.len()).filter(|to| *to != from) {
                self.check_delivery(from, to);
            }
        }
    }

    /// A packet from a pod of one node reaches a pod of another one, directly where both are on one link.
    fn check_delivery(&self, from: usize, to: usize) {
        let (seed, ids) = (self.seed, [from, to].map(|node| self.machines[node].id.to_string()));
        let pod = |node: usize| {
            let subnet = self.processes[node].as_ref().unwrap().status.subnet.unwrap();
            prefixes(&subnet).next().unwrap().hosts().nth(9).unwrap()
        };
        let (source, destination) = (pod(from), pod(to));
        let sender = self.processes[from].as_ref().unwrap();
        let receiver = self.processes[to].as_ref().unwrap();
        let is_local = receiver.table.local.iter().any(|net| net.contains(&destination));
        let delivered = match self.machines[from].kernel.route(destination) {
            Some(RouteVia::Neighbour { via, dev }) => {
                let accepted = &self.machines[to].kernel.accepted;
                via == IpAddr::V4(self.machines[to].address)
                    && self.link(from, to)
                    && is_local
                    && accepted.iter().any(|on| on.prefix.contains(&source) && on.dev == dev)
            }
            Some(RouteVia::Tunnel) => {
                let owner = |table: &TunnelTable, address: IpAddr| {
                    let owns = |net: &IpNet| net.contains(&address);
                    table.peers.values().find(|peer| peer.allowed.iter().any(owns)).map(|peer| peer.keys.clone())
                };
                let key = |node: usize| vec![self.machines[node].facts.public_key];
                self.machines[from].lan != self.machines[to].lan
                    && owner(&sender.table, destination) == Some(key(to))
                    && owner(&receiver.table, source) == Some(key(from))
                    && is_local
            }
            Some(RouteVia::Vtep { .. } | RouteVia::Unreachable) | None => false,
        };
        let route = self.machines[from].kernel.route(destination);
        assert!(delivered, "seed {seed}: {ids:?}: {source} does not reach {destination} by {route:?}");
    }
}

/// Invariant 3: of one prefix there is one owner.
fn one_owner(seed: u64, table: &TunnelTable) {
    let mut all: Vec<(&IpNet, &str)> = table.local.iter().map(|net| (net, "this node")).collect();
    for peer in table.peers.values() {
        all.extend(peer.allowed.iter().map(|net| (net, peer.name.as_str())));
    }
    all.sort();
    for pair in all.windows(2) {
        assert!(!overlap(pair[0].0, pair[1].0), "seed {seed}: {pair:?} overlap in one tunnel");
    }
}
