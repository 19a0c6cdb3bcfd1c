//! The parts of a key, and why a key is invalid.

use crate::{fields::Expected, violation::quoted};

/// Longest key that is read, in bytes without the prefix.
const MAX_KEY_BYTES: usize = 1024;

/// Why a key is not one of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The first path element is not known, or the one after `k8s/CLUSTER/`.
    #[error("unknown key {key:?}: {expected}")]
    Unknown {
        /// The key, shortened.
        key: String,
        /// The directory that is not known, with the slash at its end; `None`: the key is in none.
        directory: Option<Box<str>>,
        /// How a key could begin there.
        expected: String,
    },
    /// The key is of a known kind, and a part of it is wrong.
    #[error("key {key:?}: {reason}")]
    Malformed {
        /// The key, shortened.
        key: String,
        /// The violation and the rule.
        reason: String,
    },
}

/// A key, and the part after its directory.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'k> {
    key: &'k str,
    rest: &'k str,
}

impl<'k> Parts<'k> {
    /// The whole of a key without its prefix.
    ///
    /// # Errors
    /// If it is longer than any key of the mesh.
    pub(crate) fn of(key: &'k str) -> Result<Self, KeyError> {
        if key.len() > MAX_KEY_BYTES {
            let reason = format!("has {} bytes, at most {MAX_KEY_BYTES} are read", key.len());
            return Err(KeyError::Malformed { key: unquoted(key), reason });
        }
        Ok(Self { key, rest: key })
    }

    /// The first part, and what follows it.
    pub(crate) fn first(self) -> (&'k str, Self) {
        let (first, rest) = self.rest.split_once('/').unwrap_or((self.rest, ""));
        (first, Self { rest, ..self })
    }

    /// The part after `place`, a directory or an entire key, if the rest begins with it.
    pub(crate) fn at(self, place: &str) -> Option<Self> {
        let rest = self.rest.strip_prefix(place)?;
        (place.ends_with('/') || rest.is_empty()).then_some(Self { rest, ..self })
    }

    pub(crate) fn split<const N: usize>(&self, names: [&str; N]) -> Result<[&'k str; N], KeyError> {
        let parts: Vec<&str> = self.rest.splitn(N + 1, '/').collect();
        parts.try_into().map_err(|_| {
            let directory = &self.key[..self.key.len() - self.rest.len()];
            self.malformed(format!("must be {directory}{}", names.join("/")))
        })
    }

    pub(crate) fn read<T>(
        &self,
        name: &str,
        part: &str,
        read: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> Result<T, KeyError> {
        read(part).map_err(|expected| self.malformed(format!("{name} is {}: {expected}", quoted(part))))
    }

    /// The rest begins with no directory that is known; it must be as `expected`.
    pub(crate) fn unknown(&self, expected: String) -> KeyError {
        let directory = self.rest.find('/').map(|at| &self.key[..=self.key.len() - self.rest.len() + at]);
        KeyError::Unknown { key: unquoted(self.key), directory: directory.map(Into::into), expected }
    }

    fn malformed(&self, reason: impl Into<String>) -> KeyError {
        KeyError::Malformed { key: unquoted(self.key), reason: reason.into() }
    }
}

/// Shortened like [`quoted`]; `Debug` of the error adds the quotes.
pub(crate) fn unquoted(text: &str) -> String {
    const MOST: usize = 96;
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
