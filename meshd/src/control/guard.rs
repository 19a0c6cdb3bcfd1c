//! The guard against mass withdrawal: a wrong `etcdctl del --prefix`, or leases that ran out together, must not
//! take the mesh down before the nodes that live have put their records back.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How long withdrawals wait when too many came together.
pub(super) const HOLD: Duration = Duration::from_secs(30);

/// Withdrawals that are less than this apart count as one.
pub(super) const WINDOW: Duration = Duration::from_secs(5);

/// Fewer than this are never held.
pub(super) const AT_LEAST: usize = 3;

/// Withdrawals of the last [`WINDOW`], each with what was withdrawn while that is not yet held.
#[derive(Debug)]
pub(crate) struct Guard<T> {
    recent: VecDeque<(Instant, String, Option<T>)>,
}

impl<T> Default for Guard<T> {
    fn default() -> Self {
        Self { recent: VecDeque::new() }
    }
}

impl<T> Guard<T> {
    /// A record was withdrawn.
    pub(crate) fn withdrawn(&mut self, now: Instant, key: String, record: T) {
        self.recent.push_back((now, key, Some(record)));
    }

    /// A record came back.
    pub(crate) fn returned(&mut self, key: &str) {
        self.recent.retain(|(_, recent, _)| recent != key);
    }

    /// What has to be held from now on: too many, or `all` of them; `left` counts the records that are left.
    pub(crate) fn judge(&mut self, now: Instant, all: bool, left: usize) -> Vec<(String, T)> {
        while self.recent.front().is_some_and(|(at, _, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.recent.pop_front();
        }
        let gone = self.recent.len();
        if !all && (gone < AT_LEAST || gone * 3 <= left + gone) {
            return Vec::new();
        }
        self.recent.iter_mut().filter_map(|(_, key, record)| Some((key.clone(), record.take()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(guard: &mut Guard<()>, at: Instant, keys: &[&str], left: usize) -> usize {
        for key in keys {
            guard.withdrawn(at, (*key).to_owned(), ());
        }
        guard.judge(at, false, left).len()
    }

    #[test]
    fn holds_more_than_a_third_and_at_least_three() {
        let now = Instant::now();
        assert_eq!(after(&mut Guard::default(), now, &["a", "b"], 0), 0);
        assert_eq!(after(&mut Guard::default(), now, &["a", "b", "c"], 6), 0);
        assert_eq!(after(&mut Guard::default(), now, &["a", "b", "c"], 5), 3);
    }

    #[test]
    fn adds_up_what_goes_within_the_window_and_forgets_what_came_back() {
        let mut guard = Guard::default();
        let now = Instant::now();
        assert_eq!(after(&mut guard, now, &["a", "b"], 5), 0);
        assert_eq!(after(&mut guard, now + Duration::from_secs(4), &["c"], 4), 3);
        // Already over the line: the next one is held as well, and only that one is new.
        assert_eq!(after(&mut guard, now + Duration::from_secs(5), &["d"], 3), 1);
        assert_eq!(after(&mut guard, now + Duration::from_secs(20), &["e"], 2), 0);

        // What went within the window is held as well once all has to be.
        let mut guard = Guard::default();
        assert_eq!(after(&mut guard, now, &["a"], 5), 0);
        assert_eq!(guard.judge(now, true, 5).len(), 1);

        let mut guard = Guard::default();
        assert_eq!(after(&mut guard, now, &["a", "b"], 5), 0);
        guard.returned("a");
        assert_eq!(after(&mut guard, now, &["c"], 5), 0);
    }
}
