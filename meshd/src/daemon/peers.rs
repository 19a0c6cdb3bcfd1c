//! Nodes and external peers for the API: the path to each, its reason, and the remedy if it fails.

use std::{collections::BTreeMap, time::UNIX_EPOCH};

use api_types::{Peer, PeerCounts, Route};
use ipnet::IpNet;
use mesh::{
    address::Family,
    kernel_state::RouteVia,
    path::{ChosenPath, Reach, Reason, worse},
    plan::Plan,
    problem::{Problem, ProblemCode},
    topology::{PeerId, Topology},
};
use tunnel::PeerStatus;

use super::published::{ApiState, NodeState};

/// Names that one line of status has room for.
const NAMED: usize = 5;

impl ApiState {
    /// The other nodes and outside peers, each with the tunnel's name for it.
    pub(super) fn peers_by_owner(&self) -> Vec<(String, Peer)> {
        let tunnel = self.tunnel_peers();
        let in_force = self.lock();
        let Some(plan) = &in_force.plan else { return Vec::new() };
        let mut peers = Vec::new();
        for (owner, member) in in_force.topology.members.iter() {
            let status = tunnel.get(&owner.to_string());
            let (family, chosen) = worse(paths_to(plan, owner, status));
            let mut reason = explained(family, &chosen, status);
            let lost = [ProblemCode::ProbesDropped, ProblemCode::ProbesRemarked];
            let lost = in_force.problems.iter().find(|problem| lost.contains(&problem.code));
            if let Some(problem) = lost.filter(|_| chosen.reason.is_missing_echo()) {
                reason = format!("{reason}; {}", problem.cause);
            }
            let path = chosen.kind().into();
            let id = match owner {
                PeerId::Node(id) => id.to_string(),
                PeerId::Lease(_) | PeerId::Outside(_) => member.name.clone(),
            };
            let remedy = remedy(path, argument(&member.name, &id), shows_life(&in_force, owner));
            let reached = Reached { path, reason, remedy };
            let site = member.site.as_ref().map(ToString::to_string);
            let online = shows_life(&in_force, owner);
            let peer = peer(member.name.clone(), id, site, member.prefixes().collect(), reached, status);
            peers.push((owner.to_string(), Peer { overlay: member.overlay().collect(), online, ..peer }));
        }
        for (name, outside) in in_force.topology.outside.iter() {
            let owner = PeerId::Outside(name.clone());
            let status = tunnel.get(&owner.to_string());
            let name = name.to_string();
            let chosen = ChosenPath::external(status.map(|status| &status.session));
            let path = chosen.kind().into();
            let remedy = match chosen.reason {
                Reason::Refused => "meshctl status # shows the reason".to_owned(),
                _ => remedy(path, &name, None),
            };
            let reached = Reached { path, reason: chosen.reason.to_string(), remedy };
            let site = outside.site.as_ref().map(ToString::to_string);
            let allowed = outside.allowed_ips.clone();
            let alone = allowed.iter().filter(|net| net.prefix_len() == net.max_prefix_len());
            let overlay = alone.map(IpNet::addr).collect();
            let peer = peer(name.clone(), name, site, allowed, reached, status);
            peers.push((owner.to_string(), Peer { overlay, outside: true, ..peer }));
        }
        peers
    }

    pub(super) fn tunnel_peers(&self) -> BTreeMap<String, PeerStatus> {
        self.tunnel.peers().into_iter().map(|peer| (peer.name.clone(), peer)).collect()
    }

    pub(super) fn mesh_routes(&self) -> Vec<Route> {
        let peers: BTreeMap<String, Peer> =
            self.peers_by_owner().into_iter().map(|(_, peer)| (peer.name.clone(), peer)).collect();
        let tunnel = self.tunnel_peers();
        let in_force = self.lock();
        let Some(plan) = &in_force.plan else { return Vec::new() };
        let mut routes = routes(&in_force.topology, plan, &tunnel, &self.identity.interface);
        for route in routes.iter_mut().filter(|route| route.path == api_types::Path::Unreachable) {
            if let Some(peer) = peers.get(&route.peer) {
                (route.reason, route.remedy) = (peer.reason.clone(), peer.remedy.clone());
            }
        }
        routes
    }
}

/// How packets reach a peer, why so, and what to do where they do not.
struct Reached {
    path: api_types::Path,
    reason: String,
    remedy: String,
}

/// Whether a node shows a sign of life in etcd; `None` for peers that never do.
fn shows_life(in_force: &NodeState, owner: &PeerId) -> Option<bool> {
    match owner {
        PeerId::Node(id) => Some(in_force.alive.get(id).is_some()),
        PeerId::Lease(_) | PeerId::Outside(_) => None,
    }
}

/// By what a command takes a peer: by its name, unless that is an older node's.
fn argument<'a>(name: &'a str, id: &'a str) -> &'a str {
    if name.contains(' ') { id } else { name }
}

fn remedy(path: api_types::Path, name: &str, alive: Option<bool>) -> String {
    match (path, alive) {
        (api_types::Path::By(_), _) => String::new(),
        (api_types::Path::Unreachable, Some(false)) => format!(
            "systemctl status meshd # on {name}, which is offline according to etcd; if it is gone for good: meshctl \
             node remove {name}"
        ),
        (api_types::Path::Unreachable, _) => format!("meshctl ping {name} # shows which layer fails"),
    }
}

/// How many peers are reached by which path.
pub(super) fn counts(peers: &[(String, Peer)]) -> PeerCounts {
    let mut counts = PeerCounts::default();
    for (_, peer) in peers {
        counts.count(peer.path, peer.online);
    }
    counts
}

/// Nodes that are up by what etcd says and that nothing gets to: a fault of the network between, or of this node. One that
/// shows no sign of life is down, which is no fault here.
pub(super) fn not_reached(peers: &[(String, Peer)]) -> Option<Problem> {
    let is_lost = |peer: &&Peer| peer.path == api_types::Path::Unreachable && peer.online == Some(true);
    let lost: Vec<&Peer> = peers.iter().map(|(_, peer)| peer).filter(is_lost).collect();
    let first = lost.first()?;
    let named: Vec<String> = lost.iter().take(NAMED).map(|peer| format!("{} ({})", peer.name, peer.reason)).collect();
    let others = if lost.len() > NAMED { " and others" } else { "" };
    Some(Problem::new(
        ProblemCode::PeersUnreachable,
        format!("{} of {} peers are online but unreachable: {}{others}", lost.len(), peers.len(), named.join(", ")),
        format!(
            "meshctl ping {} # shows which layer fails; most often a firewall blocks UDP between the two",
            argument(&first.name, &first.id)
        ),
    ))
}

/// The mesh's routes, by destination; `tun` is the tunnel's device.
fn routes(topology: &Topology, plan: &Plan, tunnel: &BTreeMap<String, PeerStatus>, tun: &str) -> Vec<Route> {
    let session = |owner: &PeerId| tunnel.get(&owner.to_string()).map(|status| &status.session);
    let members = topology.members.iter().flat_map(|(owner, member)| {
        member.prefixes().filter_map(move |net| {
            let chosen = plan.paths.get(&(owner.clone(), Family::of_net(&net)))?.clone();
            Some((net, (member.name.clone(), chosen.with_session(session(owner)))))
        })
    });
    let outside = topology.outside.iter().flat_map(|(name, peer)| {
        let chosen = ChosenPath::external(session(&PeerId::Outside(name.clone())));
        peer.allowed_ips.iter().map(move |net| (*net, (name.to_string(), chosen.clone())))
    });
    let owners: BTreeMap<IpNet, (String, ChosenPath)> = members.chain(outside).collect();
    let mut routes: Vec<Route> = plan
        .kernel
        .routes
        .values()
        .map(|route| {
            let (via, dev) = match &route.via {
                RouteVia::Neighbour { via, dev } | RouteVia::Vtep { via, dev } => (Some(*via), Some(dev.to_string())),
                RouteVia::Tunnel => (None, Some(tun.to_owned())),
                RouteVia::Unreachable => (None, None),
            };
            let (peer, path) =
                owners.get(&route.dst).map_or((String::new(), api_types::Path::Unreachable), |(peer, chosen)| {
                    (peer.clone(), chosen.kind().into())
                });
            Route { path, peer, via, dev, mtu: route.mtu, src: route.src, ..Route::nowhere(route.dst) }
        })
        .collect();
    routes.extend(plan.kernel.floor.networks.iter().map(|net| Route::nowhere(*net)));
    routes.sort_by_key(|route| (Family::of_net(&route.dst), route.dst));
    routes
}

/// A member's path in each family that it has a prefix of.
fn paths_to(plan: &Plan, owner: &PeerId, status: Option<&PeerStatus>) -> Vec<(Family, ChosenPath)> {
    let session = status.map(|status| &status.session);
    let path = |family| Some((family, plan.paths.get(&(owner.clone(), family))?.clone().with_session(session)));
    Family::BOTH.into_iter().filter_map(path).collect()
}

/// Why it is this path, and in which family if the other one fares better.
fn explained(family: Option<Family>, chosen: &ChosenPath, status: Option<&PeerStatus>) -> String {
    let reason = match family {
        _ if chosen.reason == Reason::Best => String::new(),
        None => chosen.reason.to_string(),
        Some(Family::V4) => format!("IPv4: {}", chosen.reason),
        Some(Family::V6) => format!("IPv6: {}", chosen.reason),
    };
    let fragments = status.is_some_and(|status| status.without_df) && chosen.reach != Reach::Unreachable;
    let note = fragments.then_some("path MTU below 1280 bytes for inner packets: outer packets are fragmented");
    [Some(reason.as_str()).filter(|reason| !reason.is_empty()), note]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("; ")
}

fn peer(
    name: String,
    id: String,
    site: Option<String>,
    subnets: Vec<IpNet>,
    Reached { path, reason, remedy }: Reached,
    status: Option<&PeerStatus>,
) -> Peer {
    let handshake = status.and_then(|status| status.latest_handshake);
    Peer {
        name,
        id,
        site,
        subnets,
        overlay: Vec::new(),
        outside: false,
        online: None,
        path,
        reason,
        remedy,
        public_key: status.and_then(|status| status.keys.first()).map(ToString::to_string),
        endpoint: status.and_then(|status| status.endpoint),
        latest_handshake: handshake.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map(|at| at.as_secs()),
        rx: status.map_or(0, |status| status.rx_bytes),
        tx: status.map_or(0, |status| status.tx_bytes),
        mtu: status.map(|status| status.inner_mtu),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use keys::PrivateKey;
    use mesh::{
        backend::PathKind,
        path::{DirectState, PathAgents, TunnelSession},
        plan::{Local, Observed, UnderlayLink, plan},
        topology::NodePeer,
    };

    use super::*;

    fn neighbour() -> NodePeer {
        NodePeer {
            name: "b".to_owned(),
            site: Some("east".parse().unwrap()),
            keys: vec![PrivateKey::from_bytes([2; 32]).public()],
            listen_port: 51820,
            endpoints: vec!["192.168.1.2:51820".parse().unwrap()],
            addresses: vec!["192.168.1.2/24".parse().unwrap()],
            vteps: Vec::new(),
            subnets: vec!["10.244.2.0-24&fd42:244:0:2::-64".parse().unwrap()],
            unusable: None,
            version: String::new(),
        }
    }

    /// The routes to a neighbour whose IPv4 path is in `state`.
    fn routes_while(
        state: DirectState,
        tunnel: &BTreeMap<String, PeerStatus>,
    ) -> Vec<(String, api_types::Path, Option<String>)> {
        let config = br#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#;
        let id: etcd_schema::NodeId = "bb".parse().unwrap();
        let topology = Topology {
            network: Some(etcd_schema::NetworkConfig::parse(config).unwrap()),
            own_subnets: vec!["10.244.1.0-24&fd42:244:0:1::-64".parse().unwrap()],
            members: [(PeerId::Node(id.clone()), Arc::new(neighbour()))].into_iter().collect(),
            ..Topology::default()
        };
        let link = UnderlayLink {
            name: "eth0".parse().unwrap(),
            index: 7,
            mtu: 1500,
            addresses: vec!["192.168.1.1/24".parse().unwrap()],
        };
        let local = Local {
            vteps: BTreeMap::new(),
            site: Some("east".to_owned()),
            underlay: BTreeMap::from([(Family::V4, link)]),
            has_endpoint: true,
            listen_port: 51820,
            protected: Vec::new(),
            ip_masq: true,
            forward_accept: false,
        };
        let (now, mut agents, observed) = (std::time::Instant::now(), PathAgents::default(), Observed::default());
        let _ = plan(now, &topology, &local, &observed, &mut agents);
        agents.drive(now, &(id, Family::V4), state);
        routes(&topology, &plan(now, &topology, &local, &observed, &mut agents), tunnel, "meshd0")
            .into_iter()
            .filter(|route| route.peer == "b")
            .map(|route| (route.dst.to_string(), route.path, route.dev))
            .collect()
    }

    #[test]
    fn a_silent_peer_is_unreachable_in_the_family_that_it_is_silent_in() {
        let route = |dst: &str, path, dev: &str| (dst.to_owned(), path, Some(dev.to_owned()));
        let v6 = || route("fd42:244:0:2::/64", api_types::Path::By(PathKind::Wireguard), "meshd0");
        let nothing = BTreeMap::new();
        assert_eq!(
            routes_while(DirectState::Silent, &nothing),
            [route("10.244.2.0/24", api_types::Path::Unreachable, "meshd0"), v6()]
        );
        assert_eq!(
            routes_while(DirectState::Direct, &nothing),
            [route("10.244.2.0/24", api_types::Path::By(PathKind::HostGw), "eth0"), v6()]
        );
    }

    #[test]
    fn a_tunnel_that_is_called_in_vain_leads_nowhere() {
        let status = PeerStatus {
            name: "nodes/bb".to_owned(),
            keys: Vec::new(),
            endpoint: None,
            latest_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
            session: TunnelSession {
                calls: 9,
                last_call: Some(std::time::Duration::ZERO),
                keys: 1,
                ..TunnelSession::default()
            },
            inner_mtu: 1420,
            without_df: false,
        };
        let tunnel = BTreeMap::from([(status.name.clone(), status)]);
        let paths = |state| routes_while(state, &tunnel).into_iter().map(|(_, path, _)| path).collect::<Vec<_>>();
        assert_eq!(paths(DirectState::Silent), [api_types::Path::Unreachable; 2]);
        assert_eq!(paths(DirectState::Direct), [api_types::Path::By(PathKind::HostGw), api_types::Path::Unreachable]);
    }
}
