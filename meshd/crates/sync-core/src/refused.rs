//! Objects that nodes refuse → Events on them, where their owners look.

use etcd_schema::{Key, KubernetesName};
use policy::objects;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{ClusterKeys, ObjectKind, canonical::CanonicalObject, digest::Digest};

/// Longest message; the API server takes 1 KiB.
const MAX_MESSAGE: usize = 1000;
/// Where Events on objects without a namespace are.
const DEFAULT_NAMESPACE: &str = "default";

/// An object that nodes refuse, read as they read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its kind.
    pub kind: ObjectKind,
    /// `NS/NAME` or `NAME`.
    pub path: String,
    /// The violation, and what nodes enforce instead.
    pub message: String,
    api_version: String,
    uid: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    metadata: UidMetadata,
}

#[derive(Deserialize, Default)]
struct UidMetadata {
    #[serde(default)]
    uid: String,
}

/// The refusal by nodes of this version, if they refuse the value.
#[must_use]
pub fn refused(keys: &ClusterKeys, object: &CanonicalObject) -> Option<Refused> {
    // Nodes name an invalid key in their status.
    let Ok(Key::Kubernetes(_, key)) = Key::parse(&keys.object(object.kind, &object.path)) else { return None };
    let refusal = objects::read(&key, &object.value, true).err()?;
    let effect = objects::effect(&key, refusal.stand_in.as_deref());
    let message: String = format!("{}; {effect}", refusal.violations).chars().take(MAX_MESSAGE).collect();
    let Head { api_version, metadata } = serde_json::from_slice(&object.value).unwrap_or_default();
    Some(Refused { kind: object.kind, path: object.path.clone(), message, api_version, uid: metadata.uid })
}

impl Refused {
    /// A Node that gets no subnet.
    pub(crate) fn of_node(name: &KubernetesName, message: String) -> Self {
        // Kubelet writes Events with the Node's name as its UID, and kubectl finds them by it.
        let (path, uid) = (name.to_string(), name.to_string());
        Self { kind: ObjectKind::Node, path, message, api_version: "v1".to_owned(), uid }
    }

    /// The namespace that the Event is in.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.path.split_once('/').map_or(DEFAULT_NAMESPACE, |(namespace, _)| namespace)
    }

    /// The Event. The same refusal of the same object has the same name, so it is created once. `instance` is the
    /// reporting process, and `time` now, in RFC 3339.
    #[must_use]
    pub fn event(&self, instance: &str, time: &str) -> Value {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        let told = Digest::of(format!("{}\n{}\n{}", self.kind.plural(), self.uid, self.message).as_bytes());
        let mut object = json!({
            "apiVersion": self.api_version, "kind": self.kind.name(), "name": name, "uid": self.uid,
        });
        if let Some((namespace, _)) = self.path.split_once('/') {
            object["namespace"] = namespace.into();
        }
        json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"namespace": self.namespace(), "name": format!("{name:.200}.{told}")},
            "involvedObject": object, "type": "Warning", "reason": "RefusedByMeshd", "message": self.message,
            "action": "Copy", "reportingComponent": "meshd.io/sync", "reportingInstance": instance,
            "source": {"component": "meshd-sync"}, "firstTimestamp": time, "lastTimestamp": time, "count": 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canonical;

    fn policy(spec: &str) -> Option<Refused> {
        let keys = ClusterKeys::new(&"east".parse().unwrap());
        let json = format!(r#"{{"metadata": {{"name": "web", "namespace": "shop", "uid": "u-1"}}, "spec": {spec}}}"#);
        refused(&keys, &canonical::read(ObjectKind::NetworkPolicy, "networking.k8s.io/v1", &json).unwrap())
    }

    #[test]
    fn an_event_says_what_is_wrong_and_what_is_enforced() {
        assert_eq!(policy(r#"{"podSelector": {}}"#), None);
        let refused = policy(r#"{"podSelector": {}, "ingress": [{"ports": [{"port": 0}]}]}"#).unwrap();
        assert!(refused.message.contains("spec.ingress[0].ports[0].port") && refused.message.contains("isolated"));
        let event = refused.event("meshd-sync-1", "2026-11-30T12:00:00Z");
        assert_eq!(event["metadata"]["namespace"], "shop");
        let object = &event["involvedObject"];
        assert_eq!(
            (&object["kind"], &object["uid"], &object["name"]),
            (&json!("NetworkPolicy"), &json!("u-1"), &json!("web"))
        );
        assert_eq!(object["apiVersion"], "networking.k8s.io/v1");
        let name = event["metadata"]["name"].as_str().unwrap();
        assert!(name.starts_with("web.") && name.len() < 253);
        assert_eq!(refused.event("another", "2026-11-30T13:00:00Z")["metadata"]["name"], event["metadata"]["name"]);
        let other = policy(r#"{"podSelector": {}, "ingress": [{"ports": [{"port": 70000}]}]}"#).unwrap();
        assert_ne!(other.event("meshd-sync-1", "")["metadata"]["name"], event["metadata"]["name"]);
    }
}
