//! Deadlines of peers.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt,
    sync::{Mutex, OnceLock, PoisonError},
    time::Instant,
};

use super::peer_index::PeerIndex;

/// Alarms of all peers, the earliest first. Locked when an alarm is set, which a peer with traffic does a few times a
/// second at most.
#[derive(Default)]
pub(super) struct Alarms {
    heap: Mutex<BinaryHeap<Reverse<(Instant, PeerIndex)>>>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Alarms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alarms").finish_non_exhaustive()
    }
}

impl Alarms {
    /// Names what to call when an alarm is set that is earlier than all others.
    pub(super) fn on_earlier_deadline(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake.set(Box::new(wake));
    }

    /// Sets an alarm. An earlier one stays; its receiver must ignore it.
    pub(super) fn set(&self, at: Instant, peer: PeerIndex) {
        let earliest = {
            let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = heap.peek().is_none_or(|Reverse((first, _))| at < *first);
            heap.push(Reverse((at, peer)));
            earliest
        };
        if earliest && let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// When the next alarm rings.
    pub(super) fn next(&self) -> Option<Instant> {
        let heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        heap.peek().map(|Reverse((at, _))| *at)
    }

    /// The next alarm that has rung, taken out.
    pub(super) fn take_due(&self, now: Instant) -> Option<(Instant, PeerIndex)> {
        let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        match heap.peek() {
            Some(Reverse((at, _))) if *at <= now => heap.pop().map(|Reverse(alarm)| alarm),
            _ => None,
        }
    }
}
