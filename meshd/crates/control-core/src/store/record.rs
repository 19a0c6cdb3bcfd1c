//! One key in the store: its revisions in etcd, and its last good value.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use etcd_schema::{
    Alive, Key, KubernetesKey, MAX_VALUE_BYTES, NetworkConfig, NodeId, NodeRecord, OutsidePeer, Removed, SubnetLease,
    Violations,
};
use mesh::records::{LeaseId, Record, Retained, Revision};

use crate::{
    guard::Class,
    types::Entry,
    world::{self, WorldItem},
};

/// One key as etcd has it.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) create_revision: Revision,
    pub(crate) mod_revision: Revision,
    pub(crate) lease: Option<LeaseId>,
    pub(super) fingerprint: u64,
    pub(super) key: Option<Key>,
    /// The last value that could be read: the present one unless `unreadable`.
    pub(super) good: Option<Good>,
    pub(super) unreadable: bool,
    /// The present value of a policy or a removal that could never be read, and denies all the same: it does so after the
    /// next start too.
    pub(super) refused: Option<Arc<[u8]>>,
}

#[derive(Debug, Clone)]
pub(super) struct Good {
    pub(super) bytes: Arc<[u8]>,
    pub(super) mod_revision: Revision,
    pub(super) value: Value,
}

/// A value that could be read.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Config(Arc<NetworkConfig>),
    Subnet(Arc<SubnetLease>),
    Node(Arc<NodeRecord>),
    Removed(Arc<Removed>),
    Alive(Arc<Alive>),
    Peer(Arc<OutsidePeer>),
    /// What policies are made of: handed on when it changed, and not kept in its parsed form.
    World,
}

/// Where in etcd's history a value stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    create_revision: Revision,
    mod_revision: Revision,
    lease: Option<LeaseId>,
    retained: Option<Retained>,
}

impl At {
    pub(super) const fn with<T: ?Sized>(self, value: Arc<T>) -> Record<T> {
        Record {
            value,
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            lease: self.lease,
            retained: self.retained,
        }
    }
}

impl Kept {
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

    pub(super) fn at(&self, retained: Option<Retained>) -> At {
        At {
            create_revision: self.create_revision,
            mod_revision: self.good.as_ref().map_or(self.mod_revision, |good| good.mod_revision),
            lease: self.lease,
            retained,
        }
    }

    /// What it is to the guard; `None`: its absence withdraws nothing that matters.
    pub(super) const fn class(&self) -> Option<Class> {
        match &self.key {
            Some(Key::Subnet(_) | Key::Node(_)) => Some(Class::Node),
            Some(Key::Endpoint(..)) => Some(Class::Attachment),
            Some(Key::Kubernetes(cluster, key)) if cluster.is_flat() => match key {
                KubernetesKey::NetworkPolicy(..) | KubernetesKey::ClusterNetworkPolicy(_) => Some(Class::Policy),
                KubernetesKey::Pod(..) | KubernetesKey::Namespace(_) => Some(Class::Object),
                _ => None,
            },
            Some(Key::Config | Key::Peer(_) | Key::Removed(_)) => Some(Class::Setting),
            _ => None,
        }
    }

    /// Whether both put the same into force.
    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        match (&self.good, &other.good) {
            (Some(good), Some(its)) if good.value == Value::World => {
                its.value == Value::World && good.bytes == its.bytes
            }
            (Some(good), Some(its)) => good.value == its.value,
            (None, None) => self.fingerprint == other.fingerprint,
            _ => false,
        }
    }

    /// What it puts into force for policies, if it is of their kind.
    pub(super) fn world_item(&self) -> Option<WorldItem> {
        let key = self.key.as_ref()?;
        match (&self.good, &self.refused) {
            (Some(good), _) => world::read(key, &good.bytes)?.ok().map(|read| read.item),
            (None, Some(bytes)) => {
                world::read(key, bytes)?.err()?.in_force(key, self.mod_revision > self.create_revision)
            }
            (None, None) => None,
        }
    }

    /// The value that the cache keeps, and the revision that it is of.
    pub(super) fn cached(&self) -> Option<(&Arc<[u8]>, Revision)> {
        let good = self.good.as_ref().map(|good| (&good.bytes, good.mod_revision));
        good.or_else(|| self.refused.as_ref().map(|bytes| (bytes, self.mod_revision)))
    }

    /// The node it belongs to, where it says so.
    pub(super) fn owner(&self) -> Option<NodeId> {
        match (&self.key, self.good.as_ref().map(|good| &good.value)) {
            (Some(Key::Node(id)), _) => Some(id.clone()),
            (Some(Key::Subnet(_)), Some(Value::Subnet(lease))) => lease.node.clone(),
            _ => None,
        }
    }

    /// The last good value, when it is a node record.
    pub(crate) fn node(&self) -> Option<&NodeRecord> {
        match self.good.as_ref().map(|good| &good.value) {
            Some(Value::Node(node)) => Some(node),
            _ => None,
        }
    }

    /// The last good value, when it is a subnet's.
    pub(crate) fn subnet(&self) -> Option<&SubnetLease> {
        match self.good.as_ref().map(|good| &good.value) {
            Some(Value::Subnet(lease)) => Some(lease),
            _ => None,
        }
    }

    /// Whether etcd holds something here that cannot be read.
    pub(crate) const fn unreadable(&self) -> bool {
        self.unreadable
    }

    /// The present value, when it is an `alive` record that can be read.
    pub(crate) fn alive(&self) -> Option<&Alive> {
        match self.good.as_ref().map(|good| &good.value) {
            Some(Value::Alive(alive)) if !self.unreadable => Some(alive),
            _ => None,
        }
    }
}

impl Value {
    /// The value of a record of the mesh; `None` for a key that policies are made of, see [`world`], or that this
    /// version does not read.
    pub(super) fn parse(key: &Key, bytes: &[u8]) -> Option<Result<Self, Violations>> {
        if matches!(key, Key::Endpoint(..) | Key::Kubernetes(..)) {
            return None;
        }
        Some(Self::of_mesh(key, bytes))
    }

    fn of_mesh(key: &Key, bytes: &[u8]) -> Result<Self, Violations> {
        if bytes.len() > MAX_VALUE_BYTES {
            let found = format!("{} bytes", bytes.len());
            return Err(Violations::one("", found, format!("at most {MAX_VALUE_BYTES} bytes are allowed")));
        }
        Ok(match key {
            Key::Config => Self::Config(Arc::new(NetworkConfig::parse(bytes)?)),
            Key::Subnet(_) => Self::Subnet(Arc::new(SubnetLease::parse(bytes)?)),
            Key::Node(_) => Self::Node(Arc::new(NodeRecord::parse(bytes)?)),
            Key::Removed(_) => Self::Removed(Arc::new(Removed::parse(bytes)?)),
            Key::Alive(_) => Self::Alive(Arc::new(Alive::parse(bytes)?)),
            Key::Peer(_) => Self::Peer(Arc::new(OutsidePeer::parse(bytes)?)),
            _ => return Err(Violations::one("", key.to_string(), "unknown kind of key")),
        })
    }

    pub(super) fn config(self) -> Option<Arc<NetworkConfig>> {
        if let Self::Config(value) = self { Some(value) } else { None }
    }

    pub(super) fn subnet(self) -> Option<Arc<SubnetLease>> {
        if let Self::Subnet(value) = self { Some(value) } else { None }
    }

    pub(super) fn node(self) -> Option<Arc<NodeRecord>> {
        if let Self::Node(value) = self { Some(value) } else { None }
    }

    pub(super) fn alive(self) -> Option<Arc<Alive>> {
        if let Self::Alive(value) = self { Some(value) } else { None }
    }

    pub(super) fn peer(self) -> Option<Arc<OutsidePeer>> {
        if let Self::Peer(value) = self { Some(value) } else { None }
    }

    pub(super) fn removed(self) -> Option<Arc<Removed>> {
        if let Self::Removed(value) = self { Some(value) } else { None }
    }
}

pub(super) fn fingerprint(value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
