//! Restarted nodes: replayed initiations, and sessions that only the other end has.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use etcd_schema::PublicKey;
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

fn to_a(a: &Node) -> TunnelTable {
    table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &["192.0.2.1:51820"])])
}

fn mallory() -> SocketAddr {
    "198.51.100.66:6".parse().unwrap()
}

/// The same datagrams from elsewhere.
fn replayed(recorded: &[Wire]) -> Vec<Wire> {
    recorded.iter().map(|wire| Wire { from: mallory(), ..wire.clone() }).collect()
}

/// `node` as it is after a kill: with its key, and the time stamps that are on disk.
fn restarted(now: Instant, node: Node, seen: HashMap<PublicKey, Stamp>, table: TunnelTable) -> Node {
    let core = Core::with_seen(node.key.secret().clone(), StdRng::from_os_rng(), seen);
    let address = node.address.to_string();
    let mut node = Node::with_core(now, &address, node.key, core);
    node.apply(now, table);
    node
}

/// a and b with a session, and initiations of a's that somebody recorded.
fn recorded(now: Instant, count: u32) -> (Node, Node, Vec<Wire>) {
    let (mut a, mut b) = pair(now);
    let sent = a.send(now, &[a_to_b(60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    let mut recorded = Vec::new();
    for n in 1..=count {
        // No sooner is another one sent.
        let at = now + 6 * SECOND * n;
        let initiation = a.initiate(at, "b");
        recorded.extend(initiation.iter().cloned());
        settle(at, &mut [&mut a, &mut b], initiation);
    }
    b.delivered.clear();
    (a, b, recorded)
}

fn until_established(now: Instant, a: &mut Node, b: &mut Node, first: Vec<Wire>) {
    settle(now, &mut [&mut *a, &mut *b], first);
    let sent = a.send(now, &[a_to_b(70)]);
    assert!(sent.iter().all(|wire| wire.bytes[0] == 4 && wire.to == b.address));
    settle(now, &mut [&mut *a, &mut *b], sent);
    let sent = b.send(now, &[b_to_a(71)]);
    assert!(sent.iter().all(|wire| wire.bytes[0] == 4 && wire.to == a.address));
    settle(now, &mut [&mut *a, &mut *b], sent);
    let dropped = [a.all_dropped(), b.all_dropped()];
    assert!(b.delivered.ends_with(&[a_to_b(70)]), "dropped: {dropped:?}");
    assert!(a.delivered.ends_with(&[b_to_a(71)]), "dropped: {dropped:?}");
}

#[test]
fn a_recorded_initiation_moves_no_endpoint_after_a_restart() {
    let now = Instant::now();
    let (mut a, b, recorded) = recorded(now, 20);
    let now = now + 200 * SECOND;
    let mut b = restarted(now, b, HashMap::new(), to_a(&a));
    // They come in their order: b has forgotten that it has seen them. One source may send so many.
    for (n, initiation) in replayed(&recorded).into_iter().enumerate() {
        let answers = b.receive(now + SECOND * n as u32, &[initiation]);
        assert!(answers.iter().all(|answer| answer.bytes[0] == 2 && answer.to == mallory()), "answered, and no more");
        assert_eq!(b.endpoint_of("a"), Some(a.address));
        assert!(b.core.tables.get().named("a").unwrap().lock().heard().is_none(), "no sign of life");
    }
    // Nothing is sealed for an unconfirmed session: b calls, and where a is.
    let call = b.send(now, &[b_to_a(60)]);
    assert_eq!((call.len(), call[0].bytes[0], call[0].to), (1, 1, a.address));
    assert_eq!(b.send(now, &[b_to_a(61)]), []);
    until_established(now, &mut a, &mut b, call);
    assert_eq!(a.delivered.len(), 3);
}

#[test]
fn an_initiation_of_before_is_refused_if_what_was_seen_is_on_disk() {
    let now = Instant::now();
    let (mut a, b, recorded) = recorded(now, 3);
    let now = now + 30 * SECOND;
    let seen = b.core.seen_stamps();
    let mut b = restarted(now, b, seen, to_a(&a));
    assert_eq!(b.receive(now, &replayed(&recorded)), []);
    assert_eq!(b.dropped(DropReason::HandshakeRefused), 3);
    let call = a.initiate(now + 60 * SECOND, "b");
    until_established(now, &mut a, &mut b, call);
    // Another pre-shared key is no reason to forget it.
    let mut with_key = peer("a", &a.key, &["10.1.0.0/24"], &[]);
    with_key.preshared_key = Some(etcd_schema::PresharedKey::from_bytes([3; 32]));
    b.apply(now, table(2, vec![with_key]));
    assert_eq!(b.receive(now, &replayed(&recorded[..1])), []);
    assert_eq!(b.dropped(DropReason::HandshakeRefused), 4);
}

/// a's clock was an hour ahead, and is right since its restart: b refuses its initiations, and calls.
#[test]
fn a_peer_whose_clock_has_gone_back_is_called() {
    let now = Instant::now();
    let (mut a, b) = pair(now);
    let ahead = Stamp::at(SystemTime::now() + Duration::from_secs(3600));
    let mut b = restarted(now, b, HashMap::from([(a.key.public(), ahead)]), to_a(&a));
    let refused = a.initiate(now, "b");
    // From wherever it comes, and once in 5 seconds.
    for from_elsewhere in [false, true] {
        let message = if from_elsewhere { replayed(&refused) } else { refused.clone() };
        assert_eq!(b.receive(now, &message), []);
    }
    assert_eq!(b.dropped(DropReason::HandshakeRefused), 2);
    let call = b.ring(now);
    assert_eq!((call.len(), call[0].bytes[0], call[0].to), (1, 1, a.address));
    assert_eq!(b.receive(now + SECOND, &replayed(&refused)), []);
    assert_eq!(b.ring(now + SECOND), []);
    until_established(now + SECOND, &mut a, &mut b, call);
    // With a session that opens packets, it is a replay and no more.
    assert_eq!(b.receive(now + 7 * SECOND, &replayed(&refused)), []);
    assert_eq!(b.ring(now + 7 * SECOND), []);
    assert_eq!(b.endpoint_of("a"), Some(a.address));
}

#[test]
fn initiations_that_were_held_back_end_no_session() {
    let now = Instant::now();
    let (mut a, mut b) = pair(now);
    let sent = a.send(now, &[a_to_b(60)]);
    settle(now, &mut [&mut a, &mut b], sent);
    // More of them than an engine holds sessions; b sees none before mallory sends them.
    let held: Vec<Wire> = (1..=20).flat_map(|n| a.initiate(now + 6 * SECOND * n, "b")).collect();
    assert_eq!(held.len(), 20);
    for (n, initiation) in replayed(&held).into_iter().enumerate() {
        let at = now + SECOND * n as u32;
        let forth = a.send(at, &[a_to_b(100 + n)]);
        assert_eq!(b.receive(at, &[initiation])[0].to, mallory());
        settle(at, &mut [&mut b], forth);
        let back = b.send(at, &[b_to_a(100 + n)]);
        assert_eq!(back[0].to, a.address);
        settle(at, &mut [&mut a], back);
    }
    assert_eq!((a.delivered.len(), b.delivered.len()), (20, 21));
}

#[test]
fn a_peer_that_calls_from_elsewhere_is_reached_there() {
    let now = Instant::now();
    let (mut a, mut b, _) = recorded(now, 0);
    a.address = "203.0.113.7:4001".parse().unwrap();
    let initiation = a.initiate(now + 6 * SECOND, "b");
    let response = b.receive(now, &initiation);
    assert_eq!(response[0].to, a.address, "the response goes where the initiation came from");
    assert_eq!(b.endpoint_of("a"), Some("192.0.2.1:51820".parse().unwrap()));
    let confirmation = a.receive(now, &response);
    b.receive(now, &confirmation);
    assert_eq!(b.endpoint_of("a"), Some(a.address));
}

/// a restarts, so that b's datagrams are for an index that a does not have; `elsewhere`: they come from there.
fn strangers(now: Instant, elsewhere: bool) -> (Node, Node, Vec<Wire>) {
    let (a, mut b, _) = recorded(now, 0);
    let mut late = b.send(now, &[b_to_a(60), b_to_a(61)]);
    if elsewhere {
        late = replayed(&late);
    }
    let to_b = table(1, vec![peer("b", &b.key, &["10.2.0.0/24"], &["192.0.2.2:51820"])]);
    let mut a = restarted(now, a, HashMap::new(), to_b);
    assert_eq!(a.receive(now, &late), []);
    assert_eq!(a.dropped(DropReason::InUnknownIndex), 2);
    (a, b, late)
}

#[test]
fn a_datagram_of_a_session_that_is_gone_leads_to_one_call() {
    let now = Instant::now();
    let (mut a, mut b, late) = strangers(now, false);
    let call = a.ring(now);
    assert_eq!((call.len(), call[0].bytes[0], call[0].to), (1, 1, b.address));
    // One within 5 seconds.
    a.receive(now + SECOND, &late);
    assert_eq!(a.ring(now + SECOND), []);
    until_established(now, &mut a, &mut b, call);
    // And none while there is a session that opens packets.
    a.receive(now + 7 * SECOND, &late);
    assert_eq!(a.ring(now + 7 * SECOND), []);
    assert_eq!(a.endpoint_of("b"), Some(b.address));
}

#[test]
fn a_datagram_of_no_session_from_elsewhere_leads_to_nothing() {
    let now = Instant::now();
    let (mut a, b, _) = strangers(now, true);
    assert_eq!(a.ring(now), []);
    assert_eq!(a.endpoint_of("b"), Some(b.address));
}

#[test]
fn a_node_under_load_calls_for_no_datagram() {
    let now = Instant::now();
    let (mut a, b, late) = strangers(now, true);
    let from_b: Vec<Wire> = late.iter().map(|wire| Wire { from: b.address, ..wire.clone() }).collect();
    a.load(now);
    assert_eq!(a.receive(now, &from_b), []);
    assert_eq!(a.ring(now), []);
    let later = now + 60 * SECOND;
    assert_eq!(a.receive(later, &from_b), []);
    assert_eq!(a.ring(later).len(), 1);
}

#[test]
fn calls_for_datagrams_of_no_session_are_few() {
    let now = Instant::now();
    let keys: Vec<_> = (0..200u8).map(|_| PrivateKey::generate().unwrap()).collect();
    let at = |n: usize| format!("192.0.2.{n}:51820");
    let peers = keys.iter().enumerate().map(|(n, key)| peer(&format!("p{n:03}"), key, &[], &[&at(n)])).collect();
    let mut a = Node::new(now, "203.0.113.1:51820");
    a.apply(now, table(1, peers));
    let mut bytes = vec![0; 60];
    bytes[0] = 4;
    let strangers: Vec<Wire> =
        (0..200).map(|n| Wire { from: at(n).parse().unwrap(), to: a.address, bytes: bytes.clone() }).collect();
    for _ in 0..3 {
        strangers.chunks(50).for_each(|chunk| assert_eq!(a.receive(now, chunk), []));
    }
    assert_eq!(a.ring(now).len(), 50);
    strangers.chunks(50).for_each(|chunk| assert_eq!(a.receive(now + SECOND, chunk), []));
    assert_eq!(a.ring(now + SECOND).len(), 50);
}

#[test]
fn peers_are_called_after_a_start_and_when_they_have_started() {
    let now = Instant::now();
    let (mut a, mut b, _) = recorded(now, 0);
    // b's session is of just now: that it has started is known already.
    assert_eq!(a.restarted(now, "b"), []);
    let call = a.restarted(now + 11 * SECOND, "b");
    assert_eq!((call.len(), call[0].bytes[0], call[0].to), (1, 1, b.address));
    until_established(now, &mut a, &mut b, call);
    // No session, nothing to be cut: the next packet calls.
    let (mut fresh, _) = pair(now);
    assert_eq!(fresh.restarted(now, "b"), []);
    // After its own start a node calls those on its list.
    assert_eq!(fresh.call(now, &["b", "stranger"]).len(), 1);
    assert_eq!(fresh.call(now + SECOND, &["b"]), []);
}

#[test]
fn many_are_called_over_a_second() {
    let now = Instant::now();
    let mut a = Node::new(now, "203.0.113.1:51820");
    let names: Vec<String> = (0..150).map(|n| format!("p{n:03}")).collect();
    let peers = names.iter().map(|name| peer(name, &PrivateKey::generate().unwrap(), &[], &["192.0.2.9:9"])).collect();
    a.apply(now, table(1, peers));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let at_once = a.call(now, &names).len();
    let soon = a.ring(now + SECOND / 2).len();
    let later = a.ring(now + SECOND).len();
    assert!(at_once < 20 && soon > 30 && later > 30, "{at_once}, {soon}, {later}");
    assert_eq!(at_once + soon + later, 150);
}
