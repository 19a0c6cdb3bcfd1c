//! Sets of addresses as disjoint ranges.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::SetElement;
use crate::object::Block;

/// Disjoint, sorted, not touching ranges of addresses of one family, both ends included.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Ranges {
    v4: bool,
    list: Vec<(u128, u128)>,
}

impl Ranges {
    pub(super) const fn new(v4: bool) -> Self {
        Self { v4, list: Vec::new() }
    }

    /// Adds an address; ignores another family.
    pub(super) fn add_address(&mut self, address: IpAddr) {
        if address.is_ipv4() == self.v4 {
            self.list.push((number(address), number(address)));
        }
    }

    pub(super) fn add_net(&mut self, net: &IpNet) {
        if net.network().is_ipv4() == self.v4 {
            self.list.push((number(net.network()), number(net.broadcast())));
        }
    }

    /// A block without its holes.
    pub(super) fn add_block(&mut self, block: &Block) {
        if block.cidr.network().is_ipv4() != self.v4 {
            return;
        }
        let (mut from, last) = (number(block.cidr.network()), number(block.cidr.broadcast()));
        for hole in &block.except {
            let (first, end) = (number(hole.network()), number(hole.broadcast()));
            if first > from {
                self.list.push((from, first - 1));
            }
            if end == last {
                return;
            }
            from = end + 1;
        }
        self.list.push((from, last));
    }

    /// Sorts and merges.
    pub(super) fn settle(&mut self) {
        self.list.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(self.list.len());
        for (first, last) in self.list.drain(..) {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        self.list = merged;
    }

    /// The difference from `other`. Both must be settled.
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut list = Vec::with_capacity(self.list.len());
        let mut holes = other.list.iter().copied().peekable();
        for (mut from, last) in self.list.iter().copied() {
            loop {
                while holes.next_if(|(_, end)| *end < from).is_some() {}
                match holes.peek() {
                    Some((first, end)) if *first <= last => {
                        if *first > from {
                            list.push((from, first - 1));
                        }
                        if *end >= last {
                            break;
                        }
                        from = end + 1;
                    }
                    _ => {
                        list.push((from, last));
                        break;
                    }
                }
            }
        }
        Self { v4: self.v4, list }
    }

    pub(super) fn append(&mut self, other: &Self) {
        self.list.extend(&other.list);
    }

    pub(super) fn elements(&self) -> Vec<SetElement> {
        self.list.iter().map(|(first, last)| SetElement::Range(self.address(*first), self.address(*last))).collect()
    }

    fn address(&self, number: u128) -> IpAddr {
        if self.v4 { IpAddr::V4(Ipv4Addr::from(number as u32)) } else { IpAddr::V6(Ipv6Addr::from(number)) }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}
