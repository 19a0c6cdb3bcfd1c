//! First contacts, renewals and crossing handshakes with traffic in both directions. A seed determines the order of
//! sent packets, arriving datagrams (some overtake others) and thread runs of both nodes. No datagram is lost, so every
//! packet must arrive exactly once.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use super::{
    super::{DropReason, TunnelTable, sys::skewed_clock},
    harness::{Node, SECOND, Wire, packet, pair, peer, table},
};

/// What `cargo test` runs. `MESHD_CONTACTS` sets another number.
const CONTACTS: u64 = 500;
/// Seeds beyond these that once lost packets: a session that was only answered lay where the crate sends.
const FOUND: [u64; 1] = [5120];
/// How far a datagram may overtake others.
const OVERTAKES: usize = 6;
/// The longest that a datagram is under way while both nodes may renew the session that it is of, once or twice.
const UNDER_WAY: Duration = Duration::from_secs(10);

/// Two nodes and the network between them. Node 0 owns 10.1.0.0/24, node 1 10.2.0.0/24.
struct Contact {
    rng: StdRng,
    now: Instant,
    nodes: [Node; 2],
    /// Datagrams on their way to each node.
    arriving: [VecDeque<(Instant, Wire)>; 2],
    /// What each node's control thread has sealed and not sent yet, while its data thread goes on.
    held: [Vec<Wire>; 2],
    sent: [Vec<Vec<u8>>; 2],
}

impl Contact {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let (a, mut b) = pair(now);
        // Both call, or only one can.
        if rng.random() {
            b.apply(now, to_a(&a));
        }
        Self {
            rng,
            now,
            nodes: [a, b],
            arriving: Default::default(),
            held: Default::default(),
            sent: Default::default(),
        }
    }

    /// Time passes, for the crate as well.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        skewed_clock::advance(time);
    }

    /// A few packets from one node's pods.
    fn send(&mut self, from: usize) {
        // Node 1 may have to wait for node 0's call: before it, its packets have nowhere to go.
        if from == 1 && self.nodes[1].endpoint_of("a").is_none() {
            return;
        }
        let (source, destination) = [("10.1.0.5", "10.2.0.5"), ("10.2.0.5", "10.1.0.5")][from];
        let burst: Vec<Vec<u8>> = (0..*[1, 1, 1, 3, 8].choose(&mut self.rng).unwrap())
            .map(|n| {
                let mut packet = packet(source, destination, self.rng.random_range(60..1400));
                packet[28..32].copy_from_slice(&(self.sent[from].len() as u32 + n).to_be_bytes());
                packet
            })
            .collect();
        let sent = self.nodes[from].send(self.now, &burst);
        self.sent[from].extend(burst);
        self.dispatch(from, sent);
    }

    /// A batch arrives at one node's socket.
    fn arrive(&mut self, at: usize) {
        let queue = &mut self.arriving[at];
        if queue.len() > 1 && self.rng.random_ratio(1, 6) {
            let other = self.rng.random_range(1..queue.len().min(OVERTAKES));
            queue.swap(0, other);
        }
        let count = queue.len().min(self.rng.random_range(1..=8));
        let batch: Vec<Wire> = queue.drain(..count).map(|(_, datagram)| datagram).collect();
        let sent = self.nodes[at].receive_without_handshakes(self.now, &batch);
        self.dispatch(at, sent);
    }

    /// Datagrams of one node set out.
    fn dispatch(&mut self, from: usize, datagrams: Vec<Wire>) {
        let now = self.now;
        self.arriving[1 - from].extend(datagrams.into_iter().map(|datagram| (now, datagram)));
    }

    fn release(&mut self, from: usize) {
        let held = std::mem::take(&mut self.held[from]);
        self.dispatch(from, held);
    }

    /// One thing happens, of those that may at any time.
    fn step(&mut self) {
        let node = self.rng.random_range(0..2);
        match self.rng.random_range(0..100) {
            0..50 => self.arrive(node),
            50..65 => {
                let sent = self.nodes[node].do_handshake(self.now);
                self.held[node].extend(sent);
            }
            65..80 => self.release(node),
            80..85 => {
                self.pass(SECOND / 4);
                let sent = self.nodes[node].ring(self.now);
                self.held[node].extend(sent);
            }
            85..86 => {
                // No sooner would a node call again. What is under way stays so, but for what is old.
                (0..2).for_each(|node| self.release(node));
                self.pass(SECOND * 6);
                for node in 0..2 {
                    while self.arriving[node].iter().any(|(sent, _)| *sent + UNDER_WAY < self.now) {
                        self.arrive(node);
                    }
                }
                let (name, other) = [("b", "a"), ("a", "b")][node];
                let sent = self.nodes[node].initiate(self.now, name);
                self.held[node].extend(sent);
                // Both at once, as when either side's timer comes.
                if self.rng.random() {
                    let sent = self.nodes[1 - node].initiate(self.now, other);
                    self.held[1 - node].extend(sent);
                }
            }
            _ => self.send(node),
        }
    }

    /// Everything under way arrives.
    fn settle(&mut self) {
        for _ in 0..1000 {
            for node in 0..2 {
                while !self.arriving[node].is_empty() {
                    self.arrive(node);
                }
                let sent = self.nodes[node].do_handshakes(self.now);
                self.held[node].extend(sent);
                let sent = self.nodes[node].ring(self.now);
                self.held[node].extend(sent);
                self.release(node);
            }
            let arrived = |to: usize| self.nodes[to].delivered.len() >= self.sent[1 - to].len();
            if self.arriving.iter().all(VecDeque::is_empty) && arrived(0) && arrived(1) {
                return;
            }
            self.pass(SECOND / 4);
        }
    }
}

fn to_a(a: &Node) -> TunnelTable {
    table(2, vec![peer("a", &a.key, &["10.1.0.0/24"], &["192.0.2.1:51820"])])
}

/// What no datagram may be dropped for where none is lost, forged or replayed.
const NEVER: [DropReason; 10] = [
    DropReason::OutNoPeer,
    DropReason::OutNoEndpoint,
    DropReason::OutQueueFull,
    DropReason::OutHandshakeTimeout,
    DropReason::InUnknownIndex,
    DropReason::InNoSession,
    DropReason::InUnauthentic,
    DropReason::InReplayed,
    DropReason::InWrongSource,
    DropReason::UdpSendFull,
];

#[test]
fn no_packet_is_lost_around_a_handshake() {
    let contacts = std::env::var("MESHD_CONTACTS").ok().and_then(|count| count.parse().ok()).unwrap_or(CONTACTS);
    let (mut packets, mut handshakes) = (0, 0);
    for seed in (0..contacts).chain(FOUND) {
        let mut contact = Contact::new(seed);
        // Node 0 can always call.
        contact.send(0);
        let steps = contact.rng.random_range(10..200);
        for _ in 0..steps {
            contact.step();
        }
        contact.settle();
        for (node, name) in [(0, "a"), (1, "b")] {
            let mut expected = std::mem::take(&mut contact.sent[1 - node]);
            packets += expected.len();
            expected.sort_unstable();
            let dropped: Vec<_> = contact.nodes.iter().map(Node::all_dropped).collect();
            let node = &mut contact.nodes[node];
            node.delivered.sort_unstable();
            assert!(
                node.delivered == expected,
                "seed {seed}: {} of {} packets arrived at {name}; dropped at each: {dropped:?}",
                node.delivered.len(),
                expected.len()
            );
            for reason in NEVER {
                assert_eq!(node.dropped(reason), 0, "seed {seed}: {reason:?} at {name}");
            }
            handshakes += 1;
        }
    }
    println!("{packets} packets, {handshakes} ends of {contacts} contacts");
}
