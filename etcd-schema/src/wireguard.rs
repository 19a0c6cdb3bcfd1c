//! WireGuard keys as encoded in values.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{Violations, fields::Expected, violation::quoted};

/// A WireGuard public key: a Curve25519 point that is not of low order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key made of these bytes, unchecked.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether every shared secret with this key is zero, whatever the private key: such a key authenticates no peer.
    #[must_use]
    pub fn is_low_order(&self) -> bool {
        let mut bytes = self.0;
        bytes[31] &= 0x7f;
        LOW_ORDER.contains(&bytes)
    }

    /// Whether this is the one encoding of its point. The others are the same key to WireGuard and another to us, which
    /// would get them past a list of refused keys.
    #[must_use]
    pub(crate) fn is_canonical(&self) -> bool {
        // Little endian and below 2^255 - 19.
        let [low, middle @ .., high] = &self.0;
        *high < 0x7f || (*high == 0x7f && (*low < 0xed || middle.iter().any(|b| *b != 0xff)))
    }

    /// Parses a key in base64, or returns the rule.
    pub(crate) fn read(text: &str) -> Result<Self, Expected> {
        let key = Self(decode(text)?);
        if key.is_low_order() {
            return Err(
                "must not be a low-order point, which is insecure: make a key with `wg genkey | wg pubkey`".into()
            );
        }
        if !key.is_canonical() {
            return Err("must be the canonical encoding of its point: write the key as `wg pubkey` prints it".into());
        }
        Ok(key)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = Violations;

    /// Reads base64 as `wg` prints it; refuses points of low order and encodings that are not canonical.
    fn from_str(text: &str) -> Result<Self, Violations> {
        Self::read(text).map_err(|expected| Violations::one("", quoted(text), expected))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A WireGuard pre-shared key. `Debug` prints no secret; there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey(Zeroizing<[u8; 32]>);

impl PresharedKey {
    /// The key made of these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The 32 secret bytes.
    #[must_use]
    pub fn secret_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The secret in base64, as values and `wg` have it.
    #[must_use]
    pub(crate) fn secret_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(*self.0))
    }

    /// Parses a key in base64, or returns the rule; never repeats `text`.
    pub(crate) fn read(text: &str) -> Result<Self, Expected> {
        let mut bytes = decode(text)?;
        let key = Self::from_bytes(bytes);
        bytes.zeroize();
        if *key.0 == [0; 32] {
            return Err("must not be all zero, which means no key: leave it out".into());
        }
        Ok(key)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(…)")
    }
}

fn decode(text: &str) -> Result<[u8; 32], Expected> {
    const FORM: &str = "must be 32 bytes in base64: 44 characters, as `wg` prints keys";
    if text.len() != 44 {
        return Err(FORM.into());
    }
    let mut bytes = [0; 33];
    match STANDARD.decode_slice(text, &mut bytes) {
        Ok(32) => {
            let mut key = [0; 32];
            key.copy_from_slice(&bytes[..32]);
            bytes.zeroize();
            Ok(key)
        }
        _ => Err(FORM.into()),
    }
}

/// Points of small order on Curve25519 and its twist, with the encodings of them that are not reduced; the highest bit,
/// which X25519 ignores, is clear.
const LOW_ORDER: [[u8; 32]; 7] = [
    small(0),
    small(1),
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    near_p(0xec),
    near_p(0xed),
    near_p(0xee),
];

const fn small(n: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[0] = n;
    bytes
}

/// 2^255 - 256 + `low`: p - 1, p and p + 1 for 0xec, 0xed and 0xee.
const fn near_p(low: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = low;
    bytes[31] = 0x7f;
    bytes
}

#[cfg(test)]
mod tests;
