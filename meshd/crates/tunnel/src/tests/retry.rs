//! Peers that do not answer, with engines on test time: hours pass in a moment.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use cow_map::CowMap;
use etcd_schema::{PresharedKey, PublicKey};
use mesh::tunnel_table::PeerConfig;
use rand::{SeedableRng as _, rngs::StdRng};

use super::{
    super::{
        batch::Endpoint,
        core::Core,
        engine::{EngineFactory, Handshaken, NoiseEngine, Opened, Tick},
        *,
    },
    harness::{Node, SECOND, Wire, packet, peer, table},
};

/// First byte of a handshake response.
const RESPONSE: u8 = 2;

/// The time that engines go by.
type Clock = Arc<Mutex<Instant>>;

/// An engine with boringtun's timers for handshakes and sessions and none of its cryptography.
struct Timers {
    clock: Clock,
    index: u32,
    started: Option<Instant>,
    sent: Option<Instant>,
    session: Option<Instant>,
    expired: bool,
}

struct TimersFactory(Clock);

impl EngineFactory for TimersFactory {
    fn make(&self, _: &PublicKey, _: Option<&PresharedKey>, index: u32) -> Box<dyn NoiseEngine> {
        Box::new(Timers { clock: Arc::clone(&self.0), index, started: None, sent: None, session: None, expired: false })
    }
}

impl Timers {
    fn now(&self) -> Instant {
        *self.clock.lock().unwrap()
    }

    fn is_past(&self, at: Option<Instant>, seconds: u32) -> bool {
        at.is_some_and(|at| self.now() - at >= SECOND * seconds)
    }

    fn write_initiation(&mut self, out: &mut [u8]) -> usize {
        self.expired = false;
        let now = self.now();
        self.started.get_or_insert(now);
        self.sent = Some(self.now());
        out[..148].fill(0);
        out[0] = 1;
        out[4..8].copy_from_slice(&self.index.to_le_bytes());
        148
    }
}

impl NoiseEngine for Timers {
    fn has_session(&self) -> bool {
        self.session.is_some()
    }

    fn seal(&mut self, plaintext: &[u8], out: &mut [u8]) -> Option<usize> {
        self.session?;
        out[0] = 4;
        Some(plaintext.len() + 32)
    }

    fn open(&mut self, _: &[u8], _: &mut [u8]) -> Opened {
        match self.session {
            Some(_) => Opened::Keepalive,
            None => Opened::Refused(DropReason::InNoSession),
        }
    }

    fn handshake(&mut self, message: &[u8], out: &mut [u8]) -> Handshaken {
        if self.expired || message[0] != RESPONSE {
            return Handshaken::Refused;
        }
        self.session = Some(self.now());
        (self.started, self.sent) = (None, None);
        out[0] = 4;
        Handshaken::Established(32)
    }

    fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        Some(self.write_initiation(out))
    }

    fn tick(&mut self, out: &mut [u8]) -> Tick {
        if self.is_past(self.session, 180) {
            self.session = None;
        }
        if self.expired || self.is_past(self.started, 90) {
            (self.started, self.sent, self.session) = (None, None, None);
            self.expired = true;
            Tick::Expired
        } else if self.is_past(self.sent, 5) {
            Tick::Send(self.write_initiation(out))
        } else {
            Tick::Nothing
        }
    }
}

struct Rig {
    node: Node,
    clock: Clock,
    now: Instant,
    rings: u32,
}

impl Rig {
    fn new() -> Self {
        let now = Instant::now();
        let clock = Arc::new(Mutex::new(now));
        let key = PrivateKey::generate().unwrap();
        let factory = Box::new(TimersFactory(Arc::clone(&clock)));
        let core = Core::with_engines(key.secret().clone(), StdRng::from_os_rng(), factory);
        Self { node: Node::with_core(now, "192.0.2.1:1", key, core), clock, now, rings: 0 }
    }

    /// Lets `time` pass, alarm by alarm; returns what was sent and when.
    fn pass(&mut self, time: Duration) -> Vec<(Instant, Wire)> {
        let end = self.now + time;
        let mut sent = Vec::new();
        while let Some(next) = self.node.core.alarms.next().filter(|at| *at <= end) {
            self.set(next.max(self.now));
            self.rings += 1;
            let now = self.now;
            sent.extend(self.node.ring(now).into_iter().map(|wire| (now, wire)));
        }
        self.set(end);
        sent
    }

    fn set(&mut self, now: Instant) {
        self.now = now;
        *self.clock.lock().unwrap() = now;
    }

    /// Answers the peer's last initiation.
    fn answer(&mut self, name: &str, from: SocketAddr) {
        assert_eq!(self.respond(name, from, RESPONSE), Ok(()));
    }

    /// A message that begins with this byte comes from where the peer may be; the engine takes a response only.
    fn respond(&mut self, name: &str, from: SocketAddr, kind: u8) -> Result<(), DropReason> {
        let core = Arc::clone(&self.node.core);
        let tables = core.tables.get();
        let at = tables.named(name).unwrap();
        let index = at.lock().indices().next().unwrap().0;
        let mut out = Outgoing::new();
        let drops = core.drops.register();
        let from = Endpoint { remote: from, source: None };
        at.lock().handshake(&mut core.context(self.now, &drops, &mut out), index, &[kind; 92], from)
    }

    fn is_alive(&self, name: &str) -> bool {
        let tables = self.node.core.tables.get();
        tables.named(name).unwrap().lock().is_alive(self.now)
    }

    fn is_silent(&self, name: &str) -> bool {
        let tables = self.node.core.tables.get();
        tables.named(name).unwrap().lock().session(self.now).is_silent()
    }
}

const CANDIDATES: [&str; 3] = ["192.0.2.2:1", "192.0.2.3:1", "[2001:db8::2]:1"];

fn peer_b(table: &mut TunnelTable) -> &mut PeerConfig {
    Arc::make_mut(table.peers.get_mut("b").unwrap())
}

fn called() -> TunnelTable {
    let key = PrivateKey::generate().unwrap();
    let mut config = peer("b", &key, &["10.2.0.0/24"], &CANDIDATES);
    config.call_out = true;
    table(1, vec![config])
}

fn inner() -> Vec<u8> {
    packet("10.1.0.5", "10.2.0.5", 60)
}

#[test]
fn a_peer_that_must_be_called_is_called_for_hours_everywhere_and_seldom() {
    let mut rig = Rig::new();
    rig.node.apply(rig.now, called());
    let first = rig.pass(90 * SECOND);
    assert!((16..=20).contains(&first.len()), "every five seconds: {}", first.len());
    assert!(first[0].0 < first[1].0);
    let hour = rig.pass(3600 * SECOND);
    assert!((100..=245).contains(&hour.len()), "every 15 to 30 s: {}", hour.len());
    let mut per_candidate = HashMap::new();
    for (_, wire) in &hour {
        *per_candidate.entry(wire.to).or_insert(0) += 1;
    }
    assert_eq!(per_candidate.len(), CANDIDATES.len());
    let gap = hour.windows(2).map(|w| w[1].0 - w[0].0).max().unwrap();
    assert!(gap <= 31 * SECOND, "{gap:?}");
    assert!(rig.rings < 1500, "{} alarms for a peer that is away", rig.rings);
}

/// Where initiations go from now on, and how much later than the one before; the first is sent now.
fn calls(rig: &mut Rig, count: usize) -> Vec<(SocketAddr, Duration)> {
    let mut before = rig.now;
    let first = rig.node.send(rig.now, &[inner()]).into_iter().map(|wire| (rig.now, wire)).collect::<Vec<_>>();
    let later = rig.pass(SECOND * 6 * count as u32);
    let mut gap = |at: Instant| at - std::mem::replace(&mut before, at);
    first.into_iter().chain(later).take(count).map(|(at, wire)| (wire.to, gap(at))).collect()
}

/// At most this long after a try that led to nothing comes the next: 5 s, a tick of 250 ms and its spread.
const NEXT_TRY: Duration = Duration::from_millis(5400);

#[test]
fn an_address_that_does_not_authenticate_is_followed_by_the_next_after_five_seconds() {
    let places = CANDIDATES.map(|at| at.parse::<SocketAddr>().unwrap());
    for imposter in [false, true] {
        let mut rig = Rig::new();
        let mut table = called();
        peer_b(&mut table).call_out = false;
        rig.node.apply(rig.now, table);
        if imposter {
            // At the first address another program answers, and goes on doing so.
            assert_eq!(rig.node.send(rig.now, &[inner()])[0].to, places[0]);
            assert_eq!(rig.respond("b", places[0], 0xff), Err(DropReason::HandshakeRefused));
            let second = rig.pass(NEXT_TRY);
            assert_eq!(second.iter().map(|(_, wire)| wire.to).collect::<Vec<_>>(), [places[1]]);
            assert_eq!(rig.respond("b", places[0], 0xff), Err(DropReason::HandshakeRefused));
        } else {
            let tries = calls(&mut rig, 2 * places.len());
            assert_eq!(tries.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [places, places].concat());
            let gaps: Vec<Duration> = tries.iter().skip(1).map(|(_, gap)| *gap).collect();
            assert!(gaps.iter().all(|gap| (5 * SECOND..=NEXT_TRY).contains(gap)), "{gaps:?}");
        }
        // What authenticated is kept: the next session is asked for there, and nowhere else.
        rig.answer("b", places[1]);
        assert_eq!(rig.node.endpoint_of("b"), Some(places[1]));
        rig.pass(200 * SECOND);
        let tries: Vec<SocketAddr> = calls(&mut rig, 3).into_iter().map(|(to, _)| to).collect();
        assert_eq!(tries[..2], [places[1]; 2], "the address that authenticated comes first, twice");
        assert_ne!(tries[2], places[1], "then the others");
    }
}

#[test]
fn a_tunnel_that_was_dead_for_an_hour_comes_back_and_stays() {
    let mut rig = Rig::new();
    rig.node.apply(rig.now, called());
    rig.pass(3600 * SECOND);
    assert!(!rig.is_alive("b"));
    while rig.pass(SECOND).is_empty() {}
    let at: SocketAddr = CANDIDATES[1].parse().unwrap();
    rig.answer("b", at);
    assert!(rig.is_alive("b"));
    // Kept up without traffic: keepalives every 25 s, a new handshake after 120 s.
    let sent = rig.pass(119 * SECOND);
    assert!(sent.iter().all(|(_, w)| w.to == at && w.bytes[0] == 4));
    assert!((4..=6).contains(&sent.len()), "{}", sent.len());
    let sent = rig.pass(4 * SECOND);
    assert!(sent.iter().any(|(_, w)| w.to == at && w.bytes[0] == 1));
    rig.answer("b", at);
    // Then it is gone again, unnoticed at first, and called again everywhere.
    let sent = rig.pass(600 * SECOND);
    let places: std::collections::HashSet<_> =
        sent.iter().filter(|(_, w)| w.bytes[0] == 1).map(|(_, w)| w.to).collect();
    assert_eq!(places.len(), CANDIDATES.len());
}

#[test]
fn a_peer_nobody_needs_is_left_alone() {
    let mut rig = Rig::new();
    let mut table = called();
    peer_b(&mut table).call_out = false;
    rig.node.apply(rig.now, table);
    assert_eq!(rig.pass(3600 * SECOND), []);
    // A packet for it: ninety seconds of attempts, and then silence again.
    assert_eq!(rig.node.send(rig.now, &[inner()]).len(), 1);
    let tries = rig.pass(100 * SECOND);
    assert!((16..=19).contains(&tries.len()), "{}", tries.len());
    assert_eq!(rig.node.dropped(DropReason::OutHandshakeTimeout), 1);
    let rings = rig.rings;
    assert_eq!(rig.pass(3600 * SECOND), []);
    assert_eq!(rig.rings, rings);
    // The next packet tries again, and waits for it.
    assert_eq!(rig.node.send(rig.now, &[inner()]).len(), 1);
    rig.answer("b", CANDIDATES[0].parse().unwrap());
    assert_eq!(rig.node.dropped(DropReason::OutHandshakeTimeout), 1);
    assert!(rig.is_alive("b"));
}

#[test]
fn a_peer_that_is_called_in_vain_is_silent_for_a_while() {
    let mut rig = Rig::new();
    let mut table = called();
    peer_b(&mut table).call_out = false;
    rig.node.apply(rig.now, table);
    rig.pass(60 * SECOND);
    assert!(!rig.is_silent("b"), "it was not called");
    rig.node.send(rig.now, &[inner()]);
    rig.pass(14 * SECOND);
    assert!(!rig.is_silent("b"), "three calls may be lost");
    rig.pass(3 * SECOND);
    assert!(rig.is_silent("b"));
    rig.pass(300 * SECOND);
    assert!(rig.is_silent("b"));
    rig.pass(100 * SECOND);
    assert!(!rig.is_silent("b"), "that was long ago");
    rig.node.send(rig.now, &[inner()]);
    rig.pass(20 * SECOND);
    assert!(rig.is_silent("b"));
    rig.node.send(rig.now, &[inner()]);
    rig.answer("b", CANDIDATES[0].parse().unwrap());
    assert!(!rig.is_silent("b"));
}

#[test]
fn bytes_do_not_fall_when_a_peer_goes() {
    let mut rig = Rig::new();
    rig.node.apply(rig.now, called());
    rig.pass(SECOND);
    rig.answer("b", CANDIDATES[0].parse().unwrap());
    rig.node.send(rig.now, &[inner()]);
    let before = rig.node.core.bytes();
    assert!(before.0 > 0 && before.1 > 0, "{before:?}");
    let mut without = called();
    without.peers = CowMap::default();
    rig.node.apply(rig.now, without);
    assert_eq!(rig.node.core.bytes(), before);
}

#[test]
fn silence_after_data_means_dead_until_something_comes() {
    let mut rig = Rig::new();
    rig.node.apply(rig.now, called());
    rig.pass(SECOND);
    rig.answer("b", CANDIDATES[0].parse().unwrap());
    rig.node.send(rig.now, &[inner()]);
    rig.pass(14 * SECOND);
    assert!(rig.is_alive("b"));
    rig.pass(SECOND);
    assert!(!rig.is_alive("b"));
    rig.answer("b", CANDIDATES[0].parse().unwrap());
    assert!(rig.is_alive("b"));
}

#[test]
fn new_candidates_of_a_dead_peer_are_tried_at_once_and_equal_ones_are_no_reason() {
    let mut rig = Rig::new();
    let table = called();
    rig.node.apply(rig.now, table.clone());
    rig.pass(1000 * SECOND);
    rig.node.apply(rig.now, table.clone());
    assert!(rig.pass(SECOND).len() <= 1);
    let mut moved = table;
    peer_b(&mut moved).candidates = vec!["198.51.100.9:9".parse().unwrap()];
    rig.node.apply(rig.now, moved);
    let sent = rig.pass(SECOND);
    assert!(sent.iter().any(|(_, w)| w.to == "198.51.100.9:9".parse().unwrap()));
}

#[test]
fn peers_are_not_called_all_at_once() {
    let mut rig = Rig::new();
    let peers = (0..50)
        .map(|n| {
            let key = PrivateKey::generate().unwrap();
            let mut config = peer(&n.to_string(), &key, &[], &["192.0.2.2:1"]);
            config.call_out = true;
            config
        })
        .collect();
    rig.node.apply(rig.now, table(1, peers));
    let sent = rig.pass(SECOND);
    assert_eq!(sent.len(), 50);
    assert!(sent[49].0 - sent[0].0 > Duration::from_millis(100));
}

#[test]
fn both_keys_are_tried_soon_and_everywhere() {
    let mut rig = Rig::new();
    let mut table = called();
    peer_b(&mut table).keys.push(PrivateKey::generate().unwrap().public());
    rig.node.apply(rig.now, table);
    for sent in [rig.pass(60 * SECOND), {
        rig.pass(600 * SECOND);
        rig.pass(600 * SECOND)
    }] {
        let tried: std::collections::HashSet<_> = sent.iter().map(|(_, w)| (w.to, w.bytes[4..8].to_vec())).collect();
        assert_eq!(tried.len(), 2 * CANDIDATES.len());
    }
}
