//! Names of Kubernetes clusters.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{Violations, fields::Expected, id::is_label, violation::quoted};

/// The Kubernetes cluster that an object belongs to. Cheap to clone.
///
/// The objects of cluster `east` are below `k8s/east/`. The empty name, the default, means keys without a cluster
/// (`pods/…`, `networkpolicies/…`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cluster(Option<Arc<str>>);

impl Cluster {
    /// Longest name, in characters.
    const MAX: usize = 32;

    /// Whether this is the cluster of the keys without one.
    #[must_use]
    pub const fn is_flat(&self) -> bool {
        self.0.is_none()
    }

    /// The name; empty for the keys without a cluster.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_deref().unwrap_or_default()
    }

    /// The cluster of this name, which is not empty.
    pub(crate) fn read(text: &str) -> Result<Self, Expected> {
        if is_label(text) && text.len() <= Self::MAX {
            Ok(Self(Some(text.into())))
        } else {
            Err("must be 1 to 32 of a-z, 0-9 and \"-\", beginning and ending with a letter or digit".into())
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Empty text is the cluster of the keys without one.
impl FromStr for Cluster {
    type Err = Violations;

    fn from_str(text: &str) -> Result<Self, Violations> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        Self::read(text).map_err(|expected| Violations::one("", quoted(text), expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_label_of_at_most_32_characters() {
        for name in ["a", "east-1", &"x".repeat(32)] {
            let cluster: Cluster = name.parse().unwrap();
            assert_eq!((cluster.as_str(), cluster.is_flat()), (name, false));
        }
        for bad in ["-a", "a-", "A", "a.b", "a/b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<Cluster>().is_err(), "{bad}");
        }
        assert!("".parse::<Cluster>().unwrap().is_flat());
        assert!(Cluster::read("").is_err(), "k8s// is no directory");
    }
}
