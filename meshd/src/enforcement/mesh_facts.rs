//! What enforcement needs to know of the mesh itself.

use std::{net::IpAddr, sync::Arc};

use etcd_schema::{NodeId, NodeName};
use ipnet::IpNet;

use crate::{
    mesh::snapshot::{Member, Owner, Snapshot},
    versioned_map::VersionedMap,
};

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
    pub nodes: VersionedMap<Owner, Arc<NodeFacts>>,
    /// Nothing is refused, what would be is reported.
    pub audit: bool,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name, as pods name it.
    pub name: Arc<str>,
    /// Its own addresses: overlay and underlay.
    pub addresses: Vec<IpAddr>,
    /// Its subnets: where its pods' addresses lie.
    pub prefixes: Vec<IpNet>,
}

/// Keeps the facts up to date with the mesh.
#[derive(Debug, Default)]
pub struct FactsOfMesh {
    members: VersionedMap<Owner, Arc<Member>>,
    nodes: VersionedMap<Owner, Arc<NodeFacts>>,
}

impl FactsOfMesh {
    /// What `snapshot` says, to the node `id` called `name` that has `addresses` on its underlay. Costs what differs from
    /// the snapshot before.
    pub fn of(
        &mut self,
        snapshot: &Snapshot,
        id: &NodeId,
        name: &NodeName,
        addresses: impl Iterator<Item = IpAddr>,
    ) -> MeshFacts {
        for owner in snapshot.members.changes(&self.members) {
            let node = snapshot.members.get(owner).map(|member| Arc::new(NodeFacts::of(member)));
            self.nodes.set(owner.clone(), node);
        }
        self.members = snapshot.members.clone();
        let overlay = snapshot.own_overlay();
        let own: Vec<IpNet> = snapshot.own_prefixes().collect();
        let me = NodeFacts {
            name: name.as_str().into(),
            addresses: overlay.iter().copied().chain(addresses).collect(),
            prefixes: own.clone(),
        };
        self.nodes.set(Owner::Node(id.clone()), Some(Arc::new(me)));
        MeshFacts {
            networks: snapshot.networks().collect(),
            own,
            overlay,
            nodes: self.nodes.clone(),
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
    pub fn is_in_networks(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// The node whose attachment it may be: the one with this identity, if all of these lie in its subnets.
    #[must_use]
    pub fn owner(&self, id: &NodeId, addresses: &[IpAddr]) -> Option<&NodeFacts> {
        let node = self.nodes.get(&Owner::Node(id.clone()))?;
        let inside = |address: &IpAddr| node.prefixes.iter().any(|prefix| prefix.contains(address));
        addresses.iter().all(inside).then_some(&**node)
    }
}
