//! One longest-prefix table over all peers, for both directions.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Which value owns an address: that of the longest prefix it lies in.
///
/// Outbound it selects the peer of a destination, inbound it checks that a source is the sending peer's. Both
/// directions use the same table, so no address can be sent to one peer and accepted from another.
#[derive(Debug, Clone)]
pub struct PrefixTable<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for PrefixTable<T> {
    fn default() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }
}

impl<T: Copy> PrefixTable<T> {
    /// Gives `prefix` to `value`, host bits ignored, unless it is taken: then the table stays as it was and the
    /// owner is returned.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => match self.v4.get(&prefix) {
                Some(owner) => return Some(*owner),
                None => drop(self.v4.insert(prefix, value)),
            },
            IpNet::V6(prefix) => match self.v6.get(&prefix) {
                Some(owner) => return Some(*owner),
                None => drop(self.v6.insert(prefix, value)),
            },
        }
        None
    }

    /// The owner of exactly this prefix.
    #[must_use]
    pub fn owner(&self, prefix: &IpNet) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.get(&prefix).copied(),
            IpNet::V6(prefix) => self.v6.get(&prefix).copied(),
        }
    }

    /// Takes a prefix out.
    pub fn remove(&mut self, prefix: &IpNet) {
        match prefix.trunc() {
            IpNet::V4(prefix) => drop(self.v4.remove(&prefix)),
            IpNet::V6(prefix) => drop(self.v6.remove(&prefix)),
        }
    }

    /// The owner of the longest prefix that holds `address`.
    #[must_use]
    pub fn get(&self, address: IpAddr) -> Option<T> {
        match address {
            IpAddr::V4(a) => self.v4.get_lpm(&Ipv4Net::from(a)).map(|(_, v)| *v),
            IpAddr::V6(a) => self.v6.get_lpm(&Ipv6Net::from(a)).map(|(_, v)| *v),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn address() -> impl Strategy<Value = IpAddr> {
        // Few distinct bits, at both ends, so that prefixes nest and addresses hit them.
        prop_oneof![
            (0u8..4, 0u8..4).prop_map(|(a, d)| IpAddr::V4(Ipv4Addr::new(a << 6, 0, 0, d))),
            (0u16..4, 0u16..4).prop_map(|(a, h)| IpAddr::V6(Ipv6Addr::new(a << 14, 0, 0, 0, 0, 0, 0, h))),
        ]
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (address(), 0u8..=128).prop_map(|(a, len)| {
            let max = if a.is_ipv4() { 32 } else { 128 };
            IpNet::new(a, len % (max + 1)).unwrap()
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_scan_of_all_prefixes(
            prefixes in prop::collection::vec(prefix(), 0..24),
            probes in prop::collection::vec(address(), 1..24),
        ) {
            let mut table = PrefixTable::default();
            let mut naive: Vec<(IpNet, usize)> = Vec::new();
            for (i, prefix) in prefixes.iter().enumerate() {
                let taken = naive.iter().find(|(p, _)| *p == prefix.trunc()).map(|(_, v)| *v);
                prop_assert_eq!(table.insert(*prefix, i), taken);
                if taken.is_none() {
                    naive.push((prefix.trunc(), i));
                }
            }
            for probe in probes {
                let expected = naive
                    .iter()
                    .filter(|(p, _)| p.contains(&probe))
                    .max_by_key(|(p, _)| p.prefix_len())
                    .map(|(_, v)| *v);
                prop_assert_eq!(table.get(probe), expected);
            }
        }
    }
}
