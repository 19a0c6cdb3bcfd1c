//! Compiled rules of a class of pods in one direction, indexed by peer.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{
    SourceAliases,
    named_ports::NamedPorts,
    policy_name::PolicyId,
    selection::ALL_PODS,
    storage::{find_mark, marked},
};
use crate::object::{Action, Block, PortMatch, Ports, Protocol};

/// Who a rule speaks of, with selectors interned.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum PeerRef {
    /// Anyone, also what is no pod.
    Anyone,
    /// The pods of a set.
    Set(u32),
    /// Addresses of the Nodes of a set.
    Nodes(u32),
    /// Addresses.
    Block(Arc<Block>),
}

/// The blocks among `peers`.
pub(crate) fn blocks(peers: &[PeerRef]) -> impl Iterator<Item = &Block> {
    peers.iter().filter_map(|peer| match peer {
        PeerRef::Block(block) => Some(block.as_ref()),
        PeerRef::Anyone | PeerRef::Set(_) | PeerRef::Nodes(_) => None,
    })
}

/// Ports that a rule admits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum PortSet {
    /// Every protocol.
    Any,
    One(PortMatch),
    Many(Arc<[PortMatch]>),
}

impl PortSet {
    pub(crate) fn new(ports: Option<&[PortMatch]>) -> Self {
        match ports {
            None => Self::Any,
            Some([one]) => Self::One(one.clone()),
            Some(many) => Self::Many(many.into()),
        }
    }

    pub(crate) fn as_slice(&self) -> Option<&[PortMatch]> {
        match self {
            Self::Any => None,
            Self::One(one) => Some(std::slice::from_ref(one)),
            Self::Many(many) => Some(many),
        }
    }

    /// Whether a flow to a destination with these named ports is admitted.
    pub(crate) fn admits(&self, to: &FlowTarget<'_>) -> bool {
        match self.as_slice() {
            None => true,
            Some(list) => to.port.is_some_and(|port| list.iter().any(|entry| admits(entry, port, to.named))),
        }
    }
}

fn admits(entry: &PortMatch, (protocol, port): (Protocol, u16), named: NamedPorts<'_>) -> bool {
    if entry.protocol.is_some_and(|wanted| wanted != protocol) {
        return false;
    }
    match &entry.ports {
        Ports::All => true,
        Ports::Range(first, last) => (*first..=*last).contains(&port),
        Ports::Named(name) => named.get().iter().any(|n| n.port == port && n.protocol == protocol && n.name == *name),
    }
}

/// The destination's side of a flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlowTarget<'c> {
    /// Protocol and port, where the protocol has ports that policies name.
    pub(crate) port: Option<(Protocol, u16)>,
    /// The destination pod's named ports.
    pub(crate) named: NamedPorts<'c>,
}

/// The other end of a flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerView<'c> {
    pub(crate) address: IpAddr,
    /// What it also counts as: the overlay address of another node, where it is the source.
    pub(crate) aliases: Option<&'c SourceAliases>,
    pub(crate) kind: PeerKind<'c>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum PeerKind<'c> {
    /// No pod: only blocks speak of it, and sets of Nodes, marks of which it is in.
    Address { nodes: &'c [u32] },
    /// A pod: the sets that its namespace and itself are in, sorted marks.
    Pod { namespace: &'c [u32], own: &'c [u32] },
    /// A pod of which nothing is known, not even its namespace: it is in the set of all pods, and may be in any other. It
    /// may be a node, too, that is not known yet.
    UnknownPod,
}

impl PeerView<'_> {
    /// Whether it is in the set, and whether it only may be.
    pub(crate) fn in_set(&self, set: u32) -> Option<bool> {
        match self.kind {
            PeerKind::Address { .. } => None,
            PeerKind::UnknownPod => Some(set != ALL_PODS),
            PeerKind::Pod { namespace, own } => find_mark(namespace, set).or_else(|| find_mark(own, set)),
        }
    }

    /// Whether it is a Node of the set, and whether it only may be.
    fn in_nodes(&self, set: u32) -> Option<bool> {
        match self.kind {
            PeerKind::Address { nodes } => find_mark(nodes, set),
            PeerKind::UnknownPod => Some(true),
            PeerKind::Pod { .. } => None,
        }
    }

    /// Whether `peer` speaks of it, and whether it only may.
    pub(crate) fn is(&self, peer: &PeerRef) -> Option<bool> {
        match peer {
            PeerRef::Anyone => Some(false),
            PeerRef::Set(set) => self.in_set(*set),
            PeerRef::Nodes(set) => self.in_nodes(*set),
            PeerRef::Block(block) => self.in_block(block),
        }
    }

    /// Whether it is in the block, and whether it only may be.
    fn in_block(&self, block: &Block) -> Option<bool> {
        match self.aliases {
            None => block.contains(self.address).then_some(false),
            Some(aliases) => aliases.in_block(self.address, block),
        }
    }
}

/// One way in which a rule may match.
#[derive(Debug, Clone)]
pub(crate) struct RuleEntry {
    /// Position of the rule among those of its tier; lower ones come first.
    pub(crate) order: u32,
    pub(crate) policy: PolicyId,
    pub(crate) rule: u16,
    pub(crate) action: Action,
    /// Whether the policy selects the subject is not known.
    pub(crate) unsure: bool,
    pub(crate) ports: PortSet,
}

/// Entries by peer.
#[derive(Debug, Default)]
pub(crate) struct PeerRules {
    anyone: Box<[RuleEntry]>,
    /// Sorted by set; each with its entries' range in `entries`.
    sets: Box<[(u32, u32, u32)]>,
    entries: Box<[RuleEntry]>,
    /// By set of Nodes.
    nodes: Box<[(u32, RuleEntry)]>,
    blocks: Option<Box<Blocks>>,
}

impl PeerRules {
    pub(crate) fn new(list: Vec<(PeerRef, RuleEntry)>) -> Self {
        let mut anyone = Vec::new();
        let mut by_set = Vec::new();
        let mut nodes = Vec::new();
        let mut blocks = Vec::new();
        for (peer, entry) in list {
            match peer {
                PeerRef::Anyone => anyone.push(entry),
                PeerRef::Set(set) => by_set.push((set, entry)),
                PeerRef::Nodes(set) => nodes.push((set, entry)),
                PeerRef::Block(block) => blocks.push((block, entry)),
            }
        }
        by_set.sort_by_key(|(set, entry)| (*set, entry.order));
        let mut sets: Vec<(u32, u32, u32)> = Vec::new();
        let mut entries = Vec::with_capacity(by_set.len());
        for (set, entry) in by_set {
            let at = entries.len() as u32;
            entries.push(entry);
            match sets.last_mut() {
                Some((last, _, end)) if *last == set => *end = at + 1,
                _ => sets.push((set, at, at + 1)),
            }
        }
        Self {
            anyone: anyone.into(),
            sets: sets.into(),
            entries: entries.into(),
            nodes: nodes.into(),
            blocks: (!blocks.is_empty()).then(|| Box::new(Blocks::new(blocks))),
        }
    }

    /// Gives `visit` every group of entries that speak of `peer`, and whether they only may, until it is done.
    pub(crate) fn visit<'t>(&'t self, peer: &PeerView<'_>, mut visit: impl FnMut(&'t [RuleEntry], bool) -> bool) {
        if !self.anyone.is_empty() && visit(&self.anyone, false) {
            return;
        }
        let entries = |(start, end): (u32, u32)| &self.entries[start as usize..end as usize];
        match peer.kind {
            PeerKind::Address { .. } => {}
            PeerKind::Pod { namespace, own } if self.sets.len() > 4 * (namespace.len() + own.len()) + 8 => {
                for mark in namespace.iter().chain(own) {
                    let (set, unknown) = marked(*mark);
                    if let Ok(at) = self.sets.binary_search_by_key(&set, |(set, ..)| *set) {
                        let (_, start, end) = self.sets[at];
                        if visit(entries((start, end)), unknown) {
                            return;
                        }
                    }
                }
            }
            PeerKind::Pod { .. } | PeerKind::UnknownPod => {
                for (set, start, end) in &self.sets {
                    if let Some(unknown) = peer.in_set(*set)
                        && visit(entries((*start, *end)), unknown)
                    {
                        return;
                    }
                }
            }
        }
        for (set, entry) in &self.nodes {
            if let Some(unsure) = peer.in_nodes(*set)
                && visit(std::slice::from_ref(entry), unsure)
            {
                return;
            }
        }
        if let Some(blocks) = &self.blocks {
            blocks.visit(peer, |entry, unsure| visit(std::slice::from_ref(entry), unsure));
        }
    }

    /// Any entry that surely speaks of this peer and port.
    pub(crate) fn any(&self, peer: &PeerView<'_>, to: &FlowTarget<'_>) -> Option<&RuleEntry> {
        let mut found = None;
        self.visit(peer, |entries, unknown| {
            if !unknown {
                found = entries.iter().find(|entry| entry.ports.admits(to));
            }
            found.is_some()
        });
        found
    }

    /// The first entry from position `from` on that does something to this peer and port, and whether it only may.
    pub(crate) fn first(&self, from: u32, peer: &PeerView<'_>, to: &FlowTarget<'_>) -> Option<(&RuleEntry, bool)> {
        let mut first: Option<(&RuleEntry, bool)> = None;
        self.visit(peer, |entries, unknown| {
            for entry in entries {
                let unsure = unknown || entry.unsure;
                // Of one rule's peers one that surely matches counts more than one that may.
                let before = |(best, open): (&RuleEntry, bool)| (entry.order, unsure) < (best.order, open);
                let better = entry.order >= from && first.is_none_or(before);
                if better && !(unsure && entry.action == Action::Accept) && entry.ports.admits(to) {
                    first = Some((entry, unsure));
                }
            }
            false
        });
        first
    }
}

/// Entries by blocks of addresses: for each length of prefix that occurs, the blocks of that length. However many there
/// are, a look-up is one search for each length.
#[derive(Debug)]
struct Blocks {
    lengths: Box<[Length]>,
}

#[derive(Debug)]
struct Length {
    v4: bool,
    bits: u8,
    /// Sorted by network; several entries may have one.
    blocks: Box<[(IpAddr, Arc<Block>, RuleEntry)]>,
}

impl Blocks {
    fn new(list: Vec<(Arc<Block>, RuleEntry)>) -> Self {
        let mut list: Vec<_> = list.into_iter().map(|(block, entry)| (block.cidr.network(), block, entry)).collect();
        list.sort_by_key(|(network, block, entry)| (network.is_ipv6(), block.cidr.prefix_len(), *network, entry.order));
        let mut lengths: Vec<(bool, u8, Vec<_>)> = Vec::new();
        for item in list {
            let (v4, bits) = (item.0.is_ipv4(), item.1.cidr.prefix_len());
            match lengths.last_mut() {
                Some((family, length, blocks)) if (*family, *length) == (v4, bits) => blocks.push(item),
                _ => lengths.push((v4, bits, vec![item])),
            }
        }
        let lengths = lengths.into_iter().map(|(v4, bits, blocks)| Length { v4, bits, blocks: blocks.into() });
        Self { lengths: lengths.collect() }
    }

    /// Gives `visit` every entry whose block `peer` is in, and whether it only may be, until it is done; some twice, where
    /// several addresses count.
    fn visit<'t>(&'t self, peer: &PeerView<'_>, mut visit: impl FnMut(&'t RuleEntry, bool) -> bool) {
        let Some(aliases) = peer.aliases else {
            self.visit_by(peer.address, peer, &mut visit);
            return;
        };
        for address in aliases.all(peer.address) {
            if self.visit_by(address, peer, &mut visit) {
                return;
            }
        }
    }

    /// The same for the entries whose blocks hold `address`. Returns whether `visit` is done.
    fn visit_by<'t>(
        &'t self,
        address: IpAddr,
        peer: &PeerView<'_>,
        visit: &mut impl FnMut(&'t RuleEntry, bool) -> bool,
    ) -> bool {
        for length in self.lengths.iter().filter(|length| length.v4 == address.is_ipv4()) {
            let Ok(net) = IpNet::new(address, length.bits) else { continue };
            let network = net.network();
            let first = length.blocks.partition_point(|(at, ..)| *at < network);
            for (_, block, entry) in length.blocks[first..].iter().take_while(|(at, ..)| *at == network) {
                if let Some(unsure) = peer.in_block(block)
                    && visit(entry, unsure)
                {
                    return true;
                }
            }
        }
        false
    }
}

/// What the NetworkPolicies that select a class of pods, or a whole namespace, say in one direction.
#[derive(Debug)]
pub(crate) struct Union {
    /// A policy that isolates, and whether it only may select the pods.
    pub(crate) isolates: (PolicyId, bool),
    pub(crate) allows: PeerRules,
    /// All of them, to explain: sorted, with whether they only may.
    pub(crate) policies: Box<[(PolicyId, bool)]>,
}

/// What the ClusterNetworkPolicies say in one direction.
#[derive(Debug)]
pub(crate) struct Tiers {
    pub(crate) admin: PeerRules,
    pub(crate) baseline: PeerRules,
    /// All of them, in order, with whether they only may select.
    pub(crate) policies: Box<[(PolicyId, bool)]>,
}
