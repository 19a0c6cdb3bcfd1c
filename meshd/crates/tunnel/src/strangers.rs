//! Datagrams with an unknown receiver index.
//!
//! After a restart, peers keep sending in earlier sessions, for up to 15 seconds without a response. One such datagram
//! from a peer's known endpoint triggers a handshake with that peer, at that endpoint only. Since any host can send
//! such datagrams, these handshakes are rate-limited, and change no state by themselves.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::tables::Tables;

/// Calls for such datagrams, in all.
const CALLS: u32 = 50;
const PER: Duration = Duration::from_secs(1);
/// How long the index of endpoints is used; rebuilding it is one pass over all peers.
const FRESH: Duration = Duration::from_secs(1);

/// How many calls datagrams have led to that any host can send.
#[derive(Debug, Default)]
pub(super) struct CallLimit(Mutex<Calls>);

#[derive(Debug, Default)]
struct Calls {
    since: Option<Instant>,
    number: u32,
}

impl CallLimit {
    /// Whether another such call may be made. No lock is held meanwhile: peers are locked before and after this.
    pub(super) fn allows(&self, now: Instant) -> bool {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if is_old(calls.since, now, PER) {
            *calls = Calls { since: Some(now), number: 0 };
        }
        calls.number < CALLS
    }

    /// Counts a call that was made.
    pub(super) fn count(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).number += 1;
    }
}

fn is_old(at: Option<Instant>, now: Instant, limit: Duration) -> bool {
    at.is_none_or(|at| now.saturating_duration_since(at) >= limit)
}

/// Which peer such datagrams come from.
#[derive(Default)]
pub(super) struct Strangers {
    /// Positions in `tables`.
    by_endpoint: HashMap<SocketAddr, u32>,
    tables: Option<Arc<Tables>>,
    built: Option<Instant>,
}

impl Strangers {
    /// The position of the peer that may be called for a datagram from `from`.
    pub(super) fn peer(&mut self, now: Instant, tables: &Arc<Tables>, from: SocketAddr) -> Option<u32> {
        if is_old(self.built, now, FRESH) || !self.tables.as_ref().is_some_and(|known| Arc::ptr_eq(known, tables)) {
            self.by_endpoint.clear();
            for (position, peer) in tables.positions() {
                for endpoint in peer.lock().endpoints() {
                    self.by_endpoint.entry(endpoint).or_insert(position);
                }
            }
            (self.built, self.tables) = (Some(now), Some(Arc::clone(tables)));
        }
        self.by_endpoint.get(&from).copied()
    }
}
