//! Objects of the API server → keys and canonical values: the fields that policies need, in a fixed order.
//!
//! A value is what `kubectl get -o json` prints with most of it left out, so the reader of keys that operators put
//! themselves reads it too. What is not of the expected shape is kept as it came: the reader on the nodes refuses it,
//! and fails closed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};

use crate::ObjectKind;

/// Longest value; etcd takes requests of 1.5 MiB.
const MAX_VALUE: usize = 1 << 20;

/// The fields of a policy's spec that determine its subject.
const SELECTING_FIELDS: [&str; 5] = ["podSelector", "policyTypes", "tier", "priority", "subject"];

/// Annotations of the mirror object of a static pod, which say the pod's UID at its node.
const MIRROR_ANNOTATIONS: [&str; 2] = ["kubernetes.io/config.hash", "kubernetes.io/config.mirror"];

/// An object as it is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanonicalObject {
    /// Its kind.
    pub kind: ObjectKind,
    /// `NS/NAME` or `NAME`.
    pub path: String,
    /// The value of its key.
    pub value: Vec<u8>,
    /// Its resource version.
    pub resource_version: String,
    /// The object has an unexpected form; the value is verbatim.
    pub verbatim: bool,
}

/// An object without a usable name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a {kind} without a usable name: {reason}", kind = .kind.name())]
pub struct Nameless {
    kind: ObjectKind,
    reason: String,
}

#[derive(Deserialize)]
struct SpecOnly {
    spec: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct NamedObject {
    metadata: NameOnly,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NameOnly {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize)]
struct Slim<S, T> {
    metadata: SourceMetadata,
    spec: Option<S>,
    status: Option<T>,
}

#[derive(Deserialize)]
struct SourceMetadata {
    uid: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<PodContainer>>,
    init_containers: Option<Vec<PodContainer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodContainer {
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize, Serialize)]
struct PodIp {
    ip: String,
}

#[derive(Deserialize)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Deserialize, Serialize)]
struct NodeAddress {
    r#type: String,
    address: String,
}

#[derive(Deserialize)]
struct PolicyBody<'j> {
    metadata: SourceMetadata,
    #[serde(borrow)]
    spec: Option<&'j RawValue>,
}

/// Nothing of it is read.
#[derive(Deserialize)]
struct Ignored {}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Canonical<'a, S, T> {
    api_version: &'a str,
    kind: &'a str,
    metadata: CanonicalMetadata<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<S>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<T>,
}

#[derive(Serialize, Default)]
struct CanonicalMetadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CanonicalPodSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    node_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_network: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    containers: Vec<CanonicalContainer>,
}

#[derive(Serialize)]
struct CanonicalContainer {
    ports: Vec<ContainerPort>,
}

#[derive(Serialize)]
struct CanonicalPodStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<String>,
    #[serde(rename = "podIPs", skip_serializing_if = "Vec::is_empty")]
    pod_ips: Vec<PodIp>,
}

#[derive(Serialize)]
struct CanonicalNodeSpec {
    #[serde(rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pod_cidrs: Vec<String>,
}

#[derive(Serialize)]
struct CanonicalNodeStatus {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<NodeAddress>,
}

/// Reads an object from a list or a watch of `kind` at `api_version`; items of a list lack kind and version.
///
/// # Errors
/// When it has no name that can be part of a key.
pub fn read(kind: ObjectKind, api_version: &str, json: &str) -> Result<CanonicalObject, Nameless> {
    let nameless = |reason: String| Nameless { kind, reason };
    let NameOnly { name, namespace, resource_version } =
        serde_json::from_str::<NamedObject>(json).map_err(|error| nameless(error.to_string()))?.metadata;
    let namespace = namespace.filter(|namespace| !namespace.is_empty());
    if namespace.is_some() != kind.is_namespaced() {
        return Err(nameless(format!("namespace {namespace:?}")));
    }
    for part in [Some(&name), namespace.as_ref()].into_iter().flatten() {
        if part.is_empty() || part.len() > 253 || !part.bytes().all(|b| b.is_ascii_graphic() && b != b'/') {
            return Err(nameless(format!("{part:?}")));
        }
    }
    let path = namespace.as_ref().map_or_else(|| name.clone(), |namespace| format!("{namespace}/{name}"));
    let place = ObjectPlace { kind, api_version, name: &name, namespace: namespace.as_deref() };
    let reduced = match kind {
        ObjectKind::Namespace => place.namespace(json),
        ObjectKind::Node => place.node(json),
        ObjectKind::NetworkPolicy | ObjectKind::ClusterNetworkPolicy => place.policy(json),
        ObjectKind::Pod => place.pod(json),
    };
    let verbatim = reduced.is_err();
    let mut value = reduced.unwrap_or_else(|_| json.as_bytes().to_vec());
    if value.len() > MAX_VALUE {
        value = place.shortened(json);
    }
    Ok(CanonicalObject { kind, path, value, resource_version, verbatim })
}

/// Kind, key and cluster of an object.
struct ObjectPlace<'a> {
    kind: ObjectKind,
    api_version: &'a str,
    name: &'a str,
    namespace: Option<&'a str>,
}

impl<'a> ObjectPlace<'a> {
    fn namespace(&self, json: &str) -> serde_json::Result<Vec<u8>> {
        let object: Slim<Ignored, Ignored> = serde_json::from_str(json)?;
        self.write(CanonicalMetadata::labelled(object.metadata), None::<()>, None::<()>)
    }

    fn node(&self, json: &str) -> serde_json::Result<Vec<u8>> {
        let object: Slim<NodeSpec, NodeStatus> = serde_json::from_str(json)?;
        let spec = object.spec.map(|spec| {
            let pod_cidrs = spec.pod_cidrs.filter(|cidrs| !cidrs.is_empty());
            CanonicalNodeSpec { pod_cidrs: pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect()) }
        });
        let status = object.status.map(|status| {
            let mut addresses = status.addresses.unwrap_or_default();
            addresses.retain(|address| address.r#type == "InternalIP");
            CanonicalNodeStatus { addresses }
        });
        self.write(CanonicalMetadata::labelled(object.metadata), spec, status)
    }

    fn policy(&self, json: &str) -> serde_json::Result<Vec<u8>> {
        let object: PolicyBody<'_> = serde_json::from_str(json)?;
        let metadata = CanonicalMetadata { uid: object.metadata.uid, ..CanonicalMetadata::default() };
        self.write(metadata, object.spec, None::<()>)
    }

    fn pod(&self, json: &str) -> serde_json::Result<Vec<u8>> {
        let mut object: Slim<PodSpec, PodStatus> = serde_json::from_str(json)?;
        let annotations = object.metadata.annotations.take();
        let mut metadata = CanonicalMetadata::labelled(object.metadata);
        for (name, value) in annotations.into_iter().flatten() {
            if MIRROR_ANNOTATIONS.contains(&name.as_str()) {
                metadata.annotations.insert(name, value);
            }
        }
        let host_network = object.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
        let spec = object.spec.map(|spec| CanonicalPodSpec {
            node_name: spec.node_name.filter(|name| !name.is_empty()),
            host_network: host_network.then_some(true),
            containers: named_ports(spec.containers, spec.init_containers),
        });
        let status = object.status.map(|status| {
            let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            let mut pod_ips = status.pod_ips.unwrap_or_default();
            if pod_ips.is_empty() {
                pod_ips.extend(status.pod_ip.filter(|ip| !ip.is_empty()).map(|ip| PodIp { ip }));
            }
            // They may be another pod's by now, or are the node's.
            if finished || host_network {
                pod_ips.clear();
            }
            CanonicalPodStatus { phase: status.phase, pod_ips }
        });
        self.write(metadata, spec, status)
    }

    /// A shortened object that nodes refuse. Of a policy's spec it keeps the subject, so that nodes close these pods,
    /// and an unknown field.
    fn shortened(&self, json: &str) -> Vec<u8> {
        let spec = || {
            let mut spec = serde_json::from_str::<SpecOnly>(json).ok()?.spec?;
            if self.kind == ObjectKind::NetworkPolicy
                && !spec.contains_key("policyTypes")
                && spec.contains_key("egress")
            {
                spec.insert("policyTypes".to_owned(), Value::from(vec!["Ingress", "Egress"]));
            }
            spec.retain(|field, _| SELECTING_FIELDS.contains(&field.as_str()));
            spec.insert("tooLong".to_owned(), true.into());
            Some(spec)
        };
        let is_policy = matches!(self.kind, ObjectKind::NetworkPolicy | ObjectKind::ClusterNetworkPolicy);
        let with = |spec: Option<Map<String, Value>>| {
            self.write(CanonicalMetadata::default(), spec, None::<()>).unwrap_or_default()
        };
        let with_spec = with(if is_policy { spec() } else { None });
        if with_spec.len() > MAX_VALUE { with(None) } else { with_spec }
    }

    fn write<S: Serialize, T: Serialize>(
        &self,
        metadata: CanonicalMetadata<'a>,
        spec: Option<S>,
        status: Option<T>,
    ) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Canonical {
            api_version: self.api_version,
            kind: self.kind.name(),
            metadata: CanonicalMetadata { name: self.name, namespace: self.namespace, ..metadata },
            spec,
            status,
        })
    }
}

impl CanonicalMetadata<'_> {
    fn labelled(of: SourceMetadata) -> Self {
        Self { uid: of.uid, labels: of.labels.unwrap_or_default(), ..Self::default() }
    }
}

/// The named ports of containers, and of init containers that go on running, container by container.
fn named_ports(containers: Option<Vec<PodContainer>>, init: Option<Vec<PodContainer>>) -> Vec<CanonicalContainer> {
    let sidecars = init.unwrap_or_default().into_iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let all = containers.unwrap_or_default().into_iter().chain(sidecars);
    all.map(|container| CanonicalContainer {
        ports: container.ports.unwrap_or_default().into_iter().filter(|port| port.name.is_some()).collect(),
    })
    .filter(|container| !container.ports.is_empty())
    .collect()
}

#[cfg(test)]
mod tests;
