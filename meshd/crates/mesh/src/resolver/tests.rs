use std::net::IpAddr;

use etcd_schema::{NetworkConfig, NodeRecord, OutsidePeer, PublicKey, Removed};
use proptest::prelude::*;

use super::*;
use crate::{
    address::overlap,
    records::{Record, Retained},
    topology::{NodePeer, OwnRecord},
};

const CONFIG: &str =
    r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48", "IPv6SubnetLen": 64}"#;

/// Records put one after another: each gets the next revision.
#[derive(Default)]
struct Fixture {
    records: Records,
}

impl Fixture {
    fn new() -> Self {
        let mut world = Self::default();
        world.records.config = Some(world.versioned(NetworkConfig::parse(CONFIG.as_bytes()).unwrap()));
        world
    }

    fn versioned<T>(&mut self, value: T) -> Record<T> {
        self.records.revision += 1;
        let revision = self.records.revision;
        Record {
            value: Arc::new(value),
            create_revision: revision,
            mod_revision: revision,
            lease: None,
            retained: None,
        }
    }

    fn node(&mut self, id: &str, key: u8) -> &mut NodeRecord {
        let record = NodeRecord {
            name: format!("name-{id}").parse().unwrap(),
            site: Some("east".parse().unwrap()),
            cluster: etcd_schema::Cluster::default(),
            public_key: public_key(key),
            next_public_key: None,
            listen_port: 51820,
            endpoints: vec![format!("192.0.2.{key}:51820").parse().unwrap()],
            addresses: vec![format!("192.0.2.{key}/24").parse().unwrap()],
            vteps: Vec::new(),
            version: "0.1.0".to_owned(),
            extra: serde_json::Map::new(),
        };
        let versioned = self.versioned(record);
        let id: NodeId = id.parse().unwrap();
        let nodes = &mut self.records.nodes;
        nodes.insert(id.clone(), versioned);
        Arc::make_mut(&mut nodes.get_mut(&id).unwrap().value)
    }

    fn subnet(&mut self, key: &str, node: &str) {
        let value = SubnetLease::parse(format!(r#"{{"Node": "{node}"}}"#).as_bytes()).unwrap();
        let versioned = self.versioned(value);
        self.records.subnets.insert(key.parse().unwrap(), versioned);
    }

    fn peer(&mut self, name: &str, key: u8, allowed: &[&str]) {
        let versioned = self.versioned(OutsidePeer {
            public_key: public_key(key),
            allowed_ips: allowed.iter().map(|net| net.parse().unwrap()).collect(),
            endpoint: None,
            preshared_key: None,
            persistent_keepalive: None,
            site: None,
            extra: serde_json::Map::new(),
        });
        self.records.peers.insert(name.parse().unwrap(), versioned);
    }

    fn removed(&mut self, id: &str, key: u8) {
        let versioned = self.versioned(Removed {
            name: None,
            public_keys: vec![public_key(key)],
            time: "2026-01-01T00:00:00Z".to_owned(),
        });
        self.records.removed.insert(id.parse().unwrap(), versioned);
    }

    fn seen_by(&self, me: &str) -> Topology {
        let mut resolver = TopologyResolver::new(me.parse().unwrap());
        resolver.apply(&self.records);
        resolver.topology().clone()
    }
}

fn public_key(seed: u8) -> PublicKey {
    keys::PrivateKey::from_bytes([seed; 32]).public()
}

fn codes(topology: &Topology) -> Vec<&'static str> {
    topology.problems.iter().map(|problem| problem.code.as_str()).collect()
}

fn member<'a>(topology: &'a Topology, id: &str) -> &'a NodePeer {
    &topology.members[&PeerId::Node(id.parse().unwrap())]
}

#[test]
fn a_node_and_its_subnet_make_a_member() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.subnet("10.244.3.0-24&fd42:244:0:3::-64", "aa");
    world.node("bb", 2);
    world.subnet("10.244.4.0-24", "bb");
    let topology = world.seen_by("bb");
    assert_eq!(codes(&topology), [""; 0]);
    let aa = member(&topology, "aa");
    assert_eq!(aa.keys, [public_key(1)]);
    assert_eq!(aa.prefixes().map(|net| net.to_string()).collect::<Vec<_>>(), ["10.244.3.0/24", "fd42:244:0:3::/64"]);
    assert_eq!(topology.own_prefixes().map(|net| net.to_string()).collect::<Vec<_>>(), ["10.244.4.0/24"]);
    assert_eq!(topology.own_overlay(), ["10.244.4.0".parse::<IpAddr>().unwrap()]);
}

#[test]
fn the_elder_holds_a_prefix_that_two_claim_nested_too() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.node("bb", 2);
    world.subnet("10.244.8.0-24", "bb");
    world.subnet("10.244.0.0-20", "aa");
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["prefix_conflict"]);
    assert!(!topology.members.contains_key(&PeerId::Node("aa".parse().unwrap())));
    assert_eq!(member(&topology, "bb").subnets.len(), 1);
}

#[test]
fn a_retained_value_yields_to_a_valid_younger_one() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.node("bb", 2);
    world.subnet("10.244.0.0-20", "aa");
    let key = "10.244.0.0-20".parse().unwrap();
    world.records.subnets.get_mut(&key).unwrap().retained = Some(Retained::Unreadable);
    assert_eq!(codes(&world.seen_by("cc")), [""; 0], "alone it stands");
    world.subnet("10.244.8.0-24", "bb");
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["prefix_conflict"]);
    assert_eq!(member(&topology, "bb").subnets.len(), 1);
}

#[test]
fn a_key_belongs_to_one_node_its_next_one_too() {
    let mut world = Fixture::new();
    world.node("aa", 1).next_public_key = Some(public_key(9));
    world.node("bb", 9);
    world.subnet("10.244.3.0-24", "aa");
    world.subnet("10.244.4.0-24", "bb");
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["key_conflict"]);
    assert_eq!(member(&topology, "aa").keys, [public_key(1), public_key(9)]);
    assert!(member(&topology, "bb").keys.is_empty(), "its prefix stays its own, unreachable");
}

#[test]
fn an_endpoint_inside_the_network_costs_that_node_alone() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.node("bb", 2).endpoints = vec!["10.244.7.7:51820".parse().unwrap()];
    world.subnet("10.244.3.0-24", "aa");
    world.subnet("10.244.4.0-24", "bb");
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["inside_network"]);
    assert!(!member(&topology, "aa").keys.is_empty());
    assert!(member(&topology, "bb").keys.is_empty());
}

#[test]
fn a_node_made_again_under_its_old_name_is_a_full_peer_by_its_id() {
    let mut world = Fixture::new();
    world.node("bb", 1).name = "east-1".parse().unwrap();
    world.subnet("10.244.3.0-24", "bb");
    // Its id sorts before the older one's: only the order in etcd counts.
    world.node("aa", 2).name = "east-1".parse().unwrap();
    world.subnet("10.244.4.0-24", "aa");
    world.node("cc", 3).name = "east-1".parse().unwrap();
    world.subnet("10.244.5.0-24", "cc");
    for me in ["aa", "bb", "cc", "dd"] {
        let topology = world.seen_by(me);
        assert_eq!(codes(&topology), ["name_conflict"; 2]);
        for (problem, id) in topology.problems.iter().zip(["aa", "cc"]) {
            assert!(problem.cause.contains(&format!("`east-1 ({id})`")), "{problem:?}");
            assert!(problem.remedy.starts_with("meshctl node remove bb "), "{problem:?}");
        }
        for (id, name) in [("aa", "east-1 (aa)"), ("bb", "east-1"), ("cc", "east-1 (cc)")] {
            if id == me {
                assert_eq!(topology.own_record, OwnRecord::Holds { name: name.to_owned() });
                assert_eq!(topology.own_subnets.len(), 1);
            } else {
                assert_eq!(member(&topology, id).name, name);
                assert!(!member(&topology, id).keys.is_empty());
            }
        }
    }
    world.removed("bb", 1);
    world.records.nodes.remove(&"bb".parse().unwrap());
    world.records.subnets.remove(&"10.244.3.0-24".parse().unwrap());
    let topology = world.seen_by("dd");
    assert_eq!(member(&topology, "aa").name, "east-1", "the next oldest has the name");
    assert_eq!(member(&topology, "cc").name, "east-1 (cc)");
}

#[test]
fn a_node_knows_whether_its_own_record_holds() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    assert_eq!(world.seen_by("aa").own_record, OwnRecord::Holds { name: "name-aa".to_owned() });
    assert_eq!(world.seen_by("bb").own_record, OwnRecord::Missing);
    world.node("bb", 1);
    let OwnRecord::Refused { cause } = world.seen_by("bb").own_record else { panic!("its key is another's") };
    assert!(cause.contains("belongs to nodes/aa"), "{cause}");
    let mut resolver = TopologyResolver::new("bb".parse().unwrap());
    resolver.apply(&world.records);
    world.records.nodes.remove(&"aa".parse().unwrap());
    resolver.apply(&world.records);
    assert_eq!(resolver.topology().own_record, OwnRecord::Holds { name: "name-bb".to_owned() });
}

#[test]
fn an_interface_address_belongs_to_one_node_of_a_site() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    let address = world.records.nodes.values().next().unwrap().value.addresses.clone();
    world.node("bb", 2).addresses = address.clone();
    let far = world.node("cc", 3);
    far.addresses = address.clone();
    far.site = Some("west".parse().unwrap());
    for (subnet, node) in [("10.244.3.0-24", "aa"), ("10.244.4.0-24", "bb"), ("10.244.5.0-24", "cc")] {
        world.subnet(subnet, node);
    }
    let topology = world.seen_by("dd");
    assert_eq!(codes(&topology), ["address_conflict"]);
    assert_eq!(member(&topology, "aa").addresses, address);
    assert!(member(&topology, "bb").addresses.is_empty());
    assert!(!member(&topology, "bb").keys.is_empty(), "it is still reached through the tunnel");
    assert_eq!(member(&topology, "cc").addresses, address);
}

#[test]
fn each_published_address_is_claimed_and_held_by_itself() {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    let mut world = Fixture::new();
    let all = nets(&["192.0.2.1/24", "10.0.0.1/24", "2001:db8::1/64"]);
    world.node("aa", 1).addresses.clone_from(&all);
    world.node("bb", 2).addresses = nets(&["10.0.0.1/24", "10.0.0.2/24", "2001:db8::1/64", "2001:db8::2/64"]);
    world.subnet("10.244.3.0-24", "aa");
    world.subnet("10.244.4.0-24", "bb");
    let topology = world.seen_by("dd");
    assert_eq!(codes(&topology), ["address_conflict"; 2]);
    assert_eq!(member(&topology, "aa").addresses, all);
    assert_eq!(member(&topology, "bb").addresses, nets(&["10.0.0.2/24", "2001:db8::2/64"]), "the others stay its own");
}

#[test]
fn a_removed_node_and_its_key_are_refused_everywhere() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.subnet("10.244.3.0-24", "aa");
    world.removed("aa", 1);
    world.node("bb", 1);
    world.subnet("10.244.4.0-24", "bb");
    world.peer("laptop", 1, &["10.9.0.1/32"]);
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["key_conflict", "key_conflict", "node_removed"]);
    assert!(topology.outside.is_empty());
    assert!(topology.members.values().all(|member| member.keys.is_empty()));
}

#[test]
fn an_outside_peer_may_not_overlap_the_network_a_node_or_another_peer() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.peer("inside", 11, &["10.244.200.0/24"]);
    world.peer("around", 12, &["10.0.0.0/8"]);
    world.peer("underlay", 13, &["192.0.2.0/24"]);
    world.peer("first", 14, &["10.9.0.0/24"]);
    world.peer("second", 15, &["10.9.0.7/32"]);
    let topology = world.seen_by("cc");
    assert_eq!(codes(&topology), ["covers_underlay", "prefix_conflict", "prefix_conflict", "prefix_conflict"]);
    assert_eq!(topology.outside.keys().map(ToString::to_string).collect::<Vec<_>>(), ["first"]);
}

#[test]
fn a_lease_of_flannel_is_spoken_to_by_its_backend_data() {
    let mut world = Fixture::new();
    let key = public_key(5);
    let value = format!(
        r#"{{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}}}}"#
    );
    let versioned = world.versioned(SubnetLease::parse(value.as_bytes()).unwrap());
    world.records.subnets.insert("10.244.7.0-24".parse().unwrap(), versioned);
    let topology = world.seen_by("cc");
    let lease = topology.members.values().next().unwrap();
    assert_eq!((lease.keys.as_slice(), lease.endpoints[0].to_string()), (&[key][..], "192.0.2.9:51820".to_owned()));
}

#[test]
fn a_lease_of_flannel_with_an_endpoint_inside_the_network_is_unreachable_alone() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.subnet("10.244.3.0-24", "aa");
    let key = public_key(5);
    let value =
        format!(r#"{{"PublicIP":"10.244.1.1","BackendType":"wireguard","BackendData":{{"PublicKey":"{key}"}}}}"#);
    let versioned = world.versioned(SubnetLease::parse(value.as_bytes()).unwrap());
    world.records.subnets.insert("10.244.7.0-24".parse().unwrap(), versioned);
    let topology = world.seen_by("cc");
    let lease = &topology.members[&PeerId::Lease("10.244.7.0-24".parse().unwrap())];
    assert!(lease.keys.is_empty() && lease.unusable.as_ref().unwrap().contains("10.244.1.1"));
    assert!(!member(&topology, "aa").keys.is_empty());
}

#[test]
fn an_outside_peer_is_not_called_through_the_mesh() {
    let mut world = Fixture::new();
    world.peer("loop", 9, &["10.9.0.0/24"]);
    let peers = &mut world.records.peers;
    let peer = Arc::make_mut(&mut peers.get_mut(&"loop".parse().unwrap()).unwrap().value);
    for endpoint in ["10.244.1.1:51820", "10.9.0.7:51820"] {
        peer.endpoint = Some(endpoint.parse().unwrap());
        let record = peer.clone();
        let mut world = Fixture::new();
        let versioned = world.versioned(record);
        world.records.peers.insert("loop".parse().unwrap(), versioned);
        assert_eq!(codes(&world.seen_by("cc")), ["prefix_conflict"], "{endpoint}");
    }
}

#[test]
fn a_subnet_outside_of_the_network_does_not_hold() {
    let mut world = Fixture::new();
    world.node("aa", 1);
    world.subnet("10.99.3.0-24", "aa");
    assert_eq!(codes(&world.seen_by("cc")), ["subnet_outside_network"]);
}

proptest! {
    /// Whatever is claimed, no address has two owners and no key does, and every node sees the same owners.
    #[test]
    fn never_two_owners(
        nodes in proptest::collection::vec((1u8..8, proptest::option::of(1u8..8)), 0..8),
        subnets in proptest::collection::vec((0u8..16, 20u8..=28, 0usize..8, any::<bool>()), 0..24),
        peers in proptest::collection::vec((1u8..12, 0u8..8, 24u8..=32), 0..6),
    ) {
        let mut world = Fixture::new();
        for (i, (key, next)) in nodes.iter().enumerate() {
            world.node(&format!("n{i}"), *key).next_public_key = next.filter(|next| next != key).map(public_key);
        }
        for (third, len, node, retained) in subnets {
            let net = Ipv4Net::new([10, 244, third, 0].into(), len).unwrap().trunc();
            world.subnet(&format!("{}-{len}", net.addr()), &format!("n{node}"));
            let key = SubnetKey { v4: Some(net), v6: None };
            let record = &mut world.records.subnets;
            record.get_mut(&key).unwrap().retained = retained.then_some(Retained::Unreadable);
        }
        for (i, (key, third, len)) in peers.into_iter().enumerate() {
            let net = Ipv4Net::new([10, 9, third, 0].into(), len).unwrap().trunc();
            world.peer(&format!("p{i}"), key, &[&net.to_string()]);
        }
        let seen = world.seen_by("zz");
        let mut owned: Vec<(IpNet, PeerId)> = Vec::new();
        let mut keys: Vec<PublicKey> = Vec::new();
        for (owner, member) in seen.members.iter() {
            owned.extend(member.prefixes().map(|net| (net, owner.clone())));
            keys.extend(&member.keys);
        }
        for (name, peer) in seen.outside.iter() {
            owned.extend(peer.allowed_ips.iter().map(|net| (*net, PeerId::Outside(name.clone()))));
            keys.push(peer.public_key);
        }
        for (i, (a, _)) in owned.iter().enumerate() {
            for (b, _) in &owned[i + 1..] {
                prop_assert!(!overlap(a, b), "{a} and {b}");
            }
        }
        let count = keys.len();
        keys.sort();
        keys.dedup();
        prop_assert_eq!(keys.len(), count);
        // Another node sees the same, but for its own part.
        let other = world.seen_by("n0");
        for (net, owner) in owned {
            if owner == PeerId::Node("n0".parse().unwrap()) {
                prop_assert!(other.own_prefixes().any(|own| own == net));
            } else if let Some(member) = other.members.get(&owner) {
                prop_assert!(member.prefixes().any(|own| own == net));
            } else {
                prop_assert!(matches!(owner, PeerId::Outside(name) if other.outside.contains_key(&name)));
            }
        }
    }
}

/// What happens to the records; small numbers, so that they meet.
#[derive(Debug, Clone)]
enum Write {
    Node { id: u8, key: u8, next: Option<u8>, name: u8, site: bool, address: u8 },
    NodeGone(u8),
    Subnet { third: u8, len: u8, v6: bool, node: Option<u8>, retained: bool },
    SubnetGone { third: u8, len: u8, v6: bool },
    Peer { name: u8, key: u8, third: u8, len: u8, over_endpoints: bool },
    PeerGone(u8),
    Removed { id: u8, key: u8 },
    RemovedGone(u8),
    Config(u8),
}

fn write() -> impl Strategy<Value = Write> {
    let (few, third, len) = (0u8..8, 0u8..8, 20u8..=26);
    prop_oneof![
        8 => (few.clone(), 1u8..10, proptest::option::of(1u8..10), few.clone(), any::<bool>(), few.clone())
            .prop_map(|(id, key, next, name, site, address)| Write::Node { id, key, next, name, site, address }),
        3 => few.clone().prop_map(Write::NodeGone),
        8 => (third.clone(), len.clone(), any::<bool>(), proptest::option::weighted(0.8, few.clone()), any::<bool>())
            .prop_map(|(third, len, v6, node, retained)| Write::Subnet { third, len, v6, node, retained }),
        3 => (third.clone(), len, any::<bool>())
            .prop_map(|(third, len, v6)| Write::SubnetGone { third, len, v6 }),
        4 => (few.clone(), 1u8..12, third, 22u8..=32, any::<bool>())
            .prop_map(|(name, key, third, len, over_endpoints)| Write::Peer { name, key, third, len, over_endpoints }),
        2 => few.clone().prop_map(Write::PeerGone),
        2 => (few.clone(), 1u8..10).prop_map(|(id, key)| Write::Removed { id, key }),
        2 => few.prop_map(Write::RemovedGone),
        1 => (0u8..3).prop_map(Write::Config),
    ]
}

fn net_of(third: u8, len: u8) -> Ipv4Net {
    Ipv4Net::new([10, 244, third, 0].into(), len).unwrap().trunc()
}

fn subnet_key(third: u8, len: u8, v6: bool) -> SubnetKey {
    let v6 = v6.then(|| format!("fd42:244:0:{third}::/64").parse().unwrap());
    SubnetKey { v4: Some(net_of(third, len)), v6 }
}

impl Fixture {
    fn take(&mut self, write: &Write) {
        let id = |number: &u8| format!("n{number}");
        match write {
            Write::Node { id: number, key, next, name, site, address } => {
                let node = self.node(&id(number), *key);
                node.next_public_key = next.filter(|next| next != key).map(public_key);
                node.name = format!("name-{name}").parse().unwrap();
                node.addresses = vec![format!("192.0.2.{address}/24").parse().unwrap()];
                node.endpoints = vec![format!("198.51.{address}.{key}:51820").parse().unwrap()];
                if !site {
                    node.site = None;
                }
            }
            Write::NodeGone(number) => {
                self.records.nodes.remove(&id(number).parse::<NodeId>().unwrap());
            }
            Write::Subnet { third, len, v6, node, retained } => {
                let key = subnet_key(*third, *len, *v6);
                let text = match node {
                    Some(node) => format!(r#"{{"Node": "{}"}}"#, id(node)),
                    None => format!(
                        r#"{{"PublicIP": "203.0.113.{third}", "BackendType": "wireguard",
                            "BackendData": {{"PublicKey": "{}", "Port": 51820}}}}"#,
                        public_key(third + 1)
                    ),
                };
                let mut record = self.versioned(SubnetLease::parse(text.as_bytes()).unwrap());
                record.retained = retained.then_some(Retained::Unreadable);
                self.records.subnets.insert(key, record);
            }
            Write::SubnetGone { third, len, v6 } => {
                self.records.subnets.remove(&subnet_key(*third, *len, *v6));
            }
            Write::Peer { name, key, third, len, over_endpoints } => {
                let first = if *over_endpoints { [198, 51, *third, 0] } else { [10, 9, *third, 0] };
                let net = Ipv4Net::new(first.into(), *len).unwrap().trunc();
                self.peer(&format!("p{name}"), *key, &[&net.to_string()]);
            }
            Write::PeerGone(name) => {
                self.records.peers.remove(&format!("p{name}").parse::<etcd_schema::PeerName>().unwrap());
            }
            Write::Removed { id: number, key } => self.removed(&id(number), *key),
            Write::RemovedGone(number) => {
                self.records.removed.remove(&id(number).parse::<NodeId>().unwrap());
            }
            Write::Config(which) => {
                let config = match which {
                    0 => None,
                    1 => Some(self.versioned(NetworkConfig::parse(CONFIG.as_bytes()).unwrap())),
                    _ => Some(self.versioned(NetworkConfig::parse(br#"{"Network": "10.244.0.0/21"}"#).unwrap())),
                };
                self.records.config = config;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happened before, and whether one saw it piece by piece or at once, the topology is that of the records.
    #[test]
    fn what_is_kept_up_to_date_is_what_all_records_come_to(
        rounds in proptest::collection::vec(proptest::collection::vec(write(), 1..6), 1..16),
    ) {
        let mut world = Fixture::new();
        let mut resolver = TopologyResolver::new("n0".parse().unwrap());
        for writes in rounds {
            writes.iter().for_each(|write| world.take(write));
            resolver.apply(&world.records);
            let fresh = world.seen_by("n0");
            prop_assert_eq!(resolver.topology(), &fresh, "after {:?}", writes);
        }
    }
}

#[test]
fn a_change_leaves_those_that_it_does_not_concern_as_they_are() {
    let mut world = Fixture::new();
    for number in 1..=100u8 {
        world.node(&format!("n{number}"), number);
        world.subnet(&format!("10.244.{number}.0-24"), &format!("n{number}"));
    }
    let mut resolver = TopologyResolver::new("n1".parse().unwrap());
    resolver.apply(&world.records);
    let before = resolver.topology().clone();
    assert_eq!(before.members.len(), 99);
    let node = world.records.nodes.get_mut(&"n50".parse::<NodeId>().unwrap()).unwrap();
    Arc::make_mut(&mut node.value).endpoints = vec!["198.51.100.1:9".parse().unwrap()];
    let selected = resolver.closed(changed(&resolver.records, &world.records), &world.records);
    assert_eq!(selected.len(), 2, "the node and its subnet: {selected:?}");
    resolver.apply(&world.records);
    let changed = resolver.topology().members.changes(&before.members);
    assert_eq!(changed, [&PeerId::Node("n50".parse().unwrap())]);
}
