//! When the loop makes its next pass although it hears nothing.

use std::time::{Duration, Instant};

/// How long to wait before trying again what could not be done.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// The earliest of `deadlines`, after a pass that began at `began`. One that was due by then and is still there could not
/// be served, as while this node may not act: it waits for [`RETRY`], or the loop would not rest.
pub(super) fn wake_at(
    deadlines: impl IntoIterator<Item = Option<Instant>>,
    began: Instant,
    now: Instant,
) -> Option<Instant> {
    deadlines.into_iter().flatten().map(|at| if at <= began { now + RETRY } else { at }).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_a_pass_could_not_serve_is_tried_again_in_a_moment() {
        let start = Instant::now();
        let [past, began, meanwhile, now, soon, later] =
            [0, 1, 2, 3, 4, 2000].map(|ms| start + Duration::from_millis(ms));
        let next = |deadlines: &[Instant]| wake_at(deadlines.iter().copied().map(Some).chain([None]), began, now);
        assert_eq!(next(&[]), None);
        assert_eq!(next(&[later, soon]), Some(soon));
        assert_eq!(next(&[later, past]), Some(now + RETRY));
        assert_eq!(next(&[began]), Some(now + RETRY));
        // What fell due during the pass is served by the next one, at once.
        assert_eq!(next(&[past, meanwhile]), Some(meanwhile));
    }
}
