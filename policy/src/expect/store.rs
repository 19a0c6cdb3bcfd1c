//! The world's objects, with the daemon's handling of invalid policies: the last good one stays.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use serde_json::Value;

use super::{Problem, list, problem};
use crate::{
    engine::{Classifier, Engine, ObjectName, PolicyState, SourceAliases},
    object::{
        CLUSTER_POLICY_VERSIONS, ClusterPolicy, Labels, NetworkPolicy, PodObject, is_namespace_name, is_object_name,
        namespace_from, pod_from,
    },
};

/// The world, changing.
#[derive(Default)]
pub(super) struct Store {
    engine: Engine,
    pods: HashMap<ObjectName, PodObject>,
    /// When each was made.
    ages: HashMap<ObjectName, u64>,
    nodes: BTreeMap<Arc<str>, Vec<IpAddr>>,
    /// Policies whose last good version is in force.
    good: HashSet<ObjectName>,
    /// How often each key was written since it was made.
    written: HashMap<ObjectName, u64>,
    age: u64,
}

impl Store {
    pub(super) fn new(world: &Value) -> Result<Self, Problem> {
        let mut store = Self::default();
        store.put_namespaces(world.get("namespaces").unwrap_or(&Value::Null))?;
        for (name, node) in world.get("nodes").and_then(Value::as_object).into_iter().flatten() {
            store.put_node(name, node)?;
        }
        for (i, pod) in list(world, "pods")?.iter().enumerate() {
            store.put_pod(pod).map_err(|(_, what)| problem(format!("pods[{i}]"), what))?;
        }
        for policy in list(world, "policies")? {
            store.put_policy(policy)?;
        }
        for policy in list(world, "clusterPolicies")? {
            store.put_cluster_policy(policy)?;
        }
        Ok(store)
    }

    pub(super) fn classifier(&mut self) -> Arc<Classifier> {
        self.engine.commit(self.age)
    }

    /// Addresses of pod `NS/NAME`; those of its node where it is in that one's network and has none itself.
    pub(super) fn addresses_of(&self, text: &str) -> Vec<IpAddr> {
        let Some(pod) = pod_name(text).and_then(|name| self.pods.get(&name)) else { return Vec::new() };
        if pod.addresses.is_empty() && pod.host_network {
            return pod.node.as_ref().and_then(|node| self.nodes.get(node)).cloned().unwrap_or_default();
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
        match text("op")? {
            "put_policy" => self.put_policy(part("policy")?),
            "delete_policy" => {
                let name = ObjectName::new(text("ns")?, text("name")?);
                self.forget(&name);
                self.engine.delete_policy(&name);
                Ok(())
            }
            "put_cluster_policy" => self.put_cluster_policy(part("policy")?),
            "delete_cluster_policy" => {
                self.forget(&ObjectName::new("", text("name")?));
                self.engine.delete_cluster_policy(text("name")?);
                Ok(())
            }
            "put_pod" => self.put_pod(part("pod")?),
            "delete_pod" => {
                let name = pod_name(text("pod")?).ok_or_else(|| problem("pod", "must be NS/NAME"))?;
                self.pods.remove(&name);
                self.engine.delete_pod(&name);
                Ok(())
            }
            "set_pod_labels" => {
                let name = pod_name(text("pod")?).ok_or_else(|| problem("pod", "must be NS/NAME"))?;
                let labels = labels_from("labels", part("labels")?)?;
                let pod = self.pods.get_mut(&name).ok_or_else(|| problem("pod", "no such pod"))?;
                pod.labels = labels.clone();
                self.engine.relabel_pod(&name, labels);
                Ok(())
            }
            "put_ns" | "set_ns_labels" => {
                let labels = labels_from("labels", part("labels")?)?;
                self.engine.put_namespace(&text("ns")?.into(), labels);
                Ok(())
            }
            "delete_ns" => {
                self.engine.delete_namespace(&text("ns")?.into());
                Ok(())
            }
            other => Err(problem("op", format!("{other}: no such operation"))),
        }
    }

    fn put_namespaces(&mut self, namespaces: &Value) -> Result<(), Problem> {
        match namespaces {
            Value::Null => {}
            Value::Object(map) => {
                for (name, labels) in map {
                    self.engine.put_namespace(&name.as_str().into(), labels_from("namespaces", labels)?);
                }
            }
            Value::Array(objects) => {
                for object in objects {
                    let (name, labels) = namespace_from(object).map_err(|error| problem("namespaces", error))?;
                    self.engine.put_namespace(&name, labels);
                }
            }
            _ => return Err(problem("namespaces", "must be an object")),
        }
        Ok(())
    }

    fn put_node(&mut self, name: &str, node: &Value) -> Result<(), Problem> {
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
        self.engine.put_node(name.into(), addresses.as_slice().into());
        self.nodes.insert(name.into(), addresses);
        Ok(())
    }

    fn put_pod(&mut self, pod: &Value) -> Result<(), Problem> {
        let (namespace, name, pod) = pod_from(pod).map_err(|error| problem("pod", error))?;
        let name = ObjectName { namespace, name };
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

    fn put_policy(&mut self, object: &Value) -> Result<(), Problem> {
        let name = policy_name(object, "default").ok_or_else(|| problem("policy.metadata", "has no name"))?;
        let written = self.written.entry(name.clone()).or_default();
        *written += 1;
        let state = match NetworkPolicy::parse(object.get("spec").unwrap_or(&Value::Null)) {
            Ok(policy) => {
                self.good.insert(name.clone());
                PolicyState::Valid(policy)
            }
            Err(_) if self.good.contains(&name) => return Ok(()),
            Err(invalid) => match (invalid.literal, invalid.isolates) {
                (Some(policy), _) => PolicyState::Valid(policy),
                (None, Some((subject, directions))) => PolicyState::Isolates(subject, directions),
                (None, None) if *written > 1 => PolicyState::IsolatesNamespace,
                (None, None) => return Ok(()),
            },
        };
        self.engine.put_policy(name, &state);
        Ok(())
    }

    fn put_cluster_policy(&mut self, object: &Value) -> Result<(), Problem> {
        let name = policy_name(object, "").ok_or_else(|| problem("policy.metadata", "has no name"))?;
        let name = ObjectName::new("", name.name);
        let policy = match ClusterPolicy::parse(object.get("spec").unwrap_or(&Value::Null)) {
            Ok(policy) => {
                self.good.insert(name.clone());
                policy
            }
            Err(_) if self.good.contains(&name) => return Ok(()),
            Err(invalid) => match invalid.fail_closed {
                Some(policy) => policy,
                None => return Ok(()),
            },
        };
        self.engine.put_cluster_policy(name.name, &policy);
        Ok(())
    }

    fn forget(&mut self, name: &ObjectName) {
        self.good.remove(name);
        self.written.remove(name);
    }
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

fn pod_name(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    Some(ObjectName::new(namespace, name))
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
