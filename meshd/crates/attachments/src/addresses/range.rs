//! Ranges to allocate addresses from.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use cni::{daemon::AddressRange, ipam};
use ipnet::IpNet;

use super::AddressError;

/// Addresses of one subnet, from a first to a last one, but for a gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    subnet: IpNet,
    first: IpAddr,
    last: IpAddr,
    gateway: Option<IpAddr>,
}

/// Ranges of one family, of which an attachment gets one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet(Vec<Range>);

/// The sets to allocate from: those that are `named`, as far as they lie in the node's subnets, else the whole of each
/// subnet. The node's own addresses, and those that a bridge and broadcasts have, are in none.
///
/// # Errors
/// [`AddressError::InvalidRange`], [`AddressError::OutsideSubnets`], [`AddressError::TooSmall`]
pub(crate) fn range_sets(
    named: &[Vec<AddressRange>],
    subnets: &[IpNet],
    overlay: &[IpAddr],
) -> Result<Vec<RangeSet>, AddressError> {
    let usable = |subnet: &IpNet| {
        let (first, last) = ipam::range(subnet, overlay).ok_or(AddressError::TooSmall(*subnet))?;
        Ok(Range { subnet: *subnet, first, last, gateway: None })
    };
    if named.is_empty() {
        return subnets.iter().map(|subnet| Ok(RangeSet(vec![usable(subnet)?]))).collect();
    }
    let usable: Vec<Range> = subnets.iter().map(usable).collect::<Result<_, _>>()?;
    let sets = named.iter().map(|ranges| {
        let set: Vec<Range> = ranges.iter().map(|range| within(range, &usable)).collect::<Result<_, _>>()?;
        let Some(first) = set.first() else {
            return Err(AddressError::InvalidRange("an empty list of ranges".to_owned()));
        };
        if set.iter().any(|range| range.first.is_ipv4() != first.first.is_ipv4()) {
            let message =
                format!("{} and {} are of different address families in one list", first.subnet, set[1].subnet);
            return Err(AddressError::InvalidRange(message));
        }
        Ok(RangeSet(set))
    });
    sets.collect()
}

/// The part of a named range inside `usable`.
fn within(named: &AddressRange, usable: &[Range]) -> Result<Range, AddressError> {
    let invalid = |what: String| Err(AddressError::InvalidRange(what));
    let subnet = named.subnet;
    if subnet.trunc() != subnet {
        return invalid(format!("{subnet} has host bits; write {}", subnet.trunc()));
    }
    for (field, address) in
        [("rangeStart", named.range_start), ("rangeEnd", named.range_end), ("gateway", named.gateway)]
    {
        if let Some(address) = address.filter(|address| !subnet.contains(address)) {
            return invalid(format!("{field} {address} is outside {subnet}"));
        }
    }
    let first = named.range_start.unwrap_or_else(|| subnet.network());
    let last = named.range_end.unwrap_or_else(|| subnet.broadcast());
    if first > last {
        return invalid(format!("rangeStart {first} is after rangeEnd {last}"));
    }
    // By default, host-local takes the first address as the gateway's. Those at the edges are unused.
    let gateway = named.gateway.or_else(|| next(subnet.network()));
    let first = if first == subnet.network() { next(first).unwrap_or(first) } else { first };
    let is_broadcast = last == subnet.broadcast() && last.is_ipv4();
    let last = if is_broadcast { previous(last).unwrap_or(last) } else { last };
    let common = usable.iter().filter(|range| range.first.is_ipv4() == first.is_ipv4()).find_map(|range| {
        let (first, last) = (first.max(range.first), last.min(range.last));
        (first <= last).then_some(Range { subnet, first, last, gateway })
    });
    common.ok_or_else(|| AddressError::OutsideSubnets {
        range: format!("{subnet}, {first} to {last}"),
        subnets: usable.iter().map(|range| range.subnet.to_string()).collect::<Vec<_>>().join(" and "),
    })
}

impl Range {
    /// The first address.
    #[must_use]
    pub fn first(&self) -> IpAddr {
        self.first
    }

    fn contains(&self, address: IpAddr) -> bool {
        let same_family = address.is_ipv4() == self.first.is_ipv4();
        same_family && (self.first..=self.last).contains(&address) && self.gateway != Some(address)
    }

    /// All addresses, beginning behind `last` if that is one of them.
    pub(super) fn behind(&self, last: Option<IpAddr>) -> impl Iterator<Item = IpAddr> {
        let begin = last.and_then(next).filter(|begin| (self.first..=self.last).contains(begin)).unwrap_or(self.first);
        let walk = |from: IpAddr, to: IpAddr| {
            std::iter::successors(Some(from), |address| next(*address)).take_while(move |address| *address <= to)
        };
        let before_begin = walk(self.first, self.last).take_while(move |address| *address < begin);
        walk(begin, self.last).chain(before_begin).filter(|address| self.gateway != Some(*address))
    }
}

impl RangeSet {
    /// Its ranges.
    pub fn ranges(&self) -> impl Iterator<Item = &Range> {
        self.0.iter()
    }

    /// Whether an attachment may get this address from it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(address))
    }

    /// The address with the prefix length of its range's subnet.
    pub(super) fn with_prefix(&self, address: IpAddr) -> IpNet {
        let range = self.0.iter().find(|range| range.contains(address));
        let net = range.and_then(|range| IpNet::new(address, range.subnet.prefix_len()).ok());
        net.unwrap_or_else(|| IpNet::from(address))
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, range) in self.0.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{} to {}", range.first, range.last)?;
        }
        Ok(())
    }
}

fn next(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).checked_add(1)?).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).checked_add(1)?).into(),
    })
}

fn previous(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).checked_sub(1)?).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).checked_sub(1)?).into(),
    })
}
