//! The accepted records at one etcd revision: the only form in which the rest of the daemon gets them.

use std::{fmt, sync::Arc};

use cow_map::CowMap;
use etcd_schema::{
    Alive, Key, NetworkConfig, NodeId, NodeRecord, OutsidePeer, PeerName, RecordValue, Removed, SubnetKey, SubnetLease,
    Value,
};

use crate::problem::Problem;

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

/// The records in force at one etcd revision. Immutable; shared as `Arc<Records>`.
///
/// Kubernetes objects and attachments are not here: there are too many to copy for each change. They are handed on one
/// by one by `control_core::objects`, and show in `problems` when they do not hold.
///
/// Revisions share unchanged parts, so their difference costs as much as it contains ([`CowMap::changes`]). Conflicting
/// records (one prefix, key, name or address claimed twice) are all here; the reader decides which one holds, from
/// `retained`, `create_revision` and the key.
#[derive(Debug, Clone, Default)]
pub struct Records {
    /// The last revision that changed anything here.
    pub revision: Revision,
    /// Whether this was read from etcd by this process (at any time), and not only from the cache on disk.
    pub synced: bool,
    /// The configuration in force; not always the value of `config`, see `problems`.
    pub config: Option<Record<NetworkConfig>>,
    /// `nodes/ID`
    pub nodes: CowMap<NodeId, Record<NodeRecord>>,
    /// `subnets/…`
    pub subnets: CowMap<SubnetKey, Record<SubnetLease>>,
    /// `removed/ID`. A record that cannot be read still removes its node; its value is then the default one.
    pub removed: CowMap<NodeId, Record<Removed>>,
    /// `alive/ID`: for status only, never for a route, a peer or a path.
    pub alive: CowMap<NodeId, Record<Alive>>,
    /// `peers/NAME`
    pub peers: CowMap<PeerName, Record<OutsidePeer>>,
    /// Problems of records, by key; at most [`MAX_PROBLEMS`].
    pub problems: Arc<Vec<Problem>>,
}

impl Records {
    /// Puts `record` in place of the one under `key`; nothing, if no record of its kind is here by its key. `config` is
    /// not: which one is in force does not follow from its record alone.
    pub fn set(&mut self, key: Key, record: Option<Record<Value>>) {
        match key {
            Key::Subnet(subnet) => self.subnets.set(subnet, record.and_then(Record::of)),
            Key::Node(id) => self.nodes.set(id, record.and_then(Record::of)),
            Key::Removed(id) => self.removed.set(id, record.and_then(Record::of)),
            Key::Alive(id) => self.alive.set(id, record.and_then(Record::of)),
            Key::Peer(name) => self.peers.set(name, record.and_then(Record::of)),
            _ => false,
        };
    }

    /// Whether nothing but the revision differs.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.synced == other.synced
            && self.config == other.config
            && self.nodes.ptr_eq(&other.nodes)
            && self.subnets.ptr_eq(&other.subnets)
            && self.removed.ptr_eq(&other.removed)
            && self.alive.ptr_eq(&other.alive)
            && self.peers.ptr_eq(&other.peers)
            && Arc::ptr_eq(&self.problems, &other.problems)
    }
}

/// Bound of [`Records::problems`]; one more counts the omitted ones.
pub const MAX_PROBLEMS: usize = 200;

/// A value in force, and the place it has in etcd's history.
#[derive(Debug)]
pub struct Record<T: ?Sized> {
    /// The value.
    pub value: Arc<T>,
    /// Revision at which its key came into being: of two records that conflict, the one with the lower one holds.
    pub create_revision: Revision,
    /// Revision of the write that brought this value.
    pub mod_revision: Revision,
    /// The lease its key goes away with.
    pub lease: Option<LeaseId>,
    /// Why the value is in force although etcd does not hold it. It yields to any valid record with the same claim.
    /// Subnets that overlap a valid one are already omitted.
    pub retained: Option<Retained>,
}

impl Record<Value> {
    /// The record of a `T`, if its value is one.
    #[must_use]
    pub fn of<T: RecordValue>(self) -> Option<Record<T>> {
        let Self { value, create_revision, mod_revision, lease, retained } = self;
        Some(Record { value: Arc::clone(value.get()?), create_revision, mod_revision, lease, retained })
    }
}

impl<T: ?Sized> Clone for Record<T> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), ..*self }
    }
}

impl<T: ?Sized + PartialEq> PartialEq for Record<T> {
    fn eq(&self, other: &Self) -> bool {
        self.create_revision == other.create_revision
            && self.mod_revision == other.mod_revision
            && self.lease == other.lease
            && self.retained == other.retained
            && (Arc::ptr_eq(&self.value, &other.value) || self.value == other.value)
    }
}

/// Why a value that etcd does not hold is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retained {
    /// The key now holds something that cannot be read.
    Unreadable,
    /// etcd holds no value that counts, and the evidence does not suffice to withdraw this one.
    Withheld,
}
