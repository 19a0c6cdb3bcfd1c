//! The kinds that are copied, and their keys.

use etcd_schema::{Cluster, Key, KubernetesKey};

/// A kind of object, in the order in which changes are written.
///
/// A pod is selected by its namespace's labels and by policies, so both come first. Nodes come last: once a node is in
/// the cluster, its pods are unknown, and so isolated, until their objects are there. Before, objects of its pods count
/// for nothing; its pods are flat as they were, or unknown. So the other order closes more, and this one opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// `namespaces/NS`
    Namespace,
    /// `networkpolicies/NS/NAME`
    NetworkPolicy,
    /// `clusternetworkpolicies/NAME`
    ClusterNetworkPolicy,
    /// `pods/NS/NAME`
    Pod,
    /// `nodes/NAME`
    Node,
}

impl ObjectKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Namespace, Self::NetworkPolicy, Self::ClusterNetworkPolicy, Self::Pod, Self::Node];

    /// Its name in an object.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::Pod => "Pod",
        }
    }

    /// Its name in a path of the API server, and its directory in etcd.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::NetworkPolicy => "networkpolicies",
            Self::ClusterNetworkPolicy => "clusternetworkpolicies",
            Self::Pod => "pods",
        }
    }

    /// Whether its objects say which traffic is allowed.
    pub(crate) const fn is_policy(self) -> bool {
        matches!(self, Self::NetworkPolicy | Self::ClusterNetworkPolicy)
    }

    /// Whether its objects are in namespaces.
    #[must_use]
    pub(crate) const fn is_namespaced(self) -> bool {
        matches!(self, Self::NetworkPolicy | Self::Pod)
    }
}

/// The keys of one cluster, below the prefix of the mesh.
#[derive(Debug, Clone)]
pub struct ClusterKeys {
    cluster: Cluster,
    root: String,
}

impl ClusterKeys {
    /// The keys of `cluster`, which has a name.
    #[must_use]
    pub fn new(cluster: &Cluster) -> Self {
        let leader = Key::Kubernetes(cluster.clone(), KubernetesKey::Leader).to_string();
        let root = leader.rfind('/').map_or_else(String::new, |end| leader[..=end].to_owned());
        Self { cluster: cluster.clone(), root }
    }

    /// The cluster.
    #[must_use]
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The common prefix of the keys of a kind.
    #[must_use]
    pub fn directory(&self, kind: ObjectKind) -> String {
        format!("{}{}/", self.root, kind.plural())
    }

    /// The common prefix of all keys.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The leased key of the leader; its create_revision fences every write.
    #[must_use]
    pub fn leader(&self) -> String {
        self.key(KubernetesKey::Leader)
    }

    /// [`SyncState`](crate::state::SyncState).
    #[must_use]
    pub fn state(&self) -> String {
        self.key(KubernetesKey::State)
    }

    /// The key of the operator's token, which releases held changes.
    #[must_use]
    pub fn confirm(&self) -> String {
        self.key(KubernetesKey::Confirm)
    }

    fn key(&self, key: KubernetesKey) -> String {
        Key::Kubernetes(self.cluster.clone(), key).to_string()
    }

    /// The key of an object; `path` is `NS/NAME` or `NAME`.
    #[must_use]
    pub fn object(&self, kind: ObjectKind, path: &str) -> String {
        format!("{}{}/{path}", self.root, kind.plural())
    }

    /// Which object a key is of.
    pub(crate) fn parse<'k>(&self, key: &'k str) -> Option<(ObjectKind, &'k str)> {
        let (directory, path) = key.strip_prefix(&self.root)?.split_once('/')?;
        ObjectKind::ALL.into_iter().find(|kind| kind.plural() == directory).map(|kind| (kind, path))
    }
}
