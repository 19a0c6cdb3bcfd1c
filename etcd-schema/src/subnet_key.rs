//! The prefixes of a subnet, as `subnets/…` names them.

use std::{fmt, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    address::{ordinary_v4, ordinary_v6},
    fields::Expected,
    key_parts::{KeyError, unquoted},
};

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
