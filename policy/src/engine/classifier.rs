//! Immutable snapshot of all policies and pods that judges single flows.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{
    ClassRules, Compiled, NamespaceRules, PodInfo, SourceAliases,
    named_ports::NamedPorts,
    nodes::NodeAddresses,
    policy_name::{PolicyId, PolicyName},
    rules::{FlowTarget, PeerKind, PeerRules, PeerView, Tiers, Union},
    storage::{AddressTable, Chunked, Owner},
};
use crate::object::{Action, Protocol};

/// A flow, as its first packet shows it: after any rewriting of the destination, before any of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The address that opens it.
    pub source: IpAddr,
    /// The address that it is opened to.
    pub destination: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Destination port, for protocols with ports.
    pub port: Option<u16>,
}

/// The end of a flow whose policies are evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The destination's policies.
    Ingress = 0,
    /// The source's policies.
    Egress = 1,
}

/// The verdict of one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Verdict {
    /// Whether the flow is allowed.
    pub allowed: bool,
    /// Why.
    pub cause: Cause,
}

/// The reason of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The end is not a pod, so it has no policies.
    NoPod,
    /// Both ends are the same pod.
    Itself,
    /// The flow comes from the pod's own node.
    OwnNode,
    /// No policy applies in this direction.
    NoPolicy,
    /// This rule matched; rules are counted from 0.
    Rule {
        /// The rule's policy.
        policy: PolicyId,
        /// Index among its rules in this direction.
        rule: u16,
        /// Its action.
        action: Action,
    },
    /// The pod is isolated, by this policy among others, and no rule matches.
    Isolated {
        /// The policy.
        policy: PolicyId,
        /// Whether it selects the pod depends on unknown labels.
        unknown: bool,
    },
    /// The pod is unknown, and there are policies in this direction.
    UnknownPod,
}

/// The verdicts of both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// Of the source.
    pub egress: Verdict,
    /// Of the destination.
    pub ingress: Verdict,
}

impl Connection {
    /// Whether both ends allow it.
    #[must_use]
    pub const fn allowed(&self) -> bool {
        self.egress.allowed && self.ingress.allowed
    }
}

/// The owner of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A pod.
    Pod(Arc<PodInfo>),
    /// An unknown pod: an address of the mesh's networks without a known owner.
    UnknownPod,
    /// A node.
    Node(Arc<str>),
    /// An address outside the mesh.
    Outside,
}

/// The compiled world at one revision.
#[derive(Debug)]
pub struct Classifier {
    pub(super) generation: u64,
    pub(super) world_changed: u64,
    pub(super) revision: u64,
    pub(super) addresses: AddressTable,
    pub(super) pods: Chunked<Option<Arc<PodInfo>>>,
    pub(super) pods_changed: Chunked<u64>,
    pub(super) namespaces: Chunked<NamespaceRules>,
    pub(super) classes: Chunked<ClassRules>,
    pub(super) policies: Chunked<Option<Arc<Compiled>>>,
    pub(super) node_addresses: Arc<HashMap<IpAddr, Arc<str>>>,
    pub(super) node_sets: Arc<NodeAddresses>,
    pub(super) sources: Arc<HashMap<IpAddr, Arc<SourceAliases>>>,
    pub(super) networks: Arc<[IpNet]>,
    pub(super) policies_per_direction: [usize; 2],
}

impl Classifier {
    /// Number of this classifier among those of its engine.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The revision that the caller gave to this state.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// The verdict of one end of a new flow by its policies alone. Callers know by the packet's path whether it comes
    /// from the node itself.
    #[must_use]
    pub fn verdict(&self, side: Side, flow: &Flow) -> Verdict {
        let (subject, peer) = match side {
            Side::Ingress => (flow.destination, flow.source),
            Side::Egress => (flow.source, flow.destination),
        };
        let subject = match self.locate(subject) {
            Located::Pod(owner) => owner,
            Located::Unknown if self.policies_per_direction[side as usize] > 0 => {
                return Verdict { allowed: false, cause: Cause::UnknownPod };
            }
            Located::Unknown | Located::Address => return Verdict { allowed: true, cause: Cause::NoPod },
        };
        let peer_owner = self.locate(peer);
        if peer_owner == Located::Pod(subject) {
            return Verdict { allowed: true, cause: Cause::Itself };
        }
        let Some(rules) = self.rules(subject) else {
            return Verdict { allowed: true, cause: Cause::NoPolicy };
        };
        let peer = self.view(side, peer, peer_owner);
        let named = self.named_ports(match side {
            Side::Ingress => Located::Pod(subject),
            Side::Egress => peer_owner,
        });
        let to = FlowTarget { port: port(flow), named };
        decide(rules, side, &peer, &to)
    }

    /// The first generation since which the verdict on `flow` is unchanged, provided that its addresses kept their
    /// owners.
    #[must_use]
    pub fn unchanged_since(&self, side: Side, flow: &Flow) -> u64 {
        let (subject, peer) = match side {
            Side::Ingress => (flow.destination, flow.source),
            Side::Egress => (flow.source, flow.destination),
        };
        let Located::Pod(subject) = self.locate(subject) else { return self.generation };
        let peer = match self.locate(peer) {
            Located::Pod(peer) => self.pod_changed(peer),
            Located::Unknown | Located::Address => 0,
        };
        self.world_changed.max(self.pod_changed(subject)).max(peer)
    }

    /// Generation of the last change of a pod or of the policies that apply to it.
    fn pod_changed(&self, owner: Owner) -> u64 {
        let Some((class, namespace)) = self.rules(owner) else { return self.generation };
        let pod = self.pods_changed.get(owner.pod).copied().unwrap_or(self.generation);
        pod.max(class.changed).max(namespace.changed)
    }

    /// The verdicts of both ends of a new connection. A pod's own node reaches it regardless of policies.
    #[must_use]
    pub fn connection(&self, flow: &Flow) -> Connection {
        let egress = self.verdict(Side::Egress, flow);
        let mut ingress = self.verdict(Side::Ingress, flow);
        if self.is_own_node(flow) {
            ingress = Verdict { allowed: true, cause: Cause::OwnNode };
        }
        Connection { egress, ingress }
    }

    /// The owner of an address.
    #[must_use]
    pub fn end(&self, address: IpAddr) -> End {
        match self.locate(address) {
            Located::Pod(owner) => match self.pods.get(owner.pod) {
                Some(Some(pod)) => End::Pod(Arc::clone(pod)),
                _ => End::UnknownPod,
            },
            Located::Unknown => End::UnknownPod,
            Located::Address => match self.node_addresses.get(&address) {
                Some(node) => End::Node(Arc::clone(node)),
                None => End::Outside,
            },
        }
    }

    /// A number that almost certainly changes with the pod that owns the address; 0 without a pod.
    #[must_use]
    pub(crate) fn owner_stamp(&self, address: IpAddr) -> u32 {
        match self.addresses.get(address).and_then(|owner| self.pods.get(owner.pod)?.as_ref()) {
            Some(pod) => pod.stamp,
            None => 0,
        }
    }

    /// The name of a policy of this classifier.
    #[must_use]
    pub fn policy(&self, id: PolicyId) -> Option<&PolicyName> {
        Some(&self.compiled(id)?.name)
    }

    /// The name of a rule, if it has one.
    #[must_use]
    pub fn rule_name(&self, id: PolicyId, side: Side, rule: u16) -> Option<&str> {
        self.compiled(id)?.sides[side as usize].as_ref()?.get(usize::from(rule))?.name.as_deref()
    }

    pub(super) fn compiled(&self, id: PolicyId) -> Option<&Arc<Compiled>> {
        self.policies.get(id.0)?.as_ref()
    }

    fn is_own_node(&self, flow: &Flow) -> bool {
        match (self.locate(flow.source), self.end(flow.destination)) {
            (Located::Address, End::Pod(pod)) => {
                pod.node.is_some() && self.node_addresses.get(&flow.source) == pod.node.as_ref()
            }
            _ => false,
        }
    }

    pub(super) fn locate(&self, address: IpAddr) -> Located {
        if let Some(owner) = self.addresses.get(address) {
            return Located::Pod(owner);
        }
        let mesh = self.networks.iter().any(|network| network.contains(&address));
        if mesh && !self.node_addresses.contains_key(&address) { Located::Unknown } else { Located::Address }
    }

    pub(super) fn rules(&self, owner: Owner) -> Option<(&ClassRules, &NamespaceRules)> {
        let class = self.classes.get(owner.class)?;
        Some((class, self.namespaces.get(class.namespace)?))
    }

    /// The end of a flow opposite to `side`.
    pub(super) fn view(&self, side: Side, address: IpAddr, located: Located) -> PeerView<'_> {
        let kind = match located {
            Located::Pod(owner) => match self.rules(owner) {
                Some((class, namespace)) => PeerKind::Pod { namespace: &namespace.sets, own: &class.sets },
                None => PeerKind::UnknownPod,
            },
            Located::Unknown => PeerKind::UnknownPod,
            Located::Address => {
                let nodes = (side == Side::Egress).then(|| self.node_sets.get(&address)).flatten();
                PeerKind::Address { nodes: nodes.map(Box::as_ref).unwrap_or_default() }
            }
        };
        let aliases = match side {
            Side::Ingress => self.sources.get(&address).map(Arc::as_ref),
            Side::Egress => None,
        };
        PeerView { address, aliases, kind }
    }

    pub(super) fn named_ports(&self, located: Located) -> NamedPorts<'_> {
        match located {
            Located::Pod(owner) => NamedPorts::of(&self.pods, owner.pod),
            Located::Unknown | Located::Address => NamedPorts::NONE,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Located {
    Pod(Owner),
    /// In the mesh's networks, without a known owner.
    Unknown,
    Address,
}

pub(super) fn port(flow: &Flow) -> Option<(Protocol, u16)> {
    Protocol::from_number(flow.protocol).zip(flow.port)
}

fn decide(
    (class, namespace): (&ClassRules, &NamespaceRules),
    side: Side,
    peer: &PeerView<'_>,
    to: &FlowTarget<'_>,
) -> Verdict {
    let side = side as usize;
    let tiers = class.tiers[side].as_deref();
    if let Some(Tiers { admin, .. }) = tiers
        && let Some(verdict) = tier(admin, true, peer, to)
    {
        return verdict;
    }
    let unions = [class.unions[side].as_deref(), namespace.unions[side].as_deref()];
    if let Some(verdict) = union(unions, peer, to) {
        return verdict;
    }
    if let Some(Tiers { baseline, .. }) = tiers
        && let Some(verdict) = tier(baseline, false, peer, to)
    {
        return verdict;
    }
    Verdict { allowed: true, cause: Cause::NoPolicy }
}

/// The verdict of a tier; `None` leaves the flow to the next tier.
///
/// If a Pass only may match, both the rules behind it and the next tiers must accept. So an Accept behind it counts as
/// another Pass.
fn tier(table: &PeerRules, admin: bool, peer: &PeerView<'_>, to: &FlowTarget<'_>) -> Option<Verdict> {
    let mut from = 0;
    let mut passed = false;
    while let Some((entry, unsure)) = table.first(from, peer, to) {
        let cause = Cause::Rule { policy: entry.policy, rule: entry.rule, action: entry.action };
        match entry.action {
            Action::Deny => return Some(Verdict { allowed: false, cause }),
            Action::Accept if passed => return None,
            Action::Accept => return Some(Verdict { allowed: true, cause }),
            Action::Pass if !unsure => return (!admin && !passed).then_some(Verdict { allowed: true, cause }),
            Action::Pass => {
                passed = admin;
                from = entry.order + 1;
            }
        }
    }
    None
}

fn union(unions: [Option<&Union>; 2], peer: &PeerView<'_>, to: &FlowTarget<'_>) -> Option<Verdict> {
    for union in unions.into_iter().flatten() {
        if let Some(entry) = union.allows.any(peer, to) {
            let cause = Cause::Rule { policy: entry.policy, rule: entry.rule, action: Action::Accept };
            return Some(Verdict { allowed: true, cause });
        }
    }
    let isolating = unions.into_iter().flatten().map(|union| union.isolates);
    let (policy, unknown) = isolating.min_by_key(|(_, unknown)| *unknown)?;
    Some(Verdict { allowed: false, cause: Cause::Isolated { policy, unknown } })
}
