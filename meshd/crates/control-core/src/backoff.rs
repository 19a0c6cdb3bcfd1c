//! Full-jitter exponential backoff as a value: no clock, no sleeping.

use std::time::Duration;

use rand::Rng;

/// Delays that grow from attempt to attempt, each drawn uniformly from zero to the current ceiling.
///
/// Jitter over the entire interval, not only around the ceiling, keeps nodes that lost one etcd member together from
/// returning together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    attempts: u32,
}

impl Backoff {
    /// Ceilings `first`, `2 * first`, `4 * first` … up to `max`.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, attempts: 0 }
    }

    /// The delay before the next attempt; never longer than `max`.
    pub fn next<R: Rng + ?Sized>(&mut self, rng: &mut R) -> Duration {
        let factor = 1u32.checked_shl(self.attempts).unwrap_or(u32::MAX);
        let ceiling = self.first.saturating_mul(factor).min(self.max);
        self.attempts = self.attempts.saturating_add(1).min(31);
        ceiling.mul_f64(rng.random::<f64>())
    }

    /// Starts again at `first`, after a success.
    pub const fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Attempts since the last success.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    #[test]
    fn delays_stay_under_a_ceiling_that_doubles_and_ends() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut longest = Duration::ZERO;
        for attempt in 0..100u32 {
            let delay = backoff.next(&mut rng);
            let ceiling = Duration::from_millis(100u64.saturating_mul(1 << attempt.min(20)));
            assert!(delay <= ceiling.min(Duration::from_secs(5)), "{attempt}: {delay:?}");
            longest = longest.max(delay);
        }
        assert!(longest > Duration::from_secs(2));
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_millis(100));
    }
}
