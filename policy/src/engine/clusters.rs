//! The cluster of each node of the mesh, and so of each pod address.
//!
//! An address in a subnet of a cluster's node belongs to a pod of that cluster or to an unknown pod. Addresses
//! elsewhere belong to pods without a cluster. So an object of one cluster never affects pods of another.
//!
//! A node without a copied Node object is in no cluster, but may run pods of one. While policies belong to clusters or
//! name them in selectors, an attachment there is a pod only if Kubernetes did not create it, or if a Pod object
//! without a cluster has its UID. Otherwise its addresses are those of unknown pods, which every policy may select.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use etcd_schema::Cluster;
use ipnet::IpNet;

use super::input::{ClusterNode, PodInterface};

/// Values by subnet, found by an address in it.
#[derive(Debug)]
pub(super) struct Subnets<T> {
    by_net: HashMap<IpNet, T>,
    /// Number of subnets by family and prefix length.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl<T> Default for Subnets<T> {
    fn default() -> Self {
        Self { by_net: HashMap::new(), lengths: BTreeMap::new() }
    }
}

impl<T> Subnets<T> {
    fn insert(&mut self, net: IpNet, value: T) {
        let net = net.trunc();
        if self.by_net.insert(net, value).is_none() {
            *self.lengths.entry(length(&net)).or_default() += 1;
        }
    }

    fn remove(&mut self, net: IpNet) {
        let net = net.trunc();
        if self.by_net.remove(&net).is_some()
            && let Some(count) = self.lengths.get_mut(&length(&net))
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(&net));
            }
        }
    }

    /// The value of the longest subnet that contains `address`.
    pub(super) fn get(&self, address: IpAddr) -> Option<&T> {
        let v4 = address.is_ipv4();
        self.lengths.range((v4, 0)..=(v4, 128)).rev().find_map(|((_, bits), _)| {
            let net = IpNet::new(address, *bits).ok()?;
            self.by_net.get(&net.trunc())
        })
    }
}

fn length(net: &IpNet) -> (bool, u8) {
    (net.addr().is_ipv4(), net.prefix_len())
}

/// Changes since the last call of `take`.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) subnets: Subnets<()>,
    /// By their names in the mesh.
    pub(super) nodes: HashSet<Arc<str>>,
    /// By their names in their clusters.
    pub(super) names: HashSet<(Cluster, Arc<str>)>,
    /// How attachments on nodes without a cluster are treated.
    pub(super) strays: bool,
}

/// The nodes of clusters.
#[derive(Debug, Default)]
pub(super) struct Clusters {
    /// By their names in the mesh.
    nodes: HashMap<Arc<str>, ClusterNode>,
    /// Names in the mesh, by those in clusters.
    names: HashMap<(Cluster, Arc<str>), Arc<str>>,
    /// The owner of each subnet, by its name in the mesh.
    subnets: Subnets<Arc<str>>,
    /// Number of policies that name clusters.
    policies: usize,
    changed: Option<Changed>,
}

impl Clusters {
    /// Sets the cluster of the mesh's node `name`; `None`: it has none.
    pub(super) fn set(&mut self, name: &Arc<str>, node: Option<ClusterNode>) {
        let node = node.filter(|node| !node.cluster.is_flat());
        if self.nodes.get(name) == node.as_ref() {
            return;
        }
        let before = match &node {
            Some(node) => self.nodes.insert(Arc::clone(name), node.clone()),
            None => self.nodes.remove(name),
        };
        let changed = self.changed.get_or_insert_default();
        changed.nodes.insert(Arc::clone(name));
        for is in before.iter().chain(&node) {
            is.subnets.iter().for_each(|net| changed.subnets.insert(*net, ()));
            changed.names.insert((is.cluster.clone(), Arc::clone(&is.name)));
        }
        // Another node may have taken over the subnet or name.
        for net in before.iter().flat_map(|was| &*was.subnets) {
            if self.subnets.by_net.get(&net.trunc()) == Some(name) {
                self.subnets.remove(*net);
            }
        }
        if let Some(was) = before {
            let key = (was.cluster, was.name);
            if self.names.get(&key) == Some(name) {
                self.names.remove(&key);
            }
        }
        if let Some(is) = node {
            is.subnets.iter().for_each(|net| self.subnets.insert(*net, Arc::clone(name)));
            self.names.insert((is.cluster, is.name), Arc::clone(name));
        }
    }

    /// Counts policies that name clusters: +1 for an added one, -1 for a removed one.
    pub(super) fn count_policy(&mut self, by: isize) {
        let before = self.policies;
        self.policies = before.saturating_add_signed(by);
        if (before == 0) != (self.policies == 0) {
            self.changed.get_or_insert_default().strays = true;
        }
    }

    /// Whether an attachment of `cluster` may be a pod of an unknown cluster; `labelled`: a Pod object has its labels.
    pub(super) fn is_stray(&self, cluster: &Cluster, attachment: &PodInterface, labelled: bool) -> bool {
        self.policies > 0 && cluster.is_flat() && attachment.uid.is_some() && !labelled
    }

    pub(super) fn take_changed(&mut self) -> Option<Changed> {
        self.changed.take()
    }

    /// The cluster of the mesh's node `name`.
    pub(super) fn of(&self, name: &Arc<str>) -> Option<&ClusterNode> {
        self.nodes.get(name)
    }

    /// The name in the mesh of a node of a cluster.
    pub(super) fn node(&self, cluster: &Cluster, name: &Arc<str>) -> Option<&Arc<str>> {
        self.names.get(&(cluster.clone(), Arc::clone(name)))
    }

    /// Whether a pod of `cluster` may have `address`.
    pub(super) fn may_have(&self, cluster: &Cluster, address: IpAddr) -> bool {
        match self.subnets.get(address).and_then(|node| self.nodes.get(node)) {
            Some(node) => node.cluster == *cluster,
            None => cluster.is_flat(),
        }
    }
}
