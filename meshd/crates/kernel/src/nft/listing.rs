//! Our table in nft's listing.

use mesh::{
    interface::InterfaceName,
    kernel_state::{PrefixOn, PrefixVia},
};
use netfilter::{ListedSet, ListingError, TableListing, prefix};
use serde_json::Value;

use super::table::{Element, ObservedSet, ObservedTable, SetKind};

/// `nft -j list table …`.
pub(crate) fn parse_table(json: &[u8]) -> Result<ObservedTable, ListingError> {
    let TableListing { chains, sets, counters, .. } = TableListing::parse(json)?;
    let sets = sets.iter().map(|(name, set)| (name.clone(), observed_set(set))).collect();
    Ok(ObservedTable { sets, chains, counters })
}

fn observed_set(set: &ListedSet) -> ObservedSet {
    let types: Vec<&str> = set.types.iter().map(String::as_str).collect();
    let kind = match (types.as_slice(), set.interval) {
        (["ipv4_addr"], true) => Some(SetKind::Ipv4),
        (["ipv6_addr"], true) => Some(SetKind::Ipv6),
        (["ipv4_addr", "ifname"], true) => Some(SetKind::Ipv4On),
        (["ipv6_addr", "ifname"], true) => Some(SetKind::Ipv6On),
        (["ipv4_addr", "ifname", "ipv4_addr"], true) => Some(SetKind::Ipv4Via),
        (["ipv6_addr", "ifname", "ipv6_addr"], true) => Some(SetKind::Ipv6Via),
        (["ifname"], false) => Some(SetKind::Interface),
        _ => None,
    };
    let elements = kind.and_then(|kind| set.elements.iter().map(|value| element(kind, value)).collect());
    ObservedSet { kind, elements }
}

fn element(kind: SetKind, value: &Value) -> Option<Element> {
    match kind {
        SetKind::Ipv4 | SetKind::Ipv6 => prefix(value).map(Element::Prefix),
        SetKind::Interface => Some(Element::Interface(value.as_str()?.parse().ok()?)),
        SetKind::Ipv4On | SetKind::Ipv6On => {
            let [address, dev] = value.get("concat")?.as_array()?.as_slice() else {
                return None;
            };
            Some(Element::On(PrefixOn { prefix: prefix(address)?, dev: InterfaceName::new(dev.as_str()?).ok()? }))
        }
        SetKind::Ipv4Via | SetKind::Ipv6Via => {
            let [address, dev, via] = value.get("concat")?.as_array()?.as_slice() else {
                return None;
            };
            Some(Element::Via(PrefixVia {
                prefix: prefix(address)?,
                dev: InterfaceName::new(dev.as_str()?).ok()?,
                via: via.as_str()?.parse().ok()?,
            }))
        }
    }
}
