//! Decides which withdrawals count: the evidence that a key is gone, and the records that stay in force without it.
//!
//! A key missing in etcd may have been deleted, or an empty or older etcd may have replaced the previous one. The guard
//! decides by its own observations, without I/O and without a clock:
//!
//! | evidence | effect |
//! |---|---|
//! | a delete event on the watch | the key is withdrawn at once, unless too many go together: then after 30 s. Policies that `meshd-sync` copies are not counted: it holds such deletions itself |
//! | a list lacks the key, no delete event came | held until a second list lacks it too |
//! | another cluster id, a revision below the highest seen, or a key whose last write went back | *doubt*: nothing is withdrawn; operators' values count only if already in force or written since. Ends when everything held is back, or the operator accepts this etcd |
//!
//! Held records are kept here, each with its reason.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    time::{Duration, Instant},
};

use etcd_schema::RecordClass;
use mesh::records::Revision;
use serde::{Deserialize, Serialize};

use super::types::ClusterId;

/// How long withdrawals wait when too many came together.
pub(super) const HOLD: Duration = Duration::from_secs(30);

/// Withdrawals that are less than this apart count as one.
pub(super) const WINDOW: Duration = Duration::from_secs(5);

/// Below it are the keys that `meshd-sync` deletes, once it is sure that the objects are.
const COPIED: &str = "k8s/";

/// How many of a class have to go together, and be more than a third of it, to be held.
const fn mass(class: RecordClass) -> Option<usize> {
    match class {
        RecordClass::Node => Some(3),
        RecordClass::Policy => Some(10),
        RecordClass::Attachment | RecordClass::Object | RecordClass::Setting => None,
    }
}

/// An etcd history: one cluster, up to a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lineage {
    /// The cluster; `None`: it has not been seen yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterId>,
    /// The highest revision seen of it.
    pub revision: Revision,
}

impl Lineage {
    fn is_other(&self, cluster: Option<ClusterId>) -> bool {
        matches!((self.cluster, cluster), (Some(known), Some(seen)) if known != seen)
    }
}

/// Why etcd is not taken for the one that was known before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sign {
    /// etcd has another cluster id.
    Cluster,
    /// Its revision is below the highest seen.
    Revision,
    /// etcd holds a key whose last write is older than the one seen before.
    Key,
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster id changed",
            Self::Revision => "revision went back",
            Self::Key => "version of a key went back",
        })
    }
}

/// An etcd that is not taken for the one that was known before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Doubt {
    /// Why.
    pub sign: Sign,
    /// Its history so far.
    pub seen: Lineage,
    /// Its revision at the first list: later writes were made to this etcd.
    pub since: Revision,
}

/// Evidence that must survive a restart, besides the records in force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Evidence {
    /// The etcd history of the records in force.
    pub lineage: Option<Lineage>,
    /// The etcd that was found instead.
    pub doubt: Option<Doubt>,
    /// Keys in force that etcd does not hold, or not with this value.
    pub held: BTreeSet<String>,
}

/// How it was seen that a key is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absence {
    /// The watch brought a delete event.
    Deleted,
    /// A list lacks it.
    Listed,
}

/// Why a record is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HoldReason {
    /// etcd is in doubt.
    Doubt,
    /// The list of this number lacked it; the next one decides.
    SecondList { list: u64 },
    /// Too many went together.
    Mass { until: Instant },
}

/// A record in force that etcd does not hold, or not with this value.
#[derive(Debug)]
pub(crate) struct HeldRecord<T> {
    pub(crate) class: RecordClass,
    pub(crate) reason: HoldReason,
    /// The record; `None`: the key did not exist, and its value in an etcd in doubt is not in force.
    pub(crate) record: Option<T>,
}

#[derive(Debug)]
struct Withdrawal<T> {
    at: Instant,
    key: String,
    class: RecordClass,
    /// `None`: it is held again.
    record: Option<T>,
    /// Not yet reported.
    fresh: bool,
}

impl<T> Withdrawal<T> {
    /// Whether it counts with others of this class.
    fn is_counted(&self, class: RecordClass) -> bool {
        self.class == class && !(class == RecordClass::Policy && self.key.starts_with(COPIED))
    }
}

/// The outcome of reported withdrawals.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Judged {
    /// No longer in force.
    pub(crate) withdrawn: Vec<String>,
    /// In force, or in force again.
    pub(crate) held: Vec<String>,
}

/// See the head of this file. `T` is a record as its owner keeps it.
#[derive(Debug)]
pub(crate) struct Guard<T> {
    lineage: Option<Lineage>,
    doubt: Option<Doubt>,
    held: BTreeMap<String, HeldRecord<T>>,
    /// Withdrawals of the last [`WINDOW`].
    recent: VecDeque<Withdrawal<T>>,
    lists: u64,
}

impl<T> Default for Guard<T> {
    fn default() -> Self {
        Self { lineage: None, doubt: None, held: BTreeMap::new(), recent: VecDeque::new(), lists: 0 }
    }
}

impl<T> Guard<T> {
    /// Restores the evidence of an earlier run.
    pub(crate) fn recall(&mut self, lineage: Option<Lineage>, doubt: Option<Doubt>) {
        (self.lineage, self.doubt) = (lineage, doubt);
    }

    /// For the next start.
    pub(crate) fn evidence(&self) -> Evidence {
        let in_force = self.held.iter().filter(|(_, held)| held.record.is_some());
        Evidence { lineage: self.lineage, doubt: self.doubt, held: in_force.map(|(key, _)| key.clone()).collect() }
    }

    /// The etcd that is not taken for the one known before, if it is so.
    pub(crate) const fn doubt(&self) -> Option<&Doubt> {
        self.doubt.as_ref()
    }

    /// The etcd history of the records in force.
    pub(crate) const fn lineage(&self) -> Option<&Lineage> {
        self.lineage.as_ref()
    }

    /// A whole list arrives. `went_back`: it holds a key whose last write is older than the one known. To be called
    /// before its keys are reported; [`confirm`](Self::confirm) comes after them. Returns whether it is of another
    /// history than the list before.
    pub(crate) fn list_begins(&mut self, cluster: Option<ClusterId>, revision: Revision, went_back: bool) -> bool {
        let seen = self.doubt.map(|doubt| doubt.seen).or(self.lineage);
        self.take_list(cluster, revision, went_back);
        went_back || seen.is_some_and(|seen| seen.is_other(cluster) || revision < seen.revision)
    }

    fn take_list(&mut self, cluster: Option<ClusterId>, revision: Revision, went_back: bool) {
        self.lists += 1;
        let Some(lineage) = &mut self.lineage else {
            self.lineage = Some(Lineage { cluster, revision });
            return;
        };
        let list = self.lists;
        if let Some(doubt) = &mut self.doubt {
            if doubt.seen.is_other(cluster) && !lineage.is_other(cluster) && revision >= lineage.revision {
                // The previous etcd is back. This is the first list of it that may lack keys.
                lineage.revision = revision;
                self.doubt = None;
                for held in self.held.values_mut().filter(|held| held.reason == HoldReason::Doubt) {
                    held.reason = HoldReason::SecondList { list };
                }
            } else {
                if doubt.seen.is_other(cluster) || revision < doubt.seen.revision {
                    doubt.since = revision;
                }
                doubt.seen = Lineage { cluster, revision };
            }
            return;
        }
        let sign = if lineage.is_other(cluster) {
            Some(Sign::Cluster)
        } else if revision < lineage.revision {
            Some(Sign::Revision)
        } else {
            went_back.then_some(Sign::Key)
        };
        match sign {
            None => *lineage = Lineage { cluster: cluster.or(lineage.cluster), revision },
            Some(sign) => {
                self.doubt = Some(Doubt { sign, seen: Lineage { cluster, revision }, since: revision });
                for held in self.held.values_mut() {
                    if let HoldReason::SecondList { .. } = held.reason {
                        held.reason = HoldReason::Doubt;
                    }
                }
            }
        }
    }

    /// The watch has come to `revision`.
    pub(crate) fn reached(&mut self, revision: Revision) {
        let seen = self.doubt.as_mut().map(|doubt| &mut doubt.seen).or(self.lineage.as_mut());
        if let Some(seen) = seen {
            seen.revision = seen.revision.max(revision);
        }
    }

    /// Whether a value that etcd holds goes into force. `same`: it is in force already, whatever its revision.
    pub(crate) fn counts(&self, class: RecordClass, mod_revision: Revision, same: bool) -> bool {
        self.doubt.is_none_or(|doubt| class.is_written_by_nodes() || same || mod_revision > doubt.since)
    }

    /// The record held for `key`.
    pub(crate) fn held(&self, key: &str) -> Option<&HeldRecord<T>> {
        self.held.get(key)
    }

    /// All that is held, by key.
    pub(crate) fn all_held(&self) -> impl Iterator<Item = (&String, &HeldRecord<T>)> + Clone {
        self.held.iter()
    }

    /// All that is held of the keys that begin with `prefix`.
    pub(crate) fn held_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a HeldRecord<T>> + Clone {
        let from = (std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded);
        self.held.range::<str, _>(from).take_while(move |(key, _)| key.starts_with(prefix)).map(|(_, held)| held)
    }

    /// Keeps `record` in force instead of the value that etcd in doubt holds; `None`: neither is.
    pub(crate) fn keep(&mut self, key: String, class: RecordClass, record: Option<T>) {
        self.held.insert(key, HeldRecord { class, reason: HoldReason::Doubt, record });
    }

    /// A record that was held before a restart: no list has shown it since.
    pub(crate) fn keep_held(&mut self, key: String, class: RecordClass, record: T) {
        let reason = if self.doubt.is_some() { HoldReason::Doubt } else { HoldReason::SecondList { list: self.lists } };
        self.held.insert(key, HeldRecord { class, reason, record: Some(record) });
    }

    /// The key has a value that counts.
    pub(crate) fn returned(&mut self, key: &str) {
        self.held.remove(key);
        self.recent.retain(|recent| recent.key != key);
    }

    /// Lets go of one record.
    pub(crate) fn release(&mut self, key: &str) -> Option<HeldRecord<T>> {
        self.held.remove(key)
    }

    /// Whether a delete event is no evidence: an etcd in doubt can withdraw only keys written to it since.
    fn doubts_deletion(&self, class: RecordClass, written: Revision) -> bool {
        self.doubt.is_some_and(|doubt| !class.is_written_by_nodes() && written <= doubt.since)
    }

    /// The key is gone; `record` was in force, by a write at revision `written`. Returns whether it is held from now
    /// on, else [`judge`](Self::judge) decides.
    pub(crate) fn absent(
        &mut self,
        now: Instant,
        key: String,
        (class, written): (RecordClass, Revision),
        record: T,
        absence: Absence,
    ) -> bool {
        let reason = match absence {
            Absence::Deleted if self.doubts_deletion(class, written) => HoldReason::Doubt,
            Absence::Deleted => {
                self.recent.push_back(Withdrawal { at: now, key, class, record: Some(record), fresh: true });
                return false;
            }
            Absence::Listed if self.doubt.is_some() => HoldReason::Doubt,
            Absence::Listed => HoldReason::SecondList { list: self.lists },
        };
        self.held.insert(key, HeldRecord { class, reason, record: Some(record) });
        true
    }

    /// All keys of a list have been reported: keys that an earlier one lacked too are gone.
    pub(crate) fn confirm(&mut self, now: Instant) {
        let lists = self.lists;
        let twice = |held: &HeldRecord<T>| matches!(held.reason, HoldReason::SecondList { list } if list < lists);
        let gone: Vec<String> = self.held.iter().filter(|(_, held)| twice(held)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(HeldRecord { class, record, .. }) = self.held.remove(&key) {
                self.recent.push_back(Withdrawal { at: now, key, class, record, fresh: true });
            }
        }
    }

    /// Decides on the keys gone since the last call. `all`: hold everything; `left` counts the remaining records of a
    /// class.
    pub(crate) fn judge(&mut self, now: Instant, all: bool, left: impl Fn(RecordClass) -> usize) -> Judged {
        while self.recent.front().is_some_and(|recent| now.saturating_duration_since(recent.at) > WINDOW) {
            self.recent.pop_front();
        }
        let mut judged = Judged::default();
        if self.recent.is_empty() {
            return judged;
        }
        let together = |class: RecordClass| {
            let gone = self.recent.iter().filter(|recent| recent.is_counted(class)).count();
            mass(class).is_some_and(|least| gone >= least && gone * 3 > left(class) + gone)
        };
        let (nodes, policies) = (together(RecordClass::Node), together(RecordClass::Policy));
        let held_policy =
            |held: &HeldRecord<T>| held.class == RecordClass::Policy && matches!(held.reason, HoldReason::Mass { .. });
        // A held policy without its pods and namespaces would select differently.
        let objects = policies || self.held.values().any(held_policy);
        for recent in &mut self.recent {
            let hold = match recent.class {
                RecordClass::Node => nodes || all,
                RecordClass::Policy => (policies && recent.is_counted(RecordClass::Policy)) || all,
                RecordClass::Attachment | RecordClass::Object => objects || all,
                RecordClass::Setting => false,
            };
            let fresh = std::mem::take(&mut recent.fresh);
            if !hold {
                judged.withdrawn.extend(fresh.then(|| recent.key.clone()));
            } else if let Some(record) = recent.record.take() {
                let reason = HoldReason::Mass { until: now + HOLD };
                self.held.insert(recent.key.clone(), HeldRecord { class: recent.class, reason, record: Some(record) });
                judged.held.push(recent.key.clone());
            }
        }
        judged
    }

    /// Ends the doubt once nothing is held for it. If it just ended, returns its sign.
    pub(crate) fn settle(&mut self) -> Option<Sign> {
        if self.held.values().any(|held| held.reason == HoldReason::Doubt) {
            return None;
        }
        let doubt = self.doubt.take()?;
        self.lineage = Some(doubt.seen);
        Some(doubt.sign)
    }

    /// Releases mass deletions after their hold.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<String> {
        let over = |held: &HeldRecord<T>| matches!(held.reason, HoldReason::Mass { until } if until <= now);
        let keys: Vec<String> = self.held.iter().filter(|(_, held)| over(held)).map(|(key, _)| key.clone()).collect();
        for key in &keys {
            self.held.remove(key);
        }
        keys
    }

    /// When [`tick`](Self::tick) next has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let until = |held: &HeldRecord<T>| match held.reason {
            HoldReason::Mass { until } => Some(until),
            _ => None,
        };
        self.held.values().filter_map(until).min()
    }

    /// Whether a second list is needed.
    pub(crate) fn awaits_list(&self) -> bool {
        self.held.values().any(|held| matches!(held.reason, HoldReason::SecondList { .. }))
    }

    /// The operator accepts this etcd: releases and returns all held records.
    pub(crate) fn accept(&mut self) -> BTreeMap<String, HeldRecord<T>> {
        let held = std::mem::take(&mut self.held);
        self.settle();
        held
    }
}

#[cfg(test)]
mod tests;
