//! Limits the rate of flow queries to the kernel.

use std::collections::{HashMap, VecDeque};

use super::{SECOND, tuple::Tuple};

/// Ticks for which a negative answer is valid.
const NO_STANDS: u32 = 5 * SECOND;
/// Answers that are remembered.
const REMEMBERED: usize = 4096;
/// Peers that are counted apart.
const PEERS: usize = 4096;

/// Questions per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConntrackQueryLimits {
    /// In all.
    pub total: u32,
    /// For packets of one peer.
    pub per_peer: u32,
}

impl Default for ConntrackQueryLimits {
    fn default() -> Self {
        Self { total: 2000, per_peer: 200 }
    }
}

#[derive(Debug)]
pub(super) struct ConntrackQueryLimiter {
    limits: ConntrackQueryLimits,
    /// The second that is counted.
    second: u32,
    total: u32,
    by_peer: HashMap<u32, u32>,
    no: HashMap<Tuple, u32>,
    order: VecDeque<(Tuple, u32)>,
}

impl ConntrackQueryLimiter {
    pub(super) fn new(limits: ConntrackQueryLimits) -> Self {
        Self { limits, second: 0, total: 0, by_peer: HashMap::new(), no: HashMap::new(), order: VecDeque::new() }
    }

    /// Whether to ask about `tuple` now; counts it if so.
    pub(super) fn may_ask(&mut self, tuple: &Tuple, peer: u32, now: u32) -> bool {
        if self.no.get(tuple).is_some_and(|until| *until > now) {
            return false;
        }
        if self.second != now / SECOND {
            self.second = now / SECOND;
            self.total = 0;
            self.by_peer.clear();
        }
        if self.total >= self.limits.total || (self.by_peer.len() >= PEERS && !self.by_peer.contains_key(&peer)) {
            return false;
        }
        let own = self.by_peer.entry(peer).or_default();
        if *own >= self.limits.per_peer {
            return false;
        }
        *own += 1;
        self.total += 1;
        true
    }

    /// The kernel does not know it.
    pub(super) fn said_no(&mut self, tuple: Tuple, now: u32) {
        while self.order.len() >= REMEMBERED {
            let Some((oldest, until)) = self.order.pop_front() else { break };
            if self.no.get(&oldest) == Some(&until) {
                self.no.remove(&oldest);
            }
        }
        self.no.insert(tuple, now + NO_STANDS);
        self.order.push_back((tuple, now + NO_STANDS));
    }
}
