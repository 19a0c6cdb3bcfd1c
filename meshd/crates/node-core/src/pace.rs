//! Schedules rereading of other programs' nftables rules: soon after a change, but never for more than a share of a
//! core, regardless of the rate of changes and of other reasons to read the kernel.

use std::time::{Duration, Instant};

use mesh::kernel_state::OthersRules;

/// Least time between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// The same as a multiple of the last read's duration: at most a twentieth of a core.
const SHARE: u32 = 20;

/// When the next look is due, and when it may be at the soonest.
#[derive(Debug)]
pub(super) struct Pace {
    due: Option<Instant>,
    not_before: Instant,
}

impl Pace {
    pub(super) const fn new(now: Instant) -> Self {
        Self { due: None, not_before: now }
    }

    /// When there is something to look at, if there is.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Something has changed that is to be looked at from `at` on. The last of many changes is looked at as well: it is
    /// there by then.
    pub(super) fn changed(&mut self, at: Instant) {
        let at = at.max(self.not_before);
        self.due.get_or_insert(at);
    }

    /// Whether a look is due; it is taken for made.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        let due = self.due.is_some_and(|at| at <= now);
        if due {
            self.due = None;
        }
        due
    }

    /// Whether a read that begins now may include other programs' rules.
    pub(super) fn others(&self, now: Instant) -> OthersRules {
        if now < self.not_before { OthersRules::Keep } else { OthersRules::Read }
    }

    /// A look found others' rules as they were.
    pub(super) fn nothing_new(&mut self) {
        self.due = None;
    }

    /// Others' rules were read.
    pub(super) fn read(&mut self, began: Instant, ended: Instant) {
        self.due = None;
        self.not_before = ended + PAUSE.max(ended.duration_since(began) * SHARE);
    }

    /// A look left out others' rules, which have changed.
    pub(super) fn left_out(&mut self) {
        self.due.get_or_insert(self.not_before);
    }
}

#[cfg(test)]
mod tests;
