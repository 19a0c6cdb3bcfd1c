//! The specification read word by word, over plain JSON, one flow at a time. Nothing here is shared with the engine.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use policy::engine::{Flow, Side};
use serde_json::{Map, Value};

#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub cluster: String,
    pub namespace: String,
    pub name: String,
    /// `None`: attached, and its object is not there.
    pub labels: Option<Map<String, Value>>,
    pub ips: Vec<IpAddr>,
    pub ports: Vec<(String, String, u16)>,
    pub finished: bool,
    pub age: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct NodeObject {
    pub labels: Map<String, Value>,
    pub internal: Vec<IpAddr>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    /// By cluster and name.
    pub namespaces: BTreeMap<(String, String), Map<String, Value>>,
    pub pods: Vec<Pod>,
    /// By cluster, namespace and name.
    pub policies: BTreeMap<(String, String, String), Value>,
    /// By cluster and name.
    pub cluster: BTreeMap<(String, String), Value>,
    /// Subnets of nodes of clusters.
    pub subnets: BTreeMap<IpNet, String>,
    /// By overlay address: what is proven of the node, and what it publishes.
    pub nodes: BTreeMap<IpAddr, (Vec<IpAddr>, Vec<IpAddr>)>,
    /// Addresses of the mesh's nodes, by name.
    pub mesh_nodes: BTreeMap<String, Vec<IpAddr>>,
    /// Their clusters.
    pub places: BTreeMap<String, String>,
    /// By cluster and name.
    pub node_objects: BTreeMap<(String, String), NodeObject>,
}

/// `None`: not known.
type Maybe = Option<bool>;

fn and(a: Maybe, b: Maybe) -> Maybe {
    match (a, b) {
        (Some(false), _) | (_, Some(false)) => Some(false),
        (Some(true), Some(true)) => Some(true),
        _ => None,
    }
}

fn selects(selector: Option<&Value>, label: impl Fn(&str) -> Option<Option<String>>) -> Maybe {
    let mut all = Some(true);
    let Some(selector) = selector.filter(|selector| !selector.is_null()) else { return all };
    for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        all = and(all, label(key).map(|has| has.as_deref() == value.as_str()));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = expression["key"].as_str().unwrap();
        let listed = |has: &Option<String>| {
            let values = expression["values"].as_array().unwrap();
            has.as_ref().is_some_and(|has| values.iter().any(|value| value == has))
        };
        let holds = label(key).map(|has| match expression["operator"].as_str().unwrap() {
            "In" => listed(&has),
            "NotIn" => !listed(&has),
            "Exists" => has.is_some(),
            "DoesNotExist" => has.is_none(),
            other => panic!("{other}"),
        });
        all = and(all, holds);
    }
    all
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Decision {
    Allow,
    Deny,
}

/// Whether a policy says something about `kind`.
fn has_type(spec: &Value, kind: &str) -> bool {
    match spec.get("policyTypes").and_then(Value::as_array).filter(|types| !types.is_empty()) {
        Some(types) => types.iter().any(|listed| listed == kind),
        None if kind == "Ingress" => true,
        None => spec.get("egress").and_then(Value::as_array).is_some_and(|rules| !rules.is_empty()),
    }
}

/// Whether a selector of namespaces in here names the label of their cluster; `inside`: this is in one.
fn names_clusters(value: &Value, inside: bool) -> bool {
    match value {
        Value::Object(fields) => fields.iter().any(|(key, value)| {
            let selector = inside || key == "namespaceSelector" || key == "namespaces";
            (inside && key == "meshd.io/cluster") || names_clusters(value, selector)
        }),
        Value::Array(values) => values.iter().any(|value| names_clusters(value, inside)),
        value => inside && value == "meshd.io/cluster",
    }
}

impl World {
    pub(crate) fn owner(&self, address: IpAddr) -> Option<&Pod> {
        let cluster = self.subnets.iter().find(|(net, _)| net.contains(&address)).map_or("", |(_, cluster)| cluster);
        let claims = self.pods.iter().filter(|pod| pod.ips.contains(&address) && pod.cluster == cluster);
        let strict =
            self.policies.iter().any(|((cluster, ..), spec)| {
                let sides = [("Ingress", "ingress"), ("Egress", "egress")];
                let mut rules =
                    sides.iter().filter(|(kind, _)| has_type(spec, kind)).filter_map(|(_, rules)| spec.get(rules));
                !cluster.is_empty() || rules.any(|rules| names_clusters(rules, false))
            }) || self.cluster.iter().any(|((cluster, _), spec)| !cluster.is_empty() || names_clusters(spec, false));
        // It may be of a cluster whose node is not known.
        let stray = |pod: &&Pod| strict && pod.cluster.is_empty() && pod.labels.is_none();
        let living = claims.filter(|pod| !pod.finished && !stray(pod));
        living.max_by_key(|pod| (pod.labels.is_none(), pod.age))
    }

    pub(crate) fn allowed(&self, side: Side, flow: &Flow) -> bool {
        let (own, other) = match side {
            Side::Ingress => (flow.destination, flow.source),
            Side::Egress => (flow.source, flow.destination),
        };
        let Some(subject) = self.owner(own) else { return true };
        if self.owner(other).is_some_and(|peer| std::ptr::eq(peer, subject)) {
            return true;
        }
        let asked = Asked {
            world: self,
            subject,
            peer: self.owner(other),
            peer_address: other,
            target: self.owner(flow.destination),
            flow,
            rules: if side == Side::Ingress { "ingress" } else { "egress" },
            peers: if side == Side::Ingress { "from" } else { "to" },
            kind: if side == Side::Ingress { "Ingress" } else { "Egress" },
        };
        let decisions = asked.tier("Admin", &|| match asked.network_policies() {
            Some(decision) => vec![decision],
            None => asked.tier("Baseline", &|| vec![Decision::Allow]),
        });
        decisions.into_iter().max() == Some(Decision::Allow)
    }

    /// Whether `address` is that of a Node that `selector` means in a policy of `cluster`.
    fn node_selects(&self, cluster: &str, selector: &Value, address: IpAddr) -> Maybe {
        let mut is = Some(false);
        let mut add = |one: Maybe| {
            is = match (is, one) {
                (Some(true), _) | (_, Some(true)) => Some(true),
                (Some(false), Some(false)) => Some(false),
                _ => None,
            };
        };
        for ((of, name), NodeObject { labels, internal }) in &self.node_objects {
            let selected = selects(Some(selector), |key| {
                Some(match key {
                    "meshd.io/cluster" => Some(of.clone()),
                    key => labels.get(key).and_then(Value::as_str).map(ToOwned::to_owned),
                })
            });
            if selected == Some(true) && (cluster.is_empty() || cluster == of) {
                add(Some(internal.contains(&address)));
                for (mesh, addresses) in &self.mesh_nodes {
                    if self.node_object_of(mesh) == (of.clone(), name.clone()) && addresses.contains(&address) {
                        let number = mesh.trim_start_matches('m');
                        let subnets = [format!("10.0.{number}.0/24"), format!("fd00::{number}:0/112")];
                        let inside = subnets.iter().any(|net| net.parse::<IpNet>().unwrap().contains(&address));
                        add(if inside && !of.is_empty() { Some(true) } else { None });
                    }
                }
            }
        }
        for (mesh, addresses) in &self.mesh_nodes {
            if !self.node_objects.contains_key(&self.node_object_of(mesh)) && addresses.contains(&address) {
                add(None);
            }
        }
        is
    }

    /// Which Node object a node of the mesh is, if there is such a one.
    fn node_object_of(&self, mesh: &str) -> (String, String) {
        match self.places.get(mesh).map_or("", String::as_str) {
            "" => (String::new(), mesh.to_owned()),
            cluster => (cluster.to_owned(), "worker".to_owned()),
        }
    }

    fn pod_label<'p>(&self, pod: &'p Pod) -> impl Fn(&str) -> Option<Option<String>> + 'p {
        |key| {
            let labels = pod.labels.as_ref()?;
            Some(labels.get(key).and_then(Value::as_str).map(ToOwned::to_owned))
        }
    }

    /// Whether the namespace of `pod` is among those that a selector means in a policy of `cluster`.
    fn namespace_selects(&self, cluster: &str, selector: Option<&Value>, pod: &Pod) -> Maybe {
        let mut names_clusters = false;
        if let Some(selector) = selector {
            let labels = selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten();
            let expressions = selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten();
            let keys = labels.map(|(key, _)| key.as_str()).chain(expressions.map(|one| one["key"].as_str().unwrap()));
            names_clusters = keys.into_iter().any(|key| key == "meshd.io/cluster");
        }
        if !names_clusters && !cluster.is_empty() && pod.cluster != cluster {
            return Some(false);
        }
        selects(selector, |key| {
            if key == "kubernetes.io/metadata.name" {
                return Some(Some(pod.namespace.clone()));
            }
            if key == "meshd.io/cluster" {
                return Some(Some(pod.cluster.clone()));
            }
            let labels = self.namespaces.get(&(pod.cluster.clone(), pod.namespace.clone()))?;
            Some(labels.get(key).and_then(Value::as_str).map(ToOwned::to_owned))
        })
    }
}

struct Asked<'a> {
    world: &'a World,
    subject: &'a Pod,
    peer: Option<&'a Pod>,
    peer_address: IpAddr,
    target: Option<&'a Pod>,
    flow: &'a Flow,
    rules: &'a str,
    peers: &'a str,
    kind: &'a str,
}

impl Asked<'_> {
    /// `None`: no policy isolates.
    fn network_policies(&self) -> Option<Decision> {
        let mut decision = None;
        for ((cluster, namespace, _), spec) in &self.world.policies {
            let elsewhere = !cluster.is_empty() && *cluster != self.subject.cluster;
            if elsewhere || *namespace != self.subject.namespace || !has_type(spec, self.kind) {
                continue;
            }
            let selected = selects(spec.get("podSelector"), self.world.pod_label(self.subject));
            if selected == Some(false) {
                continue;
            }
            let rules = spec.get(self.rules).and_then(Value::as_array);
            let grants = selected == Some(true)
                && rules.into_iter().flatten().any(|rule| {
                    let listed = rule.get(self.peers).and_then(Value::as_array).filter(|list| !list.is_empty());
                    let peer = listed.is_none_or(|list| list.iter().any(|peer| self.is_peer(peer, cluster, namespace)));
                    peer && self.in_ports(rule)
                });
            if grants {
                return Some(Decision::Allow);
            }
            decision = Some(Decision::Deny);
        }
        decision
    }

    fn is_peer(&self, peer: &Value, cluster: &str, namespace: &str) -> bool {
        if let Some(block) = peer.get("ipBlock").filter(|block| !block.is_null()) {
            let (mut allows, mut denies) = (vec![self.peer_address], vec![self.peer_address]);
            if self.kind == "Ingress"
                && let Some((proven, published)) = self.world.nodes.get(&self.peer_address)
            {
                allows.extend(proven);
                denies.extend(proven.iter().chain(published));
            }
            let holds = |text: &Value, address| text.as_str().unwrap().parse::<IpNet>().unwrap().contains(address);
            let excepted = |address| {
                let holes = block.get("except").and_then(Value::as_array);
                holes.is_some_and(|holes| holes.iter().any(|hole| holds(hole, address)))
            };
            return allows.iter().any(|address| holds(&block["cidr"], address)) && !denies.iter().any(excepted);
        }
        let Some(pod) = self.peer else { return false };
        let in_namespace = match peer.get("namespaceSelector").filter(|selector| !selector.is_null()) {
            None => Some(pod.namespace == namespace && (cluster.is_empty() || pod.cluster == cluster)),
            selector => self.world.namespace_selects(cluster, selector, pod),
        };
        and(in_namespace, selects(peer.get("podSelector"), self.world.pod_label(pod))) == Some(true)
    }

    fn names(&self, name: &str, protocol: Option<&str>) -> bool {
        let Some(target) = self.target else { return false };
        target.ports.iter().any(|(own, its, port)| {
            own == name
                && Some(*port) == self.flow.port
                && its == self.protocol()
                && protocol.is_none_or(|protocol| protocol == its)
        })
    }

    fn protocol(&self) -> &'static str {
        match self.flow.protocol {
            6 => "TCP",
            17 => "UDP",
            132 => "SCTP",
            _ => "other",
        }
    }

    fn in_ports(&self, rule: &Value) -> bool {
        let Some(list) = rule.get("ports").and_then(Value::as_array).filter(|list| !list.is_empty()) else {
            return true;
        };
        list.iter().any(|entry| {
            let protocol = entry.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
            if protocol != self.protocol() {
                return false;
            }
            match entry.get("port") {
                None | Some(Value::Null) => true,
                Some(Value::String(name)) => self.names(name, Some(protocol)),
                Some(port) => {
                    let first = port.as_u64().unwrap();
                    let last = entry.get("endPort").and_then(Value::as_u64).unwrap_or(first);
                    self.flow.port.is_some_and(|port| (first..=last).contains(&u64::from(port)))
                }
            }
        })
    }

    /// All decisions that are possible, as rules that only may match either do or do not.
    fn tier(&self, tier: &str, behind: &dyn Fn() -> Vec<Decision>) -> Vec<Decision> {
        let mut policies: Vec<(u64, &(String, String), &Value)> = self
            .world
            .cluster
            .iter()
            .filter(|(_, spec)| spec["tier"] == tier)
            .map(|(name, spec)| (spec["priority"].as_u64().unwrap(), name, spec))
            .collect();
        policies.sort_by_key(|(priority, name, _)| (*priority, *name));
        let mut rules = Vec::new();
        for (_, (cluster, _), spec) in policies {
            let subject = &spec["subject"];
            let (namespaces, pods) = match subject.get("pods") {
                Some(both) => (both.get("namespaceSelector"), both.get("podSelector")),
                None => (subject.get("namespaces"), None),
            };
            let own = Some(cluster.is_empty() || self.subject.cluster == *cluster);
            let selected = and(
                and(own, self.world.namespace_selects(cluster, namespaces, self.subject)),
                selects(pods, self.world.pod_label(self.subject)),
            );
            for rule in spec.get(self.rules).and_then(Value::as_array).into_iter().flatten() {
                rules.push((selected, cluster.as_str(), rule));
            }
        }
        self.walk(&rules, tier, behind)
    }

    fn walk(&self, rules: &[(Maybe, &str, &Value)], tier: &str, behind: &dyn Fn() -> Vec<Decision>) -> Vec<Decision> {
        let Some(((selected, cluster, rule), rest)) = rules.split_first() else { return behind() };
        let mut peer = Some(false);
        for entry in rule[self.peers].as_array().unwrap() {
            let is = self.is_cluster_peer(entry, cluster);
            peer = match (peer, is) {
                (Some(true), _) | (_, Some(true)) => Some(true),
                (Some(false), Some(false)) => Some(false),
                _ => None,
            };
        }
        let matches = and(and(*selected, peer), Some(self.in_protocols(rule)));
        let then = || match rule["action"].as_str().unwrap() {
            "Accept" => vec![Decision::Allow],
            "Deny" => vec![Decision::Deny],
            "Pass" if tier == "Admin" => behind(),
            "Pass" => vec![Decision::Allow],
            other => panic!("{other}"),
        };
        match matches {
            Some(true) => then(),
            Some(false) => self.walk(rest, tier, behind),
            None => [then(), self.walk(rest, tier, behind)].concat(),
        }
    }

    fn is_cluster_peer(&self, peer: &Value, cluster: &str) -> Maybe {
        if let Some(networks) = peer.get("networks") {
            let inside = |text: &Value| text.as_str().unwrap().parse::<IpNet>().unwrap().contains(&self.peer_address);
            return Some(networks.as_array().unwrap().iter().any(inside));
        }
        if let Some(selector) = peer.get("nodes") {
            let is = self.world.node_selects(cluster, selector, self.peer_address);
            return if self.peer.is_some() { Some(false) } else { is };
        }
        let Some(pod) = self.peer else { return Some(false) };
        let (namespaces, pods) = match peer.get("pods") {
            Some(both) => (both.get("namespaceSelector"), both.get("podSelector")),
            None => (peer.get("namespaces"), None),
        };
        and(self.world.namespace_selects(cluster, namespaces, pod), selects(pods, self.world.pod_label(pod)))
    }

    fn in_protocols(&self, rule: &Value) -> bool {
        let Some(list) = rule.get("protocols").and_then(Value::as_array).filter(|list| !list.is_empty()) else {
            return true;
        };
        list.iter().any(|entry| {
            if let Some(name) = entry.get("destinationNamedPort") {
                return self.names(name.as_str().unwrap(), None);
            }
            let Some(fields) = entry.get(self.protocol().to_lowercase()) else { return false };
            let port = u64::from(self.flow.port.unwrap_or(0));
            let ports = &fields["destinationPort"];
            match ports.get("range") {
                Some(range) => (range["start"].as_u64().unwrap()..=range["end"].as_u64().unwrap()).contains(&port),
                None => ports["number"] == port,
            }
        })
    }
}
