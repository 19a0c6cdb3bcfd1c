//! `k8s/CLUSTER/state`: how far the copies of Kubernetes clusters are. Status shows it; nothing depends on it.

use std::collections::BTreeMap;

use serde_json::Value;

/// What `meshd-sync` says of its copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyState {
    /// Up to when the copy is known to be complete, in seconds since 1970, by the clock of `meshd-sync`.
    pub current_at: u64,
    /// Objects of each kind, by its plural.
    pub objects: BTreeMap<String, u64>,
    /// Findings that wait for an operator.
    pub held: usize,
}

impl CopyState {
    /// `None`: no value of `meshd-sync`.
    pub(super) fn parse(value: &[u8]) -> Option<Self> {
        let state: Value = serde_json::from_slice(value).ok()?;
        let counts = state.get("counts").and_then(Value::as_object).into_iter().flatten();
        Some(Self {
            current_at: state.get("currentAt")?.as_u64()?,
            objects: counts.filter_map(|(kind, count)| Some((kind.clone(), count.as_u64()?))).collect(),
            held: state.get("held").and_then(Value::as_array).map_or(0, Vec::len),
        })
    }
}
