//! The tunnel without sockets: peers, tables and packet processing. Time and buffers are arguments.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize},
    },
    time::{Duration, Instant},
};

use boringtun::noise::{Packet as Message, Tunn};
use etcd_schema::PublicKey;
use ipnet::IpNet;
use mesh::tunnel_table::{PeerConfig, TunnelTable};
use rand::rngs::StdRng;
use tokio::sync::broadcast;
use x25519_dalek::StaticSecret;

use super::{
    alarms::Alarms,
    batch::{Endpoint, Outgoing},
    dice::Dice,
    drops::{DropReason, DropRegistry, Drops},
    engine::{BoringtunFactory, EngineFactory},
    event::TunnelEvent,
    initiation::Initiation,
    peer::{InitiationError, PeerContext, TunnelPeer},
    peer_index::PeerIndex,
    shared::Shared,
    stamps::{SeenStamps, Stamp},
    strangers::CallLimit,
    table::{AcceptedClaims, Holders, RefusedClaim, accept},
    tables::Tables,
};

/// Events kept for a subscriber that is busy.
const EVENTS: usize = 1024;
/// With more peers than this, those that are called because of a restart are called over [`SPREAD`].
const AT_ONCE: usize = 100;
const SPREAD: Duration = Duration::from_secs(1);

/// Everything the threads share.
pub(super) struct Core {
    secret: StaticSecret,
    public: PublicKey,
    factory: Box<dyn EngineFactory>,
    dice: Dice,
    seen: SeenStamps,
    /// Calls for datagrams that any host can send.
    pub(super) calls: CallLimit,
    pub(super) tables: Shared<Tables>,
    /// Held while a new table is taken in, so that two do not mix.
    applied: Mutex<AppliedTable>,
    /// Bytes received from and sent to peers that are gone.
    gone: Mutex<(u64, u64)>,
    next_id: AtomicU32,
    pub(super) alarms: Alarms,
    waiting_total: AtomicUsize,
    pub(super) events: broadcast::Sender<TunnelEvent>,
    pub(super) drops: DropRegistry,
}

/// Tables, and what was given to peers since.
struct Settling<'a> {
    tables: &'a Tables,
    keys: HashMap<PublicKey, &'a String>,
    prefixes: HashMap<IpNet, &'a String>,
}

impl Holders for Settling<'_> {
    fn of_key(&self, key: &PublicKey) -> Option<String> {
        let settled = self.keys.get(key).map(|name| (*name).clone());
        settled.or_else(|| self.tables.by_key.get(key).and_then(|(at, _)| self.tables.name_at(*at)))
    }

    fn of_prefix(&self, prefix: &IpNet) -> Option<String> {
        let settled = self.prefixes.get(prefix).map(|name| (*name).clone());
        settled.or_else(|| self.tables.prefixes.owner(prefix).and_then(|at| self.tables.name_at(at)))
    }
}

/// The table applied last.
#[derive(Default)]
struct AppliedTable {
    table: TunnelTable,
    /// Refused claims, by peer.
    refused: BTreeMap<String, Vec<RefusedClaim>>,
    /// Some of that was left out because another peer has it: then all peers are looked at when one changes.
    contested: bool,
}

impl Core {
    /// A core whose jitter comes from `rng`.
    pub(super) fn new(secret: StaticSecret, rng: StdRng) -> Self {
        let factory = Box::new(BoringtunFactory::new(secret.clone()));
        Self::with_engines(secret, rng, factory)
    }

    /// A core that refuses initiations up to these time stamps, which an earlier run saw.
    pub(super) fn with_seen(secret: StaticSecret, rng: StdRng, seen: HashMap<PublicKey, Stamp>) -> Self {
        Self { seen: SeenStamps::new(seen), ..Self::new(secret, rng) }
    }

    /// A core whose engines are of another make.
    pub(super) fn with_engines(secret: StaticSecret, rng: StdRng, factory: Box<dyn EngineFactory>) -> Self {
        let public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes());
        Self {
            secret,
            public,
            factory,
            dice: Dice::new(rng),
            seen: SeenStamps::default(),
            calls: CallLimit::default(),
            tables: Shared::new(Tables::default()),
            applied: Mutex::default(),
            gone: Mutex::default(),
            next_id: AtomicU32::new(0),
            alarms: Alarms::default(),
            waiting_total: AtomicUsize::new(0),
            events: broadcast::channel(EVENTS).0,
            drops: DropRegistry::default(),
        }
    }

    /// This node's public key, as the WireGuard crate wants it.
    pub(super) fn public(&self) -> x25519_dalek::PublicKey {
        x25519_dalek::PublicKey::from(*self.public.as_bytes())
    }

    /// The context of a locked peer.
    pub(super) fn context<'a>(&'a self, now: Instant, drops: &'a Drops, out: &'a mut Outgoing) -> PeerContext<'a> {
        PeerContext {
            now,
            factory: &*self.factory,
            secret: &self.secret,
            dice: &self.dice,
            seen: &self.seen,
            alarms: &self.alarms,
            waiting_total: &self.waiting_total,
            events: &self.events,
            drops,
            out,
        }
    }

    /// Applies `table`. Remaining peers keep their sessions and endpoints; removed ones lose them before this returns.
    /// Costs as much as the difference from the previous table, unless peers contest keys or prefixes.
    pub(super) fn apply(
        &self,
        now: Instant,
        table: TunnelTable,
        drops: &Drops,
        out: &mut Outgoing,
    ) -> Vec<RefusedClaim> {
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cx = self.context(now, drops, out);
        let old = self.tables.get();
        let all = |table: &TunnelTable| table.peers.keys().cloned().collect::<BTreeSet<String>>();
        let mut scope: BTreeSet<String> = table.peers.changes(&applied.table.peers).into_iter().cloned().collect();
        if applied.table.mtu != table.mtu || (applied.contested && !scope.is_empty()) {
            scope = &all(&table) | &all(&applied.table);
        }
        let (mut new, mut settled) = self.resolve_claims(&old, &applied, &table, &scope);
        if settled.iter().any(|(_, accepted)| accepted.is_contested()) && !covers(&scope, &table) {
            // The first by name has it, who may not be among those that changed.
            scope = &all(&table) | &all(&applied.table);
            (new, settled) = self.resolve_claims(&old, &applied, &table, &scope);
        }
        applied.contested =
            settled.iter().any(|(_, accepted)| accepted.is_contested()) || (applied.contested && scope.is_empty());
        for name in &scope {
            applied.refused.remove(name);
        }
        let mut holding = BTreeSet::new();
        for (name, accepted) in settled {
            if !accepted.refused.is_empty() {
                applied.refused.insert(name.clone(), accepted.refused);
            }
            let Some(config) = table.peers.get(&name).filter(|_| !accepted.keys.is_empty()) else { continue };
            let config = PeerConfig { keys: accepted.keys, allowed: accepted.prefixes, ..PeerConfig::clone(config) };
            self.put_peer(&mut cx, &mut new, &config, table.mtu);
            holding.insert(name);
        }
        let mut gone = Vec::new();
        for name in scope.difference(&holding) {
            if let Some(peer) = new.remove(name) {
                peer.lock().remove(&mut cx);
                gone.push(peer);
            }
        }
        new.local.clone_from(&table.local);
        new.overlay.clone_from(&table.overlay);
        let mut before = self.gone();
        for peer in gone {
            let (received, sent) = peer.lock().bytes();
            *before = (before.0 + received, before.1 + sent);
        }
        self.tables.set(Arc::new(new));
        drop(before);
        applied.table = table;
        applied.refused.values().flatten().cloned().collect()
    }

    /// Resolves the claims of the peers in `scope` against those outside of it; also returns the tables without the
    /// former claims of `scope`. An unchanged, uncontested claim stays with its peer.
    fn resolve_claims(
        &self,
        old: &Tables,
        before: &AppliedTable,
        table: &TunnelTable,
        scope: &BTreeSet<String>,
    ) -> (Tables, Vec<(String, AcceptedClaims)>) {
        let whole = covers(scope, table);
        let mut settled = Vec::with_capacity(scope.len());
        let mut claiming = Vec::new();
        let mut new = old.clone();
        for name in scope {
            let (was, is) = (before.table.peers.get(name), table.peers.get(name));
            let same = |was: &PeerConfig, is: &PeerConfig| was.keys == is.keys && was.allowed == is.allowed;
            if !whole && was.zip(is).is_some_and(|(was, is)| same(was, is)) {
                let held = old.held(name);
                let refused = before.refused.get(name).cloned().unwrap_or_default();
                settled.push((name.clone(), AcceptedClaims { refused, ..held }));
                continue;
            }
            new.unclaim(name);
            claiming.extend(is.map(|config| (name, config)));
        }
        let mut holders = Settling { tables: &new, keys: HashMap::new(), prefixes: HashMap::new() };
        for (name, config) in claiming {
            let accepted = accept(config, &self.public, &holders, |key| {
                // Curve arithmetic for new keys only.
                let other = x25519_dalek::PublicKey::from(*key.as_bytes());
                !old.by_key.contains_key(key) && !self.secret.diffie_hellman(&other).was_contributory()
            });
            holders.keys.extend(accepted.keys.iter().map(|key| (*key, name)));
            holders.prefixes.extend(accepted.prefixes.iter().map(|prefix| (*prefix, name)));
            settled.push((name.clone(), accepted));
        }
        (new, settled)
    }

    /// Creates or updates a peer, and gives it the prefixes and keys of `config`, which no other peer holds.
    fn put_peer(&self, cx: &mut PeerContext<'_>, new: &mut Tables, config: &PeerConfig, mtu: u16) {
        let mut drawn = Vec::new();
        let by_index = Arc::clone(&new.by_index);
        let mut free_index = || {
            loop {
                let index = self.dice.draw(0..1u32 << 24);
                if !by_index.contains_key(&index) && !drawn.contains(&index) {
                    drawn.push(index);
                    return index;
                }
            }
        };
        let known = new.named(&config.name).cloned();
        let is_new = known.is_none();
        let mut indices_before = Vec::new();
        let peer = match known {
            Some(peer) => {
                let mut state = peer.lock();
                indices_before.extend(state.indices().map(|(index, _)| index));
                state.reconfigure(cx, config, mtu, &mut free_index);
                drop(state);
                peer
            }
            None => {
                let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let indices: Vec<u32> = config.keys.iter().map(|_| free_index()).collect();
                Arc::new(TunnelPeer::new(cx.now, PeerIndex(id), config, &indices, mtu))
            }
        };
        drop(by_index);
        let indices: Vec<(u32, PublicKey)> = peer.lock().indices().collect();
        new.claim(&peer, config, &indices_before, &indices);
        if is_new {
            peer.lock().start(cx);
        }
    }

    /// Works on a handshake message that was admitted.
    pub(super) fn handshake(&self, now: Instant, drops: &Drops, message: &[u8], from: Endpoint, out: &mut Outgoing) {
        if let Err(reason) = self.try_handshake(now, drops, message, from, out) {
            drops.count(reason);
        }
    }

    fn try_handshake(
        &self,
        now: Instant,
        drops: &Drops,
        message: &[u8],
        from: Endpoint,
        out: &mut Outgoing,
    ) -> Result<(), DropReason> {
        let parsed = Tunn::parse_incoming_packet(message).map_err(|_| DropReason::InMalformed)?;
        let tables = self.tables.get();
        let by_index = |receiver: u32| {
            let index = receiver >> 8;
            let at = tables.by_index.get(&index);
            at.map(|at| (*at, index)).ok_or(DropReason::InUnknownIndex)
        };
        let mut initiation = None;
        let (at, index) = match parsed {
            Message::HandshakeInit(_) => {
                let opened = Initiation::open(message, &self.secret, &self.public);
                let opened = initiation.insert(opened.ok_or(DropReason::HandshakeRefused)?);
                *tables.by_key.get(&opened.sender).ok_or(DropReason::HandshakeUnknownPeer)?
            }
            Message::HandshakeResponse(response) => by_index(response.receiver_idx)?,
            Message::PacketCookieReply(cookie) => by_index(cookie.receiver_idx)?,
            Message::PacketData(_) => return Err(DropReason::InMalformed),
        };
        let mut peer = tables.at(at).ok_or(DropReason::HandshakeUnknownPeer)?.lock();
        let mut cx = self.context(now, drops, out);
        match initiation {
            Some(initiation) => match peer.initiation(&mut cx, index, &initiation, message, from) {
                Err(InitiationError::Stale) => {
                    // The peer's clock was ahead, and is right now: it can begin nothing until that time, so we do.
                    if self.calls.allows(now) && peer.stranger(&mut cx) {
                        self.calls.count();
                    }
                    Err(DropReason::HandshakeRefused)
                }
                Err(InitiationError::Dropped(reason)) => Err(reason),
                Ok(()) => Ok(()),
            },
            None => peer.handshake(&mut cx, index, message, from),
        }
    }

    /// Runs the due actions of one peer; returns whether there was one.
    pub(super) fn run_deadlines(&self, now: Instant, drops: &Drops, out: &mut Outgoing) -> bool {
        let Some((at, id)) = self.alarms.take_due(now) else {
            return false;
        };
        if let Some(peer) = self.tables.get().with_id(id) {
            let mut peer = peer.lock();
            if peer.is_due(at) {
                peer.on_alarm(&mut self.context(now, drops, out));
            }
        }
        true
    }

    fn gone(&self) -> MutexGuard<'_, (u64, u64)> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes received from and sent to all peers since the start. Neither ever falls.
    pub(super) fn bytes(&self) -> (u64, u64) {
        // A peer is in the table or among those that are gone, not both.
        let gone = self.gone();
        let tables = self.tables.get();
        tables.peers().map(|peer| peer.lock().bytes()).fold(*gone, |sum, of| (sum.0 + of.0, sum.1 + of.1))
    }

    /// Starts a handshake with the peer called `name`, unless one was started within the last 5 seconds.
    pub(super) fn initiate(&self, now: Instant, name: &str, drops: &Drops, out: &mut Outgoing) {
        if let Some(peer) = self.tables.get().named(name) {
            peer.lock().initiate(&mut self.context(now, drops, out));
        }
    }

    /// Initiates handshakes with these peers, for a start: earlier sessions are gone, and packets in them are lost.
    pub(super) fn call(&self, now: Instant, names: &[String], drops: &Drops, out: &mut Outgoing) {
        let tables = self.tables.get();
        for peer in names.iter().filter_map(|name| tables.named(name)) {
            let at = now + self.spread(names.len());
            peer.lock().call_at(&mut self.context(now, drops, out), at);
        }
    }

    /// Takes in that the peer called `name` has restarted: its session, if any, most likely predates that.
    pub(super) fn restarted(&self, now: Instant, name: &str, drops: &Drops, out: &mut Outgoing) {
        let tables = self.tables.get();
        if let Some(peer) = tables.named(name) {
            let at = now + self.spread(tables.peers().count());
            peer.lock().restarted(&mut self.context(now, drops, out), at);
        }
    }

    /// The greatest time stamp that came in initiations of each key that is in the table.
    pub(super) fn seen_stamps(&self) -> HashMap<PublicKey, Stamp> {
        let tables = self.tables.get();
        self.seen.retain(|key| tables.by_key.contains_key(key))
    }

    /// Sends `peer` an empty message, if there is a session with it.
    pub(super) fn announce(&self, now: Instant, peer: &TunnelPeer, drops: &Drops, out: &mut Outgoing) {
        peer.lock().announce(&mut self.context(now, drops, out));
    }

    /// Takes in that the path to `remote` carries outer packets of `mtu` bytes.
    pub(super) fn path_mtu(&self, now: Instant, remote: SocketAddr, mtu: u16, drops: &Drops, out: &mut Outgoing) {
        for peer in self.tables.get().peers() {
            peer.lock().path_mtu(&mut self.context(now, drops, out), remote, mtu);
        }
    }

    /// Takes in that the source address a peer's datagrams were to leave from is gone.
    pub(super) fn source_failed(&self, id: PeerIndex) {
        if let Some(peer) = self.tables.get().with_id(id) {
            peer.lock().source_failed();
        }
    }

    /// When one of `count` peers is called.
    fn spread(&self, count: usize) -> Duration {
        if count > AT_ONCE { self.dice.draw(Duration::ZERO..SPREAD) } else { Duration::ZERO }
    }
}

/// Whether every peer of `table` is in `scope`, in which may also be some that are gone.
fn covers(scope: &BTreeSet<String>, table: &TunnelTable) -> bool {
    table.peers.keys().all(|name| scope.contains(name))
}
