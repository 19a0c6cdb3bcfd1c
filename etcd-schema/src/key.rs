//! Keys relative to the prefix: `config`, `subnets/10.244.3.0-24`, `nodes/ID` …

use std::{fmt, str::FromStr};

use crate::{
    Cluster, Key, KubernetesKey, NodeId,
    key_parts::{KeyError, Parts},
};

impl Key {
    /// The key that `relative` (without prefix and its slash) names.
    ///
    /// # Errors
    /// When it names none.
    pub fn parse(relative: &str) -> Result<Self, KeyError> {
        let parts = Parts::of(relative)?;
        if let Some(key) = Self::read(parts)? {
            return Ok(key);
        }
        let (cluster, parts) = match parts.at(Self::CLUSTERS) {
            Some(parts) => {
                let (cluster, parts) = parts.first();
                (parts.read("CLUSTER", cluster, Cluster::read)?, parts)
            }
            None => (Cluster::default(), parts),
        };
        match KubernetesKey::read(parts)? {
            Some(key) if !cluster.is_flat() || key.kind().is_flat => Ok(Self::Kubernetes(cluster, key)),
            _ => Err(parts.unknown(known(relative))),
        }
    }

    /// The directory of one node's attachments, `endpoints/ID/`.
    #[must_use]
    pub fn endpoints_of(node: &NodeId) -> String {
        format!("endpoints/{node}/")
    }
}

/// The key relative to the prefix; [`Key::parse`] reads it back.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

/// The part below `k8s/CLUSTER/`, or the flat key.
impl fmt::Display for KubernetesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(relative: &str) -> Result<Self, KeyError> {
        Self::parse(relative)
    }
}

/// How `key` could begin.
fn known(key: &str) -> String {
    if key.starts_with(Key::CLUSTERS) {
        let places: Vec<&str> = KubernetesKey::KINDS.iter().map(|kind| kind.place).collect();
        return format!("below {}CLUSTER/ it must be or begin with {}", Key::CLUSTERS, places.join(", "));
    }
    let directories: Vec<&str> = Key::directories().collect();
    format!("without the prefix it must be {} or begin with {}", Key::CONFIG, directories.join(", "))
}
