//! The parts of Kubernetes objects that policies use, parsed strictly from JSON trees.
//!
//! The parser validates like the API server, because operators may put values into etcd by hand: each error names its
//! field, the value and the rule. Absent, `null` and empty differ until a policy gets its defaults; the result is
//! canonical and has no optional parts left to interpret.

mod block;
mod cluster_policy;
mod display;
mod labels;
mod network_policy;
mod pod;
mod port;
mod reader;
mod selector;

pub use block::{Block, BlockError};
pub(crate) use cluster_policy::CLUSTER_POLICY_VERSIONS;
pub use cluster_policy::{Action, ClusterPeer, ClusterPolicy, ClusterRule, ClusterSubject, InvalidClusterPolicy, Tier};
pub(crate) use labels::NAMESPACE_NAME;
pub use labels::{CLUSTER, Labels};
pub use network_policy::{Directions, InvalidNetworkPolicy, NetworkPolicy, PolicyPeer, Rule};
pub use pod::{NamedPort, PodObject, namespace_from, pod_from};
pub use port::{PortMatch, Ports, Protocol};
pub use selector::{Requirement, Selector, Test, Truth};
pub(crate) use selector::{is_namespace_name, is_object_name};
