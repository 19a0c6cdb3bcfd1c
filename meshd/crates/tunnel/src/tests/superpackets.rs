//! Super-packets on their path through the tunnel; cost of many and idle peers.

use std::time::Instant;

use super::{
    super::{
        offload::packets::Like,
        sys::count_allocations::held,
        vnet::{GsoKind, Vnet},
        *,
    },
    harness::{Node, Wire, packet, pair, peer, settle, table},
};

/// TCP from 10.1.0.1 to 10.2.0.1 or the same in IPv6.
pub(super) fn stream(v4: bool, len: usize) -> Like {
    Like {
        v4,
        tcp: true,
        flow: 1,
        identification: 65_530,
        dont_fragment: true,
        class: 0,
        ttl: 64,
        sequence: u32::MAX - 5000,
        ack: 9,
        flags: 0x19,
        window: 500,
        options: vec![1; 12],
        payload: (0..len).map(|n| (n % 251) as u8).collect(),
    }
}

fn uncut(like: &Like, size: u16) -> (Vnet, Vec<u8>) {
    let kind = if like.v4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
    (Vnet::gso(kind, like.header_len() as u16, size, like.network_len() as u16), like.build())
}

fn connected(now: Instant) -> (Node, Node) {
    let (mut a, mut b) = pair(now);
    let sent = a.send(now, &[packet("10.1.0.5", "10.2.0.5", 60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    b.delivered.clear();
    (a, b)
}

#[test]
fn a_super_packet_arrives_as_its_segments() {
    let now = Instant::now();
    for v4 in [true, false] {
        let (mut a, mut b) = connected(now);
        let like = stream(v4, 60_000);
        let sent = a.send_uncut(now, &[uncut(&like, 1340)]);
        assert!(sent.iter().all(|datagram| datagram.bytes.len() <= 1420 + 32));
        b.receive(now, &sent);
        assert_eq!(b.delivered, like.cut(1340));
    }
}

#[test]
fn tiny_segments_that_fill_the_outgoing_buffer_several_times_all_arrive() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let like = stream(true, 60_000);
    let sent = a.send_uncut(now, &[uncut(&like, 8), uncut(&like, 8)]);
    assert_eq!(sent.len(), 15_000);
    for chunk in sent.chunks(100) {
        b.receive(now, chunk);
    }
    assert_eq!(b.delivered, [like.cut(8), like.cut(8)].concat());
}

#[test]
fn segments_wait_for_a_session_as_packets_do() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let like = stream(true, 60_000);
    let sent = a.send_uncut(now, &[uncut(&like, 1340)]);
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered, like.cut(1340));
}

#[test]
fn segments_larger_than_the_path_are_refused_and_the_sender_is_told() {
    let now = Instant::now();
    let (mut a, b) = connected(now);
    a.path_mtu(now, b.address, 1400);
    let like = stream(true, 60_000);
    assert_eq!(a.send_uncut(now, &[uncut(&like, 1340)]), []);
    assert_eq!(a.dropped(DropReason::OutTooBig), 1);
    // Destination unreachable, fragmentation needed, with what the path carries.
    assert_eq!(
        (a.answered[0][20..22].to_vec(), a.answered[0][26..28].to_vec()),
        (vec![3, 4], 1340u16.to_be_bytes().to_vec())
    );
    assert_eq!(a.send_uncut(now, &[uncut(&like, 1200)]).len(), 50);
}

#[test]
fn nonsense_from_the_tun_is_dropped() {
    let now = Instant::now();
    let (mut a, _) = connected(now);
    let like = stream(true, 3000);
    let (mut vnet, packet) = uncut(&like, 1340);
    vnet.gso_size = 0;
    assert_eq!(a.send_uncut(now, &[(vnet, packet.clone())]), []);
    vnet.gso_size = 1340;
    vnet.checksum_start = 60_000;
    assert_eq!(a.send_uncut(now, &[(vnet, packet)]), []);
    assert_eq!(a.dropped(DropReason::OutMalformed), 2);
}

#[test]
fn packets_of_a_session_cost_no_allocation() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let small = |from: &str, to: &str| -> Vec<(Vnet, Vec<u8>)> {
        (0..64).map(|n| (Vnet::NOTHING, packet(from, to, 60 + n))).collect()
    };
    for round in 0..3 {
        let mut there = small("10.1.0.5", "10.2.0.5");
        there.push(uncut(&stream(true, 50_000), 1340));
        there.push(uncut(&stream(false, 50_000), 1340));
        let sent = a.send_uncut(now, &there);
        let allocated = b.allocations_of(now, &sent, &small("10.2.0.5", "10.1.0.5"));
        let mut again = a.send_uncut(now, &there);
        again.truncate(0);
        let allocated_uncut = a.allocations_of(now, &again, &there);
        // The first round sets alarms.
        assert!(round == 0 || allocated + allocated_uncut == 0, "{allocated} {allocated_uncut} in round {round}");
    }
}

#[test]
fn packets_reordered_within_the_window_arrive_and_older_ones_do_not() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let mut sent: Vec<Wire> = Vec::new();
    for _ in 0..40 {
        sent.extend(a.send(now, &vec![packet("10.1.0.5", "10.2.0.5", 60); 50]));
    }
    // The last one first: the window behind it holds 1024.
    sent.reverse();
    for chunk in sent.chunks(100) {
        b.receive(now, chunk);
    }
    assert_eq!(b.delivered.len(), 1024);
    assert_eq!(b.dropped(DropReason::InReplayed), 2000 - 1024);
    let delivered = b.delivered.len();
    for chunk in sent.chunks(100) {
        b.receive(now, chunk);
    }
    assert_eq!(b.delivered.len(), delivered, "replayed");
}

#[test]
fn thousands_of_idle_peers_cost_little_memory_and_no_packet() {
    let now = Instant::now();
    let mut a = Node::new(now, "192.0.2.1:51820");
    let peers = (0..5000u32)
        .map(|n| {
            let mut config = peer("", &a.key, &[], &["198.51.100.1:51820"]);
            config.name = format!("node-with-a-name-{n}");
            // Keys are points on the curve, but the private half is not needed here.
            let mut key = [7; 32];
            key[..4].copy_from_slice(&n.to_le_bytes());
            key[31] = 1;
            config.keys = vec![etcd_schema::PublicKey::from_bytes(key)];
            config.allowed = vec![
                format!("10.{}.{}.0/24", 64 + n / 256, n % 256).parse().unwrap(),
                format!("fd01:{n:x}::/64").parse().unwrap(),
            ];
            config
        })
        .collect();
    let before = held();
    let table = table(1, peers);
    assert_eq!(a.apply(now, table), []);
    let bytes = held() - before;
    assert!(bytes < 16 << 20, "{bytes} bytes");
    for seconds in [1, 10, 120, 600] {
        assert_eq!(a.ring(now + super::harness::SECOND * seconds), []);
    }
}
