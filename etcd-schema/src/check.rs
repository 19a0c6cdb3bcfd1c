//! Validation of any value before `etcdctl put`.

use std::fmt::Display;

use crate::{
    Key, KeyError, KubernetesKey, KubernetesNode, Namespace, Pod, PolicyEnvelope, UnknownField, Value, Violations,
    unknown::unknown_fields,
};

/// What a key and its value mean, when both hold.
#[derive(Debug)]
pub struct Checked {
    /// What the key names.
    pub key: Key,
    /// One line for people: what the value says. It holds no secret and no control character.
    pub summary: String,
    /// Fields that are kept and not read.
    pub unknown: Vec<UnknownField>,
}

/// Why a key and its value do not hold.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The key is none of ours.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The value does not hold.
    #[error(transparent)]
    Value(#[from] Violations),
}

/// Judges `value` under `relative`, a key without its prefix, by itself (not against other records).
///
/// # Errors
/// When either does not hold.
pub fn check(relative: &str, value: &[u8]) -> Result<Checked, CheckError> {
    let key = Key::parse(relative)?;
    let summary = match (&key, Value::parse(&key, value)) {
        (_, Some(read)) => read?.summary(&key),
        (Key::Kubernetes(_, object), None) => kubernetes(object, value)?,
        (_, None) => String::new(),
    };
    let unknown = unknown_fields(&key, value);
    Ok(Checked { key, summary, unknown })
}

fn kubernetes(key: &KubernetesKey, value: &[u8]) -> Result<String, Violations> {
    Ok(match key {
        KubernetesKey::Namespace(name) => namespace(&Namespace::parse(name, value)?),
        KubernetesKey::Pod(ns, name) => pod(&Pod::parse(ns, name, value)?),
        KubernetesKey::NetworkPolicy(ns, name) => {
            PolicyEnvelope::parse_network_policy(ns, name, value)?;
            format!("NetworkPolicy {ns}/{name}; its spec is not checked here")
        }
        KubernetesKey::ClusterNetworkPolicy(name) => {
            PolicyEnvelope::parse_cluster_network_policy(name, value)?;
            format!("ClusterNetworkPolicy {name}; its spec is not checked here")
        }
        KubernetesKey::Node(name) => node(&KubernetesNode::parse(name, value)?),
        KubernetesKey::Leader => "leader of the copy; its value is not checked here".to_owned(),
        KubernetesKey::State => "state of the copy; its value is not checked here".to_owned(),
        KubernetesKey::Confirm => "confirmation for the copy; its value is not checked here".to_owned(),
    })
}

fn node(node: &KubernetesNode) -> String {
    let addresses = &node.internal_ips;
    let at = if addresses.is_empty() { "without InternalIP".to_owned() } else { format!("at {}", list(addresses)) };
    format!("Node {} {at}, with {}", node.name, counted(node.labels.len(), "label"))
}

fn namespace(namespace: &Namespace) -> String {
    format!("namespace {} with {}", namespace.name, counted(namespace.labels.len(), "label"))
}

fn pod(pod: &Pod) -> String {
    let place = pod.node_name.as_ref().map_or_else(|| "not scheduled yet".to_owned(), |node| format!("on node {node}"));
    let network = if pod.host_network { ", in the host network" } else { "" };
    let finished = if pod.is_finished() { ", finished" } else { "" };
    let addresses =
        if pod.pod_ips.is_empty() { "without address".to_owned() } else { format!("at {}", list(&pod.pod_ips)) };
    format!(
        "pod {}/{} {place} {addresses}{network}{finished}, with {} and {}",
        pod.namespace,
        pod.name,
        counted(pod.labels.len(), "label"),
        counted(pod.ports.len(), "named port")
    )
}

pub(crate) fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The first few of `items`, and how many follow.
pub(crate) fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 4;
    let mut items = items.into_iter();
    let shown: Vec<String> = items.by_ref().take(SHOWN).map(|i| i.to_string()).collect();
    match items.count() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
