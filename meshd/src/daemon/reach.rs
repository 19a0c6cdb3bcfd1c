//! Tests reachability of a node or an address, layer by layer. Blocking: for a thread that may wait.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant, SystemTime},
};

use api_types::{Finding, Layer, LayerKind, Path, Ping, Question, QuestionError, Severity};
use ipnet::IpNet;
use mesh::{
    address::Family,
    backend::PathKind,
    path::Via,
    problem::ProblemCode,
    topology::{PeerId, Topology},
};

use super::published::ApiState;
use crate::echo::{Echo, EchoError, UdpPort, probe_udp};

/// Echoes that are tried before there is no answer.
const TRIES: usize = 3;
/// How long a handshake is waited for: it is sent again after 5 s.
const HANDSHAKE: Duration = Duration::from_secs(6);
/// A session is renewed after two minutes while there is traffic; an older one may be over.
const FRESH: Duration = Duration::from_secs(120);
/// Between two looks at the tunnel.
const LOOK: Duration = Duration::from_millis(5);
/// How long a closed port may take to say so.
const KNOCK: Duration = Duration::from_millis(500);
/// Endpoints of one peer that are knocked at.
const KNOCKED: usize = 4;

/// A target, looked up once, so that no lock is held during the test.
struct PingTarget {
    peer: String,
    /// The tunnel's name for it.
    owner: String,
    path: Path,
    mtu: Option<u16>,
    reason: String,
    /// Its overlay addresses, or the requested address.
    overlay: Vec<IpAddr>,
    /// The requested address behind the node.
    inner: Option<IpAddr>,
    endpoints: Vec<SocketAddr>,
    /// Which families go by the plain route, and how.
    direct: Vec<(Family, String)>,
    tunnelled: bool,
}

impl ApiState {
    /// Asks every layer between here and `target`: a node's or external peer's name, its id, or an address of the mesh.
    pub(super) fn reach(&self, target: &str) -> Result<Ping, QuestionError> {
        let asked = self.look_up(target)?;
        let overlay: Vec<Layer> =
            asked.overlay.iter().map(|address| self.echo_layer(&asked, LayerKind::Overlay, *address)).collect();
        let inner = asked.inner.map(|address| self.echo_layer(&asked, LayerKind::Pod, address));
        let answered = overlay.iter().chain(&inner).any(|layer| layer.passes == Some(true));
        let mut layers = self.forwarding_layers(&asked);
        if asked.tunnelled {
            // A session may outlive the way that it was made by: without an answer only a new one shows anything.
            self.tunnel_layers(&asked, !answered, &mut layers);
        }
        for (family, how) in &asked.direct {
            layers.push(Layer {
                layer: LayerKind::Direct,
                address: how.clone(),
                passes: Some(true),
                round_trip: None,
                text: format!("proven for {} by an authenticated echo over this path", family_name(*family)),
                remedy: String::new(),
            });
        }
        layers.extend(overlay.into_iter().chain(inner));
        Ok(Ping { target: target.to_owned(), peer: asked.peer, path: asked.path, mtu: asked.mtu, layers })
    }

    /// Layers that fail for forwarded packets of pods only, not for the node's own.
    fn forwarding_layers(&self, asked: &PingTarget) -> Vec<Layer> {
        let others: Vec<IpAddr> = if asked.owner.is_empty() {
            // A pod of this node: judged as packets from any other node.
            let in_force = self.lock();
            in_force.topology.members.values().take(1).flat_map(|member| member.overlay()).collect()
        } else {
            asked.overlay.iter().copied().chain(asked.inner).collect()
        };
        let mut found = self.not_forwarded(&others);
        let families: Vec<bool> = others.iter().map(IpAddr::is_ipv4).collect();
        let control = self.control.borrow().clone();
        let problems = self.problems(&control, &self.peers_by_owner()).problems;
        let known = problems.iter().filter(|problem| problem.code == ProblemCode::ForwardingOff);
        for problem in known.filter(|_| families.contains(&true)) {
            let finding = Finding::new(Severity::Error, problem.code, problem.to_string(), problem.remedy.clone());
            if !found.contains(&finding) {
                found.push(finding);
            }
        }
        let layer = |finding: Finding| Layer {
            layer: LayerKind::Forwarding,
            address: self.identity.name.clone(),
            passes: Some(false),
            round_trip: None,
            text: finding.cause,
            remedy: finding.remedy,
        };
        found.into_iter().map(layer).collect()
    }

    fn look_up(&self, target: &str) -> Result<PingTarget, QuestionError> {
        let networks: Vec<IpNet> = self.lock().topology.networks().collect();
        let unknown = || {
            let address = target.parse::<IpAddr>().ok();
            let network = address.and_then(|address| networks.iter().find(|net| net.contains(&address)));
            QuestionError::NotFound(match network {
                Some(network) => format!(
                    "{target} is in the mesh network {network}, but in no leased subnet: meshctl routes lists the \
                     leased ones"
                ),
                None => format!("{target} is not a node, external peer or address of the mesh"),
            })
        };
        let peers = self.peers_by_owner();
        let address: Option<IpAddr> = target.parse().ok();
        let in_force = self.lock();
        let topology = &in_force.topology;
        if address.is_some_and(|address| topology.own_prefixes().any(|net| net.contains(&address)))
            || target == self.identity.id
            // A name that an older node has means that one.
            || target == self.identity.name && owner_named(topology, target).is_none()
        {
            return Ok(PingTarget {
                peer: self.identity.name.clone(),
                owner: String::new(),
                path: Path::By(PathKind::HostGw),
                mtu: None,
                reason: String::new(),
                overlay: if address.is_some() { Vec::new() } else { topology.own_overlay() },
                inner: address,
                endpoints: Vec::new(),
                direct: Vec::new(),
                tunnelled: false,
            });
        }
        let owner = match address {
            Some(address) => owner_of(topology, address),
            None => owner_named(topology, target),
        }
        .ok_or_else(unknown)?;
        let Some(plan) = &in_force.plan else { return Err(unknown()) };
        let (peer, overlay, mut endpoints) = whereabouts(topology, &owner).ok_or_else(unknown)?;
        let overlay = match address {
            // Only the family that is asked for.
            Some(address) => overlay.into_iter().filter(|own| own.is_ipv4() == address.is_ipv4()).collect(),
            None => overlay,
        };
        let families: Vec<_> = Family::BOTH
            .into_iter()
            .filter(|family| address.is_none_or(|address| Family::of(address) == *family))
            .filter_map(|family| Some((family, plan.paths.get(&(owner.clone(), family))?)))
            .collect();
        let direct = families.iter().filter_map(|(family, chosen)| match &chosen.via {
            Via::Link(_, link) => Some((*family, format!("via {}", link.next_hop))),
            Via::Vtep(_, vtep) => Some((*family, format!("by VXLAN to {}", vtep.address))),
            Via::Tun(_) | Via::Nowhere => None,
        });
        let direct: Vec<_> = direct.collect();
        let known = peers.iter().find(|(name, _)| *name == owner.to_string()).map(|(_, peer)| peer);
        endpoints.extend(known.and_then(|peer| peer.endpoint).filter(|at| !endpoints.contains(at)));
        Ok(PingTarget {
            peer,
            owner: owner.to_string(),
            path: known.map_or(Path::Unreachable, |peer| peer.path),
            mtu: Some(known.and_then(|peer| peer.mtu).map_or(plan.mtu, |carried| carried.min(plan.mtu))),
            reason: known.map_or_else(String::new, |peer| peer.reason.clone()),
            inner: address.filter(|address| !overlay.contains(address)),
            overlay,
            endpoints,
            tunnelled: direct.len() < families.len().max(1),
            direct,
        })
    }

    /// The outer path and the session.
    fn tunnel_layers(&self, asked: &PingTarget, again: bool, layers: &mut Vec<Layer>) {
        let shake = self.handshake(&asked.owner, again);
        let at = match (shake.endpoint, asked.endpoints.first()) {
            (Some(at), _) | (None, Some(&at)) => at.to_string(),
            (None, None) => "no known endpoint".to_owned(),
        };
        let udp = |passes, round_trip, text: String, remedy: String| Layer {
            layer: LayerKind::Udp,
            address: at.clone(),
            passes,
            round_trip,
            text,
            remedy,
        };
        let well = shake.age.is_some();
        layers.push(if well {
            udp(Some(true), None, "authenticated datagrams received".to_owned(), String::new())
        } else {
            let (passes, round_trip, text, remedy) = outer(&asked.endpoints);
            udp(passes, round_trip, text, remedy)
        });
        let (text, remedy) = match shake.age {
            Some(age) if shake.took.is_some() => (format!("new handshake, {} s old", age.as_secs()), String::new()),
            Some(age) => (format!("last handshake {} s ago", age.as_secs()), String::new()),
            None if asked.path == Path::Unreachable && !asked.reason.is_empty() => {
                (asked.reason.clone(), "run meshctl status on both nodes".to_owned())
            }
            None => (
                format!("no handshake within {} s", HANDSHAKE.as_secs()),
                format!(
                    "meshctl status # on {}: check that it is up and that its record has its current key",
                    asked.peer
                ),
            ),
        };
        layers.push(Layer {
            layer: LayerKind::Wireguard,
            address: at,
            passes: Some(well),
            round_trip: shake.took.map(|took| took.as_secs_f64()),
            text,
            remedy,
        });
    }

    /// Makes a session where there is no fresh one, or `again` in any case.
    fn handshake(&self, owner: &str, again: bool) -> Shake {
        let look = || self.tunnel.peers().into_iter().find(|peer| peer.name == owner);
        let age = |at: Option<SystemTime>| at.and_then(|at| at.elapsed().ok());
        let Some(before) = look() else { return Shake::default() };
        let before_age = age(before.latest_handshake);
        if !again && before.session.alive && before_age.is_some_and(|age| age < FRESH) {
            return Shake { endpoint: before.endpoint, age: before_age, took: None };
        }
        let start = Instant::now();
        self.tunnel.initiate(owner);
        while start.elapsed() < HANDSHAKE {
            if let Some(now) = look() {
                let (took, since) = (start.elapsed(), age(now.latest_handshake));
                if since.is_some_and(|since| since <= took) {
                    return Shake { endpoint: now.endpoint, age: since, took: Some(took) };
                }
            }
            thread::sleep(LOOK);
        }
        Shake { endpoint: before.endpoint, age: None, took: None }
    }

    fn echo_layer(&self, asked: &PingTarget, layer: LayerKind, address: IpAddr) -> Layer {
        let mut last = EchoError::NoAnswer;
        for _ in 0..TRIES {
            match Echo::to(address).ask() {
                Ok(took) => {
                    return Layer {
                        layer,
                        address: address.to_string(),
                        passes: Some(true),
                        round_trip: Some(took.as_secs_f64()),
                        text: "answers".to_owned(),
                        remedy: String::new(),
                    };
                }
                Err(error) => last = error,
            }
        }
        let (text, remedy) = self.why_silent(asked, layer, address, &last);
        Layer { layer, address: address.to_string(), passes: Some(false), round_trip: None, text, remedy }
    }

    /// Possible causes of an unanswered echo.
    fn why_silent(&self, asked: &PingTarget, layer: LayerKind, address: IpAddr, error: &EchoError) -> (String, String) {
        if let EchoError::Socket(_) = error {
            return (error.to_string(), "give the daemon CAP_NET_RAW (AmbientCapabilities= in its unit)".to_owned());
        }
        if let EchoError::Barred = error {
            return (error.to_string(), format!("nft list ruleset # accept packets to {address} in the output chain"));
        }
        if layer == LayerKind::Pod {
            let source = self.lock().topology.own_overlay().into_iter().find(|own| own.is_ipv4() == address.is_ipv4());
            let question = source.map(|source| Question {
                source: source.to_string(),
                destination: address.to_string(),
                service: "icmp".to_owned(),
            });
            let explained = question.and_then(|question| self.enforcement.explain(&question).ok());
            if let Some(explained) = explained.filter(|explained| !explained.allowed) {
                return (
                    format!("{error}: policy denies it to this node; {}", explained.ingress.text),
                    format!(
                        "ping from a pod that is allowed to; check with: meshctl policy explain SRC {address} icmp"
                    ),
                );
            }
            return (
                error.to_string(),
                format!("check that a pod has this address and answers pings; run meshctl status on {}", asked.peer),
            );
        }
        (
            error.to_string(),
            format!("meshctl doctor # on {}: a firewall drops pings there, or its daemon is down", asked.peer),
        )
    }
}

/// The state of a session.
#[derive(Default)]
struct Shake {
    endpoint: Option<SocketAddr>,
    /// Of the handshake that the session in use comes from.
    age: Option<Duration>,
    /// Of one that was made now.
    took: Option<Duration>,
}

/// The outer layer of hosts that answer no handshake.
fn outer(endpoints: &[SocketAddr]) -> (Option<bool>, Option<f64>, String, String) {
    if endpoints.is_empty() {
        let remedy = "this peer must initiate the handshake: run meshctl ping to this node there";
        return (
            None,
            None,
            "no endpoint: it initiates handshakes itself and has not done so yet".to_owned(),
            remedy.to_owned(),
        );
    }
    for at in endpoints.iter().take(KNOCKED) {
        match probe_udp(*at, KNOCK) {
            Ok(UdpPort::Closed) => {
                return (
                    Some(false),
                    None,
                    format!("{} refuses UDP port {}: no process is listening", at.ip(), at.port()),
                    format!("start meshd there; check --listen-port {} and any port forwarding on a NAT", at.port()),
                );
            }
            Ok(UdpPort::Barred) => {
                return (
                    Some(false),
                    None,
                    format!("a firewall on this machine blocks packets to {}, UDP port {}", at.ip(), at.port()),
                    format!("nft list ruleset # accept UDP to port {} in the output chain", at.port()),
                );
            }
            Ok(UdpPort::NoWay) => {
                return (
                    Some(false),
                    None,
                    format!("no route to {}", at.ip()),
                    format!("ip route get {} # then fix the route or the link", at.ip()),
                );
            }
            Ok(UdpPort::Silent) | Err(_) => {}
        }
    }
    let answered = endpoints.iter().take(KNOCKED).find_map(|at| Some((at, Echo::to(at.ip()).ask().ok()?)));
    match answered {
        Some((at, took)) => (
            Some(false),
            Some(took.as_secs_f64()),
            format!("host {} answers pings, but there is no answer from UDP port {}", at.ip(), at.port()),
            format!("open UDP port {} in the firewalls on the path and on that host, and start meshd there", at.port()),
        ),
        None => (
            None,
            None,
            "no answer to pings or UDP: the host is down or unreachable".to_owned(),
            format!(
                "check that the host is up; ip route get {}; open UDP port {} on the path",
                endpoints[0].ip(),
                endpoints[0].port()
            ),
        ),
    }
}

fn owner_of(topology: &Topology, address: IpAddr) -> Option<PeerId> {
    let members = topology.members.iter().flat_map(|(owner, member)| member.prefixes().map(|net| (net, owner.clone())));
    let outside = topology
        .outside
        .iter()
        .flat_map(|(name, outside)| outside.allowed_ips.iter().map(|net| (*net, PeerId::Outside(name.clone()))));
    let holding = members.chain(outside).filter(|(net, _)| net.contains(&address));
    holding.max_by_key(|(net, _)| net.prefix_len()).map(|(_, owner)| owner)
}

fn owner_named(topology: &Topology, name: &str) -> Option<PeerId> {
    let member = topology
        .members
        .iter()
        .find(|(owner, member)| member.name == name || matches!(owner, PeerId::Node(id) if id.to_string() == name));
    member.map(|(owner, _)| owner.clone()).or_else(|| {
        let outside = topology.outside.iter().find(|(outside, _)| outside.to_string() == name);
        outside.map(|(outside, _)| PeerId::Outside(outside.clone()))
    })
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// The name of a peer, its addresses in the mesh and its endpoints.
fn whereabouts(topology: &Topology, owner: &PeerId) -> Option<(String, Vec<IpAddr>, Vec<SocketAddr>)> {
    Some(match owner {
        PeerId::Outside(name) => {
            let outside = topology.outside.get(name)?;
            // Prefixes of a single address: other hosts behind the peer are unknown.
            let hosts = outside.allowed_ips.iter().filter(|net| net.prefix_len() == net.max_prefix_len());
            (name.to_string(), hosts.map(IpNet::addr).collect(), outside.endpoint.into_iter().collect())
        }
        PeerId::Node(_) | PeerId::Lease(_) => {
            let member = topology.members.get(owner)?;
            (member.name.clone(), member.overlay().collect(), member.endpoints.clone())
        }
    })
}
