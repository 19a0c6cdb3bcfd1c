//! What the local API answers from: the last plan, and live counters of the tunnel.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, UNIX_EPOCH},
};

use etcd_schema::PeerName;
use ipnet::IpNet;

use super::{peer_config, pulse::Pulse};
use crate::{
    api::{self, Check, Device, DevicePeer, DropCount, Figures, Peer, Route, Source, Status},
    attachments::Attachments,
    control::{self, ControlStatus, etcd_options::EtcdOptions, membership::MembershipState},
    enforcement::{Enforcement, FlowSample},
    kernel,
    mesh::{
        address::Family,
        plan::{Chosen, ChosenPath, Plan},
        snapshot::{Owner, Snapshot},
    },
    private_key::PrivateKey,
    problem::Problem,
    tunnel::{OffloadState, PeerStatus, Tunnel},
};

/// Who this node is; does not change while it runs.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) site: Option<String>,
    pub(super) public_key: etcd_schema::PublicKey,
    /// The TUN device.
    pub(super) interface: String,
}

/// What is in force now.
#[derive(Debug, Default)]
pub(super) struct InForce {
    pub(super) snapshot: Snapshot,
    pub(super) plan: Option<Plan>,
    pub(super) own_endpoints: Vec<std::net::SocketAddr>,
    /// Records that could not be taken in.
    pub(super) record_problems: Arc<Vec<control::view::Problem>>,
    /// Problems of this machine: the kernel's, the tunnel's.
    pub(super) problems: Vec<Problem>,
    pub(super) firewall_drops: Vec<DropCount>,
    /// Interfaces that carry the outer packets.
    pub(super) underlay: Vec<Carrier>,
}

/// An interface that carries the outer packets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Carrier {
    pub(super) name: String,
    /// In bytes.
    pub(super) mtu: u32,
}

/// The shared state behind the API.
pub(super) struct Published {
    pub(super) identity: Identity,
    pub(super) tunnel: Tunnel,
    pub(super) enforcement: Arc<Enforcement>,
    pub(super) control: tokio::sync::watch::Receiver<ControlStatus>,
    pub(super) in_force: Mutex<InForce>,
    pub(super) attachments: Arc<Attachments>,
    pub(super) pulse: Arc<Pulse>,
    /// For asking members about themselves.
    pub(super) etcd: EtcdOptions,
    pub(super) state_dir: PathBuf,
    /// For WireGuard's own tools, when root uses them.
    pub(super) private_key: PrivateKey,
    /// What is not well with the ways of asking, by code. They keep no packet from its way.
    pub(super) warnings: Mutex<BTreeMap<&'static str, Problem>>,
}

impl Published {
    pub(super) fn set(&self, in_force: InForce) {
        *self.lock() = in_force;
    }

    /// Takes up, or takes back, that something asks in vain; says so in the log when that is new.
    pub(super) fn warn(&self, code: &'static str, warning: Option<Problem>) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        match warning {
            Some(warning) => {
                if warnings.get(code).is_none_or(|known| known.cause != warning.cause) {
                    tracing::warn!(code, cause = warning.cause, remedy = warning.remedy);
                }
                warnings.insert(code, warning);
            }
            None => {
                warnings.remove(code);
            }
        }
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, InForce> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn policy(&self) -> api::PolicyStatus {
        let applied = *self.enforcement.applied().borrow();
        let audit = self.enforcement.in_force().is_some_and(|in_force| in_force.mesh.audit);
        let mode = if audit { etcd_schema::PolicyMode::Audit } else { etcd_schema::PolicyMode::Enforce };
        let counts = self.enforcement.counts();
        let counts = counts.iter().filter(|(_, packets)| *packets > 0);
        api::PolicyStatus {
            revision: applied.revision,
            mode: mode.as_str().to_owned(),
            pods: applied.pods,
            policies: applied.policies,
            verdicts: counts.map(|(reason, packets)| DropCount { reason: reason.name().to_owned(), packets }).collect(),
        }
    }

    /// The other nodes and outside peers, each with the tunnel's name for it.
    pub(super) fn peers_by_owner(&self) -> Vec<(String, Peer)> {
        let tunnel = self.tunnel_peers();
        let in_force = self.lock();
        let Some(plan) = &in_force.plan else { return Vec::new() };
        let mut peers = Vec::new();
        for (owner, member) in in_force.snapshot.members.iter() {
            let status = tunnel.get(&owner.to_string());
            let (path, reason) = worse_path(plan, owner, status);
            let id = match owner {
                Owner::Node(id) => id.to_string(),
                Owner::Lease(_) | Owner::Outside(_) => member.name.clone(),
            };
            let site = member.site.as_ref().map(ToString::to_string);
            let peer = peer(member.name.clone(), id, site, member.prefixes().collect(), path, reason, status);
            peers.push((owner.to_string(), Peer { overlay: member.overlay().collect(), ..peer }));
        }
        for (name, outside) in in_force.snapshot.outside.iter() {
            let owner = Owner::Outside(name.clone());
            let status = tunnel.get(&owner.to_string());
            let (path, reason) = match status {
                Some(_) => (api::Path::Wireguard, String::new()),
                None => (api::Path::Unreachable, "refused here; see status".to_owned()),
            };
            let site = outside.site.as_ref().map(ToString::to_string);
            let name = name.to_string();
            let allowed = outside.allowed_ips.clone();
            let alone = allowed.iter().filter(|net| net.prefix_len() == net.max_prefix_len());
            let overlay = alone.map(IpNet::addr).collect();
            let peer = peer(name.clone(), name, site, allowed, path, reason, status);
            peers.push((owner.to_string(), Peer { overlay, outside: true, ..peer }));
        }
        peers
    }

    fn tunnel_peers(&self) -> BTreeMap<String, PeerStatus> {
        self.tunnel.peers().into_iter().map(|peer| (peer.name.clone(), peer)).collect()
    }
}

impl Source for Published {
    fn status(&self) -> Status {
        let control = self.control.borrow().clone();
        let in_force = self.lock();
        let mut problems: Vec<Problem> = control.problems.iter().map(Problem::from).collect();
        problems.extend(in_force.record_problems.iter().map(Problem::from));
        if let Some(plan) = &in_force.plan {
            problems.extend(plan.problems.iter().cloned());
        }
        problems.extend(in_force.snapshot.problems.iter().cloned());
        problems.extend(in_force.problems.iter().cloned());
        problems.extend(self.enforcement.problems(in_force.plan.is_some()));
        if !control.connected {
            let why = control.error.as_deref().unwrap_or("no member has answered yet");
            problems.push(Problem::new(
                "etcd_unreachable",
                format!("etcd is not reached: {why}"),
                "start etcd, or correct --etcd-endpoints; what is in force stays in force meanwhile",
            ));
        }
        problems.extend(self.tunnel.offloads().refused().map(|offload| {
            Problem::new(
                "offload_refused",
                format!("the kernel refused {offload}, and the tunnel goes on without it, more slowly"),
                "nothing is lost; a newer kernel may be able to, and a restart tries again",
            )
        }));
        let state = state(&control, &in_force, !problems.is_empty());
        problems.extend(self.warnings.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        // One cause is told once, by whoever sees it first.
        let mut seen = std::collections::HashSet::new();
        problems.retain(|problem| seen.insert((problem.code, problem.cause.clone())));
        let mut drops: Vec<DropCount> = self
            .tunnel
            .drops()
            .iter()
            .filter(|(_, packets)| *packets > 0)
            .map(|(reason, packets)| DropCount { reason: reason.name().to_owned(), packets })
            .collect();
        drops.extend(in_force.firewall_drops.iter().cloned());
        Status {
            node: self.identity.name.clone(),
            id: self.identity.id.clone(),
            site: self.identity.site.clone(),
            subnets: in_force.snapshot.own_prefixes().collect(),
            overlay: in_force.snapshot.own_overlay(),
            revision: in_force.snapshot.revision,
            etcd: api::Etcd {
                connected: control.connected,
                endpoint: control.endpoint.clone(),
                age: control.age(Instant::now()).map(|age| age.as_secs_f64()),
            },
            state,
            problems: problems.iter().map(Into::into).collect(),
            policy: self.policy(),
            drops,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn peers(&self) -> Vec<Peer> {
        self.peers_by_owner().into_iter().map(|(_, peer)| peer).collect()
    }

    fn reach(&self, target: &str) -> Result<api::Ping, api::QuestionError> {
        Self::reach(self, target)
    }

    fn diagnose(&self) -> api::Diagnosis {
        Self::diagnose(self)
    }

    fn routes(&self) -> Vec<Route> {
        let in_force = self.lock();
        let Some(plan) = &in_force.plan else { return Vec::new() };
        routes(&in_force.snapshot, plan, &self.identity.interface)
    }

    fn policies(&self) -> Vec<api::Policy> {
        self.enforcement.policies().unwrap_or_default()
    }

    fn policy(&self, name: &str) -> Option<api::ShownPolicy> {
        self.enforcement.policy(name)
    }

    fn explain(&self, question: &api::Question) -> Result<api::Explained, api::QuestionError> {
        self.enforcement.explain(question)
    }

    fn flows(&self, after: u64) -> Vec<FlowSample> {
        self.enforcement.samples(after)
    }

    fn liveness(&self) -> Vec<Check> {
        self.pulse.checks(Instant::now())
    }

    fn readiness(&self) -> Vec<Check> {
        let in_force = self.lock();
        let no_subnet = || match in_force.snapshot.network {
            None => "there is no picture of the mesh yet, from etcd or a cache",
            Some(_) => "this node has no subnet",
        };
        let subnet = in_force.snapshot.own_subnets.is_empty().then(|| no_subnet().to_owned());
        let refused = |problem: &&Problem| matches!(problem.code, "kernel_unreadable" | "kernel_refused");
        let data_plane = match &in_force.plan {
            None => Some("nothing was programmed yet".to_owned()),
            Some(_) => in_force.problems.iter().find(refused).map(|problem| problem.cause.clone()),
        };
        let applied = *self.enforcement.applied().borrow();
        let policy = match applied {
            _ if applied.refused => Some("the kernel does not take the rules of the policies".to_owned()),
            _ if applied.generation == 0 => Some("there is no complete picture of the policies yet".to_owned()),
            _ => None,
        };
        vec![Check::new("subnet", subnet), Check::new("data_plane", data_plane), Check::new("policy", policy)]
    }

    fn figures(&self) -> Figures {
        let control = self.control.borrow();
        Figures {
            interface: self.identity.interface.clone(),
            lists: control.lists,
            audit_differences: control.audit_differences,
            attachments: self.attachments.table().borrow().attachments.len(),
            policy_apply: self.enforcement.applied().borrow().took,
            offloads: self.tunnel.offloads().iter().map(|(name, state)| (name, state == OffloadState::On)).collect(),
        }
    }

    fn device(&self) -> Device {
        let mut tunnel = self.tunnel_peers();
        let in_force = self.lock();
        let configs = in_force.plan.iter().flat_map(|plan| plan.tunnel.peers.values());
        let peers = configs.flat_map(|config| {
            let status = tunnel.remove(&config.name);
            // During a rotation the next key stands behind the one in use.
            config.keys.iter().enumerate().map(move |(at, key)| DevicePeer {
                public_key: *key,
                preshared_key: config.preshared_key.clone(),
                endpoint: status.as_ref().and_then(|status| status.endpoint),
                latest_handshake: status.as_ref().and_then(|status| status.latest_handshake),
                rx_bytes: status.as_ref().map_or(0, |status| status.rx_bytes),
                tx_bytes: status.as_ref().map_or(0, |status| status.tx_bytes),
                keepalive: config.keepalive,
                allowed: if at == 0 { config.allowed.clone() } else { Vec::new() },
            })
        });
        Device {
            peers: peers.collect(),
            private_key: Some(self.private_key.clone()),
            listen_port: self.tunnel.listen_port(),
            mark: 0,
        }
    }

    fn network(&self) -> Result<cni::daemon::Network, String> {
        let in_force = self.lock();
        let plan = in_force.plan.as_ref().ok_or("the daemon knows nothing of the mesh yet")?;
        let subnets: Vec<IpNet> = in_force.snapshot.own_prefixes().collect();
        if subnets.is_empty() {
            return Err("this node has no subnet".to_owned());
        }
        let overlay = in_force.snapshot.own_overlay();
        Ok(cni::daemon::Network { networks: in_force.snapshot.networks().collect(), subnets, overlay, mtu: plan.mtu })
    }

    fn outside_peer_config(&self, name: &str) -> Option<String> {
        let name: PeerName = name.parse().ok()?;
        let in_force = self.lock();
        let mtu = in_force.plan.as_ref()?.mtu;
        peer_config::wg_quick(&name, &in_force.snapshot, &self.identity, &in_force.own_endpoints, mtu)
    }
}

fn state(control: &ControlStatus, in_force: &InForce, problems: bool) -> api::State {
    if control.state == MembershipState::Removed {
        api::State::Removed
    } else if in_force.snapshot.network.is_none() {
        api::State::Starting
    } else if in_force.snapshot.own_subnets.is_empty() {
        api::State::Joining
    } else if problems || !control.connected {
        api::State::Degraded
    } else {
        api::State::Running
    }
}

/// The mesh's routes, by destination; `tun` is the tunnel's device.
fn routes(snapshot: &Snapshot, plan: &Plan, tun: &str) -> Vec<Route> {
    let members = snapshot.members.iter().flat_map(|(owner, member)| {
        member.prefixes().map(move |net| {
            let chosen = plan.paths.get(&(owner.clone(), Family::of_net(&net)));
            let silent = chosen.is_some_and(|chosen| chosen.path == ChosenPath::Silent);
            (net, (member.name.clone(), silent))
        })
    });
    let outside = snapshot
        .outside
        .iter()
        .flat_map(|(name, peer)| peer.allowed_ips.iter().map(move |net| (*net, (name.to_string(), false))));
    let owners: BTreeMap<IpNet, (String, bool)> = members.chain(outside).collect();
    let mut routes: Vec<Route> = plan
        .kernel
        .routes
        .values()
        .map(|route| {
            let (peer, silent) = owners.get(&route.dst).cloned().unwrap_or_default();
            let (path, via, dev) = match &route.path {
                kernel::Path::Direct { via, dev } => (api::Path::Direct, Some(*via), Some(dev.to_string())),
                // It leads into the tunnel, where nobody answers.
                kernel::Path::Tunnel if silent => (api::Path::Unreachable, None, Some(tun.to_owned())),
                kernel::Path::Tunnel => (api::Path::Wireguard, None, Some(tun.to_owned())),
                kernel::Path::Unreachable => (api::Path::Unreachable, None, None),
            };
            Route { dst: route.dst, path, peer, via, dev, mtu: route.mtu, src: route.src }
        })
        .collect();
    routes.extend(plan.kernel.floor.iter().map(|net| Route {
        dst: *net,
        path: api::Path::Unreachable,
        peer: String::new(),
        via: None,
        dev: None,
        mtu: None,
        src: None,
    }));
    routes.sort_by_key(|route| (Family::of_net(&route.dst), route.dst));
    routes
}

/// The path of the family that fares worse.
fn worse_path(plan: &Plan, owner: &Owner, status: Option<&PeerStatus>) -> (api::Path, String) {
    let rank = |chosen: &Chosen| match chosen.path {
        ChosenPath::Direct(_) => 0,
        ChosenPath::Wireguard => 1,
        ChosenPath::Silent => 2,
        ChosenPath::Unreachable => 3,
    };
    let families: Vec<(Family, &Chosen)> = Family::BOTH
        .into_iter()
        .filter_map(|family| Some((family, plan.paths.get(&(owner.clone(), family))?)))
        .collect();
    let Some((family, chosen)) = families.iter().max_by_key(|(_, chosen)| rank(chosen)) else {
        return (api::Path::Unreachable, "it has no subnet that holds".to_owned());
    };
    let differ = families.iter().any(|(_, other)| rank(other) != rank(chosen));
    let path = match chosen.path {
        ChosenPath::Direct(_) => api::Path::Direct,
        ChosenPath::Wireguard => api::Path::Wireguard,
        ChosenPath::Silent | ChosenPath::Unreachable => api::Path::Unreachable,
    };
    let mut reason = match family {
        _ if !differ || chosen.reason.is_empty() => chosen.reason.clone(),
        Family::V4 => format!("IPv4: {}", chosen.reason),
        Family::V6 => format!("IPv6: {}", chosen.reason),
    };
    if status.is_some_and(|status| status.without_df) {
        let note = "the path carries less than an inner packet of 1280 bytes: outer packets are fragmented";
        reason = if reason.is_empty() { note.to_owned() } else { format!("{reason}; {note}") };
    }
    (path, reason)
}

fn peer(
    name: String,
    id: String,
    site: Option<String>,
    subnets: Vec<IpNet>,
    path: api::Path,
    reason: String,
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
        path,
        reason,
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
    use super::*;
    use crate::mesh::{
        path::DirectState,
        plan::{Local, Observed, UnderlayLink, plan},
        snapshot::Member,
    };

    fn neighbour() -> Member {
        Member {
            name: "b".to_owned(),
            site: Some("east".parse().unwrap()),
            keys: vec![PrivateKey::from_bytes([2; 32]).public()],
            listen_port: 51820,
            endpoints: vec!["192.168.1.2:51820".parse().unwrap()],
            addresses: vec!["192.168.1.2/24".parse().unwrap()],
            subnets: vec!["10.244.2.0-24&fd42:244:0:2::-64".parse().unwrap()],
            unusable: None,
            version: String::new(),
        }
    }

    /// The routes to a neighbour whose IPv4 path is in `state`.
    fn routes_while(state: DirectState) -> Vec<(String, api::Path, Option<String>)> {
        let config = br#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#;
        let id: etcd_schema::NodeId = "bb".parse().unwrap();
        let snapshot = Snapshot {
            network: Some(etcd_schema::NetworkConfig::parse(config).unwrap()),
            own_subnets: vec!["10.244.1.0-24&fd42:244:0:1::-64".parse().unwrap()],
            members: [(Owner::Node(id.clone()), Arc::new(neighbour()))].into_iter().collect(),
            ..Snapshot::default()
        };
        let link = UnderlayLink {
            name: "eth0".parse().unwrap(),
            index: 7,
            mtu: 1500,
            addresses: vec!["192.168.1.1/24".parse().unwrap()],
        };
        let local = Local {
            site: Some("east".to_owned()),
            underlay: BTreeMap::from([(Family::V4, link)]),
            has_endpoint: true,
            listen_port: 51820,
            protected: Vec::new(),
            ip_masq: true,
            forward_accept: false,
        };
        let observed = Observed { paths: BTreeMap::from([((id, Family::V4), state)]), ..Observed::default() };
        routes(&snapshot, &plan(&snapshot, &local, &observed), "meshd0")
            .into_iter()
            .filter(|route| route.peer == "b")
            .map(|route| (route.dst.to_string(), route.path, route.dev))
            .collect()
    }

    #[test]
    fn a_silent_peer_is_unreachable_in_the_family_that_it_is_silent_in() {
        let route = |dst: &str, path, dev: &str| (dst.to_owned(), path, Some(dev.to_owned()));
        let v6 = || route("fd42:244:0:2::/64", api::Path::Wireguard, "meshd0");
        assert_eq!(routes_while(DirectState::Silent), [route("10.244.2.0/24", api::Path::Unreachable, "meshd0"), v6()]);
        assert_eq!(routes_while(DirectState::Direct), [route("10.244.2.0/24", api::Path::Direct, "eth0"), v6()]);
    }
}
