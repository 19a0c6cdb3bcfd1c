//! `k8s/CLUSTER/nodes/NAME`: the fields of a Node that tell which node of the mesh it is.

use std::net::IpAddr;

use super::{Kind, Labels, Object, Place};
use crate::{KubernetesName, Violations, address::unicast, violation::Report};

const KIND: Kind = Kind { name: "Node", api_versions: &["v1"] };

/// Most entries of `status.addresses`.
const MAX_ADDRESSES: usize = 64;

/// Value of `k8s/CLUSTER/nodes/NAME`, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesNode {
    /// `metadata.name`
    pub name: KubernetesName,
    /// `metadata.labels`
    pub labels: Labels,
    /// The addresses in `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
}

impl KubernetesNode {
    /// The node that `value` under `k8s/CLUSTER/nodes/{name}` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it, another name than the key's too.
    pub fn parse(name: &KubernetesName, value: &[u8]) -> Result<Self, Violations> {
        let mut report = Report::default();
        let mut object = Object::read(value, KIND, Place { namespace: None, name }, &mut report)?;
        let mut internal_ips: Vec<IpAddr> = Vec::new();
        if let Some(mut status) = object.fields.object(&mut report, "status") {
            for mut entry in status.objects(&mut report, "addresses", MAX_ADDRESSES) {
                if entry.text(&mut report, "type").as_deref() == Some("InternalIP") {
                    internal_ips.extend(entry.parsed_unless_empty(&mut report, "address", unicast));
                }
            }
        }
        internal_ips.sort_unstable();
        internal_ips.dedup();
        report.finish(Some(Self { name: name.clone(), labels: object.labels, internal_ips }))
    }
}
