//! Reads values, and decides which value of a key is its last good one.
//!
//! One rule for all kinds of records: a value that cannot be read leaves the earlier one of its key in force, unless
//! the key was deleted in between. Without an earlier one, what stands for the value is the reader's to say.

use std::{collections::BTreeSet, sync::Arc};

use etcd_schema::{Key, KeyError, KubernetesKey, Reader, RecordClass, Value, Violations};
use mesh::{
    problem::{Problem, ProblemCode},
    records::{Records, Revision},
};
use text::quote;

use super::{
    CopyState, HistoryQuery, Store,
    record::{Good, StoredKey, fingerprint},
    unknown_directory,
};
use crate::{
    objects::{Item, ObjectRecord},
    types::Entry,
};

/// A value that cannot be read.
struct UnreadableValue {
    violations: Violations,
    /// The effect without an earlier value, in words.
    effect: String,
    /// The value has an effect although it is unreadable: it is cached for the next start.
    denies: bool,
    /// Policies are made of it.
    is_object: bool,
    stand_in: Option<Item>,
}

/// The problem of a key that does not belong to the mesh.
pub(super) fn bad_key(key: &str, cause: String, remedy: String) -> Problem {
    Problem { code: ProblemCode::BadKey, key: Some(key.to_owned()), cause, remedy }
}

/// The problem of an unreadable value.
pub(super) fn bad_value(key: Option<&str>, cause: String, remedy: String) -> Problem {
    Problem { code: ProblemCode::BadValue, key: key.map(str::to_owned), cause, remedy }
}

impl Store {
    /// Takes one value; returns the key it names, if meshd reads it.
    pub(super) fn put(&mut self, text: String, entry: Entry) -> Option<Key> {
        self.problems.remove(&text);
        self.history.remove(&text);
        let key = self.parse_key(&text);
        let before = self.remove(&text);
        if let Some(Key::Kubernetes(cluster, KubernetesKey::State)) = &key
            && let Some(state) = CopyState::parse(&entry.value)
        {
            self.copies.insert(cluster.clone(), state);
        }
        let mut kept = StoredKey {
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: entry.lease,
            fingerprint: fingerprint(&entry.value),
            key: key.clone(),
            good: None,
            unreadable: false,
            refused: None,
        };
        // `Some`: a change to hand on, with the value or as withdrawn.
        let mut item = None;
        match key.as_ref().and_then(|key| self.read(key, &entry)) {
            None => {}
            Some(Ok((good, read))) => {
                kept.good = Some(good);
                item = read.map(Some);
            }
            Some(Err(refused)) => {
                kept.unreadable = true;
                // The old value of a key that was deleted and created again does not count.
                let same = before.as_ref().filter(|before| before.create_revision == entry.create_revision);
                kept.good = same.and_then(|before| before.good.clone());
                let mut effect = "the last good value stays in force";
                if kept.good.is_none() {
                    effect = &refused.effect;
                    kept.refused = refused.denies.then_some(entry.value);
                    if refused.is_object {
                        item = Some(refused.stand_in);
                        // Nodes correct their own records.
                        let is_nodes = kept.class().is_some_and(RecordClass::is_written_by_nodes);
                        if entry.mod_revision > entry.create_revision && !is_nodes {
                            self.history.insert(text.clone(), entry.mod_revision);
                        }
                    }
                }
                let problem = self.unreadable_value(&text, &refused.violations, effect);
                self.problems.insert(text.clone(), problem);
            }
        }
        if self.goes_into_force(&text, &kept, before.as_ref()) {
            self.guard.returned(&text);
            if let (Some(key), Some(item)) = (&key, item) {
                self.hand_on(key, item, entry.create_revision);
            }
        } else if let Some(class) = kept.class() {
            self.history.remove(&text);
            if self.guard.held(&text).is_none() {
                self.guard.keep(text.clone(), class, before);
            }
            self.hand_on_held(&text);
        }
        if let Some(count) = self.counts.of(kept.class()) {
            *count += 1;
        }
        if let Some(directory) = unknown_directory(&text, &kept) {
            *self.unknown.entry(directory).or_default() += 1;
        }
        let keys = &self.keys;
        self.duplicates.put(key.as_ref(), |other| keys.contains_key(&other.to_string()));
        self.keys.insert(text, kept);
        key
    }

    /// The key that `text` names; a key that does not belong to the mesh is a problem, and one in an unknown directory is not.
    fn parse_key(&mut self, text: &str) -> Option<Key> {
        match Key::parse(text) {
            Ok(key) => Some(key),
            Err(KeyError::Unknown { directory: Some(_), .. }) => None,
            Err(error) => {
                let place = quote(&format!("{}/{text}", self.prefix)).into_owned();
                let remedy = format!("etcdctl del {place} # if no other program needs it");
                self.problems.insert(text.to_owned(), bad_key(text, error.to_string(), remedy));
                None
            }
        }
    }

    /// Reads a value; `None`: its key is not one that is read.
    fn read(&self, key: &Key, entry: &Entry) -> Option<Result<(Good, Option<Item>), UnreadableValue>> {
        let mod_revision = entry.mod_revision;
        match key.rules().reader {
            Reader::Mesh => {
                let read = Value::parse(key, &entry.value)?;
                let good = |value| Good { bytes: Arc::clone(&entry.value), mod_revision, value: Some(value) };
                Some(read.map(|value| (good(value), None)).map_err(|violations| UnreadableValue {
                    violations,
                    effect: "it has no effect".to_owned(),
                    denies: Value::stand_in(key).is_some(),
                    is_object: false,
                    stand_in: None,
                }))
            }
            Reader::Policy => {
                let read = self.reader.as_ref()?.read(key, &entry.value, mod_revision > entry.create_revision);
                let good = |bytes| Good { bytes, mod_revision, value: None };
                Some(read.map(|read| (good(read.canonical), Some(read.item))).map_err(|refused| UnreadableValue {
                    violations: refused.violations,
                    effect: refused.effect,
                    denies: refused.stand_in.is_some(),
                    is_object: true,
                    stand_in: refused.stand_in,
                }))
            }
            Reader::Unread => None,
        }
    }

    fn unreadable_value(&self, text: &str, violations: &Violations, effect: &str) -> Problem {
        let remedy = format!(
            "meshctl check {0} FILE && etcdctl put {1} < FILE # with a corrected value in FILE",
            quote(text),
            quote(&format!("{}/{text}", self.prefix))
        );
        bad_value(Some(text), format!("{violations} ({effect})"), remedy)
    }

    /// Takes an earlier value of a key that was [`wanted`](Self::take_wanted): it is in force if nothing better is.
    pub(crate) fn offer_earlier(&mut self, wanted: &HistoryQuery, earlier: &Entry) -> Option<Arc<Records>> {
        let kept = self.keys.get(&wanted.key)?;
        let fits = kept.unreadable
            && self.guard.held(&wanted.key).is_none()
            && kept.good.is_none()
            && kept.mod_revision == wanted.before
            && kept.create_revision == earlier.create_revision;
        let key = kept.key.clone().filter(|_| fits)?;
        let (good, item) = self.read(&key, earlier)?.ok()?;
        let kept = self.keys.get_mut(&wanted.key)?;
        kept.good = Some(good);
        kept.refused = None;
        if let Some(problem) = self.problems.get_mut(&wanted.key) {
            let before = problem.cause.rsplit_once(" (").map_or(problem.cause.as_str(), |(violations, _)| violations);
            problem.cause = format!("{before} (its value of revision {} stays in force)", earlier.mod_revision);
        }
        self.hand_on(&key, item, earlier.create_revision);
        self.publish(BTreeSet::new())
    }

    /// Puts the record that the guard holds for a key in force.
    pub(super) fn hand_on_held(&mut self, text: &str) -> Option<Key> {
        let kept = self.guard.held(text)?.record.as_ref()?;
        let key = kept.key.clone()?;
        if let Some(item) = self.item(kept) {
            let record = ObjectRecord { item, create_revision: kept.create_revision, held: true };
            self.objects.insert(key.clone(), Some(record));
        }
        Some(key)
    }

    /// The parsed value of a key for policies; parsed values are not kept.
    pub(super) fn item(&self, kept: &StoredKey) -> Option<Item> {
        let key = kept.key.as_ref().filter(|key| key.rules().reader == Reader::Policy)?;
        let (bytes, _) = kept.cached()?;
        match self.reader.as_ref()?.read(key, bytes, kept.mod_revision > kept.create_revision) {
            Ok(read) => Some(read.item),
            Err(refused) => refused.stand_in,
        }
    }

    pub(super) fn hand_on(&mut self, key: &Key, item: Option<Item>, create_revision: Revision) {
        let record = item.map(|item| ObjectRecord { item, create_revision, held: false });
        self.objects.insert(key.clone(), record);
    }
}
