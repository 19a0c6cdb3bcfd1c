//! Values of one figure, and their summary.

/// Values in the order in which they were taken. Summaries of none are 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// All values, in order.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// The value below which this part (from 0 to 1) of the values lies, interpolated between neighbours.
    #[must_use]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
        let place = part.clamp(0.0, 1.0) * last as f64;
        let below = place.floor() as usize;
        let above = (below + 1).min(last);
        let (low, high, between) = (sorted[below], sorted[above], place - below as f64);
        // Values may be infinite, of which neither a difference nor a product with 0 is a number.
        if between == 0.0 || low == high { low } else { low + (high - low) * between }
    }

    /// The middle value.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The least value.
    #[must_use]
    pub fn least(&self) -> f64 {
        self.quantile(0.0)
    }

    /// The greatest value.
    #[must_use]
    pub fn greatest(&self) -> f64 {
        self.quantile(1.0)
    }

    /// Each value divided by the value of `other` with the same place: ratios within a turn. Turns that only one of
    /// them has, and those in which the other one's value is 0, are left out.
    #[must_use]
    pub fn ratios(&self, other: &Self) -> Self {
        let pairs = self.0.iter().zip(&other.0).filter(|(_, below)| **below != 0.0);
        Self(pairs.map(|(above, below)| above / below).collect())
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_the_neighbours() {
        let series: Series = [4.0, 1.0, 3.0, 2.0].into_iter().collect();
        assert_eq!([series.least(), series.median(), series.greatest()], [1.0, 2.5, 4.0]);
        assert_eq!(series.quantile(0.25), 1.75);
        assert_eq!(Series::default().median(), 0.0);
        let never: Series = [1.0, f64::INFINITY, f64::INFINITY].into_iter().collect();
        assert_eq!([never.least(), never.median(), never.quantile(0.6)], [1.0, f64::INFINITY, f64::INFINITY]);
    }

    #[test]
    fn ratios_are_taken_within_a_turn() {
        let above: Series = [2.0, 9.0, 5.0, 1.0].into_iter().collect();
        let below: Series = [1.0, 3.0, 0.0].into_iter().collect();
        assert_eq!(above.ratios(&below).values(), [2.0, 3.0]);
    }
}
