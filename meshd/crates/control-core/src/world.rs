//! Input of policies: Kubernetes objects and attachments, each parsed strictly and passed on one by one.
//!
//! There may be many thousands of them, but only one changes at a time, so they are not part of a `View`. Enforcement
//! receives the differences, key by key, through a [`WorldSink`].

use std::{collections::HashMap, sync::Arc};

use etcd_schema::{
    Attachment, Key, KubernetesKey, KubernetesNode, MAX_VALUE_BYTES, MIRROR_ANNOTATIONS, NamedPort, Namespace, Pod,
    PodPhase, PolicyEnvelope, Protocol, Reader, Violations,
};
use mesh::records::Revision;
use policy::{
    engine::PolicyState,
    object::{ClusterPolicy, Labels, NetworkPolicy, PodObject},
};
use serde_json::{Value, json};

/// What a key says, in the form that it is enforced in.
#[derive(Debug, Clone, PartialEq)]
pub enum WorldItem {
    /// `namespaces/NS`: its labels.
    Namespace(Labels),
    /// `pods/NS/NAME`
    Pod(PodObject),
    /// `k8s/CLUSTER/nodes/NAME`: which node of the mesh it is.
    Node(Arc<KubernetesNode>),
    /// `endpoints/ID/CONTAINERID/IFNAME`; holds only while its addresses lie in a subnet of that node.
    Attachment(Arc<Attachment>),
    /// `networkpolicies/NS/NAME`
    Policy(PolicyState),
    /// `clusternetworkpolicies/NAME`
    ClusterPolicy(Arc<ClusterPolicy>),
}

/// An item in force.
#[derive(Debug, Clone, PartialEq)]
pub struct WorldRecord {
    /// What it says.
    pub item: WorldItem,
    /// Revision at which its key came into being: of two pods with one address the newer one has it.
    pub create_revision: Revision,
    /// etcd does not hold it, or not with this value, and it stays in force for want of evidence: it yields an address to
    /// whatever claims it by a record that etcd holds.
    pub held: bool,
}

/// The newest state of each key that changed; `None`: nothing is in force for it any more.
pub type WorldChanges = HashMap<Key, Option<WorldRecord>>;

/// Takes what changed. Called from the control plane's task: it must not wait.
pub trait WorldSink: Send + Sync {
    /// Takes changes up to `revision`. `complete`: with all that was handed over before, they are a whole picture that
    /// may be enforced.
    fn changed(&self, changes: WorldChanges, revision: Revision, complete: bool);
}

/// What could be read of a value.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) item: WorldItem,
    /// The value without what nobody reads, for the cache.
    pub(super) reduced: Arc<[u8]>,
}

/// A value that does not hold.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) violations: Violations,
    /// What is enforced if no earlier value of the key held.
    pub(super) remains: Option<Box<WorldItem>>,
}

impl Refusal {
    /// What stands for the value under `key`, if no earlier one held; `rewritten`: the key was written more than once.
    pub(super) fn in_force(&self, key: &Key, rewritten: bool) -> Option<WorldItem> {
        match (&self.remains, key) {
            (Some(remains), _) => Some(WorldItem::clone(remains)),
            (None, Key::Kubernetes(_, KubernetesKey::NetworkPolicy(..))) if rewritten => {
                Some(WorldItem::Policy(PolicyState::IsolatesNamespace))
            }
            (None, _) => None,
        }
    }
}

/// How an item that stands for an unreadable value shows in status.
pub(super) fn effect(item: Option<&WorldItem>, key: &Key) -> String {
    match (item, key) {
        (Some(WorldItem::Policy(PolicyState::Isolates(..))), _) => {
            "the pods it selects are isolated in its directions, and it allows nothing".to_owned()
        }
        (
            Some(WorldItem::Policy(PolicyState::IsolatesNamespace)),
            Key::Kubernetes(_, KubernetesKey::NetworkPolicy(namespace, _)),
        ) => {
            format!("all pods of namespace {namespace} are isolated in both directions")
        }
        (Some(_), _) => "its readable rules are in force, the others deny".to_owned(),
        (None, Key::Kubernetes(_, KubernetesKey::Pod(..) | KubernetesKey::Namespace(_))) => {
            "its labels are treated as unknown".to_owned()
        }
        (None, Key::Kubernetes(_, KubernetesKey::Node(_))) => "no node of the mesh is this node".to_owned(),
        (None, _) => "it has no effect".to_owned(),
    }
}

/// Reads the value of a key that policies are made of; `None`: the key is of another kind.
pub(super) fn read(key: &Key, bytes: &[u8]) -> Option<Result<Read, Refusal>> {
    if key.rules().reader != Reader::Policy {
        return None;
    }
    if bytes.len() > MAX_VALUE_BYTES {
        let found = format!("{} bytes", bytes.len());
        let violations = Violations::one("", found, format!("at most {MAX_VALUE_BYTES} bytes are allowed"));
        return Some(Err(Refusal { violations, remains: None }));
    }
    let plain = |violations| Refusal { violations, remains: None };
    Some(match key {
        Key::Endpoint(..) => Attachment::parse(bytes)
            .map(|attachment| Read { reduced: bytes.into(), item: WorldItem::Attachment(Arc::new(attachment)) })
            .map_err(plain),
        Key::Kubernetes(_, KubernetesKey::Namespace(name)) => {
            Namespace::parse(name, bytes).map(|namespace| namespace_item(&namespace)).map_err(plain)
        }
        Key::Kubernetes(_, KubernetesKey::Pod(namespace, name)) => {
            Pod::parse(namespace, name, bytes).map(|pod| pod_item(&pod)).map_err(plain)
        }
        Key::Kubernetes(_, KubernetesKey::Node(name)) => {
            KubernetesNode::parse(name, bytes).map(node_item).map_err(plain)
        }
        Key::Kubernetes(_, KubernetesKey::NetworkPolicy(namespace, name)) => {
            match PolicyEnvelope::parse_network_policy(namespace, name, bytes) {
                Ok(envelope) => network_policy(&envelope),
                Err(violations) => {
                    // What of it can be told from its spec, whatever name stands on it.
                    let remains = PolicyEnvelope::spec_alone(bytes).and_then(|spec| remains_of(&spec));
                    Err(Refusal { violations, remains: remains.map(Box::new) })
                }
            }
        }
        Key::Kubernetes(_, KubernetesKey::ClusterNetworkPolicy(name)) => {
            match PolicyEnvelope::parse_cluster_network_policy(name, bytes) {
                Ok(envelope) => cluster_policy(&envelope),
                Err(violations) => Err(plain(violations)),
            }
        }
        _ => return None,
    })
}

fn network_policy(envelope: &PolicyEnvelope) -> Result<Read, Refusal> {
    match NetworkPolicy::parse(&envelope.spec) {
        Ok(policy) => {
            let item = WorldItem::Policy(PolicyState::Valid(policy));
            Ok(Read { item, reduced: reduced_policy(envelope, "networking.k8s.io/v1", "NetworkPolicy") })
        }
        Err(invalid) => {
            let remains = invalid.isolates.map(|(subject, to)| WorldItem::Policy(PolicyState::Isolates(subject, to)));
            Err(Refusal { violations: violations(&invalid.violations), remains: remains.map(Box::new) })
        }
    }
}

fn cluster_policy(envelope: &PolicyEnvelope) -> Result<Read, Refusal> {
    match ClusterPolicy::parse(&envelope.spec) {
        Ok(policy) => {
            let item = WorldItem::ClusterPolicy(Arc::new(policy));
            let reduced = reduced_policy(envelope, "policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy");
            Ok(Read { item, reduced })
        }
        Err(invalid) => {
            let remains = invalid.fail_closed.map(|policy| WorldItem::ClusterPolicy(Arc::new(policy)));
            Err(Refusal { violations: violations(&invalid.violations), remains: remains.map(Box::new) })
        }
    }
}

/// The pods and directions that a spec names.
fn remains_of(spec: &Value) -> Option<WorldItem> {
    let (subject, directions) = match NetworkPolicy::parse(spec) {
        Ok(policy) => {
            let directions =
                policy::object::Directions { ingress: policy.ingress.is_some(), egress: policy.egress.is_some() };
            (policy.subject, directions)
        }
        Err(invalid) => invalid.isolates?,
    };
    Some(WorldItem::Policy(PolicyState::Isolates(subject, directions)))
}

fn violations(of: &policy::object::Violations) -> Violations {
    Violations::one("", of.to_string(), "correct it so that the API server would accept it")
}

fn reduced_policy(envelope: &PolicyEnvelope, api_version: &str, kind: &str) -> Arc<[u8]> {
    let mut metadata = json!({"name": envelope.name.as_str()});
    if let Some(namespace) = &envelope.namespace {
        metadata["namespace"] = namespace.as_str().into();
    }
    let object = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": envelope.spec});
    object.to_string().into_bytes().into()
}

fn namespace_item(namespace: &Namespace) -> Read {
    let object = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": namespace.name.as_str(), "labels": namespace.labels},
    });
    Read { item: WorldItem::Namespace(labels(&namespace.labels)), reduced: object.to_string().into_bytes().into() }
}

fn node_item(node: KubernetesNode) -> Read {
    let addresses: Vec<Value> =
        node.internal_ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let object = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name.as_str(), "labels": node.labels}, "status": {"addresses": addresses},
    });
    Read { item: WorldItem::Node(Arc::new(node)), reduced: object.to_string().into_bytes().into() }
}

fn pod_item(pod: &Pod) -> Read {
    let ports = |port: &NamedPort| json!({"name": port.name, "protocol": protocol(port.protocol).as_str(), "containerPort": port.port});
    let mut object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod.name.as_str(), "namespace": pod.namespace.as_str(), "labels": pod.labels},
        "spec": {"hostNetwork": pod.host_network,
                 "containers": [{"ports": pod.ports.iter().map(ports).collect::<Vec<_>>()}]},
        "status": {"phase": phase(pod.phase),
                   "podIPs": pod.pod_ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()},
    });
    if let Some(uid) = &pod.uid {
        object["metadata"]["uid"] = uid.as_str().into();
    }
    if let Some(uid) = &pod.static_uid {
        for annotation in MIRROR_ANNOTATIONS {
            object["metadata"]["annotations"][annotation] = uid.as_str().into();
        }
    }
    if let Some(node) = &pod.node_name {
        object["spec"]["nodeName"] = node.as_str().into();
    }
    let item = WorldItem::Pod(PodObject {
        uid: pod.uid.as_deref().map(Into::into),
        static_uid: pod.static_uid.as_deref().map(Into::into),
        labels: labels(&pod.labels),
        ports: pod
            .ports
            .iter()
            .map(|port| policy::object::NamedPort {
                name: port.name.as_str().into(),
                protocol: protocol(port.protocol),
                port: port.port,
            })
            .collect(),
        addresses: pod.pod_ips.clone(),
        node: pod.node_name.as_ref().map(|node| node.as_str().into()),
        host_network: pod.host_network,
        finished: pod.is_finished(),
    });
    Read { item, reduced: object.to_string().into_bytes().into() }
}

/// Labels as policies read them.
pub fn labels(of: &etcd_schema::Labels) -> Labels {
    of.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

const fn protocol(protocol: Protocol) -> policy::object::Protocol {
    match protocol {
        Protocol::Tcp => policy::object::Protocol::Tcp,
        Protocol::Udp => policy::object::Protocol::Udp,
        Protocol::Sctp => policy::object::Protocol::Sctp,
    }
}

const fn phase(phase: PodPhase) -> &'static str {
    match phase {
        PodPhase::Pending => "Pending",
        PodPhase::Running => "Running",
        PodPhase::Succeeded => "Succeeded",
        PodPhase::Failed => "Failed",
        PodPhase::Unknown => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::parse(text).unwrap()
    }

    #[test]
    fn what_the_cache_keeps_says_the_same() {
        let pod = r#"{"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "db", "namespace": "shop", "uid": "u1", "labels": {"app": "db"}, "managedFields": [{}],
                "annotations": {"kubernetes.io/config.mirror": "5f", "kubernetes.io/config.hash": "5f", "a": "b"}},
            "spec": {"nodeName": "n1", "initContainers": [{"restartPolicy": "Always",
                "ports": [{"name": "metrics", "containerPort": 9100}]}],
                "containers": [{"image": "x", "ports": [{"name": "pg", "containerPort": 5432, "protocol": "TCP"}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.10"}, {"ip": "fd42:244:0:1::10"}]}}"#;
        let policy = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "p", "namespace": "shop", "annotations": {"a": "b"}},
            "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}}"#;
        let namespace =
            r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"a": "b"}}}"#;
        let node = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"a": "b"}},
            "spec": {"podCIDR": "10.244.1.0/24"}, "status": {"addresses": [{"type": "Hostname", "address": "n1"},
            {"type": "InternalIP", "address": "192.0.2.1"}]}}"#;
        for (name, value) in [
            ("pods/shop/db", pod),
            ("networkpolicies/shop/p", policy),
            ("namespaces/shop", namespace),
            ("k8s/east/nodes/n1", node),
        ] {
            let first = read(&key(name), value.as_bytes()).unwrap().unwrap();
            let again = read(&key(name), &first.reduced).unwrap().unwrap();
            assert_eq!(first.item, again.item);
            assert_eq!(first.reduced, again.reduced);
            assert!(first.reduced.len() < value.len());
        }
    }

    #[test]
    fn an_unreadable_policy_isolates_whom_it_can_be_seen_to_select() {
        let policy = |spec: &str, name: &str| {
            format!(
                r#"{{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {{"name": "{name}", "namespace": "shop"}}, "spec": {spec}}}"#
            )
        };
        let key = key("networkpolicies/shop/p");
        let in_force = |value: &str, rewritten| {
            let refusal = read(&key, value.as_bytes()).unwrap().unwrap_err();
            refusal.in_force(&key, rewritten)
        };
        let isolates = |item: Option<WorldItem>, ingress, egress| match item {
            Some(WorldItem::Policy(PolicyState::Isolates(_, directions))) => {
                assert_eq!((directions.ingress, directions.egress), (ingress, egress));
            }
            other => panic!("{other:?}"),
        };
        let bad_port = r#"{"podSelector": {}, "egress": [{"ports": [{"port": 0}]}]}"#;
        isolates(in_force(&policy(bad_port, "p"), false), true, true);
        isolates(in_force(&policy(r#"{"podSelector": {}, "frob": 1}"#, "p"), false), true, false);
        isolates(in_force(&policy(r#"{"podSelector": {}}"#, "another"), false), true, false);
        assert_eq!(in_force("not an object: [", false), None);
        assert_eq!(in_force("not an object: [", true), Some(WorldItem::Policy(PolicyState::IsolatesNamespace)));
    }
}
