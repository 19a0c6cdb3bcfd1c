//! A peer's session, as the tunnel knows it.

use std::time::Duration;

/// Unanswered calls, over each of a peer's keys, that make it silent: the fourth goes out 15 s after the first.
const UNANSWERED_CALLS: u32 = 4;
/// Attempts older than this do not count.
const STALE_CALL: Duration = Duration::from_secs(300);

/// Facts of the tunnel about a peer, from which [`crate::path`] decides the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TunnelSession {
    /// There is a session (at most 180 s old), and no data has been unanswered for 15 s. WireGuard answers data within
    /// 10 s, with an empty message if necessary. An idle peer without keepalive has no session after 180 s and is not
    /// alive, which does not predict the next packet.
    pub alive: bool,
    /// Initiations sent, over all keys and endpoints, since something authentic came.
    pub calls: u32,
    /// How long ago the last of them was.
    pub last_call: Option<Duration>,
    /// How many keys the peer has.
    pub keys: u32,
    /// How many endpoints it may have.
    pub endpoints: u32,
}

impl TunnelSession {
    /// Whether recent handshake attempts got no answer, the first at least 15 s ago, at every endpoint. A peer without
    /// recent attempts is not silent: its state is unknown.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        let each = UNANSWERED_CALLS.max(self.endpoints.saturating_add(1));
        self.calls >= each.saturating_mul(self.keys).max(1) && self.last_call.is_some_and(|ago| ago < STALE_CALL)
    }
}
