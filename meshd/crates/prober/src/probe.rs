//! The probe that proves a direct path, and its echo.
//!
//! ```text
//!  0        4     5      6        7          8                 24              40
//!  ┌────────┬─────┬──────┬────────┬──────────┬─────────────────┬───────────────┐
//!  │ "mshp" │ ver │ kind │ family │ reserved │ nonce (16 bytes)│ tag (16 bytes)│
//!  └────────┴─────┴──────┴────────┴──────────┴─────────────────┴───────────────┘
//! ```
//!
//! The tag is HMAC-SHA256, truncated to 16 bytes, under a key derived from the two nodes' static X25519 keys. It covers
//! the header, the nonce and both node ids in the order sender, receiver. So no session is needed, an echo is not valid
//! as a probe, and neither can be reflected.

use std::fmt;

use etcd_schema::{NodeId, PublicKey};
use keys::PrivateKey;
use mesh::address::Family;
use ring::hmac;

/// Length of a probe and of an echo, in bytes.
pub(super) const LENGTH: usize = 40;

const MAGIC: [u8; 4] = *b"mshp";
const VERSION: u8 = 1;
const TAG_AT: usize = 24;

/// Which of the two messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MessageKind {
    /// Asks for an echo.
    Probe,
    /// Answers a probe with its nonce.
    Echo,
}

/// The key two nodes share for probes. `Debug` prints no secret.
#[derive(Clone)]
pub(super) struct ProbeKey(hmac::Key);

impl fmt::Debug for ProbeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProbeKey(…)")
    }
}

/// Why a datagram is no probe of that node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProbeError {
    /// Length, magic, version, kind or family do not hold.
    #[error("not a probe of this version")]
    Malformed,
    /// The tag is not that of these two nodes.
    #[error("the probe's authentication tag is invalid")]
    Forged,
}

impl ProbeKey {
    /// The key that the owner of `private` shares with the owner of `public`; the same at both ends.
    #[must_use]
    pub(super) fn derive(private: &PrivateKey, public: &PublicKey) -> Self {
        let shared = private.secret().diffie_hellman(&x25519_dalek::PublicKey::from(*public.as_bytes()));
        let extractor = hmac::Key::new(hmac::HMAC_SHA256, b"meshd probe v1");
        Self(hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&extractor, shared.as_bytes()).as_ref()))
    }

    /// The message from `sender` to `receiver`.
    #[must_use]
    pub(super) fn seal(
        &self,
        kind: MessageKind,
        family: Family,
        nonce: u128,
        sender: &NodeId,
        receiver: &NodeId,
    ) -> [u8; LENGTH] {
        let mut message = [0; LENGTH];
        message[..4].copy_from_slice(&MAGIC);
        message[4] = VERSION;
        message[5] = kind_byte(kind);
        message[6] = family_byte(family);
        message[8..TAG_AT].copy_from_slice(&nonce.to_be_bytes());
        let tag = self.tag(&message[..TAG_AT], sender, receiver);
        message[TAG_AT..].copy_from_slice(&tag);
        message
    }

    /// Kind and nonce of a message that `sender` has made for `receiver` in `family`.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn open(
        &self,
        message: &[u8],
        family: Family,
        sender: &NodeId,
        receiver: &NodeId,
    ) -> Result<(MessageKind, u128), ProbeError> {
        if message.len() != LENGTH || message[..4] != MAGIC || message[4] != VERSION || message[7] != 0 {
            return Err(ProbeError::Malformed);
        }
        let kind = match message[5] {
            1 => MessageKind::Probe,
            2 => MessageKind::Echo,
            _ => return Err(ProbeError::Malformed),
        };
        if message[6] != family_byte(family) {
            return Err(ProbeError::Malformed);
        }
        let expected = self.tag(&message[..TAG_AT], sender, receiver);
        if !equal_in_constant_time(&expected, &message[TAG_AT..]) {
            return Err(ProbeError::Forged);
        }
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&message[8..TAG_AT]);
        Ok((kind, u128::from_be_bytes(nonce)))
    }

    fn tag(&self, head: &[u8], sender: &NodeId, receiver: &NodeId) -> [u8; 16] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(head);
        for id in [sender, receiver] {
            // Length first, so that two ids cannot be cut in another place.
            context.update(&u16::try_from(id.as_str().len()).unwrap_or(u16::MAX).to_be_bytes());
            context.update(id.as_str().as_bytes());
        }
        let mut tag = [0; 16];
        tag.copy_from_slice(&context.sign().as_ref()[..16]);
        tag
    }
}

fn kind_byte(kind: MessageKind) -> u8 {
    match kind {
        MessageKind::Probe => 1,
        MessageKind::Echo => 2,
    }
}

fn family_byte(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

fn equal_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (x, y)| differ | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (ProbeKey, ProbeKey, NodeId, NodeId) {
        let (a, b) = (PrivateKey::from_bytes([1; 32]), PrivateKey::from_bytes([2; 32]));
        let ids = ("aa".parse().unwrap(), "bb".parse().unwrap());
        (ProbeKey::derive(&a, &b.public()), ProbeKey::derive(&b, &a.public()), ids.0, ids.1)
    }

    #[test]
    fn both_ends_derive_one_key() {
        let (at_a, at_b, a, b) = pair();
        let probe = at_a.seal(MessageKind::Probe, Family::V4, 7, &a, &b);
        assert_eq!(at_b.open(&probe, Family::V4, &a, &b), Ok((MessageKind::Probe, 7)));
    }

    #[test]
    fn a_probe_cannot_be_turned_round_or_into_an_echo() {
        let (at_a, _, a, b) = pair();
        let probe = at_a.seal(MessageKind::Probe, Family::V4, 7, &a, &b);
        assert_eq!(at_a.open(&probe, Family::V4, &b, &a), Err(ProbeError::Forged));
        let mut echo = probe;
        echo[5] = 2;
        assert_eq!(at_a.open(&echo, Family::V4, &a, &b), Err(ProbeError::Forged));
        let mut other_family = probe;
        other_family[6] = 6;
        assert_eq!(at_a.open(&other_family, Family::V6, &a, &b), Err(ProbeError::Forged));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let (at_a, at_b, a, b) = pair();
        let probe = at_a.seal(MessageKind::Echo, Family::V6, u128::MAX / 3, &a, &b);
        for bit in 0..LENGTH * 8 {
            let mut changed = probe;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(at_b.open(&changed, Family::V6, &a, &b).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_stranger_has_another_key() {
        let (_, at_b, a, b) = pair();
        let stranger = ProbeKey::derive(&PrivateKey::from_bytes([3; 32]), &PrivateKey::from_bytes([2; 32]).public());
        let probe = stranger.seal(MessageKind::Probe, Family::V4, 7, &a, &b);
        assert_eq!(at_b.open(&probe, Family::V4, &a, &b), Err(ProbeError::Forged));
    }

    proptest::proptest! {
        /// Recombined parts of messages, and any other bytes, are refused.
        #[test]
        fn what_nobody_sealed_is_refused(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80),
            head in proptest::bool::ANY,
        ) {
            let (at_a, at_b, a, b) = pair();
            let mut message = bytes;
            if head {
                let real = at_a.seal(MessageKind::Probe, Family::V4, 7, &a, &b);
                let known = message.len().min(8);
                message[..known].copy_from_slice(&real[..known]);
            }
            for family in Family::BOTH {
                proptest::prop_assert!(at_b.open(&message, family, &a, &b).is_err());
            }
        }
    }

    #[test]
    fn other_lengths_are_refused() {
        let (at_a, _, a, b) = pair();
        let probe = at_a.seal(MessageKind::Probe, Family::V4, 7, &a, &b);
        for length in 0..LENGTH {
            assert_eq!(at_a.open(&probe[..length], Family::V4, &a, &b), Err(ProbeError::Malformed));
        }
    }
}
