//! Admission of handshake messages: which ones are worth the curve arithmetic.
//!
//! If the first MAC of a message is wrong, its sender does not know our public key, and the message is dropped at the
//! cost of one hash. Under load, or if a source exceeds its share, a message must also carry the cookie that we sent to
//! its source, as a proof of its address. Without a valid one, it gets only a cookie. A flood with a forged address
//! cannot use up the share of the address's owner, because proven sources are counted separately.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use boringtun::noise::{TunnResult, rate_limiter::RateLimiter};

use super::drops::DropReason;

/// A source's share: 20 messages a second, bursts of 5.
const BURST: u32 = 5;
const EVERY: Duration = Duration::from_millis(50);
/// Sources remembered; with the table full the ones that are at rest are forgotten, then all are under suspicion.
const MAX_SOURCES: usize = 8192;
/// Load is over this long after the queue was last an eighth full.
const LATCH: Duration = Duration::from_secs(1);

/// The decision on a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AdmissionVerdict {
    /// Work on it.
    Admit,
    /// Send back the cookie reply of this length.
    Cookie(usize),
    /// Drop it.
    Drop(DropReason),
}

pub(super) struct Admission {
    /// Checks the first MAC only.
    lenient: RateLimiter,
    /// Demands a cookie always.
    strict: RateLimiter,
    claimed: Buckets,
    proven: Buckets,
    loaded_until: Option<Instant>,
}

impl Admission {
    pub(super) fn new(own: &x25519_dalek::PublicKey) -> Self {
        Self {
            lenient: RateLimiter::new(own, u64::MAX),
            strict: RateLimiter::new(own, 0),
            claimed: Buckets::default(),
            proven: Buckets::default(),
            loaded_until: None,
        }
    }

    /// Takes in that the queue of admitted messages is an eighth full.
    pub(super) fn loaded(&mut self, now: Instant) {
        self.loaded_until = Some(now + LATCH);
    }

    /// Whether the node is under load.
    pub(super) fn is_loaded(&self, now: Instant) -> bool {
        self.loaded_until.is_some_and(|until| now < until)
    }

    /// Judges a message that has the type and length of an initiation or a response. `out` has room for 64 bytes.
    pub(super) fn judge(&mut self, now: Instant, from: IpAddr, message: &[u8], out: &mut [u8]) -> AdmissionVerdict {
        if self.lenient.verify_packet(None, message, &mut []).is_err() {
            return AdmissionVerdict::Drop(DropReason::HandshakeBadMac);
        }
        let loaded = self.is_loaded(now);
        // Charged even under load, so that the end of load finds the flooder's share used up.
        let within_share = self.claimed.take(now, from);
        if within_share && !loaded {
            return AdmissionVerdict::Admit;
        }
        match self.strict.verify_packet(Some(from), message, out) {
            Ok(_) if self.proven.take(now, from) => AdmissionVerdict::Admit,
            Ok(_) => AdmissionVerdict::Drop(DropReason::HandshakeRateLimited),
            Err(TunnResult::WriteToNetwork(cookie)) => AdmissionVerdict::Cookie(cookie.len()),
            Err(_) => AdmissionVerdict::Drop(DropReason::HandshakeBadMac),
        }
    }
}

/// A token bucket per source: an IPv4 address, or an IPv6 network of 64 bits.
#[derive(Debug, Default)]
struct Buckets {
    by_source: HashMap<IpAddr, Bucket>,
    swept: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl Buckets {
    fn take(&mut self, now: Instant, from: IpAddr) -> bool {
        let source = match from {
            IpAddr::V4(_) => from,
            IpAddr::V6(a) => {
                let net = u128::from(a) & !u128::from(u64::MAX);
                IpAddr::V6(Ipv6Addr::from(net))
            }
        };
        if self.by_source.len() >= MAX_SOURCES && !self.by_source.contains_key(&source) {
            let rested = EVERY * BURST;
            let recent = |at: Instant| now.saturating_duration_since(at) < rested;
            // A sweep looks at the whole table: not for every message of a flood.
            if !self.swept.is_some_and(recent) {
                self.swept = Some(now);
                self.by_source.retain(|_, b| recent(b.filled));
            }
            if self.by_source.len() >= MAX_SOURCES {
                return false;
            }
        }
        let bucket = self.by_source.entry(source).or_insert(Bucket { tokens: BURST, filled: now });
        let elapsed = now.saturating_duration_since(bucket.filled);
        let gained = (elapsed.as_nanos() / EVERY.as_nanos()).min(u128::from(BURST)) as u32;
        if gained > 0 {
            bucket.tokens = BURST.min(bucket.tokens + gained);
            bucket.filled = now;
        }
        match bucket.tokens.checked_sub(1) {
            Some(left) => {
                bucket.tokens = left;
                true
            }
            None => false,
        }
    }
}
