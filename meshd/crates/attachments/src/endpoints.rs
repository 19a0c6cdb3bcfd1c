//! Attachments as published to the mesh: `endpoints/ID/CONTAINER/IFNAME`.

use std::collections::BTreeMap;

use cni::daemon::{Attach, Attached};
use etcd_schema::{Attachment, Key, NodeId};
use ipnet::IpNet;

use super::AttachmentTable;

/// The records of this node: keys below the prefix, and values. Attachments without an address in `subnets`, which
/// other nodes would ignore, are left out; so are those whose ADD is under way.
#[must_use]
pub fn endpoints(table: &AttachmentTable, node: &NodeId, subnets: &[IpNet]) -> BTreeMap<String, Vec<u8>> {
    let records = table.attachments.values().filter_map(|attached| {
        let (key, record) = record(attached, node, subnets)?;
        Some((key.to_string(), record.to_json()))
    });
    records.collect()
}

/// The record of one attachment, as far as the mesh sees it.
#[must_use]
pub fn record(attached: &Attached, node: &NodeId, subnets: &[IpNet]) -> Option<(Key, Attachment)> {
    let mut attach = attached.attach.clone()?;
    attach.addresses.retain(|address| subnets.iter().any(|subnet| subnet.contains(address)));
    let record = Attachment::parse(&value(&attach)).ok()?;
    let key = Key::Endpoint(node.clone(), attached.container_id.parse().ok()?, attached.ifname.parse().ok()?);
    Some((key, record))
}

/// The value for an attachment, not judged yet.
pub(super) fn value(attach: &Attach) -> Vec<u8> {
    let pod = &attach.pod;
    let mut value = serde_json::json!({
        "pod": {"namespace": pod.namespace, "name": pod.name, "labels": pod.labels},
        "addresses": attach.addresses,
        "interface": attach.interface,
    });
    if !attach.allowed_sources.is_empty() {
        let sources: Vec<String> = attach.allowed_sources.iter().map(ToString::to_string).collect();
        value["allowedSources"] = sources.into();
    }
    if let Some(uid) = &pod.uid {
        value["uid"] = uid.as_str().into();
    }
    value.to_string().into_bytes()
}
