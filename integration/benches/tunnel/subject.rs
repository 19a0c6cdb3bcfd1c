//! The subjects: how each is set up between a pair of hosts around the router.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use integration::{
    Etcd, Host, Implementation, Meshd, MeshdNode, Namespace, Pod, Process, WireguardPeer, await_ok, key_pair,
    measure::resident_bytes, ping, topology::Star,
};

use crate::crowd::{decode, node_key};

/// Of every tunnel and of the pods: what a path of 1500 leaves with either family outside.
pub(crate) const TUNNEL_MTU: u16 = 1420;
/// For everything to come up on a busy machine.
pub(crate) const READY: Duration = Duration::from_secs(60);
/// Where every tunnel listens.
pub(crate) const WIREGUARD_PORT: u16 = 51820;
/// IPv4 alone, so that all subjects carry the same.
pub(crate) const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "SubnetLen": 24, "Backend": {"Type": "wireguard"}}"#;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// meshd of this workspace: two nodes of a mesh, with all that a mesh does to a packet.
    Meshd,
    /// Another build of it.
    MeshdOther,
    /// The newest wireguard-go.
    WireguardGo,
    /// Debian's.
    DebianWireguardGo,
    /// boringtun-cli.
    Boringtun,
    /// gotatun.
    Gotatun,
    /// The kernel's VXLAN: no encryption.
    Vxlan,
    /// No tunnel: what the path itself and the load cost.
    Plain,
}

impl Kind {
    /// Every one.
    pub(crate) const ALL: [Self; 8] = [
        Self::Meshd,
        Self::MeshdOther,
        Self::WireguardGo,
        Self::DebianWireguardGo,
        Self::Boringtun,
        Self::Gotatun,
        Self::Vxlan,
        Self::Plain,
    ];
    /// meshd and every other implementation of WireGuard.
    pub(crate) const TUNNELS: [Self; 5] =
        [Self::Meshd, Self::WireguardGo, Self::DebianWireguardGo, Self::Boringtun, Self::Gotatun];

    /// As tables and `BENCH_SUBJECTS` call it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Meshd => "meshd",
            Self::MeshdOther => "meshd-other",
            Self::WireguardGo => "wireguard-go",
            Self::DebianWireguardGo => "wireguard-go-debian",
            Self::Boringtun => "boringtun-cli",
            Self::Gotatun => "gotatun-cli",
            Self::Vxlan => "vxlan",
            Self::Plain => "plain",
        }
    }

    /// The program, of those that are run by `wg`.
    pub(crate) const fn implementation(self) -> Option<Implementation> {
        match self {
            Self::WireguardGo => Some(Implementation::WireguardGo),
            Self::DebianWireguardGo => Some(Implementation::DebianWireguardGo),
            Self::Boringtun => Some(Implementation::BoringtunCli),
            Self::Gotatun => Some(Implementation::GotatunCli),
            Self::Meshd | Self::MeshdOther | Self::Vxlan | Self::Plain => None,
        }
    }
}

/// A subject that is up: two pods, and whatever carries packets between them.
pub(crate) struct Subject {
    /// What it is.
    pub(crate) kind: Kind,
    /// The pod that sends.
    pub(crate) left: Pod,
    /// The pod that receives.
    pub(crate) right: Pod,
    right_endpoint: SocketAddr,
    ends: Ends,
}

enum Ends {
    Mesh(Box<([MeshdNode; 2], Etcd)>),
    Peers(Box<[WireguardPeer; 2]>),
    Kernel,
}

/// A host and its address.
pub(crate) type Place = (Host, String);

impl Subject {
    /// Sets it up between two hosts and waits until the pods reach each other. `number`, below 100, is no other
    /// subject's in this star.
    pub(crate) fn start(star: &mut Star, kind: Kind, other_meshd: Option<&Path>, number: u8) -> Self {
        let hosts = ["left", "right"].map(|side| star.host(&format!("{side}-{}", kind.name())));
        Self::start_between(star, kind, other_meshd, number, hosts)
    }

    /// [`start`](Self::start) between these hosts of the star.
    pub(crate) fn start_between(
        star: &mut Star,
        kind: Kind,
        other_meshd: Option<&Path>,
        number: u8,
        hosts: [Place; 2],
    ) -> Self {
        let right_endpoint = SocketAddr::new(hosts[1].1.parse().expect("an address"), WIREGUARD_PORT);
        let (pods, ends) = match kind {
            Kind::Meshd => mesh(star, None, kind, &hosts),
            Kind::MeshdOther => mesh(star, other_meshd, kind, &hosts),
            Kind::Vxlan => vxlan(&hosts, number),
            Kind::Plain => plain(star, &hosts, number),
            Kind::WireguardGo | Kind::DebianWireguardGo | Kind::Boringtun | Kind::Gotatun => {
                let implementation = kind.implementation().expect("a program");
                peers(implementation, &hosts, number)
            }
        };
        let [left, right] = pods;
        let subject = Self { kind, left, right, right_endpoint, ends };
        let to = subject.right_address();
        await_ok(&format!("{} to carry packets", kind.name()), READY, || {
            let report = ping(&subject.left, to);
            if report.lost() == 0 { Ok(()) } else { Err(report.text) }
        });
        subject.assert_mtu();
        subject
    }

    /// The address of the pod that receives.
    pub(crate) fn right_address(&self) -> IpAddr {
        self.right.v4()
    }

    /// Memory of the larger of its two daemons, resident now, in bytes. None where the kernel does the work.
    pub(crate) fn resident(&self) -> Option<u64> {
        self.pids().into_iter().map(resident_bytes).max()
    }

    /// The daemon of the pod that receives: its process, its address, its public key.
    ///
    /// # Panics
    /// When the kernel does the work.
    pub(crate) fn receiver(&self) -> (u32, SocketAddr, [u8; 32]) {
        let (pid, key) = match &self.ends {
            Ends::Mesh(mesh) => (mesh.0[1].with_process(Process::pid), node_key(&mesh.0[1], &mesh.1)),
            Ends::Peers(peers) => (peers[1].process().pid(), decode(peers[1].show("public-key").trim())),
            Ends::Kernel => panic!("{} has no daemon", self.kind.name()),
        };
        (pid, self.right_endpoint, key)
    }

    fn pids(&self) -> Vec<u32> {
        match &self.ends {
            Ends::Mesh(mesh) => mesh.0.iter().map(|node| node.with_process(Process::pid)).collect(),
            Ends::Peers(peers) => peers.iter().map(|peer| peer.process().pid()).collect(),
            Ends::Kernel => Vec::new(),
        }
    }

    fn assert_mtu(&self) {
        let interfaces: Vec<(&Namespace, &str)> = match &self.ends {
            Ends::Mesh(mesh) => mesh.0.iter().map(|node| (&**node.host(), node.interface())).collect(),
            Ends::Peers(_) | Ends::Kernel => Vec::new(),
        };
        for (host, interface) in interfaces {
            let shown = host.run(&format!("ip link show {interface}")).stdout;
            assert!(shown.contains(&format!("mtu {TUNNEL_MTU} ")), "another tunnel MTU than the others': {shown}");
        }
    }
}

/// Two nodes of a mesh; their store is on a host of its own, off the path.
fn mesh(star: &mut Star, program: Option<&Path>, kind: Kind, hosts: &[Place; 2]) -> ([Pod; 2], Ends) {
    let (store, address) = star.host(&format!("store-{}", kind.name()));
    let etcd = Etcd::start(&store, &[&address], 1);
    etcd.put("/meshd/config", CONFIG);
    let nodes = ["left", "right"].map(|site| {
        let (host, _) = &hosts[usize::from(site == "right")];
        let node = Meshd::on(host, &etcd).site(site);
        match program {
            Some(program) => node.program(program),
            None => node,
        }
        .start()
    });
    let pods = nodes.each_ref().map(|node| {
        node.await_ready(READY);
        let pod = node.pod("pod");
        pod.set_mtu(TUNNEL_MTU);
        pod
    });
    (pods, Ends::Mesh(Box::new((nodes, etcd))))
}

/// A program at either end, configured by `wg`.
fn peers(implementation: Implementation, hosts: &[Place; 2], number: u8) -> ([Pod; 2], Ends) {
    let keys = hosts.each_ref().map(|(host, _)| key_pair(host));
    let ends = [0, 1].map(|side| {
        let other = 1 - side;
        let peer = WireguardPeer::start(&hosts[side].0, implementation, &[]);
        hosts[side].0.ip(&[&format!("link set {} mtu {TUNNEL_MTU}", peer.interface())]);
        let (allowed, endpoint) = (pod_address(number, other), &hosts[other].1);
        peer.setconf(&format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {WIREGUARD_PORT}\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = {allowed}/32\nEndpoint = {endpoint}:{WIREGUARD_PORT}\n",
            keys[side].0, keys[other].1,
        ));
        peer.route(&allowed.to_string());
        peer
    });
    (pods(hosts, number), Ends::Peers(Box::new(ends)))
}

/// The kernel's own tunnel.
fn vxlan(hosts: &[Place; 2], number: u8) -> ([Pod; 2], Ends) {
    for (side, (host, address)) in hosts.iter().enumerate() {
        let other = 1 - side;
        host.ip(&[
            &format!("link add vxlan0 type vxlan id {number} local {address} remote {} dstport 4789", hosts[other].1),
            &format!("link set vxlan0 mtu {TUNNEL_MTU} up"),
            &format!("addr add 10.99.0.{side}/31 dev vxlan0"),
            &format!("route add {} via 10.99.0.{other}", pod_address(number, other)),
        ]);
    }
    (pods(hosts, number), Ends::Kernel)
}

/// Routed as it is.
fn plain(star: &Star, hosts: &[Place; 2], number: u8) -> ([Pod; 2], Ends) {
    for (side, (_, address)) in hosts.iter().enumerate() {
        star.router.route(&pod_address(number, side).to_string(), &format!("via {address}"));
    }
    (pods(hosts, number), Ends::Kernel)
}

fn pods(hosts: &[Place; 2], number: u8) -> [Pod; 2] {
    [0, 1].map(|side| {
        let (host, _) = &hosts[side];
        host.enable_forwarding();
        let pod = host.pod("pod", &[pod_address(number, side)]);
        pod.set_mtu(TUNNEL_MTU);
        pod
    })
}

fn pod_address(number: u8, side: usize) -> IpAddr {
    IpAddr::from([10, 100 + number, if side == 0 { 1 } else { 2 }, 16])
}
