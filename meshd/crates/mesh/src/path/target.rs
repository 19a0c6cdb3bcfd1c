//! Links to probe.

use std::{collections::BTreeMap, net::IpAddr};

use etcd_schema::{NodeId, PublicKey};

use crate::address::Family;

/// One peer and family.
pub type PathId = (NodeId, Family);

/// A peer that is eligible for direct in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its overlay address.
    pub overlay: IpAddr,
    /// Its interface address.
    pub next_hop: IpAddr,
    /// Its probe port.
    pub port: u16,
    /// Its current and next key.
    pub keys: Vec<PublicKey>,
    /// The interface that the path runs over: index and name.
    pub interface: (u32, String),
}

impl Target {
    /// Whether `other` is reached over the same interface by the same next hop: what was proven of one holds of both.
    pub(crate) fn is_same_link(&self, other: &Self) -> bool {
        (self.next_hop, &self.interface) == (other.next_hop, &other.interface)
    }
}

/// What is to be probed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Targets {
    /// This node's overlay address of each family.
    pub own: BTreeMap<Family, IpAddr>,
    /// The eligible peers.
    pub peers: BTreeMap<PathId, Target>,
}
