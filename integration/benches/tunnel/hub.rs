//! One host that talks to eight, beside the same host that talks to one.

use std::{net::IpAddr, thread, time::Duration};

use integration::{
    Etcd, Iperf, Meshd, MeshdNode, Pod, WireguardPeer, await_ok, key_pair,
    measure::{Better, Comparison, Cost},
    ping,
    topology::Star,
};

use crate::{
    settings::Settings,
    subject::{CONFIG, Kind, Place, READY, TUNNEL_MTU, WIREGUARD_PORT},
    tcp::{COST, THROUGHPUT},
    turns::{self, Taken},
};

const SPOKES: usize = 8;

/// A subject with one host in the middle.
struct Hub {
    kind: Kind,
    center: Pod,
    spokes: Vec<Pod>,
    _ends: Ends,
}

enum Ends {
    Mesh { _nodes: Vec<MeshdNode>, _etcd: Etcd },
    Peers { _peers: Vec<WireguardPeer> },
}

/// Eight streams from the host in the middle: to eight peers, and to one of them.
pub(crate) fn peers(settings: &Settings, name: &str) -> Comparison {
    let title = format!("TCP, {SPOKES} streams from one host, to {SPOKES} peers and to one");
    let mut comparison = Comparison::new(name, &title);
    let mut star = Star::new(name);
    let [ours, theirs] = [Kind::Meshd, Kind::WireguardGo].map(|kind| Hub::start(&mut star, kind));
    for hub in [&ours, &theirs] {
        hub.spokes.iter().chain([&hub.center]).for_each(|pod| settings.prepare(pod));
    }
    let subjects: Vec<(String, (&Hub, usize))> = [(&ours, SPOKES), (&ours, 1), (&theirs, SPOKES), (&theirs, 1)]
        .map(|(hub, peers)| (format!("{}, {peers} busy", hub.kind.name()), (hub, peers)))
        .into();
    turns::take(&mut comparison, settings.turns, &subjects, |(hub, peers), _| {
        let ((bits, bytes), cost) = Cost::of(|| hub.send(*peers, settings.transfer));
        let values =
            vec![(THROUGHPUT, Better::Higher, bits / 1e9), (COST, Better::Lower, cost.cpu.busy / (bytes / 1e9))];
        Taken { values, cost, more: () }
    });
    comparison
}

impl Hub {
    fn start(star: &mut Star, kind: Kind) -> Self {
        let places: Vec<Place> = (0..=SPOKES).map(|number| star.host(&format!("{}-{number}", kind.name()))).collect();
        let (pods, ends) = match kind {
            Kind::Meshd => mesh(star, kind, &places),
            _ => wireguard(kind, &places),
        };
        let mut pods = pods.into_iter();
        let center = pods.next().expect("a pod in the middle");
        let hub = Self { kind, center, spokes: pods.collect(), _ends: ends };
        for spoke in &hub.spokes {
            await_ok(&format!("{} to reach {}", kind.name(), spoke.name()), READY, || {
                let report = ping(&hub.center, spoke.v4());
                if report.lost() == 0 { Ok(()) } else { Err(report.text) }
            });
        }
        hub
    }

    /// Sends to this many spokes, and returns bits per second and bytes that arrived, of all streams.
    fn send(&self, peers: usize, length: Duration) -> (f64, f64) {
        let seconds = u16::try_from(length.as_secs()).unwrap_or(u16::MAX);
        let streams = u16::try_from(SPOKES / peers).unwrap_or(u16::MAX);
        thread::scope(|scope| {
            let threads: Vec<_> = self.spokes[..peers]
                .iter()
                .map(|spoke| {
                    let iperf = Iperf::new(spoke.v4()).seconds(seconds).streams(streams);
                    scope.spawn(move || iperf.run(&self.center, spoke))
                })
                .collect();
            let mut sum = (0.0, 0.0);
            for thread in threads {
                let through = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                sum.0 += through.bits_per_second;
                sum.1 += through.report["end"]["sum_received"]["bytes"].as_f64().unwrap_or_default();
            }
            sum
        })
    }
}

fn mesh(star: &mut Star, kind: Kind, places: &[Place]) -> (Vec<Pod>, Ends) {
    let (store, address) = star.host(&format!("store-{}", kind.name()));
    let etcd = Etcd::start(&store, &[&address], 1);
    etcd.put("/meshd/config", CONFIG);
    // A site for each: none may be direct to another.
    let nodes: Vec<MeshdNode> =
        places.iter().map(|(host, _)| Meshd::on(host, &etcd).site(host.name()).start()).collect();
    let pods = nodes
        .iter()
        .map(|node| {
            node.await_ready(READY);
            let pod = node.pod("pod");
            pod.set_mtu(TUNNEL_MTU);
            pod
        })
        .collect();
    (pods, Ends::Mesh { _nodes: nodes, _etcd: etcd })
}

fn wireguard(kind: Kind, places: &[Place]) -> (Vec<Pod>, Ends) {
    let implementation = kind.implementation().expect("a program that wg configures");
    let address = |number: usize| IpAddr::from([10, 90, u8::try_from(number).unwrap_or(u8::MAX), 16]);
    let keys: Vec<(String, String)> = places.iter().map(|(host, _)| key_pair(host)).collect();
    let peers = places.iter().zip(&keys).enumerate().map(|(number, ((host, _), (private_key, _)))| {
        let peer = WireguardPeer::start(host, implementation, &[]);
        host.ip(&[&format!("link set {} mtu {TUNNEL_MTU}", peer.interface())]);
        let mut text = format!("[Interface]\nPrivateKey = {private_key}\nListenPort = {WIREGUARD_PORT}\n");
        // The one in the middle knows all, each of the others only that one.
        let others = if number == 0 { 1..places.len() } else { 0..1 };
        for other in others.clone() {
            text += &format!(
                "[Peer]\nPublicKey = {}\nAllowedIPs = {}/32\nEndpoint = {}:{WIREGUARD_PORT}\n",
                keys[other].1,
                address(other),
                places[other].1
            );
        }
        peer.setconf(&text);
        others.for_each(|other| peer.route(&address(other).to_string()));
        peer
    });
    let peers: Vec<WireguardPeer> = peers.collect();
    let pods = places.iter().enumerate().map(|(number, (host, _))| {
        host.enable_forwarding();
        let pod = host.pod("pod", &[address(number)]);
        pod.set_mtu(TUNNEL_MTU);
        pod
    });
    (pods.collect(), Ends::Peers { _peers: peers })
}
