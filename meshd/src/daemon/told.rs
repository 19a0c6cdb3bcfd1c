//! Logs each problem once when it appears, and once when it is gone.

use std::collections::BTreeSet;

use mesh::problem::Problem;

/// Lines that one change may write; the rest are counted.
const MOST_LINES: usize = 20;

/// The problems that the log knows of.
#[derive(Debug, Default)]
pub(super) struct Told(BTreeSet<Problem>);

impl Told {
    /// Takes note of all problems that there are now.
    pub(super) fn tell<'a>(&mut self, problems: impl Iterator<Item = &'a Problem>) {
        let now: BTreeSet<Problem> = problems.cloned().collect();
        if now == self.0 {
            return;
        }
        let new: Vec<&Problem> = now.difference(&self.0).collect();
        for problem in new.iter().take(MOST_LINES) {
            tracing::warn!(code = problem.code, cause = problem.cause, remedy = problem.remedy, "problem");
        }
        if new.len() > MOST_LINES {
            tracing::warn!(more = new.len() - MOST_LINES, "more problems; see `meshctl status`");
        }
        for problem in self.0.difference(&now).take(MOST_LINES) {
            tracing::info!(code = problem.code, cause = problem.cause, "problem is gone");
        }
        self.0 = now;
    }
}
