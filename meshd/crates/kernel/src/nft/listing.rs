//! Our table in nft's listing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
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
        (["ipv4_addr", "integer"], true) => Some(SetKind::Ipv4Vtep),
        (["ipv6_addr", "integer"], true) => Some(SetKind::Ipv6Vtep),
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
        SetKind::Ipv4Vtep | SetKind::Ipv6Vtep => {
            let [outer, inner] = value.get("concat")?.as_array()?.as_slice() else {
                return None;
            };
            let inner = number_range(inner, kind == SetKind::Ipv4Vtep)?;
            Some(Element::Vtep { outer: outer.as_str()?.parse().ok()?, inner })
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

/// The prefix that a number or a range of numbers is.
fn number_range(value: &Value, ipv4: bool) -> Option<IpNet> {
    let (first, last) = match value.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        Some([first, last]) => (number(first)?, number(last)?),
        Some(_) => return None,
        None => (number(value)?, number(value)?),
    };
    let bits: u8 = if ipv4 { 32 } else { 128 };
    let host_bits = u8::try_from((first ^ last).count_ones()).ok()?;
    let address =
        if ipv4 { IpAddr::from(Ipv4Addr::from(u32::try_from(first).ok()?)) } else { Ipv6Addr::from(first).into() };
    let net = IpNet::new(address, bits.checked_sub(host_bits)?).ok()?;
    let end = match net.broadcast() {
        IpAddr::V4(end) => u128::from(u32::from(end)),
        IpAddr::V6(end) => u128::from(end),
    };
    (net.network() == address && end == last).then_some(net)
}

/// nft writes a number of more than 63 bits in hexadecimal digits.
fn number(value: &Value) -> Option<u128> {
    match value {
        Value::Number(number) => number.as_u64().map(u128::from),
        Value::String(text) => u128::from_str_radix(text.strip_prefix("0x")?, 16).ok(),
        _ => None,
    }
}
