//! Brings paths into a state, for tests of what follows.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::{Candidates, Carrier, DirectLink, DirectState, LinkCandidate, MacAddress, PathAgents, PathId, Target};
use crate::{path::NotDirect, topology::PeerId};

impl PathAgents {
    /// Makes one peer the only one, probed from `own`; `prefix` is reached over it.
    pub fn aim(&mut self, now: Instant, own: IpAddr, id: &PathId, target: Target, prefix: IpNet) {
        let link = DirectLink { own: own.into(), next_hop: target.next_hop };
        let candidate = LinkCandidate { link, prefixes: vec![prefix], target: Some(target) };
        let candidates = Candidates {
            unusable: None,
            unproven: false,
            carrier: Carrier::Tunnel { callable: true },
            links: [(id.1, candidate)].into(),
        };
        let peer = PeerId::Node(id.0.clone());
        self.set_own([(id.1, own)].into());
        self.retain(|other| *other == peer);
        self.set_candidates(now, &peer, candidates);
        self.forget_earlier();
    }

    /// The present paths have been planned with.
    pub fn planned(&mut self) {
        self.take_changed();
    }

    /// Lets the probes of a path come back, or be lost, until it is in this state. Returns when that was.
    ///
    /// # Panics
    /// If it is not probed, or cannot get there.
    pub fn drive(&mut self, mut now: Instant, id: &PathId, wanted: DirectState) -> Instant {
        self.routes_applied(now);
        if wanted == DirectState::Tunnel(NotDirect::Failed) {
            now = self.drive(now, id, DirectState::Direct);
        }
        let mut nonce = 0;
        for _ in 0..10_000 {
            if self.state(id) == Some(wanted) {
                return now;
            }
            nonce += 1;
            if wanted == DirectState::Tunnel(NotDirect::Failed) {
                self.on_authenticated(id, now);
            }
            let due = self.poll(now, id, nonce);
            if let (Some(nonce), DirectState::Direct) = (due.probe, wanted) {
                self.on_echo(now, id, nonce, Some(MacAddress([2; 6])));
            }
            now += Duration::from_millis(250);
        }
        panic!("{id:?} is {:?} and not {wanted:?}", self.state(id));
    }
}
