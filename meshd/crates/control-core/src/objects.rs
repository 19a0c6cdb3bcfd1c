//! Records that policies are made of: Kubernetes objects and attachments, passed on one by one.
//!
//! There may be many thousands of them, but only one changes at a time, so they are not part of the `Records`. The
//! control plane does not understand them: an [`ObjectReader`] reads each value once, and the [`ObjectSink`] gets what
//! it returned, key by key. Which value of a key is in force is decided here, as for every other record.

use std::{any::Any, collections::HashMap, fmt, sync::Arc};

use etcd_schema::{Key, Violations};
use mesh::records::Revision;

/// A parsed value, opaque to all but its reader.
#[derive(Clone)]
pub struct Item(Arc<dyn Any + Send + Sync>);

impl Item {
    /// Wraps a parsed value.
    pub fn new<T: Any + Send + Sync>(read: T) -> Self {
        Self(Arc::new(read))
    }

    /// The parsed value, if it is a `T`.
    #[must_use]
    pub fn into_read<T: Any + Send + Sync + Clone>(self) -> Option<T> {
        self.0.downcast().ok().map(Arc::unwrap_or_clone)
    }
}

impl fmt::Debug for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Item")
    }
}

/// A value that holds.
#[derive(Debug)]
pub struct ReadObject {
    /// The parsed value.
    pub item: Item,
    /// The value reduced to the fields that are read, for the cache and comparison.
    pub canonical: Arc<[u8]>,
}

/// A value that does not hold.
#[derive(Debug)]
pub struct RefusedObject {
    /// Its violations.
    pub violations: Violations,
    /// The substitute in force without an earlier valid value.
    pub stand_in: Option<Item>,
    /// The same in words, for status.
    pub effect: String,
}

/// Reads the values of keys whose [`Reader`](etcd_schema::Reader) is the policy engine.
pub trait ObjectReader: Send + Sync {
    /// Reads the value of `key`. `rewritten`: the key was written before.
    ///
    /// # Errors
    /// All that is wrong with it.
    fn read(&self, key: &Key, bytes: &[u8], rewritten: bool) -> Result<ReadObject, RefusedObject>;
}

/// An object in force.
#[derive(Debug, Clone)]
pub struct ObjectRecord {
    /// The parsed value.
    pub item: Item,
    /// Revision at which its key came into being: of two pods with one address the newer one has it.
    pub create_revision: Revision,
    /// etcd does not hold it, or not with this value, and it stays in force for want of evidence: it yields an address
    /// to whatever claims it by a record that etcd holds.
    pub held: bool,
}

/// The newest state of each changed key; `None`: withdrawn.
pub type ObjectChanges = HashMap<Key, Option<ObjectRecord>>;

/// Receives changes. Called from the control plane's task, so it must not block.
pub trait ObjectSink: ObjectReader {
    /// Receives changes up to `revision`. `complete`: with all earlier changes, they are complete and may be enforced.
    fn changed(&self, changes: ObjectChanges, revision: Revision, complete: bool);
}
