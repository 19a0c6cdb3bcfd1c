//! Turns: every subject once, again and again, and which turns count.
//!
//! On a virtual machine the host takes processor time away as it likes, for seconds at a time. A turn in which it took
//! much compares nothing but luck. So further turns are taken when some were disturbed, at most as many again, and the
//! least disturbed ones count. Measured values do not influence the choice; omitted turns are printed.

use std::fmt::Write as _;

use integration::measure::{Better, Comparison, Cost};

/// More than this part of one core, taken by the host during a turn, makes the turn a disturbed one.
const DISTURBED: f64 = 0.1;

/// What one subject showed in one turn.
pub(crate) struct Taken<T> {
    /// Figures: name with unit, which way is better, value.
    pub(crate) values: Vec<(&'static str, Better, f64)>,
    /// Of all that was done for them.
    pub(crate) cost: Cost,
    /// What is wanted beside figures.
    pub(crate) more: T,
}

struct Turn<T> {
    /// In the order of the subjects.
    taken: Vec<Taken<T>>,
}

/// Takes turns until `wanted` were undisturbed, puts the figures of those that count into `comparison`, with the
/// subjects in their order, and returns what else they brought: for each turn, for each subject.
pub(crate) fn take<S, T>(
    comparison: &mut Comparison,
    wanted: u32,
    subjects: &[(String, S)],
    mut measure: impl FnMut(&S, usize) -> Taken<T>,
) -> Vec<Vec<T>> {
    let wanted = wanted as usize;
    let mut turns: Vec<Turn<T>> = Vec::new();
    while turns.len() < 2 * wanted && turns.iter().filter(|turn| turn.stolen() <= DISTURBED).count() < wanted {
        let number = turns.len();
        let mut taken: Vec<Option<Taken<T>>> = subjects.iter().map(|_| None).collect();
        for at in 0..subjects.len() {
            // Another one begins in each turn, so that none always follows the same one.
            let which = (number + at) % subjects.len();
            taken[which] = Some(measure(&subjects[which].1, number));
        }
        turns.push(Turn { taken: taken.into_iter().flatten().collect() });
    }
    let all = turns.len();
    let mut limits: Vec<f64> = turns.iter().map(Turn::stolen).collect();
    limits.sort_by(f64::total_cmp);
    let limit = limits[wanted.min(all) - 1];
    let (mut count, mut left_out) = (Vec::new(), Vec::new());
    for turn in turns {
        if turn.stolen() <= limit && count.len() < wanted { count.push(turn) } else { left_out.push(turn) }
    }
    comparison.note(disturbance(&count, &left_out));
    for turn in &left_out {
        comparison.note(turn.describe(subjects));
    }
    for turn in &count {
        for ((name, _), taken) in subjects.iter().zip(&turn.taken) {
            for (metric, better, value) in &taken.values {
                comparison.record(metric, *better, name, *value);
            }
        }
    }
    count.into_iter().map(|turn| turn.taken.into_iter().map(|taken| taken.more).collect()).collect()
}

impl<T> Turn<T> {
    /// Processor time that the host took, in cores.
    fn stolen(&self) -> f64 {
        self.share(|cost| cost.cpu.stolen)
    }

    fn share(&self, part: impl Fn(&Cost) -> f64) -> f64 {
        let took: f64 = self.taken.iter().map(|taken| taken.cost.took.as_secs_f64()).sum();
        self.taken.iter().map(|taken| part(&taken.cost)).sum::<f64>() / took.max(f64::MIN_POSITIVE)
    }

    fn describe<S>(&self, subjects: &[(String, S)]) -> String {
        let mut text = format!("Left out, the host took {:.0} %:", 100.0 * self.stolen());
        for ((name, _), taken) in subjects.iter().zip(&self.taken) {
            if let Some((metric, _, value)) = taken.values.first() {
                let _ = write!(text, " {name} {value:.3} {metric};");
            }
        }
        text
    }
}

fn disturbance<T>(count: &[Turn<T>], left_out: &[Turn<T>]) -> String {
    let greatest = |turns: &[Turn<T>], part: &dyn Fn(&Cost) -> f64| {
        100.0 * turns.iter().map(|turn| turn.share(part)).fold(0.0, f64::max)
    };
    format!(
        "{} turns count and {} were left out. Taken away in one that counts, in percent of a core, at most: {:.0} by the \
         machine's host, {:.0} by other programs on the machine.",
        count.len(),
        left_out.len(),
        greatest(count, &|cost| cost.cpu.stolen),
        greatest(count, &|cost| cost.cpu.others)
    )
}
