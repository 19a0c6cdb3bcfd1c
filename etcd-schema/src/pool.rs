//! The subnets of one family: configuration, count and numbering.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    address::{ordinary_v4, ordinary_v6},
    fields::{Expected, Fields, Writer},
    violation::Report,
};

/// The addresses of one family that nodes draw subnets from.
///
/// `network` has no host bits, `subnet_len` leaves room for at least four subnets, and `min <= max` are subnets of
/// `subnet_len` inside `network`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool<N> {
    /// The whole cluster network of this family.
    pub network: N,
    /// Length of a node's subnet.
    pub subnet_len: u8,
    /// First subnet that may be drawn, of `subnet_len`.
    pub min: N,
    /// Last subnet that may be drawn, of `subnet_len`.
    pub max: N,
}

/// The fields of one family's pool in `config`.
pub(crate) struct PoolFields {
    network: &'static str,
    subnet_len: &'static str,
    min: &'static str,
    max: &'static str,
    /// `SubnetLen` where none is given and the network has room for four of them.
    default_len: u8,
    /// Longest `SubnetLen`: room for the overlay address, a bridge and a pod.
    max_len: u8,
    /// The expected form of `network`.
    what: &'static str,
}

pub(crate) const V4: PoolFields = PoolFields {
    network: "Network",
    subnet_len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    default_len: 24,
    max_len: 30,
    what: "write the cluster network, such as \"10.244.0.0/16\", or \"EnableIPv4\": false",
};

pub(crate) const V6: PoolFields = PoolFields {
    network: "IPv6Network",
    subnet_len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    default_len: 64,
    max_len: 126,
    what: "write the cluster network, such as \"fd42:244::/48\", or leave EnableIPv6 out",
};

/// An entry of `Networks`.
pub(crate) const V4_ENTRY: PoolFields = PoolFields {
    network: "cidr",
    what: "write a cluster's network, such as \"10.42.0.0/16\" or \"fd42:42::/48\"",
    ..V4
};

/// The same with an IPv6 network.
pub(crate) const V6_ENTRY: PoolFields = PoolFields {
    network: V4_ENTRY.network,
    subnet_len: V4_ENTRY.subnet_len,
    min: V4_ENTRY.min,
    max: V4_ENTRY.max,
    what: V4_ENTRY.what,
    ..V6
};

/// Subnets in a network that is worth using: the first is not drawn, and one for each of two nodes must be left.
const LOG2_FEWEST_SUBNETS: u8 = 2;

/// A prefix of one family, as numbers.
pub(crate) trait Prefix: Copy + PartialEq + std::fmt::Display {
    const BITS: u8;
    fn new(address: u128, len: u8) -> Option<Self>;
    fn address(&self) -> u128;
    fn len(&self) -> u8;
    /// The address in `text`, as a number.
    fn read_address(text: &str) -> Option<u128>;
    fn write_address(address: u128) -> String;
    fn read(text: &str) -> Option<Self>;
    fn ordinary(&self) -> Result<(), Expected>;
}

impl Prefix for Ipv4Net {
    const BITS: u8 = 32;

    fn new(address: u128, len: u8) -> Option<Self> {
        let address = u32::try_from(address).ok()?;
        Self::new(Ipv4Addr::from_bits(address), len).ok()
    }

    fn address(&self) -> u128 {
        self.addr().to_bits().into()
    }

    fn len(&self) -> u8 {
        self.prefix_len()
    }

    fn read_address(text: &str) -> Option<u128> {
        text.parse::<Ipv4Addr>().ok().map(|a| a.to_bits().into())
    }

    fn write_address(address: u128) -> String {
        u32::try_from(address).map(|a| Ipv4Addr::from_bits(a).to_string()).unwrap_or_default()
    }

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn ordinary(&self) -> Result<(), Expected> {
        ordinary_v4(self)
    }
}

impl Prefix for Ipv6Net {
    const BITS: u8 = 128;

    fn new(address: u128, len: u8) -> Option<Self> {
        Self::new(Ipv6Addr::from_bits(address), len).ok()
    }

    fn address(&self) -> u128 {
        self.addr().to_bits()
    }

    fn len(&self) -> u8 {
        self.prefix_len()
    }

    fn read_address(text: &str) -> Option<u128> {
        text.parse::<Ipv6Addr>().ok().map(Ipv6Addr::to_bits)
    }

    fn write_address(address: u128) -> String {
        Ipv6Addr::from_bits(address).to_string()
    }

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn ordinary(&self) -> Result<(), Expected> {
        ordinary_v6(self)
    }
}

macro_rules! pool_methods {
    ($net:ty) => {
        impl Pool<$net> {
            /// How many subnets may be drawn; `u128` holds them all (fewer than 2^126).
            #[must_use]
            pub fn subnet_count(&self) -> u128 {
                count(self)
            }

            /// The subnet with number `index` from 0 to [`Self::subnet_count`] - 1, in the order of addresses.
            #[must_use]
            pub fn subnet(&self, index: u128) -> Option<$net> {
                nth(self, index)
            }

            /// The number of `subnet`; `None` when it may not be drawn.
            #[must_use]
            pub fn index_of(&self, subnet: &$net) -> Option<u128> {
                number(self, subnet)
            }

            /// Whether `subnet` may be drawn: of the pool's length, without host bits, from `min` to `max`.
            #[must_use]
            pub fn contains(&self, subnet: &$net) -> bool {
                number(self, subnet).is_some()
            }
        }
    };
}

pool_methods!(Ipv4Net);
pool_methods!(Ipv6Net);

/// The pool that `fields` describe, with flannel's defaults; `None` when something was noted.
pub(crate) fn read_pool<N: Prefix>(names: &PoolFields, fields: &mut Fields, report: &mut Report) -> Option<Pool<N>> {
    let network = fields.required(report, names.network, names.what, network::<N>);
    let given = [names.subnet_len, names.min, names.max].map(|name| fields.has(name));
    let subnet_len = fields.integer(report, names.subnet_len, 1..=names.max_len, "");
    let min = fields.parsed(report, names.min, address::<N>);
    let max = fields.parsed(report, names.max, address::<N>);
    // Invalid fields are noted; defaults in their place would only cause misleading further notes.
    if given != [subnet_len.is_some(), min.is_some(), max.is_some()] {
        return None;
    }
    let network = network?;

    let longest_network = names.max_len - LOG2_FEWEST_SUBNETS;
    if network.len() > longest_network {
        report.add(
            fields.path(names.network),
            format!("\"{network}\""),
            format!("must have room for at least four subnets: /{longest_network} or larger"),
        );
        return None;
    }
    let shortest = network.len() + LOG2_FEWEST_SUBNETS;
    let subnet_len = subnet_len.unwrap_or_else(|| names.default_len.max(shortest));
    if subnet_len < shortest {
        report.add(
            fields.path(names.subnet_len),
            subnet_len.to_string(),
            format!(
                "{} {network} must have room for at least four subnets: {shortest} to {}",
                names.network, names.max_len
            ),
        );
        return None;
    }

    let size = 1_u128 << (N::BITS - subnet_len);
    let last = network.address() + ((1_u128 << (subnet_len - network.len())) - 1) * size;
    let mut bound = |name: &str, given: Option<u128>, default: u128| {
        let address = given.unwrap_or(default);
        if !(network.address()..=last).contains(&(address & !(size - 1))) {
            report.add(
                fields.path(name),
                format!("\"{}\"", N::write_address(address)),
                format!("must be inside {} {network}", names.network),
            );
            return None;
        }
        if address & (size - 1) != 0 {
            report.add(
                fields.path(name),
                format!("\"{}\"", N::write_address(address)),
                format!(
                    "must be the first address of a /{subnet_len}, such as {}",
                    N::write_address(address & !(size - 1))
                ),
            );
            return None;
        }
        N::new(address, subnet_len)
    };
    // Flannel leaves the first subnet out, so that no node has the network's own address.
    let min = bound(names.min, min, network.address() + size);
    let max = bound(names.max, max, last);
    let (min, max) = (min?, max?);
    if min.address() > max.address() {
        report.add(
            fields.path(names.min),
            format!("\"{}\"", N::write_address(min.address())),
            format!("must not be above {} {}", names.max, N::write_address(max.address())),
        );
        return None;
    }
    Some(Pool { network, subnet_len, min, max })
}

/// Writes the pool as `config` has it.
pub(crate) fn write_pool<N: Prefix>(pool: &Pool<N>, names: &PoolFields, out: &mut Writer) {
    out.put(names.network, pool.network.to_string())
        .put(names.subnet_len, pool.subnet_len)
        .put(names.min, N::write_address(pool.min.address()))
        .put(names.max, N::write_address(pool.max.address()));
}

fn count<N: Prefix>(pool: &Pool<N>) -> u128 {
    ((pool.max.address().saturating_sub(pool.min.address())) >> host_bits(pool)).saturating_add(1)
}

fn nth<N: Prefix>(pool: &Pool<N>, index: u128) -> Option<N> {
    if index >= count(pool) {
        return None;
    }
    N::new(pool.min.address() + (index << host_bits(pool)), pool.subnet_len)
}

fn number<N: Prefix>(pool: &Pool<N>, subnet: &N) -> Option<u128> {
    let offset = subnet.address().checked_sub(pool.min.address())?;
    let index = offset >> host_bits(pool);
    (nth(pool, index) == Some(*subnet)).then_some(index)
}

fn host_bits<N: Prefix>(pool: &Pool<N>) -> u8 {
    N::BITS.saturating_sub(pool.subnet_len).min(127)
}

fn network<N: Prefix>(text: &str) -> Result<N, Expected> {
    let form = if N::BITS == 32 {
        "must be an IPv4 prefix such as 10.244.0.0/16"
    } else {
        "must be an IPv6 prefix such as fd42:244::/48"
    };
    let net = N::read(text).ok_or(form)?;
    if net.len() == 0 {
        return Err("must not be the default route: write the cluster's own network".into());
    }
    let mask = u128::MAX << (N::BITS - net.len());
    if net.address() & !mask != 0 {
        let trunc = N::write_address(net.address() & mask);
        return Err(format!("must have no bits beyond its prefix length: write {trunc}/{}", net.len()).into());
    }
    net.ordinary()?;
    Ok(net)
}

fn address<N: Prefix>(text: &str) -> Result<u128, Expected> {
    N::read_address(text).ok_or_else(|| {
        if N::BITS == 32 {
            "must be an IPv4 address without prefix length".into()
        } else {
            "must be an IPv6 address without prefix length".into()
        }
    })
}
