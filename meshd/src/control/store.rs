//! What etcd says, and what of it is in force.
//!
//! A value: `apply(now, input)` takes what the watcher brings and yields a new [`View`] when anything in force
//! changed. It does no I/O and reads no clock.
//!
//! Bad data never withdraws good state:
//! - a value that cannot be read leaves the last good value of its key in force, and shows as a [`Problem`];
//! - when one revision, or five seconds, withdraw more than a third and at least three of the nodes' records, or any
//!   while `config` is missing, those stay in force for 30 s (their live owners put them back meanwhile), see `guard`;
//! - a `config` that would leave leased subnets outside is not taken while they stand, nor is its deletion.
//!
//! Two lists of the same content change nothing: records are compared by revision, lease and value.

mod publish;
mod record;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use etcd_schema::{Key, NodeId, SubnetKey, SubnetLease, Violations};

pub(crate) use self::record::Kept;
use self::record::{Good, Value, fingerprint};
use super::{
    guard::{Guard, HOLD},
    session::WatchEvent,
    types::{Entry, Revision},
    view::{Problem, ProblemCode, View},
    world::{self, WorldChanges, WorldItem, WorldRecord},
};

/// Everything below the prefix.
#[derive(Debug, Default)]
pub struct Store {
    keys: BTreeMap<String, Kept>,
    withheld: BTreeMap<String, Withheld>,
    guard: Guard<Kept>,
    /// How many of `keys` the guard counts.
    guarded: usize,
    config_problem: Option<Problem>,
    problems: BTreeMap<String, Problem>,
    revision_problem: Option<Problem>,
    /// Subnets whose value in force is a retained one, whether or not it yields at present.
    retained_subnets: BTreeSet<SubnetKey>,
    revision: Revision,
    lists: u64,
    /// How often a key under `subnets/` was put or deleted.
    subnet_changes: u64,
    audit_differences: u64,
    view: Arc<View>,
    /// What policies are made of, as far as it changed since it was last handed on.
    world: WorldChanges,
    /// Keys that hold something unreadable, of which an earlier value may be found in etcd, with its revision.
    history: BTreeMap<String, Revision>,
}

/// A key whose earlier values are to be looked for: those before this revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) key: String,
    pub(crate) before: Revision,
}

#[derive(Debug)]
struct Withheld {
    kept: Kept,
    until: Instant,
}

impl Store {
    /// The store as it was when the cache was written. It counts as not yet synced.
    #[must_use]
    pub fn from_cache(revision: Revision, entries: Vec<Entry>, now: Instant) -> Self {
        let mut store = Self::default();
        let changes = entries.into_iter().map(|entry| (entry.key.clone(), Some(entry))).collect();
        store.revision = revision;
        store.take(now, changes);
        store
    }

    /// The view in force.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view)
    }

    /// The revision up to which every change is in here. A choice made from the store may say in a transaction
    /// that nothing was written after it.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
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

    /// Takes a whole list: what is not in it is gone.
    pub fn listed(&mut self, now: Instant, revision: Revision, entries: Vec<Entry>) -> Option<Arc<View>> {
        let mut gone: BTreeSet<String> = self.keys.keys().cloned().collect();
        let mut changes = Vec::new();
        for entry in entries {
            gone.remove(&entry.key);
            if !self.keys.get(&entry.key).is_some_and(|kept| kept.is(&entry)) {
                changes.push((entry.key.clone(), Some(entry)));
            }
        }
        changes.extend(gone.into_iter().map(|key| (key, None)));
        if revision < self.revision {
            self.revision_problem = Some(Problem {
                code: ProblemCode::RevisionWentBack,
                key: None,
                cause: format!("etcd is at revision {revision}, it was at {} before", self.revision),
                remedy: "if etcd was restored from a backup, check that no subnet was leased twice since \
                         (meshctl status at every node); if not, check --etcd-endpoints"
                    .into(),
            });
        }
        self.revision = revision;
        self.lists += 1;
        self.take(now, changes)
    }

    /// Takes events of whole revisions, in order.
    pub fn changed(&mut self, now: Instant, events: Vec<WatchEvent>) -> Option<Arc<View>> {
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
        let changes = last.into_iter().filter(|(key, entry)| entry.is_some() || self.keys.contains_key(key)).collect();
        self.take(now, changes)
    }

    /// Compares a list that was read beside the watch, which has had time to bring everything in it. What differs
    /// all the same was lost on the way: it is counted, put right, and its keys are returned.
    pub fn audited(
        &mut self,
        now: Instant,
        revision: Revision,
        entries: Vec<Entry>,
        deleted_since: &BTreeSet<String>,
    ) -> (Option<Arc<View>>, Vec<String>) {
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
        (self.take(now, changes), lost)
    }

    /// Lets go of what has been held long enough.
    pub fn tick(&mut self, now: Instant) -> Option<Arc<View>> {
        let over: Vec<_> =
            self.withheld.iter().filter(|(_, held)| held.until <= now).map(|(key, _)| key.clone()).collect();
        if over.is_empty() {
            return None;
        }
        let touched =
            over.into_iter().filter_map(|key| self.withheld.remove(&key).and_then(|held| held.kept.key)).collect();
        self.publish(touched)
    }

    /// What policies are made of, as far as it changed since the last call.
    pub fn take_world(&mut self) -> WorldChanges {
        std::mem::take(&mut self.world)
    }

    /// The keys of which an earlier value is wanted; each is named once.
    pub(crate) fn take_wanted(&mut self) -> Vec<Wanted> {
        std::mem::take(&mut self.history).into_iter().map(|(key, before)| Wanted { key, before }).collect()
    }

    /// Asks again for what was not answered, as far as it is still wanted.
    pub(crate) fn want_again(&mut self, wanted: Vec<Wanted>) {
        for Wanted { key, before } in wanted {
            let still = |kept: &Kept| kept.unreadable && kept.good.is_none() && kept.mod_revision == before;
            if self.keys.get(&key).is_some_and(still) {
                self.history.insert(key, before);
            }
        }
    }

    /// Whether this is a value that policies could be made of.
    pub(crate) fn can_read(entry: &Entry) -> bool {
        Key::parse(&entry.key).is_ok_and(|key| world::read(&key, &entry.value).is_some_and(|read| read.is_ok()))
    }

    /// Takes an earlier value of a key that was [`wanted`](Self::take_wanted): it is in force if nothing better is.
    pub(crate) fn earlier(&mut self, wanted: &Wanted, earlier: &Entry) -> Option<Arc<View>> {
        let kept = self.keys.get_mut(&wanted.key)?;
        let fits = kept.unreadable
            && kept.good.is_none()
            && kept.mod_revision == wanted.before
            && kept.create_revision == earlier.create_revision;
        let key = kept.key.clone().filter(|_| fits)?;
        let read = world::read(&key, &earlier.value)?.ok()?;
        kept.good = Some(Good { bytes: read.reduced, mod_revision: earlier.mod_revision, value: Value::World });
        if let Some(problem) = self.problems.get_mut(&wanted.key) {
            let before = problem.cause.rsplit_once(" (").map_or(problem.cause.as_str(), |(violations, _)| violations);
            problem.cause = format!("{before} (its value of revision {} stays in force)", earlier.mod_revision);
        }
        let record = WorldRecord { item: read.item, create_revision: earlier.create_revision };
        self.world.insert(key, Some(record));
        self.publish(BTreeSet::new())
    }

    /// When [`tick`](Self::tick) next has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.withheld.values().map(|held| held.until).min()
    }

    /// Revision of the last write of a key in etcd, readable or not; 0 when it is not there. For compares.
    #[must_use]
    pub fn mod_revision(&self, key: &str) -> Revision {
        self.keys.get(key).map_or(0, |kept| kept.mod_revision)
    }

    /// The prefixes of every key under `subnets/`, readable or not, and of those whose withdrawal waits.
    pub fn taken(&self) -> impl Iterator<Item = &SubnetKey> + Clone {
        let of = |key: &Option<Key>| matches!(key, Some(Key::Subnet(_)));
        let subnets = "subnets/".to_owned().."subnets0".to_owned();
        let present = self.keys.range(subnets.clone()).map(|(_, kept)| &kept.key);
        let held = self.withheld.range(subnets).map(|(_, held)| &held.kept.key);
        present.chain(held).filter(move |key| of(key)).filter_map(|key| match key {
            Some(Key::Subnet(subnet)) => Some(subnet),
            _ => None,
        })
    }

    /// The prefixes of every key that etcd holds under `subnets/`, readable or not.
    pub fn present_subnets(&self) -> impl Iterator<Item = &SubnetKey> + Clone {
        self.keys.range("subnets/".to_owned().."subnets0".to_owned()).filter_map(|(_, kept)| match &kept.key {
            Some(Key::Subnet(subnet)) => Some(subnet),
            _ => None,
        })
    }

    /// Rises whenever [`subnets`](Self::subnets) may be others than before.
    pub(crate) const fn subnet_changes(&self) -> u64 {
        self.subnet_changes
    }

    /// The subnets that etcd holds now and that could be read, with their revision and lease.
    pub(crate) fn subnets(&self) -> impl Iterator<Item = (&SubnetKey, &Kept, &SubnetLease)> {
        self.keys.range("subnets/".to_owned().."subnets0".to_owned()).filter_map(|(_, kept)| {
            match (&kept.key, kept.good.as_ref().map(|good| &good.value)) {
                (Some(Key::Subnet(key)), Some(Value::Subnet(lease))) if !kept.unreadable => {
                    Some((key, kept, lease.as_ref()))
                }
                _ => None,
            }
        })
    }

    /// The keys that start with `prefix`.
    pub(crate) fn keys_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Kept)> {
        self.keys
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, kept)| (key.as_str(), kept))
    }

    /// A key of etcd, readable or not.
    pub(crate) fn get(&self, key: &str) -> Option<&Kept> {
        self.keys.get(key)
    }

    /// The last good value of every key, for the cache; those whose withdrawal waits are among them.
    ///
    /// `config` is the one in force: a restart must not forget what a refused one is measured against.
    pub fn cached(&self) -> impl Iterator<Item = Entry> {
        let config = self.view.config.as_ref().map(|config| Entry {
            key: Key::Config.to_string(),
            value: config.value.to_json().into(),
            create_revision: config.create_revision,
            mod_revision: config.mod_revision,
            lease: config.lease,
        });
        let present = self.keys.iter().filter(|(_, kept)| kept.key != Some(Key::Config));
        let held = self.withheld.iter().map(|(key, held)| (key, &held.kept));
        let others = present.chain(held).filter_map(|(key, kept)| {
            let good = kept.good.as_ref()?;
            Some(Entry {
                key: key.clone(),
                value: Arc::clone(&good.bytes),
                create_revision: kept.create_revision,
                mod_revision: good.mod_revision,
                lease: kept.lease,
            })
        });
        config.into_iter().chain(others)
    }

    /// Takes changes that happened together; a key stands in them once.
    fn take(&mut self, now: Instant, changes: Vec<(String, Option<Entry>)>) -> Option<Arc<View>> {
        let mut touched = BTreeSet::new();
        let mut withdrawn = Vec::new();
        for (text, entry) in changes {
            self.subnet_changes += u64::from(text.starts_with("subnets/"));
            match entry {
                Some(entry) => {
                    self.guard.returned(&text);
                    self.withheld.remove(&text);
                    touched.extend(self.put(text, entry));
                }
                None => {
                    self.problems.remove(&text);
                    self.history.remove(&text);
                    if let Some(kept) = self.keys.remove(&text) {
                        self.guarded -= usize::from(kept.guarded());
                        if let Some(key) = kept.key.as_ref().filter(|key| world::concerns(key)) {
                            self.world.insert(key.clone(), None);
                        }
                        touched.extend(kept.key.clone());
                        withdrawn.push((text, kept));
                    }
                }
            }
        }
        // Removals first, so that the deletions that came with them are not held.
        for (text, kept) in withdrawn {
            if kept.guarded() && !kept.owner().is_some_and(|id| self.is_removed(&id)) {
                self.guard.withdrawn(now, text, kept);
            }
        }
        // What goes while `config` is missing is an accident until someone says otherwise, however few they are.
        let all = self.view.config.is_some() && self.in_force(&Key::Config).is_none();
        let held = self.guard.judge(now, all, self.guarded);
        for (text, kept) in held {
            touched.extend(kept.key.clone());
            self.withheld.insert(text, Withheld { kept, until: now + HOLD });
        }
        self.release_removed(&mut touched);
        self.publish(touched)
    }

    /// Takes one value; the key it names, unless it is none of ours.
    fn put(&mut self, text: String, entry: Entry) -> Option<Key> {
        self.problems.remove(&text);
        let key = match Key::parse(&text) {
            Ok(key) => Some(key),
            Err(error) => {
                self.problems.insert(
                    text.clone(),
                    Problem {
                        code: ProblemCode::BadKey,
                        key: Some(text.clone()),
                        cause: error.to_string(),
                        remedy: format!("if nothing else needs it, etcdctl del /meshd/{text} (--etcd-prefix instead of /meshd, where that is set)"),
                    },
                );
                None
            }
        };
        let before = self.keys.remove(&text);
        self.guarded -= usize::from(before.as_ref().is_some_and(Kept::guarded));
        let mut kept = Kept {
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: entry.lease,
            fingerprint: fingerprint(&entry.value),
            key: key.clone(),
            good: None,
            unreadable: false,
        };
        let mut refused = None;
        // A key that was deleted and made anew says nothing with its old value.
        let earlier =
            before.filter(|before| before.create_revision == entry.create_revision).and_then(|before| before.good);
        if let Some(key) = &key {
            match Value::parse(key, &entry.value) {
                Some(Ok(value)) => {
                    let (bytes, mod_revision) = (entry.value, entry.mod_revision);
                    kept.good = Some(Good { bytes, mod_revision, value });
                }
                Some(Err(violations)) => {
                    kept.good = earlier;
                    let effect =
                        if kept.good.is_some() { "the last good value stays in force" } else { "it has no effect" };
                    refused = Some((violations, effect.to_owned()));
                }
                None => refused = self.put_world(&text, key, &entry, &mut kept, earlier),
            }
        }
        if let Some((violations, effect)) = refused {
            kept.unreadable = true;
            self.problems.insert(
                text.clone(),
                Problem {
                    code: ProblemCode::BadValue,
                    key: Some(text.clone()),
                    cause: format!("{violations} ({effect})"),
                    remedy: format!("put a value that `meshctl check {text} FILE` accepts"),
                },
            );
        }
        self.guarded += usize::from(kept.guarded());
        self.keys.insert(text, kept);
        key
    }

    /// Takes a value that policies are made of. Returns what is wrong with it, and what is enforced instead.
    fn put_world(
        &mut self,
        text: &str,
        key: &Key,
        entry: &Entry,
        kept: &mut Kept,
        earlier: Option<Good>,
    ) -> Option<(Violations, String)> {
        self.history.remove(text);
        let refused = match world::read(key, &entry.value)? {
            Ok(read) => {
                kept.good = Some(Good { bytes: read.reduced, mod_revision: entry.mod_revision, value: Value::World });
                self.hand_on(key, Some(read.item), entry.create_revision);
                return None;
            }
            Err(refusal) if earlier.is_some() => {
                kept.good = earlier;
                return Some((refusal.violations, "the last good value stays in force".to_owned()));
            }
            Err(refusal) => {
                let rewritten = entry.mod_revision > entry.create_revision;
                if rewritten && world::has_history(key) {
                    self.history.insert(text.to_owned(), entry.mod_revision);
                }
                let item = refusal.in_force(key, rewritten);
                let effect = world::effect(item.as_ref(), key);
                self.hand_on(key, item, entry.create_revision);
                (refusal.violations, effect)
            }
        };
        Some(refused)
    }

    fn hand_on(&mut self, key: &Key, item: Option<WorldItem>, create_revision: Revision) {
        let record = item.map(|item| WorldRecord { item, create_revision });
        self.world.insert(key.clone(), record);
    }

    fn is_removed(&self, id: &NodeId) -> bool {
        self.keys.contains_key(&Key::Removed(id.clone()).to_string())
    }

    /// What belongs to a node that was removed is never held.
    fn release_removed(&mut self, touched: &mut BTreeSet<Key>) {
        if self.withheld.is_empty() {
            return;
        }
        let removed: Vec<_> = self
            .withheld
            .iter()
            .filter(|(_, held)| held.kept.owner().is_some_and(|id| self.is_removed(&id)))
            .map(|(text, _)| text.clone())
            .collect();
        for text in removed {
            touched.extend(self.withheld.remove(&text).and_then(|held| held.kept.key));
        }
    }
}

#[cfg(test)]
mod tests;
