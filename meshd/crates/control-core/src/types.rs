//! Shared types of this module: entries, transactions, and results of calls.

use std::{fmt, sync::Arc, time::Duration};

use mesh::records::{LeaseId, Revision};
use serde::{Deserialize, Serialize};

/// The id of an etcd cluster; it comes with every response. A cluster that was made from a backup has another one,
/// unless it was made with the same member URLs and the same token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ClusterId(u64);

impl ClusterId {
    /// The cluster with this id; `None` for 0, which means absent in a response.
    #[must_use]
    pub const fn new(id: u64) -> Option<Self> {
        if id == 0 { None } else { Some(Self(id)) }
    }
}

impl From<ClusterId> for String {
    fn from(id: ClusterId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ClusterId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u64::from_str_radix(&text, 16).ok().and_then(Self::new).ok_or("not a hexadecimal cluster id")
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As `etcdctl member list` has ids.
        write!(f, "{:x}", self.0)
    }
}

/// Every key below a prefix, at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyListing {
    /// The answering cluster, if stated.
    pub cluster: Option<ClusterId>,
    /// The revision.
    pub revision: Revision,
    /// The keys, in order.
    pub entries: Vec<Entry>,
}

/// A key as etcd holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key below the prefix, without the slash between: `subnets/10.244.3.0-24`. Bytes that are not UTF-8 are
    /// escaped.
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
        /// The expected revision.
        equals: Revision,
    },
    /// The key came into being at exactly this revision; 0: it does not exist.
    CreateRevision {
        /// Key below the prefix.
        key: String,
        /// The expected revision.
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

/// The outcome of a transaction that etcd answered.
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
    /// The time that etcd keeps it without a keepalive; at least the requested one.
    pub ttl: Duration,
}

/// Why etcd cannot be used, with the text of the error and its causes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EtcdFailure {
    /// The kind of failure, which has a remedy.
    pub kind: FailureKind,
    /// The error's text.
    pub text: String,
}

/// The kind of a failure in using etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// The TLS library rejects the certificate files.
    TlsFiles,
    /// The member does not speak TLS.
    NotTls,
    /// The TLS handshake failed.
    Tls,
    /// A file of the credentials cannot be read.
    File,
    /// User or password is rejected.
    User,
    /// The user lacks rights.
    Rights,
    /// etcd has reached its quota.
    Quota,
    /// The member's host refuses connections.
    Refused,
    /// The member's host name does not resolve.
    UnknownHost,
    /// No answer in time.
    Silent,
    /// Any other.
    Other,
}

impl EtcdFailure {
    /// A failure of this kind.
    #[must_use]
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

impl fmt::Display for EtcdFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A failure of kind [`FailureKind::Other`].
impl From<&str> for EtcdFailure {
    fn from(text: &str) -> Self {
        Self::new(FailureKind::Other, text)
    }
}

impl From<&CallError> for EtcdFailure {
    fn from(error: &CallError) -> Self {
        let kind = match error {
            CallError::Indeterminate(failure) | CallError::Refused(failure) => failure.kind,
            CallError::LeaseNotFound => FailureKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}

/// Why a call to etcd brought no answer that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No answer in time, or the connection broke: a write may have happened, or may still happen.
    #[error("etcd did not answer: {0}")]
    Indeterminate(EtcdFailure),
    /// The lease is gone; nothing was written.
    #[error("the etcd lease is gone")]
    LeaseNotFound,
    /// etcd refused; nothing was written.
    #[error("etcd refused: {0}")]
    Refused(EtcdFailure),
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// The key has this value now.
    Put(Entry),
    /// The key is gone since this revision.
    Delete {
        /// The key below the prefix.
        key: String,
        /// When it went.
        revision: Revision,
    },
}

impl WatchEvent {
    /// The revision of the change.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}
