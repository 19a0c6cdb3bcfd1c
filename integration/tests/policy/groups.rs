//! Pods on a bridge: hardware addresses, link-local ones, and frames to everybody.
//!
//! ```text
//!   east1: bridge ─┬─ db           router ── west1 (pod)
//!                  ├─ neighbour       │
//!                  └─ third         store
//! ```

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    time::Duration,
};

use cni::link::mac_text;
use integration::{CniPod, CniRuntime, MeshdNode, Namespace, Pod, Wire, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force,
    bridged::{Bridged, allow, network},
    frames::{
        BROADCAST, Capture, PATIENCE, arp, datagram, frame, host_end, icmpv6, index, ipv6, link_local, mac,
        port_unreachable,
    },
    identity::{Listener, answers, send_unbound},
    objects::{delete_policy, put_policy},
    probe::Server,
};

const PORT: u16 = 7000;

/// The plugin's own bridge.
pub(crate) fn own_bridge(node: &MeshdNode) -> CniRuntime {
    node.cni("1.0.0", &json!({"mode": "bridge", "bridge": "shop0"}))
}

fn of(pod: &CniPod, v6: bool) -> IpAddr {
    if v6 { pod.v6() } else { pod.v4() }
}

#[test]
fn behind_debians_bridge_a_pod_is_itself() {
    a_pod_is_itself(&Bridged::start_by("policy-bridge-identity", network), "cni0");
}

#[test]
fn on_the_plugins_bridge_a_pod_is_itself() {
    a_pod_is_itself(&Bridged::start_by("policy-own-bridge-identity", own_bridge), "shop0");
}

fn a_pod_is_itself(bridged: &Bridged, bridge: &str) {
    let Bridged { mesh, pods: [db, neighbour, third] } = bridged;
    let node = mesh.node("east1").host();
    let mut spec = allow("third");
    let blocks = json!([{"ipBlock": {"cidr": "172.31.66.0/24"}}, {"ipBlock": {"cidr": "fd66::/64"}}]);
    spec["ingress"][0]["from"].as_array_mut().unwrap().extend(blocks.as_array().unwrap().clone());
    put_policy(&mesh.etcd, "shop", "db", &spec);
    await_in_force(mesh);
    let [to, own, others] = [db, third, neighbour].map(|pod| mac(pod, "eth0"));
    let wire = Wire::on(third, "eth0");
    let mut at_db = Capture::on(db, "eth0");
    // A VLAN tag hides a packet from br_netfilter; id 0 belongs to no VLAN, and receivers strip it.
    for (number, tag) in (0_u8..).zip([[0x81, 0, 0, 0], [0x81, 0, 0, 7], [0x88, 0xa8, 0, 7], [0x91, 0, 0, 7]]) {
        let marker = [b't', number, b'g'];
        let mut tagged = frame(&to, &own, &datagram((third.v4(), PORT), (db.v4(), PORT), &marker));
        tagged.splice(12..12, tag);
        wire.send(&[tagged]);
        assert!(!at_db.hears(&marker), "a frame with the tag {tag:x?} passes");
    }
    for (v6, foreign) in [(false, "172.31.66.7"), (true, "fd66::7")] {
        let foreign: IpAddr = foreign.parse().unwrap();
        let packet = |source: IpAddr, marker: &[u8]| datagram((source, PORT), (of(db, v6), PORT), marker);
        await_ok("a packet of its own to arrive", SOON, || {
            wire.send(&[frame(&to, &own, &packet(of(third, v6), b"own"))]);
            if at_db.hears(b"own") { Ok(()) } else { Err("it does not".to_owned()) }
        });
        wire.send(&[frame(&to, &others, &packet(of(third, v6), b"neighbour's MAC"))]);
        assert!(!at_db.hears(b"neighbour's MAC"), "a frame with a neighbour's hardware address passes");
        wire.send(&[frame(&to, &own, &packet(foreign, b"foreign"))]);
        assert!(!at_db.hears(b"foreign"), "a packet from {foreign} passes");
        if v6 {
            send_unbound(third, foreign, (of(db, v6), PORT).into(), b"unbound");
            assert!(!at_db.hears(b"unbound"), "a packet from {foreign} of an ordinary socket passes");
        }
        let outside: IpAddr = if v6 { "2001:db8:3::10".parse().unwrap() } else { "203.0.113.10".parse().unwrap() };
        let overlay = mesh.node("east1").overlay().into_iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        for (place, at) in [(node, overlay), (&mesh.sites.store, outside)] {
            let listener = Listener::on(place, !v6, PORT);
            let packet = datagram((foreign, PORT), (at, PORT), b"foreign");
            wire.send(&[frame(&mac(node, bridge), &own, &packet)]);
            assert!(!listener.hears(b"foreign"), "{at} gets a packet from {foreign}");
        }
    }
    where_addresses_are_said(bridged);
    // What the neighbour gets while its hardware address is used by another.
    let mut at_neighbour = Capture::on(neighbour, "eth0");
    let from_db = Wire::on(db, "eth0");
    for number in 0..20_u8 {
        let claimed = datagram((third.v4(), PORT), (neighbour.v4(), PORT), b"claim");
        wire.send(&[frame(&BROADCAST, &others, &claimed)]);
        let marker = [b'n', number, b'e'];
        let packet = datagram((db.v4(), PORT), (neighbour.v4(), PORT), &marker);
        from_db.send(&[frame(&others, &to, &packet)]);
        assert!(at_neighbour.hears_within(SOON, &marker), "packet {number} to the neighbour went elsewhere");
    }
    let mut at_third = Capture::on(third, "eth0");
    assert_groups_attract_nothing(bridged, [&mut at_neighbour, &mut at_third], b'1');
    let report = integration::ping(node, neighbour.v4());
    assert_eq!(report.lost(), 0, "the node does not reach the neighbour: {}", report.text);
    // A frame for a station that the bridge does not know goes to all ports. It knows one again once that answers.
    let forget = || {
        let (station, port) = (mac_text(&others), host_end(neighbour));
        await_ok("the bridge to know the neighbour", SOON, || {
            integration::ping(node, neighbour.v4());
            let known = node.run(&format!("bridge fdb show dev {port}")).stdout;
            if known.contains(&station) { Ok(()) } else { Err(known) }
        });
        node.run(&format!("bridge fdb del {station} dev {port} master"));
    };
    forget();
    from_db.send(&[frame(&others, &to, &datagram((db.v4(), PORT), (neighbour.v4(), PORT), b"flooded"))]);
    assert!(
        at_neighbour.hears_within(SOON, b"flooded") && !at_third.hears(b"flooded"),
        "a pod gets frames for its neighbour"
    );
    forget();
    node.enter(|| {
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().send_to(b"by node", (neighbour.v4(), PORT)).unwrap()
    });
    assert!(
        at_neighbour.hears_within(SOON, b"by node") && !at_third.hears(b"by node"),
        "a pod gets its neighbour's from the node"
    );
    // Another program turns learning on again.
    node.ip(&[&format!("link set {bridge} type bridge no_linklocal_learn 0")]);
    node.nft("add table inet stranger; delete table inet stranger");
    await_ok("the daemon to turn link-local learning off", SOON, || {
        let shown = node.run(&format!("ip -details link show {bridge}")).stdout;
        if shown.contains("no_linklocal_learn 1") { Ok(()) } else { Err(shown) }
    });
    assert_groups_attract_nothing(bridged, [&mut at_neighbour, &mut at_third], b'2');
    link_local_is_the_nodes(bridged, bridge);
    no_pod_takes_a_link_local_address(bridged, bridge);
}

/// `third` sends frames with the hardware address of `neighbour` to groups that end at the bridge, which learns from
/// some of them before any rule sees them: what `db` sends the neighbour goes to the neighbour alone.
#[track_caller]
fn assert_groups_attract_nothing(bridged: &Bridged, [at_neighbour, at_third]: [&mut Capture; 2], round: u8) {
    let [db, neighbour, third] = &bridged.pods;
    let [to, others] = [db, neighbour].map(|pod| mac(pod, "eth0"));
    let (wire, from_db) = (Wire::on(third, "eth0"), Wire::on(db, "eth0"));
    for group in 0..16_u8 {
        wire.send(&[frame(&[0x01, 0x80, 0xc2, 0, 0, group], &others, &[0; 46])]);
        let marker = [b'g', round, group, b'l'];
        from_db.send(&[frame(&others, &to, &datagram((db.v4(), PORT), (neighbour.v4(), PORT), &marker))]);
        assert!(
            at_neighbour.hears_within(SOON, &marker),
            "behind a frame to group {group:#x} the neighbour's packets go elsewhere"
        );
        assert!(!at_third.hears(&marker), "behind a frame to group {group:#x} a pod gets its neighbour's packets");
    }
}

/// ARP and neighbour discovery of a pod say of its own addresses that they are where it is, and nothing else.
fn where_addresses_are_said(bridged: &Bridged) {
    let [db, neighbour, third] = &bridged.pods;
    let [own, others] = [third, neighbour].map(|pod| mac(pod, "eth0"));
    let wire = Wire::on(third, "eth0");
    let mut at_db = Capture::on(db, "eth0");
    let mut heard_within = |patience: Duration, frame: Vec<u8>| {
        wire.send(std::slice::from_ref(&frame));
        at_db.hears_within(patience, &frame[14..])
    };
    let says = |said: [u8; 6], address: IpAddr| {
        let mut frame = arp(2, (said, address), address);
        frame[6..12].copy_from_slice(&own);
        frame
    };
    assert!(heard_within(SOON, says(own, third.v4())), "its own");
    assert!(!heard_within(PATIENCE, says(others, third.v4())), "its own address at the neighbour's hardware address");
    assert!(!heard_within(PATIENCE, says(own, neighbour.v4())), "the neighbour's address");
    let (IpAddr::V6(address), IpAddr::V6(next)) = (third.v6(), neighbour.v6()) else { panic!("no IPv6") };
    let all: Ipv6Addr = "ff02::1".parse().unwrap();
    let multicast = [0x33, 0x33, 0, 0, 0, 1];
    let advertised = |target: Ipv6Addr, said: [u8; 6]| {
        let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &said].concat();
        frame(&multicast, &own, &icmpv6(address, all, 255, message))
    };
    assert!(heard_within(SOON, advertised(address, own)), "its own");
    assert!(
        !heard_within(PATIENCE, advertised(address, others)),
        "its own address at the neighbour's hardware address"
    );
    assert!(!heard_within(PATIENCE, advertised(next, own)), "the neighbour's address");
    let asked = |said: [u8; 6]| {
        let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &next.octets(), &[1, 1], &said].concat();
        frame(&multicast, &own, &icmpv6(address, all, 255, message))
    };
    assert!(heard_within(SOON, asked(own)), "its own");
    assert!(!heard_within(PATIENCE, asked(others)), "its own address at the neighbour's hardware address");
    // A second option behind a harmless one.
    let hidden = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &address.octets(), &[14, 1, 0, 0, 0, 0, 0, 0], &[2, 1], &others];
    assert!(
        !heard_within(PATIENCE, frame(&multicast, &own, &icmpv6(address, all, 255, hidden.concat()))),
        "behind another option"
    );
    // Behind extension headers, also one that says that it is the only fragment.
    for (kind, header) in
        [(0, [58, 0, 1, 4, 0, 0, 0, 0]), (60, [58, 0, 1, 4, 0, 0, 0, 0]), (44, [58, 0, 0, 0, 0, 0, 0, 1])]
    {
        for target in [address, next] {
            let plain = icmpv6(
                address,
                all,
                255,
                [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &own].concat(),
            );
            let packet = ipv6(address, all, kind, 255, &[&header[..], &plain[40..]].concat());
            assert!(
                !heard_within(PATIENCE, frame(&multicast, &own, &packet)),
                "an advertisement of {target} behind header {kind}"
            );
        }
    }
    // The gateway's address, as if it had moved.
    let IpAddr::V4(v4) = third.v4() else { panic!("no IPv4") };
    let [a, b, c, _] = v4.octets();
    assert!(!heard_within(PATIENCE, says(own, Ipv4Addr::new(a, b, c, 1).into())), "the gateway's address");
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    let router = icmpv6(link_local(third, "eth0"), all, 255, advertisement);
    assert!(!heard_within(PATIENCE, frame(&multicast, &own, &router)), "that it is a router");
}

fn link_local_is_the_nodes(bridged: &Bridged, bridge: &str) {
    let Bridged { mesh, pods: [db, _, third] } = bridged;
    let node = mesh.node("east1").host();
    let any: IpAddr = Ipv6Addr::UNSPECIFIED.into();
    let _services = [Server::start(node, any, 8080), Server::start(db, any, 8080), Server::start(third, any, 9090)];
    let (address, inside) = (link_local(third, "eth0"), index(third, "eth0"));
    await_ok("the node's probe over link-local to be answered", SOON, || {
        let at = SocketAddrV6::new(address, 9090, 0, index(node, bridge));
        if answers(node, at) { Ok(()) } else { Err("it is not".to_owned()) }
    });
    for (whose, at) in [("the node's", link_local(node, bridge)), ("a neighbour's", link_local(db, "eth0"))] {
        let service = SocketAddrV6::new(at, 8080, 0, inside);
        assert!(!answers(third, service), "the pod reaches {whose} service over link-local");
    }
    let listener = Listener::on(node, false, PORT);
    let socket = third.enter(|| UdpSocket::bind(SocketAddrV6::new(address, 0, 0, inside)).unwrap());
    let overlay = mesh.node("east1").overlay().into_iter().find(IpAddr::is_ipv6).unwrap();
    let _ = socket.send_to(b"link-local", (overlay, PORT));
    assert!(!listener.hears(b"link-local"), "the node's overlay address hears a pod by its link-local address");
}

/// The link-local address that follows from a neighbour's hardware address, or from the bridge's, is not a pod's to
/// use.
fn no_pod_takes_a_link_local_address(bridged: &Bridged, bridge: &str) {
    let Bridged { mesh, pods: [db, neighbour, third] } = bridged;
    let node = mesh.node("east1").host();
    let (own, at_node) = (mac(third, "eth0"), mac(node, bridge));
    let (theirs, nodes) = (link_local(neighbour, "eth0"), link_local(node, bridge));
    let wire = Wire::on(third, "eth0");
    let mut at_db = Capture::on(db, "eth0");
    let _service = Server::start(neighbour, Ipv6Addr::UNSPECIFIED.into(), 9191);
    let probe = SocketAddrV6::new(theirs, 9191, 0, index(node, bridge));
    let advertised = |target: Ipv6Addr, source: Ipv6Addr, to: Ipv6Addr| {
        let message = [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &target.octets(), &[2, 1], &own].concat();
        icmpv6(source, to, 255, message)
    };
    let asked = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &nodes.octets(), &[1, 1], &own].concat();
    let router = [&[133, 0, 0, 0, 0, 0, 0, 0][..], &[1, 1], &own].concat();
    let forged = [
        advertised(theirs, theirs, nodes),
        advertised(theirs, link_local(third, "eth0"), nodes),
        icmpv6(theirs, nodes, 255, asked),
        icmpv6(theirs, nodes, 255, router),
    ];
    let claimed = mac_text(&own);
    for (number, packet) in forged.iter().enumerate() {
        await_ok("the node's probe to be answered", SOON, || {
            if answers(node, probe) { Ok(()) } else { Err("it is not".to_owned()) }
        });
        wire.send(&[frame(&at_node, &own, packet)]);
        let known = node.run(&format!("ip neighbour show {theirs} dev {bridge}")).stdout;
        assert!(!known.contains(&claimed), "message {number}: the node takes a pod for its neighbour: {known}");
    }
    let all: Ipv6Addr = "ff02::1".parse().unwrap();
    for target in [theirs, nodes] {
        let packet = advertised(target, link_local(third, "eth0"), all);
        wire.send(&[frame(&[0x33, 0x33, 0, 0, 0, 1], &own, &packet)]);
        assert!(!at_db.hears(&packet), "a pod says that it has {target}");
    }
    assert_no_forged_answer((node, bridge), neighbour, nodes, |packet| wire.send(&[frame(&at_node, &own, packet)]));
}

/// The node asks a pod over link-local, and another one answers in its place.
pub(crate) fn assert_no_forged_answer(
    (node, interface): (&Namespace, &str),
    asked: &CniPod,
    from: Ipv6Addr,
    send: impl Fn(&[u8]),
) {
    let address = link_local(asked, "eth0");
    let taken = asked.enter(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap());
    let socket = node.enter(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap());
    let port = socket.local_addr().unwrap().port();
    let at = SocketAddrV6::new(address, PORT, 0, index(node, interface));
    socket.send_to(b"question", at).unwrap();
    taken.set_read_timeout(Some(SOON)).unwrap();
    let (_, asker) = taken.recv_from(&mut [0; 64]).unwrap();
    let listener = Listener::of(socket);
    send(&datagram((address.into(), PORT), (from.into(), port), b"forged"));
    assert!(!listener.hears(b"forged"), "a pod answers for {address}");
    taken.send_to(b"genuine", asker).unwrap();
    assert!(listener.hears_within(SOON, b"genuine"), "the node does not hear {address}");
}

/// Sends to all hosts of a family by an ordinary socket, from the pod's own address.
fn send_to_all(from: &CniPod, to: SocketAddr, data: &[u8]) {
    from.enter(|| {
        let socket = UdpSocket::bind((of(from, to.is_ipv6()), 0)).unwrap();
        socket.set_broadcast(true).unwrap();
        let _ = socket.send_to(data, to);
    });
}

#[test]
fn of_what_goes_to_groups_an_isolated_pod_gets_what_networks_need() {
    let bridged = Bridged::start_by("policy-groups", network);
    let Bridged { mesh, pods: [db, neighbour, third] } = &bridged;
    let node = mesh.node("east1").host();
    let groups: [SocketAddr; 4] = [
        (Ipv4Addr::BROADCAST, PORT).into(),
        (Ipv4Addr::new(224, 0, 0, 1), PORT).into(),
        (Ipv4Addr::new(224, 0, 0, 251), PORT).into(),
        SocketAddrV6::new("ff02::1".parse().unwrap(), PORT, 0, index(third, "eth0")).into(),
    ];
    let listeners = [true, false].map(|v4| Listener::on(db, v4, PORT));
    listeners[0].join_v4(Ipv4Addr::new(224, 0, 0, 251), index(db, "eth0"));
    let hears = |to: &SocketAddr, marker: &[u8]| {
        send_to_all(third, *to, marker);
        listeners[usize::from(to.is_ipv6())].hears(marker)
    };
    for group in &groups {
        await_ok(&format!("{group} to be heard"), SOON, || {
            if hears(group, b"open") { Ok(()) } else { Err("it is not".to_owned()) }
        });
    }
    let mut at_db = Capture::on(db, "eth0");
    let wire = Wire::on(third, "eth0");
    let [own, db_mac] = [third, db].map(|pod| mac(pod, "eth0"));
    // In frames for the pod alone, which it would take as its own.
    let others = others_destinations(neighbour);
    for (number, to) in (0_u8..).zip(&others) {
        let marker = [b'o', number, b'n'];
        await_ok(&format!("a frame with a packet to {to} to be heard"), SOON, || {
            wire.send(&[frame(&db_mac, &own, &datagram((of(third, to.is_ipv6()), 7001), (*to, PORT), &marker))]);
            if at_db.hears(&marker) { Ok(()) } else { Err("it is not".to_owned()) }
        });
    }
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(mesh);
    for group in &groups {
        assert!(!hears(group, b"isolated"), "an isolated pod hears {group}");
    }
    for (number, to) in (0_u8..).zip(&others) {
        let marker = [b'o', number, b'i'];
        wire.send(&[frame(&db_mac, &own, &datagram((of(third, to.is_ipv6()), PORT), (*to, PORT), &marker))]);
        assert!(!at_db.hears(&marker), "an isolated pod hears a packet to {to} in a frame for it alone");
    }
    // For the pod alone, in a frame for all; and an error about what it would have answered.
    for v6 in [false, true] {
        let (from, to) = ((of(third, v6), PORT), (of(db, v6), PORT));
        wire.send(&[frame(&BROADCAST, &own, &datagram(from, to, b"for all"))]);
        assert!(!at_db.hears(b"for all"), "{to:?} hears what its policies refuse");
        let quoted = datagram(to, from, b"quoted");
        wire.send(&[frame(&db_mac, &own, &port_unreachable(from.0, to.0, &quoted))]);
        assert!(!at_db.hears(b"quoted"), "{to:?} hears an error about what was refused");
    }
    assert_no_flow(node, third);
    // Neighbours are found, listeners and servers are heard of.
    for ip in &db.addresses {
        third.ip(&["neighbour flush dev eth0"]);
        await_ok("the pod to be found", SOON, || {
            integration::ping(third, *ip);
            let known = third.run(&format!("ip neighbour show {ip} dev eth0")).stdout;
            if known.contains("lladdr") { Ok(()) } else { Err(known) }
        });
    }
    Server::start(db, db.v6(), 5432).assert_reached(neighbour);
    let server = mesh.node("east1").host().pod("server", &[]);
    node.ip(&[&format!("link set {} master cni0 up", server.host_interface().name())]);
    let inside = server.interface().name();
    let (from_server, mut at_server) = (Wire::on(&server, inside), Capture::on(&server, inside));
    await_ok("the DHCP server to be heard", SOON, || {
        let offer = datagram(([172, 31, 0, 1].into(), 67), (Ipv4Addr::BROADCAST.into(), 68), b"offer");
        from_server.send(&[frame(&BROADCAST, &mac(&server, inside), &offer)]);
        if at_db.hears(b"offer") { Ok(()) } else { Err("it is not".to_owned()) }
    });
    let offer = datagram((third.v4(), 67), (Ipv4Addr::BROADCAST.into(), 68), b"a pod's");
    wire.send(&[frame(&BROADCAST, &own, &offer)]);
    assert!(!at_db.hears(b"a pod's"), "an isolated pod hears another pod's DHCP offer");
    await_ok("a DHCP client to be heard", SOON, || {
        let discover = datagram(([0; 4].into(), 68), (Ipv4Addr::BROADCAST.into(), 67), b"discover");
        Wire::on(db, "eth0").send(&[frame(&BROADCAST, &db_mac, &discover)]);
        if at_server.hears(b"discover") { Ok(()) } else { Err("it is not".to_owned()) }
    });
    infrastructure_of_ipv6_arrives(&bridged, &server);
    refused_at_its_source(&bridged);
}

/// What a router, a DHCPv6 server and listeners send to an isolated pod's port.
fn infrastructure_of_ipv6_arrives(bridged: &Bridged, server: &Pod) {
    let Bridged { mesh, pods: [db, _, third] } = bridged;
    // Snooping would decide which port hears of listeners; this is about the rules.
    mesh.node("east1").host().ip(&["link set cni0 type bridge mcast_snooping 0"]);
    let mut at_db = Capture::on(db, "eth0");
    let [all, listeners]: [Ipv6Addr; 2] = ["ff02::1", "ff02::16"].map(|text| text.parse().unwrap());
    let to_db = link_local(db, "eth0");
    let group: Ipv6Addr = "ff02::77".parse().unwrap();
    // Behind a router alert, as listeners and routers send them.
    let mld = |from: Ipv6Addr, to: Ipv6Addr, hops: u8, message: &[u8]| {
        let plain = icmpv6(from, to, hops, message.to_vec());
        ipv6(from, to, 0, hops, &[&[58, 0, 5, 2, 0, 0, 1, 0], &plain[40..]].concat())
    };
    let query = [&[130, 0, 0, 0, 0x27, 0x10, 0, 0][..], &[0; 16], &[2, 125, 0, 0]].concat();
    let report = [&[143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &group.octets()].concat();
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let offer = |from: Ipv6Addr, ports: (u16, u16)| datagram((from.into(), ports.0), (to_db.into(), ports.1), b"offer");
    let (station, groups) = (mac(db, "eth0"), [0x33, 0x33, 0, 0, 0, 1]);
    let inside = server.interface().name();
    let mut hears = |place: &Namespace, interface: &str, to: &[u8; 6], packet: &[u8], patience: Duration| {
        Wire::on(place, interface).send(&[frame(to, &mac(place, interface), packet)]);
        at_db.hears_within(patience, packet)
    };
    let router = link_local(server, inside);
    for (what, to, packet) in [
        ("a router advertisement", &groups, icmpv6(router, all, 255, advertisement.to_vec())),
        ("an MLD query", &groups, mld(router, all, 1, &query)),
        ("an MLD report", &groups, mld(router, listeners, 1, &report)),
        ("a DHCPv6 server", &station, offer(router, (547, 546))),
    ] {
        assert!(hears(server, inside, to, &packet, SOON), "an isolated pod does not hear {what}");
    }
    for (what, to, packet) in [
        ("an advertisement that was passed on", &groups, icmpv6(router, all, 254, advertisement.to_vec())),
        ("a query that was passed on", &groups, mld(router, all, 2, &query)),
        ("another service than DHCPv6", &station, offer(router, (546, 546))),
        ("another client than DHCPv6's", &station, offer(router, (547, 547))),
    ] {
        assert!(!hears(server, inside, to, &packet, PATIENCE), "an isolated pod hears {what}");
    }
    // A pod is a listener, and neither router nor server.
    let pod = link_local(third, "eth0");
    assert!(
        hears(third, "eth0", &groups, &mld(pod, listeners, 1, &report), SOON),
        "a pod's MLD report does not arrive"
    );
    for (what, to, packet) in [
        ("query", &groups, mld(pod, all, 1, &query)),
        ("router advertisement", &groups, icmpv6(pod, all, 255, advertisement.to_vec())),
        ("DHCPv6 offer", &station, offer(pod, (547, 546))),
    ] {
        assert!(!hears(third, "eth0", to, &packet, PATIENCE), "an isolated pod hears another pod's {what}");
    }
}

/// A router on a bridge: what it may send from besides its own addresses is its alone, and judged as its own.
#[test]
fn on_a_bridge_a_router_alone_sends_from_what_it_is_allowed() {
    let bridged = Bridged::start_by("policy-bridge-router", own_bridge);
    let Bridged { mesh, pods: [db, _, third] } = &bridged;
    let east1 = mesh.node("east1");
    let allowed = json!({
        "mode": "bridge", "bridge": "shop0", "allowedSources": ["172.31.66.0/24", "fd66::/64"],
        "pod": {"namespace": "shop", "labels": {"app": "router"}},
    });
    let router = east1.cni("1.0.0", &allowed).pod("router");
    await_in_force(mesh);
    let gateway = mac(east1.host(), "shop0");
    let [own, others] = [third, &router].map(|pod| mac(pod, "eth0"));
    for (v6, source, outside) in [(false, "172.31.66.7", "203.0.113.10"), (true, "fd66::7", "2001:db8:3::10")] {
        let source: IpAddr = source.parse().unwrap();
        let overlay = east1.overlay().into_iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        let places: [(&Namespace, _, _); 3] = [
            (east1.host(), gateway, overlay),
            (&mesh.sites.store, gateway, outside.parse().unwrap()),
            (db, mac(db, "eth0"), of(db, v6)),
        ];
        for (place, station, to) in places {
            let listener = Listener::on(place, !v6, PORT);
            let arrives = |from: &CniPod, as_station: &[u8], port: u16, marker: &[u8]| {
                let packet = datagram((source, port), (to, PORT), marker);
                Wire::on(from, "eth0").send(&[frame(&station, as_station, &packet)]);
                listener.hears(marker)
            };
            await_ok(&format!("the router's packet to {to} to arrive"), SOON, || {
                if arrives(&router, &others, PORT, b"routed") { Ok(()) } else { Err("it does not".to_owned()) }
            });
            for (number, as_station) in (0_u8..).zip([own, others]) {
                let marker = [b'b', number, b'd'];
                assert!(!arrives(third, &as_station, 7001, &marker), "{to} gets a packet from {source} of another pod");
            }
            let spec = json!({"podSelector": {"matchLabels": {"app": "router"}}, "policyTypes": ["Egress"]});
            put_policy(&mesh.etcd, "shop", "router", &spec);
            await_in_force(mesh);
            // Another port: what has begun is another question.
            assert!(!arrives(&router, &others, 7002, b"denied"), "{to} gets what the router's policies refuse");
            delete_policy(&mesh.etcd, "shop", "router");
            await_in_force(mesh);
        }
    }
}

/// Groups, the broadcast addresses, an unused address and a neighbour's: destinations that no rule for the
/// isolated pod names.
fn others_destinations(neighbour: &CniPod) -> Vec<IpAddr> {
    let IpAddr::V4(v4) = neighbour.v4() else { panic!("no IPv4") };
    let [a, b, c, _] = v4.octets();
    let texts = ["224.0.0.1", "239.1.2.3", "255.255.255.255", "203.0.113.77", "127.0.0.1"];
    let texts = texts.into_iter().chain(["ff02::1", "ff05::2", "2001:db8:77::1", "fe80::77"]);
    let parsed = texts.map(|text| text.parse().unwrap());
    parsed.chain([Ipv4Addr::new(a, b, c, 255).into(), neighbour.v4(), neighbour.v6()]).collect()
}

/// What a pod may not send to groups is no flow either.
fn refused_at_its_source(bridged: &Bridged) {
    let Bridged { mesh, pods: [_, neighbour, third] } = bridged;
    let node = mesh.node("east1").host();
    let spec: Value = json!({"podSelector": {"matchLabels": {"app": "third"}}, "policyTypes": ["Ingress", "Egress"]});
    put_policy(&mesh.etcd, "shop", "third", &spec);
    await_in_force(mesh);
    let mut at_third = Capture::on(third, "eth0");
    let (wire, own) = (Wire::on(neighbour, "eth0"), mac(neighbour, "eth0"));
    for group in [Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1)] {
        let sent = datagram((third.v4(), PORT), (group.into(), PORT), b"to all");
        let mut at_neighbour = Capture::on(neighbour, "eth0");
        Wire::on(third, "eth0").send(&[frame(&BROADCAST, &mac(third, "eth0"), &sent)]);
        assert!(!at_neighbour.hears(b"to all"), "{group} hears a pod that may send nothing");
        wire.send(&[frame(&mac(third, "eth0"), &own, &port_unreachable(neighbour.v4(), third.v4(), &sent))]);
        assert!(!at_third.hears(b"to all"), "an error about what was refused passes");
    }
    assert_no_flow(node, third);
}

/// Conntrack knows no flow of the pod at this port.
#[track_caller]
fn assert_no_flow(node: &Namespace, pod: &CniPod) {
    let known = node.enter(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack")).unwrap();
    for address in &pod.addresses {
        let full = match address {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => v6.segments().map(|part| format!("{part:04x}")).join(":"),
        };
        let flow = known.lines().find(|line| {
            line.contains(&format!("src={full} ")) && line.contains(&format!("sport={PORT} dport={PORT} "))
        });
        assert_eq!(flow, None, "a refused flow is known");
    }
}

/// Packets of the port of a pod that the plugin of an earlier version attached, which reported no hardware address.
#[test]
fn a_pod_of_an_earlier_plugin_keeps_its_network() {
    let bridged = Bridged::start_by("policy-bridge-earlier", network);
    let Bridged { mesh, pods: [db, neighbour, third] } = &bridged;
    let east1 = mesh.node("east1");
    // As that plugin would have had it written.
    east1.kill9();
    let folder = east1.run_dir().join("attachments");
    for pod in [neighbour, third] {
        let path = folder.join(format!("{}@eth0", pod.id));
        let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        record["attach"].as_object_mut().unwrap().remove("mac").expect("the plugin reports it");
        std::fs::write(&path, record.to_string()).unwrap();
    }
    east1.start();
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(mesh);
    for server in [Server::start(db, db.v4(), 5432), Server::start(db, db.v6(), 5432)] {
        server.assert_reached(neighbour);
        server.assert_not_reached(third);
        server.assert_reached(east1.host());
    }
    let mut at_db = Capture::on(db, "eth0");
    let borrowed = datagram((neighbour.v4(), PORT), (db.v4(), PORT), b"borrowed");
    Wire::on(third, "eth0").send(&[frame(&mac(db, "eth0"), &mac(third, "eth0"), &borrowed)]);
    assert!(!at_db.hears(b"borrowed"));
}
