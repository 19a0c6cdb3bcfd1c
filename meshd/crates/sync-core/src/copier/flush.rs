//! Transactions: what is written at once, under which conditions, and what comes of it.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use control_core::types::{CallError, Committed, Compare, Transaction, Write};
use mesh::records::Revision;

use super::{Copier, Effect, Known, Now, Pending, PendingWrite, PolicyHold, Resigned, Stored};
use crate::{ObjectKind, digest::Digest, state::SyncState};

/// Changes in one transaction; etcd takes 128 operations.
const MOST_CHANGES: usize = 100;
/// Bytes of values in one transaction, beside the first: etcd takes requests of 1.5 MiB, and a value may have 1 MiB.
const MOST_BYTES: usize = 256 << 10;
/// The state is written this often when nothing else is.
const STATE_PERIOD: Duration = Duration::from_secs(10);
/// With changes, it is written no more often than this.
const STATE_SPACING: Duration = Duration::from_secs(1);

/// The transaction under way.
#[derive(Debug)]
pub(super) struct InFlight {
    /// The new value of each key.
    pub(super) changes: HashMap<(ObjectKind, String), Option<Digest>>,
    state: Option<SyncState>,
    confirmed: Option<Revision>,
    forgets: bool,
}

impl Copier {
    /// Makes the next transaction, if there is something to write and none is under way.
    pub(super) fn flush(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.over || self.dry || self.in_flight.is_some() {
            return;
        }
        let create_revision = match &self.state {
            Stored::Absent => 0,
            Stored::Present { create_revision, .. } | Stored::Unreadable { create_revision } => *create_revision,
        };
        // The UID is compared too: another cluster has another state, created at another revision.
        let mut compares = vec![
            Compare::CreateRevision { key: self.keys.leader(), equals: self.fence },
            Compare::CreateRevision { key: self.keys.state(), equals: create_revision },
        ];
        let mut writes = Vec::new();
        let mut in_flight =
            InFlight { changes: HashMap::new(), state: None, confirmed: self.confirmed, forgets: self.forget };
        if let Some(mod_revision) = self.confirmed {
            // One that was written since is read, too.
            compares.push(Compare::ModRevision { key: self.keys.confirm(), equals: mod_revision });
            writes.push(Write::Delete { key: self.keys.confirm() });
        }
        if self.forget {
            writes.push(Write::Delete { key: self.keys.state() });
        } else {
            self.take_changes(&mut in_flight, &mut compares, &mut writes);
            in_flight.state = self.next_state(now, !in_flight.changes.is_empty());
            if let Some(state) = &in_flight.state {
                let value = serde_json::to_vec(state).unwrap_or_default();
                writes.push(Write::Put { key: self.keys.state(), value, lease: None });
                self.written_at = Some(now.monotonic);
                self.list_completed = false;
            }
        }
        if !writes.is_empty() {
            self.in_flight = Some(in_flight);
            effects.push(Effect::Write(Transaction { compares, writes }));
        }
    }

    fn take_changes(&mut self, in_flight: &mut InFlight, compares: &mut Vec<Compare>, writes: &mut Vec<Write>) {
        if !self.refusals.is_empty() || self.uid.is_none() || matches!(self.state, Stored::Unreadable { .. }) {
            return;
        }
        for object in self.next_changes() {
            let Some(pending) = self.pending.remove(&object) else { continue };
            let key = self.keys.object(object.0, &object.1);
            match pending.change {
                PendingWrite::Put(value) => {
                    in_flight.changes.insert(object, Some(Digest::of(&value)));
                    writes.push(Write::Put { key, value, lease: None });
                }
                PendingWrite::Delete => {
                    let Some(known) = self.known.get(&object) else { continue };
                    compares.push(Compare::ModRevision { key: key.clone(), equals: known.mod_revision });
                    in_flight.changes.insert(object, None);
                    writes.push(Write::Delete { key });
                }
            }
        }
    }

    /// The keys of the next transaction, in the order of the kinds. Deletions of policies come after all puts, so that
    /// a replaced policy leaves no gap.
    fn next_changes(&self) -> Vec<(ObjectKind, String)> {
        let mut next = Vec::new();
        let mut bytes = 0;
        let mut puts_left = false;
        for (object, pending) in &self.pending {
            match &pending.change {
                PendingWrite::Put(_) if !self.may_put(object.0) => puts_left = true,
                PendingWrite::Put(value)
                    if next.len() < MOST_CHANGES && (bytes == 0 || bytes + value.len() <= MOST_BYTES) =>
                {
                    bytes += value.len();
                    next.push(object.clone());
                }
                PendingWrite::Put(_) => {
                    puts_left = true;
                    break;
                }
                PendingWrite::Delete if !object.0.is_policy() && next.len() < MOST_CHANGES => next.push(object.clone()),
                PendingWrite::Delete => {}
            }
        }
        if !puts_left {
            let deleted = |(object, pending): &(&(ObjectKind, String), &Pending)| {
                object.0.is_policy() && matches!(pending.change, PendingWrite::Delete)
            };
            let room = MOST_CHANGES - next.len();
            next.extend(self.pending.iter().filter(deleted).take(room).map(|(object, _)| object.clone()));
        }
        next
    }

    /// Whether objects of this kind may be put. Pods wait until namespaces and policies were listed in this term, Nodes
    /// wait for pods, too (see [`ObjectKind`]), and the first policies wait for nodes that read them.
    fn may_put(&self, kind: ObjectKind) -> bool {
        if kind.is_policy() {
            return self.gate == PolicyHold::Open;
        }
        !matches!(kind, ObjectKind::Pod | ObjectKind::Node)
            || self.progress.iter().all(|(&before, progress)| before >= kind || progress.listed)
    }

    /// The state, where it is time to write it.
    fn next_state(&self, now: Now, with_changes: bool) -> Option<SyncState> {
        let held = self.held();
        let since = self.written_at.map(|at| now.monotonic.saturating_sub(at));
        let due = match (&self.state, since) {
            // Nothing is written before the state names the cluster.
            (Stored::Absent, _) => self.refusals.is_empty(),
            (Stored::Unreadable { .. }, _) => false,
            // Before the API server has answered, a write would withdraw a finding that an operator may be about to
            // confirm.
            (Stored::Present { .. }, None) => self.uid.is_some() || !self.refusals.is_empty(),
            (Stored::Present { state, .. }, Some(since)) => {
                state.held != held
                    || self.list_completed
                    || since >= STATE_PERIOD
                    || (with_changes && since >= STATE_SPACING)
            }
        };
        if due { self.report(now) } else { None }
    }

    /// The current state; `None` while the cluster is unknown.
    #[must_use]
    pub fn report(&self, now: Now) -> Option<SyncState> {
        Some(SyncState {
            uid: self.wanted_uid()?.to_owned(),
            holder: self.holder.clone(),
            written_at: now.unix,
            current_at: self.current_at(now),
            resource_versions: self
                .progress
                .iter()
                .filter(|(_, progress)| progress.resource_version > 0)
                .map(|(kind, progress)| (kind.plural().to_owned(), progress.resource_version))
                .collect(),
            counts: self.counts(),
            held: self.held(),
            copies_policies: self.gate == PolicyHold::Open,
        })
    }

    fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts: BTreeMap<String, usize> =
            ObjectKind::ALL.into_iter().map(|kind| (kind.plural().to_owned(), 0)).collect();
        for (kind, _) in self.known.keys() {
            *counts.entry(kind.plural().to_owned()).or_default() += 1;
        }
        counts
    }

    /// Up to when the copy is known to be complete.
    fn current_at(&self, now: Now) -> u64 {
        let lost = self.progress.values().filter_map(|progress| progress.lost_at);
        let waiting = self.pending.values().map(|pending| pending.since);
        let silent = self.silent.then_some(self.answered_at);
        lost.chain(waiting).chain(silent).min().unwrap_or(now.unix).min(now.unix)
    }

    pub(super) fn written(&mut self, result: Result<Committed, CallError>, effects: &mut Vec<Effect>) {
        let Some(in_flight) = self.in_flight.take() else { return };
        let committed = match result {
            Ok(committed) => committed,
            Err(error) => return self.resign(Resigned::Doubt(error), effects),
        };
        if !committed.succeeded {
            return self.resign(Resigned::Fenced, effects);
        }
        if in_flight.forgets {
            return self.resign(Resigned::Confirmed, effects);
        }
        let mod_revision = committed.revision;
        if in_flight.confirmed == self.confirmed {
            self.confirmed = None;
        }
        for (object, digest) in in_flight.changes {
            match digest {
                Some(digest) => self.known.insert(object, Known { digest, mod_revision }),
                None => self.known.remove(&object),
            };
        }
        if let Some(state) = in_flight.state {
            self.published.retain(|token, _| state.held.iter().any(|held| held.token == *token));
            for held in &state.held {
                self.published.entry(held.token.clone()).or_insert(mod_revision);
            }
            let create_revision = match self.state {
                Stored::Present { create_revision, .. } => create_revision,
                _ => mod_revision,
            };
            self.state = Stored::Present { create_revision, state };
        }
    }
}
