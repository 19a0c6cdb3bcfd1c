//! The world's objects, with the daemon's handling of invalid policies: the last good one stays.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use etcd_schema::{Cluster, KubernetesKey, Violations};
use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{Problem, list, problem};
#[cfg(test)]
use crate::nft::{LocalPod, Ruleset};
use crate::{
    engine::{Classifier, ClusterNode, Engine, ObjectName, SourceAliases},
    object::{
        CLUSTER_POLICY_VERSIONS, ClusterPolicy, Labels, NetworkPolicy, PodObject, is_namespace_name, is_object_name,
        namespace_from, pod_from,
    },
    objects,
};

/// The world, changing.
#[derive(Default)]
pub(super) struct WorldObjects {
    engine: Engine,
    pods: HashMap<ObjectName, PodObject>,
    /// When each was made.
    ages: HashMap<ObjectName, u64>,
    /// By cluster and name there.
    nodes: BTreeMap<(Cluster, Arc<str>), Node>,
    /// Policies whose last good version is in force.
    good: HashSet<ObjectName>,
    /// How often each key was written since it was made.
    written: HashMap<ObjectName, u64>,
    age: u64,
}

/// A node, as far as the world tells.
#[derive(Default)]
struct Node {
    addresses: Vec<IpAddr>,
    /// Those that it lists, or else all addresses of its pods.
    subnets: Vec<IpNet>,
    lists_subnets: bool,
}

impl WorldObjects {
    pub(super) fn new(world: &Value) -> Result<Self, Problem> {
        let mut store = Self::default();
        store.put_objects(&Cluster::default(), world)?;
        for (name, objects) in world.get("clusters").and_then(Value::as_object).into_iter().flatten() {
            let within = |(at, what)| (format!("clusters.{name}.{at}"), what);
            store.put_objects(&cluster_from(name)?, objects).map_err(within)?;
        }
        Ok(store)
    }

    fn put_objects(&mut self, cluster: &Cluster, objects: &Value) -> Result<(), Problem> {
        self.put_namespaces(cluster, objects.get("namespaces").unwrap_or(&Value::Null))?;
        for (name, node) in objects.get("nodes").and_then(Value::as_object).into_iter().flatten() {
            self.put_node(cluster, name, node)?;
        }
        for (i, pod) in list(objects, "pods")?.iter().enumerate() {
            self.put_pod(cluster, pod).map_err(|(_, what)| problem(format!("pods[{i}]"), what))?;
        }
        for policy in list(objects, "policies")? {
            self.put_policy(cluster, policy)?;
        }
        for policy in list(objects, "clusterPolicies")? {
            self.put_cluster_policy(cluster, policy)?;
        }
        Ok(())
    }

    pub(super) fn classifier(&mut self) -> Arc<Classifier> {
        self.engine.commit(self.age)
    }

    /// What the kernel does as of the last [`classifier`](Self::classifier), with every pod on its machine.
    #[cfg(test)]
    pub(super) fn ruleset(&mut self) -> Ruleset {
        let pods: Vec<LocalPod> = self
            .pods
            .values()
            .filter(|pod| !pod.host_network && !pod.finished)
            .flat_map(|pod| pod.addresses.iter().map(|address| LocalPod { addresses: vec![*address] }))
            .collect();
        self.engine.ruleset(&pods)
    }

    /// Addresses of pod `[CLUSTER:]NS/NAME`; those of its node where it is in that one's network and has none itself.
    pub(super) fn addresses_of(&self, text: &str) -> Vec<IpAddr> {
        let name = ObjectName::parse(text);
        let Some((name, pod)) = name.and_then(|name| self.pods.get_key_value(&name)) else { return Vec::new() };
        if pod.addresses.is_empty() && pod.host_network {
            let node = pod.node.as_ref().and_then(|node| self.nodes.get(&(name.cluster.clone(), Arc::clone(node))));
            return node.map(|node| node.addresses.clone()).unwrap_or_default();
        }
        pod.addresses.clone()
    }

    /// One operation of a step.
    pub(super) fn apply(&mut self, change: &Value) -> Result<(), Problem> {
        let text = |name: &str| {
            let text = change.get(name).and_then(Value::as_str);
            text.ok_or_else(|| problem(name, "missing"))
        };
        let part = |name: &str| change.get(name).ok_or_else(|| problem(name, "missing"));
        let cluster = cluster_from(change.get("cluster").and_then(Value::as_str).unwrap_or_default())?;
        let pod = || -> Result<ObjectName, Problem> {
            let name = ObjectName::parse(text("pod")?).ok_or_else(|| problem("pod", "must be NS/NAME"))?;
            Ok(if name.cluster.is_flat() { name.of(&cluster) } else { name })
        };
        match text("op")? {
            "put_policy" => self.put_policy(&cluster, part("policy")?),
            "delete_policy" => {
                let name = ObjectName::new(text("ns")?, text("name")?).of(&cluster);
                self.forget(&name);
                self.engine.delete_policy(&name);
                Ok(())
            }
            "put_cluster_policy" => self.put_cluster_policy(&cluster, part("policy")?),
            "delete_cluster_policy" => {
                let name = ObjectName::new("", text("name")?).of(&cluster);
                self.forget(&name);
                self.engine.delete_cluster_policy(&name);
                Ok(())
            }
            "put_pod" => self.put_pod(&cluster, part("pod")?),
            "delete_pod" => {
                let name = pod()?;
                self.pods.remove(&name);
                self.engine.delete_pod(&name);
                Ok(())
            }
            "set_pod_labels" => {
                let name = pod()?;
                let labels = labels_from("labels", part("labels")?)?;
                let pod = self.pods.get_mut(&name).ok_or_else(|| problem("pod", "no such pod"))?;
                pod.labels = labels.clone();
                self.engine.relabel_pod(&name, labels);
                Ok(())
            }
            "put_ns" | "set_ns_labels" => {
                let labels = labels_from("labels", part("labels")?)?;
                self.engine.put_namespace(&cluster, &text("ns")?.into(), labels);
                Ok(())
            }
            "delete_ns" => {
                self.engine.delete_namespace(&cluster, &text("ns")?.into());
                Ok(())
            }
            "put_node" => self.put_node(&cluster, text("name")?, part("node")?),
            other => Err(problem("op", format!("{other}: no such operation"))),
        }
    }

    fn put_namespaces(&mut self, cluster: &Cluster, namespaces: &Value) -> Result<(), Problem> {
        match namespaces {
            Value::Null => {}
            Value::Object(map) => {
                for (name, labels) in map {
                    let labels = labels_from("namespaces", labels)?;
                    self.engine.put_namespace(cluster, &name.as_str().into(), labels);
                }
            }
            Value::Array(objects) => {
                for object in objects {
                    let (name, labels) = namespace_from(object).map_err(|error| problem("namespaces", error))?;
                    self.engine.put_namespace(cluster, &name, labels);
                }
            }
            _ => return Err(problem("namespaces", "must be an object")),
        }
        Ok(())
    }

    fn put_node(&mut self, cluster: &Cluster, name: &str, node: &Value) -> Result<(), Problem> {
        let address = |ip: &Value| {
            let address = ip.as_str().and_then(|text| text.parse().ok());
            address.ok_or_else(|| problem("nodes", format!("{ip}: no address")))
        };
        let all = |field| list(node, field)?.iter().map(address).collect::<Result<Vec<IpAddr>, Problem>>();
        let mut addresses = all("ips")?;
        addresses.extend(node.get("ip").map(address).transpose()?);
        let aliases = Arc::new(SourceAliases { proven: all("proven")?, published: all("published")? });
        for overlay in &addresses {
            self.engine.set_source(*overlay, Arc::clone(&aliases));
        }
        self.engine.put_node(name_in_mesh(cluster, name), addresses.as_slice().into());
        let object = ObjectName::new("", name).of(cluster);
        if node.get("object") == Some(&Value::Bool(false)) {
            self.engine.delete_node_object(object);
        } else {
            let labels = labels_from("nodes", node.get("labels").unwrap_or(&Value::Null))?;
            let internal = if node.get("internal").is_some() { all("internal")? } else { addresses.clone() };
            self.engine.put_node_object(object, &labels, internal.into());
        }
        let subnet = |net: &Value| {
            let net = net.as_str().and_then(|text| text.parse().ok());
            net.ok_or_else(|| problem("nodes", format!("{net:?}: no subnet")))
        };
        let mut subnets = list(node, "subnets")?.iter().map(subnet).collect::<Result<Vec<IpNet>, Problem>>()?;
        let lists_subnets = node.get("subnets").is_some();
        if let Some(before) = self.nodes.get(&(cluster.clone(), name.into())).filter(|_| !lists_subnets) {
            subnets.clone_from(&before.subnets);
        }
        self.nodes.insert((cluster.clone(), name.into()), Node { addresses, subnets, lists_subnets });
        self.put_cluster_node(cluster, name);
        Ok(())
    }

    fn put_cluster_node(&mut self, cluster: &Cluster, name: &str) {
        let Some(node) = self.nodes.get(&(cluster.clone(), name.into())) else { return };
        let subnets = node.subnets.as_slice().into();
        let node = ClusterNode { cluster: cluster.clone(), name: name.into(), subnets };
        self.engine.set_cluster(&name_in_mesh(cluster, name), Some(node));
    }

    fn put_pod(&mut self, cluster: &Cluster, pod: &Value) -> Result<(), Problem> {
        let (namespace, name, pod) = pod_from(pod).map_err(|error| problem("pod", error))?;
        let name = ObjectName::new(namespace, name).of(cluster);
        if !cluster.is_flat() {
            let own = pod.node.clone().unwrap_or_default();
            let node = self.nodes.entry((cluster.clone(), Arc::clone(&own))).or_default();
            if !node.lists_subnets && !pod.host_network {
                node.subnets.extend(pod.addresses.iter().copied().map(IpNet::from));
            }
            self.put_cluster_node(cluster, &own);
        }
        self.age += 1;
        // A pod that changes is no newer than it was; one that takes another's place is.
        let age = match (self.pods.get(&name), self.ages.get(&name)) {
            (Some(before), Some(age)) if before.uid == pod.uid && before.addresses == pod.addresses => *age,
            _ => self.age,
        };
        self.ages.insert(name.clone(), age);
        self.pods.insert(name.clone(), pod.clone());
        self.engine.put_pod(name, pod, age);
        Ok(())
    }

    fn put_policy(&mut self, cluster: &Cluster, object: &Value) -> Result<(), Problem> {
        let name = policy_name(object, "default").ok_or_else(|| problem("policy.metadata", "has no name"))?;
        let invalid = |error: Violations| problem("policy.metadata", error);
        let key =
            KubernetesKey::NetworkPolicy(name.namespace.parse().map_err(invalid)?, name.name.parse().map_err(invalid)?);
        let object = whole(object, ("networking.k8s.io/v1", "NetworkPolicy"), Some(&name.namespace));
        self.put_object(cluster, &key, name.of(cluster), &object);
        Ok(())
    }

    fn put_cluster_policy(&mut self, cluster: &Cluster, object: &Value) -> Result<(), Problem> {
        let name = policy_name(object, "").ok_or_else(|| problem("policy.metadata", "has no name"))?;
        let own = name.name.parse().map_err(|error: Violations| problem("policy.metadata", error))?;
        let key = KubernetesKey::ClusterNetworkPolicy(own);
        let object = whole(object, (CLUSTER_POLICY_VERSIONS[0], "ClusterNetworkPolicy"), None);
        self.put_object(cluster, &key, ObjectName::new("", name.name).of(cluster), &object);
        Ok(())
    }

    /// Puts a policy as the daemon does: an unreadable one leaves the last good one in force, or has a stand-in.
    fn put_object(&mut self, cluster: &Cluster, key: &KubernetesKey, name: ObjectName, object: &Value) {
        let written = self.written.entry(name.clone()).or_default();
        *written += 1;
        let may_be_in_force = *written > 1 || !cluster.is_flat();
        let object = match objects::read(key, object.to_string().as_bytes(), may_be_in_force) {
            Ok(reading) => {
                self.good.insert(name);
                reading.object
            }
            Err(_) if self.good.contains(&name) => return,
            Err(refusal) => match refusal.stand_in {
                Some(stand_in) => *stand_in,
                None => return,
            },
        };
        objects::put(&mut self.engine, cluster, key, object, self.age.into());
    }

    fn forget(&mut self, name: &ObjectName) {
        self.good.remove(name);
        self.written.remove(name);
    }
}

/// A policy with the parts of an object that a world may leave out.
fn whole(object: &Value, (version, kind): (&str, &str), namespace: Option<&str>) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.entry("apiVersion").or_insert_with(|| version.into());
        fields.entry("kind").or_insert_with(|| kind.into());
        fields.entry("spec").or_insert_with(|| Value::Object(Map::new()));
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        match namespace {
            Some(namespace) => drop(metadata.entry("namespace").or_insert_with(|| namespace.into())),
            None => drop(metadata.remove("namespace")),
        }
    }
    object
}

/// What is wrong with a policy object, its envelope included.
pub(super) fn validate(object: &Value) -> Result<(), String> {
    let kind = object.get("kind").and_then(Value::as_str);
    let spec = object.get("spec").unwrap_or(&Value::Null);
    let cluster = match kind {
        Some("NetworkPolicy") => false,
        Some("ClusterNetworkPolicy") => true,
        Some(other) => return Err(format!("kind is \"{other}\": must be NetworkPolicy or ClusterNetworkPolicy")),
        None => spec.get("tier").is_some() || spec.get("subject").is_some(),
    };
    let wanted = if cluster { &CLUSTER_POLICY_VERSIONS[..] } else { &["networking.k8s.io/v1"] };
    let is_other = |version: &&Value| !version.as_str().is_some_and(|version| wanted.contains(&version));
    if let Some(version) = object.get("apiVersion").filter(is_other) {
        return Err(format!("apiVersion is {version}: must be {}", wanted.join(" or ")));
    }
    let metadata = object.get("metadata").unwrap_or(&Value::Null);
    let name = metadata.get("name").and_then(Value::as_str).unwrap_or_default();
    if !is_object_name(name) {
        return Err(format!("metadata.name is \"{name}\": must be a DNS subdomain"));
    }
    match metadata.get("namespace").filter(|namespace| !namespace.is_null()) {
        Some(namespace) if !cluster && !namespace.as_str().is_some_and(is_namespace_name) => {
            return Err(format!("metadata.namespace is {namespace}: must be a DNS label"));
        }
        Some(namespace) if cluster && namespace.as_str() != Some("") => {
            return Err(format!("metadata.namespace is {namespace}: a ClusterNetworkPolicy has no namespace"));
        }
        _ => {}
    }
    if cluster {
        ClusterPolicy::parse(spec).map(drop).map_err(|error| error.to_string())
    } else {
        NetworkPolicy::parse(spec).map(drop).map_err(|error| error.to_string())
    }
}

fn policy_name(object: &Value, namespace: &str) -> Option<ObjectName> {
    let metadata = object.get("metadata")?;
    let text = |name: &str| metadata.get(name).and_then(Value::as_str);
    Some(ObjectName::new(text("namespace").unwrap_or(namespace), text("name")?))
}

fn cluster_from(name: &str) -> Result<Cluster, Problem> {
    name.parse().map_err(|error| problem("cluster", error))
}

/// Clusters may have nodes of one name; in the mesh no two nodes have.
fn name_in_mesh(cluster: &Cluster, name: &str) -> Arc<str> {
    if cluster.is_flat() { name.into() } else { format!("{cluster}:{name}").into() }
}

fn labels_from(at: &str, labels: &Value) -> Result<Labels, Problem> {
    let map = match labels {
        Value::Null => return Ok(Labels::default()),
        // A namespace may be written with its labels in a field of their own.
        Value::Object(map) => match map.get("labels") {
            Some(Value::Object(labels)) if map.len() == 1 => labels,
            _ => map,
        },
        _ => return Err(problem(at, "must be an object of labels")),
    };
    map.iter()
        .map(|(key, value)| {
            let text = value.as_str().ok_or_else(|| problem(format!("{at}.{key}"), "must be text"))?;
            Ok((key.as_str(), text))
        })
        .collect()
}
