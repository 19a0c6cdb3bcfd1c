//! The holder of a prefix, a key or a name that several records claim.
//!
//! Valid records precede retained ones. Among equals, the lower `create_revision` wins, then the key's order. The
//! result depends only on the records, so every node decides alike, at every start.

use std::collections::{BTreeMap, HashMap, btree_map::Entry};

use etcd_schema::{NodeId, NodeName, PublicKey};
use ipnet::IpNet;

/// Sorts claims: the first one in this order holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Precedence {
    /// `false` (a valid record) sorts first.
    pub retained: bool,
    /// Revision at which the key came to be.
    pub create_revision: i64,
}

/// The granted claims. Claims are made in order of [`Precedence`]; `who` names the claimant in the problem of the
/// loser.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    prefixes_v4: BTreeMap<(u32, u8), String>,
    prefixes_v6: BTreeMap<(u128, u8), String>,
    keys: HashMap<PublicKey, String>,
    names: HashMap<NodeName, NodeId>,
}

impl Claims {
    /// The holder of an address of `prefix`, if any.
    #[must_use]
    pub(crate) fn holder_of_prefix(&self, prefix: &IpNet) -> Option<(IpNet, &str)> {
        // Granted prefixes never overlap, so one that overlaps `prefix` either covers its first address, and then is
        // the last that starts at or before it, or starts inside it.
        match prefix {
            IpNet::V4(net) => {
                let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
                let before = self.prefixes_v4.range(..=(first, 32)).next_back();
                let inside = self.prefixes_v4.range((first, 0)..=(last, 32)).next();
                before.into_iter().chain(inside).find_map(|((start, length), who)| {
                    let held = ipnet::Ipv4Net::new((*start).into(), *length).ok()?;
                    (held.contains(net) || net.contains(&held)).then_some((IpNet::V4(held), who.as_str()))
                })
            }
            IpNet::V6(net) => {
                let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
                let before = self.prefixes_v6.range(..=(first, 128)).next_back();
                let inside = self.prefixes_v6.range((first, 0)..=(last, 128)).next();
                before.into_iter().chain(inside).find_map(|((start, length), who)| {
                    let held = ipnet::Ipv6Net::new((*start).into(), *length).ok()?;
                    (held.contains(net) || net.contains(&held)).then_some((IpNet::V6(held), who.as_str()))
                })
            }
        }
    }

    /// Grants `prefix` to `who`. The caller has asked [`Self::holder_of_prefix`] before.
    pub(crate) fn grant_prefix(&mut self, prefix: &IpNet, who: &str) {
        match prefix {
            IpNet::V4(net) => {
                self.prefixes_v4.insert((net.network().to_bits(), net.prefix_len()), who.to_owned());
            }
            IpNet::V6(net) => {
                self.prefixes_v6.insert((net.network().to_bits(), net.prefix_len()), who.to_owned());
            }
        }
    }

    /// The holder of `key`, if any.
    #[must_use]
    pub(crate) fn holder_of_key(&self, key: &PublicKey) -> Option<&str> {
        self.keys.get(key).map(String::as_str)
    }

    /// Grants `key` to `who`; a key that is held stays with its holder.
    pub(crate) fn grant_key(&mut self, key: PublicKey, who: &str) {
        self.keys.entry(key).or_insert_with(|| who.to_owned());
    }

    /// Grants `name` to `id`.
    ///
    /// # Errors
    /// The holder, when there is another one.
    pub(crate) fn claim_name(&mut self, name: &NodeName, id: &NodeId) -> Result<(), NodeId> {
        match self.names.get(name) {
            Some(holder) if holder != id => Err(holder.clone()),
            _ => {
                self.names.insert(name.clone(), id.clone());
                Ok(())
            }
        }
    }
}

/// The interface addresses of one site: two nodes cannot both stand at one of them.
#[derive(Debug, Default)]
pub(crate) struct SiteAddresses(BTreeMap<(String, std::net::IpAddr), String>);

impl SiteAddresses {
    /// Grants `address` at `site` to `who`; `false` when another node holds it.
    pub(crate) fn claim(&mut self, site: &str, address: std::net::IpAddr, who: &str) -> bool {
        match self.0.entry((site.to_owned(), address)) {
            Entry::Vacant(free) => {
                free.insert(who.to_owned());
                true
            }
            Entry::Occupied(held) => held.get() == who,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address::overlap;

    fn prefix() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (0u32..1 << 12, 20u8..=32).prop_map(|(bits, len)| IpNet::V4(
                ipnet::Ipv4Net::new((0x0af4_0000 | (bits << 4)).into(), len).unwrap().trunc()
            )),
            (0u128..1 << 12, 116u8..=128).prop_map(|(bits, len)| IpNet::V6(
                ipnet::Ipv6Net::new(((0xfd42_u128 << 112) | bits).into(), len).unwrap().trunc()
            )),
        ]
    }

    proptest! {
        /// The ordered maps answer as a list of all granted prefixes would.
        #[test]
        fn agrees_with_a_list(claimed in proptest::collection::vec(prefix(), 0..60)) {
            let mut claims = Claims::default();
            let mut granted: Vec<IpNet> = Vec::new();
            for net in claimed {
                let naive = granted.iter().any(|held| overlap(held, &net));
                prop_assert_eq!(claims.holder_of_prefix(&net).is_some(), naive, "{} among {:?}", net, granted);
                if !naive {
                    claims.grant_prefix(&net, "x");
                    granted.push(net);
                }
            }
        }
    }
}
