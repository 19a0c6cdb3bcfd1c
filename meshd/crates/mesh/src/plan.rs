//! From the topology to the desired state of kernel and tunnel.
//!
//! A [`Planner`] keeps the plan and recomputes the parts that a change affects: one member, or all of them after a
//! global change.
//!
//! A packet to a pod goes direct or through the tunnel, or is dropped: every prefix of the topology gets exactly one
//! route, and the floor covers the rest of the network. Which path a peer has is decided by its agent in
//! [`crate::path`]: the planner tells the agents what could carry packets, and asks them.

mod direct_peers;
mod inputs;
mod vteps;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use cow_map::CowMap;
use etcd_schema::{NetworkConfig, PeerName, SubnetKey, Vtep};
use ipnet::IpNet;

use crate::{
    address::Family,
    interface::InterfaceName,
    kernel_state,
    path::{Candidates, Carrier, ChosenPath, PathAgents, Via},
    plan::{
        direct_peers::DirectPeer,
        inputs::{Common, FamilyPlan, Inputs},
        vteps::VtepPeer,
    },
    problem::Problem,
    topology::{ExternalPeer, NodePeer, PeerId, Topology},
    tunnel_table,
};

/// What is the case on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Local {
    /// The site of this node.
    pub site: Option<String>,
    /// The underlay, per family.
    pub underlay: BTreeMap<Family, UnderlayLink>,
    /// This node's ends of VXLAN tunnels, by family: an address of the underlay each, without address translation.
    pub vteps: BTreeMap<Family, Vtep>,
    /// Whether other nodes can call this one.
    pub has_endpoint: bool,
    /// The tunnel's port.
    pub listen_port: u16,
    /// Addresses that must never be routed into the mesh (own addresses, next hops, etcd), each with what it is.
    pub protected: Vec<(IpAddr, String)>,
    /// Masquerade what leaves the mesh.
    pub ip_masq: bool,
    /// Answer a foreign FORWARD drop.
    pub forward_accept: bool,
}

/// The interface that carries the outer packets of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayLink {
    /// Its name.
    pub name: InterfaceName,
    /// Its index.
    pub index: u32,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// Its addresses with prefix length.
    pub addresses: Vec<IpNet>,
}

/// What is known of earlier plans, and of earlier runs.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Where tunnel peers were heard from in an earlier run, by name. Does not change while the daemon runs.
    pub roamed: Arc<BTreeMap<String, SocketAddr>>,
    /// What this machine keeps out of the clear now.
    pub programmed: kernel_state::Floor,
}

/// What everything must become.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Links, addresses, routes, rules, firewall.
    pub kernel: kernel_state::Desired,
    /// Peers and own addresses of the tunnel.
    pub tunnel: tunnel_table::TunnelTable,
    /// The path of each member and family that has a prefix, and why that one.
    pub paths: CowMap<(PeerId, Family), ChosenPath>,
    /// Who may send with a source of each prefix: the members that can be spoken to.
    pub owners: CowMap<IpNet, PeerId>,
    /// MTU of pods and of the TUN device.
    pub mtu: u16,
    /// What of the topology this machine refuses.
    pub problems: Vec<Problem>,
}

/// The plan for `topology` on this machine, without anything planned before.
#[must_use]
pub fn plan(now: Instant, topology: &Topology, local: &Local, observed: &Observed, agents: &mut PathAgents) -> Plan {
    Planner::default().plan(now, topology, local, observed, agents)
}

/// Keeps the plan up to date. What it says depends on what it is given last, and on nothing before. It is one agents'
/// only planner.
#[derive(Debug, Default)]
pub struct Planner {
    /// What the last plan was made for, unless it was empty.
    seen: Option<LastInputs>,
    direct_peers: BTreeMap<(PeerId, Family), DirectPeer>,
    vtep_peers: BTreeMap<(Family, PeerId), VtepPeer>,
    paths: CowMap<(PeerId, Family), ChosenPath>,
    owners: CowMap<IpNet, PeerId>,
    peers: CowMap<String, Arc<tunnel_table::PeerConfig>>,
    routes: CowMap<IpNet, kernel_state::PeerRoute>,
}

#[derive(Debug)]
struct LastInputs {
    frame: PlanFrame,
    members: CowMap<PeerId, Arc<NodePeer>>,
}

/// What concerns every member.
#[derive(Debug, Clone, PartialEq)]
struct PlanFrame {
    local: Local,
    network: Option<NetworkConfig>,
    own_subnets: Vec<SubnetKey>,
    outside: CowMap<PeerName, Arc<ExternalPeer>>,
    roamed: Arc<BTreeMap<String, SocketAddr>>,
}

impl Planner {
    /// The plan for `topology` on this machine, by the paths that the agents choose of these candidates. Costs what differs
    /// from the last one.
    pub fn plan(
        &mut self,
        now: Instant,
        topology: &Topology,
        local: &Local,
        observed: &Observed,
        agents: &mut PathAgents,
    ) -> Plan {
        let inputs = Inputs { topology, local, observed };
        match inputs.admitted() {
            Ok(problem) => self.whole(now, &inputs, problem.into_iter().collect(), agents),
            Err(problem) => self.empty(&inputs, problem.into_iter().collect(), agents),
        }
    }

    /// Nothing may be carried: no paths and no peers. The floor and the guard stay under what was in force, and lie under
    /// every network that covers nothing of the underlay, or pods' packets would leave in the clear by the default route.
    fn empty(&mut self, inputs: &Inputs<'_>, problems: Vec<Problem>, agents: &mut PathAgents) -> Plan {
        *self = Self::default();
        agents.set_own(BTreeMap::new());
        agents.retain(|_| false);
        agents.take_changed();
        let mtu = inputs.mtu();
        let floor = inputs.floor_of_empty();
        Plan {
            kernel: inputs.desired(Vec::new(), CowMap::default(), kernel_state::Firewall::default(), floor, Vec::new()),
            tunnel: tunnel_table::TunnelTable { mtu: inputs.tunnel_mtu(), ..tunnel_table::TunnelTable::default() },
            paths: CowMap::default(),
            owners: CowMap::default(),
            mtu,
            problems,
        }
    }

    fn whole(
        &mut self,
        now: Instant,
        inputs: &Inputs<'_>,
        mut problems: Vec<Problem>,
        agents: &mut PathAgents,
    ) -> Plan {
        let topology = inputs.topology;
        let mtu = inputs.mtu();
        let outside = inputs.accepted_outside(&mut problems);
        let overlay = inputs.overlay();
        let frame = inputs.frame();
        let common = Common { inputs, outside: &outside, overlay: &overlay, mtu };
        // External peers are planned with the frame.
        let seen = self.seen.take().filter(|seen| seen.frame == frame && !agents.has_changed_outside());
        agents.set_own(overlay.clone());
        if seen.is_none() {
            *self = Self::default();
            let accepted = |name: &PeerName| outside.iter().any(|(other, _)| *other == name);
            agents.retain(|peer| match peer {
                PeerId::Outside(name) => accepted(name),
                PeerId::Node(_) | PeerId::Lease(_) => topology.members.get(peer).is_some(),
            });
            self.plan_outside(now, &common, agents);
        }
        let before = seen.map(|seen| seen.members).unwrap_or_default();
        let mut changed: BTreeSet<PeerId> = topology.members.changes(&before).into_iter().cloned().collect();
        for peer in &changed {
            self.set_candidates(now, peer, inputs, agents);
        }
        if !overlay.is_empty() {
            agents.forget_earlier();
        }
        changed.extend(agents.take_changed().into_iter().filter(|peer| !matches!(peer, PeerId::Outside(_))));
        self.replan(&before, &changed, &common, agents);
        self.seen = Some(LastInputs { frame, members: topology.members.clone() });
        let mut firewall = inputs.firewall();
        for (at, peer) in &self.direct_peers {
            firewall.accepted.extend(peer.prefixes.iter().cloned());
            if let Some(ChosenPath { via: Via::Link(_, link), .. }) = self.paths.get(at) {
                let direct = |on: &kernel_state::PrefixOn| kernel_state::PrefixVia {
                    prefix: on.prefix,
                    dev: on.dev.clone(),
                    via: link.next_hop,
                };
                firewall.direct.extend(peer.prefixes.iter().map(direct));
            }
        }
        let vxlan = self.vxlan(inputs, mtu, &mut firewall);
        let floor = kernel_state::Floor {
            networks: topology.networks().collect(),
            outside: outside.iter().flat_map(|(_, peer)| peer.allowed_ips.iter().copied()).collect(),
        };
        let addresses: Vec<IpAddr> = overlay.values().copied().collect();
        let probes = self.direct_peers.values().filter_map(|peer| peer.probe.clone());
        Plan {
            tunnel: tunnel_table::TunnelTable {
                peers: self.peers.clone(),
                local: topology.own_prefixes().collect(),
                overlay: addresses.clone(),
                mtu: inputs.tunnel_mtu(),
            },
            kernel: kernel_state::Desired {
                vxlan,
                ..inputs.desired(addresses, self.routes.clone(), firewall, floor, probes.collect())
            },
            paths: self.paths.clone(),
            owners: self.owners.clone(),
            mtu,
            problems,
        }
    }

    /// Tells a member's agent what could carry packets to it; the member may be gone.
    fn set_candidates(&mut self, now: Instant, peer: &PeerId, inputs: &Inputs<'_>, agents: &mut PathAgents) {
        let member = inputs.topology.members.get(peer).map(Arc::as_ref);
        match member {
            Some(member) => agents.set_candidates(now, peer, inputs.candidates(peer, member)),
            None => agents.on_removed(peer),
        }
        for family in Family::BOTH {
            let at = (peer.clone(), family);
            match member.and_then(|member| inputs.direct_peer(peer, member, family)) {
                Some(direct) => drop(self.direct_peers.insert(at.clone(), direct)),
                None => drop(self.direct_peers.remove(&at)),
            }
            let (family, peer) = (at.1, at.0);
            match member.and_then(|member| inputs.vtep_peer(member, family)) {
                Some(vtep) => drop(self.vtep_peers.insert((family, peer), vtep)),
                None => drop(self.vtep_peers.remove(&(family, peer))),
            }
        }
    }

    /// Plans these members again, of which some are gone.
    fn replan(
        &mut self,
        before: &CowMap<PeerId, Arc<NodePeer>>,
        changed: &BTreeSet<PeerId>,
        common: &Common<'_>,
        agents: &PathAgents,
    ) {
        // A prefix may have gone from one of them to another: what is given is not taken afterwards.
        let mut released: BTreeSet<IpNet> = BTreeSet::new();
        for owner in changed {
            released.extend(before.get(owner).iter().flat_map(|member| member.prefixes()));
        }
        let mut kept: BTreeSet<IpNet> = BTreeSet::new();
        let mut routed: BTreeSet<IpNet> = BTreeSet::new();
        for owner in changed {
            let member = common.inputs.topology.members.get(owner).map(Arc::as_ref);
            for family in Family::BOTH {
                let here = member.and_then(|member| common.of_family(owner, member, family, agents));
                let at = (owner.clone(), family);
                match here {
                    Some(FamilyPlan { chosen, routes }) => {
                        for route in routes {
                            routed.insert(route.dst);
                            self.routes.set(route.dst, Some(route));
                        }
                        self.paths.set(at, Some(chosen));
                    }
                    None => {
                        self.paths.set(at, None);
                    }
                }
            }
            let usable = member.filter(|member| member.unusable.is_none());
            for prefix in usable.iter().flat_map(|member| member.prefixes()) {
                kept.insert(prefix);
                self.owners.set(prefix, Some(owner.clone()));
            }
            let name = owner.to_string();
            let speaking = usable.filter(|member| !member.keys.is_empty());
            let peer = speaking.map(|member| Arc::new(common.peer(&name, member)));
            self.peers.set(name, peer);
        }
        for prefix in released {
            if !kept.contains(&prefix) {
                self.owners.set(prefix, None);
            }
            if !routed.contains(&prefix) {
                self.routes.set(prefix, None);
            }
        }
    }

    /// Plans the outside peers; everything else is planned after it.
    fn plan_outside(&mut self, now: Instant, common: &Common<'_>, agents: &mut PathAgents) {
        for (name, peer) in common.outside {
            let owner = PeerId::Outside((*name).clone());
            let who = owner.to_string();
            agents.set_candidates(
                now,
                &owner,
                Candidates { carrier: Carrier::Tunnel { callable: true }, ..Candidates::default() },
            );
            for net in &peer.allowed_ips {
                let family = Family::of_net(net);
                let chosen = common.overlay.get(&family).zip(agents.path(&owner, family));
                let Some((src, ChosenPath { via, .. })) = chosen else { continue };
                let mtu = common.route_mtu(agents.inner_mtu(&owner), via);
                let via = common.inputs.route_via(via, family, None);
                let route = kernel_state::PeerRoute { dst: *net, via, mtu, src: Some(*src) };
                self.routes.insert(*net, route);
            }
            let mut candidates: Vec<SocketAddr> = common.roamed(&who).into_iter().collect();
            candidates.extend(peer.endpoint.filter(|at| !candidates.contains(at)));
            let config = tunnel_table::PeerConfig {
                name: who.clone(),
                keys: vec![peer.public_key],
                preshared_key: peer.preshared_key.clone(),
                allowed: peer.allowed_ips.clone(),
                candidates,
                keepalive: peer.persistent_keepalive.map(|seconds| Duration::from_secs(seconds.into())),
                call_out: false,
            };
            self.peers.insert(who, Arc::new(config));
        }
    }
}

/// An address in `nets` that must not be routed into the mesh. Endpoints of nodes are judged with the records: one bad
/// record must not cost the whole mesh.
pub fn covered(nets: &[IpNet], protected: &[(IpAddr, String)]) -> Option<(IpNet, IpAddr, String)> {
    protected.iter().find_map(|(address, what)| {
        let net = nets.iter().find(|net| net.contains(address))?;
        Some((*net, *address, what.clone()))
    })
}

#[cfg(test)]
mod tests;
