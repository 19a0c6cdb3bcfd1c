//! `meshctl check`: a value judged as the daemon would, a policy's spec included.

use etcd_schema::{CheckError as SchemaError, Checked, Key, PolicyEnvelope};
use policy::object::{ClusterPolicy, InvalidClusterPolicy, InvalidNetworkPolicy, NetworkPolicy};

/// Why a value does not hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The key or the value is not of its form.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The spec is none of a NetworkPolicy.
    #[error(transparent)]
    NetworkPolicy(#[from] InvalidNetworkPolicy),
    /// The spec is none of a ClusterNetworkPolicy.
    #[error(transparent)]
    ClusterPolicy(#[from] InvalidClusterPolicy),
}

/// Judges `value` under `relative`, a key without its prefix, by itself. The summary of a policy is what it was
/// understood as.
///
/// # Errors
/// When either does not hold.
pub fn check(relative: &str, value: &[u8]) -> Result<Checked, CheckError> {
    let mut checked = etcd_schema::check(relative, value)?;
    let understood = match &checked.key {
        Key::NetworkPolicy(namespace, name) => {
            let envelope = PolicyEnvelope::parse_network_policy(namespace, name, value).map_err(SchemaError::from)?;
            NetworkPolicy::parse(&envelope.spec)?.to_string()
        }
        Key::ClusterNetworkPolicy(name) => {
            let envelope = PolicyEnvelope::parse_cluster_network_policy(name, value).map_err(SchemaError::from)?;
            ClusterPolicy::parse(&envelope.spec)?.to_string()
        }
        _ => return Ok(checked),
    };
    let kind = checked.summary.split(';').next().unwrap_or_default().to_owned();
    checked.summary = format!("{kind}\n{}", understood.trim_end());
    Ok(checked)
}
