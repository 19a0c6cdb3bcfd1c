//! `endpoints/ID/CONTAINERID/IFNAME`: an attachment made by the CNI plugin.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{KindInfo, KindRules, RecordClass};
use crate::{
    InterfaceName, KubernetesName, Labels, NodeId, PodName, Violations,
    address::{routed_prefix, unicast},
    document::{DocumentLimits, read},
    fields::{Fields, NamesOf, Writer},
    labels::uid,
    summary::list,
    violation::Report,
};

/// Value of `endpoints/ID/CONTAINERID/IFNAME`:
/// `{"pod": {"namespace","name","labels"}, "uid", "addresses": ["IP"], "interface", "allowedSources": ["IP/LEN"]}`.
#[derive(Clone, PartialEq)]
pub struct Attachment {
    /// The pod of the interface.
    pub pod: AttachedPod,
    /// The pod's uid, if the runtime supplied it; joined with the Pod object's.
    pub uid: Option<String>,
    /// The interface's addresses, 1 to [`Self::MAX_ADDRESSES`], each once.
    pub addresses: Vec<IpAddr>,
    /// The host's end of the interface.
    pub interface: InterfaceName,
    /// Additional source prefixes, at most [`Self::MAX_ALLOWED_SOURCES`].
    pub allowed_sources: Vec<IpNet>,
    /// Fields of other versions, kept over a rewrite.
    pub extra: Map<String, Value>,
}

/// The pod of an attachment, as the CNI plugin knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedPod {
    /// Its namespace.
    pub namespace: KubernetesName,
    /// Its name, or the container's id.
    pub name: PodName,
    /// Labels from the CNI configuration, for pods without a Pod object.
    pub labels: Labels,
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "endpoints/", is_flat: true, rules: KindRules::policy(RecordClass::Attachment), fields: KNOWN };

const KNOWN: &[&str] = &["pod", "uid", "addresses", "interface", "allowedSources"];

impl Attachment {
    /// Most entries of `addresses`.
    pub const MAX_ADDRESSES: usize = 16;
    /// Most entries of `allowedSources`.
    pub const MAX_ALLOWED_SOURCES: usize = 64;

    /// The attachment that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        if !fields.has("pod") {
            report.add("pod", "missing", "write the pod's namespace and name");
        }
        let pod = fields.object(&mut report, "pod").and_then(|pod| read_pod(pod, &mut report));
        let uid = fields.parsed(&mut report, "uid", uid);
        let listed =
            fields.some_texts(&mut report, "addresses", Self::MAX_ADDRESSES, "list the interface's addresses", unicast);
        let mut addresses: Vec<IpAddr> = Vec::with_capacity(listed.len());
        for (i, address) in listed {
            if addresses.contains(&address) {
                report.add(format!("addresses[{i}]"), format!("\"{address}\""), "write each address once");
            }
            addresses.push(address);
        }
        let interface = fields.required(
            &mut report,
            "interface",
            "write the name of the interface's end on the host",
            InterfaceName::read,
        );
        let sources = fields.texts(&mut report, "allowedSources", Self::MAX_ALLOWED_SOURCES, routed_prefix);
        let allowed_sources = sources.unwrap_or_default();
        let extra = fields.rest(&mut report, KNOWN);
        let attachment = (|| Some(Self { pod: pod?, uid, addresses, interface: interface?, allowed_sources, extra }))();
        report.finish(attachment)
    }

    /// The value as JSON, fields without a value left out.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let labels: Map<String, Value> =
            self.pod.labels.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
        let mut pod = Writer::default();
        pod.put("namespace", self.pod.namespace.as_str()).put("name", self.pod.name.as_str()).put("labels", labels);
        let mut out = Writer::default();
        out.put("pod", pod.finish(&Map::new()))
            .maybe("uid", self.uid.as_deref())
            .texts("addresses", &self.addresses)
            .put("interface", self.interface.as_str());
        if !self.allowed_sources.is_empty() {
            out.texts("allowedSources", &self.allowed_sources);
        }
        out.json(&self.extra)
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, id: &NodeId) -> String {
        format!(
            "interface {} on node {id} of pod {}/{}, addresses {}",
            self.interface,
            self.pod.namespace,
            self.pod.name,
            list(&self.addresses)
        )
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("pod", &self.pod)
            .field("uid", &self.uid)
            .field("addresses", &self.addresses)
            .field("interface", &self.interface)
            .field("allowed_sources", &self.allowed_sources)
            .field("extra", &NamesOf(&self.extra))
            .finish()
    }
}

fn read_pod(mut fields: Fields, report: &mut Report) -> Option<AttachedPod> {
    let namespace = fields.required(report, "namespace", "write the pod's namespace", KubernetesName::read_label);
    let name = fields.required(report, "name", "write the pod's name", PodName::read);
    let labels = fields.labels(report);
    Some(AttachedPod { namespace: namespace?, name: name?, labels })
}
