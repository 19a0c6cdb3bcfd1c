//! VXLAN devices with real packets.
//!
//! ```text
//!  node 10.244.1.0  flannel.1 ─ eth0 192.0.2.1 ───── far 192.0.2.2, 192.0.2.9 ─ flannel.1   node 2: 10.244.2.0
//!  (this namespace)         2001:db8::1                    2001:db8::2                      claims 10.244.3.0 of node 3
//! ```

use std::{collections::BTreeSet, net::UdpSocket, time::Duration};

use mesh::{
    kernel_state::{VxlanDevice, VxlanPeer},
    path::{MacAddress, Vtep},
};

use super::{
    namespace::{Host, isolated, run, try_run},
    *,
};

const OWN: &str = "02:00:00:00:00:01";

fn vtep(address: &str, last: u8) -> Vtep {
    Vtep { address: addr(address), mac: MacAddress([2, 0, 0, 0, 0, last]) }
}

/// [`desired`] with nodes 2 and 3 by VXLAN.
fn by_vxlan() -> Desired {
    let mut desired = desired();
    for (dev, local, ends) in [
        (
            "flannel.1",
            "192.0.2.1",
            [("10.244.2.0/24", "10.244.2.0", "192.0.2.2", 2), ("10.244.3.0/24", "10.244.3.0", "192.0.2.3", 3)],
        ),
        (
            "flannel-v6.1",
            "2001:db8::1",
            [
                ("fd42:244:0:2::/64", "fe80::ff:fe00:2", "2001:db8::2", 2),
                ("fd42:244:0:3::/64", "fe80::ff:fe00:3", "2001:db8::3", 3),
            ],
        ),
    ] {
        let mut peers = Vec::new();
        for (prefix, next_hop, address, last) in ends {
            *route_to(&mut desired, prefix) = route(prefix, RouteVia::Vtep { via: addr(next_hop), dev: name(dev) });
            desired.firewall.direct.push(PrefixVia { prefix: net(prefix), dev: name(dev), via: addr(next_hop) });
            desired.firewall.accepted.push(on(prefix, dev));
            let vtep = vtep(address, last);
            peers.push(VxlanPeer { next_hop: addr(next_hop), vtep, prefixes: vec![net(prefix)] });
        }
        desired.vxlan.push(VxlanDevice {
            name: name(dev),
            vni: 1,
            port: 8472,
            underlay: name("eth0"),
            local: vtep(local, 1),
            mtu: 1430,
            learning: false,
            gbp: false,
            peers,
        });
    }
    desired
}

fn index_of(dev: &str) -> String {
    run(&format!("ip -o link show {dev}")).split(':').next().unwrap().to_owned()
}

fn changes(report: &PassReport) -> BTreeSet<String> {
    report.changes.iter().map(ToString::to_string).collect()
}

#[test]
fn devices_and_entries_become_what_they_are_to_be_and_come_back() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        let mut desired = by_vxlan();
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        let link = run("ip -d link show flannel.1");
        for part in ["vxlan id 1 local 192.0.2.1 dev eth0", "dstport 8472 nolearning", "mtu 1430", OWN, "state UNKNOWN"]
        {
            assert!(link.contains(part), "{part}: {link}");
        }
        assert!(run("ip -d link show flannel-v6.1").contains("local 2001:db8::1"));
        assert!(run("ip route get 10.244.3.7").contains("via 10.244.3.0 dev flannel.1 src 10.244.1.0"));
        assert!(run("ip -6 route get fd42:244:0:3::7").contains("dev flannel-v6.1"));
        // What others take away or bend comes back, and nothing else is done.
        for (line, back) in [
            ("ip neigh del 10.244.2.0 dev flannel.1", "flannel.1: neighbour 10.244.2.0 at 02:00:00:00:00:02"),
            (
                "ip neigh replace 10.244.3.0 lladdr 02:00:00:00:00:09 dev flannel.1 nud permanent",
                "flannel.1: neighbour 10.244.3.0 at 02:00:00:00:00:03",
            ),
            (
                "bridge fdb del 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.2",
                "flannel.1: frames to 02:00:00:00:00:02 go to 192.0.2.2",
            ),
            (
                "bridge fdb append 00:00:00:00:00:00 dev flannel-v6.1 dst 2001:db8::66",
                "flannel-v6.1: frames to 00:00:00:00:00:00 go to 2001:db8::66 no more",
            ),
            ("ip link set flannel.1 mtu 1400", "flannel.1: mtu 1430"),
            ("ip link set flannel.1 alias theirs", "flannel.1: marked as the mesh's"),
        ] {
            run(line);
            assert_eq!(changes(&settle(&kernel, &desired).await), [back.to_owned()].into(), "{line}");
            settled(&kernel, &desired).await;
        }
        run("ip link set flannel.1 address 02:00:00:00:00:77");
        let back = changes(&settle(&kernel, &desired).await);
        assert!(back.contains("flannel.1: hardware address 02:00:00:00:00:01"), "{back:?}");
        assert!(back.contains("flannel.1: neighbour 10.244.2.0 at 02:00:00:00:00:02"), "{back:?}");
        settled(&kernel, &desired).await;
        for line in ["ip link set flannel.1 down", "ip link del flannel.1", "ip link del flannel-v6.1"] {
            run(line);
            settle(&kernel, &desired).await;
            settled(&kernel, &desired).await;
            assert!(run("ip route get 10.244.3.7").contains("dev flannel.1"), "{line}");
        }
        // A peer elsewhere, with another address.
        desired.vxlan[0].peers[0].vtep = vtep("192.0.2.22", 22);
        settle(&kernel, &desired).await;
        settled(&kernel, &desired).await;
        assert!(!run("bridge fdb show dev flannel.1").contains("02:00:00:00:00:02 "), "the old one is gone");
        // From the tunnel into the device and back, each a replacement of one route.
        for via in [RouteVia::Tunnel, route_to(&mut desired, "fd42:244:0:3::/64").via.clone()] {
            route_to(&mut desired, "fd42:244:0:3::/64").via = via;
            settle(&kernel, &desired).await;
            settled(&kernel, &desired).await;
        }
        // Another shape is another device.
        desired.vxlan[0].port = 4789;
        kernel.apply_changes(&desired, OthersRules::Read).await.unwrap();
        settled(&kernel, &desired).await;
        assert!(run("ip -d link show flannel.1").contains("dstport 4789"));
        kernel.cleanup().await.unwrap();
        assert!(!run("ip -o link show").contains("flannel"));
    });
}

#[test]
fn devices_of_others_stay_and_those_of_flannel_are_taken_over() {
    isolated(|| async {
        topology();
        run("ip link add theirs type vxlan id 77 dev eth0 dstport 4789");
        run(&format!(
            "ip link add flannel.1 address {OWN} type vxlan id 1 local 192.0.2.1 dev eth0 dstport 8472 nolearning"
        ));
        run("ip link set flannel.1 up");
        let index = index_of("flannel.1");
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        assert_eq!(index_of("flannel.1"), index, "it is the same device");
        // Without VXLAN, ours go, those that were taken over too.
        settle(&kernel, &desired()).await;
        settled(&kernel, &desired()).await;
        let links = run("ip -o link show");
        assert!(links.contains("theirs") && !links.contains("flannel"), "{links}");
    });
}

#[test]
fn what_stands_in_the_way_is_named() {
    isolated(|| async {
        topology();
        run("ip link add flannel.1 type bridge");
        run("ip link add theirs type vxlan id 1 local 2001:db8::1 dev eth0 dstport 8472");
        let (kernel, _state) = kernel();
        let report = kernel.reconcile(&by_vxlan(), OthersRules::Read).await.unwrap();
        let failed: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        let named = |text: &str| failed.iter().any(|failure| failure.contains(text));
        assert!(named("VXLAN device flannel.1: a device of that name exists and is no VXLAN device"), "{failed:#?}");
        assert!(named("VXLAN device flannel-v6.1: another VXLAN device has VNI 1 and UDP port 8472"), "{failed:#?}");
        let (text, routed) = try_run("ip route get 10.244.3.7");
        assert!(!routed && text.contains("No route to host"), "it ends at the fallback route: {text}");
    });
}

#[test]
fn a_change_of_an_entry_by_others_is_told() {
    isolated(|| async {
        topology();
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        let mut watch = kernel.watch().unwrap();
        for line in [
            "ip neigh del 10.244.2.0 dev flannel.1",
            "bridge fdb del 02:00:00:00:00:03 dev flannel.1 dst 192.0.2.3",
            "ip neigh del fe80::ff:fe00:2 dev flannel-v6.1",
        ] {
            run(line);
            loop {
                let events = watch.next().await;
                if events.vteps {
                    assert!(events.calls_for_reconcile(), "{line}");
                    break;
                }
            }
            settle(&kernel, &by_vxlan()).await;
        }
    });
}

/// The far end, with a device of both families that sends what it likes.
fn far_end() -> Host {
    topology();
    let far = Host::new();
    far.take("far");
    for line in [
        "ip addr add 192.0.2.2/24 dev far",
        "ip addr add 192.0.2.9/24 dev far",
        "ip addr add fe80::b/64 dev far nodad",
        "ip addr add 2001:db8::2/64 dev far nodad",
        "ip addr add 2001:db8::9/64 dev far nodad",
        "ip link set far up",
        "ip addr add 10.244.2.0/32 dev lo",
        "ip addr add 10.244.3.0/32 dev lo",
        "ip addr add fd42:244:0:2:ffff:ffff:ffff:ffff/128 dev lo nodad",
        "ip addr add fd42:244:0:3:ffff:ffff:ffff:ffff/128 dev lo nodad",
    ] {
        far.run(line);
    }
    far_device(&far, "192.0.2.2", "2001:db8::2");
    far
}

/// Makes the far devices with these outer sources.
fn far_device(far: &Host, v4: &str, v6: &str) {
    for (dev, local, remote, to, overlay) in [
        ("flannel.1", v4, "192.0.2.1", "10.244.1.0/24", "10.244.1.0"),
        ("flannel-v6.1", v6, "2001:db8::1", "fd42:244:0:1::/64", "fd42:244:0:1:ffff:ffff:ffff:ffff"),
    ] {
        for line in [
            format!(
                "ip link add {dev} address 02:00:00:00:00:02 type vxlan id 1 local {local} dev far dstport 8472 nolearning"
            ),
            format!("ip link set {dev} up"),
            format!("ip neigh add {overlay} lladdr {OWN} dev {dev} nud permanent"),
            format!("bridge fdb append {OWN} dev {dev} dst {remote}"),
            format!("ip route add {to} via {overlay} dev {dev} onlink"),
        ] {
            far.run(&line);
        }
    }
}

/// Sends from an inner source to an inner destination until one is heard or the counter has moved: whether it was heard.
async fn arrives(kernel: &Kernel, far: &Host, from: &str, to: &str, counter: &str) -> bool {
    let ear = UdpSocket::bind((addr(to), 0)).unwrap();
    ear.set_nonblocking(true).unwrap();
    let at = ear.local_addr().unwrap();
    let packets = async || kernel.drops().await.unwrap().get(counter).map_or(0, |counter| counter.packets);
    let before = packets().await;
    let from = addr(from);
    loop {
        far.within(move || UdpSocket::bind((from, 0)).unwrap().send_to(b"x", at).unwrap());
        tokio::time::sleep(Duration::from_millis(10)).await;
        if ear.recv_from(&mut [0; 8]).is_ok() {
            return true;
        }
        if packets().await > before {
            return false;
        }
    }
}

#[test]
fn an_inner_source_comes_from_its_owners_end_only() {
    isolated(|| async {
        let far = far_end();
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        let families = [
            ("10.244.2.0", "10.244.3.0", "10.244.1.0", "source4"),
            (
                "fd42:244:0:2:ffff:ffff:ffff:ffff",
                "fd42:244:0:3:ffff:ffff:ffff:ffff",
                "fd42:244:0:1:ffff:ffff:ffff:ffff",
                "source6",
            ),
        ];
        for (own, others, to, _) in families {
            assert!(arrives(&kernel, &far, own, to, "vxlan").await, "{own}");
            assert!(!arrives(&kernel, &far, others, to, "vxlan").await, "another peer's: {others}");
        }
        // From an address that is no peer's, the very same packets.
        far.run("ip link del flannel.1");
        far.run("ip link del flannel-v6.1");
        far_device(&far, "192.0.2.9", "2001:db8::9");
        for (own, _, to, _) in families {
            assert!(!arrives(&kernel, &far, own, to, "vxlan").await, "from elsewhere: {own}");
        }
    });
}

#[test]
fn a_packet_for_others_ends_at_the_device() {
    isolated(|| async {
        let far = far_end();
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        // An address of this machine that is not of the mesh, and one that it would have to forward to.
        run("ip addr add 198.51.100.1/32 dev lo");
        run("ip addr add 2001:db8:f::1/128 dev lo nodad");
        far.run("ip route add 198.51.100.1/32 via 10.244.1.0 dev flannel.1 onlink");
        far.run("ip -6 route add 2001:db8:f::1/128 via fd42:244:0:1:ffff:ffff:ffff:ffff dev flannel-v6.1 onlink");
        assert!(!arrives(&kernel, &far, "10.244.2.0", "198.51.100.1", "source4").await);
        let own = "fd42:244:0:2:ffff:ffff:ffff:ffff";
        assert!(!arrives(&kernel, &far, own, "2001:db8:f::1", "source6").await);
    });
}

/// A VXLAN packet to this node's device as node 2 would send it: the header, a frame of this type, and an IPv4 packet with
/// a UDP datagram to `port`.
fn vxlan_packet(inner_type: &[u8], from: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let ([hi, lo], total) = (port.to_be_bytes(), u16::try_from(28 + payload.len()).unwrap());
    let mut header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[12..16].copy_from_slice(&from);
    header[16..20].copy_from_slice(&[10, 244, 1, 0]);
    let sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp_length = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
    let udp = [[0x12, 0x34], [hi, lo], udp_length, [0, 0]].concat();
    let vxlan = [8, 0, 0, 0, 0, 0, 1, 0];
    let (to, by) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    [&vxlan, &to[..], &by, inner_type, &header, &udp, payload].concat()
}

/// Sends such a packet from node 2's address until it is heard or counted as not a peer's own: whether it was heard.
async fn is_unpacked(kernel: &Kernel, far: &Host, packet: impl Fn(u16) -> Vec<u8>) -> bool {
    let ear = UdpSocket::bind("10.244.1.0:0").unwrap();
    ear.set_nonblocking(true).unwrap();
    let packet = packet(ear.local_addr().unwrap().port());
    let packets = async || kernel.drops().await.unwrap()["vxlan"].packets;
    let before = packets().await;
    loop {
        let packet = packet.clone();
        far.within(move || UdpSocket::bind("192.0.2.2:0").unwrap().send_to(&packet, "192.0.2.1:8472").unwrap());
        tokio::time::sleep(Duration::from_millis(10)).await;
        if ear.recv_from(&mut [0; 4096]).is_ok() {
            return true;
        }
        if packets().await > before {
            return false;
        }
    }
}

#[test]
fn no_frame_but_an_untagged_packet_of_the_devices_family_is_unpacked() {
    isolated(|| async {
        let far = far_end();
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        let (node2, node3) = ([10, 244, 2, 0], [10, 244, 3, 0]);
        let ipv4 = [8, 0];
        assert!(
            is_unpacked(&kernel, &far, |port| vxlan_packet(&ipv4, node2, port, b"x")).await,
            "the rule lets it pass"
        );
        assert!(!is_unpacked(&kernel, &far, |port| vxlan_packet(&ipv4, node3, port, b"x")).await, "another's source");
        for (what, inner_type) in [
            ("a VLAN tag", &[0x81, 0, 0, 5, 8, 0][..]),
            ("two VLAN tags", &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 5, 8, 0]),
            ("ARP", &[8, 6]),
            ("IPv6 on the device of IPv4", &[0x86, 0xdd]),
            ("MPLS", &[0x88, 0x47, 0, 0, 0x11, 0x40, 8, 0]),
        ] {
            let heard = is_unpacked(&kernel, &far, |port| vxlan_packet(inner_type, node2, port, b"x")).await;
            assert!(!heard, "{what}");
        }
        // Outer fragments are one packet to the rule.
        let long = [7; 3000];
        assert!(is_unpacked(&kernel, &far, |port| vxlan_packet(&ipv4, node2, port, &long)).await);
        assert!(!is_unpacked(&kernel, &far, |port| vxlan_packet(&ipv4, node3, port, &long)).await);
        // What is too short to have an inner source has none of a peer's.
        assert!(!is_unpacked(&kernel, &far, |port| vxlan_packet(&ipv4, node2, port, b"x")[..30].to_vec()).await);
    });
}

/// Masquerading would give it this node's outer address, to which the prefixes of all its pods are bound elsewhere.
#[test]
fn a_pod_sends_no_vxlan_packet_of_the_mesh() {
    isolated(|| async {
        let far = far_end();
        far.run("ip link del flannel.1");
        far.run("ip link del flannel-v6.1");
        let (kernel, _state) = kernel();
        settle(&kernel, &by_vxlan()).await;
        let pod = Host::new();
        run("ip link add vpod type veth peer name epod");
        pod.take("epod");
        for line in [
            "ip link set epod addrgenmode none",
            "ip addr add 10.244.1.5/24 dev epod",
            "ip addr add fd42:244:0:1::5/64 dev epod nodad",
            "ip link set epod up",
            "ip route add default via 10.244.1.1",
            "ip -6 route add default via fd42:244:0:1::1",
        ] {
            pod.run(line);
        }
        for line in [
            "ip addr add 10.244.1.1/24 dev vpod",
            "ip addr add fd42:244:0:1::1/64 dev vpod nodad",
            "ip link set vpod up",
        ] {
            run(line);
        }
        let packets = async || kernel.drops().await.unwrap()["vxlan"].packets;
        for (from, to) in [("10.244.1.5", "192.0.2.2"), ("fd42:244:0:1::5", "2001:db8::2")] {
            let (from, to, before) = (addr(from), addr(to), packets().await);
            let ear = far.within(move || UdpSocket::bind((to, 8472)).unwrap());
            ear.set_nonblocking(true).unwrap();
            while packets().await == before {
                pod.within(move || UdpSocket::bind((from, 0)).unwrap().send_to(b"x", (to, 8472)).unwrap());
                tokio::time::sleep(Duration::from_millis(10)).await;
                assert!(ear.recv_from(&mut [0; 8]).is_err(), "{to} hears a pod's own VXLAN packet");
            }
        }
        // With the very address of node 2, but from a pod's interface.
        pod.run("ip addr add 192.0.2.2/32 dev lo");
        assert!(!is_unpacked(&kernel, &pod, |port| vxlan_packet(&[8, 0], [10, 244, 2, 0], port, b"x")).await);
    });
}
