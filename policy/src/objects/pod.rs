//! `pods/NS/NAME`: the fields of a pod that policies need.

use std::{net::IpAddr, sync::Arc};

use etcd_schema::{
    NodeName, Violations,
    reading::{Expected, Fields, Report, counted, list, uid, unicast},
};
use serde_json::{Map, Value, json};

use super::{
    envelope::{Envelope, Kind, Place},
    plain_labels,
};
use crate::object::{NamedPort, PodObject, Protocol};

const KIND: Kind = Kind { name: "Pod", api_versions: &["v1"] };

/// The annotations that mark a mirror object and name its source; both hold the manifest's hash.
const MIRROR_ANNOTATIONS: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// Most containers, and most init containers.
const MAX_CONTAINERS: usize = 256;
/// Most ports of one container.
const MAX_PORTS: usize = 1024;
/// Most entries of `status.podIPs`.
const MAX_ADDRESSES: usize = 16;

/// The pod that `fields` are, with its `status.phase`.
pub(super) fn read(fields: Fields, place: Place<'_>) -> Result<(PodObject, &'static str), Violations> {
    let mut report = Report::default();
    let mut envelope = Envelope::read(fields, KIND, place, &mut report)?;
    let mut pod = PodObject {
        uid: envelope.uid.map(Into::into),
        static_uid: static_uid(&envelope.annotations),
        labels: plain_labels(&envelope.labels),
        ..PodObject::default()
    };
    let mut phase = PENDING;
    if let Some(mut spec) = envelope.fields.object(&mut report, "spec") {
        pod.host_network = spec.boolean(&mut report, "hostNetwork").unwrap_or(false);
        let node = spec.parsed_unless_empty(&mut report, "nodeName", NodeName::read);
        pod.node = node.map(|node| node.as_str().into());
        read_ports(&mut spec, "containers", |_, _| true, &mut pod.ports, &mut report);
        read_ports(&mut spec, "initContainers", goes_on, &mut pod.ports, &mut report);
    }
    if let Some(mut status) = envelope.fields.object(&mut report, "status") {
        phase = status.parsed_unless_empty(&mut report, "phase", read_phase).unwrap_or(PENDING);
        pod.finished = FINISHED.contains(&phase);
        pod.addresses = read_addresses(&mut status, &mut report);
    }
    report.finish(Some((pod, phase)))
}

/// The object reduced to the fields that are read.
pub(super) fn canonical(place: Place<'_>, pod: &PodObject, phase: &str) -> Value {
    let ports =
        |port: &NamedPort| json!({"name": &*port.name, "protocol": port.protocol.as_str(), "containerPort": port.port});
    let labels: Map<String, Value> =
        pod.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned().into())).collect();
    let mut object = json!({
        "apiVersion": "v1", "kind": KIND.name,
        "metadata": {
            "name": place.name.as_str(),
            "namespace": place.namespace.map(etcd_schema::KubernetesName::as_str),
            "labels": labels,
        },
        "spec": {"hostNetwork": pod.host_network,
                 "containers": [{"ports": pod.ports.iter().map(ports).collect::<Vec<_>>()}]},
        "status": {"phase": phase, "podIPs": pod.addresses.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()},
    });
    if let Some(uid) = &pod.uid {
        object["metadata"]["uid"] = (**uid).into();
    }
    if let Some(uid) = &pod.static_uid {
        for annotation in MIRROR_ANNOTATIONS {
            object["metadata"]["annotations"][annotation] = (**uid).into();
        }
    }
    if let Some(node) = &pod.node {
        object["spec"]["nodeName"] = (**node).into();
    }
    object
}

/// A one-line summary for operators.
pub(super) fn summary(name: &impl std::fmt::Display, pod: &PodObject) -> String {
    let place = pod.node.as_ref().map_or_else(|| "not scheduled yet".to_owned(), |node| format!("on node {node}"));
    let network = if pod.host_network { ", in the host network" } else { "" };
    let finished = if pod.finished { ", finished" } else { "" };
    let addresses =
        if pod.addresses.is_empty() { "without address".to_owned() } else { format!("at {}", list(&pod.addresses)) };
    format!(
        "pod {name} {place} {addresses}{network}{finished}, with {} and {}",
        counted(pod.labels.iter().len(), "label"),
        counted(pod.ports.len(), "named port")
    )
}

/// The hash in both annotations of a mirror object.
fn static_uid(annotations: &Map<String, Value>) -> Option<Arc<str>> {
    let [mirror, hash] = MIRROR_ANNOTATIONS.map(|name| annotations.get(name).and_then(Value::as_str));
    hash.filter(|hash| mirror == Some(*hash)).and_then(|hash| uid(hash).ok()).map(Into::into)
}

/// Adds the named ports of those containers in list `name` that `counts`.
fn read_ports(
    spec: &mut Fields,
    name: &str,
    counts: impl Fn(&mut Fields, &mut Report) -> bool,
    ports: &mut Vec<NamedPort>,
    report: &mut Report,
) {
    for mut container in spec.objects(report, name, MAX_CONTAINERS) {
        if !counts(&mut container, report) {
            continue;
        }
        for mut port in container.objects(report, "ports", MAX_PORTS) {
            if !port.has("name") {
                continue;
            }
            let name = port.parsed_unless_empty(report, "name", service_name);
            let protocol = port.parsed_unless_empty(report, "protocol", protocol).unwrap_or(Protocol::Tcp);
            if !port.has("containerPort") {
                report.add(port.path("containerPort"), "missing", "write the port's number");
            }
            let number = port.integer(report, "containerPort", 1..=u16::MAX, "");
            if let (Some(name), Some(port)) = (name, number) {
                ports.push(NamedPort { name, protocol, port });
            }
        }
    }
}

/// Whether an init container is a sidecar, which runs beside the others.
fn goes_on(container: &mut Fields, report: &mut Report) -> bool {
    container.text(report, "restartPolicy").as_deref() == Some("Always")
}

fn read_addresses(status: &mut Fields, report: &mut Report) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for mut entry in status.objects(report, "podIPs", MAX_ADDRESSES) {
        addresses.extend(entry.parsed_unless_empty(report, "ip", unicast));
    }
    if addresses.is_empty() {
        addresses.extend(status.parsed_unless_empty(report, "podIP", unicast));
    }
    let mut seen = Vec::new();
    addresses.retain(|a| {
        let new = !seen.contains(a);
        seen.push(*a);
        new
    });
    addresses
}

const PENDING: &str = "Pending";
/// Phases in which addresses may be another pod's already.
const FINISHED: [&str; 2] = ["Succeeded", "Failed"];

fn read_phase(text: &str) -> Result<&'static str, Expected> {
    let known = [PENDING, "Running", FINISHED[0], FINISHED[1], "Unknown"].into_iter().find(|phase| *phase == text);
    known.ok_or_else(|| "must be Pending, Running, Succeeded, Failed or Unknown".into())
}

fn protocol(text: &str) -> Result<Protocol, Expected> {
    Protocol::from_name(text).ok_or_else(|| "must be TCP, UDP or SCTP".into())
}

/// RFC 6335, section 5.1, in lower case.
fn service_name(text: &str) -> Result<Arc<str>, Expected> {
    let bytes = text.as_bytes();
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let valid = (1..=15).contains(&bytes.len())
        && bytes.iter().all(|b| word(b) || *b == b'-')
        && bytes.first().is_some_and(word)
        && bytes.last().is_some_and(word)
        && bytes.iter().any(u8::is_ascii_lowercase)
        && !text.contains("--");
    if valid {
        Ok(text.into())
    } else {
        Err("a port name is 1 to 15 of a-z, 0-9 and single \"-\" between them, with at least one letter".into())
    }
}
