//! etcd, an API server and the shell between them, as far as a term sees them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use control_core::types::{CallError, Committed, Compare, Entry, KeyListing, Transaction, Write};
use mesh::records::Revision;
use serde_json::json;

use super::super::*;
use crate::canonical;

fn keys() -> ClusterKeys {
    ClusterKeys::new(&"east".parse().unwrap())
}

/// etcd's rules for transactions.
#[derive(Debug, Clone, Default)]
pub(super) struct Etcd {
    revision: Revision,
    entries: BTreeMap<String, Entry>,
    /// How many operations each transaction had.
    pub(super) operations: Vec<usize>,
    /// Bytes of the longest one.
    pub(super) longest: usize,
}

impl Etcd {
    pub(super) fn commit(&mut self, transaction: &Transaction) -> Result<Committed, CallError> {
        let holds = transaction.compares.iter().all(|compare| match compare {
            Compare::ModRevision { key, equals } => self.entries.get(key).map_or(0, |e| e.mod_revision) == *equals,
            Compare::CreateRevision { key, equals } => {
                self.entries.get(key).map_or(0, |e| e.create_revision) == *equals
            }
            Compare::AllModifiedBefore { .. } => panic!("not used"),
        });
        assert!(transaction.compares.len() <= 128 && transaction.writes.len() <= 128);
        if holds {
            self.revision += 1;
            self.operations.push(transaction.writes.len());
            let mut keys = BTreeSet::new();
            let mut bytes = 0;
            for write in &transaction.writes {
                let (Write::Put { key, .. } | Write::Delete { key }) = write;
                assert!(keys.insert(key), "etcd refuses two operations on {key}");
                match write {
                    Write::Put { key, value, .. } => {
                        bytes += key.len() + value.len();
                        self.store(key, value);
                    }
                    Write::Delete { key } => {
                        self.entries.remove(key);
                    }
                }
            }
            self.longest = self.longest.max(bytes);
        }
        Ok(Committed { succeeded: holds, revision: self.revision })
    }

    fn store(&mut self, key: &str, value: &[u8]) {
        let create_revision = self.entries.get(key).map_or(self.revision, |entry| entry.create_revision);
        let entry = Entry {
            key: key.to_owned(),
            value: value.into(),
            create_revision,
            mod_revision: self.revision,
            lease: None,
        };
        self.entries.insert(key.to_owned(), entry);
    }

    pub(super) fn put(&mut self, key: &str, value: &str) {
        self.revision += 1;
        self.store(key, value.as_bytes());
    }

    pub(super) fn delete(&mut self, key: &str) {
        self.revision += 1;
        self.entries.remove(key);
    }

    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(super) fn expire_leader(&mut self) {
        self.delete("k8s/east/leader");
    }

    pub(super) fn state(&self) -> SyncState {
        serde_json::from_slice(&self.entries["k8s/east/state"].value).unwrap()
    }

    /// Everything but leader, state and confirm.
    pub(super) fn objects(&self) -> BTreeMap<String, String> {
        let objects = self.entries.iter().filter(|(key, _)| key.matches('/').count() > 2);
        objects.map(|(key, entry)| (key.clone(), String::from_utf8(entry.value.to_vec()).unwrap())).collect()
    }

    pub(super) fn written_since(&self, before: &Self) -> Vec<String> {
        let written = self.entries.values().filter(|entry| entry.mod_revision > before.revision);
        let deleted = before.entries.keys().filter(|key| !self.entries.contains_key(*key));
        written.map(|entry| entry.key.clone()).chain(deleted.cloned()).collect()
    }

    fn listing(&self) -> KeyListing {
        KeyListing { cluster: None, revision: self.revision, entries: self.entries.values().cloned().collect() }
    }
}

/// An API server: objects by kind and path, and what happened to them.
#[derive(Debug, Clone)]
pub(super) struct Api {
    uid: String,
    pub(super) version: u64,
    pub(super) objects: BTreeMap<(ObjectKind, String), (String, u64)>,
    log: Vec<(u64, ObjectKind, String, bool)>,
}

impl Api {
    pub(super) fn new(uid: &str) -> Self {
        let mut api = Self { uid: uid.to_owned(), version: 100, objects: BTreeMap::new(), log: Vec::new() };
        api.put(ObjectKind::Namespace, "kube-system", "1");
        api.put(ObjectKind::Namespace, "shop", "1");
        api
    }

    pub(super) fn uid(&self) -> Option<String> {
        Some(self.uid.clone())
    }

    pub(super) fn put(&mut self, kind: ObjectKind, path: &str, label: &str) {
        self.version += 1;
        self.objects.insert((kind, path.to_owned()), (label.to_owned(), self.version));
        self.log.push((self.version, kind, path.to_owned(), true));
    }

    pub(super) fn delete(&mut self, kind: ObjectKind, path: &str) {
        if self.objects.remove(&(kind, path.to_owned())).is_some() {
            self.version += 1;
            self.log.push((self.version, kind, path.to_owned(), false));
        }
    }

    pub(super) fn object(&self, kind: ObjectKind, path: &str) -> CanonicalObject {
        let (label, version) = self.objects.get(&(kind, path.to_owned())).cloned().unwrap_or_default();
        let mut metadata = json!({"name": path.rsplit('/').next(), "resourceVersion": version.to_string()});
        if let Some((namespace, _)) = path.split_once('/') {
            metadata["namespace"] = namespace.into();
        }
        let mut object = json!({"metadata": metadata});
        if matches!(kind, ObjectKind::NetworkPolicy | ObjectKind::ClusterNetworkPolicy) {
            object["spec"] = json!({"x": label});
        } else {
            object["metadata"]["labels"] = json!({"a": label});
        }
        canonical::read(kind, "v1", &object.to_string()).unwrap()
    }

    pub(super) fn canonical(&self) -> BTreeMap<String, String> {
        let keys = keys();
        let value = |kind, path: &str| String::from_utf8(self.object(kind, path).value).unwrap();
        self.objects.keys().map(|(kind, path)| (keys.object(*kind, path), value(*kind, path))).collect()
    }

    pub(super) fn paths(&self, kind: ObjectKind) -> Vec<String> {
        self.objects.keys().filter(|(of, _)| *of == kind).map(|(_, path)| path.clone()).collect()
    }

    pub(super) fn page(&self, kind: ObjectKind, paths: &[String]) -> Input {
        let objects = paths.iter().map(|path| self.object(kind, path)).collect();
        Input::Page { kind, resource_version: self.version.to_string(), objects }
    }

    /// What happened to a kind after `version`.
    pub(super) fn events(&self, kind: ObjectKind, version: u64) -> Vec<(u64, Input)> {
        let events = self.log.iter().filter(|(at, of, ..)| *of == kind && *at > version);
        events
            .map(|(at, _, path, there)| {
                let mut object = self.object(kind, path);
                object.resource_version = at.to_string();
                // A later value in place of the one of then is what a watch of the model shows.
                let there = *there && self.objects.contains_key(&(kind, path.clone()));
                (*at, if there { Input::Applied(object) } else { Input::Deleted(object) })
            })
            .collect()
    }
}

/// A term and the shell around it.
pub(super) struct Term {
    copier: Copier,
    now: Duration,
    pub(super) read: BTreeMap<ObjectKind, u64>,
    pub(super) listed: BTreeSet<ObjectKind>,
}

impl Term {
    /// Takes the leader key, which must be free; no node keeps policies waiting.
    pub(super) fn begin(etcd: &mut Etcd, holder: &str) -> Self {
        let mut term = Self::begin_without_nodes(etcd, holder);
        term.write(Input::Nodes(Vec::new()), etcd);
        term
    }

    /// The same before the nodes of the mesh are read.
    pub(super) fn begin_without_nodes(etcd: &mut Etcd, holder: &str) -> Self {
        assert!(etcd.get("k8s/east/leader").is_none());
        etcd.put("k8s/east/leader", holder);
        let fence = etcd.entries["k8s/east/leader"].create_revision;
        Self::with(|now| Copier::new(keys(), holder.to_owned(), fence, &etcd.listing(), now))
    }

    /// The same after the one before ended.
    pub(super) fn begin_beside(etcd: &mut Etcd, holder: &str) -> Self {
        etcd.expire_leader();
        Self::begin(etcd, holder)
    }

    pub(super) fn trial(etcd: &Etcd) -> Self {
        Self::with(|now| Copier::trial(keys(), &etcd.listing(), now))
    }

    fn with(copier: impl FnOnce(Now) -> Copier) -> Self {
        let now = Duration::from_secs(1000);
        let copier = copier(Now { monotonic: now, unix: 1_700_000_000 + now.as_secs() });
        Self { copier, now, read: BTreeMap::new(), listed: BTreeSet::new() }
    }

    pub(super) fn planned(&self) -> Vec<(String, Planned)> {
        self.copier.planned().collect()
    }

    pub(super) fn refusal(&self) -> Option<String> {
        self.copier.refusal()
    }

    pub(super) fn will_hold(&self, kind: ObjectKind, path: &str) -> bool {
        self.copier.will_hold(kind, path)
    }

    pub(super) fn step(&mut self, input: Input) -> Vec<Effect> {
        if let Input::ListEnded { kind, .. } = &input {
            self.listed.insert(*kind);
        }
        self.copier.step(Now { monotonic: self.now, unix: 1_700_000_000 + self.now.as_secs() }, input)
    }

    pub(super) fn answer(&mut self, result: Result<Committed, CallError>) -> Vec<Effect> {
        self.step(Input::Written(result))
    }

    /// A step, and all writes that follow from it; returns everything else.
    pub(super) fn write(&mut self, input: Input, etcd: &mut Etcd) -> Vec<Effect> {
        let mut effects = VecDeque::from(self.step(input));
        let mut others = Vec::new();
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Write(transaction) => {
                    let committed = etcd.commit(&transaction);
                    effects.extend(self.answer(committed));
                }
                other => others.push(other),
            }
        }
        others
    }

    /// An operator writes the token, and it is read.
    pub(super) fn confirm(&mut self, token: &str, etcd: &mut Etcd) -> Vec<Effect> {
        etcd.put("k8s/east/confirm", token);
        self.read_confirm(etcd)
    }

    pub(super) fn read_confirm(&mut self, etcd: &mut Etcd) -> Vec<Effect> {
        self.write(Input::Confirm(etcd.get("k8s/east/confirm").cloned()), etcd)
    }

    pub(super) fn list(&mut self, kind: ObjectKind, api: &Api, etcd: &mut Etcd) -> Vec<Effect> {
        let mut effects = self.write(Input::ListBegun { kind, uid: api.uid() }, etcd);
        let paths = api.paths(kind);
        let pages: Vec<_> = if paths.is_empty() { vec![&[][..]] } else { paths.chunks(7).collect() };
        for page in pages {
            effects.extend(self.write(api.page(kind, page), etcd));
        }
        effects.extend(self.write(Input::ListEnded { kind, uid: api.uid() }, etcd));
        effects.extend(self.write(Input::Watching { kind, uid: api.uid() }, etcd));
        self.read.insert(kind, api.version);
        effects
    }

    pub(super) fn list_all(&mut self, api: &Api, etcd: &mut Etcd) {
        for kind in ObjectKind::ALL {
            self.list(kind, api, etcd);
        }
    }

    /// Every watch says how far it is.
    pub(super) fn bookmark_all(&mut self, api: &Api, etcd: &mut Etcd) {
        for kind in ObjectKind::ALL {
            self.write(Input::Bookmark { kind, resource_version: api.version.to_string() }, etcd);
        }
    }

    pub(super) fn deliver_all(&mut self, api: &Api, etcd: &mut Etcd) {
        for kind in ObjectKind::ALL {
            let Some(read) = self.read.get(&kind).copied() else { continue };
            for (version, event) in api.events(kind, read) {
                self.write(event, etcd);
                self.read.insert(kind, version);
            }
        }
    }

    /// Hears what happened, and keeps the transactions.
    pub(super) fn deliver_without_writing(&mut self, api: &Api) -> Vec<Transaction> {
        let mut transactions = Vec::new();
        for kind in ObjectKind::ALL {
            for (_, event) in api.events(kind, self.read[&kind]) {
                transactions.extend(self.step(event).into_iter().filter_map(|effect| match effect {
                    Effect::Write(transaction) => Some(transaction),
                    _ => None,
                }));
            }
        }
        transactions
    }

    pub(super) fn advance(&mut self, seconds: u64, etcd: &mut Etcd) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            effects.extend(self.write(Input::Tick, etcd));
        }
        effects
    }
}
