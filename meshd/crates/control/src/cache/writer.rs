//! Writes the cache: off the caller's task, rate-limited, and never concurrently.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use control_core::store::Store;
use etcd_schema::SubnetKey;
use tokio::task::JoinHandle;
use tracing::warn;

use super::Cached;
use crate::state_dir::StateDir;

/// Least time between two writes of the cache.
const CACHE_INTERVAL: Duration = Duration::from_secs(1);

/// What writes may take of the time, as a divisor: a large mesh in which something changes all the time is not written
/// out once a second. A start from a cache of some seconds ago reads the rest from etcd.
const SHARE: u32 = 1000;

/// Longest time that a change waits for its write.
const CACHE_INTERVAL_MAX: Duration = Duration::from_secs(30);

/// Longest time between two writes of the cache while etcd is there: its age tells what it may be used for.
const CACHE_REFRESH: Duration = Duration::from_secs(600);

/// Writes the cache off the task, no more than a [`SHARE`] of the time, and never two at a time.
pub(crate) struct CacheWriter {
    state: Arc<StateDir>,
    dirty: bool,
    /// Whether etcd was read: before that there is nothing newer than what is on disk.
    read: bool,
    last: Option<Instant>,
    created: Instant,
    /// When the cache is written anew although nothing changed.
    refresh_at: Option<Instant>,
    /// How long the last write took, what was done for it on the caller's task included.
    took: Duration,
    writing: Option<JoinHandle<Duration>>,
}

impl CacheWriter {
    pub(crate) fn new(state: StateDir) -> Self {
        Self {
            state: Arc::new(state),
            dirty: false,
            read: false,
            last: None,
            created: Instant::now(),
            refresh_at: None,
            took: Duration::ZERO,
            writing: None,
        }
    }

    pub(crate) const fn changed(&mut self) {
        self.dirty = true;
    }

    /// What changed must not wait: without its own subnet a node cannot start from the cache.
    pub(crate) const fn changed_now(&mut self) {
        self.dirty = true;
        self.last = None;
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        if self.writing.is_some() || !self.read {
            None
        } else if self.dirty {
            let interval = (self.took * SHARE).clamp(CACHE_INTERVAL, CACHE_INTERVAL_MAX);
            Some(self.last.map_or(self.created, |last| last + interval))
        } else {
            self.refresh_at
        }
    }

    /// Waits for the end of the write under way; for ever when there is none.
    pub(crate) async fn written(&mut self) {
        match &mut self.writing {
            Some(writing) => {
                // A panic in it has been printed.
                self.took = writing.await.unwrap_or_default();
                self.writing = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Writes what is not on disk yet.
    pub(crate) async fn finish(mut self, store: &Store, subnet: Option<SubnetKey>) {
        if let Some(writing) = self.writing.take() {
            let _ended = writing.await;
        }
        if !self.dirty {
            return;
        }
        self.last = None;
        self.write_if_due(Instant::now(), store, subnet, false);
        if let Some(writing) = self.writing.take() {
            let _ended = writing.await;
        }
    }

    pub(crate) fn write_if_due(&mut self, now: Instant, store: &Store, subnet: Option<SubnetKey>, connected: bool) {
        let lease_ttl = store.view().config.as_ref().map(|config| config.value.lease_ttl);
        // What etcd does not confirm must be seen to grow old.
        self.refresh_at = self
            .last
            .filter(|_| connected)
            .map(|last| last + lease_ttl.map_or(CACHE_REFRESH, |ttl| (ttl / 4).clamp(CACHE_INTERVAL, CACHE_REFRESH)));
        self.read = store.lists() > 0;
        if self.next_deadline().is_none_or(|due| due > now) {
            return;
        }
        self.dirty = false;
        self.last = Some(now);
        let begin = Instant::now();
        let cached = Cached {
            written_at: SystemTime::now(),
            revision: store.revision(),
            lease_ttl,
            subnet,
            entries: store.cached().collect(),
            evidence: store.evidence(),
        };
        let collected = begin.elapsed();
        let state = Arc::clone(&self.state);
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let begin = Instant::now();
            let path: PathBuf = state.path().to_owned();
            if let Err(error) = cached.save(&path) {
                warn!(%error, "cannot write the cache; a start without etcd would use the previous one");
            }
            collected + begin.elapsed()
        }));
    }
}

#[cfg(test)]
mod tests {
    use control_core::types::KeyListing;

    use super::*;

    #[tokio::test]
    async fn nothing_is_due_before_etcd_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::new(StateDir::open(dir.path()).unwrap());
        let mut store = Store::default();
        // The pods and policies of the cache are handed on.
        writer.changed();
        writer.write_if_due(Instant::now(), &store, None, false);
        assert_eq!(writer.next_deadline(), None, "the loop would turn without a pause");
        store.listed(Instant::now(), KeyListing::default());
        writer.write_if_due(Instant::now(), &store, None, true);
        assert!(writer.writing.is_some());
    }
}
