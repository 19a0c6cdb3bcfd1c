//! The desired tunnel state: peers with keys and prefixes, and this node's own addresses.

use etcd_schema::PublicKey;
use ipnet::IpNet;
use mesh::tunnel_table::{MAX_KEYS, PeerConfig};

/// A key or prefix of a [`TunnelTable`](mesh::tunnel_table::TunnelTable) that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedClaim {
    /// The peer it belongs to.
    pub peer: String,
    /// The omitted item.
    pub what: RefusedItem,
    /// Why.
    pub reason: RefusedReason,
}

/// The omitted item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedItem {
    /// The whole peer.
    Peer,
    /// One of its keys.
    Key(PublicKey),
    /// One of its prefixes.
    Prefix(IpNet),
}

/// Why something was left out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusedReason {
    /// The key is this node's own.
    #[error("this node's own key")]
    OwnKey,
    /// Every key agrees with it on the same secret.
    #[error("a low-order point, which is insecure")]
    LowOrder,
    /// An earlier peer has it.
    #[error("already used by {0}")]
    Taken(String),
    /// More than [`MAX_KEYS`].
    #[error("a peer has at most {MAX_KEYS} keys")]
    TooManyKeys,
    /// No key of the peer can be used.
    #[error("no usable key")]
    NoKey,
}

/// A peer's accepted keys and prefixes, and the refused ones.
pub(super) struct AcceptedClaims {
    pub(super) keys: Vec<PublicKey>,
    /// Without host bits.
    pub(super) prefixes: Vec<IpNet>,
    pub(super) refused: Vec<RefusedClaim>,
}

impl AcceptedClaims {
    /// Whether a claim was refused because of another peer, on which the result then depends.
    pub(super) fn is_contested(&self) -> bool {
        self.refused.iter().any(|refused| matches!(refused.reason, RefusedReason::Taken(_)))
    }
}

/// The holders of keys and prefixes.
pub(super) trait Holders {
    /// The name of the peer that has this key.
    fn of_key(&self, key: &PublicKey) -> Option<String>;
    /// The name of the peer that has exactly this prefix.
    fn of_prefix(&self, prefix: &IpNet) -> Option<String>;
}

/// Decides which claims of `peer` are accepted beside those of others. `is_low_order` tests a key for which no shared
/// secret exists.
pub(super) fn accept(
    peer: &PeerConfig,
    own: &PublicKey,
    holders: &impl Holders,
    is_low_order: impl Fn(&PublicKey) -> bool,
) -> AcceptedClaims {
    let mut accepted = AcceptedClaims { keys: Vec::with_capacity(MAX_KEYS), prefixes: Vec::new(), refused: Vec::new() };
    let mut refuse = |what, reason| accepted.refused.push(RefusedClaim { peer: peer.name.clone(), what, reason });
    for key in &peer.keys {
        let reason = if key == own {
            RefusedReason::OwnKey
        } else if accepted.keys.contains(key) {
            continue;
        } else if accepted.keys.len() == MAX_KEYS {
            // Reported even if another peer has the key: the result should depend on this peer alone.
            RefusedReason::TooManyKeys
        } else if let Some(owner) = holders.of_key(key) {
            RefusedReason::Taken(owner)
        } else if is_low_order(key) {
            RefusedReason::LowOrder
        } else {
            accepted.keys.push(*key);
            continue;
        };
        refuse(RefusedItem::Key(*key), reason);
    }
    if accepted.keys.is_empty() {
        refuse(RefusedItem::Peer, RefusedReason::NoKey);
        return accepted;
    }
    for prefix in &peer.allowed {
        let net = prefix.trunc();
        match holders.of_prefix(&net) {
            _ if accepted.prefixes.contains(&net) => {}
            None => accepted.prefixes.push(net),
            Some(owner) => refuse(RefusedItem::Prefix(*prefix), RefusedReason::Taken(owner)),
        }
    }
    accepted
}
