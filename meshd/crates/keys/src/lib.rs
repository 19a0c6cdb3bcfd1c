//! The node's WireGuard private key: a type that cannot be printed, and its file.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use etcd_schema::PublicKey;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

/// A WireGuard private key (Curve25519). `Debug` prints no secret; there is no `Display`.
#[derive(Clone)]
pub struct PrivateKey(StaticSecret);

/// Why the key file could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivateKeyError {
    /// The file could not be read or written.
    #[error("private key file {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// The file holds something that is not 32 bytes in base64.
    #[error(
        "private key file {path} contains no WireGuard key (44 characters of base64); move it away to generate a new \
         key, which changes this node's public key"
    )]
    Malformed {
        /// The file.
        path: String,
    },
}

impl PrivateKey {
    /// A new random key.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = Zeroizing::new([0u8; 32]);
        getrandom::fill(bytes.as_mut_slice()).map_err(io::Error::other)?;
        Ok(Self::from_bytes(*bytes))
    }

    /// The key made of these 32 bytes; clamping happens when it is used.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(StaticSecret::from(bytes))
    }

    /// The public key that belongs to it.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey::from_bytes(x25519_dalek::PublicKey::from(&self.0).to_bytes())
    }

    /// The secret as the WireGuard crate wants it.
    #[must_use]
    pub fn secret(&self) -> &StaticSecret {
        &self.0
    }

    /// The key in `path`, made and written with mode 0600 when there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written, or does not hold a key; it is never overwritten.
    pub fn load_or_create(path: &Path) -> Result<Self, PrivateKeyError> {
        let io_error = |source| PrivateKeyError::Io { path: path.display().to_string(), source };
        match fs::File::open(path) {
            Ok(mut file) => {
                let mut text = Zeroizing::new(String::new());
                file.read_to_string(&mut text).map_err(io_error)?;
                let mut bytes = Zeroizing::new([0u8; 33]);
                match STANDARD.decode_slice(text.trim(), bytes.as_mut_slice()) {
                    Ok(32) => {
                        let mut key = [0u8; 32];
                        key.copy_from_slice(&bytes[..32]);
                        Ok(Self::from_bytes(key))
                    }
                    _ => Err(PrivateKeyError::Malformed { path: path.display().to_string() }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate().map_err(io_error)?;
                let text = Zeroizing::new(STANDARD.encode(key.0.as_bytes()) + "\n");
                atomic_file::write(path, 0o600, text.as_bytes()).map_err(io_error)?;
                Ok(key)
            }
            Err(error) => Err(io_error(error)),
        }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn is_made_once_with_mode_0600_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = PrivateKey::load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let read = PrivateKey::load_or_create(&path).unwrap();
        assert_eq!(made.public(), read.public());
    }

    #[test]
    fn a_damaged_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "not a key").unwrap();
        let error = PrivateKey::load_or_create(&path).unwrap_err();
        assert!(error.to_string().contains("contains no WireGuard key"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "not a key");
    }

    #[test]
    fn debug_prints_no_secret() {
        assert_eq!(format!("{:?}", PrivateKey::from_bytes([7; 32])), "PrivateKey(…)");
    }
}
