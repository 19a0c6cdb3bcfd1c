//! The latest handshake timestamp of each peer.

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use etcd_schema::PublicKey;

/// TAI64N's label of 1970-01-01T00:00:00Z, as WireGuard has it.
const EPOCH: u64 = (1 << 62) + 37;
const SECOND: u64 = 1_000_000_000;

/// A TAI64N time stamp, ordered by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp([u8; 12]);

impl Stamp {
    /// As it is on the wire.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }

    /// As it is on the wire.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 12] {
        self.0
    }

    /// The time stamp of an initiation that is made at `time`.
    #[must_use]
    pub fn at(time: SystemTime) -> Self {
        let nanos = nanos_of(time);
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&(EPOCH + nanos / SECOND).to_be_bytes());
        bytes[8..].copy_from_slice(&((nanos % SECOND) as u32).to_be_bytes());
        Self(bytes)
    }

    /// How far it is ahead of `clock`; zero if it is not.
    #[must_use]
    pub fn ahead_of(self, clock: SystemTime) -> Duration {
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        let (seconds, nanos) = (number(&self.0[..8]).saturating_sub(EPOCH), number(&self.0[8..]));
        Duration::from_nanos(seconds.saturating_mul(SECOND).saturating_add(nanos).saturating_sub(nanos_of(clock)))
    }
}

/// Hexadecimal.
impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Stamp {
    type Err = InvalidStamp;

    fn from_str(text: &str) -> Result<Self, InvalidStamp> {
        let mut bytes = [0; 12];
        if text.len() != 24 || !text.is_ascii() {
            return Err(InvalidStamp);
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| InvalidStamp)?;
        }
        Ok(Self(bytes))
    }
}

/// A time stamp is 24 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a time stamp is 24 hexadecimal digits")]
pub struct InvalidStamp;

/// The greatest time stamp that came in initiations of each peer key. Losing one lets earlier initiations be answered,
/// which moves no endpoint and ends no session.
#[derive(Debug, Default)]
pub(super) struct SeenStamps(Mutex<HashMap<PublicKey, Stamp>>);

impl SeenStamps {
    pub(super) fn new(seen: HashMap<PublicKey, Stamp>) -> Self {
        Self(Mutex::new(seen))
    }

    pub(super) fn get(&self, key: &PublicKey) -> Option<Stamp> {
        self.lock().get(key).copied()
    }

    pub(super) fn note(&self, key: &PublicKey, stamp: Stamp) {
        self.lock().insert(*key, stamp);
    }

    /// All timestamps, without those of keys that `is_known` no longer knows.
    pub(super) fn retain(&self, is_known: impl Fn(&PublicKey) -> bool) -> HashMap<PublicKey, Stamp> {
        let mut seen = self.lock();
        seen.retain(|key, _| is_known(key));
        seen.clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PublicKey, Stamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos_of(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_written_as_they_are_read() {
        let now = SystemTime::now();
        let stamp = Stamp::at(now);
        assert_eq!(stamp.to_string().parse(), Ok(stamp));
        for bad in ["", "00", "zz0000000000000000000000", "4000000000000000000000000", "é0000000000000000000000"] {
            assert_eq!(bad.parse::<Stamp>(), Err(InvalidStamp), "{bad}");
        }
        assert_eq!(Stamp::at(now + Duration::from_secs(90)).ahead_of(now), Duration::from_secs(90));
        assert_eq!(stamp.ahead_of(now + Duration::from_secs(90)), Duration::ZERO);
        assert!(Stamp::from_bytes([0xff; 12]).ahead_of(now) > Duration::from_secs(1 << 30));
    }
}
