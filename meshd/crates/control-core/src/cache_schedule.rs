//! When the cache is written: rate-limited, and never two at a time.

use std::time::{Duration, Instant};

/// Least time between two writes.
const INTERVAL: Duration = Duration::from_secs(1);

/// The share of time for writes, as a divisor, so that a large and busy mesh is not written every second. A start from
/// an older cache reads the rest from etcd.
const SHARE: u32 = 1000;

/// Longest time that a change waits for its write.
const INTERVAL_MAX: Duration = Duration::from_secs(30);

/// Longest time between two writes while etcd is reachable: the age of a cache limits its use.
const REFRESH: Duration = Duration::from_secs(600);

/// Decides when to write, at most a [`SHARE`] of the time.
#[derive(Debug)]
pub(crate) struct CacheSchedule {
    /// Something is not on disk.
    dirty: bool,
    /// Whether etcd was read: before that, nothing is newer than the cache on disk.
    read: bool,
    last: Option<Instant>,
    created: Instant,
    /// When it is written again although nothing changed.
    refresh_at: Option<Instant>,
    /// The duration of the last write, including work on the caller's task.
    took: Duration,
    writing: bool,
}

impl CacheSchedule {
    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            dirty: false,
            read: false,
            last: None,
            created: now,
            refresh_at: None,
            took: Duration::ZERO,
            writing: false,
        }
    }

    pub(crate) const fn changed(&mut self) {
        self.dirty = true;
    }

    /// Notes a change that must not wait: without its own subnet a node cannot start from the cache.
    pub(crate) const fn changed_now(&mut self) {
        self.dirty = true;
        self.last = None;
    }

    /// Whether something would be lost without a last write.
    pub(crate) const fn is_unsaved(&self) -> bool {
        self.dirty && self.read
    }

    /// The write under way has ended.
    pub(crate) const fn written(&mut self, took: Duration) {
        self.took = took;
        self.writing = false;
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        if self.writing || !self.read {
            None
        } else if self.dirty {
            let interval = (self.took * SHARE).clamp(INTERVAL, INTERVAL_MAX);
            Some(self.last.map_or(self.created, |last| last + interval))
        } else {
            self.refresh_at
        }
    }

    /// Whether to write now; it is under way then. `read`: etcd was read since the start.
    pub(crate) fn begin(&mut self, now: Instant, read: bool, connected: bool, lease_ttl: Option<Duration>) -> bool {
        // Unconfirmed records must age.
        self.refresh_at = self
            .last
            .filter(|_| connected)
            .map(|last| last + lease_ttl.map_or(REFRESH, |ttl| (ttl / 4).clamp(INTERVAL, REFRESH)));
        self.read = read;
        if self.next_deadline().is_none_or(|due| due > now) {
            return false;
        }
        self.dirty = false;
        self.last = Some(now);
        self.writing = true;
        true
    }
}

#[cfg(test)]
mod tests;
