//! Keys relative to the prefix: `config`, `subnets/10.244.3.0-24`, `nodes/ID` …

use std::{fmt, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    Cluster, ContainerId, InterfaceName, KubernetesName, NodeId, PeerName,
    address::{ordinary_v4, ordinary_v6},
    fields::Expected,
    violation::quoted,
};

/// Longest key that is read, in bytes without the prefix.
const MAX_KEY_BYTES: usize = 1024;

/// What a key below the prefix names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Key {
    /// `config`
    Config,
    /// `subnets/10.244.3.0-24[&fd42:244:0:3::-64]` or `subnets/fd42:244:0:3::-64`
    Subnet(SubnetKey),
    /// `nodes/ID`
    Node(NodeId),
    /// `removed/ID`
    Removed(NodeId),
    /// `alive/ID`
    Alive(NodeId),
    /// `peers/NAME`
    Peer(PeerName),
    /// `endpoints/ID/CONTAINERID/IFNAME`
    Endpoint(NodeId, ContainerId, InterfaceName),
    /// `k8s/CLUSTER/…`, and the flat keys `namespaces/…`, `pods/…`, `networkpolicies/…`, `clusternetworkpolicies/…`
    Kubernetes(Cluster, KubernetesKey),
}

/// What a key of a Kubernetes cluster names: the part below `k8s/CLUSTER/`, or a flat key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum KubernetesKey {
    /// `namespaces/NS`
    Namespace(KubernetesName),
    /// `pods/NS/NAME`
    Pod(KubernetesName, KubernetesName),
    /// `networkpolicies/NS/NAME`
    NetworkPolicy(KubernetesName, KubernetesName),
    /// `clusternetworkpolicies/NAME`
    ClusterNetworkPolicy(KubernetesName),
    /// `nodes/NAME`; never flat.
    Node(KubernetesName),
    /// `leader`: which program copies the objects; never flat.
    Leader,
    /// `state`: how far the copy is; never flat.
    State,
}

/// The prefixes of one lease: IPv4, IPv6 or both; canonical (no host bits).
///
/// As text `10.244.3.0-24`, `fd42:244:0:3::-64` or `10.244.3.0-24&fd42:244:0:3::-64`, as Flannel writes it (which has
/// no form for IPv6 alone).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetKey {
    /// The IPv4 subnet.
    pub v4: Option<Ipv4Net>,
    /// The IPv6 subnet.
    pub v6: Option<Ipv6Net>,
}

/// Why a key is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The first path element is not known, or the one after `k8s/CLUSTER/`.
    #[error("unknown key {key:?}: {}", known(key))]
    Unknown {
        /// The key, shortened.
        key: String,
        /// The directory that is not known, with the slash at its end; `None`: the key is in none.
        directory: Option<Box<str>>,
    },
    /// The key is of a known kind, and a part of it is wrong.
    #[error("key {key:?}: {reason}")]
    Malformed {
        /// The key, shortened.
        key: String,
        /// What is wrong and what holds.
        reason: String,
    },
}

impl Key {
    /// The network configuration, the one key that is no directory.
    pub const CONFIG: &'static str = "config";
    /// Where subnet leases and reservations are.
    pub const SUBNETS: &'static str = "subnets/";
    /// Where node records are.
    pub const NODES: &'static str = "nodes/";
    /// Where nodes removed for good are.
    pub(crate) const REMOVED: &'static str = "removed/";
    /// Where running daemons are.
    pub const ALIVE: &'static str = "alive/";
    /// Where outside peers are.
    pub const PEERS: &'static str = "peers/";
    /// Where Namespace objects are, flat or below `k8s/CLUSTER/`.
    pub const NAMESPACES: &'static str = "namespaces/";
    /// Where Pod objects are, by namespace; likewise.
    pub const PODS: &'static str = "pods/";
    /// Where NetworkPolicy objects are, by namespace; likewise.
    pub const NETWORK_POLICIES: &'static str = "networkpolicies/";
    /// Where ClusterNetworkPolicy objects are; likewise.
    pub const CLUSTER_NETWORK_POLICIES: &'static str = "clusternetworkpolicies/";
    /// Where attachments are, by node.
    pub(crate) const ENDPOINTS: &'static str = "endpoints/";
    /// Where the objects of Kubernetes clusters are, by cluster.
    pub const CLUSTERS: &'static str = "k8s/";
    /// Every directory below the prefix.
    pub const DIRECTORIES: [&'static str; 11] = [
        Self::SUBNETS,
        Self::NODES,
        Self::REMOVED,
        Self::ALIVE,
        Self::PEERS,
        Self::NAMESPACES,
        Self::PODS,
        Self::NETWORK_POLICIES,
        Self::CLUSTER_NETWORK_POLICIES,
        Self::ENDPOINTS,
        Self::CLUSTERS,
    ];

    /// The key that `relative` (without prefix and its slash) names.
    ///
    /// # Errors
    /// When it names none.
    pub fn parse(relative: &str) -> Result<Self, KeyError> {
        if relative.len() > MAX_KEY_BYTES {
            return Err(KeyError::Malformed {
                key: unquoted(relative),
                reason: format!("has {} bytes, at most {MAX_KEY_BYTES} are read", relative.len()),
            });
        }
        if relative == Self::CONFIG {
            return Ok(Self::Config);
        }
        let parts = Parts { key: relative, rest: relative };
        let (directory, parts) = parts.enter().ok_or_else(|| parts.unknown(None))?;
        match directory {
            Self::SUBNETS => SubnetKey::read(parts.rest).map(Self::Subnet).map_err(|reason| parts.malformed(reason)),
            Self::NODES => Ok(Self::Node(parts.only("ID", NodeId::read)?)),
            Self::REMOVED => Ok(Self::Removed(parts.only("ID", NodeId::read)?)),
            Self::ALIVE => Ok(Self::Alive(parts.only("ID", NodeId::read)?)),
            Self::PEERS => Ok(Self::Peer(parts.only("NAME", PeerName::read)?)),
            Self::ENDPOINTS => {
                let [id, container, interface] = parts.split(["ID", "CONTAINERID", "IFNAME"])?;
                Ok(Self::Endpoint(
                    parts.read("ID", id, NodeId::read)?,
                    parts.read("CONTAINERID", container, ContainerId::read)?,
                    parts.read("IFNAME", interface, InterfaceName::read)?,
                ))
            }
            Self::CLUSTERS => {
                let (cluster, below) = parts.rest.split_once('/').unwrap_or((parts.rest, ""));
                let cluster = parts.read("CLUSTER", cluster, Cluster::read)?;
                Ok(Self::Kubernetes(cluster, KubernetesKey::read(&Parts { rest: below, ..parts })?))
            }
            _ => Ok(Self::Kubernetes(Cluster::default(), KubernetesKey::read_object(directory, &parts)?)),
        }
    }

    /// The directory of one node's attachments, `endpoints/ID/`.
    #[must_use]
    pub fn endpoints_of(node: &NodeId) -> String {
        format!("{}{node}/", Self::ENDPOINTS)
    }
}

/// The key relative to the prefix; [`Key::parse`] reads it back.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config => f.write_str(Self::CONFIG),
            Self::Subnet(key) => write!(f, "{}{key}", Self::SUBNETS),
            Self::Node(id) => write!(f, "{}{id}", Self::NODES),
            Self::Removed(id) => write!(f, "{}{id}", Self::REMOVED),
            Self::Alive(id) => write!(f, "{}{id}", Self::ALIVE),
            Self::Peer(name) => write!(f, "{}{name}", Self::PEERS),
            Self::Endpoint(id, container, interface) => {
                write!(f, "{}{id}/{container}/{interface}", Self::ENDPOINTS)
            }
            Self::Kubernetes(cluster, key) if cluster.is_flat() => key.fmt(f),
            Self::Kubernetes(cluster, key) => write!(f, "{}{cluster}/{key}", Self::CLUSTERS),
        }
    }
}

impl KubernetesKey {
    const LEADER: &'static str = "leader";
    const STATE: &'static str = "state";

    /// What stands below `k8s/CLUSTER/`.
    fn read(parts: &Parts<'_>) -> Result<Self, KeyError> {
        match (parts.rest, parts.enter()) {
            (Self::LEADER, _) => Ok(Self::Leader),
            (Self::STATE, _) => Ok(Self::State),
            (_, Some((Key::NODES, parts))) => Ok(Self::Node(parts.only("NAME", KubernetesName::read)?)),
            (_, Some((directory, parts))) => Self::read_object(directory, &parts),
            (_, None) => Err(parts.unknown(None)),
        }
    }

    /// The object of a kind that flat keys have, too.
    fn read_object(directory: &str, parts: &Parts<'_>) -> Result<Self, KeyError> {
        let in_namespace = || {
            let [ns, name] = parts.split(["NS", "NAME"])?;
            let ns = parts.read("NS", ns, KubernetesName::read_label)?;
            Ok((ns, parts.read("NAME", name, KubernetesName::read)?))
        };
        Ok(match directory {
            Key::NAMESPACES => Self::Namespace(parts.only("NS", KubernetesName::read_label)?),
            Key::PODS => in_namespace().map(|(ns, name)| Self::Pod(ns, name))?,
            Key::NETWORK_POLICIES => in_namespace().map(|(ns, name)| Self::NetworkPolicy(ns, name))?,
            Key::CLUSTER_NETWORK_POLICIES => Self::ClusterNetworkPolicy(parts.only("NAME", KubernetesName::read)?),
            _ => return Err(parts.unknown(Some(parts.directory()))),
        })
    }
}

/// The part below `k8s/CLUSTER/`, or the flat key.
impl fmt::Display for KubernetesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(name) => write!(f, "{}{name}", Key::NAMESPACES),
            Self::Pod(ns, name) => write!(f, "{}{ns}/{name}", Key::PODS),
            Self::NetworkPolicy(ns, name) => write!(f, "{}{ns}/{name}", Key::NETWORK_POLICIES),
            Self::ClusterNetworkPolicy(name) => write!(f, "{}{name}", Key::CLUSTER_NETWORK_POLICIES),
            Self::Node(name) => write!(f, "{}{name}", Key::NODES),
            Self::Leader => f.write_str(Self::LEADER),
            Self::State => f.write_str(Self::STATE),
        }
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(relative: &str) -> Result<Self, KeyError> {
        Self::parse(relative)
    }
}

impl SubnetKey {
    /// Longest IPv4 subnet: room for the overlay address, a bridge and a pod.
    pub(crate) const MAX_V4_LEN: u8 = 30;
    /// Longest IPv6 subnet.
    pub(crate) const MAX_V6_LEN: u8 = 126;

    /// The prefixes, IPv4 first.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Whether the two share an address, in either family.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let v4 = self.v4.zip(other.v4);
        let v6 = self.v6.zip(other.v6);
        v4.is_some_and(|(a, b)| a.contains(&b) || b.contains(&a))
            || v6.is_some_and(|(a, b)| a.contains(&b) || b.contains(&a))
    }

    fn read(text: &str) -> Result<Self, Expected> {
        let (first, second) = match text.split_once('&') {
            Some((first, second)) => (first, Some(second)),
            None => (text, None),
        };
        if second.is_none() && first.contains(':') {
            return Ok(Self { v4: None, v6: Some(v6(first)?) });
        }
        Ok(Self { v4: Some(v4(first)?), v6: second.map(v6).transpose()? })
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, prefix) in self.prefixes().enumerate() {
            if i > 0 {
                f.write_str("&")?;
            }
            write!(f, "{}-{}", prefix.addr(), prefix.prefix_len())?;
        }
        Ok(())
    }
}

impl FromStr for SubnetKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::read(text).map_err(|reason| KeyError::Malformed { key: unquoted(text), reason: reason.into_owned() })
    }
}

impl Serialize for SubnetKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SubnetKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What follows the directory of a key.
#[derive(Clone, Copy)]
struct Parts<'k> {
    key: &'k str,
    rest: &'k str,
}

impl<'k> Parts<'k> {
    /// The next directory, with its slash, and what follows it.
    fn enter(self) -> Option<(&'k str, Self)> {
        let (directory, rest) = self.rest.split_at(self.rest.find('/')? + 1);
        Some((directory, Self { rest, ..self }))
    }

    /// All directories before the rest.
    fn directory(&self) -> &'k str {
        &self.key[..self.key.len() - self.rest.len()]
    }

    fn split<const N: usize>(&self, names: [&str; N]) -> Result<[&'k str; N], KeyError> {
        let parts: Vec<&str> = self.rest.splitn(N + 1, '/').collect();
        parts.try_into().map_err(|_| self.malformed(format!("must be {}{}", self.directory(), names.join("/"))))
    }

    fn only<T>(&self, name: &str, read: impl FnOnce(&str) -> Result<T, Expected>) -> Result<T, KeyError> {
        let [part] = self.split([name])?;
        self.read(name, part, read)
    }

    fn read<T>(&self, name: &str, part: &str, read: impl FnOnce(&str) -> Result<T, Expected>) -> Result<T, KeyError> {
        read(part).map_err(|expected| self.malformed(format!("{name} is {}: {expected}", quoted(part))))
    }

    fn unknown(&self, directory: Option<&str>) -> KeyError {
        KeyError::Unknown { key: unquoted(self.key), directory: directory.map(Into::into) }
    }

    fn malformed(&self, reason: impl Into<String>) -> KeyError {
        KeyError::Malformed { key: unquoted(self.key), reason: reason.into() }
    }
}

fn v4(text: &str) -> Result<Ipv4Net, Expected> {
    const FORM: &str = "must be an IPv4 subnet such as 10.244.3.0-24";
    let net: Ipv4Net = text.replacen('-', "/", 1).parse().map_err(|_| FORM)?;
    if !(1..=SubnetKey::MAX_V4_LEN).contains(&net.prefix_len()) {
        return Err(format!("the length {} must be 1 to {}", net.prefix_len(), SubnetKey::MAX_V4_LEN).into());
    }
    canonical(text, &net.trunc().into())?;
    ordinary_v4(&net)?;
    Ok(net)
}

fn v6(text: &str) -> Result<Ipv6Net, Expected> {
    const FORM: &str = "must be an IPv6 subnet such as fd42:244:0:3::-64";
    let net: Ipv6Net = text.replacen('-', "/", 1).parse().map_err(|_| FORM)?;
    if !(1..=SubnetKey::MAX_V6_LEN).contains(&net.prefix_len()) {
        return Err(format!("the length {} must be 1 to {}", net.prefix_len(), SubnetKey::MAX_V6_LEN).into());
    }
    canonical(text, &net.trunc().into())?;
    ordinary_v6(&net)?;
    Ok(net)
}

/// One subnet has one key: two spellings could be leased to two nodes.
fn canonical(text: &str, net: &IpNet) -> Result<(), Expected> {
    let written = format!("{}-{}", net.addr(), net.prefix_len());
    if written == text { Ok(()) } else { Err(format!("must be canonical, without host bits: write {written}").into()) }
}

/// How `key` could begin.
fn known(key: &str) -> String {
    if key.starts_with(Key::CLUSTERS) {
        let directories =
            [Key::NAMESPACES, Key::PODS, Key::NETWORK_POLICIES, Key::CLUSTER_NETWORK_POLICIES, Key::NODES];
        return format!(
            "below {}CLUSTER/ it must be {} or {}, or begin with {}",
            Key::CLUSTERS,
            KubernetesKey::LEADER,
            KubernetesKey::STATE,
            directories.join(", ")
        );
    }
    format!("without the prefix it must be {} or begin with {}", Key::CONFIG, Key::DIRECTORIES.join(", "))
}

/// Shortened like [`quoted`]; `Debug` of the error adds the quotes.
fn unquoted(text: &str) -> String {
    const MOST: usize = 96;
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
