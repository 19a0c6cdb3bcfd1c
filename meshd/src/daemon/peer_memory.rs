//! Memory of tunnel peers: proven addresses, and, over a restart, endpoints and handshakes.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    time::{Instant, SystemTime},
};

use cow_map::CowMap;
use mesh::problem::Problem;
use tunnel::Tunnel;

use super::{
    handshakes::{self, Handshakes},
    proven::Proven,
    roamed::EndpointCache,
};

/// The memory of one daemon.
#[derive(Debug)]
pub(super) struct PeerMemory {
    pub(super) proven: Proven,
    roamed: EndpointCache,
    handshakes: Handshakes,
    /// Clocks that make handshakes fail.
    clock_problems: Vec<Problem>,
}

impl PeerMemory {
    /// Loads the state of an earlier run from `state_dir`.
    pub(super) fn load(state_dir: &Path, handshakes: Handshakes) -> Self {
        Self {
            proven: Proven::default(),
            roamed: EndpointCache::load(state_dir),
            clock_problems: handshakes.behind(SystemTime::now()).into_iter().collect(),
            handshakes,
        }
    }

    /// All peers with a known endpoint, by name.
    pub(super) fn roamed(&self) -> &BTreeMap<String, SocketAddr> {
        self.roamed.all()
    }

    /// The peers that the run before had working sessions with.
    pub(super) fn talking(&self) -> Vec<String> {
        self.handshakes.talking()
    }

    /// Clocks that make handshakes fail.
    pub(super) fn clock_problems(&self) -> &[Problem] {
        &self.clock_problems
    }

    /// A handshake with a peer was completed.
    pub(super) fn handshake(&mut self, now: Instant) {
        self.handshakes.changed(now);
    }

    /// Notes another authenticated endpoint of `peer`.
    pub(super) fn endpoint(&mut self, now: Instant, peer: &str, endpoint: SocketAddr) {
        self.roamed.note(now, peer, endpoint);
        self.proven.heard(now, peer, endpoint);
    }

    /// Reads the state of all peers from the tunnel: events may have been lost.
    pub(super) fn resync(&mut self, now: Instant, tunnel: &Tunnel) {
        self.proven.resync(now, tunnel.heard_from());
    }

    /// Saves the peers with sessions, and the timestamps of their handshakes, for the next start. `name` returns a
    /// peer's displayed name.
    pub(super) fn keep_handshakes(&mut self, now: Instant, tunnel: &Tunnel, name: impl Fn(&str) -> String) {
        let (peers, seen, clock) = (tunnel.peers(), tunnel.seen_stamps(), SystemTime::now());
        self.clock_problems = handshakes::ahead(&peers, &seen, clock, name);
        self.clock_problems.extend(self.handshakes.behind(clock));
        self.handshakes.keep(now, &peers, &seen, clock);
    }

    /// When [`Self::handshakes_due`] or [`Self::save_endpoints`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.roamed.save_at(), self.handshakes.save_at()].into_iter().flatten().min()
    }

    /// Whether handshakes are to be kept now.
    pub(super) fn handshakes_due(&self, now: Instant) -> bool {
        self.handshakes.save_at().is_some_and(|at| at <= now)
    }

    /// Writes the peers' endpoints if due, without peers that are gone from `peers`.
    pub(super) fn save_endpoints<T>(&mut self, now: Instant, peers: Option<&CowMap<String, T>>) {
        self.roamed.save_if_due(now, peers);
    }
}
