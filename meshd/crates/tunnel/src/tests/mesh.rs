//! Packets between nodes.

use std::{net::SocketAddr, time::Instant};

use etcd_schema::{PresharedKey, PublicKey};
use mesh::tunnel_table::PeerConfig;
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::{
    super::{core::Core, *},
    harness::{Node, SECOND, Wire, packet, pair, peer, settle, table},
};

fn a_to_b(len: usize) -> Vec<u8> {
    packet("10.1.0.5", "10.2.0.5", len)
}

fn b_to_a(len: usize) -> Vec<u8> {
    packet("10.2.0.5", "10.1.0.5", len)
}

/// A pair with a session.
fn connected(now: Instant) -> (Node, Node) {
    let (mut a, mut b) = pair(now);
    let sent = a.send(now, &[a_to_b(100)]);
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered, [a_to_b(100)]);
    b.delivered.clear();
    (a, b)
}

#[test]
fn packets_wait_for_the_first_handshake_and_arrive_in_order() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let packets: Vec<_> = (0..100).map(|n| a_to_b(60 + n)).collect();
    let sent = a.send(now, &packets);
    assert_eq!(sent.len(), 1, "one initiation for all of them");
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered, packets);
    let back = [b_to_a(70), packet("fd00:2::5", "fd00:1::5", 90)];
    let sent = b.send(now, &back);
    assert_eq!(sent.len(), 2);
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(a.delivered, back);
    assert_eq!(a.endpoint_of("b"), Some(b.address));
    assert_eq!(b.endpoint_of("a"), Some(a.address));
}

#[test]
fn who_owns_the_longest_prefix_of_a_source_is_the_only_one_to_send_from_it() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    // A part of b's prefix goes to another key.
    let other = PrivateKey::generate().unwrap();
    let peers =
        vec![peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]), peer("c", &other, &["10.2.0.5/32"], &[])];
    a.apply(now, table(1, peers));
    b.address = "192.0.2.99:7".parse().unwrap();
    let sent = b.send(now, &[b_to_a(60), packet("10.2.0.6", "10.1.0.5", 60)]);
    settle(now, &mut [&mut a], sent);
    assert_eq!(a.delivered, [packet("10.2.0.6", "10.1.0.5", 60)]);
    assert_eq!(a.dropped(DropReason::InWrongSource), 1);
    // The packet was b's all the same: its endpoint follows.
    assert_eq!(a.endpoint_of("b"), Some(b.address));
}

#[test]
fn only_this_nodes_addresses_are_destinations() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let to_b = peer("b", &b.key, &["10.2.0.0/24"], &[]);
    let mut own = table(1, vec![to_b]);
    own.local = vec!["10.1.0.0/28".parse().unwrap()];
    own.overlay = vec!["10.1.0.99".parse().unwrap()];
    a.apply(now, own);
    let packets = ["10.1.0.5", "10.1.0.99", "10.1.0.20"].map(|to| packet("10.2.0.5", to, 60));
    let sent = b.send(now, &packets);
    settle(now, &mut [&mut a], sent);
    assert_eq!(a.delivered, packets[..2]);
    assert_eq!(a.dropped(DropReason::InWrongDestination), 1);
}

#[test]
fn what_a_peer_seals_must_be_a_packet() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let mut lying = b_to_a(60);
    // A UDP length beyond the packet; seals fine at b, whose own parser would refuse it first.
    lying[24..26].copy_from_slice(&100u16.to_be_bytes());
    assert!(b.send(now, &[lying]).is_empty());
    assert_eq!(b.dropped(DropReason::OutMalformed), 1);
    let mut shorter = b_to_a(60);
    shorter.truncate(40);
    assert!(b.send(now, &[shorter]).is_empty());
    let sent = b.send(now, &[b_to_a(61)]);
    settle(now, &mut [&mut a], sent);
    assert_eq!(a.delivered, [b_to_a(61)], "the padding is not part of it");
}

#[test]
fn a_datagram_counts_once_in_whatever_order() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let packets: Vec<_> = (0..50).map(|n| a_to_b(60 + n)).collect();
    let mut sent = a.send(now, &packets);
    sent.reverse();
    b.receive(now, &sent);
    b.receive(now, &sent);
    assert_eq!(b.delivered.len(), 50);
    assert_eq!(b.dropped(DropReason::InReplayed), 50);
    let mut forged = a.send(now, &[a_to_b(60)]).remove(0);
    *forged.bytes.last_mut().unwrap() ^= 1;
    b.receive(now, &[forged.clone()]);
    assert_eq!(b.dropped(DropReason::InUnauthentic), 1);
    forged.bytes[8..16].copy_from_slice(&(u64::MAX - (1 << 13)).to_le_bytes());
    b.receive(now, &[forged.clone()]);
    assert_eq!(b.dropped(DropReason::InCounterExhausted), 1);
    forged.bytes[4..8].fill(0x5a);
    b.receive(now, &[forged]);
    assert_eq!(b.delivered.len(), 50);
}

#[test]
fn endpoints_follow_authentic_packets_only() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    for address in ["192.0.2.77:1234", "[2001:db8::77]:999", "192.0.2.2:51820"] {
        b.address = address.parse().unwrap();
        let sent = b.send(now, &[b_to_a(60)]);
        settle(now, &mut [&mut a], sent.clone());
        assert_eq!(a.endpoint_of("b"), Some(b.address));
        assert_eq!(a.send(now, &[a_to_b(60)])[0].to, b.address);
        // The same from elsewhere: seen before, and so nothing to go by.
        let elsewhere: SocketAddr = "198.51.100.1:1".parse().unwrap();
        let mut replayed = sent[0].clone();
        replayed.from = elsewhere;
        a.receive(now, &[replayed.clone()]);
        replayed.bytes[20] ^= 1;
        a.receive(now, &[replayed]);
        assert_eq!(a.endpoint_of("b"), Some(b.address));
    }
}

#[test]
fn padding_fills_to_16_but_not_beyond_the_route() {
    let now = Instant::now();
    let (mut a, b) = connected(now);
    let to_b = || peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    for (mtu, len, outer) in [(1420, 61, 64 + 32), (1420, 1420, 1420 + 32), (1299, 1297, 1299 + 32)] {
        let mut with_mtu = table(1, vec![to_b()]);
        with_mtu.mtu = mtu;
        a.apply(now, with_mtu);
        assert_eq!(a.send(now, &[a_to_b(len)])[0].bytes.len(), outer);
    }
}

#[test]
fn keys_nobody_can_talk_to_are_refused_and_nothing_is_sent() {
    let now = Instant::now();
    let mut a = Node::new(now, "192.0.2.1:1");
    let hex = |s: &str| {
        let mut key = [0u8; 32];
        for (byte, digits) in key.iter_mut().zip(s.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
        }
        PublicKey::from_bytes(key)
    };
    let low = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ]
    .map(hex);
    let mut peers: Vec<_> = low
        .iter()
        .chain([&a.key.public()])
        .enumerate()
        .map(|(n, key)| PeerConfig {
            name: n.to_string(),
            keys: vec![*key],
            keepalive: Some(SECOND),
            call_out: true,
            ..peer("", &a.key, &[], &["192.0.2.9:9"])
        })
        .collect();
    peers[0].allowed = vec!["10.2.0.0/24".parse().unwrap()];
    let refused = a.apply(now, table(1, peers));
    for key in low {
        assert!(refused.iter().any(|r| r.what == RefusedItem::Key(key) && r.reason == RefusedReason::LowOrder));
    }
    assert!(refused.iter().any(|r| r.reason == RefusedReason::OwnKey));
    for n in 0..40 {
        assert_eq!(a.ring(now + SECOND * n), []);
    }
    assert_eq!(a.send(now, &[a_to_b(60)]), []);
    assert_eq!(a.dropped(DropReason::OutNoPeer), 1);
}

#[test]
fn what_is_claimed_twice_stays_with_the_first() {
    let now = Instant::now();
    let mut a = Node::new(now, "192.0.2.1:1");
    let keys: Vec<_> = (0..2).map(|_| PrivateKey::generate().unwrap()).collect();
    let peers = vec![
        peer("one", &keys[0], &["10.2.0.0/24"], &[]),
        peer("two", &keys[1], &["10.2.0.7/24", "10.3.0.0/24"], &[]),
        peer("three", &keys[0], &["10.4.0.0/24"], &[]),
    ];
    let refused = a.apply(now, table(1, peers));
    let what: Vec<_> = refused.iter().map(|r| (&*r.peer, r.what)).collect();
    assert_eq!(
        what,
        [
            ("three", RefusedItem::Key(keys[0].public())),
            ("three", RefusedItem::Peer),
            ("two", RefusedItem::Prefix("10.2.0.7/24".parse().unwrap())),
        ]
    );
}

#[test]
fn a_table_that_changes_nothing_touches_nothing() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    b.address = "192.0.2.50:5".parse().unwrap();
    let sent = b.send(now, &[b_to_a(60)]);
    settle(now, &mut [&mut a], sent);
    // The record still names the old address; others come and go around it.
    for round in 0..3 {
        let mut peers: Vec<_> =
            (0..round).map(|n| peer(&format!("other{n}"), &PrivateKey::generate().unwrap(), &[], &[])).collect();
        let mut to_b = peer("b", &b.key, &["10.2.0.0/24", "fd00:2::/64"], &["192.0.2.2:51820"]);
        to_b.keepalive = Some(25 * SECOND);
        peers.push(to_b);
        a.apply(now, table(1, peers));
        assert_eq!(a.endpoint_of("b"), Some(b.address));
        let sent = a.send(now, &[a_to_b(60)]);
        assert_eq!((sent[0].to, sent[0].bytes[0]), (b.address, 4));
    }
}

#[test]
fn a_removed_peer_or_key_has_no_session_any_more() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let late = b.send(now, &[b_to_a(60)]);
    a.apply(now, table(1, vec![]));
    a.receive(now, &late);
    assert_eq!((a.delivered.len(), a.dropped(DropReason::InUnknownIndex)), (0, 1));
    assert_eq!(a.send(now, &[a_to_b(60)]), []);

    let (mut a, mut b) = connected(now);
    let late = b.send(now, &[b_to_a(60)]);
    let mut changed = peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    changed.keys = vec![PrivateKey::generate().unwrap().public()];
    a.apply(now, table(1, vec![changed]));
    a.receive(now, &late);
    assert_eq!((a.delivered.len(), a.dropped(DropReason::InUnknownIndex)), (0, 1));

    let (mut a, mut b) = connected(now);
    let late = b.send(now, &[b_to_a(60)]);
    let mut changed = peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    changed.preshared_key = Some(PresharedKey::from_bytes([3; 32]));
    a.apply(now, table(1, vec![changed]));
    a.receive(now, &late);
    assert_eq!((a.delivered.len(), a.dropped(DropReason::InNoSession)), (0, 1));
    // Only b's side is without the key: no session comes about.
    let sent = a.send(now + 6 * SECOND, &[a_to_b(60)]);
    settle(now + 6 * SECOND, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered.len(), 0);
    let mut to_a = peer("a", &a.key, &["10.1.0.0/24"], &[]);
    to_a.preshared_key = Some(PresharedKey::from_bytes([3; 32]));
    b.apply(now, table(2, vec![to_a]));
    let sent = a.initiate(now + 12 * SECOND, "b");
    settle(now + 12 * SECOND, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered.len(), 1, "what waited arrived");
}

#[test]
fn a_node_that_announces_itself_is_followed_without_traffic() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    assert_eq!(b.endpoint_of("a"), Some("192.0.2.1:51820".parse().unwrap()));
    a.address = "198.51.100.7:51820".parse().unwrap();
    let sent = a.announce(now, "b");
    assert_eq!(sent.len(), 1);
    b.receive(now, &sent);
    assert_eq!(b.endpoint_of("a"), Some("198.51.100.7:51820".parse().unwrap()));
    // Without a session there is no peer to notify.
    let (mut alone, _) = pair(now);
    assert_eq!(alone.announce(now, "b"), []);
}

#[test]
fn a_rotation_to_the_next_key_loses_nothing() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    // b announces its next key, then starts with it while the old one is still accepted.
    let mut next = Node::new(now, "192.0.2.2:51820");
    let mut both = peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    both.keys.push(next.key.public());
    a.apply(now, table(1, vec![both]));
    let sent = b.send(now, &[b_to_a(60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    next.apply(now, table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &["192.0.2.1:51820"])]));
    let sent = next.send(now, &[b_to_a(61)]);
    settle(now, &mut [&mut a, &mut next], sent);
    assert_eq!(a.delivered, [b_to_a(60), b_to_a(61)]);
    // The newest session is the one to send with.
    let sent = a.send(now, &[a_to_b(62)]);
    settle(now, &mut [&mut a, &mut next], sent);
    assert_eq!(next.delivered, [a_to_b(62)]);
    // The old key goes; the session of the new one stays.
    let mut only_next = peer("b", &next.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    only_next.keys = vec![next.key.public()];
    a.apply(now, table(1, vec![only_next]));
    let sent = a.send(now, &[a_to_b(63)]);
    assert_eq!(sent[0].bytes[0], 4);
    settle(now, &mut [&mut a, &mut next], sent);
    assert_eq!(next.delivered.len(), 2);
}

#[test]
fn a_peer_that_only_its_next_key_reaches_is_reached() {
    let now = Instant::now();
    let (mut a, b) = pair(now);
    let mut next = Node::new(now, "192.0.2.2:51820");
    next.apply(now, table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &[])]));
    let mut both = peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"]);
    both.keys.push(next.key.public());
    a.apply(now, table(1, vec![both]));
    let sent = a.send(now, &[a_to_b(60)]);
    settle(now, &mut [&mut a, &mut next], sent);
    assert_eq!(next.dropped(DropReason::HandshakeBadMac), 1);
    let sent = a.initiate(now + 6 * SECOND, "b");
    settle(now + 6 * SECOND, &mut [&mut a, &mut next], sent);
    assert_eq!(next.delivered, [a_to_b(60)]);
}

#[test]
fn rubbish_and_strangers_cost_little_and_change_nothing() {
    let now = Instant::now();
    let (mut a, mut b) = connected(now);
    let stranger = {
        let mut s = Node::new(now, "203.0.113.1:1");
        s.apply(now, table(9, vec![peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"])]));
        s.send(now, &[packet("10.9.0.1", "10.2.0.5", 60)]).remove(0)
    };
    assert_eq!(b.receive(now, std::slice::from_ref(&stranger)), []);
    assert_eq!(b.dropped(DropReason::HandshakeUnknownPeer), 1);
    let mut bad_mac = stranger;
    bad_mac.bytes[120] ^= 1;
    assert_eq!(b.receive(now, &[bad_mac.clone()]), []);
    assert_eq!(b.dropped(DropReason::HandshakeBadMac), 1);
    for len in [0, 3, 4, 31, 64, 92, 147, 149, 1500, 65507] {
        bad_mac.bytes.resize(len, 0);
        b.receive(now, &[bad_mac.clone()]);
    }
    let sent = a.send(now, &[a_to_b(60)]);
    settle(now, &mut [&mut b], sent);
    assert_eq!(b.delivered, [a_to_b(60)]);
}

#[test]
fn a_flood_of_initiations_is_bounded_and_peers_still_get_in() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    // Made by someone who knows b's public key, and sent under any number of addresses.
    let initiation = a.initiate(now, "b").remove(0);
    let mut cookies = 0;
    for n in 0..10_000u32 {
        let forged = Wire { from: SocketAddr::from((n.to_be_bytes(), 7)), ..initiation.clone() };
        let replies = b.receive_without_handshakes(now, &[forged]);
        assert!(replies.iter().all(|r| r.bytes.len() == 64), "no larger than what came");
        cookies += replies.len();
    }
    assert!(cookies > 8_000);
    assert_eq!(b.dropped(DropReason::HandshakeCookieSent), cookies as u64);
    // Under load a's next initiation brings a cookie, and the one after that gets in, while the flood goes on.
    let later = now + 6 * SECOND / 10;
    let sent = a.initiate(now + 6 * SECOND, "b");
    let cookie = b.receive_without_handshakes(later, &sent);
    assert_eq!((cookie.len(), cookie[0].bytes[0]), (1, 3));
    // Nobody's endpoint goes by a cookie.
    let mut misplaced = cookie[0].clone();
    misplaced.from = "198.51.100.66:6".parse().unwrap();
    a.receive(later, &[misplaced]);
    assert_eq!(a.endpoint_of("b"), Some(b.address));
    let sent = a.initiate(now + 12 * SECOND, "b");
    assert!(b.receive_without_handshakes(later, &sent).is_empty());
    let replies = b.do_handshakes(later);
    settle(later, &mut [&mut a, &mut b], replies);
    let sent = a.send(later, &[a_to_b(60)]);
    assert_eq!(sent[0].bytes[0], 4);
}

#[test]
fn one_source_gets_its_share_without_load_and_a_forger_cannot_use_it_up() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let initiation = a.initiate(now, "b").remove(0);
    let mut cookies = Vec::new();
    for _ in 0..100 {
        cookies.extend(b.receive_without_handshakes(now, std::slice::from_ref(&initiation)));
    }
    assert_eq!(cookies.len(), 95, "5 at once, then a cookie is asked for");
    b.do_handshakes(now);
    a.receive(now, &cookies[94..]);
    let sent = a.initiate(now + 6 * SECOND, "b");
    let none = b.receive_without_handshakes(now, &sent);
    assert_eq!(none, [], "with the cookie it gets in");
    let sent = b.do_handshakes(now);
    assert_eq!(sent[0].bytes[0], 2);
}

#[test]
fn a_lower_path_mtu_is_told_to_senders_and_to_the_planner() {
    let now = Instant::now();
    let (mut a, b) = connected(now);
    let mut events = a.core.events.subscribe();
    a.path_mtu(now, b.address, 1400);
    assert_eq!(
        events.try_recv().unwrap(),
        TunnelEvent::PeerMtu { peer: "b".into(), inner_mtu: 1340, without_df: false }
    );
    let mut df = a_to_b(1341);
    df[6] = 0x40;
    assert_eq!(a.send(now, &[df.clone(), a_to_b(1341), a_to_b(1340)]).len(), 1);
    assert_eq!(a.dropped(DropReason::OutTooBig), 2);
    let [icmp] = &a.answered[..] else { panic!() };
    assert_eq!((icmp[20], icmp[21]), (3, 4));
    assert_eq!(icmp[26..28], 1340u16.to_be_bytes());
    assert_eq!(icmp[28..48], df[..20]);
    let parsed = packet::Packet::parse(icmp).unwrap();
    assert_eq!(parsed.destination, "10.1.0.5".parse::<std::net::IpAddr>().unwrap());

    let v6 = packet("fd00:1::5", "fd00:2::5", 1400);
    a.send(now, std::slice::from_ref(&v6));
    let icmp = &a.answered[1];
    assert_eq!((icmp[40], icmp[41]), (2, 0));
    assert_eq!(icmp[46..48], 1340u16.to_be_bytes());
    assert_eq!(icmp[48..88], v6[..40]);

    // Below what IPv6 needs: no further, and without DF from there on.
    a.path_mtu(now, b.address, 1300);
    assert_eq!(
        events.try_recv().unwrap(),
        TunnelEvent::PeerMtu { peer: "b".into(), inner_mtu: 1280, without_df: true }
    );
    // Tried again after ten minutes.
    a.ring(now + 601 * SECOND);
    assert!(
        std::iter::from_fn(|| events.try_recv().ok())
            .any(|e| e == TunnelEvent::PeerMtu { peer: "b".into(), inner_mtu: 1420, without_df: false })
    );
}

#[test]
fn what_waits_is_bounded_and_the_oldest_yields() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let packets: Vec<_> = (0..128).map(|n| a_to_b(60 + n)).collect();
    let initiation = a.send(now, &packets);
    a.send(now, &packets[..28]);
    assert_eq!(a.dropped(DropReason::OutQueueFull), 28);
    settle(now, &mut [&mut a, &mut b], initiation);
    let expected: Vec<_> = packets[28..].iter().chain(&packets[..28]).cloned().collect();
    assert_eq!(b.delivered, expected);
}

#[test]
fn a_peer_that_restarts_is_back_with_its_first_packet() {
    let now = Instant::now();
    let (mut a, b) = connected(now);
    let core = Core::new(b.key.secret().clone(), StdRng::from_os_rng());
    let mut b = Node::with_core(now, "192.0.2.2:51820", b.key, core);
    b.apply(now, table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &["192.0.2.1:51820"])]));
    let sent = b.send(now, &[b_to_a(60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(a.delivered, [b_to_a(60)]);
    let sent = a.send(now, &[a_to_b(60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!(b.delivered, [a_to_b(60)]);
}

#[test]
fn two_that_call_each_other_at_once_get_through() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    b.apply(now, table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &["192.0.2.1:51820"])]));
    let mut sent = a.send(now, &[a_to_b(60)]);
    sent.extend(b.send(now, &[b_to_a(61)]));
    settle(now, &mut [&mut a, &mut b], sent);
    assert_eq!((&a.delivered[..], &b.delivered[..]), (&[b_to_a(61)][..], &[a_to_b(60)][..]));
    for _ in 0..3 {
        let mut sent = a.send(now, &[a_to_b(62)]);
        sent.extend(b.send(now, &[b_to_a(63)]));
        assert!(sent.iter().all(|w| w.bytes[0] == 4));
        settle(now, &mut [&mut a, &mut b], sent);
    }
    assert_eq!((a.delivered.len(), b.delivered.len()), (4, 4));
}

proptest! {
    #[test]
    fn no_datagram_makes_a_node_panic_or_deliver(
        kind in prop::sample::select(vec![0u8, 1, 2, 3, 4, 5]),
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        exact in any::<bool>(),
        index in any::<bool>(),
    ) {
        let now = Instant::now();
        let (mut a, mut b) = pair(now);
        let sample = a.initiate(now, "b").remove(0);
        if exact {
            bytes.resize([0, 148, 92, 64, 80, 0][usize::from(kind)], 7);
        }
        if bytes.len() >= 12 {
            bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            if index {
                // Our own index, which stands in the initiation.
                bytes[4..8].copy_from_slice(&sample.bytes[4..8]);
                bytes[8..12].copy_from_slice(&sample.bytes[4..8]);
            }
        }
        let wire = |to: &Node, bytes: Vec<u8>| Wire { from: sample.from, to: to.address, bytes };
        a.receive(now, &[wire(&a, bytes.clone())]);
        b.receive(now, &[wire(&b, bytes)]);
        prop_assert!(a.delivered.is_empty() && b.delivered.is_empty());
    }
}
