//! Records from etcd, and those in force.
//!
//! A pure value: `apply(now, input)` takes the watcher's input and yields a new [`Records`] if anything in force
//! changed. It does no I/O and reads no clock.
//!
//! Bad data never withdraws good state:
//! - an invalid value leaves the last good value of its key in force, and is reported as a [`Problem`];
//! - a withdrawal counts by its evidence, see `guard`: an empty or older etcd withdraws nothing; mass deletions, and
//!   deletions while `config` is missing, stay in force for 30 s;
//! - a `config` that would exclude leased subnets is refused while the leases exist, and so is its deletion.
//!
//! Two lists of the same content change nothing: records are compared by revision, lease and value.

mod copies;
mod duplicates;
mod publish;
mod reading;
mod record;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use etcd_schema::{Cluster, Key, KeyError, KubernetesKey, NodeId, Reader, RecordClass, SubnetKey, SubnetLease};
use mesh::{
    problem::Problem,
    records::{Records, Revision},
};

pub use self::copies::CopyState;
use self::duplicates::Duplicates;
pub(crate) use self::record::StoredKey;
use super::{
    guard::{Absence, Evidence, Guard, Lineage},
    objects::{ObjectChanges, ObjectReader},
    types::{Entry, KeyListing},
};
use crate::types::WatchEvent;

/// Everything below the prefix.
#[derive(Default)]
pub struct Store {
    /// Without a slash at its end; for the commands in remedies.
    prefix: String,
    /// `None`: inputs of policies are not read.
    reader: Option<Arc<dyn ObjectReader>>,
    /// As etcd holds them. A record held by the guard is in force instead.
    keys: BTreeMap<String, StoredKey>,
    guard: Guard<StoredKey>,
    /// How many of `keys` are nodes' records, and policies.
    counts: Counts,
    config_problem: Option<Problem>,
    problems: BTreeMap<String, Problem>,
    /// How many keys are in each directory that this version does not know.
    unknown: BTreeMap<Box<str>, usize>,
    duplicates: Duplicates,
    /// Subnets whose value in force is a retained one, whether or not it yields at present.
    retained_subnets: BTreeSet<SubnetKey>,
    revision: Revision,
    lineage_changes: u64,
    lists: u64,
    /// How often a key under `subnets/` was put or deleted.
    subnet_changes: u64,
    /// Of Kubernetes clusters.
    copies: BTreeMap<Cluster, CopyState>,
    audit_differences: u64,
    records: Arc<Records>,
    /// Inputs of policies that changed since they were last handed on.
    objects: ObjectChanges,
    /// Keys that hold something unreadable, of which an earlier value may be found in etcd, with its revision.
    history: BTreeMap<String, Revision>,
}

/// A key whose earlier values are to be looked for: those before this revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryQuery {
    /// The key below the prefix.
    pub key: String,
    /// The revision of its present value.
    pub before: Revision,
}

#[derive(Debug, Default)]
struct Counts {
    nodes: usize,
    policies: usize,
}

impl Counts {
    fn of(&mut self, class: Option<RecordClass>) -> Option<&mut usize> {
        match class? {
            RecordClass::Node => Some(&mut self.nodes),
            RecordClass::Policy => Some(&mut self.policies),
            _ => None,
        }
    }

    const fn get(&self, class: RecordClass) -> usize {
        match class {
            RecordClass::Node => self.nodes,
            RecordClass::Policy => self.policies,
            _ => 0,
        }
    }
}

/// The outcome of [`Store::accept`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Keys whose records are no longer in force.
    pub withdrawn: usize,
    /// Keys that have another value in force now, or one for the first time.
    pub changed: usize,
}

impl Store {
    /// An empty store of the keys below `prefix`.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.trim_end_matches('/').to_owned(), ..Self::default() }
    }

    /// This store, still empty, with a reader for inputs of policies.
    #[must_use]
    pub fn with_reader(self, reader: Arc<dyn ObjectReader>) -> Self {
        Self { reader: Some(reader), ..self }
    }

    /// The prefix of all keys, without a slash at its end.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The store as it was when the cache was written, for a prefix that does not matter.
    #[must_use]
    pub fn from_cache(revision: Revision, entries: Vec<Entry>, now: Instant) -> Self {
        Self::default().with_cache(revision, entries, now)
    }

    /// This empty store, as it was when the cache was written. It counts as not yet synced.
    #[must_use]
    pub fn with_cache(mut self, revision: Revision, entries: Vec<Entry>, now: Instant) -> Self {
        self.revision = revision;
        self.guard.recall(Some(Lineage { cluster: None, revision }), None);
        // The configuration first and alone: it was in force, and subnets outside of it do not change that.
        let (config, others): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.key == "config");
        for entries in [config, others] {
            let changes = entries.into_iter().map(|entry| (entry.key.clone(), Some(entry))).collect();
            self.apply(now, changes, Absence::Listed);
        }
        self
    }

    /// The store of an earlier run, with its evidence about etcd.
    #[must_use]
    pub fn recall(mut self, evidence: Evidence) -> Self {
        if evidence.lineage.is_some() {
            self.guard.recall(evidence.lineage, evidence.doubt);
        }
        let mut touched = BTreeSet::new();
        for text in evidence.held {
            let Some(kept) = self.remove(&text) else { continue };
            if let Some(class) = kept.class() {
                self.guard.keep_held(text.clone(), class, kept);
                touched.extend(self.hand_on_held(&text));
            }
        }
        self.publish(touched);
        self
    }

    /// Evidence for the next run, besides the records.
    pub fn evidence(&self) -> Evidence {
        self.guard.evidence()
    }

    /// The records in force.
    #[must_use]
    pub fn records(&self) -> Arc<Records> {
        Arc::clone(&self.records)
    }

    /// The revision up to which every change is in here. A choice made from the store may say in a transaction
    /// that nothing was written after it.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Rises when a list comes from another etcd history than the previous one: another cluster, or one that went back.
    /// Earlier revisions, leases and calls in flight are then void.
    pub(crate) const fn lineage_changes(&self) -> u64 {
        self.lineage_changes
    }

    /// How many whole lists went in; 0: nothing was read from etcd yet.
    #[must_use]
    pub const fn lists(&self) -> u64 {
        self.lists
    }

    /// Differences that audits found and the watch had not brought.
    #[must_use]
    pub const fn audit_differences(&self) -> u64 {
        self.audit_differences
    }

    /// Applies a complete list: keys not in it are gone.
    pub(crate) fn on_list(&mut self, now: Instant, listing: KeyListing) -> Option<Arc<Records>> {
        let KeyListing { cluster, revision, entries } = listing;
        let older =
            |entry: &Entry| self.keys.get(&entry.key).is_some_and(|kept| entry.mod_revision < kept.mod_revision);
        self.lineage_changes += u64::from(self.guard.list_begins(cluster, revision, entries.iter().any(older)));
        let mut gone: BTreeSet<String> = self.keys.keys().cloned().collect();
        let mut changes = Vec::new();
        for entry in entries {
            gone.remove(&entry.key);
            if !self.keys.get(&entry.key).is_some_and(|kept| kept.is(&entry)) {
                changes.push((entry.key.clone(), Some(entry)));
            }
        }
        changes.extend(gone.into_iter().map(|key| (key, None)));
        self.revision = revision;
        self.lists += 1;
        self.apply(now, changes, Absence::Listed)
    }

    /// Takes events of whole revisions, in order.
    pub fn changed(&mut self, now: Instant, events: Vec<WatchEvent>) -> Option<Arc<Records>> {
        let mut last = HashMap::new();
        let mut revision = self.revision;
        for event in events {
            // A watch that was opened after a list starts behind it; anything older is known.
            if event.revision() <= self.revision {
                continue;
            }
            revision = revision.max(event.revision());
            match event {
                WatchEvent::Put(entry) => last.insert(entry.key.clone(), Some(entry)),
                WatchEvent::Delete { key, .. } => last.insert(key, None),
            };
        }
        self.revision = revision;
        self.guard.reached(revision);
        let changes = last.into_iter().filter(|(key, entry)| entry.is_some() || self.keys.contains_key(key)).collect();
        self.apply(now, changes, Absence::Deleted)
    }

    /// Compares a list that was read beside the watch, after the watch had time to catch up. Remaining differences were
    /// lost: they are counted, corrected, and their keys returned. Also serves as the second list for keys that an
    /// earlier one lacked.
    pub fn audited(
        &mut self,
        now: Instant,
        listing: KeyListing,
        deleted_since: &BTreeSet<String>,
    ) -> (Option<Arc<Records>>, Vec<String>) {
        let KeyListing { cluster, revision, entries } = listing;
        self.lineage_changes += u64::from(self.guard.list_begins(cluster, self.revision.max(revision), false));
        let mut absent: BTreeSet<String> =
            self.keys.iter().filter(|(_, kept)| kept.mod_revision <= revision).map(|(key, _)| key.clone()).collect();
        let mut changes = Vec::new();
        for entry in entries {
            absent.remove(&entry.key);
            let lost = match self.keys.get(&entry.key) {
                // A later write has come by the watch since.
                Some(kept) => kept.mod_revision <= entry.mod_revision && !kept.is(&entry),
                None => !deleted_since.contains(&entry.key),
            };
            if lost {
                changes.push((entry.key.clone(), Some(entry)));
            }
        }
        changes.extend(absent.into_iter().map(|key| (key, None)));
        let lost: Vec<_> = changes.iter().map(|(key, _)| key.clone()).collect();
        self.audit_differences += lost.len() as u64;
        (self.apply(now, changes, Absence::Listed), lost)
    }

    /// Releases records that were held long enough.
    pub fn tick(&mut self, now: Instant) -> Option<Arc<Records>> {
        let over = self.guard.tick(now);
        if over.is_empty() {
            return None;
        }
        let touched = over.iter().filter_map(|text| self.take_effect(text)).collect();
        self.publish(touched)
    }

    /// The operator accepts this etcd: only its keys stay in force.
    pub fn accept(&mut self) -> (Accepted, Option<Arc<Records>>) {
        let mut accepted = Accepted::default();
        let mut touched = BTreeSet::new();
        for text in self.guard.accept().into_keys() {
            if self.keys.contains_key(&text) {
                accepted.changed += 1;
            } else {
                accepted.withdrawn += 1;
            }
            touched.extend(self.take_effect(&text));
        }
        (accepted, self.publish(touched))
    }

    /// Whether a list lacked something that only another list confirms.
    pub(crate) fn awaits_list(&self) -> bool {
        self.guard.awaits_list()
    }

    /// Takes the inputs of policies that changed since the last call.
    pub(crate) fn take_objects(&mut self) -> ObjectChanges {
        std::mem::take(&mut self.objects)
    }

    /// The keys of which an earlier value is wanted; each is named once.
    pub(crate) fn take_wanted(&mut self) -> Vec<HistoryQuery> {
        std::mem::take(&mut self.history).into_iter().map(|(key, before)| HistoryQuery { key, before }).collect()
    }

    /// Repeats unanswered queries that are still needed.
    pub(crate) fn want_again(&mut self, wanted: Vec<HistoryQuery>) {
        for HistoryQuery { key, before } in wanted {
            let still = |kept: &StoredKey| kept.unreadable && kept.good.is_none() && kept.mod_revision == before;
            if self.keys.get(&key).is_some_and(still) {
                self.history.insert(key, before);
            }
        }
    }

    /// Whether policies could be made of this value.
    pub(crate) fn can_read(&self, entry: &Entry) -> bool {
        let (Ok(key), Some(reader)) = (Key::parse(&entry.key), &self.reader) else { return false };
        reader.read(&key, &entry.value, false).is_ok()
    }

    /// When [`tick`](Self::tick) next has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.guard.next_deadline()
    }

    /// Revision of the last write of a key in etcd, readable or not; 0 when it is not there. For compares.
    #[must_use]
    pub fn mod_revision(&self, key: &str) -> Revision {
        self.keys.get(key).map_or(0, |kept| kept.mod_revision)
    }

    /// The prefixes of every key under `subnets/`, readable or not, and of those whose withdrawal waits.
    pub fn taken(&self) -> impl Iterator<Item = &SubnetKey> + Clone {
        let of = |key: &Option<Key>| matches!(key, Some(Key::Subnet(_)));
        let present = self.keys.range("subnets/".to_owned().."subnets0".to_owned()).map(|(_, kept)| &kept.key);
        let held = self.guard.held_below("subnets/").filter_map(|held| Some(&held.record.as_ref()?.key));
        present.chain(held).filter(move |key| of(key)).filter_map(|key| match key {
            Some(Key::Subnet(subnet)) => Some(subnet),
            _ => None,
        })
    }

    /// The prefixes of every key that etcd holds under `subnets/`, readable or not.
    pub(crate) fn present_subnets(&self) -> impl Iterator<Item = &SubnetKey> + Clone {
        self.keys.range("subnets/".to_owned().."subnets0".to_owned()).filter_map(|(_, kept)| match &kept.key {
            Some(Key::Subnet(subnet)) => Some(subnet),
            _ => None,
        })
    }

    /// How far the copies of Kubernetes clusters are.
    pub(crate) const fn copies(&self) -> &BTreeMap<Cluster, CopyState> {
        &self.copies
    }

    /// Rises whenever [`subnets`](Self::subnets) may be others than before.
    pub(crate) const fn subnet_changes(&self) -> u64 {
        self.subnet_changes
    }

    /// The subnets that etcd holds now and that could be read, with their revision and lease.
    pub(crate) fn subnets(&self) -> impl Iterator<Item = (&SubnetKey, &StoredKey, &SubnetLease)> {
        self.keys.range("subnets/".to_owned().."subnets0".to_owned()).filter_map(|(_, kept)| match &kept.key {
            Some(Key::Subnet(key)) if !kept.unreadable => Some((key, kept, kept.get()?)),
            _ => None,
        })
    }

    /// Whether etcd holds any Kubernetes object.
    pub(crate) fn has_kubernetes_objects(&self) -> bool {
        KubernetesKey::directories().any(|directory| self.keys_below(directory).next().is_some())
    }

    /// The keys that start with `prefix`.
    pub(crate) fn keys_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a StoredKey)> {
        self.keys
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, kept)| (key.as_str(), kept))
    }

    /// A key of etcd, readable or not.
    pub(crate) fn get(&self, key: &str) -> Option<&StoredKey> {
        self.keys.get(key)
    }

    /// The last good value of every key, for the cache; those whose withdrawal waits are among them.
    ///
    /// `config` is the one in force, so that a restart still judges a refused one by it.
    pub fn cached(&self) -> impl Iterator<Item = Entry> {
        let config = self.records.config.as_ref().map(|config| Entry {
            key: Key::Config.to_string(),
            value: config.value.to_json().into(),
            create_revision: config.create_revision,
            mod_revision: config.mod_revision,
            lease: config.lease,
        });
        let present = self.keys.iter().filter(|(key, _)| self.guard.held(key).is_none());
        let held = self.guard.all_held().filter_map(|(key, held)| Some((key, held.record.as_ref()?)));
        let others = present.chain(held).filter(|(_, kept)| kept.key != Some(Key::Config)).filter_map(|(key, kept)| {
            let (value, mod_revision) = kept.cached()?;
            Some(Entry {
                key: key.clone(),
                value: Arc::clone(value),
                create_revision: kept.create_revision,
                mod_revision,
                lease: kept.lease,
            })
        });
        config.into_iter().chain(others)
    }

    /// Applies changes of one input, each key once. `absence`: the evidence for the deletions among them.
    fn apply(&mut self, now: Instant, changes: Vec<(String, Option<Entry>)>, absence: Absence) -> Option<Arc<Records>> {
        let mut touched = BTreeSet::new();
        let mut gone = Vec::new();
        for (text, entry) in changes {
            self.subnet_changes += u64::from(text.starts_with("subnets/"));
            match entry {
                Some(entry) => touched.extend(self.put(text, entry)),
                None => gone.extend(self.remove(&text).map(|kept| (text, kept))),
            }
        }
        // Removals first, so that the deletions that came with them are not held.
        for (text, kept) in gone {
            touched.extend(self.absent(now, text, kept, absence));
        }
        if absence == Absence::Listed {
            self.guard.confirm(now);
        }
        // While `config` is missing, any withdrawal counts as an accident until an operator accepts it.
        let present = self.keys.get(Key::CONFIG).is_some_and(|kept| kept.good.is_some());
        let all = self.records.config.is_some() && !present;
        let judged = self.guard.judge(now, all, |class| self.counts.get(class));
        for text in &judged.withdrawn {
            touched.extend(self.take_effect(text));
        }
        for text in &judged.held {
            touched.extend(self.hand_on_held(text));
        }
        self.release_removed(&mut touched);
        if let Some(sign) = self.guard.settle() {
            tracing::warn!(sign = %sign, revision = self.revision, "etcd replaced or restored; no record missing, \
                using it");
        }
        self.publish(touched)
    }

    /// Whether a value in etcd is to be in force; `before`: the key's previous value.
    fn goes_into_force(&self, text: &str, kept: &StoredKey, before: Option<&StoredKey>) -> bool {
        let Some(class) = kept.class().filter(|_| self.guard.doubt().is_some()) else { return true };
        let known = match self.guard.held(text) {
            Some(held) => held.record.as_ref(),
            None => before,
        };
        let same = known.is_some_and(|known| known.says_the_same(kept));
        if kept.unreadable && !same {
            return false;
        }
        // Without any configuration there is no mesh that another one could harm.
        let first = kept.key == Some(Key::Config) && self.records.config.is_none();
        first || self.guard.counts(class, kept.mod_revision, same)
    }

    /// Removes a key.
    fn remove(&mut self, text: &str) -> Option<StoredKey> {
        let kept = self.keys.remove(text)?;
        self.duplicates.remove(kept.key.as_ref());
        if let Some(Key::Kubernetes(cluster, KubernetesKey::State)) = &kept.key {
            self.copies.remove(cluster);
        }
        if let Some(count) = self.counts.of(kept.class()) {
            *count -= 1;
        }
        if let Some(directory) = unknown_directory(text, &kept)
            && let Some(count) = self.unknown.get_mut(&directory)
        {
            *count -= 1;
            if *count == 0 {
                self.unknown.remove(&directory);
            }
        }
        Some(kept)
    }

    /// A key is gone; `kept` is its last value.
    fn absent(&mut self, now: Instant, text: String, kept: StoredKey, absence: Absence) -> Option<Key> {
        self.problems.remove(&text);
        self.history.remove(&text);
        let class = match kept.class() {
            Some(class) if !kept.owner().is_some_and(|id| self.is_removed(&id)) => class,
            _ => return self.take_effect(&text),
        };
        if let Some(held) = self.guard.held(&text) {
            // It was not in force.
            if held.record.is_none() {
                self.guard.release(&text);
            }
            return kept.key;
        }
        if self.guard.absent(now, text.clone(), (class, kept.mod_revision), kept, absence) {
            self.hand_on_held(&text)
        } else {
            None
        }
    }

    /// Puts the value of a key in etcd, or its absence, in force.
    fn take_effect(&mut self, text: &str) -> Option<Key> {
        let key = Key::parse(text).ok()?;
        if key.rules().reader == Reader::Policy {
            let kept = self.keys.get(text);
            let (item, create_revision) = kept.map_or((None, 0), |kept| (self.item(kept), kept.create_revision));
            self.hand_on(&key, item, create_revision);
        }
        Some(key)
    }

    fn is_removed(&self, id: &NodeId) -> bool {
        self.standing(&Key::Removed(id.clone()).to_string()).is_some()
    }

    /// The record in force under a key, readable or not: the held one, else etcd's.
    fn standing(&self, text: &str) -> Option<&StoredKey> {
        match self.guard.held(text) {
            Some(held) => held.record.as_ref(),
            None => self.keys.get(text),
        }
    }

    /// Releases the held records of removed nodes.
    fn release_removed(&mut self, touched: &mut BTreeSet<Key>) {
        let owned = |kept: &StoredKey| kept.owner().is_some_and(|id| self.is_removed(&id));
        let held = self.guard.all_held().filter(|(_, held)| held.class == RecordClass::Node);
        let removed: Vec<String> =
            held.filter(|(_, held)| held.record.as_ref().is_some_and(owned)).map(|(text, _)| text.clone()).collect();
        for text in removed {
            self.guard.release(&text);
            touched.extend(self.take_effect(&text));
        }
    }
}

/// The directory of a key if it is unknown.
fn unknown_directory(text: &str, kept: &StoredKey) -> Option<Box<str>> {
    match kept.key.is_none().then(|| Key::parse(text))? {
        Err(KeyError::Unknown { directory, .. }) => directory,
        _ => None,
    }
}

#[cfg(test)]
mod tests;
