//! Validation of any value before `etcdctl put`.

use std::fmt::Display;

use crate::{
    Alive, Attachment, Key, KeyError, KubernetesKey, Namespace, NetworkConfig, NodeRecord, OutsidePeer, Pod,
    PolicyEnvelope, Removed, SubnetKey, SubnetLease, UnknownField, Violations, unknown::unknown_fields,
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
    let summary = match &key {
        Key::Config => config(&NetworkConfig::parse(value)?),
        Key::Subnet(subnet) => subnet_lease(subnet, &SubnetLease::parse(value)?),
        Key::Node(id) => node(id, &NodeRecord::parse(value)?),
        Key::Removed(id) => removed(id, &Removed::parse(value)?),
        Key::Alive(id) => {
            let alive = Alive::parse(value)?;
            format!("node {id} is alive, start {}", alive.start_count)
        }
        Key::Peer(name) => peer(name, &OutsidePeer::parse(value)?),
        Key::Endpoint(id, ..) => attachment(id, &Attachment::parse(value)?),
        Key::Kubernetes(_, key) => kubernetes(key, value)?,
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
        KubernetesKey::Node(name) => format!("Node {name}; its value is not checked here"),
        KubernetesKey::Leader => "leader of the copy; its value is not checked here".to_owned(),
        KubernetesKey::State => "state of the copy; its value is not checked here".to_owned(),
    })
}

fn config(config: &NetworkConfig) -> String {
    let mut pools = Vec::new();
    if let Some(pool) = &config.ipv4 {
        pools.push(format!("{} with {} subnets of /{}", pool.network, pool.subnet_count(), pool.subnet_len));
    }
    if let Some(pool) = &config.ipv6 {
        pools.push(format!("{} with {} subnets of /{}", pool.network, pool.subnet_count(), pool.subnet_len));
    }
    let direct = if config.backend.direct_routing { ", direct routing within a site" } else { "" };
    let mtu = config.backend.mtu.map_or_else(|| "MTU measured".to_owned(), |mtu| format!("MTU {mtu}"));
    format!(
        "network {}; {}{direct}; {mtu}; lease TTL {} s",
        pools.join(" and "),
        config.backend.kind,
        config.lease_ttl.as_secs()
    )
}

fn subnet_lease(subnet: &SubnetKey, lease: &SubnetLease) -> String {
    let owner = match (&lease.node, lease.public_ip, lease.public_ipv6) {
        (Some(node), ..) => format!("for node {node}"),
        (None, Some(address), _) => format!("for the host at {address}"),
        (None, None, Some(address)) => format!("for the host at {address}"),
        (None, None, None) => "reserved".to_owned(),
    };
    format!("subnet {} {owner}", list(subnet.prefixes()))
}

fn node(id: &impl Display, node: &NodeRecord) -> String {
    let site = node.site.as_ref().map_or_else(String::new, |site| format!(", site {site}"));
    let reached = if node.endpoints.is_empty() {
        "initiates handshakes only".to_owned()
    } else {
        format!("endpoints {}", list(&node.endpoints))
    };
    let rotation = if node.next_public_key.is_some() { ", key rotation in progress" } else { "" };
    format!("node {id}, name {}{site}, key {}{rotation}, {reached}", node.name, node.public_key)
}

fn removed(id: &impl Display, removed: &Removed) -> String {
    let name = removed.name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
    format!("node {id}{name} removed, with {}", counted(removed.public_keys.len(), "public key"))
}

fn peer(name: &impl Display, peer: &OutsidePeer) -> String {
    let reached = peer.endpoint.map_or_else(|| "initiates connections".to_owned(), |e| format!("endpoint {e}"));
    let secret = if peer.preshared_key.is_some() { ", with a pre-shared key" } else { "" };
    format!("external peer {name}, key {}{secret}, {reached}, allowed IPs {}", peer.public_key, list(&peer.allowed_ips))
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

fn attachment(id: &impl Display, attachment: &Attachment) -> String {
    format!(
        "interface {} on node {id} of pod {}/{}, addresses {}",
        attachment.interface,
        attachment.pod.namespace,
        attachment.pod.name,
        list(&attachment.addresses)
    )
}

fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The first few of `items`, and how many follow.
fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 4;
    let mut items = items.into_iter();
    let shown: Vec<String> = items.by_ref().take(SHOWN).map(|i| i.to_string()).collect();
    match items.count() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
