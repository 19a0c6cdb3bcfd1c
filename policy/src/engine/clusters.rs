//! Which nodes of the mesh are nodes of which cluster, and so which pods may have which address.
//!
//! An address in a subnet of a cluster's node is a pod's of that cluster, or an unknown pod's. Everywhere else only pods
//! of no cluster have addresses. So no object of one cluster says anything about another's pods.
//!
//! A node whose Node object is gone, or was never copied, is in no cluster, and may run pods of one all the same. While
//! policies are of clusters or name them in selectors, its attachments are therefore pods only if Kubernetes did not make them, or a Pod object of
//! no cluster has their UID; else their addresses are those of unknown pods, whom every policy may select.

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
    /// Lengths of prefix that occur, by family, each with how often.
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

    /// The value of the longest subnet that `address` is in.
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

/// What changed since it was last taken.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) subnets: Subnets<()>,
    /// By their names in the mesh.
    pub(super) nodes: HashSet<Arc<str>>,
    /// By their names in their clusters.
    pub(super) names: HashSet<(Cluster, Arc<str>)>,
    /// What attachments of nodes in no cluster are.
    pub(super) strays: bool,
}

/// The nodes of clusters.
#[derive(Debug, Default)]
pub(super) struct Clusters {
    /// By their names in the mesh.
    nodes: HashMap<Arc<str>, ClusterNode>,
    /// Names in the mesh, by those in clusters.
    names: HashMap<(Cluster, Arc<str>), Arc<str>>,
    /// Whose each subnet is: names in the mesh.
    subnets: Subnets<Arc<str>>,
    /// Number of policies that name clusters.
    policies: usize,
    changed: Option<Changed>,
}

impl Clusters {
    /// Notes what the mesh's node `name` is to a cluster; `None`: it is in none.
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
        // What another node has taken over meanwhile stays that one's.
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

    /// Notes that a policy that names clusters came or, with -1, went.
    pub(super) fn count_policy(&mut self, by: isize) {
        let before = self.policies;
        self.policies = before.saturating_add_signed(by);
        if (before == 0) != (self.policies == 0) {
            self.changed.get_or_insert_default().strays = true;
        }
    }

    /// Whether an attachment of `cluster` may be a pod of one that is not known here; `labelled`: a Pod object has its
    /// labels.
    pub(super) fn is_stray(&self, cluster: &Cluster, attachment: &PodInterface, labelled: bool) -> bool {
        self.policies > 0 && cluster.is_flat() && attachment.uid.is_some() && !labelled
    }

    pub(super) fn take_changed(&mut self) -> Option<Changed> {
        self.changed.take()
    }

    /// What the mesh's node `name` is to a cluster.
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
