//! Sets of addresses, keyed by their sources and reused while those stay the same.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use super::{
    super::{AddressSetKind, Set, SetElement, ranges::Ranges},
    Draft,
};
use crate::{
    engine::{
        Engine,
        rules::{PeerRef, blocks},
        selection::ALL_PODS,
        set_cache::{Made, SetOf},
        storage::{Owner, find_mark, marked},
    },
    object::Protocol,
};

impl Engine {
    pub(super) fn forget_changed_sets(&mut self) {
        let cache = &mut self.set_cache;
        let changed = std::mem::take(&mut cache.changed);
        let everything = std::mem::take(&mut cache.everything);
        let (sources, nodes) = (std::mem::take(&mut cache.sources), std::mem::take(&mut cache.nodes));
        cache.made.retain(|(peers, of), _| {
            let of_changed = |peer: &PeerRef| match peer {
                PeerRef::Set(set) => changed.contains(set),
                // Whose an address is may have changed with any pod.
                PeerRef::Nodes(_) => nodes || !changed.is_empty(),
                PeerRef::Anyone | PeerRef::Block(_) => false,
            };
            // Who is known at all, or has a port of some name, may depend on every pod.
            let of_all = matches!(of, SetOf::Known { .. } | SetOf::Named { .. }) && !changed.is_empty();
            let of_sources =
                sources && matches!(of, SetOf::Sure { source: true, .. } | SetOf::Unsure { source: true, .. });
            !everything && !of_all && !of_sources && !peers.iter().any(of_changed)
        });
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<Owner> {
        self.pods.addresses.get(address)
    }

    fn ranges(&self, peers: &[PeerRef], of: &SetOf) -> Ranges {
        let (v4, sure, source) = match of {
            SetOf::Sure { v4, source } => (*v4, true, *source),
            SetOf::Unsure { v4, source } => (*v4, false, *source),
            SetOf::Known { v4 } => return self.known(*v4),
            SetOf::Mesh { v4 } => {
                let mut ranges = Ranges::new(*v4);
                self.networks.iter().for_each(|net| ranges.add_net(net));
                ranges.settle();
                return ranges;
            }
            SetOf::Named { v4, .. } => return Ranges::new(*v4),
        };
        let mut ranges = Ranges::new(v4);
        if sure {
            blocks(peers).for_each(|block| ranges.add_block(block));
        }
        if source {
            ranges = self.with_nodes(ranges, peers, (v4, sure));
        }
        for peer in peers {
            match peer {
                PeerRef::Set(ALL_PODS) if sure => {
                    let mut mesh = Ranges::new(v4);
                    self.networks.iter().for_each(|net| mesh.add_net(net));
                    mesh.settle();
                    let mut nodes = Ranges::new(v4);
                    self.node_addresses().for_each(|address| nodes.add_address(address));
                    nodes.settle();
                    ranges.append(&mesh.without(&nodes));
                    self.pod_addresses(*peer_set(peer), true, |address| ranges.add_address(address));
                }
                PeerRef::Set(set) => self.pod_addresses(*set, sure, |address| ranges.add_address(address)),
                PeerRef::Nodes(set) => self.addresses_of_nodes(*set, sure, |address| ranges.add_address(address)),
                PeerRef::Anyone | PeerRef::Block(_) => {}
            }
        }
        ranges.settle();
        ranges
    }

    /// `ranges`, which the blocks of `peers` hold, with the overlay addresses of exactly those nodes that surely are in one
    /// of the blocks, or only may be.
    fn with_nodes(&self, mut ranges: Ranges, peers: &[PeerRef], (v4, sure): (bool, bool)) -> Ranges {
        let (mut nodes, mut matching) = (Ranges::new(v4), Ranges::new(v4));
        for (overlay, aliases) in self.sources.iter().filter(|(overlay, _)| overlay.is_ipv4() == v4) {
            nodes.add_address(*overlay);
            if blocks(peers).any(|block| aliases.in_block(*overlay, block) == Some(!sure)) {
                matching.add_address(*overlay);
            }
        }
        ranges.settle();
        nodes.settle();
        let mut ranges = ranges.without(&nodes);
        ranges.append(&matching);
        ranges
    }

    fn known(&self, v4: bool) -> Ranges {
        let mut ranges = Ranges::new(v4);
        self.node_addresses().for_each(|address| ranges.add_address(address));
        self.pod_addresses(ALL_PODS, true, |address| ranges.add_address(address));
        ranges.settle();
        ranges
    }

    /// Addresses of the pods that surely are in a set, or of those that only may be.
    fn pod_addresses(&self, set: u32, sure: bool, mut each: impl FnMut(IpAddr)) {
        self.members(set, sure, |pod| self.pods.owned(pod, &mut each));
    }

    /// Addresses of the Nodes that surely are in a set, or of those that only may be.
    fn addresses_of_nodes(&self, set: u32, sure: bool, mut each: impl FnMut(IpAddr)) {
        for (address, sets) in &**self.nodes.addresses() {
            if find_mark(sets, set) == Some(!sure) && self.owner(*address).is_none() {
                each(*address);
            }
        }
    }

    fn members(&self, set: u32, sure: bool, mut each: impl FnMut(u32)) {
        let Some(set) = self.selection.sets.get(set) else { return };
        for member in &set.members {
            let (member, unknown) = marked(*member);
            if unknown == sure {
                continue;
            }
            if set.of_namespaces() {
                for class in self.selection.namespaces[member].classes.values() {
                    self.selection.classes[*class].pods.iter().copied().for_each(&mut each);
                }
            } else {
                self.selection.classes[member].pods.iter().copied().for_each(&mut each);
            }
        }
    }

    /// Peers that have ports of a name, each with these: those that surely are peers, or those that only may be.
    fn named(
        &self,
        peers: &[PeerRef],
        (v4, sure): (bool, bool),
        protocol: Option<Protocol>,
        name: &str,
    ) -> Vec<SetElement> {
        let mut elements = Vec::new();
        let mut pod = |index: u32, wanted: &dyn Fn(IpAddr) -> bool| {
            let Some(Some(info)) = self.pods.infos.get(index) else { return };
            for port in info.ports.iter().filter(|port| &*port.name == name) {
                if protocol.is_some_and(|protocol| protocol != port.protocol) {
                    continue;
                }
                self.pods.owned(index, &mut |address| {
                    if address.is_ipv4() == v4 && wanted(address) {
                        elements.push(SetElement::Port(address, port.protocol, port.port));
                    }
                });
            }
        };
        for peer in peers {
            match peer {
                PeerRef::Set(set) => self.members(*set, sure, |index| pod(index, &|_| true)),
                // Nodes have no named ports.
                PeerRef::Nodes(_) => {}
                PeerRef::Anyone | PeerRef::Block(_) if !sure => {}
                PeerRef::Anyone => self.members(ALL_PODS, true, |index| pod(index, &|_| true)),
                PeerRef::Block(block) => {
                    self.members(ALL_PODS, true, |index| pod(index, &|address| block.contains(address)));
                }
            }
        }
        elements.sort_unstable();
        elements.dedup();
        elements
    }
}

const fn peer_set(peer: &PeerRef) -> &u32 {
    match peer {
        PeerRef::Set(set) => set,
        PeerRef::Anyone | PeerRef::Nodes(_) | PeerRef::Block(_) => &ALL_PODS,
    }
}

impl Draft<'_> {
    /// The name of the set; `None`: it is empty, and `even_empty` does not want it then.
    pub(super) fn set(&mut self, peers: &[PeerRef], of: SetOf, even_empty: bool) -> Option<String> {
        let mut list = peers.to_vec();
        list.sort_unstable();
        list.dedup();
        let key = (list, of);
        let made = match self.used.get(&key).or_else(|| self.engine.set_cache.made.get(&key)) {
            Some(made) => Arc::clone(made),
            None => Arc::new(self.make(&key.0, &key.1)),
        };
        if made.set.elements.is_empty() && !even_empty {
            return None;
        }
        let name = made.name.clone();
        self.used.insert(key, made);
        Some(name)
    }

    fn make(&self, peers: &[PeerRef], of: &SetOf) -> Made {
        let (kind, elements) = match of {
            SetOf::Named { v4, sure, protocol, name } => {
                let kind = if *v4 { AddressSetKind::V4Port } else { AddressSetKind::V6Port };
                (kind, self.engine.named(peers, (*v4, *sure), *protocol, name))
            }
            SetOf::Sure { v4, .. } | SetOf::Unsure { v4, .. } | SetOf::Known { v4 } | SetOf::Mesh { v4 } => {
                let kind = if *v4 { AddressSetKind::V4 } else { AddressSetKind::V6 };
                (kind, self.engine.ranges(peers, of).elements())
            }
        };
        // By what the set means, not by what it holds: members come and go, the name stays.
        let mut hasher = DefaultHasher::new();
        for peer in peers {
            match peer {
                PeerRef::Set(set) => self.engine.selection.hash_set(*set, &mut hasher),
                PeerRef::Nodes(set) => ("nodes", self.engine.nodes.selector(*set)).hash(&mut hasher),
                other => other.hash(&mut hasher),
            }
        }
        of.hash(&mut hasher);
        let name = format!("s_{:016x}", hasher.finish());
        let mut hasher = DefaultHasher::new();
        elements.hash(&mut hasher);
        Made { name, set: Set { kind, elements: elements.into(), content: hasher.finish(), copy: 0 } }
    }
}
