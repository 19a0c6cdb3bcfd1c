//! What a policy is called.

use std::fmt;

use super::input::ObjectName;
use crate::object::Tier;

/// What a policy is, and its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyName {
    /// Its kind.
    pub kind: PolicyKind,
    /// Its namespace and name.
    pub name: ObjectName,
}

/// Kinds of policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// networking.k8s.io/v1
    NetworkPolicy,
    /// policy.networking.k8s.io
    ClusterNetworkPolicy(Tier),
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            PolicyKind::NetworkPolicy => write!(f, "NetworkPolicy {}", self.name),
            PolicyKind::ClusterNetworkPolicy(Tier::Admin) => write!(f, "ClusterNetworkPolicy {} (Admin)", self.name),
            PolicyKind::ClusterNetworkPolicy(Tier::Baseline) => {
                write!(f, "ClusterNetworkPolicy {} (Baseline)", self.name)
            }
        }
    }
}

/// A policy of a classifier; good for that one only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyId(pub(crate) u32);
