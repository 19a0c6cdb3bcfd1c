//! `pods/NS/NAME`: the fields of a pod that policies need.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::{Kind, Labels, Object, Place, uid};
use crate::{
    KubernetesName, NodeName, Violations,
    address::unicast,
    fields::{Expected, Fields},
    violation::Report,
};

const KIND: Kind = Kind { name: "Pod", api_versions: &["v1"] };

/// Value of `pods/NS/NAME`, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.namespace`
    pub namespace: KubernetesName,
    /// `metadata.name`
    pub name: KubernetesName,
    /// `metadata.uid`
    pub uid: Option<String>,
    /// Of the mirror object of a static pod: the pod's UID at its node, which is the hash of its manifest. The object
    /// has a UID of its own.
    pub static_uid: Option<String>,
    /// `metadata.labels`
    pub labels: Labels,
    /// Ports with a name, of containers and of init containers that go on running (`restartPolicy: Always`). One name
    /// may stand for several ports.
    pub ports: Vec<NamedPort>,
    /// `status.podIPs`, or `status.podIP` where there are none.
    pub pod_ips: Vec<IpAddr>,
    /// `status.phase`; Pending where there is none.
    pub phase: PodPhase,
    /// `spec.hostNetwork`: the pod has its node's addresses.
    pub host_network: bool,
    /// `spec.nodeName`: the node it is bound to.
    pub node_name: Option<NodeName>,
    /// `metadata.deletionTimestamp`, RFC 3339: it is being stopped.
    pub deletion_timestamp: Option<String>,
}

/// A container's port that has a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// An IANA service name (RFC 6335).
    pub name: String,
    /// `protocol`, TCP where there is none.
    pub protocol: Protocol,
    /// `containerPort`, not 0.
    pub port: u16,
}

/// Protocols whose ports Kubernetes names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// `TCP`
    Tcp,
    /// `UDP`
    Udp,
    /// `SCTP`
    Sctp,
}

/// `status.phase`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PodPhase {
    /// Accepted, not all containers started.
    Pending,
    /// Bound to a node, at least one container runs or restarts.
    Running,
    /// All containers ended well; its addresses may be another pod's already.
    Succeeded,
    /// All containers ended, one badly; its addresses may be another pod's already.
    Failed,
    /// The node cannot be asked.
    Unknown,
}

/// Most containers, and most init containers.
const MAX_CONTAINERS: usize = 256;
/// Most ports of one container.
const MAX_PORTS: usize = 1024;
/// Most entries of `status.podIPs`.
const MAX_ADDRESSES: usize = 16;

impl Pod {
    /// The pod that `value` under `pods/{namespace}/{name}` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it, another name or namespace than the key's too.
    pub fn parse(namespace: &KubernetesName, name: &KubernetesName, value: &[u8]) -> Result<Self, Violations> {
        let mut report = Report::default();
        let place = Place { namespace: Some(namespace), name };
        let mut object = Object::read(value, KIND, place, &mut report)?;
        let mut pod = Self {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: object.uid,
            static_uid: static_uid(&object.annotations),
            labels: object.labels,
            ports: Vec::new(),
            pod_ips: Vec::new(),
            phase: PodPhase::Pending,
            host_network: false,
            node_name: None,
            deletion_timestamp: object.deletion_timestamp,
        };
        if let Some(mut spec) = object.fields.object(&mut report, "spec") {
            pod.host_network = spec.boolean(&mut report, "hostNetwork").unwrap_or(false);
            pod.node_name = spec.parsed_unless_empty(&mut report, "nodeName", NodeName::read);
            read_ports(&mut spec, "containers", |_, _| true, &mut pod.ports, &mut report);
            read_ports(&mut spec, "initContainers", goes_on, &mut pod.ports, &mut report);
        }
        if let Some(mut status) = object.fields.object(&mut report, "status") {
            pod.phase = status.parsed_unless_empty(&mut report, "phase", phase).unwrap_or(PodPhase::Pending);
            pod.pod_ips = read_addresses(&mut status, &mut report);
        }
        report.finish(Some(pod))
    }

    /// Whether it has ended, so that its addresses are no longer its own.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        matches!(self.phase, PodPhase::Succeeded | PodPhase::Failed)
    }
}

impl Protocol {
    /// The name as Kubernetes writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Which annotation of a mirror object says that it is one, and which says what of; both hold the manifest's hash.
pub const MIRROR_ANNOTATIONS: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// What both annotations of a mirror object hold.
fn static_uid(annotations: &Map<String, Value>) -> Option<String> {
    let [mirror, hash] = MIRROR_ANNOTATIONS.map(|name| annotations.get(name).and_then(Value::as_str));
    hash.filter(|hash| mirror == Some(*hash)).and_then(|hash| uid(hash).ok())
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

fn phase(text: &str) -> Result<PodPhase, Expected> {
    Ok(match text {
        "Pending" => PodPhase::Pending,
        "Running" => PodPhase::Running,
        "Succeeded" => PodPhase::Succeeded,
        "Failed" => PodPhase::Failed,
        "Unknown" => PodPhase::Unknown,
        _ => return Err("must be Pending, Running, Succeeded, Failed or Unknown".into()),
    })
}

fn protocol(text: &str) -> Result<Protocol, Expected> {
    Ok(match text {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => return Err("must be TCP, UDP or SCTP".into()),
    })
}

/// RFC 6335, section 5.1, in lower case.
fn service_name(text: &str) -> Result<String, Expected> {
    let bytes = text.as_bytes();
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let valid = (1..=15).contains(&bytes.len())
        && bytes.iter().all(|b| word(b) || *b == b'-')
        && bytes.first().is_some_and(word)
        && bytes.last().is_some_and(word)
        && bytes.iter().any(u8::is_ascii_lowercase)
        && !text.contains("--");
    if valid {
        Ok(text.to_owned())
    } else {
        Err("a port name is 1 to 15 of a-z, 0-9 and single \"-\" between them, with at least one letter".into())
    }
}
