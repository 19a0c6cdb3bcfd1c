//! The core's source of randomness, seeded from outside. What it spreads by chance is drawn seldom: never per packet.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use rand::{Rng as _, distr::uniform::SampleUniform, rngs::StdRng};

/// Draws times and numbers; behind a lock, as every thread draws.
pub(super) struct Dice(Mutex<StdRng>);

impl Dice {
    pub(super) fn new(rng: StdRng) -> Self {
        Self(Mutex::new(rng))
    }

    /// One of `range`, each alike.
    pub(super) fn draw<T: SampleUniform + PartialOrd>(&self, range: Range<T>) -> T {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).random_range(range)
    }
}
