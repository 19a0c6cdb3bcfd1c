//! From the topology to the desired state of kernel, tunnel and prober.
//!
//! A [`Planner`] keeps the plan and recomputes the parts that a change affects: one member, or all of them after a
//! global change.
//!
//! A packet to a pod goes direct or through the tunnel, or is dropped: every prefix of the topology gets exactly one
//! route, and the floor covers the rest of the network. Which path a peer has is decided in [`crate::path`].

mod direct_peers;
mod inputs;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cow_map::CowMap;
use etcd_schema::{NetworkConfig, PeerName, SubnetKey};
use ipnet::IpNet;

use crate::{
    address::Family,
    backend::PathKind,
    interface::InterfaceName,
    kernel_state,
    path::{ChosenPath, Via},
    plan::{
        direct_peers::DirectPeers,
        inputs::{Common, FamilyPlan, Inputs},
    },
    problem::Problem,
    target::{PathStates, Targets},
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

/// What has been observed of peers.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The state of eligible paths.
    pub paths: PathStates,
    /// Largest inner packet per tunnel peer, where it is below the device's MTU.
    pub inner_mtu: BTreeMap<String, u16>,
    /// Where tunnel peers were heard from in an earlier run, by name. Does not change while the daemon runs.
    pub roamed: Arc<BTreeMap<String, SocketAddr>>,
    /// What this machine keeps out of the clear now.
    pub programmed: kernel_state::Floor,
    /// Paths that were direct in the kernel when the daemon started, by next hop and prefix.
    pub direct_at_start: Vec<(IpNet, IpAddr)>,
}

/// What everything must become.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Links, addresses, routes, rules, firewall.
    pub kernel: kernel_state::Desired,
    /// Peers and own addresses of the tunnel.
    pub tunnel: tunnel_table::TunnelTable,
    /// Paths to be probed.
    pub probes: Targets,
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
pub fn plan(topology: &Topology, local: &Local, observed: &Observed) -> Plan {
    Planner::default().plan(topology, local, observed)
}

/// Keeps the plan up to date. What it says depends on what it is given last, and on nothing before.
#[derive(Debug, Default)]
pub struct Planner {
    /// What the last plan was made for, unless it was empty.
    seen: Option<LastInputs>,
    near: DirectPeers,
    paths: CowMap<(PeerId, Family), ChosenPath>,
    owners: CowMap<IpNet, PeerId>,
    peers: CowMap<String, Arc<tunnel_table::PeerConfig>>,
    routes: CowMap<IpNet, kernel_state::PeerRoute>,
}

#[derive(Debug)]
struct LastInputs {
    frame: PlanFrame,
    members: CowMap<PeerId, Arc<NodePeer>>,
    paths: PathStates,
    inner_mtu: BTreeMap<String, u16>,
}

/// What concerns every member.
#[derive(Debug, Clone, PartialEq)]
struct PlanFrame {
    local: Local,
    network: Option<NetworkConfig>,
    own_subnets: Vec<SubnetKey>,
    outside: CowMap<PeerName, Arc<ExternalPeer>>,
    roamed: Arc<BTreeMap<String, SocketAddr>>,
    direct_at_start: Vec<(IpNet, IpAddr)>,
    /// Largest inner packet of outside peers, who are planned with the frame.
    outside_mtu: Vec<(String, u16)>,
}

impl Planner {
    /// The paths that are to be probed. Their states, as [`Observed::paths`], decide what [`Self::plan`] makes of the same
    /// topology.
    pub fn targets(&mut self, topology: &Topology, local: &Local, observed: &Observed) -> Targets {
        let inputs = Inputs { topology, local, observed };
        if inputs.admitted().is_err() {
            return Targets::default();
        }
        self.near.update(&inputs);
        self.near.targets(&inputs.overlay())
    }

    /// The plan for `topology` on this machine. Costs what differs from the last one.
    pub fn plan(&mut self, topology: &Topology, local: &Local, observed: &Observed) -> Plan {
        let inputs = Inputs { topology, local, observed };
        match inputs.admitted() {
            Ok(problem) => self.whole(&inputs, problem.into_iter().collect()),
            Err(problem) => self.empty(&inputs, problem.into_iter().collect()),
        }
    }

    /// Nothing may be carried: no paths and no peers. The floor and the guard stay under what was in force, and lie under
    /// every network that covers nothing of the underlay, or pods' packets would leave in the clear by the default route.
    fn empty(&mut self, inputs: &Inputs<'_>, problems: Vec<Problem>) -> Plan {
        *self = Self::default();
        let mtu = inputs.mtu();
        let floor = inputs.floor_of_empty();
        Plan {
            kernel: inputs.desired(
                mtu,
                Vec::new(),
                CowMap::default(),
                kernel_state::Firewall::default(),
                floor,
                Vec::new(),
            ),
            tunnel: tunnel_table::TunnelTable { mtu, ..tunnel_table::TunnelTable::default() },
            probes: Targets::default(),
            paths: CowMap::default(),
            owners: CowMap::default(),
            mtu,
            problems,
        }
    }

    fn whole(&mut self, inputs: &Inputs<'_>, mut problems: Vec<Problem>) -> Plan {
        let Inputs { topology, observed, .. } = *inputs;
        let mtu = inputs.mtu();
        let outside = inputs.accepted_outside(&mut problems);
        let overlay = inputs.overlay();
        let frame = inputs.frame();
        let seen = self.seen.take().filter(|seen| seen.frame == frame);
        let common = Common { inputs, outside: &outside, overlay: &overlay, mtu };
        if seen.is_none() {
            *self = Self { near: std::mem::take(&mut self.near), ..Self::default() };
            self.plan_outside(&common);
        }
        self.near.update(inputs);
        let before = seen.as_ref().map(|seen| seen.members.clone()).unwrap_or_default();
        let mut changed: BTreeSet<PeerId> = topology.members.changes(&before).into_iter().cloned().collect();
        changed.extend(seen.iter().flat_map(|seen| seen.observed_otherwise(observed)));
        self.replan(&before, &changed, &common);
        self.seen = Some(LastInputs {
            frame,
            members: topology.members.clone(),
            paths: observed.paths.clone(),
            inner_mtu: observed.inner_mtu.clone(),
        });
        let mut firewall = inputs.firewall();
        for (at, near) in self.near.iter() {
            firewall.accepted.extend(near.prefixes.iter().cloned());
            if let Some(ChosenPath { via: Via::Link(_, link), .. }) = self.paths.get(at) {
                let direct = |on: &kernel_state::PrefixOn| kernel_state::PrefixVia {
                    prefix: on.prefix,
                    dev: on.dev.clone(),
                    via: link.next_hop,
                };
                firewall.direct.extend(near.prefixes.iter().map(direct));
            }
        }
        let floor = kernel_state::Floor {
            networks: topology.networks().collect(),
            outside: outside.iter().flat_map(|(_, peer)| peer.allowed_ips.iter().copied()).collect(),
        };
        let addresses: Vec<IpAddr> = overlay.values().copied().collect();
        Plan {
            tunnel: tunnel_table::TunnelTable {
                peers: self.peers.clone(),
                local: topology.own_prefixes().collect(),
                overlay: addresses.clone(),
                mtu,
            },
            kernel: inputs.desired(mtu, addresses, self.routes.clone(), firewall, floor, self.near.probe_routes()),
            probes: self.near.targets(&overlay),
            paths: self.paths.clone(),
            owners: self.owners.clone(),
            mtu,
            problems,
        }
    }

    /// Plans these members again, of which some are gone.
    fn replan(&mut self, before: &CowMap<PeerId, Arc<NodePeer>>, changed: &BTreeSet<PeerId>, common: &Common<'_>) {
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
                let here = member.and_then(|member| common.of_family(owner, member, family));
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
            let speaking = member.filter(|member| !member.keys.is_empty());
            for prefix in speaking.iter().flat_map(|member| member.prefixes()) {
                kept.insert(prefix);
                self.owners.set(prefix, Some(owner.clone()));
            }
            let name = owner.to_string();
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
    fn plan_outside(&mut self, common: &Common<'_>) {
        for (name, peer) in common.outside {
            let who = PeerId::Outside((*name).clone()).to_string();
            for net in &peer.allowed_ips {
                let Some(src) = common.overlay.get(&Family::of_net(net)) else { continue };
                let via = Via::Tun(PathKind::Wireguard);
                let mtu = common.inputs.route_mtu(&who, via, common.mtu);
                let via = common.inputs.route_via(via, Family::of_net(net));
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

impl LastInputs {
    /// The members of whom something else is observed now.
    fn observed_otherwise(&self, observed: &Observed) -> BTreeSet<PeerId> {
        let mut owners = BTreeSet::new();
        if self.paths != observed.paths {
            let ids = self.paths.keys().chain(observed.paths.keys());
            let others = ids.filter(|id| self.paths.get(*id) != observed.paths.get(*id));
            owners.extend(others.map(|(id, _)| PeerId::Node(id.clone())));
        }
        if self.inner_mtu != observed.inner_mtu {
            let names = self.inner_mtu.keys().chain(observed.inner_mtu.keys());
            let others = names.filter(|name| self.inner_mtu.get(*name) != observed.inner_mtu.get(*name));
            let owner = |name: &String| PeerId::named(name).filter(|owner| !matches!(owner, PeerId::Outside(_)));
            owners.extend(others.filter_map(owner));
        }
        owners
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
