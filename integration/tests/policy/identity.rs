//! A pod is known by its interface: what it sends with other sources goes nowhere.
//!
//! ```text
//!   east1 (rogue, router, db) ─┬─ switch ─ router ─ switch ─ west1 (pod)
//!   east2 (pod) ───────────────┘              │
//!                                           store
//! ```

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    time::Duration,
};

use integration::{
    CniPod, MeshdNode, Namespace, Wire, await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    SOON, await_in_force,
    frames::{BROADCAST, Capture, datagram, frame, host_end, icmpv6, index, ipv6, link_local, mac, port_unreachable},
    groups,
    objects::{delete_policy, put_pod, put_policy},
    probe::{Server, round_trip},
    start::{Nft, has_problem},
};

/// How long is waited for what should not come.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where the listeners are.
const PORT: u16 = 7000;
/// The sources of the router, and of those that pretend to be it.
const FOREIGN: [&str; 2] = ["172.31.66.7", "fd66::7"];
const FOREIGN_PREFIXES: [&str; 2] = ["172.31.66.0/24", "fd66::/64"];

struct Routed {
    mesh: Mesh,
    nft: Nft,
    rogue: CniPod,
    router: CniPod,
    db: CniPod,
    /// The overlay addresses of east1, also for while it knows none.
    overlay: Vec<IpAddr>,
}

impl Routed {
    fn start(title: &str) -> Self {
        let sites = TwoSites::with_hosts(title, 2);
        let nft = Nft::new(&sites);
        let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.env("PATH", &nft.path()));
        mesh.await_all_reach_each_other();
        let east1 = mesh.node("east1");
        east1.await_path("east2", "direct", SOON);
        let pod = |name: &str, mut more: Value| {
            more["pod"] = json!({"namespace": "shop", "labels": {"app": name}});
            east1.cni("1.0.0", &more).pod(name)
        };
        let (rogue, db) = (pod("rogue", json!({})), pod("db", json!({})));
        let router = pod("router", json!({"allowedSources": FOREIGN_PREFIXES}));
        for (name, node) in [("peer", "east2"), ("far", "west1")] {
            put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, mesh.pod(node).addresses());
        }
        await_in_force(&mesh);
        let overlay = east1.overlay();
        Self { mesh, nft, rogue, router, db, overlay }
    }

    fn east1(&self) -> &MeshdNode {
        self.mesh.node("east1")
    }

    fn deny_egress(&self, app: &str) {
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Egress"]});
        put_policy(&self.mesh.etcd, "shop", &format!("{app}-egress"), &spec);
        await_in_force(&self.mesh);
    }

    /// Sends a packet to the node, which may pass it on.
    fn send(&self, from: &CniPod, packet: &[u8]) {
        let to = mac(self.east1().host(), &host_end(from));
        Wire::on(from, "eth0").send(&[frame(&to, &mac(from, "eth0"), packet)]);
    }
}

/// Takes the datagrams of a place, by every address of a family.
pub(crate) struct Listener(UdpSocket);

impl Listener {
    pub(crate) fn on(place: &Namespace, v4: bool, port: u16) -> Self {
        let socket = place.enter(|| {
            let socket = Socket::new(if v4 { Domain::IPV4 } else { Domain::IPV6 }, Type::DGRAM, None).unwrap();
            let any: IpAddr = if v4 { [0; 4].into() } else { [0; 16].into() };
            if !v4 {
                socket.set_only_v6(true).unwrap();
            }
            // One that was closed just now may be held a moment longer, by a process that another test is starting.
            let at = SocketAddr::new(any, port).into();
            await_ok("the port to be free", SOON, || socket.bind(&at).map_err(|error| error.to_string()));
            socket
        });
        Self(socket.into())
    }

    /// The same of a socket that is there.
    pub(crate) const fn of(socket: UdpSocket) -> Self {
        Self(socket)
    }

    /// Takes part in a group.
    pub(crate) fn join_v4(&self, group: Ipv4Addr, interface: u32) {
        socket2::SockRef::from(&self.0)
            .join_multicast_v4_n(&group, &socket2::InterfaceIndexOrAddress::Index(interface))
            .unwrap();
    }

    /// Whether a datagram comes that ends with these bytes.
    pub(crate) fn hears(&self, marker: &[u8]) -> bool {
        self.hears_within(PATIENCE, marker)
    }

    /// The same, with this long between two datagrams.
    pub(crate) fn hears_within(&self, patience: Duration, marker: &[u8]) -> bool {
        self.0.set_read_timeout(Some(patience)).unwrap();
        let mut buffer = [0; 2048];
        while let Ok(length) = self.0.recv(&mut buffer) {
            if buffer[..length].ends_with(marker) {
                return true;
            }
        }
        false
    }
}

/// An ordinary socket sends from an address that no interface has.
pub(crate) fn send_unbound(from: &Namespace, source: IpAddr, to: SocketAddr, data: &[u8]) {
    from.enter(|| {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_freebind_v6(true).unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        let _ = socket.send_to(data, &to.into());
    });
}

/// Packets of a rogue with the router's sources, and the router's own, to one destination.
#[track_caller]
fn assert_only_the_router_arrives(routed: &Routed, to: IpAddr, what: &str, mut hears: impl FnMut(&[u8]) -> bool) {
    let source: IpAddr = FOREIGN[usize::from(to.is_ipv6())].parse().unwrap();
    await_ok(&format!("the router's packet to {what} {to} to arrive"), SOON, || {
        routed.send(&routed.router, &datagram((source, PORT), (to, PORT), b"routed"));
        if hears(b"routed") { Ok(()) } else { Err("it does not".to_owned()) }
    });
    routed.send(&routed.rogue, &datagram((source, PORT), (to, PORT), b"borrowed"));
    assert!(!hears(b"borrowed"), "{what} {to} gets a packet from {source} of a pod that has another address");
    if to.is_ipv6() {
        send_unbound(&routed.rogue, source, (to, PORT).into(), b"unbound");
        assert!(!hears(b"unbound"), "{what} {to} gets a packet from {source} of an ordinary socket");
    }
}

/// The node leads to hosts behind the router, and a neighbour sends to them.
#[track_caller]
fn assert_ingress_policies_judge_what_goes_behind_the_router(routed: &Routed) {
    let node = routed.east1().host();
    let mut at_router = Capture::on(&routed.router, "eth0");
    let address_of = |pod: &CniPod, v6: bool| *pod.addresses.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
    for (v6, prefix) in [false, true].into_iter().zip(FOREIGN_PREFIXES) {
        let (via, dev) = (address_of(&routed.router, v6), host_end(&routed.router));
        node.run(&format!("ip route add {prefix} via {via} dev {dev} onlink"));
    }
    let mut arrives = |v6: bool, port: u16, marker: &[u8]| {
        let to: IpAddr = FOREIGN[usize::from(v6)].parse().unwrap();
        routed.send(&routed.db, &datagram((address_of(&routed.db, v6), port), (to, PORT), marker));
        at_router.hears(marker)
    };
    for v6 in [false, true] {
        await_ok("a packet to arrive behind the router", SOON, || {
            if arrives(v6, PORT, b"behind") { Ok(()) } else { Err("it does not".to_owned()) }
        });
    }
    let spec = json!({"podSelector": {"matchLabels": {"app": "router"}}, "policyTypes": ["Ingress"]});
    put_policy(&routed.mesh.etcd, "shop", "router-ingress", &spec);
    await_in_force(&routed.mesh);
    for v6 in [false, true] {
        assert!(!arrives(v6, 7003, b"refused"), "a packet passes the router's ingress policies");
    }
    delete_policy(&routed.mesh.etcd, "shop", "router-ingress");
    for prefix in FOREIGN_PREFIXES {
        node.run(&format!("ip route del {prefix}"));
    }
}

#[test]
fn a_pod_sends_from_its_own_addresses_and_a_router_from_what_it_is_allowed() {
    let routed = Routed::start("policy-identity");
    let east1 = routed.east1();
    let blocks: Vec<Value> = FOREIGN_PREFIXES.iter().map(|cidr| json!({"ipBlock": {"cidr": cidr}})).collect();
    let spec = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": blocks}]});
    put_policy(&routed.mesh.etcd, "shop", "db", &spec);
    await_in_force(&routed.mesh);
    let (peer, far) = (routed.mesh.pod("east2"), routed.mesh.pod("west1"));
    let store = &routed.mesh.sites.store;
    let outside: [IpAddr; 2] = ["203.0.113.10".parse().unwrap(), "2001:db8:3::10".parse().unwrap()];
    let underlay: [IpAddr; 2] =
        [routed.mesh.sites.east.v4(0).parse().unwrap(), routed.mesh.sites.east.v6(0).parse().unwrap()];
    let mut heard_by = [Capture::on(&routed.db, "eth0"), Capture::on(peer, peer.interface().name())];
    // Without them the pods would answer by an error, which no route leads back to the router.
    let places: [&Namespace; 2] = [&routed.db, peer];
    let _taken = places.map(|place| [true, false].map(|v4| Listener::on(place, v4, PORT)));
    let mut at_far = Capture::on(far, far.interface().name());
    let on_node = [true, false].map(|v4| Listener::on(east1.host(), v4, PORT));
    let on_store = [true, false].map(|v4| Listener::on(store, v4, PORT));
    for v6 in [false, true] {
        let of = |addresses: &[IpAddr]| *addresses.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        for (capture, to) in heard_by.iter_mut().zip([of(&routed.db.addresses), of(peer.addresses())]) {
            assert_only_the_router_arrives(&routed, to, "the pod", |marker| capture.hears(marker));
        }
        for to in [of(&routed.overlay), of(&underlay)] {
            assert_only_the_router_arrives(&routed, to, "the node", |m| on_node[usize::from(v6)].hears(m));
        }
        assert_only_the_router_arrives(&routed, of(&outside), "outside", |m| on_store[usize::from(v6)].hears(m));
    }
    // The far end of a tunnel takes from a node what is of its subnets only.
    for (to, source) in far.addresses().iter().zip(FOREIGN) {
        for from in [&routed.rogue, &routed.router] {
            routed.send(from, &datagram((source.parse().unwrap(), PORT), (*to, PORT), b"far away"));
            assert!(!at_far.hears(b"far away"));
        }
    }
    await_ok("a refused flow to be told of", SOON, || {
        let denied = east1.meshctl(&["flows", "--denied"]).stdout;
        if denied.contains("the source is not an address of the sending pod") { Ok(()) } else { Err(denied) }
    });
    assert_ingress_policies_judge_what_goes_behind_the_router(&routed);
    // What the router sends from those is its own pod's.
    routed.deny_egress("router");
    for v6 in [false, true] {
        let source: IpAddr = FOREIGN[usize::from(v6)].parse().unwrap();
        let of = |addresses: &[IpAddr]| *addresses.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        let lost = |to: IpAddr, hears: &mut dyn FnMut(&[u8]) -> bool| {
            // Another port: what has begun is another question.
            routed.send(&routed.router, &datagram((source, 7001), (to, PORT), b"denied"));
            assert!(!hears(b"denied"), "{to} gets a packet from {source} that the router's policies refuse");
        };
        lost(of(&routed.db.addresses), &mut |marker| heard_by[0].hears(marker));
        lost(of(peer.addresses()), &mut |marker| heard_by[1].hears(marker));
        lost(of(&routed.overlay), &mut |marker| on_node[usize::from(v6)].hears(marker));
        lost(of(&outside), &mut |marker| on_store[usize::from(v6)].hears(marker));
    }
    delete_policy(&routed.mesh.etcd, "shop", "router-egress");
    // What is another's is no pod's to send from.
    let namespace = east1.cni("1.0.0", &json!({})).namespace("refused");
    routed.mesh.etcd.put("/meshd/peers/office", &outside_peer());
    await_in_force(&routed.mesh);
    for (prefix, whose) in [
        ("10.244.0.0/20", "10.244.0.0/16, a mesh network"),
        ("fd42:244:0:7::/64", "fd42:244::/48, a mesh network"),
        ("10.0.0.0/8", "10.244.0.0/16, a mesh network"),
        ("10.99.1.0/24", "10.99.0.0/16 of external peer office"),
        ("198.51.100.0/24", "an address of node west"),
    ] {
        let network = east1.cni("1.0.0", &json!({"allowedSources": [prefix]}));
        await_ok(&format!("an ADD with {prefix} to be refused"), SOON, || {
            let Err(failure) = network.add("refused", &namespace) else {
                network.del("refused", Some(&namespace)).unwrap();
                return Err("it is taken".to_owned());
            };
            let text = failure.to_string();
            let told = failure.code() == Some(7) && text.contains(prefix) && text.contains(whose);
            if told { Ok(()) } else { Err(text) }
        });
        network.del("refused", Some(&namespace)).unwrap();
    }
    // One that becomes another's while the pod is there.
    let shown = routed.mesh.etcd.get_prefix("/meshd/endpoints/");
    assert!(shown.iter().any(|(key, value)| key.contains("/router/") && value.contains("172.31.66.0/24")), "{shown:?}");
    routed.mesh.etcd.put("/meshd/peers/office", &outside_peer().replace("10.99.0.0/16", "172.31.0.0/16"));
    east1.await_status("to refuse the source", SOON, |status| has_problem(status, "allowed_source_refused"));
    let source = FOREIGN[0].parse().unwrap();
    routed.send(&routed.router, &datagram((source, 7002), (routed.db.v4(), PORT), b"too late"));
    assert!(!heard_by[0].hears(b"too late"));
}

fn outside_peer() -> String {
    json!({"publicKey": "/kAyuxIhRaRQUaO1qOPqZh3gCyCWxt/cYelE25pHaB0=", "allowedIPs": ["10.99.0.0/16"]}).to_string()
}

/// Whether a TCP server at this address answers.
pub(crate) fn answers(from: &Namespace, at: SocketAddrV6) -> bool {
    from.enter(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&at.into(), PATIENCE) else { return false };
        round_trip(&mut stream, PATIENCE)
    })
}

/// What link-local addresses are for, and what they are not.
#[track_caller]
fn assert_link_local_answers_the_node_only(routed: &Routed, service: u16) {
    let (node, rogue) = (routed.east1().host(), &routed.rogue);
    let interface = host_end(rogue);
    let (scope_inside, scope) = (index(rogue, "eth0"), index(node, &interface));
    let address = link_local(rogue, "eth0");
    await_ok("the node's probe over link-local to be answered", SOON, || {
        let answered = answers(node, SocketAddrV6::new(address, 9090, 0, scope));
        if answered { Ok(()) } else { Err("it is not".to_owned()) }
    });
    let gateway = SocketAddrV6::new("fe80::1".parse().unwrap(), service, 0, scope_inside);
    assert!(!answers(rogue, gateway), "the pod reaches a service of the node over link-local");
    let listener = Listener::on(node, false, PORT);
    let socket = rogue.enter(|| UdpSocket::bind(SocketAddrV6::new(address, 0, 0, scope_inside)).unwrap());
    let underlay: Ipv6Addr = routed.mesh.sites.east.v6(0).parse().unwrap();
    for to in [*routed.overlay.iter().find(|ip| ip.is_ipv6()).unwrap(), underlay.into()] {
        let _ = socket.send_to(b"link-local", (to, PORT));
        assert!(!listener.hears(b"link-local"), "{to} hears a pod by its link-local address");
    }
}

/// Neighbour discovery, MLD and DHCP reach the node.
#[track_caller]
fn assert_infrastructure_passes(routed: &Routed) {
    let (node, rogue) = (routed.east1().host(), &routed.rogue);
    let interface = host_end(rogue);
    let address = link_local(rogue, "eth0");
    let own = mac(rogue, "eth0");
    let wire = Wire::on(rogue, "eth0");
    let dhcp = Listener::on(node, true, 67);
    await_ok("a DHCP client to be heard", SOON, || {
        let packet = datagram(([0; 4].into(), 68), ([255; 4].into(), 67), b"discover");
        wire.send(&[frame(&BROADCAST, &own, &packet)]);
        if dhcp.hears(b"discover") { Ok(()) } else { Err("it is not".to_owned()) }
    });
    let dhcp = Listener::on(node, false, 547);
    let servers: Ipv6Addr = "ff02::1:2".parse().unwrap();
    dhcp.0.join_multicast_v6(&servers, index(node, &interface)).unwrap();
    await_ok("a DHCPv6 client to be heard", SOON, || {
        let packet = datagram((address.into(), 546), (servers.into(), 547), b"solicit");
        wire.send(&[frame(&[0x33, 0x33, 0, 1, 0, 2], &own, &packet)]);
        if dhcp.hears(b"solicit") { Ok(()) } else { Err("it is not".to_owned()) }
    });
    for ip in &rogue.addresses {
        node.ip(&[&format!("neighbour flush dev {interface}")]);
        await_ok("the pod to be found again", SOON, || {
            let report = integration::ping(node, *ip);
            if report.lost() == 0 { Ok(()) } else { Err(report.text) }
        });
    }
    // A report of listeners is no drop, and what routers say is.
    let routers: Ipv6Addr = "ff02::16".parse().unwrap();
    let message =
        [&[143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &"ff02::77".parse::<Ipv6Addr>().unwrap().octets()].concat();
    let report = icmpv6(address, routers, 1, message);
    // With a hop-by-hop header of a router alert.
    let report = ipv6(address, routers, 0, 1, &[&[58, 0, 5, 2, 0, 0, 1, 0], &report[40..]].concat());
    let nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let advertisement = icmpv6(address, nodes, 255, vec![134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let before = dropped(routed.east1());
    wire.send(&[frame(&[0x33, 0x33, 0, 0, 0, 0x16], &own, &report)]);
    wire.send(&[frame(&[0x33, 0x33, 0, 0, 0, 1], &own, &advertisement)]);
    let dropped = await_until("the advertisement to be dropped", SOON, || {
        Some(dropped(routed.east1())).filter(|dropped| *dropped > before)
    });
    assert_eq!(dropped, before + 1, "the report is dropped, too");
}

/// What the chain of attached pods has dropped.
fn dropped(node: &MeshdNode) -> u64 {
    let listing = node.host().run("nft -j list chain inet meshd_policy attached").stdout;
    let listing: Value = serde_json::from_str(&listing).unwrap();
    let rules = listing["nftables"].as_array().unwrap().iter().filter_map(|item| item["rule"]["expr"].as_array());
    rules.flatten().filter_map(|expression| expression["counter"]["packets"].as_u64()).sum()
}

/// The node has asked something outside, and a pod answers in its place.
#[track_caller]
fn assert_no_forged_answer(routed: &Routed) {
    let sites = &routed.mesh.sites;
    for (from, to) in [(sites.east.v4(0), "198.51.100.99"), (sites.east.v6(0), "2001:db8:2::99")] {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let socket = routed.east1().host().enter(|| UdpSocket::bind((from, 0))).unwrap();
        socket.send_to(b"question", (to, 53)).unwrap();
        let port = socket.local_addr().unwrap().port();
        routed.send(&routed.rogue, &datagram((to, 53), (from, port), b"forged"));
        assert!(!Listener(socket).hears(b"forged"), "a pod answers for {to}");
    }
}

/// Whether a pod's ICMP error about a flow of the node to something outside reaches the process that has it.
fn hears_a_pods_error(routed: &Routed, v6: bool) -> bool {
    let sites = &routed.mesh.sites;
    let (own, to) = if v6 { (sites.east.v6(0), "2001:db8:2::99") } else { (sites.east.v4(0), "198.51.100.99") };
    let (own, to): (IpAddr, IpAddr) = (own.parse().unwrap(), to.parse().unwrap());
    let socket = routed.east1().host().enter(|| UdpSocket::bind((own, 0))).unwrap();
    socket.connect((to, 53)).unwrap();
    socket.send(b"question").unwrap();
    let port = socket.local_addr().unwrap().port();
    let rogue = routed.rogue.addresses.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
    let quoted = datagram((own, port), (to, 53), b"question");
    routed.send(&routed.rogue, &port_unreachable(*rogue, own, &quoted));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.recv(&mut [0; 64]).unwrap_err().kind() == io::ErrorKind::ConnectionRefused
}

#[test]
fn over_link_local_a_pod_answers_its_node_and_begins_nothing() {
    let routed = Routed::start("policy-link-local");
    let node = routed.east1().host();
    let _service = Server::start(node, Ipv6Addr::UNSPECIFIED.into(), 8080);
    let _probed = Server::start(&routed.rogue, Ipv6Addr::UNSPECIFIED.into(), 9090);
    assert_link_local_answers_the_node_only(&routed, 8080);
    assert_infrastructure_passes(&routed);
    assert_no_forged_answer(&routed);
    // Conntrack does not care which interface an answer comes from.
    let interface = host_end(&routed.db);
    groups::assert_no_forged_answer((node, &interface), &routed.db, "fe80::1".parse().unwrap(), |packet| {
        routed.send(&routed.rogue, packet);
    });
    routed.deny_egress("rogue");
    assert_link_local_answers_the_node_only(&routed, 8080);
    assert_infrastructure_passes(&routed);
}

#[test]
fn a_pod_is_closed_by_its_interface_while_nothing_is_in_force() {
    let routed = Routed::start("policy-identity-closed");
    let east1 = routed.east1();
    let _service = Server::start(east1.host(), Ipv6Addr::UNSPECIFIED.into(), 8080);
    let _probed = Server::start(&routed.rogue, Ipv6Addr::UNSPECIFIED.into(), 9090);
    let servers = [Server::start(&routed.db, routed.db.v4(), 5432), Server::start(&routed.db, routed.db.v6(), 5432)];
    for server in &servers {
        server.assert_reached(&routed.rogue);
    }
    for v6 in [false, true] {
        await_ok("an error of a pod that may send to its node", SOON, || {
            if hears_a_pods_error(&routed, v6) { Ok(()) } else { Err("it does not come".to_owned()) }
        });
    }
    east1.kill9();
    routed.nft.refuse("pods");
    east1.host().nft("delete table inet meshd_policy; delete table bridge meshd_policy");
    east1.start();
    east1.await_status("to say why", SOON, |status| has_problem(status, "policies_not_in_force"));
    let mut at_db = Capture::on(&routed.db, "eth0");
    let closed = |at_db: &mut Capture| {
        assert_link_local_answers_the_node_only(&routed, 8080);
        assert_infrastructure_passes(&routed);
        assert_no_forged_answer(&routed);
        for v6 in [false, true] {
            assert!(!hears_a_pods_error(&routed, v6), "a pod's error about the node's flow passes unjudged");
        }
        for (foreign, to) in FOREIGN.iter().zip([routed.db.v4(), routed.db.v6()]) {
            for from in [&routed.rogue, &routed.router] {
                routed.send(from, &datagram((foreign.parse().unwrap(), PORT), (to, PORT), b"while closed"));
                assert!(!at_db.hears(b"while closed"));
            }
        }
        for server in &servers {
            server.assert_not_reached(&routed.rogue);
            server.assert_reached(east1.host());
        }
    };
    closed(&mut at_db);
    // Rules, cache and etcd are gone: the attachments are what is known.
    east1.kill9();
    routed.nft.refuse("none");
    routed.mesh.etcd.stop();
    fs::remove_dir_all(east1.state_dir().join("cache")).unwrap();
    east1.host().nft("delete table inet meshd_policy; delete table bridge meshd_policy");
    east1.start();
    await_ok("the way to pods to be closed", SOON, || {
        let listed = east1.host().try_run(&["nft", "list", "table", "inet", "meshd_policy"]);
        let closed = listed.stdout.contains("chain closed") && listed.stdout.contains(&host_end(&routed.db));
        if closed { Ok(()) } else { Err(listed.describe()) }
    });
    closed(&mut at_db);
}
