//! Kubernetes objects in etcd: the one reading of them, for the daemon, `meshctl check` and the engine on files.
//!
//! [`read`] turns the bytes under a key into an [`Object`], or says what is wrong with them and what stands for them.
//! [`put`] and [`delete`] hand that to an engine. Unreadable policies fail closed: see [`ObjectRefusal::stand_in`].

mod binding;
mod envelope;
mod node;
mod pod;
mod policy;

use std::sync::Arc;

use etcd_schema::{
    Cluster, KubernetesKey, Violations,
    reading::{Fields, Report, counted},
};
use serde_json::{Map, Value, json};

use self::envelope::{Envelope, Kind, Place};
pub use self::{
    binding::{Binding, bind},
    node::KubernetesNode,
};
use crate::{
    engine::{Age, Engine, ObjectName, PolicyState},
    object::{ClusterPolicy, Labels, PodObject},
};

/// An object as policies use it.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// `namespaces/NS`: its labels as they were written.
    Namespace(Labels),
    /// `pods/NS/NAME`
    Pod(PodObject),
    /// `k8s/CLUSTER/nodes/NAME`: which node of the mesh it is.
    Node(Arc<KubernetesNode>),
    /// `networkpolicies/NS/NAME`
    NetworkPolicy(PolicyState),
    /// `clusternetworkpolicies/NAME`
    ClusterNetworkPolicy(Arc<ClusterPolicy>),
}

/// What was read of a value.
#[derive(Debug)]
pub struct Reading {
    /// What it says.
    pub object: Object,
    /// The object with nothing but what is read, as JSON: reading that gives the same again.
    pub canonical: Vec<u8>,
}

/// A value that does not hold.
#[derive(Debug, PartialEq)]
pub struct ObjectRefusal {
    /// All that is wrong with it.
    pub violations: Violations,
    /// What stands for it if no earlier value of its key held: of a NetworkPolicy that it isolates its pods, as far as
    /// these can be told, or its namespace; of a ClusterNetworkPolicy its readable rules, the others deny, and all do if it
    /// is of an unknown version.
    pub stand_in: Option<Box<Object>>,
}

impl From<Violations> for ObjectRefusal {
    fn from(violations: Violations) -> Self {
        Self { violations, stand_in: None }
    }
}

/// Whether policies are made of what `key` holds.
#[must_use]
pub const fn is_read(key: &KubernetesKey) -> bool {
    matches!(
        key,
        KubernetesKey::Namespace(_)
            | KubernetesKey::Pod(..)
            | KubernetesKey::Node(_)
            | KubernetesKey::NetworkPolicy(..)
            | KubernetesKey::ClusterNetworkPolicy(_)
    )
}

/// The object that `bytes` under `key` hold, in JSON or YAML. `may_be_in_force`: the key was written before, or is the copy
/// of an object that an API server accepted, so that an unreadable NetworkPolicy isolates at least its namespace.
///
/// # Errors
/// All that is wrong with it, another name or namespace than the key's too.
pub fn read(key: &KubernetesKey, bytes: &[u8], may_be_in_force: bool) -> Result<Reading, ObjectRefusal> {
    let read = match Fields::of_object(bytes) {
        Ok(fields) => read_fields(key, fields),
        Err(violations) => Err(violations.into()),
    };
    read.map_err(|refusal| ObjectRefusal {
        stand_in: refusal.stand_in.or_else(|| unreadable(key, may_be_in_force).map(Box::new)),
        ..refusal
    })
}

/// As [`read`], of an object that was parsed already and is written for the first time.
///
/// # Errors
/// As there.
pub fn read_tree(key: &KubernetesKey, object: Map<String, Value>) -> Result<Reading, ObjectRefusal> {
    read_fields(key, Fields::root(object))
}

/// What stands for a value of which nothing can be told.
fn unreadable(key: &KubernetesKey, may_be_in_force: bool) -> Option<Object> {
    let may_have_isolated = may_be_in_force && matches!(key, KubernetesKey::NetworkPolicy(..));
    may_have_isolated.then_some(Object::NetworkPolicy(PolicyState::IsolatesNamespace))
}

fn read_fields(key: &KubernetesKey, fields: Fields) -> Result<Reading, ObjectRefusal> {
    let within = |namespace, name| Place { namespace: Some(namespace), name };
    let (object, canonical) = match key {
        KubernetesKey::Namespace(name) => read_namespace(fields, Place { namespace: None, name })?,
        KubernetesKey::Pod(namespace, name) => {
            let place = within(namespace, name);
            let (pod, phase) = pod::read(fields, place)?;
            let canonical = pod::canonical(place, &pod, phase);
            (Object::Pod(pod), canonical)
        }
        KubernetesKey::Node(name) => {
            let place = Place { namespace: None, name };
            let node = node::read(fields, place)?;
            let canonical = node::canonical(place, &node);
            (Object::Node(Arc::new(node)), canonical)
        }
        KubernetesKey::NetworkPolicy(namespace, name) => policy::read_network_policy(fields, within(namespace, name))?,
        KubernetesKey::ClusterNetworkPolicy(name) => {
            policy::read_cluster_network_policy(fields, Place { namespace: None, name })?
        }
        _ => return Err(Violations::one("", key.to_string(), "policies are made of no such object").into()),
    };
    Ok(Reading { object, canonical: canonical.to_string().into_bytes() })
}

fn read_namespace(fields: Fields, place: Place<'_>) -> Result<(Object, Value), Violations> {
    const KIND: Kind = Kind { name: "Namespace", api_versions: &["v1"] };
    let mut report = Report::default();
    let envelope = Envelope::read(fields, KIND, place, &mut report)?;
    let labels = plain_labels(&envelope.labels);
    let canonical = json!({
        "apiVersion": "v1", "kind": KIND.name,
        "metadata": {"name": place.name.as_str(), "labels": envelope.labels},
    });
    report.finish(Some((Object::Namespace(labels), canonical)))
}

/// Labels as policies read them.
pub fn plain_labels(of: &etcd_schema::Labels) -> Labels {
    of.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

/// What the daemon enforces for an unreadable value under `key` without an earlier one, in the words of its status.
#[must_use]
pub fn effect(key: &KubernetesKey, stand_in: Option<&Object>) -> String {
    match (stand_in, key) {
        (Some(Object::NetworkPolicy(PolicyState::Isolates(..))), _) => {
            "the pods it selects are isolated in its directions, and it allows nothing".to_owned()
        }
        (Some(Object::NetworkPolicy(PolicyState::IsolatesNamespace)), KubernetesKey::NetworkPolicy(namespace, _)) => {
            format!("all pods of namespace {namespace} are isolated in both directions")
        }
        (Some(Object::ClusterNetworkPolicy(policy)), _) if policy.denies_all() => {
            "everything of the pods it selects is denied, in both directions".to_owned()
        }
        (Some(_), _) => "its readable rules are in force, the others deny".to_owned(),
        (None, KubernetesKey::Pod(..) | KubernetesKey::Namespace(_)) => "its labels are treated as unknown".to_owned(),
        (None, KubernetesKey::Node(_)) => "no node of the mesh is this node".to_owned(),
        (None, _) => "it has no effect".to_owned(),
    }
}

/// One line on the object under `key` for people; a policy follows as it was understood.
#[must_use]
pub fn summary(key: &KubernetesKey, object: &Object) -> String {
    let name = name(&Cluster::default(), key);
    match object {
        Object::Namespace(labels) => format!("namespace {name} with {}", counted(labels.iter().len(), "label")),
        Object::Pod(pod) => pod::summary(&name, pod),
        Object::Node(node) => node::summary(&name, node),
        Object::NetworkPolicy(PolicyState::Valid(policy)) => {
            format!("NetworkPolicy {name}\n{}", policy.to_string().trim_end())
        }
        Object::NetworkPolicy(_) => format!("NetworkPolicy {name}, which isolates its pods"),
        Object::ClusterNetworkPolicy(policy) => {
            format!("ClusterNetworkPolicy {name}\n{}", policy.to_string().trim_end())
        }
    }
}

/// Hands an object to the engine. Of a pod's addresses, `age` decides among several pods that claim one. Which node of the
/// mesh a Node is, [`Engine::set_cluster`] says.
pub fn put(engine: &mut Engine, cluster: &Cluster, key: &KubernetesKey, object: Object, age: Age) {
    let name = name(cluster, key);
    match object {
        Object::Namespace(labels) => engine.put_namespace(cluster, &name.name, labels),
        Object::Pod(pod) => engine.put_pod(name, pod, age),
        Object::Node(node) => {
            engine.put_node_object(name, &plain_labels(&node.labels), node.internal_ips.as_slice().into());
        }
        Object::NetworkPolicy(policy) => engine.put_policy(name, &policy),
        Object::ClusterNetworkPolicy(policy) => engine.put_cluster_policy(name, &policy),
    }
}

/// The engine knows no object under `key` from now on.
pub fn delete(engine: &mut Engine, cluster: &Cluster, key: &KubernetesKey) {
    let name = name(cluster, key);
    match key {
        KubernetesKey::Namespace(_) => engine.delete_namespace(cluster, &name.name),
        KubernetesKey::Pod(..) => engine.delete_pod(&name),
        KubernetesKey::Node(_) => engine.delete_node_object(name),
        KubernetesKey::NetworkPolicy(..) => engine.delete_policy(&name),
        KubernetesKey::ClusterNetworkPolicy(_) => engine.delete_cluster_policy(&name),
        _ => {}
    }
}

fn name(cluster: &Cluster, key: &KubernetesKey) -> ObjectName {
    let (namespace, name) = match key {
        KubernetesKey::Pod(namespace, name) | KubernetesKey::NetworkPolicy(namespace, name) => {
            (namespace.as_str(), name.as_str())
        }
        KubernetesKey::Namespace(name) | KubernetesKey::ClusterNetworkPolicy(name) | KubernetesKey::Node(name) => {
            ("", name.as_str())
        }
        _ => ("", ""),
    };
    ObjectName::new(namespace, name).of(cluster)
}

#[cfg(test)]
mod tests;
