//! Pods and namespaces, in the short form of test worlds.

use std::{net::IpAddr, sync::Arc};

use etcd_schema::{
    Violations,
    reading::{Report, describe, quoted},
};
use serde_json::Value;

use super::{
    labels::Labels,
    port::Protocol,
    reader::{At, ObjectFields},
};

/// A container's port that has a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// The name. One pod may give it to several ports.
    pub name: Arc<str>,
    /// The protocol that it is a port of.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// The fields of a Pod object that policies need.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodObject {
    /// `metadata.uid`
    pub uid: Option<Arc<str>>,
    /// Of the mirror object of a static pod: the pod's UID at its node, which is the hash of its manifest.
    pub static_uid: Option<Arc<str>>,
    /// `metadata.labels`
    pub labels: Labels,
    /// Named ports of containers, and of init containers that go on running.
    pub ports: Vec<NamedPort>,
    /// `status.podIPs`, or `status.podIP` where there are none.
    pub addresses: Vec<IpAddr>,
    /// `spec.nodeName`
    pub node: Option<Arc<str>>,
    /// `spec.hostNetwork`: its addresses are its node's.
    pub host_network: bool,
    /// `status.phase` is Succeeded or Failed: its addresses are no longer its own.
    pub finished: bool,
}

/// The pod that `object` describes, and its namespace and name:
/// `{ns, name, ip | ips, labels, node, hostNetwork, phase, ports: [{name, protocol, containerPort}]}`.
///
/// # Errors
/// Violations in the used fields.
pub fn pod_from(object: &Value) -> Result<(Arc<str>, Arc<str>, PodObject), Violations> {
    let mut report = Report::default();
    let root = At { path: String::new(), value: object };
    let mut pod = PodObject::default();
    let mut place = None;
    if let Some(fields) = root.object(&mut report) {
        place = read_short(&fields, &mut pod, &mut report);
        if place.is_none() {
            report.add("name", "missing", "a pod needs its namespace and its name");
        }
    }
    let mut seen = Vec::new();
    pod.addresses.retain(|address| {
        let new = !seen.contains(address);
        seen.push(*address);
        new
    });
    match (report.into_violations(), place) {
        (None, Some((namespace, name))) => Ok((namespace, name, pod)),
        (Some(violations), _) => Err(violations),
        (None, None) => Err(Violations::one("name", "unreadable", "rewrite it")),
    }
}

/// The name and labels of the Namespace that `object` is.
///
/// # Errors
/// Violations in the used fields.
pub fn namespace_from(object: &Value) -> Result<(Arc<str>, Labels), Violations> {
    let mut report = Report::default();
    let root = At { path: String::new(), value: object };
    let metadata = root.object(&mut report).and_then(|fields| fields.get("metadata"));
    let fields = metadata.as_ref().and_then(|at| at.object(&mut report));
    let name = fields.and_then(|fields| fields.text("name", &mut report));
    let labels = fields.map(|fields| read_labels(&fields, &mut report)).unwrap_or_default();
    if name.is_none() {
        report.add("metadata.name", "missing", "a namespace needs its name");
    }
    match (report.into_violations(), name) {
        (None, Some(name)) => Ok((name.into(), labels)),
        (Some(violations), _) => Err(violations),
        (None, None) => Err(Violations::one("metadata", "unreadable", "rewrite it")),
    }
}

type Place = (Arc<str>, Arc<str>);

fn read_short(fields: &ObjectFields<'_>, pod: &mut PodObject, report: &mut Report) -> Option<Place> {
    pod.uid = fields.text("uid", report).map(Into::into);
    pod.labels = read_labels(fields, report);
    pod.host_network = fields.get("hostNetwork").is_some_and(|at| at.value == &Value::Bool(true));
    pod.node = fields.text("node", report).filter(|node| !node.is_empty()).map(Into::into);
    pod.finished = finished(fields.text("phase", report));
    for at in fields.list("ips", report) {
        pod.addresses.extend(address(&at, report));
    }
    pod.addresses.extend(fields.get("ip").and_then(|at| address(&at, report)));
    read_ports(fields, &mut pod.ports, report);
    Some((fields.text("ns", report)?.into(), fields.text("name", report)?.into()))
}

fn finished(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn read_labels(fields: &ObjectFields<'_>, report: &mut Report) -> Labels {
    let Some(at) = fields.get("labels") else { return Labels::default() };
    if at.object(report).is_none() {
        return Labels::default();
    }
    let entries = at.value.as_object().into_iter().flatten();
    entries
        .filter_map(|(key, value)| {
            let at = At { path: format!("{}[{key}]", at.path), value };
            Some((key.as_str(), at.text(report)?))
        })
        .collect()
}

fn read_ports(container: &ObjectFields<'_>, ports: &mut Vec<NamedPort>, report: &mut Report) {
    for at in container.list("ports", report) {
        let Some(fields) = at.object(report) else { continue };
        let Some(name) = fields.text("name", report).filter(|name| !name.is_empty()) else { continue };
        let protocol = match fields.text("protocol", report).filter(|text| !text.is_empty()) {
            None => Some(Protocol::Tcp),
            Some(text) => {
                let protocol = Protocol::from_name(text);
                if protocol.is_none() {
                    report.add(fields.path("protocol"), quoted(text), "must be TCP, UDP or SCTP");
                }
                protocol
            }
        };
        let port = fields.get("containerPort").and_then(|at| super::port::number(&at, report));
        if let (Some(protocol), Some(port)) = (protocol, port) {
            ports.push(NamedPort { name: name.into(), protocol, port });
        }
    }
}

fn address(at: &At<'_>, report: &mut Report) -> Option<IpAddr> {
    let text = at.text(report)?;
    if text.is_empty() {
        return None;
    }
    let address = text.parse().ok();
    if address.is_none() {
        report.add(&at.path, describe(at.value), "must be an IP address");
    }
    address
}
