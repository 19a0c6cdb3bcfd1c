//! A value's digest: of what etcd holds, only that is kept.

use std::fmt;

use blake2::{Blake2s, Digest as _, digest::consts::U16};

/// 16 bytes, so that two values of one digest are not found even by someone who looks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Digest([u8; 16]);

impl Digest {
    pub(crate) fn of(value: &[u8]) -> Self {
        Self(Blake2s::<U16>::digest(value).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
