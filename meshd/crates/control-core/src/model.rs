//! An in-memory etcd for simulations: revisions, leases, the compares in use, history for watches.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a simulation's own steps may unwrap")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use mesh::records::{LeaseId, Revision};

use crate::types::{
    CallError, ClusterId, Committed, Compare, Entry, Granted, KeyListing, Transaction, WatchEvent, Write,
};

/// An etcd of one member, which answers at once.
#[derive(Debug, Clone)]
pub struct EtcdModel {
    cluster: u64,
    /// The last revision.
    pub revision: Revision,
    /// Its keys.
    pub keys: BTreeMap<String, Entry>,
    leases: BTreeMap<LeaseId, (Duration, Instant)>,
    history: BTreeMap<Revision, Vec<WatchEvent>>,
    next_lease: i64,
}

impl Default for EtcdModel {
    fn default() -> Self {
        Self::new()
    }
}

impl EtcdModel {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            cluster: 1,
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            history: BTreeMap::new(),
            next_lease: 1000,
        }
    }

    /// Restores `backup`: leases get their full time again.
    pub fn restore(&mut self, backup: &Self, now: Instant) {
        // etcd's lease ids are drawn at random: those of the time since do not come again.
        *self = Self { next_lease: self.next_lease, cluster: self.cluster, ..backup.clone() };
        for (ttl, until) in self.leases.values_mut() {
            *until = now + *ttl;
        }
    }

    /// From now on it is another cluster, with the same keys.
    pub const fn becomes_another_cluster(&mut self) {
        self.cluster += 1;
    }

    /// Every key.
    #[must_use]
    pub fn list(&self) -> KeyListing {
        KeyListing {
            cluster: ClusterId::new(self.cluster),
            revision: self.revision,
            entries: self.keys.values().cloned().collect(),
        }
    }

    /// Whether this lease lasts.
    #[cfg(test)]
    pub(crate) fn has_lease(&self, lease: LeaseId) -> bool {
        self.leases.contains_key(&lease)
    }

    /// A new lease.
    pub fn grant(&mut self, now: Instant, ttl: Duration) -> Granted {
        self.next_lease += 1;
        let lease = LeaseId::new(self.next_lease).unwrap();
        self.leases.insert(lease, (ttl, now + ttl));
        Granted { lease, ttl }
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// When it is gone.
    pub fn keep_alive(&mut self, now: Instant, lease: LeaseId) -> Result<Granted, CallError> {
        let (ttl, until) = self.leases.get_mut(&lease).ok_or(CallError::LeaseNotFound)?;
        *until = now + *ttl;
        Ok(Granted { lease, ttl: *ttl })
    }

    /// Runs a transaction.
    ///
    /// # Errors
    /// When a lease that it writes with is gone.
    pub fn transact(&mut self, transaction: &Transaction) -> Result<Committed, CallError> {
        if !transaction.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(Committed { succeeded: false, revision: self.revision });
        }
        let known = |write: &Write| match write {
            Write::Put { lease: Some(lease), .. } => self.leases.contains_key(lease),
            _ => true,
        };
        if !transaction.writes.iter().all(known) {
            return Err(CallError::LeaseNotFound);
        }
        let mut written = BTreeSet::new();
        for write in &transaction.writes {
            let (Write::Put { key, .. } | Write::Delete { key }) = write;
            assert!(written.insert(key), "a transaction writes {key} twice, which etcd refuses");
        }
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for write in &transaction.writes {
            match write {
                Write::Put { key, value, lease } => {
                    let entry = Entry {
                        key: key.clone(),
                        value: value.as_slice().into(),
                        create_revision: self.keys.get(key).map_or(revision, |entry| entry.create_revision),
                        mod_revision: revision,
                        lease: *lease,
                    };
                    self.keys.insert(key.clone(), entry.clone());
                    events.push(WatchEvent::Put(entry));
                }
                Write::Delete { key } => {
                    if self.keys.remove(key).is_some() {
                        events.push(WatchEvent::Delete { key: key.clone(), revision });
                    }
                }
            }
        }
        self.write(events);
        Ok(Committed { succeeded: true, revision: self.revision })
    }

    /// Ends the leases that ran out, one revision each.
    pub fn expire(&mut self, now: Instant) {
        let over: Vec<_> =
            self.leases.iter().filter(|(_, (_, until))| *until <= now).map(|(lease, _)| *lease).collect();
        for lease in over {
            self.leases.remove(&lease);
            let gone: Vec<_> =
                self.keys.values().filter(|entry| entry.lease == Some(lease)).map(|entry| entry.key.clone()).collect();
            let revision = self.revision + 1;
            for key in &gone {
                self.keys.remove(key);
            }
            self.write(gone.into_iter().map(|key| WatchEvent::Delete { key, revision }).collect());
        }
    }

    /// When the next lease runs out.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|(_, until)| *until).min()
    }

    /// The value of a key at a revision of the past, if it was there.
    #[cfg(test)]
    pub(crate) fn value_at(&self, key: &str, at: Revision) -> Option<Entry> {
        let mut events = self.history.range(..=at).flat_map(|(_, events)| events);
        match events.rfind(|event| event.key() == key)? {
            WatchEvent::Put(entry) => Some(entry.clone()),
            WatchEvent::Delete { .. } => None,
        }
    }

    /// The events after `after` up to `upto`, in order.
    #[must_use]
    pub fn events(&self, after: Revision, upto: Revision) -> Vec<WatchEvent> {
        if after >= upto {
            return Vec::new();
        }
        self.history.range(after + 1..=upto).flat_map(|(_, events)| events.clone()).collect()
    }

    fn write(&mut self, events: Vec<WatchEvent>) {
        if !events.is_empty() {
            self.revision += 1;
            self.history.insert(self.revision, events);
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::ModRevision { key, equals } => self.keys.get(key).map_or(0, |entry| entry.mod_revision) == *equals,
            Compare::CreateRevision { key, equals } => {
                self.keys.get(key).map_or(0, |entry| entry.create_revision) == *equals
            }
            Compare::AllModifiedBefore { prefix, revision } => self
                .keys
                .range(prefix.clone()..)
                .take_while(|(key, _)| key.starts_with(prefix))
                .all(|(_, entry)| entry.mod_revision < *revision),
        }
    }
}
