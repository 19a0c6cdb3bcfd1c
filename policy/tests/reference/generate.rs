//! Worlds from a seed: objects of every kind, told to the engine and to the model alike.

use std::{net::IpAddr, sync::Arc};

use etcd_schema::Cluster;
use ipnet::IpNet;
use policy::{
    engine::{ClusterNode, Engine, ObjectName, PodInterface, PolicyState, SourceAliases},
    nft::Ruleset,
    object::{ClusterPolicy, Labels, NamedPort, NetworkPolicy, PodObject, Protocol},
};
use serde_json::{Map, Value, json};

use super::model::{NodeObject, Pod, World};

/// Numbers from a seed (splitmix64).
pub(crate) struct Dice {
    state: u64,
    /// Whether there are clusters with names.
    clusters: bool,
}

impl Dice {
    /// For worlds with clusters, in which all names are equal.
    pub(crate) const fn new(seed: u64) -> Self {
        Self { state: seed, clusters: true }
    }

    /// For worlds without.
    pub(crate) const fn of_one_cluster(seed: u64) -> Self {
        Self { state: seed, clusters: false }
    }

    fn cluster(&mut self) -> String {
        let cluster = if self.clusters { self.pick(&["", "east", "east", "west", "west"]) } else { "" };
        cluster.to_owned()
    }

    pub(crate) fn roll(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }

    pub(crate) fn pick<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.roll(list.len())].clone()
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.roll(100) < percent
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.roll(most + 1)).map(|_| make(self)).collect()
    }
}

const KEYS: [&str; 3] = ["a", "b", "c"];
const VALUES: [&str; 3] = ["", "1", "2"];
const NAMES: [&str; 3] = ["web", "dns", "none"];
pub(crate) const PORTS: [u16; 6] = [1, 53, 80, 81, 8080, 65535];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const BLOCKS: [&str; 9] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.77/4",
    "10.0.0.0/24",
    "10.0.0.8/30",
    "203.0.113.0/24",
    "10.0.1.3/32",
    "::/0",
    "fd00::/16",
];
const HOLES: [&str; 5] = ["10.0.0.8/31", "10.0.0.0/25", "203.0.113.7/32", "10.0.1.0/28", "fd00::1:0/112"];

fn labels(dice: &mut Dice) -> Map<String, Value> {
    let mut labels = Map::new();
    for key in KEYS {
        if dice.chance(55) {
            labels.insert(key.into(), dice.pick(&VALUES).into());
        }
    }
    labels
}

fn selector(dice: &mut Dice, namespaces: bool) -> Value {
    let mut selector = some_selector(dice, namespaces);
    if namespaces && dice.clusters && dice.chance(35) {
        let operator = dice.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
        let mut expression = json!({"key": "meshd.io/cluster", "operator": operator});
        if operator.ends_with("In") {
            expression["values"] = json!([dice.pick(&["", "east", "west", "north"])]);
        }
        match selector.get_mut("matchExpressions").and_then(Value::as_array_mut) {
            Some(list) => list.push(expression),
            None => selector["matchExpressions"] = json!([expression]),
        }
    }
    selector
}

fn some_selector(dice: &mut Dice, namespaces: bool) -> Value {
    if dice.chance(25) {
        return json!({});
    }
    let mut selector = Map::new();
    if dice.chance(60) {
        let mut labels = Map::new();
        for _ in 0..=dice.roll(2) {
            labels.insert(dice.pick(&KEYS).into(), dice.pick(&VALUES).into());
        }
        if namespaces && dice.chance(20) {
            labels.insert("kubernetes.io/metadata.name".into(), format!("n{}", dice.roll(4)).into());
        }
        selector.insert("matchLabels".into(), labels.into());
    }
    if dice.chance(50) {
        let expressions = dice.some(2, |dice| {
            let operator = dice.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
            let mut expression = json!({"key": dice.pick(&KEYS), "operator": operator});
            if operator.ends_with("In") {
                let mut values = vec![dice.pick(&VALUES)];
                values.extend(dice.some(1, |dice| dice.pick(&VALUES)));
                expression["values"] = json!(values);
            }
            expression
        });
        selector.insert("matchExpressions".into(), expressions.into());
    }
    selector.into()
}

fn block(dice: &mut Dice) -> Value {
    let cidr = dice.pick(&BLOCKS);
    let net: IpNet = cidr.parse().unwrap();
    let fits = |hole: &&str| {
        let hole: IpNet = hole.parse().unwrap();
        net.trunc().contains(&hole) && net.prefix_len() < hole.prefix_len()
    };
    let holes: Vec<&str> = HOLES.into_iter().filter(fits).collect();
    let mut block = json!({"cidr": cidr});
    if dice.chance(50) {
        block["except"] = holes.into_iter().filter(|_| dice.chance(60)).collect();
    }
    block
}

fn rules(dice: &mut Dice, peers: &str) -> Value {
    match dice.roll(8) {
        0 => Value::Null,
        1 => json!([]),
        _ => dice
            .some(3, |dice| {
                let mut rule = Map::new();
                if dice.chance(80) {
                    let list = dice.some(3, |dice| match dice.roll(4) {
                        0 => json!({"podSelector": selector(dice, false)}),
                        1 => json!({"namespaceSelector": selector(dice, true), "podSelector": null}),
                        2 => json!({"namespaceSelector": selector(dice, true), "podSelector": selector(dice, false)}),
                        _ => json!({"ipBlock": block(dice)}),
                    });
                    rule.insert(peers.into(), list.into());
                }
                if dice.chance(60) {
                    let list = dice.some(3, |dice| {
                        let mut port = Map::new();
                        if dice.chance(70) {
                            port.insert("protocol".into(), dice.pick(&PROTOCOLS).into());
                        }
                        match dice.roll(4) {
                            0 => {}
                            1 => drop(port.insert("port".into(), dice.pick(&NAMES).into())),
                            2 => drop(port.insert("port".into(), dice.pick(&PORTS).into())),
                            _ => {
                                let first = dice.pick(&PORTS);
                                port.insert("port".into(), first.into());
                                port.insert("endPort".into(), dice.pick(&PORTS).max(first).into());
                            }
                        }
                        Value::from(port)
                    });
                    rule.insert("ports".into(), list.into());
                }
                Value::from(rule)
            })
            .into(),
    }
}

fn network_policy(dice: &mut Dice) -> Value {
    let mut spec = Map::new();
    match dice.roll(8) {
        0 => {}
        1 => drop(spec.insert("podSelector".into(), Value::Null)),
        _ => drop(spec.insert("podSelector".into(), selector(dice, false))),
    }
    match dice.roll(5) {
        0 => {}
        1 => drop(spec.insert("policyTypes".into(), json!([]))),
        2 => drop(spec.insert("policyTypes".into(), json!(["Ingress", "Egress"]))),
        _ => drop(spec.insert("policyTypes".into(), json!([dice.pick(&["Ingress", "Egress"])]))),
    }
    for (name, peers) in [("ingress", "from"), ("egress", "to")] {
        if dice.chance(70) {
            spec.insert(name.into(), rules(dice, peers));
        }
    }
    spec.into()
}

fn cluster_policy(dice: &mut Dice) -> Value {
    let pods = |dice: &mut Dice| {
        if dice.chance(50) {
            json!({"namespaces": selector(dice, true)})
        } else {
            json!({"pods": {"namespaceSelector": selector(dice, true), "podSelector": selector(dice, false)}})
        }
    };
    let mut spec = json!({
        "tier": dice.pick(&["Admin", "Admin", "Baseline"]), "priority": dice.roll(3), "subject": pods(dice),
    });
    for (name, peers) in [("ingress", "from"), ("egress", "to")] {
        let rules = dice.some(4, |dice| {
            let mut addresses = false;
            let mut list = Vec::new();
            for _ in 0..=dice.roll(2) {
                if name == "egress" && dice.chance(30) {
                    addresses = true;
                    let mut networks = vec![dice.pick(&BLOCKS), dice.pick(&BLOCKS)];
                    networks.dedup();
                    list.push(json!({"networks": networks}));
                } else if name == "egress" && dice.chance(25) {
                    addresses = true;
                    list.push(json!({"nodes": selector(dice, true)}));
                } else {
                    list.push(pods(dice));
                }
            }
            let mut rule = json!({"action": dice.pick(&["Accept", "Deny", "Pass"]), peers: list});
            if dice.chance(50) {
                let protocols = dice.some(3, |dice| {
                    let protocol = dice.pick(&["tcp", "udp", "sctp"]);
                    match dice.roll(4) {
                        0 if !addresses => json!({"destinationNamedPort": dice.pick(&NAMES)}),
                        0 | 1 => json!({protocol: {"destinationPort": {"range": {"start": 1, "end": 65535}}}}),
                        2 => json!({protocol: {"destinationPort": {"range": {"start": 53, "end": 81}}}}),
                        _ => json!({protocol: {"destinationPort": {"number": dice.pick(&PORTS)}}}),
                    }
                });
                // An empty list is no policy.
                if !protocols.is_empty() {
                    rule["protocols"] = protocols.into();
                }
            }
            rule
        });
        spec[name] = rules.into();
    }
    spec
}

/// Overlay addresses of nodes. The last one's may be a pod's as well.
fn overlays() -> [IpAddr; 4] {
    ["10.0.2.0", "10.0.3.0", "fd00::2:ffff", "10.0.1.12"].map(|text| text.parse().unwrap())
}

/// Addresses of nodes, of the overlay and below it. Pods may have them, too.
const NODE_ADDRESSES: [&str; 6] = ["10.0.0.0", "10.0.1.0", "fd00::1:ffff", "192.0.2.1", "192.0.2.2", "192.0.2.3"];

/// Where a packet may come from: a node, too.
pub(crate) fn source(dice: &mut Dice) -> IpAddr {
    if dice.chance(30) { dice.pick(&overlays()) } else { address(dice) }
}

pub(crate) fn address(dice: &mut Dice) -> IpAddr {
    match dice.roll(12) {
        0 if dice.chance(60) => dice.pick(&NODE_ADDRESSES).parse().unwrap(),
        0 => "203.0.113.7".parse().unwrap(),
        1 => "203.0.113.8".parse().unwrap(),
        2 => "2001:db8::1".parse().unwrap(),
        3..=5 => format!("fd00::{}:{}", dice.roll(2), dice.roll(3)).parse().unwrap(),
        _ => format!("10.0.{}.{}", dice.roll(2), 7 + dice.roll(6)).parse().unwrap(),
    }
}

/// The engine and the model, told the same.
pub(crate) struct Both {
    pub(crate) engine: Engine,
    pub(crate) world: World,
    pub(crate) age: u64,
    /// What nftables was last told.
    pub(crate) rules: Ruleset,
}

fn named(cluster: &str) -> Cluster {
    cluster.parse().unwrap()
}

fn known(labels: &Map<String, Value>) -> Labels {
    labels.iter().map(|(key, value)| (key.as_str(), value.as_str().unwrap())).collect()
}

impl Both {
    pub(crate) fn new() -> Self {
        Self { engine: Engine::new(), world: World::default(), age: 0, rules: Ruleset::default() }
    }

    pub(crate) fn change(&mut self, dice: &mut Dice) {
        if dice.clusters && (self.world.subnets.is_empty() || dice.chance(7)) {
            self.give_node(dice);
        }
        match dice.roll(18) {
            16 => self.put_mesh_node(dice),
            17 => self.put_node_object(dice),
            14 | 15 => self.move_node(dice),
            0 | 1 => {
                let (cluster, name, mut labels) = (dice.cluster(), format!("n{}", dice.roll(4)), labels(dice));
                if dice.clusters && dice.chance(20) {
                    labels.insert("meshd.io/cluster".into(), "west".into());
                }
                self.engine.put_namespace(&named(&cluster), &name.as_str().into(), known(&labels));
                self.world.namespaces.insert((cluster, name), labels);
            }
            2 => {
                let (cluster, name) = (dice.cluster(), format!("n{}", dice.roll(4)));
                self.engine.delete_namespace(&named(&cluster), &name.as_str().into());
                self.world.namespaces.remove(&(cluster, name));
            }
            3..=6 => self.put_pod(dice),
            7 => {
                let (namespace, name) = (format!("n{}", dice.roll(4)), format!("p{}", dice.roll(4)));
                let cluster = dice.cluster();
                self.forget_pod(&cluster, &namespace, &name);
            }
            8..=10 => {
                let (namespace, name) = (format!("n{}", dice.roll(4)), format!("p{}", dice.roll(3)));
                let cluster = dice.cluster();
                let key = ObjectName::new(namespace.as_str(), name.as_str()).of(&named(&cluster));
                if dice.chance(75) {
                    let spec = network_policy(dice);
                    let policy = NetworkPolicy::parse(&spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
                    self.engine.put_policy(key, &PolicyState::Valid(policy));
                    self.world.policies.insert((cluster, namespace, name), spec);
                } else {
                    self.engine.delete_policy(&key);
                    self.world.policies.remove(&(cluster, namespace, name));
                }
            }
            _ => {
                let name = format!("c{}", dice.roll(4));
                let cluster = dice.cluster();
                let key = ObjectName::new("", name.as_str()).of(&named(&cluster));
                if dice.chance(70) {
                    let spec = cluster_policy(dice);
                    let policy = ClusterPolicy::parse(&spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
                    self.engine.put_cluster_policy(key, &policy);
                    self.world.cluster.insert((cluster, name), spec);
                } else {
                    self.engine.delete_cluster_policy(&key);
                    self.world.cluster.remove(&(cluster, name));
                }
            }
        }
    }

    /// A node is heard from elsewhere, publishes something else, or is gone.
    fn move_node(&mut self, dice: &mut Dice) {
        let overlay = dice.pick(&overlays());
        let aliases = match dice.chance(80) {
            true => SourceAliases { proven: dice.some(2, address), published: dice.some(3, address) },
            false => SourceAliases::default(),
        };
        self.engine.set_source(overlay, Arc::new(aliases.clone()));
        self.world.nodes.insert(overlay, (aliases.proven, aliases.published));
    }

    /// A node comes to another cluster, or to none.
    fn give_node(&mut self, dice: &mut Dice) {
        let number = dice.roll(2);
        let subnets = [format!("10.0.{number}.0/24"), format!("fd00::{number}:0/112")];
        let subnets = subnets.map(|net| net.parse::<IpNet>().unwrap());
        let cluster = dice.cluster();
        for net in subnets {
            match cluster.as_str() {
                "" => self.world.subnets.remove(&net),
                cluster => self.world.subnets.insert(net, cluster.to_owned()),
            };
        }
        self.world.places.insert(format!("m{number}"), cluster.clone());
        let node = ClusterNode { cluster: named(&cluster), name: "worker".into(), subnets: subnets.into() };
        self.engine.set_cluster(&format!("m{number}").into(), Some(node));
    }

    /// A node of the mesh comes, has other addresses, or goes.
    fn put_mesh_node(&mut self, dice: &mut Dice) {
        let name = format!("m{}", dice.roll(3));
        let addresses: Vec<IpAddr> = dice.some(3, |dice| dice.pick(&NODE_ADDRESSES).parse().unwrap());
        if addresses.is_empty() {
            self.engine.delete_node(&name);
            self.world.mesh_nodes.remove(&name);
        } else {
            self.engine.put_node(name.as_str().into(), addresses.as_slice().into());
            self.world.mesh_nodes.insert(name, addresses);
        }
    }

    /// A Node object comes, changes, or goes.
    fn put_node_object(&mut self, dice: &mut Dice) {
        let (cluster, name) = (dice.cluster(), dice.pick(&["worker", "worker", "m0", "m2"]));
        let key = ObjectName::new("", name).of(&named(&cluster));
        if dice.chance(25) {
            self.engine.delete_node_object(key);
            self.world.node_objects.remove(&(cluster, name.to_owned()));
            return;
        }
        let mut labels = labels(dice);
        if dice.chance(20) {
            labels.insert("meshd.io/cluster".into(), "west".into());
        }
        let internal: Vec<IpAddr> = dice.some(2, |dice| dice.pick(&NODE_ADDRESSES).parse().unwrap());
        self.engine.put_node_object(key, &known(&labels), internal.as_slice().into());
        self.world.node_objects.insert((cluster, name.to_owned()), NodeObject { labels, internal });
    }

    fn forget_pod(&mut self, cluster: &str, namespace: &str, name: &str) {
        self.world.pods.retain(|pod| pod.cluster != cluster || pod.namespace != namespace || pod.name != name);
        self.engine.delete_pod(&ObjectName::new(namespace, name).of(&named(cluster)));
        self.engine.delete_attachment(&format!("{cluster}/{namespace}/{name}").into());
    }

    /// An address of a pod: mostly one that pods of its cluster may have.
    fn address(&self, dice: &mut Dice, cluster: &str) -> IpAddr {
        let mut found = address(dice);
        for _ in 0..if dice.clusters { 4 } else { 0 } {
            let owner = self.world.subnets.iter().find(|(net, _)| net.contains(&found));
            if owner.map_or("", |(_, owner)| owner) == cluster {
                break;
            }
            found = address(dice);
        }
        found
    }

    fn put_pod(&mut self, dice: &mut Dice) {
        self.age += 1;
        let cluster = dice.cluster();
        let pod = Pod {
            namespace: format!("n{}", dice.roll(4)),
            name: format!("p{}", dice.roll(4)),
            labels: dice.chance(85).then(|| labels(dice)),
            ips: dice.some(2, |dice| self.address(dice, &cluster)),
            ports: dice
                .some(3, |dice| (dice.pick(&NAMES).to_owned(), dice.pick(&PROTOCOLS).to_owned(), dice.pick(&PORTS))),
            finished: dice.chance(10),
            age: self.age,
            cluster,
        };
        let key = ObjectName::new(pod.namespace.as_str(), pod.name.as_str()).of(&named(&pod.cluster));
        self.forget_pod(&pod.cluster, &pod.namespace, &pod.name);
        let pod = match &pod.labels {
            Some(labels) => {
                let object = PodObject {
                    static_uid: None,
                    labels: known(labels),
                    addresses: pod.ips.clone(),
                    ports: pod
                        .ports
                        .iter()
                        .map(|(name, protocol, port)| NamedPort {
                            name: name.as_str().into(),
                            protocol: Protocol::from_name(protocol).unwrap(),
                            port: *port,
                        })
                        .collect(),
                    finished: pod.finished,
                    ..Default::default()
                };
                self.engine.put_pod(key, object, self.age);
                pod
            }
            None => {
                let attachment = PodInterface {
                    pod: key,
                    uid: Some("u".into()),
                    labels: None,
                    addresses: pod.ips.clone(),
                    node: "n".into(),
                    subnets: Arc::default(),
                };
                let name: Arc<str> = format!("{}/{}/{}", pod.cluster, pod.namespace, pod.name).into();
                self.engine.put_attachment(name, attachment, self.age);
                Pod { ports: Vec::new(), finished: false, ..pod }
            }
        };
        self.world.pods.push(pod);
    }
}
