//! Tests with the real kernel, each in its own network namespace.

mod namespace;

mod cleans_up;
mod converges;
mod guards;
mod others;
mod paths;
mod settings;
mod underlay;
mod vxlan;
mod watches;

use std::{net::IpAddr, path::PathBuf};

use cow_map::CowMap;
use ipnet::IpNet;
use mesh::kernel_state::{
    Desired, Firewall, Floor, Forwarding, OthersRules, PeerRoute, PrefixOn, PrefixVia, ProbeRoute, RouteVia, Tun,
};
use namespace::run;

use super::*;

fn name(s: &str) -> InterfaceName {
    InterfaceName::new(s).unwrap()
}

fn net(s: &str) -> IpNet {
    s.parse().unwrap()
}

fn addr(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn on(prefix: &str, dev: &str) -> PrefixOn {
    PrefixOn { prefix: net(prefix), dev: name(dev) }
}

/// A prefix behind a next hop on the underlay.
fn via(prefix: &str, hop: &str) -> PrefixVia {
    PrefixVia { prefix: net(prefix), dev: name("eth0"), via: addr(hop) }
}

/// A kernel of this namespace with a state directory that goes with the guard.
fn kernel() -> (Kernel, tempfile::TempDir) {
    let state = tempfile::tempdir().unwrap();
    let options = Options::new(name("meshd0"), PathBuf::from(state.path()));
    (Kernel::new(options).unwrap(), state)
}

/// An underlay `eth0` with 192.0.2.1/24 and 2001:db8::1/64 and its other end `far`, and a TUN device `meshd0`.
fn topology() {
    run("ip link add eth0 type veth peer name far");
    // A link-local address now, not when duplicate address detection is through.
    run("ip link set eth0 addrgenmode none");
    run("ip link set far addrgenmode none");
    run("ip addr add fe80::a/64 dev eth0 nodad");
    run("ip addr add 192.0.2.1/24 dev eth0");
    run("ip addr add 2001:db8::1/64 dev eth0 nodad");
    run("ip link set eth0 up");
    run("ip link set far up");
    add_tun();
}

fn add_tun() {
    run("ip tuntap add name meshd0 mode tun multi_queue vnet_hdr");
}

fn route(dst: &str, via: RouteVia) -> PeerRoute {
    let dst = net(dst);
    PeerRoute {
        src: Some(match dst {
            IpNet::V4(_) => addr("10.244.1.0"),
            IpNet::V6(_) => addr("fd42:244:0:1:ffff:ffff:ffff:ffff"),
        }),
        dst,
        via,
        mtu: None,
    }
}

fn routes<const N: usize>(routes: [PeerRoute; N]) -> CowMap<IpNet, PeerRoute> {
    routes.into_iter().map(|route| (route.dst, route)).collect()
}

/// The route to `dst`, to be changed.
fn route_to<'a>(desired: &'a mut Desired, dst: &str) -> &'a mut PeerRoute {
    desired.routes.get_mut(&net(dst)).unwrap()
}

fn direct(via: &str) -> RouteVia {
    RouteVia::Neighbour { via: addr(via), dev: name("eth0") }
}

/// Node 1 of a dual-stack mesh: node 2 is direct, node 3 behind the tunnel, node 4 unreachable.
fn desired() -> Desired {
    Desired {
        tun: Tun { mtu: 1420, txqueuelen: 1000, up: true },
        overlay: vec![addr("10.244.1.0"), addr("fd42:244:0:1:ffff:ffff:ffff:ffff")],
        routes: routes([
            route("10.244.2.0/24", direct("192.0.2.2")),
            route("fd42:244:0:2::/64", direct("2001:db8::2")),
            PeerRoute { mtu: Some(1380), ..route("10.244.3.0/24", RouteVia::Tunnel) },
            PeerRoute { mtu: Some(1380), ..route("fd42:244:0:3::/64", RouteVia::Tunnel) },
            route("10.244.4.0/24", RouteVia::Unreachable),
            route("fd42:244:0:4::/64", RouteVia::Unreachable),
        ]),
        floor: Floor { networks: vec![net("10.244.0.0/16"), net("fd42:244::/48")], outside: Vec::new() },
        probes: vec![
            ProbeRoute { overlay: addr("10.244.2.0"), via: addr("192.0.2.2"), dev: name("eth0") },
            ProbeRoute {
                overlay: addr("fd42:244:0:2:ffff:ffff:ffff:ffff"),
                via: addr("2001:db8::2"),
                dev: name("eth0"),
            },
        ],
        firewall: Firewall {
            networks: vec![net("10.244.0.0/16"), net("fd42:244::/48")],
            own: vec![net("10.244.1.0/24"), net("fd42:244:0:1::/64")],
            direct: vec![via("10.244.2.0/24", "192.0.2.2"), via("fd42:244:0:2::/64", "2001:db8::2")],
            accepted: vec![on("10.244.2.0/24", "eth0"), on("fd42:244:0:2::/64", "eth0")],
            ip_masq: true,
            probe_port: Some(51821),
        },
        vxlan: Vec::new(),
        forwarding: Forwarding { ipv4: true, ipv6: true },
        underlay: vec![name("eth0")],
        underlay4: None,
        pods: Vec::new(),
        forward_accept: false,
    }
}

/// Reconciles, and insists that nothing failed.
async fn settle(kernel: &Kernel, desired: &Desired) -> PassReport {
    let report = kernel.reconcile(desired, OthersRules::Read).await.unwrap();
    assert_eq!(report.failures, [], "{:#?}", report.changes);
    report
}

/// A kernel that is what [`desired`] says, over [`topology`].
async fn standing() -> (Kernel, tempfile::TempDir, Desired) {
    topology();
    let (kernel, state) = kernel();
    let desired = desired();
    settle(&kernel, &desired).await;
    settled(&kernel, &desired).await;
    (kernel, state, desired)
}

/// Reconciles again and insists that nothing was left to do.
async fn settled(kernel: &Kernel, desired: &Desired) {
    let report = settle(kernel, desired).await;
    assert_eq!(report.changes, []);
}

/// A pass, a cleanup and a watch can be spawned on any runtime.
#[test]
fn futures_may_move_between_threads() {
    fn movable<T: Send>(_: impl FnOnce(&'static Kernel, &'static Desired, &'static mut KernelWatch) -> T) {}
    movable(|kernel, desired, _| kernel.reconcile(desired, OthersRules::Read));
    movable(|kernel, desired, _| kernel.apply_changes(desired, OthersRules::Read));
    movable(|kernel, _, _| kernel.cleanup());
    movable(|kernel, _, _| kernel.drops());
    movable(|kernel, _, _| kernel.underlay(&UnderlaySelection::Auto));
    movable(|_, _, watch| watch.next());
}
