//! One term of leadership: what the API server says → transactions.
//!
//! Every transaction compares the create_revision of the leader key, so nothing of an earlier term can be written once
//! a later one has begun. Whatever leaves a doubt about etcd's content, a lost answer or a condition that failed, ends
//! the term: the next one begins with a list of etcd and of the API server, and what is still on its way can no longer
//! happen.

mod flush;
mod gate;
mod held;
mod listing;
mod notice;
mod standoff;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use control_core::types::{CallError, Committed, Entry, KeyListing, Transaction};
use mesh::records::Revision;

use self::{
    flush::InFlight,
    gate::PolicyHold,
    held::{CopyRefusal, Hold, is_later, published_by},
};
pub use self::{
    notice::{Notice, Resigned},
    standoff::Standoff,
};
use crate::{
    ClusterKeys, ObjectKind, canonical::CanonicalObject, digest::Digest, mesh_nodes::MeshNode, state::SyncState,
};

/// How long a refused list, or one of another cluster, waits before the next.
const RETRY: Duration = Duration::from_secs(10);

/// The time of a step.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Of a clock that only goes forward.
    pub monotonic: Duration,
    /// Seconds since 1970.
    pub unix: u64,
}

/// An input of the copier.
#[derive(Debug)]
pub enum Input {
    /// A list begins, while `kube-system` has this UID; `None`: there is no such namespace.
    ListBegun {
        /// The listed kind.
        kind: ObjectKind,
        /// UID of `kube-system`, read just now.
        uid: Option<String>,
    },
    /// A part of the list.
    Page {
        /// The listed kind.
        kind: ObjectKind,
        /// The resource version of the whole list.
        resource_version: String,
        /// The objects; one without a usable name is left out.
        objects: Vec<CanonicalObject>,
    },
    /// The list is complete.
    ListEnded {
        /// The listed kind.
        kind: ObjectKind,
        /// UID of `kube-system`, read after the last page.
        uid: Option<String>,
    },
    /// Events follow from the end of the list or the last event.
    Watching {
        /// The watched kind.
        kind: ObjectKind,
        /// UID of `kube-system`, read after the watch was opened.
        uid: Option<String>,
    },
    /// An object was made or changed.
    Applied(CanonicalObject),
    /// An object is gone.
    Deleted(CanonicalObject),
    /// A watch has come this far.
    Bookmark {
        /// The watched kind.
        kind: ObjectKind,
        /// How far.
        resource_version: String,
    },
    /// The list or watch ended, and will be tried again.
    Interrupted {
        /// Of which kind.
        kind: ObjectKind,
    },
    /// The API server answered just now, and `kube-system` has this UID.
    Answers {
        /// The UID; `None`: there is no such namespace.
        uid: Option<String>,
    },
    /// The API server was asked, and did not answer.
    Silent,
    /// The nodes of the mesh, as etcd has them now.
    Nodes(Vec<MeshNode>),
    /// They cannot be read, and why.
    NodesUnknown(String),
    /// The outcome of [`Effect::Write`].
    Written(Result<Committed, CallError>),
    /// The key [`ClusterKeys::confirm`], the answer to [`Effect::ReadConfirm`].
    Confirm(Option<Entry>),
    /// Time goes by; once a second.
    Tick,
}

/// A call to make.
#[derive(Debug)]
pub enum Effect {
    /// Run this transaction and answer with [`Input::Written`]; there is never more than one.
    Write(Transaction),
    /// End the list or watch of this kind, and list again after this time.
    List {
        /// The kind to list.
        kind: ObjectKind,
        /// The delay.
        after: Duration,
    },
    /// Read [`ClusterKeys::confirm`] and answer with [`Input::Confirm`].
    ReadConfirm,
    /// Something an operator should know.
    Notice(Notice),
    /// The term is over: it may write nothing more.
    Resign(Resigned),
}

/// A change that would be made, for a trial run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Planned {
    /// The key is not there yet.
    Create,
    /// The key would get another value.
    Change,
    /// The key would be deleted.
    Delete,
}

/// A change that waits to be written.
#[derive(Debug, Clone)]
struct Pending {
    change: PendingWrite,
    /// When it came, in seconds since 1970.
    since: u64,
}

#[derive(Debug, Clone)]
enum PendingWrite {
    Put(Vec<u8>),
    Delete,
}

/// The value that etcd holds under a key.
#[derive(Debug, Clone, Copy)]
struct Known {
    digest: Digest,
    mod_revision: Revision,
}

/// How far one kind is.
#[derive(Debug, Default)]
struct KindProgress {
    /// Read up to here.
    resource_version: u64,
    listing: Option<PendingList>,
    /// A list is complete, so a "deleted" event is trusted.
    listed: bool,
    /// `None` while events arrive; else since when they do not, in seconds since 1970.
    lost_at: Option<u64>,
    /// When a line of the watch or a complete list last came.
    heard_at: Option<Duration>,
    /// The last list lacked so much that it is taken again.
    doubted: bool,
    hold: Option<Hold>,
}

/// A list that is not yet complete.
#[derive(Debug, Default)]
struct PendingList {
    resource_version: Option<u64>,
    seen: HashSet<String>,
    changed: BTreeMap<String, Vec<u8>>,
}

/// The copy of one cluster during one term.
#[derive(Debug)]
pub struct Copier {
    keys: ClusterKeys,
    holder: String,
    fence: Revision,
    /// Of a trial run: nothing is written.
    dry: bool,
    state: Stored,
    /// The cluster's identity, once it is known.
    uid: Option<String>,
    known: HashMap<(ObjectKind, String), Known>,
    pending: BTreeMap<(ObjectKind, String), Pending>,
    in_flight: Option<InFlight>,
    progress: BTreeMap<ObjectKind, KindProgress>,
    gate: PolicyHold,
    refusals: BTreeMap<ObjectKind, CopyRefusal>,
    /// The key that holds an operator's token was read, and is to be deleted; its mod_revision.
    confirmed: Option<Revision>,
    /// Revision at which the state first named each finding, by its token: an older confirmation is of another time.
    published: BTreeMap<String, Revision>,
    /// The state is to be deleted, so that the next term adopts the cluster as it is.
    forget: bool,
    /// When the API server last answered, in seconds since 1970.
    answered_at: u64,
    /// Nothing came since.
    silent: bool,
    /// Nothing could be copied since.
    useless_since: Option<Duration>,
    written_at: Option<Duration>,
    /// A list was completed since.
    list_completed: bool,
    confirm_read_at: Option<Duration>,
    over: bool,
}

/// The key `state`.
#[derive(Debug)]
enum Stored {
    Absent,
    Unreadable { create_revision: Revision },
    Present { create_revision: Revision, state: SyncState },
}

impl Copier {
    /// Begins a term. `fence` is the create_revision of the leader key, and `etcd` a list of the cluster's keys, read
    /// after that key was written.
    #[must_use]
    pub fn new(keys: ClusterKeys, holder: String, fence: Revision, etcd: &KeyListing, now: Now) -> Self {
        let mut known = HashMap::new();
        let mut state = Stored::Absent;
        let mut published = BTreeMap::new();
        let mut confirm = None;
        for entry in &etcd.entries {
            if entry.key == keys.state() {
                let create_revision = entry.create_revision;
                state = match serde_json::from_slice(&entry.value) {
                    Ok(state) => Stored::Present { create_revision, state },
                    Err(_) => Stored::Unreadable { create_revision },
                };
                published = published_by(&state, entry.mod_revision);
            } else if entry.key == keys.confirm() {
                confirm = Some(entry);
            } else if let Some((kind, path)) = keys.parse(&entry.key) {
                let digest = Digest::of(&entry.value);
                known.insert((kind, path.to_owned()), Known { digest, mod_revision: entry.mod_revision });
            }
        }
        // A confirmation that no finding waits for would be that of a later one.
        let confirmed = confirm.filter(|entry| !is_later(&published, entry)).map(|entry| entry.mod_revision);
        let versions = match &state {
            Stored::Present { state, .. } => state.resource_versions.clone(),
            _ => BTreeMap::new(),
        };
        let current_at = match &state {
            Stored::Present { state, .. } => state.current_at.min(now.unix),
            _ => now.unix,
        };
        let progress = ObjectKind::ALL.map(|kind| {
            let resource_version = versions.get(kind.plural()).copied().unwrap_or_default();
            (kind, KindProgress { resource_version, lost_at: Some(current_at), ..KindProgress::default() })
        });
        let begun = matches!(&state, Stored::Present { state, .. } if state.copies_policies);
        let gate = if begun || known.keys().any(|(kind, _)| kind.is_policy()) {
            PolicyHold::Open
        } else {
            PolicyHold::Closed { behind: Err(String::new()), told: false }
        };
        Self {
            keys,
            holder,
            fence,
            gate,
            dry: false,
            state,
            uid: None,
            known,
            pending: BTreeMap::new(),
            in_flight: None,
            progress: progress.into(),
            refusals: BTreeMap::new(),
            confirmed,
            published,
            forget: false,
            answered_at: now.unix,
            silent: false,
            useless_since: None,
            written_at: None,
            list_completed: false,
            confirm_read_at: None,
            over: false,
        }
    }

    /// The same for a trial run, which writes nothing: [`Self::planned`] returns the changes.
    #[must_use]
    pub fn trial(keys: ClusterKeys, etcd: &KeyListing, now: Now) -> Self {
        Self { dry: true, ..Self::new(keys, String::new(), 0, etcd, now) }
    }

    /// Processes an input and returns the calls to make.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        if self.over {
            return effects;
        }
        match input {
            Input::ListBegun { kind, uid } => self.list_begun(now, kind, uid, &mut effects),
            Input::Page { kind, resource_version, objects } => {
                self.page(now, kind, &resource_version, objects, &mut effects);
            }
            Input::ListEnded { kind, uid } => self.list_ended(now, kind, uid, &mut effects),
            Input::Watching { kind, uid } => {
                if self.is_this_cluster(now, kind, uid, &mut effects) {
                    self.of(kind).lost_at = None;
                }
            }
            Input::Applied(object) => self.applied(now, object),
            Input::Deleted(object) => self.deleted(now, object),
            Input::Bookmark { kind, resource_version } => self.read_up_to(now, kind, &resource_version),
            Input::Interrupted { kind } => {
                let progress = self.of(kind);
                progress.listing = None;
                progress.heard_at = None;
                progress.lost_at.get_or_insert(now.unix);
            }
            Input::Answers { uid } => {
                self.silent = false;
                self.answered_at = now.unix;
                self.is_this_cluster(now, ObjectKind::Namespace, uid, &mut effects);
            }
            Input::Silent => self.silent = true,
            Input::Nodes(nodes) => self.nodes(&nodes, &mut effects),
            Input::NodesUnknown(error) => self.nodes_unknown(error, &mut effects),
            Input::Written(result) => self.written(result, &mut effects),
            Input::Confirm(entry) => self.confirm(now, entry.as_ref(), &mut effects),
            Input::Tick => self.tick(now, &mut effects),
        }
        self.flush(now, &mut effects);
        effects
    }

    /// The changes of a trial run, by key.
    pub fn planned(&self) -> impl Iterator<Item = (String, Planned)> {
        let held = self.progress.iter().flat_map(|(&kind, progress)| {
            progress.hold.iter().flat_map(move |hold| hold.paths.iter().map(move |path| (kind, path)))
        });
        let held = held.map(|(kind, path)| (self.keys.object(kind, path), Planned::Delete));
        let pending = self.pending.iter().map(|((kind, path), pending)| {
            let planned = match pending.change {
                PendingWrite::Delete => Planned::Delete,
                PendingWrite::Put(_) if self.known.contains_key(&(*kind, path.clone())) => Planned::Change,
                PendingWrite::Put(_) => Planned::Create,
            };
            (self.keys.object(*kind, path), planned)
        });
        pending.chain(held)
    }

    /// Why nothing is written at all, if it is not.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        let unreadable = matches!(self.state, Stored::Unreadable { .. }).then(|| Notice::UnreadableState.to_string());
        self.refusals.values().next().map(ToString::to_string).or(unreadable)
    }

    /// Whether the object will be in the copy.
    #[must_use]
    pub fn will_hold(&self, kind: ObjectKind, path: &str) -> bool {
        let key = (kind, path.to_owned());
        match self.pending.get(&key) {
            Some(pending) => matches!(pending.change, PendingWrite::Put(_)),
            None => self.expected(&key).is_some(),
        }
    }

    /// Whether etcd holds exactly the cluster's objects of this kind, and none of its absences is doubted.
    #[must_use]
    pub fn is_complete(&self, kind: ObjectKind) -> bool {
        let known = self.progress.get(&kind).is_some_and(|of| of.listed && of.lost_at.is_none() && of.hold.is_none());
        let in_flight = self.in_flight.iter().flat_map(|in_flight| in_flight.changes.keys());
        let is_settled = self.pending.keys().chain(in_flight).all(|(of, _)| *of != kind);
        known && is_settled && !self.silent && self.refusals.is_empty() && self.uid.is_some()
    }

    /// Objects of this kind that etcd holds.
    #[must_use]
    pub fn count(&self, kind: ObjectKind) -> usize {
        self.known.keys().filter(|(of, _)| *of == kind).count()
    }

    fn of(&mut self, kind: ObjectKind) -> &mut KindProgress {
        self.progress.entry(kind).or_default()
    }

    /// The value under a key after the transaction in flight.
    fn expected(&self, key: &(ObjectKind, String)) -> Option<Digest> {
        match self.in_flight.as_ref().and_then(|in_flight| in_flight.changes.get(key)) {
            Some(change) => *change,
            None => self.known.get(key).map(|known| known.digest),
        }
    }

    fn read_up_to(&mut self, now: Now, kind: ObjectKind, resource_version: &str) {
        self.of(kind).heard_at = Some(now.monotonic);
        if let Ok(version) = resource_version.parse() {
            let progress = self.of(kind);
            progress.resource_version = progress.resource_version.max(version);
        }
    }

    fn applied(&mut self, now: Now, object: CanonicalObject) {
        let CanonicalObject { kind, path, value, resource_version, .. } = object;
        self.read_up_to(now, kind, &resource_version);
        if let Some(hold) = &mut self.of(kind).hold {
            hold.paths.remove(&path);
        }
        self.want(now, (kind, path), value);
    }

    /// The newest value of a key takes the place of an older one that waits.
    fn want(&mut self, now: Now, key: (ObjectKind, String), value: Vec<u8>) {
        if self.expected(&key) == Some(Digest::of(&value)) {
            self.pending.remove(&key);
        } else {
            let since = self.pending.get(&key).map_or(now.unix, |pending| pending.since);
            self.pending.insert(key, Pending { change: PendingWrite::Put(value), since });
        }
    }

    fn deleted(&mut self, now: Now, object: CanonicalObject) {
        let CanonicalObject { kind, path, resource_version, .. } = object;
        self.read_up_to(now, kind, &resource_version);
        let progress = self.of(kind);
        if !progress.listed {
            return;
        }
        if let Some(hold) = &mut progress.hold {
            hold.paths.remove(&path);
        }
        self.unwant(now, (kind, path));
    }

    fn unwant(&mut self, now: Now, key: (ObjectKind, String)) {
        if self.expected(&key).is_none() {
            self.pending.remove(&key);
        } else {
            self.pending.insert(key, Pending { change: PendingWrite::Delete, since: now.unix });
        }
    }

    fn resign(&mut self, reason: Resigned, effects: &mut Vec<Effect>) {
        self.over = true;
        effects.push(Effect::Resign(reason));
    }

    /// Keys of `kind` that etcd will hold.
    fn expected_paths(&self, kind: ObjectKind) -> BTreeSet<String> {
        let mut paths: BTreeSet<String> =
            self.known.keys().filter(|(of, _)| *of == kind).map(|(_, path)| path.clone()).collect();
        for ((_, path), change) in
            self.in_flight.iter().flat_map(|in_flight| &in_flight.changes).filter(|((of, _), _)| *of == kind)
        {
            match change {
                Some(_) => paths.insert(path.clone()),
                None => paths.remove(path),
            };
        }
        paths
    }
}

#[cfg(test)]
mod tests;
