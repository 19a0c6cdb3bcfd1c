//! `networkpolicies/NS/NAME` and `clusternetworkpolicies/NAME`: the envelope; the policy engine parses the `spec`.

use serde_json::Value;

use super::{Kind, Object, Place};
use crate::{
    KubernetesName, Violations,
    document::{Limits, read},
    violation::Report,
};

const NETWORK_POLICY: Kind = Kind { name: "NetworkPolicy", api_versions: &["networking.k8s.io/v1"] };
const CLUSTER_NETWORK_POLICY: Kind = Kind {
    name: "ClusterNetworkPolicy",
    api_versions: &["policy.networking.k8s.io/v1alpha2", "policy.networking.k8s.io/v1beta1"],
};

/// A policy object whose envelope holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyEnvelope {
    /// `metadata.namespace`; `None` for a ClusterNetworkPolicy.
    pub namespace: Option<KubernetesName>,
    /// `metadata.name`
    pub name: KubernetesName,
    /// `metadata.uid`
    pub uid: Option<String>,
    /// `spec`, an object, as it was written.
    pub spec: Value,
}

impl PolicyEnvelope {
    /// The policy that `value` under `networkpolicies/{namespace}/{name}` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with its envelope, another name or namespace than the key's too.
    pub fn parse_network_policy(
        namespace: &KubernetesName,
        name: &KubernetesName,
        value: &[u8],
    ) -> Result<Self, Violations> {
        Self::read(value, NETWORK_POLICY, Place { namespace: Some(namespace), name })
    }

    /// The policy that `value` under `clusternetworkpolicies/{name}` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with its envelope, another name than the key's too.
    pub fn parse_cluster_network_policy(name: &KubernetesName, value: &[u8]) -> Result<Self, Violations> {
        Self::read(value, CLUSTER_NETWORK_POLICY, Place { namespace: None, name })
    }

    /// The `spec` of an object whose envelope does not hold, as far as the value is one JSON or YAML object with a `spec`
    /// in it: what a refused policy can be seen to say.
    #[must_use]
    pub fn spec_alone(value: &[u8]) -> Option<Value> {
        let mut object = read(value, Limits::KUBERNETES).ok()?;
        object.remove("spec").filter(Value::is_object)
    }

    fn read(value: &[u8], kind: Kind, place: Place<'_>) -> Result<Self, Violations> {
        let mut report = Report::default();
        let mut object = Object::read(value, kind, place, &mut report)?;
        if !object.fields.has("spec") {
            report.add("spec", "missing", format!("write what the {} says", kind.name));
        }
        let spec = object.fields.object(&mut report, "spec");
        report.finish(spec.map(|spec| Self {
            namespace: place.namespace.cloned(),
            name: place.name.clone(),
            uid: object.uid,
            spec: Value::Object(spec.into_map()),
        }))
    }
}
