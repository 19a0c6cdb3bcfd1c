//! One daemon with thousands of peers: silent ones, ones that all come at once, and forgers.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use integration::{
    Etcd, EtcdWriter, Host, LARGE_CONFIG, Meshd, MeshdNode, PaperNode, Process, WireguardPeer, await_until, key_pair,
    measure::{
        Better, Comparison, Datagrams, Forger, Forgeries, Handshakes, Packing, Series, process_cpu, resident_bytes,
    },
    topology::Star,
};
use serde_json::{Value, json};

use crate::{
    settings::Settings,
    subject::{Kind, READY, Subject, WIREGUARD_PORT},
    tcp,
};

/// Where the crowd is: all of it is local to one host.
const CROWD: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 0);
/// What flows through the tunnel while forgers are about, bits per second of payload.
const FLOW: f64 = 1e9;
const FLOW_DATAGRAM: usize = 1372;
/// Forged initiations a second.
const FLOOD: f64 = 20_000.0;

/// A daemon that waits for its peers to be configured.
struct Server {
    kind: Kind,
    host: Host,
    at: SocketAddr,
    key: [u8; 32],
    ends: End,
}

enum End {
    Mesh(Box<(MeshdNode, EtcdWriter, Etcd)>),
    Wireguard { peer: Box<WireguardPeer>, private_key: String },
}

/// Peers that are configured and never say anything.
pub(crate) fn idle(settings: &Settings, name: &str) -> Comparison {
    let (peers, length) = if settings.quick { (500, 2) } else { (5000, 20) };
    let mut comparison = Comparison::new(name, &format!("{peers} configured peers, idle, for {length} s"));
    comparison
        .note("meshd gets them as registered nodes of its mesh, with a route to each one's subnet; the others by wg.");
    let mut star = Star::new(name);
    for kind in settings.subjects(&[Kind::Meshd, Kind::WireguardGo, Kind::Boringtun, Kind::Gotatun]) {
        let mut server = Server::start(&mut star, kind, settings);
        thread::sleep(Duration::from_secs(2));
        let empty = server.resident();
        server.configure_silent(peers);
        thread::sleep(Duration::from_secs(3));
        let (sent, cpu, start) = (server.datagrams_sent(), process_cpu(server.pid()), Instant::now());
        thread::sleep(Duration::from_secs(length));
        let share = (process_cpu(server.pid()) - cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        let mut record = |metric: &str, value| comparison.record(metric, Better::Lower, kind.name(), value);
        record("RSS above that without peers, MB", server.resident() - empty);
        record("RSS without peers, MB", empty);
        record("CPU, % of a core", share);
        record("UDP datagrams sent", (server.datagrams_sent() - sent) as f64);
    }
    comparison
}

/// Peers that all want a session at the same moment.
pub(crate) fn handshakes(settings: &Settings, name: &str) -> Comparison {
    let (peers, turns) = if settings.quick { (300, 1) } else { (5000, 3) };
    let title = format!("{peers} peers that initiate at once, the clients on the same cores");
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "One value per turn, from the first initiation on. A client tries again as the protocol wants it: after 5 s.",
    );
    let clients = Handshakes::new(peers);
    let mut star = Star::new(name);
    let crowd = crowd(&mut star);
    for kind in settings.subjects(&[Kind::Meshd, Kind::WireguardGo, Kind::Boringtun]) {
        let mut server = Server::start(&mut star, kind, settings);
        server.configure_clients(&clients);
        for _ in 0..turns {
            let before = process_cpu(server.pid());
            let report = clients.run(&crowd, CROWD, server.at, server.key, Duration::from_secs(30));
            let cpu = (process_cpu(server.pid()) - before).as_secs_f64();
            let mut record = |metric: &str, value| comparison.record(metric, Better::Lower, kind.name(), value);
            let up = report.seconds.values().len();
            // Those without a session count as the slowest.
            let all: Series =
                report.seconds.values().iter().copied().chain((up..report.wanted).map(|_| f64::INFINITY)).collect();
            record("median, s", all.quantile(0.5));
            record("p99, s", all.quantile(0.99));
            record("without a session after 30 s", (report.wanted - up) as f64);
            record("CPU of the daemon, µs per session", cpu * 1e6 / up.max(1) as f64);
            // Handshakes of a turn must not be taken for repetitions of those before.
            thread::sleep(Duration::from_secs(1));
        }
    }
    comparison
}

/// A flow through the tunnel while forged initiations arrive at its receiver.
pub(crate) fn forgeries(settings: &Settings, name: &str) -> Comparison {
    let length = Duration::from_secs(if settings.quick { 1 } else { 4 });
    let title =
        format!("a flow paced at {} Gbit/s beside {} forged initiations a second to its receiver", FLOW / 1e9, FLOOD);
    let mut comparison = Comparison::new(name, &title);
    comparison.note(
        "Super-datagrams of the application. The cost of a forgery is the processor time of the receiver's daemon while \
         nothing but the flood arrives.",
    );
    let turns = if settings.quick { 1 } else { settings.turns.min(3) };
    let mut star = Star::new(name);
    let crowd = crowd(&mut star);
    let subjects = tcp::start_all(settings, &mut star, &[Kind::Meshd, Kind::WireguardGo]);
    for _ in 0..turns {
        for (_, subject) in &subjects {
            beside_forgeries(&mut comparison, subject, &crowd, length);
        }
    }
    comparison
}

fn beside_forgeries(comparison: &mut Comparison, subject: &Subject, crowd: &Host, length: Duration) {
    let name = subject.kind.name();
    let (pid, at, key) = subject.receiver();
    let flow =
        Datagrams::new(&subject.left, &subject.right, subject.right_address(), FLOW_DATAGRAM, Packing::Segmented);
    let rate = FLOW / 8.0 / FLOW_DATAGRAM as f64;
    let arrived = flow.send(rate, length);
    comparison.record("arrives without a flood, %", Better::Higher, name, 100.0 * (1.0 - arrived.loss()));
    for (what, forger) in [("wrong", Forger::Stranger), ("right", Forger::KnowsTheKey(key))] {
        let flood = Forgeries::new(forger);
        let before = process_cpu(pid);
        let sent = flood.send(crowd, CROWD, at, FLOOD, length);
        let each = (process_cpu(pid) - before).as_secs_f64() * 1e6 / sent.max(1) as f64;
        comparison.record(&format!("CPU of the daemon per forgery, {what} mac1, µs"), Better::Lower, name, each);
        let arrived = thread::scope(|scope| {
            let flood = scope.spawn(|| flood.send(crowd, CROWD, at, FLOOD, length));
            let arrived = flow.send(rate, length);
            let _ = flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            arrived
        });
        let share = 100.0 * (1.0 - arrived.loss());
        comparison.record(&format!("arrives beside forgeries with a {what} mac1, %"), Better::Higher, name, share);
    }
}

/// A host with all of 172.20.0.0/16 as its own.
fn crowd(star: &mut Star) -> Host {
    let (host, address) = star.host("crowd");
    host.ip(&[&format!("route add local {CROWD}/16 dev lo")]);
    star.router.route(&format!("{CROWD}/16"), &format!("via {address}"));
    host
}

impl Server {
    fn start(star: &mut Star, kind: Kind, settings: &Settings) -> Self {
        let (host, address) = star.host(kind.name());
        let at = SocketAddr::new(address.parse().expect("an address"), WIREGUARD_PORT);
        let Some(implementation) = kind.implementation() else {
            let (store, address) = star.host(&format!("store-{}", kind.name()));
            let etcd = Etcd::start(&store, &[&address], 1);
            etcd.put("/meshd/config", LARGE_CONFIG);
            let writer = EtcdWriter::connect(&etcd, &store);
            let node = Meshd::on(&host, &etcd).site("here");
            let node = match settings.other_meshd.as_deref().filter(|_| kind == Kind::MeshdOther) {
                Some(program) => node.program(program),
                None => node,
            };
            let node = node.start();
            node.await_ready(READY);
            let key = node_key(&node, &etcd);
            return Self { kind, host, at, key, ends: End::Mesh(Box::new((node, writer, etcd))) };
        };
        let (private_key, public_key) = key_pair(&host);
        let peer = WireguardPeer::start(&host, implementation, &[]);
        peer.setconf(&interface_section(&private_key));
        let key = decode(&public_key);
        Self { kind, host, at, key, ends: End::Wireguard { peer: Box::new(peer), private_key } }
    }

    fn configure_silent(&mut self, peers: u16) {
        match &mut self.ends {
            End::Mesh(mesh) => {
                let entries: Vec<_> = (0..peers).flat_map(|number| PaperNode::new(number).entries()).collect();
                mesh.1.put_all(&entries);
            }
            End::Wireguard { peer, private_key } => {
                let sections = (0..peers).map(|number| {
                    let node = PaperNode::new(number);
                    peer_section(&node.public_key(), &format!("{}/24", node.subnet()), Some(node.endpoint()))
                });
                peer.setconf(&(interface_section(private_key) + &sections.collect::<String>()));
            }
        }
        self.await_peers(usize::from(peers));
    }

    fn configure_clients(&mut self, clients: &Handshakes) {
        let keys: Vec<[u8; 32]> = clients.public_keys().collect();
        let allowed = |number: usize| {
            let first = u32::from(Ipv4Addr::new(10, 9, 0, 0));
            format!("{}/32", Ipv4Addr::from(first + u32::try_from(number).unwrap_or(u32::MAX)))
        };
        match &mut self.ends {
            End::Mesh(mesh) => {
                let entries = keys.iter().enumerate().map(|(number, key)| {
                    let record = json!({"publicKey": STANDARD.encode(key), "allowedIPs": [allowed(number)]});
                    (format!("/meshd/peers/client-{number}"), record.to_string())
                });
                mesh.1.put_all(&entries.collect::<Vec<_>>());
            }
            End::Wireguard { peer, private_key } => {
                let sections = keys.iter().enumerate().map(|(number, key)| peer_section(key, &allowed(number), None));
                peer.setconf(&(interface_section(private_key) + &sections.collect::<String>()));
            }
        }
        self.await_peers(keys.len());
    }

    fn await_peers(&self, count: usize) {
        await_until(&format!("{} peers of {}", count, self.kind.name()), READY, || {
            let there = match &self.ends {
                End::Mesh(mesh) => mesh.0.try_json(&["peers"])?.as_array()?.len(),
                End::Wireguard { peer, .. } => peer.show("peers").lines().count(),
            };
            (there >= count).then_some(())
        });
    }

    fn pid(&self) -> u32 {
        match &self.ends {
            End::Mesh(mesh) => mesh.0.with_process(Process::pid),
            End::Wireguard { peer, .. } => peer.process().pid(),
        }
    }

    /// In megabytes.
    fn resident(&self) -> f64 {
        resident_bytes(self.pid()) as f64 / 1e6
    }

    /// By everything on the host, since it was made.
    fn datagrams_sent(&self) -> u64 {
        let text = self.host.enter(|| fs::read_to_string("/proc/thread-self/net/snmp")).unwrap_or_default();
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
        let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        pairs.find(|(name, _)| *name == "OutDatagrams").and_then(|(_, value)| value.parse().ok()).unwrap_or_default()
    }
}

/// The public key in a node's record.
pub(crate) fn node_key(node: &MeshdNode, etcd: &Etcd) -> [u8; 32] {
    let id = node.status()["id"].as_str().unwrap_or_default().to_owned();
    let record: Value = etcd
        .get(&format!("/meshd/nodes/{id}"))
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_else(|| panic!("no record of {}", node.name()));
    decode(record["publicKey"].as_str().unwrap_or_default())
}

/// A key as `wg` writes it.
pub(crate) fn decode(key: &str) -> [u8; 32] {
    let bytes = STANDARD.decode(key).unwrap_or_default();
    bytes.try_into().unwrap_or_else(|_| panic!("{key} is not a key"))
}

fn interface_section(private_key: &str) -> String {
    format!("[Interface]\nPrivateKey = {private_key}\nListenPort = {WIREGUARD_PORT}\n")
}

fn peer_section(key: &[u8; 32], allowed: &str, endpoint: Option<IpAddr>) -> String {
    let endpoint = endpoint.map(|at| format!("Endpoint = {at}:{WIREGUARD_PORT}\n")).unwrap_or_default();
    format!("[Peer]\nPublicKey = {}\nAllowedIPs = {allowed}\n{endpoint}", STANDARD.encode(key))
}
