//! The resolved mesh at one etcd revision: the owner of each prefix, and its WireGuard keys.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use cow_map::CowMap;
use etcd_schema::{Key, NetworkConfig, NodeId, PeerName, PresharedKey, PublicKey, SiteName, SubnetKey, Vtep};
use ipnet::IpNet;

use crate::{
    address::{overlay_addresses, prefixes},
    problem::Problem,
};

/// An owner of prefixes of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerId {
    /// A node, by its id.
    Node(NodeId),
    /// A lease without `Node`, as flannel writes it.
    Lease(SubnetKey),
    /// An external peer, by its name.
    Outside(PeerName),
}

impl PeerId {
    /// The owner that displays as `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match Key::parse(name).ok()? {
            Key::Node(id) => Some(Self::Node(id)),
            Key::Subnet(subnet) => Some(Self::Lease(subnet)),
            Key::Peer(name) => Some(Self::Outside(name)),
            _ => None,
        }
    }
}

impl std::fmt::Display for PeerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(id) => write!(f, "nodes/{id}"),
            Self::Lease(subnet) => write!(f, "subnets/{subnet}"),
            Self::Outside(name) => write!(f, "peers/{name}"),
        }
    }
}

/// Another node, or an owner that has no node record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePeer {
    /// For people, and unique: the node's name, `NAME (ID)` where an older node has that name, or the key of a lease
    /// without node.
    pub name: String,
    /// The site, if it names one.
    pub site: Option<SiteName>,
    /// Current key, then the next one; none for a host that speaks no WireGuard.
    pub keys: Vec<PublicKey>,
    /// UDP port of its tunnel; probes go to the next one. 0 when not known.
    pub listen_port: u16,
    /// Where its tunnel may be reached, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Its underlay interface addresses with prefix length, as far as it holds them at its site.
    pub addresses: Vec<IpNet>,
    /// Its subnets that hold.
    pub subnets: Vec<SubnetKey>,
    /// Its ends of VXLAN tunnels, at most one a family.
    pub vteps: Vec<Vtep>,
    /// Why it cannot be spoken to.
    pub unusable: Option<String>,
    /// Version of its daemon.
    pub version: String,
}

impl NodePeer {
    /// Its prefixes.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.subnets.iter().flat_map(prefixes)
    }

    /// Its overlay addresses, of its first subnet of each family.
    pub fn overlay(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.subnets.iter().flat_map(overlay_addresses)
    }
}

/// An outside WireGuard peer.
#[derive(Debug, Clone, PartialEq)]
pub struct ExternalPeer {
    /// Its key.
    pub public_key: PublicKey,
    /// The optional symmetric key.
    pub preshared_key: Option<PresharedKey>,
    /// Its prefixes.
    pub allowed_ips: Vec<IpNet>,
    /// Where to call it.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives.
    pub persistent_keepalive: Option<u16>,
    /// Its site.
    pub site: Option<SiteName>,
}

/// This node's own record under `nodes/`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum OwnRecord {
    /// The node has no record.
    #[default]
    Missing,
    /// The other nodes accept it.
    Holds {
        /// This node's name in the mesh: see [`NodePeer::name`].
        name: String,
    },
    /// The record exists, but other nodes refuse it.
    Refused {
        /// Why.
        cause: String,
    },
}

/// The mesh at one revision. A prefix belongs to at most one owner; so does a key. Made by
/// [`TopologyResolver`](super::resolver::TopologyResolver); a copy costs little, and so does the difference of two.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Topology {
    /// The etcd revision.
    pub revision: i64,
    /// The network, when there is a valid one.
    pub network: Option<NetworkConfig>,
    /// This node's own record.
    pub own_record: OwnRecord,
    /// This node's own subnets that hold.
    pub own_subnets: Vec<SubnetKey>,
    /// The other owners below `subnets/`.
    pub members: CowMap<PeerId, Arc<NodePeer>>,
    /// External peers that hold.
    pub outside: CowMap<PeerName, Arc<ExternalPeer>>,
    /// Records that do not hold, each with its reason; sorted.
    pub problems: Arc<Vec<Problem>>,
}

/// The networks of a configuration, IPv4 first.
pub fn networks(config: Option<&NetworkConfig>) -> impl Iterator<Item = IpNet> {
    config.into_iter().flat_map(NetworkConfig::networks)
}

impl Topology {
    /// The networks of the mesh, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> + '_ {
        networks(self.network.as_ref())
    }

    /// This node's own prefixes.
    pub fn own_prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.own_subnets.iter().flat_map(prefixes)
    }

    /// The subnets for addresses of new attachments: the one in use, or else all. This node's other subnets serve
    /// existing attachments only.
    #[must_use]
    pub fn subnets_of_new(&self, in_use: Option<SubnetKey>) -> Vec<SubnetKey> {
        match in_use.filter(|in_use| self.own_subnets.contains(in_use)) {
            Some(in_use) => vec![in_use],
            None => self.own_subnets.clone(),
        }
    }

    /// This node's overlay addresses: of its first subnet of each family.
    #[must_use]
    pub fn own_overlay(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in self.own_subnets.iter().flat_map(overlay_addresses) {
            if !addresses.iter().any(|have| have.is_ipv4() == address.is_ipv4()) {
                addresses.push(address);
            }
        }
        addresses
    }
}
