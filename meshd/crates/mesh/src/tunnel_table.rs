//! The desired tunnel state: peers with keys and prefixes, and this node's own addresses.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use cow_map::CowMap;
use etcd_schema::{PresharedKey, PublicKey};
use ipnet::IpNet;

/// Most keys a peer has at a time: the current one, and the next one while a rotation is under way.
pub const MAX_KEYS: usize = 2;

/// Keepalive of peers that this node must call, when none is set: it holds the mapping of a NAT.
pub const CALL_OUT_KEEPALIVE: Duration = Duration::from_secs(25);

/// The whole desired state, given to `Tunnel::apply`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TunnelTable {
    /// The peers by name. Of two that claim one key or prefix, the first has it.
    pub peers: CowMap<String, Arc<PeerConfig>>,
    /// This node's own subnets: where packets out of the tunnel may go, besides its overlay addresses.
    pub local: Vec<IpNet>,
    /// This node's overlay addresses, at most one per family.
    pub overlay: Vec<IpAddr>,
    /// MTU of the routes into the tunnel: the largest inner packet, in bytes.
    pub mtu: u16,
}

impl TunnelTable {
    /// Puts a peer in the place of the one of its name.
    pub fn put(&mut self, peer: PeerConfig) {
        self.peers.insert(peer.name.clone(), Arc::new(peer));
    }
}

impl FromIterator<PeerConfig> for CowMap<String, Arc<PeerConfig>> {
    fn from_iter<I: IntoIterator<Item = PeerConfig>>(peers: I) -> Self {
        peers.into_iter().map(|peer| (peer.name.clone(), Arc::new(peer))).collect()
    }
}

/// A peer: a node of the mesh or an external peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerConfig {
    /// Unique; what status and events call it.
    pub name: String,
    /// The current key and, during a rotation, the next one. Both own the prefixes.
    pub keys: Vec<PublicKey>,
    /// WireGuard's optional symmetric key.
    pub preshared_key: Option<PresharedKey>,
    /// Its prefixes: inner destinations that go to it, and the only inner sources accepted from it.
    pub allowed: Vec<IpNet>,
    /// Where it may be reached, best first. Tried in turn while it is down; a live peer's endpoint follows the
    /// authenticated packets it sends and nothing else.
    pub candidates: Vec<SocketAddr>,
    /// Send something at least this often while there is a session, and keep one up.
    pub keepalive: Option<Duration>,
    /// Initiate at once and keep a session up without traffic, as a node must that cannot be called. Implies a
    /// keepalive of [`CALL_OUT_KEEPALIVE`] when none is set.
    pub call_out: bool,
}
