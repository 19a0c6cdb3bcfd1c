//! One key in the store: its revisions in etcd, and its last good value.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use etcd_schema::{Alive, Key, NodeId, RecordClass, RecordValue, SubnetLease, Value};
use mesh::records::{LeaseId, Record, Retained, Revision};

use crate::types::Entry;

/// A key as etcd holds it.
#[derive(Debug, Clone)]
pub(crate) struct StoredKey {
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: Option<LeaseId>,
    pub(super) fingerprint: u64,
    pub(super) key: Option<Key>,
    /// The last value that could be read: the present one unless `unreadable`.
    pub(super) good: Option<Good>,
    pub(super) unreadable: bool,
    /// The present value of a policy or a removal that could never be read, and denies all the same: it does so after
    /// the next start too.
    pub(super) refused: Option<Arc<[u8]>>,
}

#[derive(Debug, Clone)]
pub(super) struct Good {
    pub(super) bytes: Arc<[u8]>,
    pub(super) mod_revision: Revision,
    /// `None`: policies are made of it. It was handed on when it changed, and is not kept in its parsed form.
    pub(super) value: Option<Value>,
}

impl StoredKey {
    /// Whether the entry is this one: nothing to tell anyone.
    pub(super) fn is(&self, entry: &Entry) -> bool {
        self.mod_revision == entry.mod_revision
            && self.create_revision == entry.create_revision
            && self.lease == entry.lease
            && self.fingerprint == fingerprint(&entry.value)
    }

    /// Whether etcd holds this value.
    pub(crate) fn holds(&self, value: &[u8]) -> bool {
        self.fingerprint == fingerprint(value)
    }

    /// Its class for the guard; `None`: its absence withdraws nothing that matters.
    pub(super) fn class(&self) -> Option<RecordClass> {
        self.key.as_ref()?.rules().class
    }

    /// The value that it puts into force for the mesh; `retained`: why, where that is not because etcd holds it.
    pub(super) fn record(&self, retained: Option<Retained>) -> Option<Record<Value>> {
        let (value, mod_revision, retained) = match &self.good {
            Some(good) => (good.value.clone()?, good.mod_revision, retained),
            None => (Value::stand_in(self.key.as_ref()?)?, self.mod_revision, None),
        };
        let (create_revision, lease) = (self.create_revision, self.lease);
        Some(Record { value: Arc::new(value), create_revision, mod_revision, lease, retained })
    }

    /// Whether both put the same into force.
    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        match (&self.good, &other.good) {
            (Some(good), Some(its)) if good.value.is_none() => its.value.is_none() && good.bytes == its.bytes,
            (Some(good), Some(its)) => good.value == its.value,
            (None, None) => self.fingerprint == other.fingerprint,
            _ => false,
        }
    }

    /// The value that the cache keeps, and the revision that it is of.
    pub(super) fn cached(&self) -> Option<(&Arc<[u8]>, Revision)> {
        let good = self.good.as_ref().map(|good| (&good.bytes, good.mod_revision));
        good.or_else(|| self.refused.as_ref().map(|bytes| (bytes, self.mod_revision)))
    }

    /// The node it belongs to, if stated.
    pub(super) fn owner(&self) -> Option<NodeId> {
        match &self.key {
            Some(Key::Node(id)) => Some(id.clone()),
            _ => self.get::<SubnetLease>()?.node.clone(),
        }
    }

    /// The last good value, when it is a `T`.
    pub(crate) fn get<T: RecordValue>(&self) -> Option<&T> {
        self.good.as_ref()?.value.as_ref()?.get().map(Arc::as_ref)
    }

    /// Whether etcd holds something here that cannot be read.
    pub(crate) const fn unreadable(&self) -> bool {
        self.unreadable
    }

    /// The present value, when it is an `alive` record that can be read.
    pub(crate) fn alive(&self) -> Option<&Alive> {
        if self.unreadable { None } else { self.get() }
    }
}

pub(super) fn fingerprint(value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
