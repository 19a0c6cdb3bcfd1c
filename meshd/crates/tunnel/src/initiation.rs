//! Sender and timestamp of a handshake initiation, read before the engine gets it (WireGuard, section 5.4.2).
//!
//! A restart erases the engine's timestamps. A replayed initiation must not reach the engine: an answer would replace a
//! session and a handshake of ours in flight.

use blake2::{Blake2s256, Digest as _, digest::FixedOutput as _};
use etcd_schema::PublicKey;
use hmac::{Mac as _, SimpleHmac};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::{SharedSecret, StaticSecret};
use zeroize::Zeroizing;

use super::stamps::Stamp;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Where the parts of an initiation are.
const EPHEMERAL: std::ops::Range<usize> = 8..40;
const STATIC: std::ops::Range<usize> = 40..88;
const TIMESTAMP: std::ops::Range<usize> = 88..116;
const LENGTH: usize = 148;

type Hash = [u8; 32];

/// An initiation whose sender is known, and whose time stamp is still sealed.
pub(super) struct Initiation<'a> {
    /// The sender's key. Any host that knows ours can name any: only the time stamp proves it.
    pub(super) sender: PublicKey,
    chain: Zeroizing<Hash>,
    hash: Hash,
    timestamp: &'a [u8],
}

impl<'a> Initiation<'a> {
    /// Opens the sender's key; `None` if `message` is not an initiation for the key that `secret` belongs to.
    pub(super) fn open(message: &'a [u8], secret: &StaticSecret, public: &PublicKey) -> Option<Self> {
        if message.len() != LENGTH {
            return None;
        }
        let ephemeral = message[EPHEMERAL].first_chunk::<32>()?;
        let sealed = &message[STATIC];
        let mut hash = digest(&[CONSTRUCTION]);
        let chain = hash;
        hash = digest(&[&hash, IDENTIFIER]);
        hash = digest(&[&hash, public.as_bytes()]);
        hash = digest(&[&hash, ephemeral]);
        let (chain, _) = derive(&chain, ephemeral);
        let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(*ephemeral));
        let (chain, key) = derive(&chain, shared.as_bytes());
        let sender = PublicKey::from_bytes(unseal(&key, sealed, &hash)?);
        hash = digest(&[&hash, sealed]);
        Some(Self { sender, chain, hash, timestamp: &message[TIMESTAMP] })
    }

    /// Opens the time stamp with the secret that this node and the sender share; `None` if the sender does not have its
    /// key.
    pub(super) fn stamp(&self, shared: &SharedSecret) -> Option<Stamp> {
        let (_, key) = derive(&self.chain, shared.as_bytes());
        unseal(&key, self.timestamp, &self.hash).map(Stamp::from_bytes)
    }
}

fn digest(parts: &[&[u8]]) -> Hash {
    let mut hash = Blake2s256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize_fixed().into()
}

fn hmac(key: &Hash, parts: &[&[u8]]) -> Zeroizing<Hash> {
    let Ok(mut mac) = SimpleHmac::<Blake2s256>::new_from_slice(key) else {
        unreachable!("HMAC takes keys of any length")
    };
    parts.iter().for_each(|part| mac.update(part));
    Zeroizing::new(mac.finalize().into_bytes().into())
}

/// The next chaining key, and a key to open with.
fn derive(chain: &Hash, input: &[u8]) -> (Zeroizing<Hash>, Zeroizing<Hash>) {
    let secret = hmac(chain, &[input]);
    let chain = hmac(&secret, &[&[1]]);
    let key = hmac(&secret, &[&*chain, &[2]]);
    (chain, key)
}

/// The `N` bytes in `sealed`, which is that and an authentication tag.
fn unseal<const N: usize>(key: &Hash, sealed: &[u8], hash: &Hash) -> Option<[u8; N]> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).ok()?);
    let mut room = [0; 48];
    let room = room.get_mut(..sealed.len())?;
    room.copy_from_slice(sealed);
    let nonce = Nonce::assume_unique_for_key([0; 12]);
    key.open_in_place(nonce, Aad::from(hash), room).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use boringtun::noise::{Tunn, TunnResult};
    use keys::PrivateKey;
    use proptest::prelude::*;

    use super::*;

    /// An initiation by another implementation.
    fn initiation(from: &PrivateKey, to: &PrivateKey) -> Vec<u8> {
        let peer = x25519_dalek::PublicKey::from(*to.public().as_bytes());
        let mut tunn = Tunn::new(from.secret().clone(), peer, Some([7; 32]), None, 1, None);
        let mut room = [0; 148];
        match tunn.format_handshake_initiation(&mut room, false) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn shared(own: &PrivateKey, other: &PrivateKey) -> SharedSecret {
        own.secret().diffie_hellman(&x25519_dalek::PublicKey::from(*other.public().as_bytes()))
    }

    #[test]
    fn sender_and_time_are_read() {
        let [a, b] = [(); 2].map(|()| PrivateKey::generate().unwrap());
        let before = SystemTime::now();
        let (first, second) = (initiation(&a, &b), initiation(&a, &b));
        let read = |message: &[u8]| {
            let initiation = Initiation::open(message, b.secret(), &b.public()).unwrap();
            assert_eq!(initiation.sender, a.public());
            initiation.stamp(&shared(&b, &a)).unwrap()
        };
        assert!(read(&first) < read(&second));
        assert!(read(&second).ahead_of(before) < Duration::from_secs(600));
        assert_eq!(read(&first).ahead_of(before + Duration::from_secs(600)), Duration::ZERO);
    }

    #[test]
    fn what_is_for_another_node_or_by_another_sender_is_not_read() {
        let [a, b, c] = [(); 3].map(|()| PrivateKey::generate().unwrap());
        let message = initiation(&a, &b);
        assert!(Initiation::open(&message, c.secret(), &c.public()).is_none());
        let opened = Initiation::open(&message, b.secret(), &b.public()).unwrap();
        assert!(opened.stamp(&shared(&b, &c)).is_none());
        assert!(Initiation::open(&message[..147], b.secret(), &b.public()).is_none());
    }

    proptest! {
        #[test]
        fn what_was_changed_is_not_read(at in 8usize..116, bit in 0u32..8) {
            let [a, b] = [(); 2].map(|()| PrivateKey::generate().unwrap());
            let mut message = initiation(&a, &b);
            // The highest bit of a point means nothing to the curve, but it is hashed.
            message[at] ^= 1 << bit;
            let opened = Initiation::open(&message, b.secret(), &b.public());
            prop_assert!(opened.is_none_or(|opened| opened.stamp(&shared(&b, &a)).is_none()));
        }

        #[test]
        fn no_bytes_make_it_panic(message in prop::collection::vec(any::<u8>(), 0..200), exact: bool) {
            let key = PrivateKey::generate().unwrap();
            let mut message = message;
            if exact {
                message.resize(148, 1);
            }
            prop_assert!(Initiation::open(&message, key.secret(), &key.public()).is_none());
        }
    }
}
