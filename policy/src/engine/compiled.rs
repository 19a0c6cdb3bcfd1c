//! Policies as the engine compiles them, and what namespaces and classes of pods share of them.

use std::sync::Arc;

use super::{
    ObjectName,
    nodes::NodeSets,
    policy_name::PolicyName,
    rules::{PeerRef, PortSet, Tiers, Union},
    selection::Selection,
};
use crate::object::{Action, ClusterPeer, ClusterRule, NAMESPACE_NAME, PolicyPeer, PortMatch, Rule, Selector, Tier};

/// A policy with its selectors interned.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) name: PolicyName,
    /// Of equal tier and priority, names decide.
    pub(super) order: (Option<Tier>, u16),
    pub(super) subject: u32,
    /// By [`Side`](super::Side): `None` where it says nothing.
    pub(crate) sides: [Option<Vec<CompiledRule>>; 2],
    /// Never used twice.
    pub(super) version: u32,
}

impl Compiled {
    /// `None`: a NetworkPolicy.
    pub(crate) const fn tier(&self) -> Option<Tier> {
        self.order.0
    }

    /// The sets that it uses: of its peers, and its subject.
    pub(super) fn sets(&self) -> impl Iterator<Item = u32> {
        let sets = self.peers().filter_map(|peer| match peer {
            PeerRef::Set(set) => Some(*set),
            _ => None,
        });
        sets.chain([self.subject])
    }

    /// The sets of Nodes among its peers.
    pub(super) fn node_sets(&self) -> impl Iterator<Item = u32> {
        self.peers().filter_map(|peer| match peer {
            PeerRef::Nodes(set) => Some(*set),
            _ => None,
        })
    }

    fn peers(&self) -> impl Iterator<Item = &PeerRef> {
        self.sides.iter().flatten().flatten().flat_map(|rule| &rule.peers)
    }
}

#[derive(Debug)]
pub(crate) struct CompiledRule {
    pub(crate) name: Option<Box<str>>,
    pub(crate) action: Action,
    pub(crate) peers: Vec<PeerRef>,
    pub(crate) ports: PortSet,
}

/// What the pods of a namespace share.
#[derive(Debug, Clone, Default)]
pub(crate) struct NamespaceRules {
    pub(crate) sets: Arc<[u32]>,
    /// By [`Side`](super::Side).
    pub(crate) unions: [Option<Arc<Union>>; 2],
    /// The generation that they are of.
    pub(crate) changed: u64,
}

impl NamespaceRules {
    pub(super) fn judges_as(&self, other: &Self) -> bool {
        self.sets == other.sets && same(&self.unions, &other.unions)
    }
}

/// What the pods of a class share beyond that.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClassRules {
    pub(crate) namespace: u32,
    pub(crate) sets: Arc<[u32]>,
    /// By [`Side`](super::Side).
    pub(crate) unions: [Option<Arc<Union>>; 2],
    pub(crate) tiers: [Option<Arc<Tiers>>; 2],
    /// The generation that they are of.
    pub(crate) changed: u64,
}

impl ClassRules {
    pub(super) fn judges_as(&self, other: &Self) -> bool {
        (self.namespace, &self.sets) == (other.namespace, &other.sets)
            && same(&self.unions, &other.unions)
            && same(&self.tiers, &other.tiers)
    }
}

/// Whether compiled forms are shared: those of the same policies in the same versions are.
fn same<T>(ones: &[Option<Arc<T>>; 2], others: &[Option<Arc<T>>; 2]) -> bool {
    let pointer = |one: &Option<Arc<T>>| one.as_ref().map(Arc::as_ptr);
    ones.each_ref().map(pointer) == others.each_ref().map(pointer)
}

pub(super) fn compile(rule: &Rule, name: &ObjectName, selection: &mut Selection) -> CompiledRule {
    let peers = match &rule.peers {
        None => vec![PeerRef::Anyone],
        Some(peers) => peers
            .iter()
            .map(|peer| match peer {
                PolicyPeer::Block(block) => PeerRef::Block(Arc::new(block.clone())),
                PolicyPeer::Pods { namespaces, pods } => {
                    let namespaces = match namespaces {
                        None => own_namespace(name),
                        Some(namespaces) => namespaces.peers_of(name.cluster.as_str()),
                    };
                    PeerRef::Set(selection.acquire_set(&namespaces, pods.clone()))
                }
            })
            .collect(),
    };
    CompiledRule { name: None, action: Action::Accept, peers, ports: ports(rule.ports.as_deref()) }
}

/// The namespace of a policy; of a policy without a cluster the namespaces of that name in all clusters.
pub(super) fn own_namespace(policy: &ObjectName) -> Selector {
    Selector::labels([(NAMESPACE_NAME, &*policy.namespace)]).in_cluster(policy.cluster.as_str())
}

pub(super) fn compile_cluster(
    rule: &ClusterRule,
    cluster: &str,
    selection: &mut Selection,
    nodes: &mut NodeSets,
) -> CompiledRule {
    let peers = match &rule.peers {
        None => vec![PeerRef::Anyone],
        Some(peers) => peers
            .iter()
            .map(|peer| match peer {
                ClusterPeer::Network(block) => PeerRef::Block(Arc::new(block.clone())),
                ClusterPeer::Nodes(selector) => PeerRef::Nodes(nodes.acquire(&selector.in_cluster(cluster))),
                ClusterPeer::Pods { namespaces, pods } => {
                    PeerRef::Set(selection.acquire_set(&namespaces.peers_of(cluster), pods.clone()))
                }
            })
            .collect(),
    };
    CompiledRule { name: rule.name.clone(), action: rule.action, peers, ports: ports(rule.ports.as_deref()) }
}

fn ports(ports: Option<&[PortMatch]>) -> PortSet {
    PortSet::new(ports)
}
