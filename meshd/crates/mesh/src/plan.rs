//! From the snapshot to the desired state of kernel, tunnel and prober.
//!
//! A [`Planner`] keeps the plan and recomputes the parts that a change affects: one member, or all of them after a
//! global change.
//!
//! A packet to a pod goes direct or through the tunnel, or is dropped: every prefix of the snapshot gets exactly one
//! route, and the floor covers the rest of the network.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cow_map::CowMap;
use etcd_schema::{NetworkConfig, NodeId, PeerName, SubnetKey};
use ipnet::IpNet;

use crate::{
    address::{Family, host},
    interface::InterfaceName,
    kernel_state,
    path::{DirectLink, DirectState, NotDirect, eligible},
    problem::Problem,
    snapshot::{Member, Outside, Owner, Snapshot, is_supported},
    target::{PathStates, Target, Targets},
    tunnel_table,
};

/// Bytes that WireGuard over IPv6 adds to an inner packet: 40 IPv6, 8 UDP, 16 header, 16 tag.
pub const OVERHEAD: u16 = 80;
/// Least MTU of an IPv6 link (RFC 8200, 5).
pub(crate) const MIN_MTU: u16 = 1280;
/// How often a node that only calls out keeps its NAT's mapping alive.
const CALL_OUT_KEEPALIVE: Duration = Duration::from_secs(25);
/// Length of the TUN device's queue, in packets.
const TXQUEUELEN: u32 = 4096;

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
    pub tunnel: tunnel_table::Table,
    /// Paths to be probed.
    pub probes: Targets,
    /// The path of each member and family that has a prefix, and why that one.
    pub paths: CowMap<(Owner, Family), Chosen>,
    /// Who may send with a source of each prefix: the members that can be spoken to.
    pub owners: CowMap<IpNet, Owner>,
    /// MTU of pods and of the TUN device.
    pub mtu: u16,
    /// What of the picture this machine refuses.
    pub problems: Vec<Problem>,
}

/// The path of a member in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The path.
    pub path: ChosenPath,
    /// Why not a better one; empty when there is nothing to say.
    pub reason: String,
}

/// Direct, tunnel or nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChosenPath {
    /// A plain route.
    Direct(DirectLink),
    /// Through the tunnel.
    Wireguard,
    /// Through the tunnel, where nobody answers: it goes on trying.
    Silent,
    /// Nowhere.
    Unreachable,
}

/// The plan for `snapshot` on this machine, without anything planned before.
#[must_use]
pub fn plan(snapshot: &Snapshot, local: &Local, observed: &Observed) -> Plan {
    Planner::default().plan(snapshot, local, observed)
}

/// Keeps the plan up to date. What it says depends on what it is given last, and on nothing before.
#[derive(Debug, Default)]
pub struct Planner {
    /// What the last plan was made for, unless it was empty.
    seen: Option<Seen>,
    /// The members that are eligible for direct, per family.
    near: BTreeMap<(Owner, Family), Near>,
    paths: CowMap<(Owner, Family), Chosen>,
    owners: CowMap<IpNet, Owner>,
    peers: CowMap<String, Arc<tunnel_table::PeerConfig>>,
    routes: CowMap<IpNet, kernel_state::Route>,
}

#[derive(Debug)]
struct Seen {
    frame: Frame,
    members: CowMap<Owner, Arc<Member>>,
    paths: PathStates,
    inner_mtu: BTreeMap<String, u16>,
}

/// What concerns every member.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    local: Local,
    network: Option<NetworkConfig>,
    own_subnets: Vec<SubnetKey>,
    outside: CowMap<PeerName, Arc<Outside>>,
    roamed: Arc<BTreeMap<String, SocketAddr>>,
    direct_at_start: Vec<(IpNet, IpAddr)>,
    /// Largest inner packet of outside peers, who are planned with the frame.
    outside_mtu: Vec<(String, u16)>,
}

/// What is planned of a member that is eligible for direct in a family.
#[derive(Debug, Clone, PartialEq)]
struct Near {
    /// The prefixes that it may send from.
    prefixes: Vec<kernel_state::PrefixOn>,
    /// The next hop by which they may be sent to.
    direct: Option<IpAddr>,
    /// How it is probed.
    probe: Option<(NodeId, Target, kernel_state::ProbeRoute)>,
}

impl Planner {
    /// The plan for `snapshot` on this machine. Costs what differs from the last one.
    pub fn plan(&mut self, snapshot: &Snapshot, local: &Local, observed: &Observed) -> Plan {
        let mut problems = Vec::new();
        let inputs = Inputs { snapshot, local, observed };
        // Without a config there is nothing to plan; the control plane says so.
        let Some(config) = &snapshot.network else { return self.empty(&inputs, problems) };
        if let Some(reason) = inputs.refuses(config) {
            problems.push(reason);
            // What is in force is not withdrawn because the underlay has moved into it.
            if !snapshot.networks().eq(observed.programmed.networks.iter().copied()) {
                return self.empty(&inputs, problems);
            }
        }
        self.whole(&inputs, problems)
    }

    /// Nothing may be carried: no paths and no peers. The floor and the guard stay under what was in force, or pods'
    /// packets would leave in the clear by the default route.
    fn empty(&mut self, inputs: &Inputs<'_>, problems: Vec<Problem>) -> Plan {
        *self = Self::default();
        let mtu = inputs.mtu();
        let floor = inputs.observed.programmed.clone();
        Plan {
            kernel: inputs.desired(
                mtu,
                Vec::new(),
                CowMap::default(),
                kernel_state::Firewall::default(),
                floor,
                Vec::new(),
            ),
            tunnel: tunnel_table::Table { mtu, ..tunnel_table::Table::default() },
            probes: Targets::default(),
            paths: CowMap::default(),
            owners: CowMap::default(),
            mtu,
            problems,
        }
    }

    fn whole(&mut self, inputs: &Inputs<'_>, mut problems: Vec<Problem>) -> Plan {
        let Inputs { snapshot, observed, .. } = *inputs;
        let mtu = inputs.mtu();
        let outside = inputs.accepted_outside(&mut problems);
        let overlay: BTreeMap<Family, IpAddr> =
            snapshot.own_overlay().into_iter().map(|address| (Family::of(address), address)).collect();
        let frame = inputs.frame();
        let seen = self.seen.take().filter(|seen| seen.frame == frame);
        let common = Common { inputs, outside: &outside, overlay: &overlay, mtu };
        if seen.is_none() {
            *self = Self::default();
            self.plan_outside(&common);
        }
        let before = seen.as_ref().map(|seen| seen.members.clone()).unwrap_or_default();
        let mut changed: BTreeSet<Owner> = snapshot.members.changes(&before).into_iter().cloned().collect();
        changed.extend(seen.iter().flat_map(|seen| seen.observed_otherwise(observed)));
        self.replan(&before, &changed, &common);
        self.seen = Some(Seen {
            frame,
            members: snapshot.members.clone(),
            paths: observed.paths.clone(),
            inner_mtu: observed.inner_mtu.clone(),
        });
        let mut probes = Targets { own: overlay.clone(), peers: BTreeMap::new() };
        let mut probe_routes = Vec::new();
        let mut firewall = inputs.firewall();
        for ((_, family), near) in &self.near {
            if let Some((id, target, route)) = &near.probe {
                probe_routes.push(route.clone());
                probes.peers.insert((id.clone(), *family), target.clone());
            }
            firewall.accepted.extend(near.prefixes.iter().cloned());
            if let Some(via) = near.direct {
                let direct = |on: &kernel_state::PrefixOn| kernel_state::PrefixVia {
                    prefix: on.prefix,
                    dev: on.dev.clone(),
                    via,
                };
                firewall.direct.extend(near.prefixes.iter().map(direct));
            }
        }
        let floor = kernel_state::Floor {
            networks: snapshot.networks().collect(),
            outside: outside.iter().flat_map(|(_, peer)| peer.allowed_ips.iter().copied()).collect(),
        };
        let addresses: Vec<IpAddr> = overlay.values().copied().collect();
        Plan {
            tunnel: tunnel_table::Table {
                peers: self.peers.clone(),
                local: snapshot.own_prefixes().collect(),
                overlay: addresses.clone(),
                mtu,
            },
            kernel: inputs.desired(mtu, addresses, self.routes.clone(), firewall, floor, probe_routes),
            probes,
            paths: self.paths.clone(),
            owners: self.owners.clone(),
            mtu,
            problems,
        }
    }

    /// Plans anew what is planned of these members, of whom some are gone.
    fn replan(&mut self, before: &CowMap<Owner, Arc<Member>>, changed: &BTreeSet<Owner>, common: &Common<'_>) {
        // A prefix may have gone from one of them to another: what is given is not taken afterwards.
        let mut released: BTreeSet<IpNet> = BTreeSet::new();
        for owner in changed {
            released.extend(before.get(owner).iter().flat_map(|member| member.prefixes()));
        }
        let mut kept: BTreeSet<IpNet> = BTreeSet::new();
        let mut routed: BTreeSet<IpNet> = BTreeSet::new();
        for owner in changed {
            let member = common.inputs.snapshot.members.get(owner).map(Arc::as_ref);
            for family in Family::BOTH {
                let here = member.and_then(|member| common.of_family(owner, member, family));
                let at = (owner.clone(), family);
                match here {
                    Some(FamilyPlan { chosen, near, routes }) => {
                        for route in routes {
                            routed.insert(route.dst);
                            self.routes.set(route.dst, Some(route));
                        }
                        match near {
                            Some(near) => self.near.insert(at.clone(), near),
                            None => self.near.remove(&at),
                        };
                        self.paths.set(at, Some(chosen));
                    }
                    None => {
                        self.near.remove(&at);
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
            let who = Owner::Outside((*name).clone()).to_string();
            for net in &peer.allowed_ips {
                let Some(src) = common.overlay.get(&Family::of_net(net)) else { continue };
                let mtu = common.inputs.route_mtu(&who, &ChosenPath::Wireguard, common.mtu);
                let route = kernel_state::Route { dst: *net, path: kernel_state::Path::Tunnel, mtu, src: Some(*src) };
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

impl Seen {
    /// The members of whom something else is observed now.
    fn observed_otherwise(&self, observed: &Observed) -> BTreeSet<Owner> {
        let mut owners = BTreeSet::new();
        if self.paths != observed.paths {
            let ids = self.paths.keys().chain(observed.paths.keys());
            let others = ids.filter(|id| self.paths.get(*id) != observed.paths.get(*id));
            owners.extend(others.map(|(id, _)| Owner::Node(id.clone())));
        }
        if self.inner_mtu != observed.inner_mtu {
            let names = self.inner_mtu.keys().chain(observed.inner_mtu.keys());
            let others = names.filter(|name| self.inner_mtu.get(*name) != observed.inner_mtu.get(*name));
            let owner = |name: &String| Owner::named(name).filter(|owner| !matches!(owner, Owner::Outside(_)));
            owners.extend(others.filter_map(owner));
        }
        owners
    }
}

/// What the plan of each member is made of, besides the member.
struct Common<'a> {
    inputs: &'a Inputs<'a>,
    outside: &'a [(&'a PeerName, &'a Outside)],
    overlay: &'a BTreeMap<Family, IpAddr>,
    mtu: u16,
}

/// What is planned of a member in a family that it has a prefix of.
struct FamilyPlan {
    chosen: Chosen,
    near: Option<Near>,
    routes: Vec<kernel_state::Route>,
}

impl Common<'_> {
    fn of_family(&self, owner: &Owner, member: &Member, family: Family) -> Option<FamilyPlan> {
        let prefixes: Vec<IpNet> = member.prefixes().filter(|net| Family::of_net(net) == family).collect();
        if prefixes.is_empty() {
            return None;
        }
        let inputs = self.inputs;
        let link = inputs.link(member, family);
        let chosen = inputs.choose(owner, member, family, link);
        let near = match (link, owner) {
            (Some(link), Owner::Node(id)) => {
                let underlay = &inputs.local.underlay[&family];
                let on = |prefix| kernel_state::PrefixOn { prefix, dev: underlay.name.clone() };
                Some(Near {
                    prefixes: prefixes.iter().copied().map(on).collect(),
                    direct: match &chosen.path {
                        ChosenPath::Direct(link) => Some(link.next_hop),
                        ChosenPath::Wireguard | ChosenPath::Silent | ChosenPath::Unreachable => None,
                    },
                    probe: inputs.probe(id, member, family, link, &prefixes),
                })
            }
            _ => None,
        };
        let routes = self.overlay.get(&family).map(|src| {
            let mtu = inputs.route_mtu(&owner.to_string(), &chosen.path, self.mtu);
            let route = |dst: &IpNet| kernel_state::Route {
                dst: *dst,
                path: inputs.kernel_path(&chosen.path, family),
                mtu,
                src: Some(*src),
            };
            prefixes.iter().map(route).collect()
        });
        Some(FamilyPlan { near, routes: routes.unwrap_or_default(), chosen })
    }

    fn peer(&self, name: &str, member: &Member) -> tunnel_table::PeerConfig {
        let inputs = self.inputs;
        let keepalive = inputs.snapshot.network.as_ref().and_then(|config| config.backend.persistent_keepalive);
        let keepalive = keepalive.map(|seconds| Duration::from_secs(seconds.get().into()));
        let links = Family::BOTH.into_iter().filter_map(|family| inputs.link(member, family));
        let links = links.map(|link| SocketAddr::new(link.next_hop, member.listen_port));
        let published: Vec<SocketAddr> = links.chain(member.endpoints.iter().copied()).collect();
        let calls = !inputs.local.has_endpoint && !published.is_empty();
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

    /// Where a peer was heard from in an earlier run, to be tried first: it worked until then. Not if that is now inside of the mesh: outer packets never are.
    fn roamed(&self, peer: &str) -> Option<SocketAddr> {
        let at = *self.inputs.observed.roamed.get(peer)?;
        let inside = |net: &IpNet| net.contains(&at.ip());
        let of_mesh = self.inputs.snapshot.networks().any(|net| inside(&net))
            || self.outside.iter().any(|(_, peer)| peer.allowed_ips.iter().any(inside));
        (!of_mesh).then_some(at)
    }
}

/// What a plan follows from.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    snapshot: &'a Snapshot,
    local: &'a Local,
    observed: &'a Observed,
}

impl<'a> Inputs<'a> {
    /// Why nothing of this network may be programmed here.
    fn refuses(&self, config: &NetworkConfig) -> Option<Problem> {
        if !is_supported(config.backend.kind) {
            return Some(Problem::new(
                "backend_not_supported",
                format!("config: Backend.Type {:?} is not supported by this version", config.backend.kind),
                "put a config with \"Type\": \"wireguard\"",
            ));
        }
        let networks: Vec<IpNet> = self.snapshot.networks().collect();
        covered(&networks, &self.local.protected).map(|(net, address, what)| {
            Problem::new(
                "covers_underlay",
                format!("config: the network {net} covers {address}, {what}"),
                "meshctl check config FILE && etcdctl put /meshd/config < FILE # with networks that no site uses",
            )
        })
    }

    fn frame(&self) -> Frame {
        let outside_mtu = self.observed.inner_mtu.range("peers/".to_owned().."peers0".to_owned());
        Frame {
            local: self.local.clone(),
            network: self.snapshot.network.clone(),
            own_subnets: self.snapshot.own_subnets.clone(),
            outside: self.snapshot.outside.clone(),
            roamed: Arc::clone(&self.observed.roamed),
            direct_at_start: self.observed.direct_at_start.clone(),
            outside_mtu: outside_mtu.map(|(name, mtu)| (name.clone(), *mtu)).collect(),
        }
    }

    /// MTU of pods and of the TUN device: `Backend.MTU` if set, else min(interface, 1500) - 80.
    fn mtu(&self) -> u16 {
        let configured = self.snapshot.network.as_ref().and_then(|config| config.backend.mtu);
        configured.map_or_else(
            || {
                let interface = self.local.underlay.values().map(|link| link.mtu).min().unwrap_or(1500).min(1500);
                u16::try_from(interface).unwrap_or(1500).saturating_sub(OVERHEAD).max(MIN_MTU)
            },
            |mtu| mtu.get(),
        )
    }

    /// The outside peers, without those that would cover what must stay outside.
    fn accepted_outside(&self, problems: &mut Vec<Problem>) -> Vec<(&'a PeerName, &'a Outside)> {
        let snapshot = self.snapshot;
        let mut accepted = Vec::new();
        for (name, peer) in snapshot.outside.iter() {
            match covered(&peer.allowed_ips, &self.local.protected) {
                None => accepted.push((name, peer.as_ref())),
                Some((net, address, what)) => problems.push(Problem::new(
                    "covers_underlay",
                    format!("peers/{name} is refused here: allowedIPs {net} covers {address}, {what}"),
                    format!("etcdctl put /meshd/peers/{name} < FILE # with allowedIPs outside the underlay"),
                )),
            }
        }
        accepted
    }

    /// The link by which `member` is eligible for direct.
    fn link(&self, member: &Member, family: Family) -> Option<DirectLink> {
        let direct_routing = self.snapshot.network.as_ref().is_some_and(|config| config.backend.direct_routing);
        let underlay = self.local.underlay.get(&family).filter(|_| direct_routing && !member.keys.is_empty())?;
        eligible(
            family,
            self.local.site.as_deref(),
            &underlay.addresses,
            member.site.as_ref().map(|site| site.as_str()),
            &member.addresses,
        )
    }

    fn choose(&self, owner: &Owner, member: &Member, family: Family, link: Option<DirectLink>) -> Chosen {
        if let Some(reason) = &member.unusable {
            return Chosen { path: ChosenPath::Unreachable, reason: reason.clone() };
        }
        let state = match (owner, link) {
            (Owner::Node(id), Some(_)) => self.observed.paths.get(&(id.clone(), family)),
            _ => None,
        };
        let callable = !member.endpoints.is_empty() || self.local.has_endpoint;
        match (link, state) {
            (Some(link), Some(DirectState::Direct)) => Chosen { path: ChosenPath::Direct(link), reason: String::new() },
            (Some(_), Some(DirectState::Silent)) => Chosen {
                path: ChosenPath::Silent,
                reason: "no answer on the direct path or through the tunnel".to_owned(),
            },
            _ if !callable => Chosen {
                path: ChosenPath::Unreachable,
                reason: "neither the peer nor this node has an endpoint for handshakes".to_owned(),
            },
            (Some(_), Some(DirectState::Tunnel(NotDirect::Failed))) => Chosen {
                path: ChosenPath::Wireguard,
                reason: "on the same subnet, but no echo reply over the direct path".to_owned(),
            },
            (Some(_), _) => Chosen {
                path: ChosenPath::Wireguard,
                reason: "on the same subnet; no echo reply over the direct path yet".to_owned(),
            },
            (None, _) => Chosen { path: ChosenPath::Wireguard, reason: String::new() },
        }
    }

    fn probe(
        &self,
        id: &NodeId,
        member: &Member,
        family: Family,
        link: DirectLink,
        prefixes: &[IpNet],
    ) -> Option<(NodeId, Target, kernel_state::ProbeRoute)> {
        let overlay = member.overlay().find(|address| Family::of(*address) == family)?;
        let underlay = &self.local.underlay[&family];
        let port = member.listen_port.checked_add(1)?;
        let was_direct =
            self.observed.direct_at_start.iter().any(|(dst, via)| *via == link.next_hop && prefixes.contains(dst));
        let route = kernel_state::ProbeRoute { overlay, via: link.next_hop, dev: underlay.name.clone() };
        let target = Target {
            overlay,
            next_hop: link.next_hop,
            port,
            keys: member.keys.clone(),
            interface: (underlay.index, underlay.name.to_string()),
            was_direct,
        };
        Some((id.clone(), target, route))
    }

    fn kernel_path(&self, path: &ChosenPath, family: Family) -> kernel_state::Path {
        match path {
            ChosenPath::Direct(link) => {
                kernel_state::Path::Direct { via: link.next_hop, dev: self.local.underlay[&family].name.clone() }
            }
            // A silent peer keeps its route into the tunnel: there it is tried on, and a loose reverse path filter
            // still lets its probes in.
            ChosenPath::Wireguard | ChosenPath::Silent => kernel_state::Path::Tunnel,
            ChosenPath::Unreachable => kernel_state::Path::Unreachable,
        }
    }

    /// One MTU on every path, so that a path change does not change it; less where the tunnel carries less.
    fn route_mtu(&self, peer: &str, path: &ChosenPath, mtu: u16) -> Option<u16> {
        match path {
            ChosenPath::Direct(_) => Some(mtu),
            ChosenPath::Wireguard | ChosenPath::Silent => {
                self.observed.inner_mtu.get(peer).copied().filter(|inner| *inner < mtu)
            }
            ChosenPath::Unreachable => None,
        }
    }

    /// Without the networks, which follow from the floor, and what depends on paths.
    fn firewall(&self) -> kernel_state::Firewall {
        let mut own: Vec<IpNet> = self.snapshot.own_prefixes().collect();
        own.extend(self.snapshot.own_overlay().into_iter().map(host));
        kernel_state::Firewall {
            own,
            ip_masq: self.local.ip_masq,
            probe_port: Some(self.local.listen_port + 1),
            ..kernel_state::Firewall::default()
        }
    }

    fn desired(
        &self,
        mtu: u16,
        overlay: Vec<IpAddr>,
        routes: CowMap<IpNet, kernel_state::Route>,
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
            tun: kernel_state::Tun { mtu: mtu.into(), txqueuelen: TXQUEUELEN, up: true },
            overlay,
            routes,
            floor,
            probes,
            forwarding: kernel_state::Forwarding { ipv4: has(Family::V4), ipv6: has(Family::V6) },
            firewall,
            underlay,
            underlay4: self.local.underlay.get(&Family::V4).map(|link| link.name.clone()),
            pods: Vec::new(),
            forward_accept: self.local.forward_accept,
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
