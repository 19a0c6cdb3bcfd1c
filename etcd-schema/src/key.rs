//! Keys relative to the prefix: `config`, `subnets/10.244.3.0-24`, `nodes/ID` …

use std::{fmt, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    Cluster, Key, KubernetesKey, NodeId,
    address::{ordinary_v4, ordinary_v6},
    fields::Expected,
    violation::quoted,
};

/// Longest key that is read, in bytes without the prefix.
const MAX_KEY_BYTES: usize = 1024;

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
        /// The violation and the rule.
        reason: String,
    },
}

impl Key {
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
        let parts = Parts { key: relative, rest: relative };
        if let Some(key) = Self::read(parts)? {
            return Ok(key);
        }
        let (cluster, parts) = match parts.at(Self::CLUSTERS) {
            Some(parts) => {
                let (cluster, rest) = parts.rest.split_once('/').unwrap_or((parts.rest, ""));
                (parts.read("CLUSTER", cluster, Cluster::read)?, Parts { rest, ..parts })
            }
            None => (Cluster::default(), parts),
        };
        match KubernetesKey::read(parts)? {
            Some(key) if !cluster.is_flat() || key.kind().is_flat => Ok(Self::Kubernetes(cluster, key)),
            _ => Err(parts.unknown()),
        }
    }

    /// The directory of one node's attachments, `endpoints/ID/`.
    #[must_use]
    pub fn endpoints_of(node: &NodeId) -> String {
        format!("endpoints/{node}/")
    }
}

/// The key relative to the prefix; [`Key::parse`] reads it back.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

/// The part below `k8s/CLUSTER/`, or the flat key.
impl fmt::Display for KubernetesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
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

    pub(crate) fn read(text: &str) -> Result<Self, Expected> {
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

/// A key, and the part after its directory.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'k> {
    key: &'k str,
    rest: &'k str,
}

impl<'k> Parts<'k> {
    /// The part after `place`, a directory or an entire key, if the rest begins with it.
    pub(crate) fn at(self, place: &str) -> Option<Self> {
        let rest = self.rest.strip_prefix(place)?;
        (place.ends_with('/') || rest.is_empty()).then_some(Self { rest, ..self })
    }

    pub(crate) fn split<const N: usize>(&self, names: [&str; N]) -> Result<[&'k str; N], KeyError> {
        let parts: Vec<&str> = self.rest.splitn(N + 1, '/').collect();
        parts.try_into().map_err(|_| {
            let directory = &self.key[..self.key.len() - self.rest.len()];
            self.malformed(format!("must be {directory}{}", names.join("/")))
        })
    }

    pub(crate) fn read<T>(
        &self,
        name: &str,
        part: &str,
        read: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> Result<T, KeyError> {
        read(part).map_err(|expected| self.malformed(format!("{name} is {}: {expected}", quoted(part))))
    }

    /// The rest begins with no directory that is known.
    fn unknown(&self) -> KeyError {
        let directory = self.rest.find('/').map(|at| &self.key[..=self.key.len() - self.rest.len() + at]);
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

/// Checks the canonical spelling: two spellings of one subnet could be leased to two nodes.
fn canonical(text: &str, net: &IpNet) -> Result<(), Expected> {
    let written = format!("{}-{}", net.addr(), net.prefix_len());
    if written == text { Ok(()) } else { Err(format!("must be canonical, without host bits: write {written}").into()) }
}

/// How `key` could begin.
fn known(key: &str) -> String {
    if key.starts_with(Key::CLUSTERS) {
        let places: Vec<&str> = KubernetesKey::KINDS.iter().map(|kind| kind.place).collect();
        return format!("below {}CLUSTER/ it must be or begin with {}", Key::CLUSTERS, places.join(", "));
    }
    let directories: Vec<&str> = Key::directories().collect();
    format!("without the prefix it must be {} or begin with {}", Key::CONFIG, directories.join(", "))
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
