//! Selects a free subnet: uniformly from all free ones, without listing them.
//!
//! A pool is a sequence of subnets of one length; taken keys (of any length and owner) cover intervals of it. Merging
//! the intervals yields the number of free subnets and the k-th free one, so a pool of 2^60 subnets costs as much as
//! one of 256. Pure: the randomness is an argument.

use std::fmt;

use etcd_schema::{ClusterNetworks, Pool, SubnetKey};
use ipnet::{Ipv4Net, Ipv6Net};
use rand::Rng;

/// No subnet is free in a family that the cluster has a network of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all {total} {family} subnets of the pool are taken")]
pub struct PoolExhausted {
    /// The family that has none left.
    pub family: PoolFamily,
    /// How many subnets its pool has.
    pub total: u128,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PoolFamily {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl fmt::Display for PoolFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How full the pool is, the scarcer family's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Subnets in the pool.
    pub total: u128,
    /// Of those, overlapped by a key.
    pub used: u128,
}

/// A subnet that overlaps none of `taken`, uniformly from all that are free, in every family of `networks`.
///
/// # Errors
/// When a family has none left.
pub fn choose<'a, R: Rng + ?Sized>(
    networks: &ClusterNetworks,
    taken: impl IntoIterator<Item = &'a SubnetKey> + Clone,
    rng: &mut R,
) -> Result<SubnetKey, PoolExhausted> {
    let v4 = networks
        .ipv4
        .as_ref()
        .map(|pool| {
            let row = Row::v4(pool);
            let index = row.draw(taken.clone().into_iter().filter_map(|key| key.v4).map(v4_range), rng);
            index.map_err(|total| PoolExhausted { family: PoolFamily::V4, total }).map(|index| row.v4_at(index))
        })
        .transpose()?;
    let v6 = networks
        .ipv6
        .as_ref()
        .map(|pool| {
            let row = Row::v6(pool);
            let index = row.draw(taken.into_iter().filter_map(|key| key.v6).map(v6_range), rng);
            index.map_err(|total| PoolExhausted { family: PoolFamily::V6, total }).map(|index| row.v6_at(index))
        })
        .transpose()?;
    Ok(SubnetKey { v4: v4.flatten(), v6: v6.flatten() })
}

/// Whether `key` could come out of [`choose`]: its families, lengths and place are those of `networks`, and it
/// overlaps none of `taken`.
#[must_use]
pub fn is_free<'a>(
    networks: &ClusterNetworks,
    key: &SubnetKey,
    taken: impl IntoIterator<Item = &'a SubnetKey>,
) -> bool {
    fits(networks, key) && !taken.into_iter().any(|other| overlap(key, other))
}

/// Whether `key` has the families, lengths and place that `networks` deal out.
#[must_use]
pub fn fits(networks: &ClusterNetworks, key: &SubnetKey) -> bool {
    let v4 = match (&networks.ipv4, key.v4) {
        (Some(pool), Some(net)) => net.prefix_len() == pool.subnet_len && Row::v4(pool).contains(v4_range(net)),
        (None, None) => true,
        _ => false,
    };
    let v6 = match (&networks.ipv6, key.v6) {
        (Some(pool), Some(net)) => net.prefix_len() == pool.subnet_len && Row::v6(pool).contains(v6_range(net)),
        (None, None) => true,
        _ => false,
    };
    v4 && v6
}

/// Whether the two share an address in either family.
#[must_use]
pub fn overlap(a: &SubnetKey, b: &SubnetKey) -> bool {
    let v4 = a.v4.zip(b.v4).is_some_and(|(a, b)| a.contains(&b) || b.contains(&a));
    let v6 = a.v6.zip(b.v6).is_some_and(|(a, b)| a.contains(&b) || b.contains(&a));
    v4 || v6
}

/// How many subnets the pool has and how many of them are overlapped, of the family with fewer left.
#[must_use]
pub fn usage<'a>(networks: &ClusterNetworks, taken: impl IntoIterator<Item = &'a SubnetKey> + Clone) -> Usage {
    let of = |row: Row, ranges: Vec<(u128, u128)>| {
        let used = row.covered(ranges.into_iter()).iter().map(|(low, high)| high - low + 1).sum();
        Usage { total: row.count, used }
    };
    let v4 = networks
        .ipv4
        .as_ref()
        .map(|pool| of(Row::v4(pool), taken.clone().into_iter().filter_map(|key| key.v4).map(v4_range).collect()));
    let v6 = networks
        .ipv6
        .as_ref()
        .map(|pool| of(Row::v6(pool), taken.into_iter().filter_map(|key| key.v6).map(v6_range).collect()));
    v4.into_iter().chain(v6).min_by_key(|usage| usage.total - usage.used).unwrap_or(Usage { total: 0, used: 0 })
}

/// `count` subnets of 2^`shift` addresses each, side by side from `first`.
#[derive(Debug, Clone, Copy)]
struct Row {
    first: u128,
    shift: u32,
    count: u128,
}

impl Row {
    fn v4(pool: &Pool<Ipv4Net>) -> Self {
        let shift = 32 - u32::from(pool.subnet_len.min(32));
        Self::between(u32::from(pool.min.network()).into(), u32::from(pool.max.network()).into(), shift)
    }

    fn v6(pool: &Pool<Ipv6Net>) -> Self {
        // Validation keeps the length above 0; a shift by 128 would be none at all.
        let shift = (128 - u32::from(pool.subnet_len.min(128))).min(127);
        Self::between(u128::from(pool.min.network()), u128::from(pool.max.network()), shift)
    }

    fn between(first: u128, last: u128, shift: u32) -> Self {
        let count = last.checked_sub(first).map_or(0, |distance| (distance >> shift) + 1);
        Self { first, shift, count }
    }

    fn v4_at(self, index: u128) -> Option<Ipv4Net> {
        let address = u32::try_from(self.first + (index << self.shift)).ok()?;
        Ipv4Net::new(address.into(), u8::try_from(32 - self.shift).ok()?).ok()
    }

    fn v6_at(self, index: u128) -> Option<Ipv6Net> {
        Ipv6Net::new((self.first + (index << self.shift)).into(), u8::try_from(128 - self.shift).ok()?).ok()
    }

    fn contains(self, (low, high): (u128, u128)) -> bool {
        self.count > 0 && low >= self.first && (high - self.first) >> self.shift < self.count
    }

    /// The indices that `taken` (inclusive address ranges) touches: disjoint, ascending, inclusive.
    fn covered(self, taken: impl Iterator<Item = (u128, u128)>) -> Vec<(u128, u128)> {
        let Some(last_index) = self.count.checked_sub(1) else {
            return Vec::new();
        };
        let mut ranges: Vec<_> = taken
            .filter(|&(_, high)| high >= self.first)
            .map(|(low, high)| {
                (low.saturating_sub(self.first) >> self.shift, ((high - self.first) >> self.shift).min(last_index))
            })
            .filter(|&(low, _)| low <= last_index)
            .collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (low, high) in ranges {
            match merged.last_mut() {
                Some(before) if low <= before.1 => before.1 = before.1.max(high),
                _ => merged.push((low, high)),
            }
        }
        merged
    }

    /// A free index, or how many there are in all when none is free.
    fn draw<R: Rng + ?Sized>(self, taken: impl Iterator<Item = (u128, u128)>, rng: &mut R) -> Result<u128, u128> {
        let covered = self.covered(taken);
        let used: u128 = covered.iter().map(|(low, high)| high - low + 1).sum();
        let free = self.count - used;
        if free == 0 {
            return Err(self.count);
        }
        let mut index = rng.random_range(0..free);
        for (low, high) in covered {
            if index < low {
                break;
            }
            index += high - low + 1;
        }
        Ok(index)
    }
}

fn v4_range(net: Ipv4Net) -> (u128, u128) {
    (u32::from(net.network()).into(), u32::from(net.broadcast()).into())
}

fn v6_range(net: Ipv6Net) -> (u128, u128) {
    (net.network().into(), net.broadcast().into())
}

#[cfg(test)]
mod tests;
