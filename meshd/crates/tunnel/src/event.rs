//! Events of the tunnel.

use std::{net::SocketAddr, time::SystemTime};

use etcd_schema::PublicKey;
use mesh::path::TunnelSession;

/// An event. A subscriber that falls behind loses the oldest events and gets an error;
/// [`Tunnel::peers`](super::Tunnel::peers) then has the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TunnelEvent {
    /// A handshake was completed: there is a new session with this peer.
    Handshake {
        /// The peer's name.
        peer: String,
    },
    /// The path MTU to a peer changed; its routes' MTU should follow.
    PeerMtu {
        /// The peer's name.
        peer: String,
        /// Largest inner packet in bytes; never under 1280 (unless the routes' own MTU is).
        inner_mtu: u16,
        /// The path carries less than that: outer packets go without DF and may be fragmented.
        without_df: bool,
    },
    /// A peer is reached at a new address, from which an authenticated packet came.
    Endpoint {
        /// The peer's name.
        peer: String,
        /// The address.
        endpoint: SocketAddr,
    },
    /// The TUN device is gone; nothing passes until [`Tunnel::reopen_tun`](super::Tunnel::reopen_tun).
    TunGone,
    /// A thread of the tunnel panicked: a bug. The tunnel has stopped working, and the daemon should end.
    Failed {
        /// The thread's name.
        thread: &'static str,
    },
}

/// The state of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its keys, as applied.
    pub keys: Vec<PublicKey>,
    /// The address the last authenticated packet came from; before the first one, the candidate that comes first.
    pub endpoint: Option<SocketAddr>,
    /// When the newest session came up, also if it is over.
    pub latest_handshake: Option<SystemTime>,
    /// Bytes received in authentic messages, outer payload.
    pub rx_bytes: u64,
    /// Bytes sent, outer payload.
    pub tx_bytes: u64,
    /// Whether it answers.
    pub session: TunnelSession,
    /// Largest inner packet in bytes that the path carries.
    pub inner_mtu: u16,
    /// Outer packets go without DF because the path carries too little.
    pub without_df: bool,
}
