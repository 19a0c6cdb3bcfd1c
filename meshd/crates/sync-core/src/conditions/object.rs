//! The part of a Node object that conditions are about, and the bodies of patches.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::{ConditionReason, Conditioned, NetworkHealth, Patch, Untaint};

/// The taint that kubelet may register a node with, so that no pod comes before the network: with the effect
/// NoSchedule.
pub(super) const TAINT: &str = "meshd.io/agent-not-ready";
/// Kubernetes' own condition, from which its node controller makes a taint.
const UNAVAILABLE: &str = "NetworkUnavailable";
/// The same the other way round, for people and other programs.
const READY: &str = "meshd.io/NetworkReady";
/// `reason` of both while the network works.
const WELL: &str = "MeshdReady";

/// A Node, as far as conditions and the taint go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConditions {
    /// `metadata.name`
    pub name: String,
    /// The addresses in `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
    resource_version: String,
    unavailable: Option<NodeCondition>,
    ready: Option<NodeCondition>,
    /// As they stand in the object, with whether it is ours.
    taints: Vec<(bool, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeCondition {
    r#type: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    last_transition_time: Option<String>,
}

impl NodeCondition {
    /// Whether it equals `wanted`, except for the transition time.
    fn says(&self, wanted: &Self) -> bool {
        (&self.r#type, &self.status, &self.reason, &self.message)
            == (&wanted.r#type, &wanted.status, &wanted.reason, &wanted.message)
    }
}

#[derive(Deserialize)]
struct NodeObject {
    metadata: NodeMetadata,
    #[serde(default)]
    spec: NodeTaints,
    #[serde(default)]
    status: NodeReport,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeMetadata {
    name: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize, Default)]
struct NodeTaints {
    #[serde(default)]
    taints: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Taint {
    key: String,
    #[serde(default)]
    effect: String,
}

#[derive(Deserialize, Default)]
struct NodeReport {
    #[serde(default)]
    addresses: Option<Vec<Address>>,
    #[serde(default)]
    conditions: Option<Vec<NodeCondition>>,
}

#[derive(Deserialize)]
struct Address {
    r#type: String,
    #[serde(default)]
    address: String,
}

impl NodeConditions {
    /// The Node that the API server prints as `json`.
    ///
    /// # Errors
    /// When it is not of that shape.
    pub fn read(json: &str) -> serde_json::Result<Self> {
        let NodeObject { metadata, spec, status } = serde_json::from_str(json)?;
        let conditions = status.conditions.unwrap_or_default();
        let condition = |name: &str| conditions.iter().find(|condition| condition.r#type == name).cloned();
        let addresses = status.addresses.into_iter().flatten().filter(|address| address.r#type == "InternalIP");
        let taints = spec.taints.into_iter().flatten().map(|taint| {
            let Taint { key, effect } = serde_json::from_str(taint.get())?;
            Ok((key == TAINT && effect == "NoSchedule", taint.get().to_owned()))
        });
        Ok(Self {
            name: metadata.name,
            internal_ips: addresses.filter_map(|address| address.address.parse().ok()).collect(),
            resource_version: metadata.resource_version,
            unavailable: condition(UNAVAILABLE),
            ready: condition(READY),
            taints: taints.collect::<serde_json::Result<_>>()?,
        })
    }

    /// Of the object that was seen.
    pub(super) fn resource_version(&self) -> &str {
        &self.resource_version
    }

    /// Whether its conditions were set here, by their reasons.
    pub(super) fn has_ours(&self) -> bool {
        let ours = [WELL, ConditionReason::NotReady.as_str(), ConditionReason::NotRunning.as_str()];
        [&self.unavailable, &self.ready]
            .into_iter()
            .flatten()
            .any(|condition| ours.contains(&condition.reason.as_str()))
    }

    /// The patch that gives the object this health, or removes it; `None` if it has it already.
    pub(super) fn patch(&self, network: Option<&NetworkHealth>) -> Option<Patch> {
        let node = self.name.clone();
        let Some(network) = network else {
            return Some(Patch { node, conditions: Some(Conditioned::Clear), untaint: None });
        };
        let wanted = network.conditions();
        let held = [&self.unavailable, &self.ready];
        let says = held.iter().zip(&wanted).all(|(held, wanted)| held.as_ref().is_some_and(|held| held.says(wanted)));
        // A condition whose status stays has not changed since, whatever its message.
        let since = [0, 1].map(|at| {
            let same = held[at].as_ref().filter(|held| held.status == wanted[at].status)?;
            same.last_transition_time.clone()
        });
        let tainted = *network == NetworkHealth::Available && self.taints.iter().any(|(ours, _)| *ours);
        let untaint = tainted.then(|| Untaint {
            resource_version: self.resource_version.clone(),
            others: self.taints.iter().filter(|(ours, _)| !ours).map(|(_, taint)| taint.clone()).collect(),
        });
        let conditions = (!says).then(|| Conditioned::Say(network.clone(), since));
        (conditions.is_some() || untaint.is_some()).then_some(Patch { node, conditions, untaint })
    }
}

impl Conditioned {
    /// The body of a strategic merge patch of the status. `time` is now, in RFC 3339.
    #[must_use]
    pub fn status_patch(&self, time: &str) -> Value {
        let conditions: Vec<Value> = match self {
            Self::Clear => [UNAVAILABLE, READY].map(|name| json!({"type": name, "$patch": "delete"})).into(),
            Self::Say(network, since) => {
                let conditions = network.conditions().into_iter().zip(since);
                let body = |(condition, since): (NodeCondition, &Option<String>)| {
                    let NodeCondition { r#type, status, reason, message, .. } = condition;
                    json!({
                        "type": r#type, "status": status, "reason": reason, "message": message,
                        "lastHeartbeatTime": time, "lastTransitionTime": since.as_deref().unwrap_or(time),
                    })
                };
                conditions.map(body).collect()
            }
        };
        json!({"status": {"conditions": conditions}})
    }
}

impl NetworkHealth {
    /// `NetworkUnavailable` and `meshd.io/NetworkReady`.
    fn conditions(&self) -> [NodeCondition; 2] {
        let (unavailable, reason, message) = match self {
            Self::Available => (false, WELL, "meshd connects this node"),
            Self::Unavailable { reason, message } => (true, reason.as_str(), message.as_str()),
        };
        [(UNAVAILABLE, unavailable), (READY, !unavailable)].map(|(name, status)| NodeCondition {
            r#type: name.to_owned(),
            status: if status { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            last_transition_time: None,
        })
    }
}

impl Untaint {
    /// The body of a merge patch of the object; one that has changed since refuses it.
    #[must_use]
    pub fn patch(&self) -> Value {
        let taints: Vec<Value> = self.others.iter().filter_map(|taint| serde_json::from_str(taint).ok()).collect();
        json!({"metadata": {"resourceVersion": self.resource_version}, "spec": {"taints": taints}})
    }
}
