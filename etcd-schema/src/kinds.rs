//! The kinds of records: one file each, and the tables of them.
//!
//! A file has the kind's rules, its value, and how that shows in `check`. A new kind is its file, a line in `keys!`
//! below and, unless it is an object of a Kubernetes cluster, one in `values!`; then its reader:
//! [`Records::set`](../mesh/records/struct.Records.html) for the mesh, `policy::objects` for policies. Parsing of keys,
//! cache, withdrawals, last good values and `check` go by the rules.

mod alive;
mod attachment;
mod cluster_network_policy;
mod config;
mod copy_confirm;
mod copy_leader;
mod copy_state;
mod kubernetes_node;
mod namespace;
mod network_policy;
mod node;
mod peer;
mod pod;
mod removed;
mod subnet;

use std::{fmt, sync::Arc};

use crate::{
    Cluster, ContainerId, InterfaceName, KubernetesName, NodeId, PeerName, SubnetKey, Violations,
    key_parts::{KeyError, Parts},
};

pub use alive::{Alive, Readiness};
pub use attachment::{AttachedPod, Attachment};
pub use config::{Allocate, BackendConfig, BackendKind, ClusterNetworks, NetworkConfig, PolicyMode, VxlanOptions};
pub(crate) use config::{KNOWN_BACKEND, NETWORKS, WITHOUT_MEANING, named};
pub use node::{NodeRecord, Vtep};
pub use peer::{Endpoint, OutsidePeer};
pub use removed::{Removed, timestamp};
pub use subnet::{Freed, LeaseData, SubnetLease, VxlanData, WireguardData};

/// The rules for all records of one kind.
#[derive(Debug)]
pub(crate) struct KindInfo {
    /// Where its keys are: a directory with its slash, or the whole key of a kind that has only one.
    pub(crate) place: &'static str,
    /// Whether its keys are in no cluster's directory.
    pub(crate) is_flat: bool,
    pub(crate) rules: KindRules,
    /// The fields of its value that are read; none for Kubernetes' objects, which have many that do not matter here.
    pub(crate) fields: &'static [&'static str],
}

/// How the daemon treats a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KindRules {
    /// The reader of its value.
    pub reader: Reader,
    /// Its class in withdrawals; `None`: its absence withdraws nothing that matters.
    pub class: Option<RecordClass>,
}

/// The reader of a record's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// The mesh: a value that cannot be read leaves the last good one in force.
    Mesh,
    /// The policy engine, likewise; the control plane passes it on.
    Policy,
    /// This version of the daemon does not: it is known, and neither kept nor cached.
    Unread,
}

/// The class of a record in the rules for withdrawals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordClass {
    /// Nodes and their subnets: each node restores its own.
    Node,
    /// Containers: likewise.
    Attachment,
    /// Policies.
    Policy,
    /// Objects that policies select by: Pods, Namespaces, Nodes.
    Object,
    /// Settings by operators.
    Setting,
}

impl RecordClass {
    /// Whether nodes write these keys themselves: their owner corrects outdated values of an older etcd.
    #[must_use]
    pub const fn is_written_by_nodes(self) -> bool {
        matches!(self, Self::Node | Self::Attachment)
    }
}

impl KindRules {
    /// Of a record that the daemon does not read.
    const UNREAD: Self = Self { reader: Reader::Unread, class: None };

    const fn mesh(class: RecordClass) -> Self {
        Self { reader: Reader::Mesh, class: Some(class) }
    }

    const fn policy(class: RecordClass) -> Self {
        Self { reader: Reader::Policy, class: Some(class) }
    }
}

/// Declares an enum of keys: each variant with its parts, their names in messages, and the module of its kind.
macro_rules! keys {
    (
        $(#[$attribute:meta])*
        $Keys:ident {
            $( $(#[$about:meta])* $Variant:ident $(( $($part:ident: $Part:ident::$read:ident),+ ))? = $module:ident, )+
        }
        $(beside { $(#[$inner_about:meta])* $Inner:ident($($InnerPart:ident),+) })?
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum $Keys {
            $( $(#[$about])* $Variant $(( $($Part),+ ))?, )+
            $( $(#[$inner_about])* $Inner($($InnerPart),+), )?
        }

        impl $Keys {
            pub(crate) const KINDS: &'static [&'static KindInfo] = &[$( &$module::KIND ),+];

            /// The key that `parts` name; `None`: they are in no directory of these.
            #[expect(non_snake_case, reason = "parts are named as they show in messages")]
            pub(crate) fn read(parts: Parts<'_>) -> Result<Option<Self>, KeyError> {
                $(
                    if let Some(parts) = parts.at($module::KIND.place) {
                        return keys!(@read parts $Variant $(( $($part: $Part::$read),+ ))?);
                    }
                )+
                Ok(None)
            }

            pub(crate) const fn kind(&self) -> &'static KindInfo {
                match self {
                    $( Self::$Variant { .. } => &$module::KIND, )+
                    $( Self::$Inner(_, key) => key.kind(), )?
                }
            }

            #[expect(non_snake_case, reason = "parts are named as they show in messages")]
            pub(crate) fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let parts: &[&dyn fmt::Display] = match self {
                    $( Self::$Variant $(( $($part),+ ))? => &[$( $($part),+ )?], )+
                    $( Self::$Inner(cluster, key) => return write_in_cluster(f, cluster, key), )?
                };
                f.write_str(self.kind().place)?;
                for (i, part) in parts.iter().enumerate() {
                    write!(f, "{}{part}", if i > 0 { "/" } else { "" })?;
                }
                Ok(())
            }
        }
    };
    (@read $parts:ident $Variant:ident) => {{
        let _whole = $parts;
        Ok(Some(Self::$Variant))
    }};
    (@read $parts:ident $Variant:ident ( $($part:ident: $Part:ident::$read:ident),+ )) => {{
        let [$($part),+] = $parts.split([$( stringify!($part) ),+])?;
        Ok(Some(Self::$Variant($( $parts.read(stringify!($part), $part, $Part::$read)? ),+)))
    }};
}

keys! {
    /// A parsed key below the prefix.
    Key {
        /// `config`
        Config = config,
        /// `subnets/10.244.3.0-24[&fd42:244:0:3::-64]` or `subnets/fd42:244:0:3::-64`
        Subnet(SUBNET: SubnetKey::read) = subnet,
        /// `nodes/ID`
        Node(ID: NodeId::read) = node,
        /// `removed/ID`
        Removed(ID: NodeId::read) = removed,
        /// `alive/ID`
        Alive(ID: NodeId::read) = alive,
        /// `peers/NAME`
        Peer(NAME: PeerName::read) = peer,
        /// `endpoints/ID/CONTAINERID/IFNAME`
        Endpoint(ID: NodeId::read, CONTAINERID: ContainerId::read, IFNAME: InterfaceName::read) = attachment,
    }
    beside {
        /// `k8s/CLUSTER/…`, and the flat keys `namespaces/…`, `pods/…`, `networkpolicies/…`, `clusternetworkpolicies/…`
        Kubernetes(Cluster, KubernetesKey)
    }
}

keys! {
    /// A parsed key of a Kubernetes object: the part below `k8s/CLUSTER/`, or a flat key.
    KubernetesKey {
        /// `namespaces/NS`
        Namespace(NS: KubernetesName::read_label) = namespace,
        /// `pods/NS/NAME`
        Pod(NS: KubernetesName::read_label, NAME: KubernetesName::read) = pod,
        /// `networkpolicies/NS/NAME`
        NetworkPolicy(NS: KubernetesName::read_label, NAME: KubernetesName::read) = network_policy,
        /// `clusternetworkpolicies/NAME`
        ClusterNetworkPolicy(NAME: KubernetesName::read) = cluster_network_policy,
        /// `nodes/NAME`; never flat.
        Node(NAME: KubernetesName::read) = kubernetes_node,
        /// `leader`; never flat.
        Leader = copy_leader,
        /// `state`; never flat.
        State = copy_state,
        /// `confirm`; never flat.
        Confirm = copy_confirm,
    }
}

/// Declares the values of records, by the variants of [`Key`]; `summary` gets the first part of the key.
macro_rules! values {
    ($( $Variant:ident $(( $id:ident ))?: $Value:ident, )+) => {
        /// The value of a record that this crate reads.
        #[derive(Debug, Clone, PartialEq)]
        #[expect(missing_docs, reason = "a variant is the value of its key")]
        pub enum Value {
            $( $Variant(Arc<$Value>), )+
        }

        impl Value {
            /// Parses the JSON or YAML in `bytes` under `key`; `None` for a Kubernetes object, which `policy` reads.
            ///
            /// # Errors
            /// All that is wrong with it.
            pub fn parse(key: &Key, bytes: &[u8]) -> Option<Result<Self, Violations>> {
                match key {
                    $( Key::$Variant { .. } => Some($Value::parse(bytes).map(|value| Self::$Variant(value.into()))), )+
                    Key::Kubernetes(..) => None,
                }
            }

            /// A one-line summary of this value under `key`, for operators.
            pub(crate) fn summary(&self, key: &Key) -> String {
                match (self, key) {
                    $( (Self::$Variant(value), Key::$Variant $(( $id, .. ))?) => value.summary($($id)?), )+
                    _ => String::new(),
                }
            }
        }

        $(
            impl RecordValue for $Value {
                fn of(value: &Value) -> Option<&Arc<Self>> {
                    if let Value::$Variant(value) = value { Some(value) } else { None }
                }
            }
        )+
    };
}

values! {
    Config: NetworkConfig,
    Subnet(subnet): SubnetLease,
    Node(id): NodeRecord,
    Removed(id): Removed,
    Alive(id): Alive,
    Peer(name): OutsidePeer,
    Endpoint(id): Attachment,
}

/// A type that one kind of records has as its value.
pub trait RecordValue: Sized {
    /// The value, if it is of this type.
    fn of(value: &Value) -> Option<&Arc<Self>>;
}

impl Value {
    /// The value, if it is a `T`.
    #[must_use]
    pub fn get<T: RecordValue>(&self) -> Option<&Arc<T>> {
        T::of(self)
    }

    /// The substitute for an unreadable value under `key` without an earlier one.
    #[must_use]
    pub fn stand_in(key: &Key) -> Option<Self> {
        // Fail closed: a removal that cannot be read is a removal.
        matches!(key, Key::Removed(_)).then(|| Self::Removed(Arc::default()))
    }
}

impl Key {
    /// The network configuration, the one key that is in no directory.
    pub const CONFIG: &'static str = config::KIND.place;
    /// Where the objects of Kubernetes clusters are, by cluster.
    pub(crate) const CLUSTERS: &'static str = "k8s/";

    /// Every directory below the prefix, with its slash.
    pub fn directories() -> impl Iterator<Item = &'static str> {
        let places = Self::KINDS.iter().map(|kind| kind.place).filter(|place| place.ends_with('/'));
        places.chain(KubernetesKey::directories())
    }

    /// How the daemon treats this record.
    #[must_use]
    pub fn rules(&self) -> KindRules {
        self.kind().rules
    }
}

impl KubernetesKey {
    /// The directories below the prefix that have Kubernetes' objects.
    pub fn directories() -> impl Iterator<Item = &'static str> {
        let flat = Self::KINDS.iter().filter(|kind| kind.is_flat);
        flat.map(|kind| kind.place).chain([Key::CLUSTERS])
    }
}

fn write_in_cluster(f: &mut fmt::Formatter<'_>, cluster: &Cluster, key: &KubernetesKey) -> fmt::Result {
    if !cluster.is_flat() {
        write!(f, "{}{cluster}/", Key::CLUSTERS)?;
    }
    key.write(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_on_the_page_for_operators() {
        let page = include_str!("../../docs/etcd.md");
        for place in Key::directories().chain([Key::CONFIG]) {
            assert!(page.contains(&format!("`{place}")), "{place}");
        }
    }

    #[test]
    fn places_are_told_apart() {
        for kinds in [Key::KINDS, KubernetesKey::KINDS] {
            for (i, kind) in kinds.iter().enumerate() {
                let others = kinds.iter().enumerate().filter(|(j, _)| *j != i);
                for (_, other) in others {
                    assert!(!kind.place.starts_with(other.place), "{} is within {}", kind.place, other.place);
                }
            }
        }
    }
}
