//! One agent for each path that may be direct: what to probe next, and what the echoes prove. No I/O and no clock.
//!
//! The shell sends the probes that [`PathAgents::poll`] returns and reports what comes back.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::direct::{DirectPath, DirectState, MacAddress, Surroundings};
use crate::target::{PathId, PathStates, Target, Targets};

/// Deadlines that lie as close together are met together.
const COALESCE: Duration = Duration::from_millis(20);

/// The agents of all eligible paths.
#[derive(Debug, Default)]
pub struct PathAgents {
    targets: Targets,
    paths: BTreeMap<PathId, DirectPath>,
    /// New paths whose probe route the kernel may not have yet: they are not probed.
    unrouted: BTreeSet<PathId>,
    /// The earliest deadline, or an earlier time.
    next: Option<Instant>,
    /// The state of a path differs from what [`Self::take_changed`] has seen.
    changed: bool,
}

/// What a path needs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Due {
    /// Send a probe with this nonce; its echo proves the path.
    pub probe: Option<u128>,
    /// Call the peer in the tunnel, to see whether it answers there.
    pub call: bool,
}

impl PathAgents {
    /// Replaces what is probed. Paths whose next hop and interface stay keep their state; one that was direct before this
    /// daemon started stays so while it proves itself, if `neighbour` knows its next hop. New paths are probed from
    /// [`Self::routes_applied`] on.
    pub fn set_targets(&mut self, now: Instant, targets: Targets, neighbour: impl Fn(&Target) -> Option<MacAddress>) {
        let mut before = std::mem::take(&mut self.paths);
        for (id, target) in &targets.peers {
            let same = self.targets.peers.get(id).is_some_and(|old| old.is_same_link(target));
            let kept = before.remove(id).filter(|_| same);
            let path = kept.unwrap_or_else(|| {
                self.unrouted.insert(id.clone());
                DirectPath::resumed(now, if target.was_direct { neighbour(target) } else { None })
            });
            self.paths.insert(id.clone(), path);
        }
        self.unrouted.retain(|id| targets.peers.contains_key(id));
        self.targets = targets;
        self.next = self.earliest();
        self.changed = true;
    }

    /// The kernel has the probe route of every target. Returns whether there are new paths to probe.
    pub fn routes_applied(&mut self, now: Instant) -> bool {
        for id in std::mem::take(&mut self.unrouted) {
            if let Some(path) = self.paths.get_mut(&id) {
                path.probe_at(now);
                self.next = Some(now);
            }
        }
        self.next == Some(now)
    }

    /// What is probed.
    #[must_use]
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// When [`Self::due`] has something to say.
    #[must_use]
    pub fn next_timer(&self) -> Option<Instant> {
        self.next
    }

    /// The paths to poll now, each with the time to poll it at. To be called again at [`Self::next_timer`].
    pub fn due(&self, now: Instant) -> Vec<(PathId, Instant)> {
        let due = self.probed().filter(|(_, path)| path.deadline() <= now + COALESCE);
        due.map(|(id, path)| (id.clone(), now.max(path.deadline()))).collect()
    }

    /// All that was due has been polled.
    pub fn polled(&mut self, now: Instant) {
        self.next = self.earliest().map(|next| next.max(now + COALESCE));
    }

    /// Whether [`Self::poll`] makes use of [`Surroundings`]; what is given may be anything otherwise.
    #[must_use]
    pub fn needs_surroundings(&self, now: Instant, id: &PathId) -> bool {
        self.paths.get(id).is_some_and(|path| path.needs_surroundings(now))
    }

    /// Time has passed for one path. `nonce` must be fresh and random.
    pub fn poll(&mut self, now: Instant, id: &PathId, around: Surroundings, nonce: u128) -> Due {
        let Some(path) = self.paths.get_mut(id) else { return Due::default() };
        let before = path.state();
        let probe = path.poll(now, around, nonce).map(|probe| probe.nonce);
        self.changed |= path.state() != before;
        Due { probe, call: path.wants_tunnel(now, around.heard_in_tunnel) }
    }

    /// Whether an echo of `nonce` is awaited.
    #[must_use]
    pub fn awaits(&self, id: &PathId, nonce: u128) -> bool {
        self.paths.get(id).is_some_and(|path| path.awaits(nonce))
    }

    /// An authenticated echo of `nonce` has come back over the path, whose next hop has this link-layer address. `false`
    /// if no such probe is under way.
    pub fn on_echo(&mut self, now: Instant, id: &PathId, nonce: u128, neighbour: Option<MacAddress>) -> bool {
        let Some(path) = self.paths.get_mut(id) else { return false };
        let before = path.state();
        let proves = path.echoed(now, nonce, neighbour);
        self.changed |= path.state() != before;
        proves
    }

    /// The state of each path.
    #[must_use]
    pub fn states(&self) -> PathStates {
        self.paths.iter().map(|(id, path)| (id.clone(), path.state())).collect()
    }

    /// The state of one path.
    #[must_use]
    pub fn state(&self, id: &PathId) -> Option<DirectState> {
        self.paths.get(id).map(DirectPath::state)
    }

    /// Whether a state, or the set of paths, has changed since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn earliest(&self) -> Option<Instant> {
        self.probed().map(|(_, path)| path.deadline()).min()
    }

    fn probed(&self) -> impl Iterator<Item = (&PathId, &DirectPath)> {
        self.paths.iter().filter(|(id, _)| !self.unrouted.contains(*id))
    }
}

#[cfg(test)]
mod tests;
