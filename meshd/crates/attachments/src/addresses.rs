//! Allocation of addresses from this node's subnets to attachments: no I/O, no clock.
//!
//! The attachments alone determine the owner of an address, and are an argument here. [`History`] keeps the order in
//! which addresses became free. The address that has been free longest is allocated first, so that a packet or a name
//! server's answer for a deleted container reaches no other container for as long as possible.

mod range;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use cni::environment::AttachmentName;
use ipnet::IpNet;

pub(crate) use range::range_sets;
pub use range::{Range, RangeSet};

/// The most addresses whose order is kept. Those that became free before count as free since ever, which is the same
/// order for ranges with no more addresses than this.
const MAX_FREED: usize = 65_536;

/// The order in which addresses became free.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// How many have become free.
    count: u64,
    /// By the count when they did, the longest-free first.
    freed: BTreeMap<u64, IpAddr>,
    /// The same by address.
    when: BTreeMap<IpAddr, u64>,
    /// The last allocated one of each family, IPv4 first.
    last: [Option<IpAddr>; 2],
}

/// Addresses in use, each with the attachment that has it, as far as that is known.
pub type InUse = BTreeMap<IpAddr, Option<AttachmentName>>;

/// Why no address is allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// A range cannot be one.
    #[error("invalid range: {0}")]
    InvalidRange(String),
    /// A range has no address of the node's subnets.
    #[error("range {range} contains no container address in this node's subnets {subnets}")]
    OutsideSubnets {
        /// The range.
        range: String,
        /// The node's subnets.
        subnets: String,
    },
    /// A subnet has only addresses of the node itself.
    #[error("subnet {0} is too small for container addresses")]
    TooSmall(IpNet),
    /// A requested address is in no range.
    #[error("requested address {address} is outside the container range {ranges}")]
    OutsideRanges {
        /// The address.
        address: IpAddr,
        /// The ranges.
        ranges: String,
    },
    /// A requested address is in use.
    #[error("requested address {address} is in use{}", by(.holder))]
    Taken {
        /// The address.
        address: IpAddr,
        /// The attachment that has it.
        holder: Option<AttachmentName>,
    },
    /// Every address is in use.
    #[error("no free address in {ranges}: {in_use} in use")]
    Exhausted {
        /// The ranges.
        ranges: String,
        /// The number of addresses in use.
        in_use: usize,
    },
}

fn by(holder: &Option<AttachmentName>) -> String {
    holder.as_ref().map_or_else(String::new, |holder| format!(" by container {}", holder.container_id))
}

impl History {
    /// After a start: `last` are the addresses that were allocated last.
    #[must_use]
    pub fn after(last: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut history = Self::default();
        for address in last {
            history.last[usize::from(address.is_ipv6())] = Some(address);
        }
        history
    }

    /// The last allocated address of each family.
    pub fn last(&self) -> impl Iterator<Item = IpAddr> {
        self.last.into_iter().flatten()
    }

    /// Chooses one address from each set: a requested one, one that the attachment has already (`held`), or the one
    /// that has been free the longest. Nothing is noted until [`allocated`](Self::allocated).
    ///
    /// # Errors
    /// [`AddressError`], if one set has no address or a requested one cannot be had. There is no partial choice.
    pub fn choose(
        &self,
        sets: &[RangeSet],
        requested: &[IpAddr],
        held: &[IpAddr],
        in_use: &InUse,
    ) -> Result<Vec<IpNet>, AddressError> {
        let mut requested: BTreeSet<IpAddr> = requested.iter().copied().collect();
        let mut chosen: Vec<IpNet> = Vec::with_capacity(sets.len());
        for set in sets {
            let wanted = requested.iter().copied().find(|address| set.contains(*address));
            if let Some(address) = wanted {
                requested.remove(&address);
                if let Some(holder) = in_use.get(&address) {
                    return Err(AddressError::Taken { address, holder: holder.clone() });
                }
            }
            let free = |address: IpAddr| {
                let reserved = requested.contains(&address) || chosen.iter().any(|one| one.addr() == address);
                !reserved && !in_use.contains_key(&address)
            };
            let held = || held.iter().copied().find(|address| set.contains(*address) && free(*address));
            let found = wanted.or_else(held).or_else(|| self.longest_free(set, &free));
            let address = found.ok_or_else(|| {
                let in_use = in_use.keys().filter(|address| set.contains(**address)).count();
                AddressError::Exhausted { ranges: set.to_string(), in_use }
            })?;
            chosen.push(set.with_prefix(address));
        }
        match requested.first() {
            None => Ok(chosen),
            Some(address) => Err(AddressError::OutsideRanges {
                address: *address,
                ranges: sets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
            }),
        }
    }

    /// Notes that these addresses are in use, after [`choose`](Self::choose) or because another plugin gave them.
    pub fn allocated(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.last[usize::from(address.is_ipv6())] = Some(address);
            if let Some(at) = self.when.remove(&address) {
                self.freed.remove(&at);
            }
        }
    }

    /// Notes that these addresses are free from now on.
    pub fn freed(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.count += 1;
            self.freed.insert(self.count, address);
            if let Some(before) = self.when.insert(address, self.count) {
                self.freed.remove(&before);
            }
        }
        while self.freed.len() > MAX_FREED {
            if let Some((_, address)) = self.freed.pop_first() {
                self.when.remove(&address);
            }
        }
    }

    fn longest_free(&self, set: &RangeSet, free: &impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let never_used = |address: IpAddr| !self.when.contains_key(&address) && free(address);
        // All that are skipped are in one of three finite sets: the walk is as long as those.
        let fresh = set.ranges().find_map(|range| {
            let last = self.last[usize::from(range.first().is_ipv6())];
            range.behind(last).find(|address| never_used(*address))
        });
        fresh.or_else(|| self.freed.values().copied().find(|address| set.contains(*address) && free(*address)))
    }
}

#[cfg(test)]
mod tests;
