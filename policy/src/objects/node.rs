//! `k8s/CLUSTER/nodes/NAME`: the fields of a Node that tell which node of the mesh it is.

use std::{fmt::Display, net::IpAddr};

use etcd_schema::{
    Labels, Violations,
    reading::{Fields, Report, counted, list, unicast},
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::envelope::{Envelope, Kind, Place};

const KIND: Kind = Kind { name: "Node", api_versions: &["v1"] };

/// Most entries of `status.addresses`.
const MAX_ADDRESSES: usize = 64;
/// Most entries of `spec.podCIDRs`; the API server takes one of each family.
const MAX_CIDRS: usize = 8;

/// A Node, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesNode {
    /// `metadata.labels`
    pub labels: Labels,
    /// The addresses in `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`
    pub pod_cidrs: Vec<IpNet>,
}

/// The node that `fields` are.
pub(super) fn read(fields: Fields, place: Place<'_>) -> Result<KubernetesNode, Violations> {
    let mut report = Report::default();
    let mut envelope = Envelope::read(fields, KIND, place, &mut report)?;
    let mut internal_ips: Vec<IpAddr> = Vec::new();
    if let Some(mut status) = envelope.fields.object(&mut report, "status") {
        for mut entry in status.objects(&mut report, "addresses", MAX_ADDRESSES) {
            if entry.text(&mut report, "type").as_deref() == Some("InternalIP") {
                internal_ips.extend(entry.parsed_unless_empty(&mut report, "address", unicast));
            }
        }
    }
    internal_ips.sort_unstable();
    internal_ips.dedup();
    let cidr = |text: &str| text.parse::<IpNet>().map_err(|_| "must be a prefix".into());
    let spec = envelope.fields.object(&mut report, "spec");
    let pod_cidrs = spec.and_then(|mut spec| spec.texts(&mut report, "podCIDRs", MAX_CIDRS, cidr)).unwrap_or_default();
    report.finish(Some(KubernetesNode { labels: envelope.labels, internal_ips, pod_cidrs }))
}

/// The object reduced to the fields that are read.
pub(super) fn canonical(place: Place<'_>, node: &KubernetesNode) -> Value {
    let addresses: Vec<Value> =
        node.internal_ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let cidrs: Vec<String> = node.pod_cidrs.iter().map(ToString::to_string).collect();
    json!({
        "apiVersion": "v1", "kind": KIND.name,
        "metadata": {"name": place.name.as_str(), "labels": node.labels}, "spec": {"podCIDRs": cidrs},
        "status": {"addresses": addresses},
    })
}

/// A one-line summary for operators.
pub(super) fn summary(name: &impl Display, node: &KubernetesNode) -> String {
    let addresses = &node.internal_ips;
    let at = if addresses.is_empty() { "without InternalIP".to_owned() } else { format!("at {}", list(addresses)) };
    format!("Node {name} {at}, with {}", counted(node.labels.len(), "label"))
}
