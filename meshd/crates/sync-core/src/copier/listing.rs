//! Lists: what they change, and what they may delete.

use std::{collections::BTreeSet, time::Duration};

use super::{Copier, CopyRefusal, Effect, Hold, Notice, Now, Pending, PendingList, PendingWrite, RETRY};
use crate::{ObjectKind, canonical::CanonicalObject, digest::Digest};

/// A list that lacks fewer keys than this deletes them at once.
const FEW: usize = 10;

impl Copier {
    pub(super) fn list_begun(&mut self, now: Now, kind: ObjectKind, uid: Option<String>, effects: &mut Vec<Effect>) {
        self.of(kind).lost_at.get_or_insert(now.unix);
        if self.is_this_cluster(now, kind, uid, effects) {
            self.of(kind).listing = Some(PendingList::default());
        }
    }

    pub(super) fn page(
        &mut self,
        now: Now,
        kind: ObjectKind,
        resource_version: &str,
        objects: Vec<CanonicalObject>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut listing) = self.of(kind).listing.take() else { return };
        let version = resource_version.parse().ok();
        let carried = self.of(kind).resource_version;
        // A server that was restored from a backup, or that is cut off from the others.
        if version.is_some_and(|found| found < carried) {
            return self.refuse(now, kind, self.stale(), effects);
        }
        listing.resource_version = version;
        for CanonicalObject { path, value, .. } in objects {
            let key = (kind, path);
            if self.expected(&key) == Some(Digest::of(&value)) {
                listing.changed.remove(&key.1);
            } else {
                listing.changed.insert(key.1.clone(), value);
            }
            listing.seen.insert(key.1);
        }
        self.of(kind).listing = Some(listing);
    }

    pub(super) fn list_ended(&mut self, now: Now, kind: ObjectKind, uid: Option<String>, effects: &mut Vec<Effect>) {
        let Some(listing) = self.of(kind).listing.take() else { return };
        if !self.is_this_cluster(now, kind, uid, effects) {
            return;
        }
        self.accept(kind, effects);
        self.list_completed = true;
        let progress = self.of(kind);
        progress.listed = true;
        progress.heard_at = Some(now.monotonic);
        progress.resource_version = progress.resource_version.max(listing.resource_version.unwrap_or_default());
        // The list is complete: pending objects are in it or gone.
        let waited: Vec<_> = self.pending.keys().filter(|(of, _)| *of == kind).cloned().collect();
        let since = waited.iter().filter_map(|key| self.pending.remove(key)).map(|pending| pending.since).min();
        for (path, value) in listing.changed {
            // Changes in flight when the page was read may be done by now.
            self.want(now, (kind, path), value);
        }
        if let Some(since) = since {
            for (_, pending) in self.pending.iter_mut().filter(|((of, _), _)| *of == kind) {
                pending.since = since;
            }
        }
        let mut absent = self.expected_paths(kind);
        let total = absent.len();
        absent.retain(|path| !listing.seen.contains(path));
        self.delete_absent(now, kind, absent, total, effects);
    }

    /// Deletes objects that a complete list lacks, unless there are so many that the list is in doubt.
    fn delete_absent(
        &mut self,
        now: Now,
        kind: ObjectKind,
        absent: BTreeSet<String>,
        total: usize,
        effects: &mut Vec<Effect>,
    ) {
        let count = absent.len();
        let many = count >= FEW && count * 3 > total;
        let progress = self.of(kind);
        if !many {
            progress.doubted = false;
            progress.hold = None;
            self.pending.extend(
                absent
                    .into_iter()
                    .map(|path| ((kind, path), Pending { change: PendingWrite::Delete, since: now.unix })),
            );
        } else if !progress.doubted {
            progress.doubted = true;
            effects.push(Effect::Notice(Notice::ListDoubted { kind, absent: count, total }));
            effects.push(Effect::List { kind, after: Duration::ZERO });
        } else {
            // The time that is waited does not begin again with each list.
            let until = progress.hold.take().map(|hold| (hold.until, hold.until_unix));
            let hold = Hold::new(now, until, absent, total, progress.resource_version);
            effects.push(Effect::Notice(Notice::DeletionsHeld { kind, absent: count, total, token: hold.token(kind) }));
            progress.hold = Some(hold);
        }
    }

    /// Whether `kube-system` has the UID that the copy is of; if not, nothing is written until it has.
    pub(super) fn is_this_cluster(
        &mut self,
        now: Now,
        kind: ObjectKind,
        uid: Option<String>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(uid) = uid else {
            self.refuse(now, kind, CopyRefusal::NoCluster, effects);
            return false;
        };
        if let Some(wanted) = self.wanted_uid().filter(|wanted| *wanted != uid) {
            let refusal = CopyRefusal::OtherCluster { found: uid, wanted: wanted.to_owned() };
            self.refuse(now, kind, refusal, effects);
            return false;
        }
        self.uid = Some(uid);
        // An older list is older until a complete one is not.
        if !matches!(self.refusals.get(&kind), Some(CopyRefusal::Stale { .. })) {
            self.accept(kind, effects);
        }
        true
    }

    fn accept(&mut self, kind: ObjectKind, effects: &mut Vec<Effect>) {
        if let Some(refusal) = self.refusals.remove(&kind)
            && !self.refusals.values().any(|other| *other == refusal)
        {
            effects.push(Effect::Notice(Notice::Accepted { refusal: refusal.to_string() }));
        }
    }

    pub(super) fn refuse(&mut self, now: Now, kind: ObjectKind, refusal: CopyRefusal, effects: &mut Vec<Effect>) {
        let progress = self.of(kind);
        progress.listing = None;
        progress.lost_at.get_or_insert(now.unix);
        effects.push(Effect::List { kind, after: RETRY });
        if !self.refusals.values().any(|told| *told == refusal) {
            let token = refusal.token();
            effects.push(Effect::Notice(Notice::Refused { refusal: refusal.to_string(), token }));
        }
        self.refusals.insert(kind, refusal);
    }
}
