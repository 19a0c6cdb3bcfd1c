//! Ports of a rule in the form of one pod's chain.

use std::{collections::BTreeMap, sync::Arc};

use super::{super::Match, PodChain};
use crate::{
    engine::Side,
    object::{PortMatch, Ports, Protocol},
};

/// A named port, and the protocol that it must be of.
pub(super) type PortName = (Option<Protocol>, Arc<str>);

/// Ports by number, one condition each, and names that only the destination can resolve.
pub(super) fn resolve(list: &[PortMatch], chain: &PodChain) -> (Vec<Match>, Vec<PortName>) {
    let mut numeric = Vec::new();
    let mut named = Vec::new();
    let mut ranges: BTreeMap<Protocol, Vec<(u16, u16)>> = BTreeMap::new();
    for entry in list {
        match (&entry.ports, entry.protocol) {
            (Ports::All, Some(protocol)) => numeric.push(Match::Protocol(protocol)),
            (Ports::All, None) => {}
            (Ports::Range(first, last), Some(protocol)) => {
                ranges.entry(protocol).or_default().push((*first, *last));
            }
            (Ports::Range(..), None) => {}
            (Ports::Named(name), protocol) if chain.side == Side::Ingress => {
                let own = chain.info.iter().flat_map(|info| info.ports.iter());
                for port in own.filter(|port| port.name == *name && protocol.is_none_or(|p| p == port.protocol)) {
                    ranges.entry(port.protocol).or_default().push((port.port, port.port));
                }
            }
            (Ports::Named(name), protocol) => named.push((protocol, Arc::clone(name))),
        }
    }
    numeric.sort_unstable_by_key(|condition| match condition {
        Match::Protocol(protocol) => Some(*protocol),
        _ => None,
    });
    numeric.dedup();
    for (protocol, mut list) in ranges {
        list.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in list {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        numeric.push(Match::Ports(protocol, merged));
    }
    named.sort();
    named.dedup();
    (numeric, named)
}
