//! The WireGuard protocol for one pair of keys, behind a trait.
//!
//! Where boringtun deviates from the protocol, and the consequence here:
//!
//! - Only one core at a time can use a session, so a direction of one peer is as fast as one core. The tunnel works in
//!   batches, with two threads from four cores on.
//! - The replay window has 1024 packets (others: 8192). One thread seals and sends, so only the network can reorder
//!   packets beyond it.
//! - Received counters from 2^64 - 2^13 on are refused before boringtun adds to them.
//! - Payloads are not padded. The tunnel pads to 16 bytes, never beyond the route's MTU.
//! - Eight bits of an index count handshakes, so an observer of datagrams can count a peer's handshakes. The upper 24
//!   bits are random and unique in the node.
//! - A cookie's MAC covers the source address without its port: hosts behind one NAT share a cookie.
//! - One load counter for all sources would let one flooder put all of them in cookie mode. Admission is decided before
//!   boringtun, per source.
//! - Persistent keepalive ends after 90 s without an answer, which would cut off a node behind NAT. Keepalive and
//!   handshake initiation are the tunnel's own.
//! - Timestamps of initiations are the clock at the creation of the `Tunn`, plus the elapsed time. After the clock has
//!   gone back, peers refuse them until it has caught up; a meshd peer that refuses one initiates itself.
//! - Received timestamps are forgotten with the `Tunn`. The tunnel keeps them, and refuses initiations that are not
//!   newer.
//! - An initiation replaces our own in flight. Pending packets trigger another one after 5 s.
//! - There are 8 sessions; a new one replaces the oldest, even one in use. An index is skipped if its session would
//!   replace one of the four newest confirmed ones, the last answered one, or the current sending one. Packets in
//!   flight for longer than two renewals, at least 10 s, are lost.
//! - An answered but unconfirmed session may take the sending slot. Here none gets it.
//! - The pre-shared key inside a `Tunn` is not wiped and shows in its `Debug`, which is never printed.

use std::sync::Arc;

use arrayvec::ArrayVec;
use boringtun::noise::{Tunn, TunnResult, errors::WireGuardError, rate_limiter::RateLimiter};
use etcd_schema::{PresharedKey, PublicKey};
use x25519_dalek::StaticSecret;

use super::drops::DropReason;

/// WireGuard's limit on a session's counter; beyond it a session must not be used.
pub(super) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Handshakes and sessions with one peer key. Output buffers have at least
/// [`MESSAGE_ROOM`](super::batch::MESSAGE_ROOM) bytes, and 32 more than the input.
///
/// Implementations keep time by themselves; [`tick`](Self::tick) is to be called about four times a second while
/// anything is under way, and before any other call when the last one is longer ago.
pub(super) trait NoiseEngine: Send {
    /// Whether there is a session to send with.
    fn has_session(&self) -> bool;

    /// Seals one packet, or a keepalive when `plaintext` is empty; `None` without a session.
    fn seal(&mut self, plaintext: &[u8], out: &mut [u8]) -> Option<usize>;

    /// Opens a transport message into `out`.
    fn open(&mut self, datagram: &[u8], out: &mut [u8]) -> Opened;

    /// Takes in a handshake message (initiation, response, cookie).
    fn handshake(&mut self, datagram: &[u8], out: &mut [u8]) -> Handshaken;

    /// Makes a new initiation, also when one is under way.
    fn initiate(&mut self, out: &mut [u8]) -> Option<usize>;

    /// Lets time pass.
    fn tick(&mut self, out: &mut [u8]) -> Tick;
}

/// The result of opening a transport message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// A packet of this length, authentic and seen for the first time.
    Packet(usize),
    /// Authentic and empty.
    Keepalive,
    /// Authentic, but the content is no IP packet.
    NotIp,
    /// Not from the peer, or not for the first time.
    Refused(DropReason),
}

/// The result of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handshaken {
    /// An authentic initiation; the response of this length goes back to its sender.
    Respond(usize),
    /// An authentic response: a session is up, and the keepalive of this length confirms it.
    Established(usize),
    /// A cookie was stored. Only its content is authentic; it does not prove the peer's address.
    Cookie,
    /// The message is invalid.
    Refused,
}

/// The result of a timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tick {
    /// Nothing.
    Nothing,
    /// A message of this length is to be sent.
    Send(usize),
    /// All sessions and handshakes are over; nothing will happen until [`NoiseEngine::initiate`] or an initiation.
    Expired,
}

/// Makes engines for peer keys.
pub(super) trait EngineFactory: Send + Sync {
    /// An engine for `peer`; `index` has 24 bits, the bits 8 to 31 of each of its session indices.
    fn make(&self, peer: &PublicKey, psk: Option<&PresharedKey>, index: u32) -> Box<dyn NoiseEngine>;
}

/// Engines of the boringtun crate.
pub(super) struct BoringtunFactory {
    secret: StaticSecret,
    limiter: Arc<RateLimiter>,
}

impl BoringtunFactory {
    pub(super) fn new(secret: StaticSecret) -> Self {
        let public = x25519_dalek::PublicKey::from(&secret);
        Self {
            secret,
            // Admission is decided before an engine sees a message; this one admits all.
            limiter: Arc::new(RateLimiter::new(&public, u64::MAX)),
        }
    }
}

impl EngineFactory for BoringtunFactory {
    fn make(&self, peer: &PublicKey, psk: Option<&PresharedKey>, index: u32) -> Box<dyn NoiseEngine> {
        let tunn = Tunn::new(
            self.secret.clone(),
            x25519_dalek::PublicKey::from(*peer.as_bytes()),
            psk.map(|k| *k.secret_bytes()),
            // Persistent keepalive is ours: the crate's sends also while there is traffic, and ends for good after
            // 90 seconds without an answer.
            None,
            index,
            Some(Arc::clone(&self.limiter)),
        );
        Box::new(Boringtun {
            tunn,
            last: index << 8,
            used: ArrayVec::new(),
            answered: None,
            current: 0,
            made: [0; SESSIONS as usize],
            ticks: 0,
        })
    }
}

struct Boringtun {
    tunn: Tunn,
    /// The last of our indices that was given out; the next one is one more in its lowest byte.
    last: u32,
    /// Indices of the newest confirmed sessions, newest first: among them ours for sending and the peer's, which differ
    /// after crossed handshakes. Packets in flight in earlier sessions still arrive.
    used: ArrayVec<u32, USED>,
    /// Index of the session that was answered last: the peer may send in it already.
    answered: Option<u32>,
    /// Index of the session that the crate sends in, which it does not tell: the newest one that was confirmed. Its
    /// place is sent in whatever is there, so that no session may take it that was only answered: the initiation may
    /// have been recorded, and the response lost.
    current: u32,
    /// When the session in each place was made, in ticks: the crate's measure of which one is newer.
    made: [u64; SESSIONS as usize],
    /// How often time has passed.
    ticks: u64,
}

/// How many confirmed sessions are kept from being replaced: those of two renewals, in which both ends may call.
const USED: usize = 4;
/// Sessions that the crate has room for, by the lowest bits of our index.
const SESSIONS: u32 = 8;

impl Boringtun {
    /// Takes in that a message has confirmed a session. `idle`: the crate had none to send in before.
    fn use_session(&mut self, index: u32, idle: bool) {
        if idle || self.made[place(index)] >= self.made[place(self.current)] {
            self.current = index;
        }
        if self.used.contains(&index) {
            return;
        }
        // How many indices were given out since, of which the lowest byte counts.
        let age = |index: u32| (self.last as u8).wrapping_sub(index as u8);
        let at = self.used.iter().position(|used| age(*used) > age(index)).unwrap_or(self.used.len());
        if at < USED {
            self.used.truncate(USED - 1);
            self.used.insert(at, index);
        }
    }

    /// Whether a session of this index would take the place of one in use.
    fn replaces_used(&self, index: u32) -> bool {
        self.used.iter().chain(&self.answered).any(|used| place(*used) == place(index))
    }

    /// Skips indices whose sessions would replace ones in use, before an initiation is answered. The messages created
    /// for this are not sent; they may replace an initiation of ours, which the peer's makes needless.
    fn make_room(&mut self, out: &mut [u8]) {
        loop {
            let next = u32::from((self.last as u8).wrapping_add(1));
            let taken = self.replaces_used(next) || place(next) == place(self.current);
            if !taken || self.format_initiation(out).is_none() {
                return;
            }
        }
    }

    fn format_initiation(&mut self, out: &mut [u8]) -> Option<usize> {
        match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => {
                let length = message.len();
                self.last = index_at(message, 4).unwrap_or(self.last);
                Some(length)
            }
            _ => None,
        }
    }
}

/// Where the crate keeps the session of an index.
const fn place(index: u32) -> usize {
    (index % SESSIONS) as usize
}

fn index_at(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..at + 4)?.first_chunk().map(|index| u32::from_le_bytes(*index))
}

impl NoiseEngine for Boringtun {
    fn has_session(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some()
    }

    fn seal(&mut self, plaintext: &[u8], out: &mut [u8]) -> Option<usize> {
        match self.tunn.encapsulate(plaintext, out) {
            TunnResult::WriteToNetwork(message) if message[0] == 4 => Some(message.len()),
            _ => None,
        }
    }

    fn open(&mut self, datagram: &[u8], out: &mut [u8]) -> Opened {
        // The crate adds to the counter before it checks anything.
        match datagram.get(8..16).and_then(|c| c.first_chunk()) {
            Some(counter) if u64::from_le_bytes(*counter) < REJECT_AFTER_MESSAGES => {}
            Some(_) => return Opened::Refused(DropReason::InCounterExhausted),
            None => return Opened::Refused(DropReason::InMalformed),
        }
        let index = index_at(datagram, 4).unwrap_or(self.current);
        let idle = index != self.current && !self.has_session();
        let opened = match self.tunn.decapsulate(None, datagram, out) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet(packet.len())
            }
            TunnResult::Done => Opened::Keepalive,
            // The only error that comes after authentication, and, since the caller has looked at the message's
            // type and length, from nowhere else.
            TunnResult::Err(WireGuardError::InvalidPacket) => Opened::NotIp,
            TunnResult::Err(WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter) => {
                Opened::Refused(DropReason::InReplayed)
            }
            TunnResult::Err(WireGuardError::NoCurrentSession | WireGuardError::WrongIndex) => {
                Opened::Refused(DropReason::InNoSession)
            }
            TunnResult::Err(_) | TunnResult::WriteToNetwork(_) => Opened::Refused(DropReason::InUnauthentic),
        };
        if !matches!(opened, Opened::Refused(_)) {
            self.use_session(index, idle);
        }
        opened
    }

    fn handshake(&mut self, datagram: &[u8], out: &mut [u8]) -> Handshaken {
        let kind = datagram.first();
        if kind == Some(&1) {
            self.make_room(out);
        }
        let idle = !self.has_session();
        match (kind, self.tunn.decapsulate(None, datagram, out)) {
            (Some(1), TunnResult::WriteToNetwork(message)) => {
                let length = message.len();
                self.last = index_at(message, 4).unwrap_or(self.last);
                self.answered = Some(self.last);
                self.made[place(self.last)] = self.ticks;
                Handshaken::Respond(length)
            }
            (Some(2), TunnResult::WriteToNetwork(message)) => {
                let length = message.len();
                let index = index_at(datagram, 8).unwrap_or(self.current);
                self.made[place(index)] = self.ticks;
                self.use_session(index, idle);
                Handshaken::Established(length)
            }
            (Some(3), TunnResult::Done) => Handshaken::Cookie,
            _ => Handshaken::Refused,
        }
    }

    fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        let mut length = self.format_initiation(out)?;
        while self.replaces_used(self.last) {
            length = self.format_initiation(out)?;
        }
        Some(length)
    }

    fn tick(&mut self, out: &mut [u8]) -> Tick {
        self.ticks += 1;
        let tick = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Tick::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            _ => Tick::Nothing,
        };
        if !self.has_session() {
            self.used.clear();
        }
        match tick {
            Tick::Send(_) if out[0] == 1 => {
                self.last = index_at(out, 4).unwrap_or(self.last);
                if self.replaces_used(self.last) { self.initiate(out).map_or(Tick::Nothing, Tick::Send) } else { tick }
            }
            _ => tick,
        }
    }
}
