//! Real packets against the ruleset.
//!
//! ```text
//!  pod 10.244.1.5        node (this namespace)            peer 192.0.2.2, 2001:db8::2
//!      fd42:244:0:1::5 ── vpod                 eth0 ───── 10.244.2.5, fd42:244:0:2::5   node 2's pod: direct
//!                                                         10.244.3.5, fd42:244:0:3::5   a stranger's claim
//! ```

use std::{
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use super::{
    namespace::{Host, isolated},
    *,
};

struct Hosts {
    pod: Host,
    peer: Host,
}

/// What one family calls the same places.
struct Names {
    counter: [&'static str; 2],
    pod: &'static str,
    node: &'static str,
    peer: &'static str,
    peer_pod: &'static str,
    stranger: &'static str,
    /// Node 3's prefix, which is behind the tunnel.
    far: &'static str,
}

const FAMILIES: [Names; 2] = [
    Names {
        counter: ["source4", "guard4"],
        pod: "10.244.1.5",
        node: "192.0.2.1",
        peer: "192.0.2.2",
        peer_pod: "10.244.2.5",
        stranger: "10.244.3.5",
        far: "10.244.3.0/25",
    },
    Names {
        counter: ["source6", "guard6"],
        pod: "fd42:244:0:1::5",
        node: "2001:db8::1",
        peer: "2001:db8::2",
        peer_pod: "fd42:244:0:2::5",
        stranger: "fd42:244:0:3::5",
        far: "fd42:244:0:3::/65",
    },
];

fn hosts() -> Hosts {
    topology();
    let hosts = Hosts { pod: Host::new(), peer: Host::new() };
    hosts.peer.take("far");
    for line in [
        "ip addr add 192.0.2.2/24 dev far",
        "ip addr add fe80::b/64 dev far nodad",
        "ip addr add 2001:db8::2/64 dev far nodad",
        "ip link set far up",
        "ip addr add 10.244.2.5/32 dev lo",
        "ip addr add 10.244.3.5/32 dev lo",
        "ip addr add fd42:244:0:2::5/128 dev lo nodad",
        "ip addr add fd42:244:0:3::5/128 dev lo nodad",
        "ip route add 10.244.1.0/24 via 192.0.2.1",
        "ip -6 route add fd42:244:0:1::/64 via 2001:db8::1",
    ] {
        hosts.peer.run(line);
    }
    run("ip link add vpod type veth peer name epod");
    hosts.pod.take("epod");
    for line in [
        "ip link set epod addrgenmode none",
        "ip addr add 10.244.1.5/24 dev epod",
        "ip addr add fe80::d/64 dev epod nodad",
        "ip addr add fd42:244:0:1::5/64 dev epod nodad",
        "ip link set epod up",
        "ip route add default via 10.244.1.1",
        "ip -6 route add default via fd42:244:0:1::1",
    ] {
        hosts.pod.run(line);
    }
    for line in
        ["ip addr add 10.244.1.1/24 dev vpod", "ip addr add fd42:244:0:1::1/64 dev vpod nodad", "ip link set vpod up"]
    {
        run(line);
    }
    hosts
}

/// A socket that hears what comes to an address.
struct Ear {
    socket: UdpSocket,
    port: u16,
}

fn listen(host: &Host, at: &str) -> Ear {
    let at = SocketAddr::new(addr(at), 0);
    let socket = host.within(move || UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let port = socket.local_addr().unwrap().port();
    Ear { socket, port }
}

impl Ear {
    /// Sends again and again, since a link that has just come up loses packets, until one is heard; its source.
    fn hear(&self, mut send: impl FnMut()) -> Option<IpAddr> {
        for _ in 0..100 {
            send();
            let mut buffer = [0; 16];
            if let Ok((_, from)) = self.socket.recv_from(&mut buffer) {
                return Some(from.ip());
            }
        }
        None
    }
}

/// Sends again and again until the counter moves.
async fn until_dropped(kernel: &Kernel, counter: &str, mut send: impl FnMut()) {
    let before = dropped(kernel, counter).await;
    while dropped(kernel, counter).await == before {
        send();
    }
}

/// Sends a datagram.
fn send(host: &Host, from: &str, to: &str, port: u16) {
    let (from, to) = (SocketAddr::new(addr(from), 0), SocketAddr::new(addr(to), port));
    host.within(move || {
        // What keeps it from arriving may be told to the socket.
        let _ = UdpSocket::bind(from).unwrap().send_to(b"mesh", to);
    });
}

async fn dropped(kernel: &Kernel, counter: &str) -> u64 {
    kernel.drops().await.unwrap()[counter].packets
}

#[test]
fn what_comes_in_the_clear_is_a_direct_peers() {
    isolated(|| async {
        let hosts = hosts();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        settle(&kernel, &desired).await;
        for f in FAMILIES {
            until_dropped(&kernel, f.counter[0], || send(&hosts.peer, f.stranger, f.pod, 9)).await;
            let ear = listen(&hosts.pod, f.pod);
            let heard = ear.hear(|| {
                send(&hosts.peer, f.stranger, f.pod, ear.port);
                send(&hosts.peer, f.peer_pod, f.pod, ear.port);
            });
            // In order on one link: the stranger's would have come first.
            assert_eq!(heard, Some(addr(f.peer_pod)));
        }
        // It is accepted while this node itself sends through the tunnel.
        route_to(&mut desired, "10.244.2.0/24").via = RouteVia::Tunnel;
        route_to(&mut desired, "fd42:244:0:2::/64").via = RouteVia::Tunnel;
        desired.firewall.direct.clear();
        settle(&kernel, &desired).await;
        for f in FAMILIES {
            let ear = listen(&hosts.pod, f.pod);
            let heard = ear.hear(|| send(&hosts.peer, f.peer_pod, f.pod, ear.port));
            assert_eq!(heard, Some(addr(f.peer_pod)));
        }
        // And no longer when it is not eligible any more.
        desired.firewall.accepted.clear();
        settle(&kernel, &desired).await;
        for f in FAMILIES {
            until_dropped(&kernel, f.counter[0], || send(&hosts.peer, f.peer_pod, f.pod, 9)).await;
        }
    });
}

/// A more specific route of someone else's leads a tunnel prefix to the underlay: nothing follows it, neither a pod's
/// packets nor the node's own.
#[test]
fn nothing_leaves_in_the_clear_but_by_a_direct_route() {
    isolated(|| async {
        let hosts = hosts();
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        for f in FAMILIES {
            run(&format!("ip route add {} via {} dev eth0", f.far, f.peer));
            let stranger = listen(&hosts.peer, f.stranger);
            let port = stranger.port;
            until_dropped(&kernel, f.counter[1], || send(&hosts.pod, f.pod, f.stranger, port)).await;
            let before = dropped(&kernel, f.counter[1]).await;
            let own = SocketAddr::new(addr(f.node), 0);
            let to = SocketAddr::new(addr(f.stranger), port);
            let sent = UdpSocket::bind(own).unwrap().send_to(b"mesh", to);
            assert!(sent.is_err(), "the guard tells the sender");
            assert!(dropped(&kernel, f.counter[1]).await > before);

            // A direct route is open, both ways.
            let ear = listen(&hosts.peer, f.peer_pod);
            let heard = ear.hear(|| send(&hosts.pod, f.pod, f.peer_pod, ear.port));
            assert_eq!(heard, Some(addr(f.pod)), "not masqueraded");
            // Its packets would have come the same way, before.
            stranger.socket.set_nonblocking(true).unwrap();
            assert!(stranger.socket.recv(&mut [0; 16]).is_err());
        }
    });
}

/// Routes are flushed, and a default route leads to a router on the interface of a direct peer: neither a pod's
/// packets, nor the node's own, nor probes go there.
#[test]
fn flushed_routes_send_nothing_to_a_router() {
    isolated(|| async {
        let hosts = hosts();
        for line in [
            "ip addr add 192.0.2.254/24 dev far",
            "ip addr add 2001:db8::fe/64 dev far nodad",
            "ip addr add 10.244.2.0/32 dev lo",
            "ip addr add fd42:244:0:2:ffff:ffff:ffff:ffff/128 dev lo nodad",
        ] {
            hosts.peer.run(line);
        }
        let (kernel, _state) = kernel();
        settle(&kernel, &desired()).await;
        let probes =
            [("10.244.1.0", "10.244.2.0"), ("fd42:244:0:1:ffff:ffff:ffff:ffff", "fd42:244:0:2:ffff:ffff:ffff:ffff")];
        let probe = |from: &str| {
            let socket = UdpSocket::bind(SocketAddr::new(addr(from), 51821)).unwrap();
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &PROBE_MARK).unwrap();
            socket
        };
        for (f, (from, to)) in FAMILIES.iter().zip(probes) {
            let ear = listen(&hosts.peer, to);
            let socket = probe(from);
            let heard = ear.hear(|| drop(socket.send_to(b"probe", SocketAddr::new(addr(to), ear.port))));
            assert_eq!(heard, Some(addr(from)), "a probe");
            let ear = listen(&hosts.peer, f.peer_pod);
            let heard = ear.hear(|| send(&hosts.pod, f.pod, f.peer_pod, ear.port));
            assert_eq!(heard, Some(addr(f.pod)), "a direct route");
        }
        run("ip route add default via 192.0.2.254");
        run("ip -6 route add default via 2001:db8::fe");
        run("ip route flush table all proto 158");
        run("ip -6 route flush table all proto 158");
        for (f, (from, to)) in FAMILIES.iter().zip(probes) {
            let ear = listen(&hosts.peer, f.peer_pod);
            until_dropped(&kernel, f.counter[1], || send(&hosts.pod, f.pod, f.peer_pod, ear.port)).await;
            let own = UdpSocket::bind(SocketAddr::new(addr(f.node), 0)).unwrap();
            assert!(own.send_to(b"mesh", SocketAddr::new(addr(f.peer_pod), ear.port)).is_err(), "the node's own");
            ear.socket.set_nonblocking(true).unwrap();
            assert!(ear.socket.recv(&mut [0; 16]).is_err());
            let ear = listen(&hosts.peer, to);
            assert!(probe(from).send_to(b"probe", SocketAddr::new(addr(to), ear.port)).is_err(), "a probe");
        }
    });
}

#[test]
fn only_what_leaves_the_mesh_is_masqueraded() {
    isolated(|| async {
        let hosts = hosts();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        for ip_masq in [true, false, true] {
            desired.firewall.ip_masq = ip_masq;
            settle(&kernel, &desired).await;
            for f in FAMILIES {
                let ear = listen(&hosts.peer, f.peer);
                let heard = ear.hear(|| send(&hosts.pod, f.pod, f.peer, ear.port));
                let expected = if ip_masq { f.node } else { f.pod };
                assert_eq!(heard, Some(addr(expected)));
            }
        }
    });
}

/// Probes go to eligible peers before any direct route is there: marked, from the probe port, by the probe table.
#[test]
fn probes_pass_before_a_direct_route_does() {
    isolated(|| async {
        let hosts = hosts();
        hosts.peer.run("ip addr add 10.244.2.0/32 dev lo");
        let (kernel, _state) = kernel();
        let mut desired = desired();
        desired.firewall.direct.clear();
        route_to(&mut desired, "10.244.2.0/24").via = RouteVia::Unreachable;
        route_to(&mut desired, "fd42:244:0:2::/64").via = RouteVia::Unreachable;
        settle(&kernel, &desired).await;
        let ear = listen(&hosts.peer, "10.244.2.0");
        let probe = UdpSocket::bind("10.244.1.0:51821").unwrap();
        nix::sys::socket::setsockopt(&probe, nix::sys::socket::sockopt::Mark, &PROBE_MARK).unwrap();
        let heard = ear.hear(|| {
            let _ = probe.send_to(b"probe", ("10.244.2.0", ear.port));
        });
        assert_eq!(heard, Some(addr("10.244.1.0")));
        // To an overlay address that is no eligible peer's, the probe table ends.
        let sent = probe.send_to(b"probe", ("10.244.3.0", ear.port));
        assert!(sent.is_err());
        // The mark alone is no proof, and neither is the port.
        let forged = UdpSocket::bind("10.244.1.0:0").unwrap();
        nix::sys::socket::setsockopt(&forged, nix::sys::socket::sockopt::Mark, &PROBE_MARK).unwrap();
        nix::sys::socket::setsockopt(&probe, nix::sys::socket::sockopt::Mark, &0).unwrap();
        let ear = listen(&hosts.peer, "10.244.2.0");
        for (what, socket) in [("the mark", forged), ("the port", probe)] {
            assert!(socket.send_to(b"forged", ("10.244.2.0", ear.port)).is_err(), "{what} alone");
        }
        ear.socket.set_nonblocking(true).unwrap();
        assert!(ear.socket.recv(&mut [0; 16]).is_err());
    });
}

/// Whatever rules others have, a probe leaves as it is, and so does an echo: neither is of a connection, nor of one
/// that another rule has rewritten before.
#[test]
fn no_nat_rule_applies_to_probes() {
    isolated(|| async {
        let hosts = hosts();
        hosts.peer.run("ip addr add 10.244.2.0/32 dev lo");
        run("nft add table ip other");
        run("nft add chain ip other out { type nat hook postrouting priority 100 ; }");
        run("nft add rule ip other out oifname eth0 masquerade");
        let (kernel, _state) = kernel();
        let mut desired = desired();
        let socket = |kernel_has_mark: bool| {
            let socket = UdpSocket::bind("10.244.1.0:51821").unwrap();
            if kernel_has_mark {
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &PROBE_MARK).unwrap();
            }
            socket
        };
        // A connection of the same addresses and ports is rewritten, as under an earlier version.
        desired.firewall.probe_port = None;
        settle(&kernel, &desired).await;
        let ear = listen(&hosts.peer, "10.244.2.0");
        let to = SocketAddr::new(addr("10.244.2.0"), ear.port);
        let plain = socket(false);
        assert_eq!(ear.hear(|| drop(plain.send_to(b"probe", to))), Some(addr("192.0.2.1")), "the rule is there");
        drop(plain);
        desired.firewall.probe_port = Some(51821);
        settle(&kernel, &desired).await;
        while ear.socket.recv(&mut [0; 16]).is_ok() {}
        let probe = socket(true);
        assert_eq!(ear.hear(|| drop(probe.send_to(b"probe", to))), Some(addr("10.244.1.0")));
        // What comes in as a probe is of no connection, either.
        let back = SocketAddr::new(addr("10.244.1.0"), 51821);
        let peer = hosts.peer.within(move || UdpSocket::bind(SocketAddr::new(addr("10.244.2.0"), 51821)).unwrap());
        probe.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let heard = (0..100).any(|_| {
            peer.send_to(b"probe", back).unwrap();
            probe.recv(&mut [0; 16]).is_ok()
        });
        assert!(heard);
        let tracked = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap_or_default();
        assert!(!tracked.contains("sport=51821 dport=51821"), "{tracked}");
    });
}

/// A connection from a pod over a direct route with a smaller MTU learns it at once.
#[test]
fn segments_fit_the_route() {
    isolated(|| async {
        let hosts = hosts();
        let (kernel, _state) = kernel();
        let mut desired = desired();
        for dst in ["10.244.2.0/24", "fd42:244:0:2::/64"] {
            route_to(&mut desired, dst).mtu = Some(1300);
        }
        settle(&kernel, &desired).await;
        for (f, headers) in FAMILIES.iter().zip([40, 60]) {
            let at = SocketAddr::new(addr(f.peer_pod), 0);
            let listener = hosts.peer.within(move || TcpListener::bind(at).unwrap());
            let to = listener.local_addr().unwrap();
            let _client = hosts.pod.within(move || {
                // A link that has just come up answers with host unreachable.
                (0..50).find_map(|_| TcpStream::connect(to).ok()).expect("a connection")
            });
            let (server, _) = listener.accept().unwrap();
            let segment = nix::sys::socket::getsockopt(&server, nix::sys::socket::sockopt::TcpMaxSeg).unwrap();
            // The timestamp option takes 12.
            assert_eq!(segment, 1300 - headers - 12, "{}", f.pod);
        }
    });
}
