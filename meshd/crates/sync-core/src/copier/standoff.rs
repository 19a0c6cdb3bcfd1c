//! When a leader that cannot copy makes room for another process, and for how long.

use std::time::Duration;

use super::{Copier, CopyRefusal, Effect, Now, Resigned};

/// How long a leader may be unable to copy.
const PATIENCE: Duration = Duration::from_secs(30);
const SHORTEST: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(300);

/// How long a process stays out after such a term: longer each time, since a process that is alone leads again.
#[derive(Debug, Default)]
pub struct Standoff {
    last: Option<Duration>,
}

impl Standoff {
    /// The time to stay out now.
    pub fn next_period(&mut self) -> Duration {
        let next = self.last.map_or(SHORTEST, |last| (last * 2).min(LONGEST));
        self.last = Some(next);
        next
    }

    /// After a term that was of use.
    pub const fn reset(&mut self) {
        self.last = None;
    }
}

impl Copier {
    /// Ends a term in which nothing can be copied while another process perhaps could. A restored cluster is not a
    /// reason: every process finds it, and an operator's confirmation is awaited.
    pub(super) fn make_room(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let other =
            self.refusals.values().any(|of| matches!(of, CopyRefusal::NoCluster | CopyRefusal::OtherCluster { .. }));
        let reason = match (other, self.silent) {
            (true, _) => Resigned::Refused,
            (false, true) => Resigned::Silent,
            (false, false) => {
                self.useless_since = None;
                return;
            }
        };
        let since = *self.useless_since.get_or_insert(now.monotonic);
        if now.monotonic >= since + PATIENCE {
            self.resign(reason, effects);
        }
    }
}
