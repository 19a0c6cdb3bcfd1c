//! Future events of a simulation, by time.

use std::{cmp::Reverse, collections::BinaryHeap, time::Instant};

/// Events that are to happen; those of one time in the order they were put.
#[derive(Debug)]
pub struct EventQueue<T> {
    events: BinaryHeap<Reverse<Scheduled<T>>>,
    sequence: u64,
}

#[derive(Debug)]
struct Scheduled<T> {
    at: Instant,
    sequence: u64,
    event: T,
}

impl<T> Default for EventQueue<T> {
    fn default() -> Self {
        Self { events: BinaryHeap::new(), sequence: 0 }
    }
}

impl<T> PartialEq for Scheduled<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl<T> Eq for Scheduled<T> {}
impl<T> PartialOrd for Scheduled<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Scheduled<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

impl<T> EventQueue<T> {
    /// Schedules an event.
    pub fn put(&mut self, at: Instant, event: T) {
        self.sequence += 1;
        self.events.push(Reverse(Scheduled { at, sequence: self.sequence, event }));
    }

    /// The time of the next event.
    #[must_use]
    pub fn next_time(&self) -> Option<Instant> {
        self.events.peek().map(|next| next.0.at)
    }

    /// The next event, if its time has come.
    pub fn take_due(&mut self, now: Instant) -> Option<T> {
        if self.next_time()? > now {
            return None;
        }
        self.events.pop().map(|next| next.0.event)
    }

    /// Takes out the events that `taken` names, in any order.
    pub fn take_out(&mut self, taken: impl Fn(&T) -> bool) -> Vec<T> {
        let (taken, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.events).into_iter().partition(|next| taken(&next.0.event));
        self.events = others.into();
        taken.into_iter().map(|next| next.0.event).collect()
    }

    /// All events, in any order.
    pub fn events(&self) -> impl Iterator<Item = &T> {
        self.events.iter().map(|next| &next.0.event)
    }
}
