//! The underlay addresses that other nodes' overlay addresses also count as, as the source of a flow.
//!
//! ```text
//! proven      the endpoint that WireGuard authenticated from, the address that a direct path's echoes come over
//!             − those that another node publishes or is authenticated from, this node included
//! published   endpoints and interface addresses of the node's record; and all proven ones
//!
//! both        − the mesh's networks, − external peers' allowedIPs
//! ```
//!
//! Other records' claims count as written, even if the records are invalid: a node that makes another node's or an
//! external peer's record invalid does not gain its addresses.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use cow_map::CowMap;
use etcd_schema::{NodeId, NodeRecord, OutsidePeer, PeerName, Removed};
use ipnet::IpNet;
use mesh::{
    address::host,
    records::{Record, Records},
    topology::{NodePeer, PeerId, Topology},
};
use policy::engine::SourceAliases;
use prefix_trie::joint::JointPrefixSet;

/// Addresses that are proven to be where nodes send from, shared ones among them.
pub type ProvenAddresses = CowMap<PeerId, Arc<[IpAddr]>>;

/// Another node as the source of flows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSource {
    /// Its overlay addresses.
    pub overlay: Vec<IpAddr>,
    /// The additional addresses of its overlay addresses.
    pub aliases: Arc<SourceAliases>,
}

/// Keeps the sources up to date; a change costs as much as its scope.
#[derive(Debug, Default)]
pub(super) struct Sources {
    inputs: SourceInputs,
    /// Prefixes that cannot contain a node's address: the mesh's networks and external peers' claims.
    foreign: JointPrefixSet<IpNet>,
    /// The claimants of each address: by record, or by authenticated packets from there.
    claims: HashMap<IpAddr, BTreeSet<PeerId>>,
    sources: CowMap<PeerId, Arc<NodeSource>>,
}

#[derive(Debug, Default, Clone)]
struct SourceInputs {
    nodes: CowMap<NodeId, Record<NodeRecord>>,
    removed: CowMap<NodeId, Record<Removed>>,
    peers: CowMap<PeerName, Record<OutsidePeer>>,
    networks: Vec<IpNet>,
    members: CowMap<PeerId, Arc<NodePeer>>,
    proven: ProvenAddresses,
    own: Option<(NodeId, Vec<IpAddr>)>,
}

impl Sources {
    /// The sources as of `records`, whose topology is `topology`, at the node `id` that has the addresses `own` on its
    /// underlay.
    pub(super) fn update(
        &mut self,
        records: &Records,
        topology: &Topology,
        proven: &ProvenAddresses,
        (id, own): (&NodeId, &[IpAddr]),
    ) -> CowMap<PeerId, Arc<NodeSource>> {
        let inputs = SourceInputs {
            nodes: records.nodes.clone(),
            removed: records.removed.clone(),
            peers: records.peers.clone(),
            networks: topology.networks().collect(),
            members: topology.members.clone(),
            proven: proven.clone(),
            own: Some((id.clone(), own.to_vec())),
        };
        let before = std::mem::replace(&mut self.inputs, inputs);
        let mut concerned = self.inputs.changed(&before);
        for owner in concerned.clone() {
            let (was, is) = (before.claimed(&owner), self.inputs.claimed(&owner));
            for address in was.symmetric_difference(&is) {
                let claimants = self.claims.entry(*address).or_default();
                // Those it was shared with, or is shared with now.
                concerned.extend(claimants.iter().cloned());
                match is.contains(address) {
                    true => claimants.insert(owner.clone()),
                    false => claimants.remove(&owner),
                };
                if claimants.is_empty() {
                    self.claims.remove(address);
                }
            }
        }
        if self.inputs.networks != before.networks || self.inputs.peers != before.peers {
            let outside = self.inputs.peers.values().flat_map(|record| &record.value.allowed_ips);
            self.foreign = JointPrefixSet::default();
            for net in self.inputs.networks.iter().chain(outside) {
                self.foreign.insert(net.trunc());
            }
            concerned.extend(self.inputs.members.keys().cloned());
        }
        for owner in concerned {
            let source = self.source(&owner).map(Arc::new);
            self.sources.set(owner, source);
        }
        self.sources.clone()
    }

    fn source(&self, owner: &PeerId) -> Option<NodeSource> {
        let member = self.inputs.members.get(owner)?;
        let may_be_a_nodes = |address: &IpAddr| is_global(*address) && !self.foreign.is_covered(&host(*address));
        let alone = |address: &IpAddr| {
            self.claims.get(address).is_none_or(|claimants| claimants.iter().all(|claimant| claimant == owner))
        };
        let proven = self.inputs.proven.get(owner).into_iter().flat_map(|proven| proven.iter().copied());
        let published = self.inputs.claimed(owner).into_iter().filter(may_be_a_nodes).collect();
        let proven = proven.filter(may_be_a_nodes).filter(alone).collect();
        Some(NodeSource { overlay: member.overlay().collect(), aliases: Arc::new(SourceAliases { proven, published }) })
    }
}

impl SourceInputs {
    /// Peers with a difference.
    fn changed(&self, before: &Self) -> BTreeSet<PeerId> {
        let nodes = self.nodes.changes(&before.nodes).into_iter().chain(self.removed.changes(&before.removed));
        let owners = self.members.changes(&before.members).into_iter().chain(self.proven.changes(&before.proven));
        let mut changed: BTreeSet<PeerId> = nodes.cloned().map(PeerId::Node).chain(owners.cloned()).collect();
        if self.own != before.own {
            let ids = self.own.iter().chain(&before.own).map(|(id, _)| PeerId::Node(id.clone()));
            changed.extend(ids);
        }
        changed
    }

    /// Addresses that a node publishes, is authenticated from, or has.
    fn claimed(&self, owner: &PeerId) -> BTreeSet<IpAddr> {
        let mut claimed: BTreeSet<IpAddr> =
            self.proven.get(owner).into_iter().flat_map(|of| of.iter().copied()).collect();
        match owner {
            PeerId::Node(id) => {
                if let Some(record) = self.nodes.get(id).filter(|_| !self.removed.contains_key(id)) {
                    claimed.extend(record.value.endpoints.iter().map(|endpoint| endpoint.ip().to_canonical()));
                    claimed.extend(record.value.addresses.iter().map(|net| net.addr().to_canonical()));
                }
                let own = self.own.iter().filter(|(own, _)| own == id);
                claimed.extend(own.flat_map(|(_, addresses)| addresses));
            }
            PeerId::Lease(_) => {
                let member = self.members.get(owner);
                claimed
                    .extend(member.into_iter().flat_map(|member| &member.endpoints).map(|at| at.ip().to_canonical()));
            }
            PeerId::Outside(_) => {}
        }
        claimed
    }
}

/// Whether it means the same machine everywhere on the underlay.
fn is_global(address: IpAddr) -> bool {
    let on_link = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(on_link || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use etcd_schema::{NetworkConfig, SubnetLease};
    use keys::PrivateKey;
    use mesh::resolver::TopologyResolver;
    use proptest::prelude::*;

    use super::*;

    const CONFIG: &str =
        r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48", "IPv6SubnetLen": 64}"#;
    const OWN: &str = "192.0.2.99";

    /// What nodes and external peers say, and where nodes are heard from. This node is `me`.
    #[derive(Debug, Default, Clone)]
    struct Fixture {
        records: Records,
        proven: ProvenAddresses,
    }

    impl Fixture {
        fn new() -> Self {
            let mut world = Self::default();
            world.records.config = Some(record(1, NetworkConfig::parse(CONFIG.as_bytes()).unwrap()));
            world
        }

        /// Node `n` has the subnet 10.244.n.0/24, and publishes these addresses.
        fn node(&mut self, n: u8, published: &[&str]) {
            let node = NodeRecord {
                name: format!("node-{n}").parse().unwrap(),
                site: Some("east".parse().unwrap()),
                cluster: etcd_schema::Cluster::default(),
                public_key: PrivateKey::from_bytes([n; 32]).public(),
                next_public_key: None,
                listen_port: 51820,
                endpoints: published.iter().take(1).map(|ip| (ip.parse::<IpAddr>().unwrap(), 51820).into()).collect(),
                addresses: published.iter().skip(1).map(|ip| host(ip.parse().unwrap())).collect(),
                vteps: Vec::new(),
                version: String::new(),
                extra: serde_json::Map::new(),
            };
            let id = format!("n{n}");
            self.records.nodes.insert(id.parse().unwrap(), record(n.into(), node));
            let lease = SubnetLease::parse(format!(r#"{{"Node": "{id}"}}"#).as_bytes()).unwrap();
            self.records.subnets.insert(format!("10.244.{n}.0-24").parse().unwrap(), record(n.into(), lease));
        }

        fn heard(&mut self, n: u8, from: &[&str]) {
            let from: Arc<[IpAddr]> = from.iter().map(|ip| ip.parse().unwrap()).collect();
            self.proven.set(owner(n), Some(from));
        }

        fn outside(&mut self, name: &str, key: u8, allowed: &str) {
            let peer = OutsidePeer {
                public_key: PrivateKey::from_bytes([key; 32]).public(),
                allowed_ips: vec![allowed.parse().unwrap()],
                endpoint: None,
                preshared_key: None,
                persistent_keepalive: None,
                site: None,
                extra: serde_json::Map::new(),
            };
            self.records.peers.insert(name.parse().unwrap(), record(100, peer));
        }

        fn update(&self, sources: &mut Sources, resolver: &mut TopologyResolver) -> CowMap<PeerId, Arc<NodeSource>> {
            resolver.apply(&self.records);
            let own = [OWN.parse().unwrap()];
            sources.update(&self.records, resolver.topology(), &self.proven, (&"me".parse().unwrap(), &own))
        }

        fn fresh(&self) -> CowMap<PeerId, Arc<NodeSource>> {
            self.update(&mut Sources::default(), &mut TopologyResolver::new("me".parse().unwrap()))
        }

        /// What node `n` counts as for what allows, and for what denies.
        fn of(&self, n: u8) -> (Vec<String>, Vec<String>) {
            let texts = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect();
            let SourceAliases { proven, published } = &*self.fresh()[&owner(n)].aliases;
            (texts(proven), texts(published))
        }
    }

    fn record<T>(create_revision: i64, value: T) -> Record<T> {
        Record { value: Arc::new(value), create_revision, mod_revision: create_revision, lease: None, retained: None }
    }

    fn owner(n: u8) -> PeerId {
        PeerId::Node(format!("n{n}").parse().unwrap())
    }

    fn assert_of(world: &Fixture, n: u8, proven: &[&str], published: &[&str]) {
        let (is_proven, is_published) = world.of(n);
        assert_eq!(
            (is_proven, is_published),
            (proven.iter().map(ToString::to_string).collect(), published.iter().map(ToString::to_string).collect())
        );
    }

    #[test]
    fn a_node_counts_as_where_it_is_heard_from_and_for_denials_as_what_it_says() {
        let mut world = Fixture::new();
        world.node(1, &["192.0.2.1", "10.9.0.1"]);
        assert_of(&world, 1, &[], &["10.9.0.1", "192.0.2.1"]);
        // Behind a NAT: it does not know itself where it is heard from.
        world.heard(1, &["203.0.113.5", "10.9.0.1"]);
        assert_of(&world, 1, &["203.0.113.5", "10.9.0.1"], &["10.9.0.1", "192.0.2.1", "203.0.113.5"]);
        assert_eq!(world.fresh()[&owner(1)].overlay, ["10.244.1.0".parse::<IpAddr>().unwrap()]);
        world.heard(1, &[]);
        assert_of(&world, 1, &[], &["10.9.0.1", "192.0.2.1"]);
    }

    #[test]
    fn an_address_that_nodes_share_lets_none_of_them_in() {
        let mut world = Fixture::new();
        world.node(1, &["192.0.2.1"]);
        world.node(2, &[]);
        world.heard(1, &["203.0.113.5"]);
        world.heard(2, &["203.0.113.5"]);
        assert_of(&world, 1, &[], &["192.0.2.1", "203.0.113.5"]);
        assert_of(&world, 2, &[], &["203.0.113.5"]);
        world.heard(2, &[]);
        assert_of(&world, 1, &["203.0.113.5"], &["192.0.2.1", "203.0.113.5"]);
    }

    /// It can send from there, and says so or not: the address is another's.
    #[test]
    fn what_another_node_publishes_is_not_had_by_being_heard_from_there() {
        let mut world = Fixture::new();
        world.node(1, &["192.0.2.1"]);
        world.node(2, &["192.0.2.2"]);
        for (published, address) in [("192.0.2.2", "192.0.2.1"), ("192.0.2.1", "192.0.2.1"), (OWN, OWN)] {
            world.node(2, &[published]);
            world.heard(2, &[address]);
            assert!(world.of(2).0.is_empty(), "{published} {address}");
        }
        // Also where the other's record does not hold: this one, which is older, has taken its key.
        world.node(2, &["192.0.2.2"]);
        world.heard(2, &["192.0.2.1"]);
        let mut first = world.records.nodes[&"n1".parse::<NodeId>().unwrap()].clone();
        first.create_revision = 50;
        Arc::make_mut(&mut first.value).public_key = PrivateKey::from_bytes([2; 32]).public();
        world.records.nodes.insert("n1".parse().unwrap(), first);
        assert!(world.of(2).0.is_empty());
        // One that was removed claims nothing.
        let removed = Removed { name: None, public_keys: Vec::new(), time: String::new() };
        world.records.removed.insert("n1".parse().unwrap(), record(60, removed));
        assert_of(&world, 2, &["192.0.2.1"], &["192.0.2.1", "192.0.2.2"]);
    }

    #[test]
    fn what_outside_peers_and_the_mesh_claim_counts_for_no_node() {
        let mut world = Fixture::new();
        world.outside("office", 9, "198.51.100.0/24");
        world.node(1, &["192.0.2.1", "198.51.100.7"]);
        world.heard(1, &["198.51.100.7", "10.244.3.4", "fe80::1", "127.0.0.1"]);
        assert_of(&world, 1, &[], &["192.0.2.1"]);
        // An endpoint there makes the peer's record invalid, and the address no more the node's.
        world.node(1, &["198.51.100.7"]);
        let mut resolver = TopologyResolver::new("me".parse().unwrap());
        resolver.apply(&world.records);
        assert!(resolver.topology().outside.is_empty());
        assert_of(&world, 1, &[], &[]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Node(u8, Vec<&'static str>),
        Gone(u8),
        Heard(u8, Vec<&'static str>),
        Outside(Option<&'static str>),
        Removed(u8, bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        let address = || proptest::sample::select(vec!["192.0.2.1", "192.0.2.2", OWN, "10.244.2.2", "198.51.100.7"]);
        let addresses = move || proptest::collection::vec(address(), 0..3);
        prop_oneof![
            (1..4u8, addresses()).prop_map(|(n, addresses)| Step::Node(n, addresses)),
            (1..4u8).prop_map(Step::Gone),
            (1..4u8, addresses()).prop_map(|(n, addresses)| Step::Heard(n, addresses)),
            proptest::sample::select(vec![None, Some("198.51.100.0/24"), Some("192.0.2.0/31")]).prop_map(Step::Outside),
            (1..4u8, any::<bool>()).prop_map(|(n, removed)| Step::Removed(n, removed)),
        ]
    }

    proptest! {
        /// Kept up to date, they are what they are from nothing.
        #[test]
        fn a_change_at_a_time_comes_to_the_same(steps in proptest::collection::vec(step(), 1..25)) {
            let mut world = Fixture::new();
            let (mut sources, mut resolver) = (Sources::default(), TopologyResolver::new("me".parse().unwrap()));
            for step in steps {
                match step {
                    Step::Node(n, addresses) => world.node(n, &addresses),
                    Step::Gone(n) => drop(world.records.nodes.remove(&format!("n{n}").parse::<NodeId>().unwrap())),
                    Step::Heard(n, from) => world.heard(n, &from),
                    Step::Outside(Some(net)) => world.outside("office", 9, net),
                    Step::Outside(None) => drop(world.records.peers.remove(&"office".parse::<PeerName>().unwrap())),
                    Step::Removed(n, removed) => {
                        let id: NodeId = format!("n{n}").parse().unwrap();
                        let value = Removed { name: None, public_keys: Vec::new(), time: String::new() };
                        world.records.removed.set(id, removed.then(|| record(70, value)));
                    }
                }
                world.records.revision += 1;
                prop_assert_eq!(world.update(&mut sources, &mut resolver), world.fresh());
            }
        }
    }
}
