//! `k8s/CLUSTER/state`: what the copy is of, and how far it has come.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Value of the key. Its create_revision is compared in every write, so replacing it ends the running term.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyncState {
    /// UID of the namespace `kube-system`: the cluster's identity.
    pub uid: String,
    /// The process that wrote it.
    pub holder: String,
    /// When it was written, in seconds since 1970.
    pub written_at: u64,
    /// Up to when the copy is known to be complete, in seconds since 1970. Its distance to `written_at` is the copy's
    /// age; both are of one clock.
    pub current_at: u64,
    /// Resource version up to which each kind was read, by its plural.
    pub resource_versions: BTreeMap<String, u64>,
    /// Objects of each kind, by its plural.
    pub counts: BTreeMap<String, usize>,
    /// Findings that wait for an operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<Held>,
    /// The first policies were copied: later ones do not wait for nodes.
    #[serde(default)]
    pub copies_policies: bool,
}

/// Something that waits for an operator, or for a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// The held changes and the reason.
    pub reason: String,
    /// Written to `k8s/CLUSTER/confirm`, it releases this.
    pub token: String,
    /// When it is released without that, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}
