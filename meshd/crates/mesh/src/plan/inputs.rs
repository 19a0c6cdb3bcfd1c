//! Inputs of a plan, and their consequences for one member.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cow_map::CowMap;
use etcd_schema::{BackendKind, NetworkConfig, PeerName};
use ipnet::IpNet;

use super::{Local, Observed, PlanFrame, covered};
use crate::{
    address::{Family, host},
    backend::{PathKind, is_supported},
    interface::InterfaceName,
    kernel_state,
    path::{Candidates, Carrier, ChosenPath, DirectLink, LinkCandidate, PathAgents, Via, eligible},
    problem::{Problem, ProblemCode, covers_underlay},
    topology::{ExternalPeer, NodePeer, PeerId, Topology},
    tunnel_table::{self, CALL_OUT_KEEPALIVE},
    vxlan::{device_name, next_hop},
};

/// Least MTU of an IPv6 link (RFC 8200, 5).
const MIN_MTU: u16 = 1280;
/// Length of the TUN device's queue, in packets.
const TXQUEUELEN: u32 = 4096;

/// What the plan of each member is made of, besides the member.
pub(super) struct Common<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) outside: &'a [(&'a PeerName, &'a ExternalPeer)],
    pub(super) overlay: &'a BTreeMap<Family, IpAddr>,
    pub(super) mtu: u16,
}

/// What is planned of a member in a family that it has a prefix of.
pub(super) struct FamilyPlan {
    pub(super) chosen: ChosenPath,
    pub(super) routes: Vec<kernel_state::PeerRoute>,
}

impl Common<'_> {
    pub(super) fn of_family(
        &self,
        owner: &PeerId,
        member: &NodePeer,
        family: Family,
        agents: &PathAgents,
    ) -> Option<FamilyPlan> {
        let prefixes = prefixes_of(member, family);
        if prefixes.is_empty() {
            return None;
        }
        let inputs = self.inputs;
        let chosen = agents.path(owner, family)?;
        let overlay = member.overlay().find(|address| Family::of(*address) == family);
        let routes = self.overlay.get(&family).map(|src| {
            let mtu = self.route_mtu(agents.inner_mtu(owner), chosen.via);
            let route = |dst: &IpNet| kernel_state::PeerRoute {
                dst: *dst,
                via: inputs.route_via(chosen.via, family, overlay),
                mtu,
                src: Some(*src),
            };
            prefixes.iter().map(route).collect()
        });
        Some(FamilyPlan { routes: routes.unwrap_or_default(), chosen })
    }

    /// One MTU on every path between nodes, so that a path change does not change it; less where the tunnel carries less.
    pub(super) fn route_mtu(&self, inner: Option<u16>, via: Via) -> Option<u16> {
        match via {
            Via::Link(..) | Via::Vtep(..) => Some(self.mtu),
            Via::Tun(_) => inner.filter(|inner| *inner < self.inputs.tunnel_mtu()),
            Via::Nowhere => None,
        }
    }

    pub(super) fn peer(&self, name: &str, member: &NodePeer) -> tunnel_table::PeerConfig {
        let inputs = self.inputs;
        let keepalive = inputs.topology.network.as_ref().and_then(|config| config.backend.persistent_keepalive);
        let keepalive = keepalive.map(|seconds| Duration::from_secs(seconds.get().into()));
        let links = Family::BOTH.into_iter().filter_map(|family| inputs.link(member, family));
        let links = links.map(|link| SocketAddr::new(link.next_hop, member.listen_port));
        let published: Vec<SocketAddr> = links.chain(member.endpoints.iter().copied()).collect();
        // With other carriers a session is made when it is needed.
        let carried = matches!(inputs.carrier(member), Carrier::Tunnel { .. });
        let keepalive = keepalive.filter(|_| carried);
        let calls = carried && !inputs.local.has_endpoint && !published.is_empty();
        let mut candidates: Vec<SocketAddr> = Vec::new();
        for candidate in self.roamed(name).into_iter().chain(published) {
            if !candidates.contains(&candidate) {
                candidates.push(candidate);
            }
        }
        tunnel_table::PeerConfig {
            name: name.to_owned(),
            keys: member.keys.clone(),
            preshared_key: None,
            allowed: member.prefixes().collect(),
            candidates,
            keepalive: if calls { Some(keepalive.unwrap_or(CALL_OUT_KEEPALIVE)) } else { keepalive },
            call_out: calls,
        }
    }

    /// Where a peer was heard from in an earlier run, to be tried first: it worked until then. Not if that is now inside of
    /// the mesh: outer packets never are.
    pub(super) fn roamed(&self, peer: &str) -> Option<SocketAddr> {
        let at = *self.inputs.observed.roamed.get(peer)?;
        let inside = |net: &IpNet| net.contains(&at.ip());
        let of_mesh = self.inputs.topology.networks().any(|net| inside(&net))
            || self.outside.iter().any(|(_, peer)| peer.allowed_ips.iter().any(inside));
        (!of_mesh).then_some(at)
    }
}

/// The prefixes of one family.
pub(super) fn prefixes_of(member: &NodePeer, family: Family) -> Vec<IpNet> {
    member.prefixes().filter(|net| Family::of_net(net) == family).collect()
}

/// What a plan follows from.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) topology: &'a Topology,
    pub(super) local: &'a Local,
    pub(super) observed: &'a Observed,
}

impl<'a> Inputs<'a> {
    /// Whether anything may be programmed. `Ok`: yes, although this may be wrong; `Err`: no, for this reason, or because
    /// there is no config yet, of which the control plane speaks.
    pub(super) fn admitted(&self) -> Result<Option<Problem>, Option<Problem>> {
        let Some(config) = &self.topology.network else { return Err(None) };
        let problem = self.config_problem(config);
        // What is in force is not withdrawn because the underlay has moved into it, nor by a change of other networks.
        let is_in_force = |net: &IpNet| self.observed.programmed.networks.contains(net);
        let mut refused = self.topology.networks().filter(|net| !is_supported(config.backend.kind) || self.covers(net));
        if problem.is_some() && !refused.all(|net| is_in_force(&net)) { Err(problem) } else { Ok(problem) }
    }

    /// Whether the network covers an address that must stay reachable.
    fn covers(&self, network: &IpNet) -> bool {
        covered(std::slice::from_ref(network), &self.local.protected).is_some()
    }

    /// What stays closed while nothing may be carried: what was in force, and every network that covers no underlay address.
    pub(super) fn floor_of_empty(&self) -> kernel_state::Floor {
        let mut floor = self.observed.programmed.clone();
        for network in self.topology.networks().filter(|network| !self.covers(network)) {
            if !floor.networks.contains(&network) {
                floor.networks.push(network);
            }
        }
        floor
    }

    /// This node's overlay address of each family.
    pub(super) fn overlay(&self) -> BTreeMap<Family, IpAddr> {
        self.topology.own_overlay().into_iter().map(|address| (Family::of(address), address)).collect()
    }

    /// Why nothing of this network may be programmed here.
    fn config_problem(&self, config: &NetworkConfig) -> Option<Problem> {
        if !is_supported(config.backend.kind) {
            return Some(Problem::new(
                ProblemCode::BackendNotSupported,
                format!("config: Backend.Type {:?} is not supported by this version", config.backend.kind),
                "put a config with \"Type\": \"wireguard\", \"vxlan\" or \"host-gw\"",
            ));
        }
        let networks: Vec<IpNet> = self.topology.networks().collect();
        covered(&networks, &self.local.protected).map(|(net, address, what)| {
            let remedy =
                "meshctl check config FILE && etcdctl put /meshd/config < FILE # with networks that no site uses";
            covers_underlay("config: the network", net, format_args!("{address}, {what}"), remedy)
        })
    }

    pub(super) fn frame(&self) -> PlanFrame {
        PlanFrame {
            local: self.local.clone(),
            network: self.topology.network.clone(),
            own_subnets: self.topology.own_subnets.clone(),
            outside: self.topology.outside.clone(),
            roamed: Arc::clone(&self.observed.roamed),
        }
    }

    /// MTU of pods and of the TUN device: `Backend.MTU` if set, else min(interface, 1500) less what the costliest path kind
    /// adds.
    pub(super) fn mtu(&self) -> u16 {
        let backend = self.topology.network.as_ref().map(|config| config.backend.clone()).unwrap_or_default();
        let ipv6 = self.topology.networks().any(|network| Family::of_net(&network) == Family::V6);
        backend.mtu.map_or_else(|| self.mtu_after(PathKind::largest_overhead(&backend, ipv6)), |mtu| mtu.get())
    }

    /// MTU of the TUN device: that of pods, unless packets between nodes do not go there and external peers' take more.
    pub(super) fn tunnel_mtu(&self) -> u16 {
        let kind = self.topology.network.as_ref().map_or(BackendKind::Wireguard, |config| config.backend.kind);
        match PathKind::carrier(kind) {
            Some(PathKind::Wireguard) => self.mtu(),
            _ => self.mtu().min(self.mtu_after(PathKind::Wireguard.overhead(true))),
        }
    }

    fn mtu_after(&self, overhead: u16) -> u16 {
        let interface = self.local.underlay.values().map(|link| link.mtu).min().unwrap_or(1500).min(1500);
        u16::try_from(interface).unwrap_or(1500).saturating_sub(overhead).max(MIN_MTU)
    }

    /// The outside peers, without those that would cover what must stay outside.
    pub(super) fn accepted_outside(&self, problems: &mut Vec<Problem>) -> Vec<(&'a PeerName, &'a ExternalPeer)> {
        let topology = self.topology;
        let mut accepted = Vec::new();
        for (name, peer) in topology.outside.iter() {
            match covered(&peer.allowed_ips, &self.local.protected) {
                None => accepted.push((name, peer.as_ref())),
                Some((net, address, what)) => {
                    let claim = format!("peers/{name} is refused here: allowedIPs");
                    let remedy =
                        format!("etcdctl put /meshd/peers/{name} < FILE # with allowedIPs outside the underlay");
                    problems.push(covers_underlay(&claim, net, format_args!("{address}, {what}"), remedy));
                }
            }
        }
        accepted
    }

    /// The link by which `member` is eligible for direct.
    pub(super) fn link(&self, member: &NodePeer, family: Family) -> Option<DirectLink> {
        let backend = &self.topology.network.as_ref()?.backend;
        let permitted = PathKind::permitted(backend).any(|kind| kind == PathKind::HostGw);
        let underlay = self.local.underlay.get(&family).filter(|_| permitted && member.unusable.is_none())?;
        if member.keys.is_empty() {
            // A host of Flannel's names its address alone, and sends direct if that is on its subnet.
            let next_hop = member.addresses.iter().map(IpNet::addr).find(|at| Family::of(*at) == family)?;
            let own = underlay.addresses.iter().find(|own| own.contains(&next_hop) && own.addr() != next_hop)?;
            return Some(DirectLink { own: *own, next_hop });
        }
        // Where all is in clear text, a site is no matter of trust: nodes that name none share one.
        let unnamed = (backend.kind != BackendKind::Wireguard).then_some("");
        eligible(
            family,
            self.local.site.as_deref().or(unnamed),
            &underlay.addresses,
            member.site.as_ref().map(|site| site.as_str()).or(unnamed),
            &member.addresses,
        )
    }

    /// What could carry packets to `member`.
    pub(super) fn candidates(&self, owner: &PeerId, member: &NodePeer) -> Candidates {
        let links = Family::BOTH.into_iter().filter_map(|family| {
            let link = self.link(member, family)?;
            let target = self.target(owner, member, family, link);
            Some((family, LinkCandidate { link, prefixes: prefixes_of(member, family), target }))
        });
        Candidates {
            unusable: member.unusable.as_deref().map(Arc::from),
            unproven: member.keys.is_empty(),
            carrier: self.carrier(member),
            links: links.collect(),
        }
    }

    /// What carries packets to `member` where no direct path does.
    fn carrier(&self, member: &NodePeer) -> Carrier {
        let kind = self.topology.network.as_ref().map_or(BackendKind::Wireguard, |config| config.backend.kind);
        match PathKind::carrier(kind) {
            Some(PathKind::Wireguard) => {
                Carrier::Tunnel { callable: !member.endpoints.is_empty() || self.local.has_endpoint }
            }
            Some(PathKind::Vxlan) => {
                let end = |family| Some((family, self.vtep(member, family)?));
                Carrier::Vxlan(Family::BOTH.into_iter().filter_map(end).collect())
            }
            Some(PathKind::HostGw) | None => Carrier::Nothing,
        }
    }

    /// `overlay`: the peer's.
    pub(super) fn route_via(&self, via: Via, family: Family, overlay: Option<IpAddr>) -> kernel_state::RouteVia {
        match via {
            Via::Vtep(_, vtep) => match (overlay, &self.topology.network) {
                (Some(overlay), Some(config)) => {
                    let dev = device_name(config.backend.vxlan.vni, family);
                    kernel_state::RouteVia::Vtep { via: next_hop(overlay, vtep.mac), dev }
                }
                _ => kernel_state::RouteVia::Unreachable,
            },
            Via::Link(_, link) => {
                kernel_state::RouteVia::Neighbour { via: link.next_hop, dev: self.local.underlay[&family].name.clone() }
            }
            // A silent peer keeps its route into the tunnel: there it is tried on, and a loose reverse path filter
            // still lets its probes in.
            Via::Tun(_) => kernel_state::RouteVia::Tunnel,
            Via::Nowhere => kernel_state::RouteVia::Unreachable,
        }
    }

    /// Without the networks, which follow from the floor, and what depends on paths.
    pub(super) fn firewall(&self) -> kernel_state::Firewall {
        let mut own: Vec<IpNet> = self.topology.own_prefixes().collect();
        own.extend(self.topology.own_overlay().into_iter().map(host));
        kernel_state::Firewall {
            own,
            ip_masq: self.local.ip_masq,
            probe_port: Some(self.local.listen_port + 1),
            ..kernel_state::Firewall::default()
        }
    }

    pub(super) fn desired(
        &self,
        overlay: Vec<IpAddr>,
        routes: CowMap<IpNet, kernel_state::PeerRoute>,
        firewall: kernel_state::Firewall,
        floor: kernel_state::Floor,
        probes: Vec<kernel_state::ProbeRoute>,
    ) -> kernel_state::Desired {
        // What must not leave in the clear has a fallback route, and the guard drops it where a foreign route leads it out.
        let firewall = kernel_state::Firewall { networks: floor.prefixes().copied().collect(), ..firewall };
        let has = |family| firewall.networks.iter().any(|net| Family::of_net(net) == family);
        let mut underlay: Vec<InterfaceName> = self.local.underlay.values().map(|link| link.name.clone()).collect();
        underlay.dedup();
        kernel_state::Desired {
            tun: kernel_state::Tun { mtu: self.tunnel_mtu().into(), txqueuelen: TXQUEUELEN, up: true },
            overlay,
            routes,
            floor,
            probes,
            vxlan: Vec::new(),
            forwarding: kernel_state::Forwarding { ipv4: has(Family::V4), ipv6: has(Family::V6) },
            firewall,
            underlay,
            underlay4: self.local.underlay.get(&Family::V4).map(|link| link.name.clone()),
            pods: Vec::new(),
            forward_accept: self.local.forward_accept,
        }
    }
}
