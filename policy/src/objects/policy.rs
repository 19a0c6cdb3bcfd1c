//! `networkpolicies/NS/NAME` and `clusternetworkpolicies/NAME`, and what an unreadable one means.

use std::sync::Arc;

use etcd_schema::{
    Violations,
    reading::{Fields, Report, describe},
};
use serde_json::{Value, json};

use super::{
    Object, ObjectRefusal,
    envelope::{Envelope, Kind, Place},
};
use crate::{
    engine::PolicyState,
    object::{CLUSTER_POLICY_VERSIONS, ClusterPolicy, Directions, NetworkPolicy, Selector},
};

const NETWORK_POLICY: Kind = Kind { name: "NetworkPolicy", api_versions: &["networking.k8s.io/v1"] };
const CLUSTER_NETWORK_POLICY: Kind = Kind { name: "ClusterNetworkPolicy", api_versions: &CLUSTER_POLICY_VERSIONS };

/// A policy, and the object reduced to the fields that are read.
pub(super) fn read_network_policy(fields: Fields, place: Place<'_>) -> Result<(Object, Value), ObjectRefusal> {
    let isolates = |isolated: Option<(Selector, Directions)>| {
        let object = |(subject, directions)| Object::NetworkPolicy(PolicyState::Isolates(subject, directions));
        isolated.map(|isolated| Box::new(object(isolated)))
    };
    match spec_of(fields, NETWORK_POLICY, place) {
        Ok(spec) => match NetworkPolicy::parse(&spec) {
            Ok(policy) => {
                let canonical = canonical(NETWORK_POLICY, place, &spec);
                Ok((Object::NetworkPolicy(PolicyState::Valid(policy)), canonical))
            }
            Err(invalid) => Err(ObjectRefusal { violations: invalid.violations, stand_in: isolates(invalid.isolates) }),
        },
        // The spec is judged regardless of its name.
        Err((violations, spec)) => {
            let isolated = spec.and_then(|spec| match NetworkPolicy::parse(&spec) {
                Ok(policy) => {
                    let directions = Directions { ingress: policy.ingress.is_some(), egress: policy.egress.is_some() };
                    Some((policy.subject, directions))
                }
                Err(invalid) => invalid.isolates,
            });
            Err(ObjectRefusal { violations, stand_in: isolates(isolated) })
        }
    }
}

/// A policy, and the object reduced to the fields that are read.
pub(super) fn read_cluster_network_policy(fields: Fields, place: Place<'_>) -> Result<(Object, Value), ObjectRefusal> {
    let denies =
        |policy: Option<ClusterPolicy>| policy.map(|policy| Box::new(Object::ClusterNetworkPolicy(Arc::new(policy))));
    let spec = spec_of(fields, CLUSTER_NETWORK_POLICY, place).map_err(|(violations, spec)| {
        // In another version, its rules may have another meaning: denying everything allows nothing extra.
        let read = spec.and_then(|spec| ClusterPolicy::parse(&spec).map_or_else(|invalid| invalid.fail_closed, Some));
        ObjectRefusal { violations, stand_in: denies(read.map(ClusterPolicy::denying_all)) }
    })?;
    match ClusterPolicy::parse(&spec) {
        Ok(policy) => {
            let canonical = canonical(CLUSTER_NETWORK_POLICY, place, &spec);
            Ok((Object::ClusterNetworkPolicy(Arc::new(policy)), canonical))
        }
        Err(invalid) => Err(ObjectRefusal { violations: invalid.violations, stand_in: denies(invalid.fail_closed) }),
    }
}

/// The `spec` of an object with a valid envelope, or the violations and the `spec`, if any.
fn spec_of(mut fields: Fields, kind: Kind, place: Place<'_>) -> Result<Value, (Violations, Option<Value>)> {
    let spec = fields.take("spec");
    let mut report = Report::default();
    let envelope = Envelope::read(fields, kind, place, &mut report).and_then(|_| {
        match &spec {
            None => report.add("spec", "missing", format!("write what the {} says", kind.name)),
            Some(Value::Object(_)) => {}
            Some(other) => report.add("spec", describe(other), "must be an object"),
        }
        report.finish(spec.clone())
    });
    envelope.map_err(|violations| (violations, spec.filter(Value::is_object)))
}

fn canonical(kind: Kind, place: Place<'_>, spec: &Value) -> Value {
    let mut metadata = json!({"name": place.name.as_str()});
    if let Some(namespace) = place.namespace {
        metadata["namespace"] = namespace.as_str().into();
    }
    json!({"apiVersion": kind.api_versions[0], "kind": kind.name, "metadata": metadata, "spec": spec})
}
