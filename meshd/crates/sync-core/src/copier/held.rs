//! What waits for an operator or for time to go by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use control_core::types::Entry;
use mesh::records::Revision;

use super::{Copier, Effect, Notice, Now, Pending, PendingWrite, Stored};
use crate::{ObjectKind, state::Held};

/// The token that deletes a state that cannot be read.
const UNREADABLE: &str = "state";
/// How long deletions of a doubted list wait.
const HOLD: Duration = Duration::from_secs(60);
/// How often an operator's word is looked for.
const CONFIRM_READ: Duration = Duration::from_secs(2);

/// Deletions that wait.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) paths: BTreeSet<String>,
    total: usize,
    pub(super) until: Duration,
    pub(super) until_unix: u64,
    /// Of the list that lacks them.
    resource_version: u64,
}

/// Why nothing is written at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CopyRefusal {
    /// There is no namespace `kube-system`.
    NoCluster,
    /// The cluster has another UID.
    OtherCluster { found: String, wanted: String },
    /// The list is older than an earlier one. Its own version is omitted: it grows with each list.
    Stale { carried: u64 },
}

impl Hold {
    pub(super) fn new(
        now: Now,
        until: Option<(Duration, u64)>,
        paths: BTreeSet<String>,
        total: usize,
        resource_version: u64,
    ) -> Self {
        let (until, until_unix) = until.unwrap_or((now.monotonic + HOLD, now.unix + HOLD.as_secs()));
        Self { paths, total, until, until_unix, resource_version }
    }

    pub(super) fn token(&self, kind: ObjectKind) -> String {
        format!("delete-{}-{}", kind.plural(), self.resource_version)
    }
}

impl CopyRefusal {
    /// The token that releases it; `None` while the cluster is unknown.
    pub(super) fn token(&self) -> Option<String> {
        match self {
            Self::NoCluster => None,
            Self::OtherCluster { found, .. } => Some(format!("cluster-{found}")),
            Self::Stale { carried } => Some(format!("version-{carried}")),
        }
    }
}

impl fmt::Display for CopyRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCluster => f.write_str("the API server has no namespace kube-system yet"),
            Self::OtherCluster { found, wanted } => write!(
                f,
                "the API server is that of another cluster: its kube-system has the UID {found}, the copy is of {wanted}"
            ),
            Self::Stale { carried } => write!(
                f,
                "the API server's lists are older than resource version {carried}, which was read before: it was \
                 restored from a backup, or lags behind"
            ),
        }
    }
}

/// The tokens that a stored state of this mod_revision names.
pub(super) fn published_by(state: &Stored, mod_revision: Revision) -> BTreeMap<String, Revision> {
    let tokens = match state {
        Stored::Present { state, .. } => state.held.iter().map(|held| held.token.clone()).collect(),
        Stored::Unreadable { .. } => vec![UNREADABLE.to_owned()],
        Stored::Absent => Vec::new(),
    };
    tokens.into_iter().map(|token| (token, mod_revision)).collect()
}

/// Whether the confirmation was written after the state named its finding.
pub(super) fn is_later(published: &BTreeMap<String, Revision>, confirm: &Entry) -> bool {
    published.get(&token_of(confirm)).is_some_and(|at| *at < confirm.mod_revision)
}

fn token_of(confirm: &Entry) -> String {
    String::from_utf8_lossy(&confirm.value).trim().to_owned()
}

impl Copier {
    /// The UID that the copy is of.
    pub(super) fn wanted_uid(&self) -> Option<&str> {
        match &self.state {
            Stored::Present { state, .. } => Some(&state.uid),
            _ => self.uid.as_deref(),
        }
    }

    /// The refusal of a list that is too old: the same for all kinds, so that one token releases them.
    pub(super) fn stale(&self) -> CopyRefusal {
        let before = self.refusals.values().find(|refusal| matches!(refusal, CopyRefusal::Stale { .. }));
        let newest = self.progress.values().map(|progress| progress.resource_version).max();
        before.cloned().unwrap_or_else(|| CopyRefusal::Stale { carried: newest.unwrap_or_default() })
    }

    /// All held changes, for the state.
    pub(super) fn held(&self) -> Vec<Held> {
        let mut held: Vec<Held> = Vec::new();
        for refusal in self.refusals.values() {
            let token = refusal.token().unwrap_or_default();
            if !held.iter().any(|held| held.token == token) {
                held.push(Held { reason: refusal.to_string(), token, until: None });
            }
        }
        for (&kind, progress) in &self.progress {
            if let Some(hold) = &progress.hold {
                let (count, total) = (hold.paths.len(), hold.total);
                let reason = format!("{count} of {total} {} would be deleted", kind.plural());
                held.push(Held { reason, token: hold.token(kind), until: Some(hold.until_unix) });
            }
        }
        held.extend(self.held_policies());
        held
    }

    pub(super) fn tick(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let silent = self.silent;
        for kind in ObjectKind::ALL {
            let progress = self.of(kind);
            // An open watch may be of a hung server, and its events may still be in flight: only an event after the
            // wait proves that the objects were gone all the time.
            let due = progress.hold.as_ref().is_some_and(|hold| progress.heard_at >= Some(hold.until));
            if due && !silent && progress.lost_at.is_none() {
                self.release(now, kind, effects);
            }
        }
        let waits = !self.held().is_empty() || matches!(self.state, Stored::Unreadable { .. });
        if matches!(self.state, Stored::Unreadable { .. }) && self.confirm_read_at.is_none() {
            effects.push(Effect::Notice(Notice::UnreadableState));
        }
        if waits && self.confirm_read_at.is_none_or(|at| now.monotonic >= at + CONFIRM_READ) {
            self.confirm_read_at = Some(now.monotonic);
            effects.push(Effect::ReadConfirm);
        }
        self.make_room(now, effects);
    }

    /// Applies a confirmation. A token belongs to one finding, so an old one has no effect.
    pub(super) fn confirm(&mut self, now: Now, confirm: Option<&Entry>, effects: &mut Vec<Effect>) {
        let Some(confirm) = confirm else { return };
        let token = token_of(confirm);
        self.confirmed = Some(confirm.mod_revision);
        if !is_later(&self.published, confirm) {
            return effects.push(Effect::Notice(Notice::UnknownToken { token: token.chars().take(80).collect() }));
        }
        let refused = self.refusals.values().any(|refusal| refusal.token().is_some_and(|of| of == token));
        let unreadable = matches!(self.state, Stored::Unreadable { .. }) && token == UNREADABLE;
        let held = ObjectKind::ALL.into_iter().find(|&kind| {
            self.progress.get(&kind).and_then(|of| of.hold.as_ref()).is_some_and(|hold| hold.token(kind) == token)
        });
        if refused || unreadable {
            self.forget = true;
        } else if let Some(kind) = held {
            self.release(now, kind, effects);
        } else if !self.confirm_policies(&token) {
            effects.push(Effect::Notice(Notice::UnknownToken { token: token.chars().take(80).collect() }));
        }
    }

    fn release(&mut self, now: Now, kind: ObjectKind, effects: &mut Vec<Effect>) {
        let progress = self.of(kind);
        progress.doubted = false;
        let Some(hold) = progress.hold.take() else { return };
        effects.push(Effect::Notice(Notice::DeletionsReleased { kind, count: hold.paths.len() }));
        for path in hold.paths {
            self.pending.insert((kind, path), Pending { change: PendingWrite::Delete, since: now.unix });
        }
    }
}
