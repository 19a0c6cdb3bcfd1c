//! Facts about the mesh that enforcement needs.

use std::{net::IpAddr, sync::Arc};

use cow_map::CowMap;
use etcd_schema::{NodeId, NodeName, PeerName};
use ipnet::IpNet;
use mesh::{
    records::View,
    snapshot::{Member, Outside, OwnRecord, Owner, Snapshot},
};

use super::sources::{NodeSource, ProvenAddresses, Sources};

/// The mesh, as far as policies are concerned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MeshFacts {
    /// The mesh's networks.
    pub networks: Vec<IpNet>,
    /// This node's own subnets.
    pub own: Vec<IpNet>,
    /// This node's overlay addresses: what comes for them is for a process here, or rewritten, and then nftables' to judge.
    pub overlay: Vec<IpAddr>,
    /// All nodes, this one included.
    pub nodes: CowMap<Owner, Arc<NodeFacts>>,
    /// What the other nodes' overlay addresses also count as.
    pub sources: CowMap<Owner, Arc<NodeSource>>,
    /// Prefixes of outside peers.
    pub outside: CowMap<PeerName, Arc<[IpNet]>>,
    /// Nothing is refused, what would be is reported.
    pub audit: bool,
}

impl MeshFacts {
    /// This node's name, once it has a subnet.
    pub(super) fn own_node(&self) -> Option<&Arc<str>> {
        let is_own = |node: &&Arc<NodeFacts>| node.prefixes.iter().any(|prefix| self.own.contains(prefix));
        self.nodes.values().find(is_own).map(|node| &node.name)
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name, as pods name it; with its id where an older node has that name.
    pub name: Arc<str>,
    /// Its own addresses: overlay and underlay.
    pub addresses: Vec<IpAddr>,
    /// Its subnets: where its pods' addresses lie.
    pub prefixes: Arc<[IpNet]>,
}

/// Keeps the facts up to date with the mesh.
#[derive(Debug, Default)]
pub struct FactsOfMesh {
    members: CowMap<Owner, Arc<Member>>,
    nodes: CowMap<Owner, Arc<NodeFacts>>,
    peers: CowMap<PeerName, Arc<Outside>>,
    outside: CowMap<PeerName, Arc<[IpNet]>>,
    sources: Sources,
}

impl FactsOfMesh {
    /// What `snapshot`, the picture of `view`, says to the node `id` called `name` that has `addresses` on its underlay,
    /// where others are `proven` to send from. Costs what differs from the last time.
    pub fn of(
        &mut self,
        (view, snapshot): (&View, &Snapshot),
        proven: &ProvenAddresses,
        (id, name): (&NodeId, &NodeName),
        addresses: &[IpAddr],
    ) -> MeshFacts {
        let sources = self.sources.update(view, snapshot, proven, (id, addresses));
        for owner in snapshot.members.changes(&self.members) {
            let node = snapshot.members.get(owner).map(|member| Arc::new(NodeFacts::of(member)));
            self.nodes.set(owner.clone(), node);
        }
        self.members = snapshot.members.clone();
        for name in snapshot.outside.changes(&self.peers) {
            let prefixes = snapshot.outside.get(name).map(|peer| peer.allowed_ips.as_slice().into());
            self.outside.set(name.clone(), prefixes);
        }
        self.peers = snapshot.outside.clone();
        let overlay = snapshot.own_overlay();
        let own: Vec<IpNet> = snapshot.own_prefixes().collect();
        let name = match &snapshot.own_record {
            OwnRecord::Holds { name } => name,
            OwnRecord::Missing | OwnRecord::Refused { .. } => name.as_str(),
        };
        let me = NodeFacts {
            name: name.into(),
            addresses: overlay.iter().chain(addresses).copied().collect(),
            prefixes: own.clone().into(),
        };
        self.nodes.set(Owner::Node(id.clone()), Some(Arc::new(me)));
        MeshFacts {
            networks: snapshot.networks().collect(),
            own,
            overlay,
            nodes: self.nodes.clone(),
            sources,
            outside: self.outside.clone(),
            audit: snapshot.network.as_ref().is_some_and(|config| config.policy_mode == etcd_schema::PolicyMode::Audit),
        }
    }
}

impl NodeFacts {
    fn of(member: &Member) -> Self {
        Self {
            name: member.name.as_str().into(),
            addresses: member.overlay().chain(member.addresses.iter().map(IpNet::addr)).collect(),
            prefixes: member.prefixes().collect(),
        }
    }
}

impl MeshFacts {
    /// Whether an address lies in this node's own subnets.
    #[must_use]
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.iter().any(|prefix| prefix.contains(&address))
    }

    /// Whether an address lies in the mesh's networks.
    #[must_use]
    pub(crate) fn is_in_networks(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// What of the mesh a prefix overlaps that no pod may send from besides its own addresses, for people.
    #[must_use]
    pub fn source_conflict(&self, prefix: &IpNet) -> Option<String> {
        let overlaps = |net: &IpNet| net.contains(prefix) || prefix.contains(net);
        if let Some(network) = self.networks.iter().chain(&self.own).find(|net| overlaps(net)) {
            return Some(format!("{network}, a mesh network"));
        }
        for (name, prefixes) in self.outside.iter() {
            if let Some(claimed) = prefixes.iter().find(|net| overlaps(net)) {
                return Some(format!("{claimed} of external peer {name}"));
            }
        }
        for node in self.nodes.values() {
            if let Some(address) = node.addresses.iter().find(|address| prefix.contains(*address)) {
                return Some(format!("{address}, an address of node {}", node.name));
            }
        }
        None
    }

    /// The node whose attachment it may be: the one with this identity, if all of these lie in its subnets.
    #[must_use]
    pub fn owner(&self, id: &NodeId, addresses: &[IpAddr]) -> Option<&Arc<NodeFacts>> {
        let node = self.nodes.get(&Owner::Node(id.clone()))?;
        let inside = |address: &IpAddr| node.prefixes.iter().any(|prefix| prefix.contains(address));
        addresses.iter().all(inside).then_some(node)
    }
}
