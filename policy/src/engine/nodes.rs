//! Nodes as peers of ClusterNetworkPolicies: the addresses that a selector of Nodes means.
//!
//! ```text
//! surely   InternalIPs outside the mesh's networks; overlay addresses of the mesh's node that is the Node
//! may be   other addresses of that node; InternalIPs inside the mesh's networks; all addresses of the mesh's nodes
//!          that are no Node as far as is known
//! ```
//!
//! An address of a pod is no Node's. A rule that accepts goes by what is sure, one that denies by everything, so a node
//! gets out of a denial neither by hiding which Node it is nor by another of its addresses.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    input::ObjectName,
    pods::Pods,
    storage::{Slab, mark},
};
use crate::object::{CLUSTER, Labels, Selector, Truth};

/// Marks of the sets that an address is in, in order.
pub(crate) type NodeAddresses = HashMap<IpAddr, Box<[u32]>>;

#[derive(Debug)]
struct NodeObject {
    /// With the label of its cluster, whatever the object says.
    labels: Labels,
    internal_ips: Box<[IpAddr]>,
}

#[derive(Debug)]
struct NodeSet {
    selector: Selector,
    uses: u32,
}

/// Node objects, and the selectors of policies with what they mean.
#[derive(Debug, Default)]
pub(crate) struct NodeSets {
    objects: BTreeMap<ObjectName, NodeObject>,
    sets: Slab<NodeSet>,
    by_selector: HashMap<Selector, u32>,
    /// Whether anything that the addresses follow from changed since they were found.
    stale: bool,
    addresses: Arc<NodeAddresses>,
}

impl NodeSets {
    /// Notes a Node object; `None`: it is gone.
    pub(super) fn set_object(&mut self, name: ObjectName, object: Option<(&Labels, Box<[IpAddr]>)>) {
        self.stale = true;
        match object {
            Some((labels, internal_ips)) => {
                let labels = labels.with(CLUSTER, name.cluster.as_str());
                self.objects.insert(name, NodeObject { labels, internal_ips });
            }
            None => drop(self.objects.remove(&name)),
        }
    }

    /// Notes that nodes of the mesh, or its networks, changed.
    pub(super) fn touch(&mut self) {
        self.stale = true;
    }

    /// The set of the Nodes that `selector` matches, used once more. [`Self::release`] is the other half.
    pub(super) fn acquire(&mut self, selector: &Selector) -> u32 {
        if let Some(index) = self.by_selector.get(selector) {
            self.sets[*index].uses += 1;
            return *index;
        }
        self.stale = true;
        let index = self.sets.insert(NodeSet { selector: selector.clone(), uses: 1 });
        self.by_selector.insert(selector.clone(), index);
        index
    }

    pub(super) fn release(&mut self, index: u32) {
        let set = &mut self.sets[index];
        set.uses -= 1;
        if set.uses == 0 {
            self.stale = true;
            if let Some(set) = self.sets.remove(index) {
                self.by_selector.remove(&set.selector);
            }
        }
    }

    /// What a set means, whatever its number and its members are.
    pub(crate) fn selector(&self, index: u32) -> Option<&Selector> {
        self.sets.get(index).map(|set| &set.selector)
    }

    /// Whose address each is.
    pub(crate) const fn addresses(&self) -> &Arc<NodeAddresses> {
        &self.addresses
    }

    /// Finds the addresses again if anything that they follow from changed, sets among it. Returns then whether the
    /// addresses did.
    pub(super) fn settle(&mut self, pods: &Pods, networks: &[IpNet]) -> Option<bool> {
        if !std::mem::take(&mut self.stale) {
            return None;
        }
        if self.sets.len() == 0 && self.addresses.is_empty() {
            return Some(false);
        }
        let found = self.find(pods, networks);
        let changed = found != *self.addresses;
        self.addresses = Arc::new(found);
        Some(changed)
    }

    fn find(&self, pods: &Pods, networks: &[IpNet]) -> NodeAddresses {
        let in_mesh = |address: &IpAddr| networks.iter().any(|net| net.contains(address));
        let mut of_nodes: HashMap<ObjectName, Vec<(IpAddr, bool)>> = HashMap::new();
        let mut of_no_node: Vec<IpAddr> = Vec::new();
        for (name, addresses) in &pods.nodes {
            let (object, subnets) = match pods.cluster_node(name) {
                Some(node) => (ObjectName::new("", Arc::clone(&node.name)).of(&node.cluster), &*node.subnets),
                None => (ObjectName::new("", Arc::clone(name)), &[][..]),
            };
            if !self.objects.contains_key(&object) {
                of_no_node.extend(addresses.iter());
                continue;
            }
            let unsure = |address: &IpAddr| !subnets.iter().any(|net| net.contains(address));
            let own = addresses.iter().map(|address| (*address, unsure(address)));
            of_nodes.entry(object).or_default().extend(own);
        }
        for (name, object) in &self.objects {
            let internal = object.internal_ips.iter().map(|address| (*address, in_mesh(address)));
            of_nodes.entry(name.clone()).or_default().extend(internal);
        }
        // Whatever surely is in a set is no more that which only may be.
        let mut found: HashMap<IpAddr, BTreeMap<u32, bool>> = HashMap::new();
        let mut add = |address: IpAddr, set: u32, unsure: bool| {
            let entry = found.entry(address).or_default().entry(set).or_insert(unsure);
            *entry &= unsure;
        };
        for (index, set) in self.sets.iter() {
            of_no_node.iter().for_each(|address| add(*address, index, true));
            let selected =
                self.objects.iter().filter(|(_, object)| set.selector.matches(Some(&object.labels)) != Truth::No);
            for (address, unsure) in selected.filter_map(|(name, _)| of_nodes.get(name)).flatten() {
                add(*address, index, *unsure);
            }
        }
        let marks = |sets: BTreeMap<u32, bool>| sets.into_iter().map(|(set, unsure)| mark(set, unsure)).collect();
        found.into_iter().map(|(address, sets)| (address, marks(sets))).collect()
    }
}
