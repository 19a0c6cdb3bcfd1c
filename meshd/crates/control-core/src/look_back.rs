//! Earlier values of keys whose present one cannot be read: asked for in etcd's history, one key after another.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh::records::{Records, Revision};
use tracing::{debug, info};

use super::{
    store::{HistoryQuery, Store},
    types::{CallError, Entry},
};

/// How many earlier values of a key are looked at.
const LOOK_BACK: usize = 8;
/// How long a member that did not answer is left alone.
const PAUSE: Duration = Duration::from_secs(1);

/// The keys that are looked for.
#[derive(Debug, Default)]
pub(crate) struct HistorySearch {
    queue: VecDeque<Search>,
    under_way: Option<Search>,
    not_before: Option<Instant>,
}

#[derive(Debug)]
struct Search {
    wanted: HistoryQuery,
    /// The newest value before this revision is looked at next.
    before: Revision,
    /// How many more.
    left: usize,
}

impl HistorySearch {
    /// The key to read, and the revision to read it at; it gets exactly one answer.
    pub(crate) fn next(&mut self, now: Instant, store: &mut Store) -> Option<(String, Revision)> {
        if self.under_way.is_some() || self.not_before.is_some_and(|at| now < at) {
            return None;
        }
        self.not_before = None;
        if self.queue.is_empty() {
            let wanted = store.take_wanted().into_iter();
            self.queue.extend(wanted.map(|wanted| Search { before: wanted.before, wanted, left: LOOK_BACK }));
        }
        while let Some(search) = self.queue.pop_front() {
            if search.left > 0 && search.before > 1 {
                let question = (search.wanted.key.clone(), search.before - 1);
                self.under_way = Some(search);
                return Some(question);
            }
        }
        None
    }

    /// Takes the answer to the question that [`next`](Self::next) returned: the value of the key at that revision.
    pub(crate) fn answered(
        &mut self,
        now: Instant,
        store: &mut Store,
        answer: Result<Option<Entry>, CallError>,
    ) -> Option<Arc<Records>> {
        let search = self.under_way.take()?;
        match answer {
            Ok(None) => None,
            Ok(Some(entry)) if store.can_read(&entry) => {
                info!(key = entry.key, revision = entry.mod_revision, "earlier value stays in force");
                store.offer_earlier(&search.wanted, &entry)
            }
            Ok(Some(entry)) => {
                self.queue.push_front(Search { before: entry.mod_revision, left: search.left - 1, ..search });
                None
            }
            Err(error) => {
                debug!(%error, key = search.wanted.key, "cannot read the history of a key");
                let unanswered = std::iter::once(search).chain(self.queue.drain(..));
                store.want_again(unanswered.map(|search| search.wanted).collect());
                // The member may be refusing.
                self.not_before = Some(now + PAUSE);
                None
            }
        }
    }

    /// When [`next`](Self::next) is to be called at the latest; that ends it.
    pub(crate) const fn next_deadline(&self) -> Option<Instant> {
        self.not_before
    }
}
