//! From the network to the TUN: demultiplex, open, check source and destination, judge, merge.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use super::{
    admission::{Admission, AdmissionVerdict},
    batch::{BATCH, Batch, Endpoint, HEADROOM, Outgoing, SourceAddress},
    core::Core,
    drops::{DropReason, Drops},
    engine::Opened,
    hooks::Judge,
    shared::Cached,
    strangers::Strangers,
    tables::Tables,
};

/// Datagrams as they came from a socket: one, or several that the kernel handed over together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received<'a> {
    /// Their payloads, one behind the other.
    pub(super) bytes: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    pub(super) stride: usize,
    pub(super) from: SocketAddr,
    /// The address it came to.
    pub(super) to: Option<SourceAddress>,
}

/// A handshake message that was admitted, on its way to the thread that works on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admitted {
    message: [u8; INITIATION_LEN],
    len: u8,
    pub(super) from: Endpoint,
}

impl Admitted {
    pub(super) fn message(&self) -> &[u8] {
        &self.message[..usize::from(self.len)]
    }
}

/// Where admitted handshake messages go.
pub(super) trait HandshakeQueue {
    /// Queues the message; returns false if there is no room.
    fn offer(&mut self, message: Admitted) -> bool;
}

/// Capacity of the queue to the handshake thread. When the hub of a large mesh restarts, all peers initiate at once,
/// and a dropped initiation is repeated only after 5 s. Load begins at an eighth, which takes that thread a third of a
/// second.
pub(super) const HANDSHAKES: usize = 8192;

const INITIATION: u32 = 1;
const RESPONSE: u32 = 2;
const COOKIE: u32 = 3;
const DATA: u32 = 4;
const INITIATION_LEN: usize = 148;
const RESPONSE_LEN: usize = 92;
const COOKIE_LEN: usize = 64;
const MIN_DATA_LEN: usize = 32;

/// State of the inbound thread between batches.
pub(super) struct Inbound {
    core: Arc<Core>,
    tables: Cached<Tables>,
    pub(super) drops: Arc<Drops>,
    judge: Box<dyn Judge>,
    admission: Admission,
    strangers: Strangers,
    /// Queued handshake messages; incremented here and decremented by the handshake thread.
    pub(super) queued: Arc<AtomicUsize>,
    /// Of each transport message: peer, index of the received datagrams, and index in them; sorted by peer.
    order: Vec<(u32, u16, u16)>,
}

impl Inbound {
    pub(super) fn new(core: Arc<Core>, judge: Box<dyn Judge>) -> Self {
        Self {
            tables: core.tables.cached(),
            drops: core.drops.register(),
            judge,
            admission: Admission::new(&core.public()),
            strangers: Strangers::default(),
            queued: Arc::new(AtomicUsize::new(0)),
            order: Vec::with_capacity(BATCH),
            core,
        }
    }

    /// Opens the datagrams in `received`, at most [`BATCH`] that together fit a batch. Afterwards, inner packets that
    /// passed all checks are undropped in `batch`, replies to the network in `out`, and handshake messages in `queue`.
    pub(super) fn process(
        &mut self,
        now: Instant,
        received: &[Received<'_>],
        batch: &mut Batch,
        out: &mut Outgoing,
        queue: &mut dyn HandshakeQueue,
    ) {
        let tables = Arc::clone(self.tables.refresh(&self.core.tables));
        self.sort(now, &tables, received, out, queue);
        self.open(now, &tables, received, batch, out);
        self.check(&tables, batch);
        if !batch.is_empty() {
            self.judge.judge(now, batch);
        }
        for slot in batch.slots() {
            if let Some(reason) = slot.drop {
                self.drops.count(reason);
            }
        }
    }

    /// Sorts datagrams: transport messages, handshake messages, malformed ones.
    fn sort(
        &mut self,
        now: Instant,
        tables: &Arc<Tables>,
        received: &[Received<'_>],
        out: &mut Outgoing,
        queue: &mut dyn HandshakeQueue,
    ) {
        self.order.clear();
        let mut last = None;
        let datagrams = received.iter().enumerate().flat_map(|(at, r)| {
            r.datagrams().enumerate().map(move |(nth, bytes)| (at, nth, Received { bytes, stride: bytes.len(), ..*r }))
        });
        for (at, nth, datagram) in datagrams {
            let bytes = datagram.bytes;
            let kind = bytes.first_chunk().map(|k| u32::from_le_bytes(*k));
            match (kind, bytes.len()) {
                (Some(DATA), MIN_DATA_LEN..) => {
                    let index = index(bytes, 4);
                    let peer = match last {
                        Some((i, peer)) if i == index => peer,
                        _ => tables.by_index.get(&index).copied(),
                    };
                    last = Some((index, peer));
                    match peer {
                        Some(peer) => self.order.push((peer, at as u16, nth as u16)),
                        None => {
                            self.drops.count(DropReason::InUnknownIndex);
                            self.stranger(now, tables, datagram.from, out);
                        }
                    }
                }
                (Some(INITIATION), INITIATION_LEN) | (Some(RESPONSE), RESPONSE_LEN) => {
                    self.admit(now, &datagram, out, queue);
                }
                (Some(COOKIE), COOKIE_LEN) => self.offer(&datagram, queue),
                _ => self.drops.count(DropReason::InMalformed),
            }
        }
        self.order.sort_unstable();
    }

    /// Handles a datagram of an unknown session: its sender may not know of our restart.
    fn stranger(&mut self, now: Instant, tables: &Arc<Tables>, from: SocketAddr, out: &mut Outgoing) {
        if self.admission.is_loaded(now) {
            return;
        }
        if !self.core.calls.allows(now) {
            return;
        }
        let peer = self.strangers.peer(now, tables, from).and_then(|position| tables.at(position));
        if peer.is_some_and(|peer| peer.lock().stranger(&mut self.core.context(now, &self.drops, out))) {
            self.core.calls.count();
        }
    }

    fn admit(&mut self, now: Instant, datagram: &Received<'_>, out: &mut Outgoing, queue: &mut dyn HandshakeQueue) {
        if self.queued.load(Ordering::Relaxed) >= HANDSHAKES / 8 {
            self.admission.loaded(now);
        }
        let Some(room) = out.room(0) else {
            self.drops.count(DropReason::UdpSendFull);
            return;
        };
        match self.admission.judge(now, datagram.from.ip(), datagram.bytes, room) {
            AdmissionVerdict::Admit => self.offer(datagram, queue),
            AdmissionVerdict::Cookie(len) => {
                self.drops.count(DropReason::HandshakeCookieSent);
                out.commit(len, datagram.endpoint(), None, false);
            }
            AdmissionVerdict::Drop(reason) => self.drops.count(reason),
        }
    }

    fn offer(&self, datagram: &Received<'_>, queue: &mut dyn HandshakeQueue) {
        let mut message = [0; INITIATION_LEN];
        message[..datagram.bytes.len()].copy_from_slice(datagram.bytes);
        self.queued.fetch_add(1, Ordering::Relaxed);
        let admitted = Admitted { message, len: datagram.bytes.len() as u8, from: datagram.endpoint() };
        if !queue.offer(admitted) {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            self.drops.count(DropReason::HandshakeQueueFull);
        }
    }

    fn open(&self, now: Instant, tables: &Tables, received: &[Received<'_>], batch: &mut Batch, out: &mut Outgoing) {
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let Some(peer) = tables.at(group[0].0) else { continue };
            let mut peer = peer.lock();
            let mut cx = self.core.context(now, &self.drops, out);
            let mut any = false;
            for (position, at, nth) in group {
                let received = &received[usize::from(*at)];
                let bytes = received.nth(usize::from(*nth));
                if !batch.has_room() {
                    self.drops.count(DropReason::TunWriteFailed);
                    continue;
                }
                let opened =
                    peer.open(&mut cx, index(bytes, 4), bytes, received.endpoint(), &mut batch.spare()[HEADROOM..]);
                any |= !matches!(opened, Opened::Refused(_));
                match opened {
                    Opened::Packet(len) => batch.push(len, *position),
                    Opened::Keepalive => {}
                    Opened::NotIp => self.drops.count(DropReason::InInnerMalformed),
                    Opened::Refused(reason) => self.drops.count(reason),
                }
            }
            if any {
                peer.opened_batch(&mut cx);
            }
        }
    }

    /// Checks inner source (the sending peer's) and destination (this node's).
    fn check(&self, tables: &Tables, batch: &mut Batch) {
        let mut last = None;
        for (slot, bytes) in batch.iter_mut() {
            let Ok(packet) = packet::Packet::parse(bytes) else {
                slot.drop = Some(DropReason::InInnerMalformed);
                continue;
            };
            slot.packet = Some(packet);
            let owner = match last {
                Some((address, owner)) if address == packet.source => owner,
                _ => tables.prefixes.get(packet.source),
            };
            last = Some((packet.source, owner));
            if owner != Some(slot.peer) {
                slot.drop = Some(DropReason::InWrongSource);
            } else if !tables.is_local(packet.destination) {
                slot.drop = Some(DropReason::InWrongDestination);
            }
        }
    }
}

impl<'a> Received<'a> {
    /// The datagrams, each by itself.
    pub(super) fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        (0..self.count()).map(move |nth| self.nth(nth))
    }

    fn nth(&self, nth: usize) -> &'a [u8] {
        let start = nth * self.stride;
        &self.bytes[start..self.bytes.len().min(start + self.stride)]
    }

    /// How many datagrams there are.
    pub(super) fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.stride.max(1)).max(1)
    }

    /// The first `n` datagrams, and the others if there are more.
    pub(super) fn split_at(&self, n: usize) -> (Self, Option<Self>) {
        match self.bytes.split_at_checked(n * self.stride) {
            Some((first, rest)) if !rest.is_empty() => {
                (Self { bytes: first, ..*self }, Some(Self { bytes: rest, ..*self }))
            }
            _ => (*self, None),
        }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint { remote: self.from, source: self.to }
    }
}

/// Upper 24 bits of the index at `at`.
fn index(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4).and_then(|i| i.first_chunk()) {
        Some(index) => u32::from_le_bytes(*index) >> 8,
        None => u32::MAX,
    }
}
