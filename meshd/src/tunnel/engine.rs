//! WireGuard's protocol for one pair of keys, behind a trait of ours.

use std::sync::Arc;

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
pub(super) trait Engine: Send {
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

/// What a transport message was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// A packet of this length, authentic and seen for the first time.
    Packet(usize),
    /// Authentic and empty.
    Keepalive,
    /// Authentic, but what was inside is no IP packet.
    NotIp,
    /// Not from the peer, or not for the first time.
    Refused(DropReason),
}

/// What a handshake message led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handshaken {
    /// An authentic initiation; the response of this length goes back to its sender.
    Respond(usize),
    /// An authentic response: a session is up, and the keepalive of this length confirms it.
    Established(usize),
    /// A cookie was taken in (authentic as to content only, it says nothing about where the peer is).
    Cookie,
    /// It does not hold.
    Refused,
}

/// What passing time led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tick {
    /// Nothing.
    Nothing,
    /// A message of this length is to be sent.
    Send(usize),
    /// All sessions and handshakes are over; nothing will happen until [`Engine::initiate`] or an initiation.
    Expired,
}

/// Makes engines for peer keys.
pub(super) trait EngineFactory: Send + Sync {
    /// An engine for `peer`; `index` has 24 bits and stands in bits 8 to 31 of every index it gives out.
    fn make(&self, peer: &PublicKey, psk: Option<&PresharedKey>, index: u32) -> Box<dyn Engine>;
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
    fn make(&self, peer: &PublicKey, psk: Option<&PresharedKey>, index: u32) -> Box<dyn Engine> {
        Box::new(Boringtun(Tunn::new(
            self.secret.clone(),
            x25519_dalek::PublicKey::from(*peer.as_bytes()),
            psk.map(|k| *k.secret_bytes()),
            // Persistent keepalive is ours: the crate's sends also while there is traffic, and ends for good after
            // 90 seconds without an answer.
            None,
            index,
            Some(Arc::clone(&self.limiter)),
        )))
    }
}

struct Boringtun(Tunn);

impl Engine for Boringtun {
    fn has_session(&self) -> bool {
        self.0.time_since_last_handshake().is_some()
    }

    fn seal(&mut self, plaintext: &[u8], out: &mut [u8]) -> Option<usize> {
        match self.0.encapsulate(plaintext, out) {
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
        match self.0.decapsulate(None, datagram, out) {
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
        }
    }

    fn handshake(&mut self, datagram: &[u8], out: &mut [u8]) -> Handshaken {
        match (datagram.first(), self.0.decapsulate(None, datagram, out)) {
            (Some(1), TunnResult::WriteToNetwork(message)) => Handshaken::Respond(message.len()),
            (Some(2), TunnResult::WriteToNetwork(message)) => Handshaken::Established(message.len()),
            (Some(3), TunnResult::Done) => Handshaken::Cookie,
            _ => Handshaken::Refused,
        }
    }

    fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        match self.0.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    fn tick(&mut self, out: &mut [u8]) -> Tick {
        match self.0.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Tick::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            _ => Tick::Nothing,
        }
    }
}
