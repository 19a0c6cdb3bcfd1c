//! One peer: its keys and sessions, its endpoint, pending packets and deadlines.

mod calling;
mod waiting;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use arrayvec::ArrayVec;
use etcd_schema::{PresharedKey, PublicKey};
use mesh::{
    path::TunnelSession,
    tunnel_table::{MAX_KEYS, PeerConfig},
};
use tokio::sync::broadcast;
use x25519_dalek::{SharedSecret, StaticSecret};

use super::{
    alarms::Alarms,
    batch::{Endpoint, OVERHEAD, Outgoing},
    dice::Dice,
    drops::{DropReason, Drops},
    engine::{EngineFactory, Handshaken, NoiseEngine, Opened},
    event::TunnelEvent,
    initiation::Initiation,
    path::PathMtu,
    peer_index::PeerIndex,
    stamps::SeenStamps,
};

/// Data unanswered for this long means the peer is not there (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT).
const UNANSWERED: Duration = Duration::from_secs(15);

/// A peer, shared between the threads.
pub(super) struct TunnelPeer {
    pub(super) id: PeerIndex,
    pub(super) name: Arc<str>,
    state: Mutex<PeerState>,
}

/// Why an initiation has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InitiationError {
    /// The peer's own, but not newer than an earlier one: a replay, or its clock has gone back.
    Stale,
    Dropped(DropReason),
}

impl From<DropReason> for InitiationError {
    fn from(reason: DropReason) -> Self {
        Self::Dropped(reason)
    }
}

/// The context of a peer while its lock is held.
pub(super) struct PeerContext<'a> {
    pub(super) now: Instant,
    pub(super) factory: &'a dyn EngineFactory,
    pub(super) secret: &'a StaticSecret,
    pub(super) dice: &'a Dice,
    pub(super) seen: &'a SeenStamps,
    pub(super) alarms: &'a Alarms,
    pub(super) waiting_total: &'a AtomicUsize,
    pub(super) events: &'a broadcast::Sender<TunnelEvent>,
    pub(super) drops: &'a Drops,
    pub(super) out: &'a mut Outgoing,
}

/// Everything about a peer that changes. Locked for one batch of this peer at a time.
pub(super) struct PeerState {
    id: PeerIndex,
    name: Arc<str>,
    pub(super) removed: bool,
    keys: ArrayVec<KeyState, MAX_KEYS>,
    sessions: u64,
    preshared_key: Option<PresharedKey>,
    candidates: Vec<SocketAddr>,
    keepalive: Option<Duration>,
    call_out: bool,
    endpoint: Option<Endpoint>,
    path: PathMtu,
    waiting: VecDeque<Box<[u8]>>,
    waiting_bytes: usize,
    rx_bytes: u64,
    tx_bytes: u64,
    last_rx: Option<Instant>,
    last_tx: Option<Instant>,
    /// When the first data went out that nothing has come back for.
    unanswered: Option<Instant>,
    /// Initiations since something authentic came.
    attempts: u32,
    last_attempt: Option<Instant>,
    next_attempt: Option<Instant>,
    /// When to call although there may be a session: it is most likely gone at one end.
    call_at: Option<Instant>,
    /// Whether 90 seconds of attempts have passed without an answer.
    given_up: bool,
    /// Whether anything passed since the last tick.
    busy: bool,
    /// When the alarm is set for.
    due: Option<Instant>,
}

/// One of the peer's keys.
struct KeyState {
    public: PublicKey,
    /// 24 bits that identify datagrams for this key's sessions.
    index: u32,
    /// Made when first needed.
    engine: Option<Box<dyn NoiseEngine>>,
    /// The shared secret of both keys, computed on first use.
    shared: Option<SharedSecret>,
    ticked: Instant,
    ticking: bool,
    /// When the newest session came up.
    established: Option<Instant>,
    /// Which of the peer's sessions it is, counted over both keys.
    session: u64,
    initiator: bool,
    /// We answered an initiation, and this session's first message has not come yet.
    unconfirmed: Option<u32>,
}

/// The outcome of [`PeerState::send`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// Sealed, or waiting for a handshake.
    Taken,
    /// Dropped, for this reason.
    Dropped(DropReason),
}

impl TunnelPeer {
    /// A peer without any session; `indices` has one free index per key.
    pub(super) fn new(now: Instant, id: PeerIndex, config: &PeerConfig, indices: &[u32], mtu: u16) -> Self {
        let name: Arc<str> = config.name.as_str().into();
        let keys = config.keys.iter().zip(indices).map(|(key, index)| KeyState::new(now, *key, *index)).collect();
        Self {
            id,
            name: Arc::clone(&name),
            state: Mutex::new(PeerState {
                id,
                name,
                removed: false,
                keys,
                sessions: 0,
                preshared_key: config.preshared_key.clone(),
                candidates: config.candidates.clone(),
                keepalive: config.keepalive,
                call_out: config.call_out,
                endpoint: None,
                path: PathMtu::new(mtu),
                waiting: VecDeque::new(),
                waiting_bytes: 0,
                rx_bytes: 0,
                tx_bytes: 0,
                last_rx: None,
                last_tx: None,
                unanswered: None,
                attempts: 0,
                last_attempt: None,
                next_attempt: None,
                call_at: None,
                given_up: false,
                busy: false,
                due: None,
            }),
        }
    }

    /// The peer's state, for one batch.
    pub(super) fn lock(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyState {
    fn new(now: Instant, public: PublicKey, index: u32) -> Self {
        Self {
            public,
            index,
            engine: None,
            shared: None,
            ticked: now,
            ticking: false,
            established: None,
            session: 0,
            initiator: false,
            unconfirmed: None,
        }
    }

    fn has_session(&self) -> bool {
        self.engine.as_ref().is_some_and(|e| e.has_session())
    }
}

impl PeerState {
    /// Index and key of each of the peer's keys.
    pub(super) fn indices(&self) -> impl Iterator<Item = (u32, PublicKey)> + '_ {
        self.keys.iter().map(|k| (k.index, k.public))
    }

    /// Applies `config`, and keeps unchanged sessions and endpoint. `index` returns a free index for a new key.
    pub(super) fn reconfigure(
        &mut self,
        cx: &mut PeerContext<'_>,
        config: &PeerConfig,
        mtu: u16,
        mut index: impl FnMut() -> u32,
    ) {
        let mut changed = (self.keepalive, self.call_out) != (config.keepalive, config.call_out);
        if self.preshared_key != config.preshared_key {
            self.preshared_key.clone_from(&config.preshared_key);
            for key in &mut self.keys {
                *key = KeyState::new(cx.now, key.public, key.index);
            }
            changed = true;
        }
        if !self.keys.iter().map(|k| &k.public).eq(&config.keys) {
            let mut old = std::mem::take(&mut self.keys);
            for public in config.keys.iter().take(MAX_KEYS) {
                let kept = old.iter().position(|k| k.public == *public);
                self.keys.push(match kept {
                    Some(at) => old.remove(at),
                    None => KeyState::new(cx.now, *public, index()),
                });
            }
            changed = true;
        }
        if self.candidates != config.candidates {
            self.candidates.clone_from(&config.candidates);
            changed = true;
        }
        self.keepalive = config.keepalive;
        self.call_out = config.call_out;
        self.path.set_route(mtu);
        if changed {
            if !self.is_alive(cx.now) {
                self.attempts = 0;
                self.last_attempt = None;
                self.given_up = false;
            }
            self.start(cx);
        }
    }

    /// Drops all sessions and pending packets; nothing passes from now on.
    pub(super) fn remove(&mut self, cx: &mut PeerContext<'_>) {
        self.removed = true;
        self.drop_waiting(cx, DropReason::OutPeerRemoved);
        self.keys.clear();
        self.endpoint = None;
        self.due = None;
    }

    /// Largest inner packet that the path carries.
    pub(super) fn inner_mtu(&self) -> u16 {
        self.path.inner()
    }

    /// Call once before the packets of a batch: pending packets go first.
    pub(super) fn begin_batch(&mut self, cx: &mut PeerContext<'_>) -> Option<usize> {
        self.flush(cx);
        self.sending_key()
    }

    /// The key with the newest session, to be given to [`send`](Self::send) for the packets of one batch.
    fn sending_key(&self) -> Option<usize> {
        (0..self.keys.len()).filter(|k| self.keys[*k].has_session()).max_by_key(|k| self.keys[*k].session)
    }

    /// Seals `padded`, a packet with its padding, or keeps `packet` until there is a session.
    pub(super) fn send(&mut self, cx: &mut PeerContext<'_>, key: Option<usize>, packet: &[u8], padded: &[u8]) -> Sent {
        if self.removed {
            return Sent::Dropped(DropReason::OutPeerRemoved);
        }
        if let (Some(key), Some(to)) = (key, self.endpoint) {
            if self.seal(cx, key, padded, to) {
                self.busy = true;
                self.unanswered.get_or_insert(cx.now);
                return Sent::Taken;
            }
            // Only a full outgoing batch is left as a reason: wait for the next.
            return self.wait(cx, packet);
        }
        if !self.has_target() {
            return Sent::Dropped(DropReason::OutNoEndpoint);
        }
        self.wait(cx, packet)
    }

    /// To be called once after the packets of a batch: initiates if something waits, and sets the alarm.
    pub(super) fn sent_batch(&mut self, cx: &mut PeerContext<'_>) {
        if !self.waiting.is_empty() && self.sending_key().is_none() {
            self.initiate(cx);
        }
        self.schedule(cx);
    }

    /// Opens a transport message for the key of `index`, which came from `from`.
    pub(super) fn open(
        &mut self,
        cx: &mut PeerContext<'_>,
        index: u32,
        datagram: &[u8],
        from: Endpoint,
        into: &mut [u8],
    ) -> Opened {
        let Some(at) = self.keys.iter().position(|k| k.index == index) else {
            return Opened::Refused(DropReason::InUnknownIndex);
        };
        let key = &mut self.keys[at];
        let Some(engine) = key.engine.as_mut() else {
            return Opened::Refused(DropReason::InNoSession);
        };
        let opened = engine.open(datagram, into);
        if let Opened::Refused(_) = opened {
            return opened;
        }
        if key.unconfirmed.is_some() && key.unconfirmed == receiver(datagram) {
            self.session_up(cx, at, false);
        }
        self.on_authenticated(cx, datagram.len(), from);
        opened
    }

    /// Call once after the messages of a batch: sends pending packets, and sets the alarm.
    pub(super) fn opened_batch(&mut self, cx: &mut PeerContext<'_>) {
        self.busy = true;
        self.flush(cx);
        self.schedule(cx);
    }

    /// Takes in an initiation by the key of `index`, which came from `from`, if it is newer than all before.
    pub(super) fn initiation(
        &mut self,
        cx: &mut PeerContext<'_>,
        index: u32,
        initiation: &Initiation<'_>,
        message: &[u8],
        from: Endpoint,
    ) -> Result<(), InitiationError> {
        let key = self.keys.iter_mut().find(|k| k.index == index).ok_or(DropReason::InUnknownIndex)?;
        let public = x25519_dalek::PublicKey::from(*key.public.as_bytes());
        let shared = key.shared.get_or_insert_with(|| cx.secret.diffie_hellman(&public));
        let stamp = initiation.stamp(shared).ok_or(DropReason::HandshakeRefused)?;
        if cx.seen.get(&key.public).is_some_and(|seen| stamp <= seen) {
            return Err(InitiationError::Stale);
        }
        let public = key.public;
        self.handshake(cx, index, message, from)?;
        cx.seen.note(&public, stamp);
        Ok(())
    }

    /// Takes in a handshake message for the key of `index`, which came from `from`.
    pub(super) fn handshake(
        &mut self,
        cx: &mut PeerContext<'_>,
        index: u32,
        message: &[u8],
        from: Endpoint,
    ) -> Result<(), DropReason> {
        let at = self.keys.iter().position(|k| k.index == index);
        let at = at.ok_or(DropReason::InUnknownIndex)?;
        self.catch_up(cx, at);
        self.engine(cx, at);
        let key = &mut self.keys[at];
        let engine = key.engine.as_mut().ok_or(DropReason::InNoSession)?;
        let out = cx.out.room(0).ok_or(DropReason::UdpSendFull)?;
        let done = engine.handshake(message, out);
        match done {
            Handshaken::Respond(len) => {
                key.ticking = true;
                key.unconfirmed = out.get(4..8).and_then(|i| i.first_chunk()).map(|i| u32::from_le_bytes(*i));
                // It may be a replay from any address: the endpoint and the peer's state wait for the first message of
                // the session.
                cx.out.commit(len, from, Some(self.id), self.path.without_df());
                self.rx_bytes += message.len() as u64;
                self.tx_bytes += len as u64;
            }
            Handshaken::Established(len) => {
                key.ticking = true;
                self.session_up(cx, at, true);
                self.on_authenticated(cx, message.len(), from);
                self.transmit(cx, len, from);
            }
            Handshaken::Cookie => {}
            Handshaken::Refused => return Err(DropReason::HandshakeRefused),
        }
        self.flush(cx);
        self.schedule(cx);
        Ok(())
    }

    /// Runs due actions.
    pub(super) fn on_alarm(&mut self, cx: &mut PeerContext<'_>) {
        self.due = None;
        if self.removed {
            return;
        }
        for at in 0..self.keys.len() {
            if self.keys[at].ticking {
                self.tick(cx, at);
            }
        }
        self.flush(cx);
        self.renew(cx);
        self.keep_alive(cx);
        if self.next_attempt.is_some_and(|at| at <= cx.now) {
            self.next_attempt = None;
            if self.sending_key().is_none() && self.has_target() {
                self.attempt(cx, self.key_to_try(), !self.given_up);
            }
        }
        if !self.waiting.is_empty() && self.sending_key().is_none() {
            // The crate forgets our call, and repeats it no more, when the peer's calls come in between.
            self.initiate(cx);
        }
        if self.call_at.is_some_and(|at| at <= cx.now) {
            self.call_at = None;
            self.initiate(cx);
        }
        if self.path.retry_at().is_some_and(|at| at <= cx.now) && self.path.reset() {
            self.report_mtu(cx);
        }
        self.busy = false;
        self.schedule(cx);
    }

    /// Takes in that the path to `remote` carries outer packets of `outer` bytes.
    pub(super) fn path_mtu(&mut self, cx: &mut PeerContext<'_>, remote: SocketAddr, outer: u16) {
        let Some(endpoint) = self.endpoint else { return };
        if endpoint.remote.ip() == remote.ip() && self.path.lower(cx.now, endpoint.remote, outer) {
            self.report_mtu(cx);
            self.schedule(cx);
        }
    }

    /// Notes that this node lost its source address.
    pub(super) fn source_failed(&mut self) {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.source = None;
        }
    }

    /// Whether the tunnel can be believed up: there is a session (none lives beyond 180 s), and no data has been without
    /// an answer for 15 s.
    pub(super) fn is_alive(&self, now: Instant) -> bool {
        self.sending_key().is_some() && self.unanswered.is_none_or(|at| now.saturating_duration_since(at) < UNANSWERED)
    }

    /// Its sessions and handshake attempts.
    pub(super) fn session(&self, now: Instant) -> TunnelSession {
        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        TunnelSession {
            alive: self.is_alive(now),
            calls: self.attempts,
            last_call: self.last_attempt.map(|at| now.saturating_duration_since(at)),
            keys: count(self.keys.len()),
            endpoints: count(self.candidates.len()),
        }
    }

    /// When something authentic last came.
    pub(super) fn heard(&self) -> Option<Instant> {
        self.last_rx
    }

    /// Where the last authentic message came from.
    pub(super) fn heard_from(&self) -> Option<SocketAddr> {
        self.endpoint.map(|endpoint| endpoint.remote)
    }

    /// When the newest session came up.
    pub(super) fn latest_handshake(&self) -> Option<Instant> {
        self.keys.iter().filter_map(|k| k.established).max()
    }

    /// All endpoints of the peer: the last heard one, and the configured ones.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.endpoint.map(|endpoint| endpoint.remote).into_iter().chain(self.candidates.iter().copied())
    }

    /// Where the peer is, or would be tried first.
    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint.map(|e| e.remote).or_else(|| self.candidates.first().copied())
    }

    /// Bytes received and sent.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.rx_bytes, self.tx_bytes)
    }

    /// Whether outer packets go without DF.
    pub(super) fn without_df(&self) -> bool {
        self.path.without_df()
    }

    fn seal(&mut self, cx: &mut PeerContext<'_>, key: usize, padded: &[u8], to: Endpoint) -> bool {
        let Some(engine) = self.keys.get_mut(key).and_then(|k| k.engine.as_mut()) else {
            return false;
        };
        let Some(out) = cx.out.room(padded.len() + OVERHEAD) else {
            return false;
        };
        match engine.seal(padded, out) {
            Some(len) => {
                self.transmit(cx, len, to);
                true
            }
            None => false,
        }
    }

    fn transmit(&mut self, cx: &mut PeerContext<'_>, len: usize, to: Endpoint) {
        cx.out.commit(len, to, Some(self.id), self.path.without_df());
        self.tx_bytes += len as u64;
        self.last_tx = Some(cx.now);
    }

    /// Takes in that an authentic message came from `from`.
    fn on_authenticated(&mut self, cx: &mut PeerContext<'_>, len: usize, from: Endpoint) {
        self.rx_bytes += len as u64;
        self.last_rx = Some(cx.now);
        self.unanswered = None;
        self.attempts = 0;
        self.given_up = false;
        if self.endpoint == Some(from) {
            return;
        }
        let before = self.endpoint.replace(from).map(|e| e.remote);
        if before != Some(from.remote) {
            if before.is_some_and(|b| b.ip() != from.remote.ip()) && self.path.reset() {
                self.report_mtu(cx);
            }
            let _ = cx.events.send(TunnelEvent::Endpoint { peer: self.name.to_string(), endpoint: from.remote });
        }
    }

    fn session_up(&mut self, cx: &PeerContext<'_>, at: usize, initiator: bool) {
        self.sessions += 1;
        let key = &mut self.keys[at];
        key.established = Some(cx.now);
        key.session = self.sessions;
        key.initiator = initiator;
        key.unconfirmed = None;
        let _ = cx.events.send(TunnelEvent::Handshake { peer: self.name.to_string() });
    }

    fn report_mtu(&self, cx: &PeerContext<'_>) {
        let _ = cx.events.send(TunnelEvent::PeerMtu {
            peer: self.name.to_string(),
            inner_mtu: self.path.inner(),
            without_df: self.path.without_df(),
        });
    }

    /// Whether the alarm that rang is the one that is set.
    pub(super) fn is_due(&self, at: Instant) -> bool {
        self.due == Some(at)
    }
}

fn receiver(datagram: &[u8]) -> Option<u32> {
    datagram.get(4..8).and_then(|i| i.first_chunk()).map(|i| u32::from_le_bytes(*i))
}
