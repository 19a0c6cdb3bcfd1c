//! The words that the parts of this module share: entries, transactions, and what became of a call.

use std::{fmt, sync::Arc, time::Duration};

/// An etcd revision. The store's own count; 0 means "before any write".
pub type Revision = i64;

/// The id of an etcd lease; never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(i64);

impl LeaseId {
    /// The lease with this id; `None` for 0, which is how etcd writes "no lease".
    #[must_use]
    pub const fn new(id: i64) -> Option<Self> {
        if id == 0 { None } else { Some(Self(id)) }
    }

    /// The id as etcd's API has it.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As etcdctl prints it.
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One key as etcd holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key below the prefix, without the slash between: `subnets/10.244.3.0-24`. Bytes that are not UTF-8 are escaped.
    pub key: String,
    /// The value.
    pub value: Arc<[u8]>,
    /// Revision at which the key came into being.
    pub create_revision: Revision,
    /// Revision of its last write.
    pub mod_revision: Revision,
    /// Lease that it goes away with.
    pub lease: Option<LeaseId>,
}

/// A condition of a transaction, on one key or on all keys below one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key was last written at exactly this revision; 0: it does not exist.
    ModRevision {
        /// Key below the prefix.
        key: String,
        /// What it must equal.
        equals: Revision,
    },
    /// The key came into being at exactly this revision; 0: it does not exist.
    CreateRevision {
        /// Key below the prefix.
        key: String,
        /// What it must equal.
        equals: Revision,
    },
    /// Every key that starts with `prefix` was last written before this revision.
    AllModifiedBefore {
        /// Start of the keys, below the prefix: `subnets/`.
        prefix: String,
        /// They must have a smaller mod_revision.
        revision: Revision,
    },
}

/// A write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Puts a value under a lease or none.
    Put {
        /// Key below the prefix.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease to attach; `None` detaches it from any.
        lease: Option<LeaseId>,
    },
    /// Deletes a key; nothing happens when it is not there.
    Delete {
        /// Key below the prefix.
        key: String,
    },
}

/// All writes happen at one revision if all conditions hold, else none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// The conditions.
    pub compares: Vec<Compare>,
    /// The writes.
    pub writes: Vec<Write>,
}

/// What became of a transaction that etcd answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Whether the conditions held, and so the writes happened.
    pub succeeded: bool,
    /// The store's revision when it was judged.
    pub revision: Revision,
}

/// A lease that etcd granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Its id.
    pub lease: LeaseId,
    /// The time that etcd keeps it without a keepalive; at least what was asked for.
    pub ttl: Duration,
}

/// Why a call to etcd brought no answer that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No answer in time, or the connection broke: a write may have happened, or may still happen.
    #[error("etcd did not answer: {0}")]
    Indeterminate(String),
    /// The lease is gone; nothing was written.
    #[error("the etcd lease is gone")]
    LeaseNotFound,
    /// etcd refused; nothing was written.
    #[error("etcd refused: {0}")]
    Refused(String),
}
