//! Facts about the mesh that enforcement needs.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use cow_map::CowMap;
use etcd_schema::{Cluster, NodeId, NodeName, NodeRecord, PeerName};
use ipnet::IpNet;
use mesh::{
    records::{Record, Records},
    topology::{ExternalPeer, NodePeer, OwnRecord, PeerId, Topology},
};

use super::sources::{NodeSource, ProvenAddresses, Sources};

/// The mesh, as far as policies are concerned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MeshFacts {
    /// The mesh's networks.
    pub networks: Vec<IpNet>,
    /// Clusters with networks of their own.
    pub clusters: BTreeSet<Cluster>,
    /// This node's own subnets.
    pub own: Vec<IpNet>,
    /// This node's overlay addresses: packets to them are for a process here, or subject to NAT and judged by nftables.
    pub overlay: Vec<IpAddr>,
    /// All nodes, this one included.
    pub nodes: CowMap<PeerId, Arc<NodeFacts>>,
    /// The addresses that other nodes' overlay addresses also count as.
    pub sources: CowMap<PeerId, Arc<NodeSource>>,
    /// Prefixes of external peers.
    pub outside: CowMap<PeerName, Arc<[IpNet]>>,
    /// Audit mode: denied packets pass and are reported.
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeFacts {
    /// Its name, as pods name it; with its id where an older node has that name.
    pub name: Arc<str>,
    /// Its own addresses: overlay and underlay.
    pub addresses: Vec<IpAddr>,
    /// Its subnets: where its pods' addresses lie.
    pub prefixes: Arc<[IpNet]>,
    /// Its published addresses; `None` without a record.
    pub published: Option<Published>,
}

/// A node's published addresses, whether or not another node publishes the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The name in its record.
    pub name: Arc<str>,
    /// Its overlay addresses, and those of the underlay in its record.
    pub addresses: Arc<[IpAddr]>,
    /// The cluster that its record names.
    pub cluster: Cluster,
}

/// Keeps the facts up to date with the mesh.
#[derive(Debug, Default)]
pub struct FactsOfMesh {
    members: CowMap<PeerId, Arc<NodePeer>>,
    records: CowMap<NodeId, Record<NodeRecord>>,
    nodes: CowMap<PeerId, Arc<NodeFacts>>,
    peers: CowMap<PeerName, Arc<ExternalPeer>>,
    outside: CowMap<PeerName, Arc<[IpNet]>>,
    sources: Sources,
}

impl FactsOfMesh {
    /// The facts for the node `id`, named `name`, with underlay `addresses`, from `records` and their `topology`, and
    /// the `proven` addresses of other nodes. Costs as much as the difference from the last call.
    pub fn of(
        &mut self,
        (records, topology): (&Records, &Topology),
        proven: &ProvenAddresses,
        (id, name): (&NodeId, &NodeName),
        addresses: &[IpAddr],
    ) -> MeshFacts {
        let sources = self.sources.update(records, topology, proven, (id, addresses));
        let mut changed: BTreeSet<PeerId> = topology.members.changes(&self.members).into_iter().cloned().collect();
        changed.extend(records.nodes.changes(&self.records).into_iter().cloned().map(PeerId::Node));
        for owner in changed {
            let node = topology.members.get(&owner).map(|member| Arc::new(NodeFacts::of(member, records, &owner)));
            self.nodes.set(owner, node);
        }
        self.members = topology.members.clone();
        self.records = records.nodes.clone();
        for name in topology.outside.changes(&self.peers) {
            let prefixes = topology.outside.get(name).map(|peer| peer.allowed_ips.as_slice().into());
            self.outside.set(name.clone(), prefixes);
        }
        self.peers = topology.outside.clone();
        let overlay = topology.own_overlay();
        let own: Vec<IpNet> = topology.own_prefixes().collect();
        let name = match &topology.own_record {
            OwnRecord::Holds { name } => name,
            OwnRecord::Missing | OwnRecord::Refused { .. } => name.as_str(),
        };
        let me = NodeFacts {
            name: name.into(),
            addresses: overlay.iter().chain(addresses).copied().collect(),
            prefixes: own.clone().into(),
            published: published(records, &PeerId::Node(id.clone()), &overlay),
        };
        self.nodes.set(PeerId::Node(id.clone()), Some(Arc::new(me)));
        MeshFacts {
            networks: topology.networks().collect(),
            clusters: topology.network.iter().flat_map(|config| config.clusters.keys().cloned()).collect(),
            own,
            overlay,
            nodes: self.nodes.clone(),
            sources,
            outside: self.outside.clone(),
            audit: topology.network.as_ref().is_some_and(|config| config.policy_mode == etcd_schema::PolicyMode::Audit),
        }
    }
}

/// The published addresses of a node with these overlay addresses.
fn published(records: &Records, owner: &PeerId, overlay: &[IpAddr]) -> Option<Published> {
    let PeerId::Node(id) = owner else { return None };
    let record = records.nodes.get(id)?;
    let underlay = record.value.addresses.iter().map(|net| net.addr().to_canonical());
    Some(Published {
        name: record.value.name.as_str().into(),
        addresses: overlay.iter().copied().chain(underlay).collect(),
        cluster: record.value.cluster.clone(),
    })
}

impl NodeFacts {
    fn of(member: &NodePeer, records: &Records, owner: &PeerId) -> Self {
        let overlay: Vec<IpAddr> = member.overlay().collect();
        Self {
            name: member.name.as_str().into(),
            prefixes: member.prefixes().collect(),
            published: published(records, owner, &overlay),
            addresses: overlay.into_iter().chain(member.addresses.iter().map(IpNet::addr)).collect(),
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

    /// The mesh prefix or address that `prefix` overlaps, in words: no pod may send from it.
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
        let node = self.nodes.get(&PeerId::Node(id.clone()))?;
        let inside = |address: &IpAddr| node.prefixes.iter().any(|prefix| prefix.contains(address));
        addresses.iter().all(inside).then_some(node)
    }
}

#[cfg(test)]
mod tests {
    use etcd_schema::{NetworkConfig, SubnetLease};
    use keys::PrivateKey;
    use mesh::resolver::TopologyResolver;

    use super::*;

    fn record<T>(create_revision: i64, value: T) -> Record<T> {
        Record { value: Arc::new(value), create_revision, mod_revision: create_revision, lease: None, retained: None }
    }

    /// Nodes `n1` and `n2` of one site, which both publish 192.0.2.1.
    fn records() -> Records {
        let config = NetworkConfig::parse(br#"{"Network": "10.244.0.0/16"}"#).unwrap();
        let mut records = Records { config: Some(record(1, config)), ..Records::default() };
        for n in [1, 2] {
            let node = NodeRecord {
                name: "worker".parse().unwrap(),
                site: Some("east".parse().unwrap()),
                cluster: Cluster::default(),
                public_key: PrivateKey::from_bytes([n; 32]).public(),
                next_public_key: None,
                listen_port: 51820,
                endpoints: Vec::new(),
                addresses: vec!["192.0.2.1/24".parse().unwrap()],
                vteps: Vec::new(),
                version: String::new(),
                extra: serde_json::Map::new(),
            };
            records.nodes.insert(format!("n{n}").parse().unwrap(), record(n.into(), node));
            let lease = SubnetLease::parse(format!(r#"{{"Node": "n{n}"}}"#).as_bytes()).unwrap();
            records.subnets.insert(format!("10.244.{n}.0-24").parse().unwrap(), record(n.into(), lease));
        }
        records
    }

    #[test]
    fn nodes_publish_the_same_in_their_own_eyes_and_in_those_of_others() {
        let records = records();
        for me in ["n1", "n2", "n3"] {
            let id: NodeId = me.parse().unwrap();
            let mut resolver = TopologyResolver::new(id.clone());
            resolver.apply(&records);
            // An address that this node has, and does not publish.
            let own = ["198.51.100.1".parse().unwrap()];
            let name = "worker".parse().unwrap();
            let resolver = (&records, resolver.topology());
            let facts = FactsOfMesh::default().of(resolver, &ProvenAddresses::default(), (&id, &name), &own);
            for n in [1, 2] {
                let node = &facts.nodes[&PeerId::Node(format!("n{n}").parse().unwrap())];
                let published = node.published.as_ref().unwrap();
                let addresses: Vec<String> = published.addresses.iter().map(ToString::to_string).collect();
                assert_eq!(
                    (&*published.name, addresses),
                    ("worker", vec![format!("10.244.{n}.0"), "192.0.2.1".into()])
                );
            }
        }
    }
}
