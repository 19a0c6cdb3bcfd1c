//! Input of the engine.

use std::{fmt, net::IpAddr, sync::Arc};

use etcd_schema::Cluster;
use ipnet::IpNet;

use crate::object::{ClusterPolicy, Directions, Labels, NetworkPolicy, Selector};

/// The name of an object. It is shown as `NAMESPACE/NAME`, or as `NAME` where its kind has no namespaces; that of an
/// object of a cluster with `CLUSTER:` before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// The cluster that it is an object of.
    pub cluster: Cluster,
    /// The namespace; empty for kinds without.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// The object `name` in `namespace`, of no cluster.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { cluster: Cluster::default(), namespace: namespace.into(), name: name.into() }
    }

    /// The object of this name in `cluster`.
    #[must_use]
    pub fn of(self, cluster: &Cluster) -> Self {
        Self { cluster: cluster.clone(), ..self }
    }

    /// The name that `text` is, in the form in which names are shown; `None`: it is none of an object in a namespace.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (cluster, name) = text.split_once(':').unwrap_or(("", text));
        let (namespace, name) = name.split_once('/')?;
        Some(Self::new(namespace, name).of(&cluster.parse().ok()?))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.cluster.is_flat() {
            write!(f, "{}:", self.cluster)?;
        }
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// The precedence of an object's claim to an address. A number: an object in its store, created at that revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    /// Whether its store holds it. One that stays in force although its store does not yields to any that is held.
    pub stored: bool,
    /// Grows with the time of its creation, as a revision does: the newest has the address.
    pub created: u64,
}

impl From<u64> for Age {
    fn from(created: u64) -> Self {
        Self { stored: true, created }
    }
}

/// An interface that the CNI plugin made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInterface {
    /// The pod that it was made for, in its node's cluster.
    pub pod: ObjectName,
    /// The pod's uid, if the runtime supplied it.
    pub uid: Option<Arc<str>>,
    /// `Some`: the pod was attached without Kubernetes' arguments; without a Pod object it has these labels. `None`:
    /// without its Pod object its labels are not known.
    pub labels: Option<Labels>,
    /// The interface's addresses.
    pub addresses: Vec<IpAddr>,
    /// The node that it is on.
    pub node: Arc<str>,
    /// The subnets of that node.
    pub subnets: Arc<[IpNet]>,
}

/// A node of the mesh as a node of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterNode {
    /// The cluster.
    pub cluster: Cluster,
    /// The node's name there.
    pub name: Arc<str>,
    /// Its subnets: no pod of another cluster has an address in them.
    pub subnets: Arc<[IpNet]>,
}

/// An attachment that would be a Pod object's by name and UID, but is on another node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Misplaced {
    /// The Pod object.
    pub pod: ObjectName,
    /// Its `spec.nodeName`.
    pub node: Arc<str>,
    /// The node that published the attachment.
    pub attached_at: Arc<str>,
}

/// The state of a NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyState {
    /// The policy is valid.
    Valid(NetworkPolicy),
    /// Invalid, without an earlier valid version, but with readable subject and directions: isolates those pods and
    /// allows nothing.
    Isolates(Selector, Directions),
    /// Not even that could be read, and the key has been written before: all of its namespace is isolated both ways.
    IsolatesNamespace,
}

/// A ClusterNetworkPolicy in force: its current value, its last good version, or its fail-closed reading. Without any
/// of these it is not put.
pub type ClusterPolicyState = ClusterPolicy;
