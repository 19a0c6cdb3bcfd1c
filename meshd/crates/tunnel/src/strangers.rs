//! Datagrams with an unknown receiver index.
//!
//! After a restart, peers keep sending in earlier sessions, for up to 15 seconds without a response. One such datagram
//! from a peer's known endpoint triggers a handshake with that peer, at that endpoint only. Since any host can send
//! such datagrams, these handshakes are rate-limited, and change no state by themselves.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::core::Tables;

/// Calls for such datagrams, in all.
const CALLS: u32 = 50;
const PER: Duration = Duration::from_secs(1);
/// How long what is known of endpoints is used: one pass over all peers each time.
const FRESH: Duration = Duration::from_secs(1);

/// Which peer such datagrams come from, and how many calls they have led to.
#[derive(Default)]
pub(super) struct Strangers {
    /// Positions in `tables`.
    by_endpoint: HashMap<SocketAddr, u32>,
    tables: Option<Arc<Tables>>,
    built: Option<Instant>,
    counted_since: Option<Instant>,
    calls: u32,
}

impl Strangers {
    /// The position of the peer that may be called for a datagram from `from`.
    pub(super) fn peer(&mut self, now: Instant, tables: &Arc<Tables>, from: SocketAddr) -> Option<u32> {
        let old = |at: Option<Instant>, limit| at.is_none_or(|at| now.saturating_duration_since(at) >= limit);
        if old(self.counted_since, PER) {
            (self.counted_since, self.calls) = (Some(now), 0);
        }
        if self.calls >= CALLS {
            return None;
        }
        if old(self.built, FRESH) || !self.tables.as_ref().is_some_and(|known| Arc::ptr_eq(known, tables)) {
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

    /// Takes in that the peer is called.
    pub(super) fn called(&mut self) {
        self.calls += 1;
    }
}
