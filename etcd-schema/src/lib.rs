//! The keys and values meshd keeps in etcd.
//!
//! Every key below the prefix (default `/meshd`) is plain: `etcdctl` can read and write it. This crate builds and
//! parses the keys, gives each value a type, and refuses invalid ones, one record at a time. Errors name the field, the
//! value and the limit. The crate does no I/O and reads no clock.
//!
//! | key | value |
//! |---|---|
//! | `config` | [`NetworkConfig`] |
//! | `subnets/…` | [`SubnetLease`]; the prefixes are in the key, [`SubnetKey`] |
//! | `nodes/ID` | [`NodeRecord`] |
//! | `removed/ID` | [`Removed`] |
//! | `alive/ID` | [`Alive`] |
//! | `peers/NAME` | [`OutsidePeer`] |
//! | `namespaces/NS` | [`Namespace`] |
//! | `pods/NS/NAME` | [`Pod`] |
//! | `networkpolicies/NS/NAME`, `clusternetworkpolicies/NAME` | [`PolicyEnvelope`] |
//! | `endpoints/ID/CONTAINERID/IFNAME` | [`Attachment`] |
//! | `k8s/CLUSTER/…` | the same objects of a Kubernetes [`Cluster`], its nodes, and the state of their copy |
//!
//! Each type parses itself from JSON or YAML with `parse`, which reports all errors at once. Types that the mesh writes
//! have `to_json`. A hostile value costs no more memory than the largest valid one. [`check()`] validates any key with
//! its value; [`peer_conflicts`], [`config_conflicts`] and related functions find conflicts with other records.

#![forbid(unsafe_code)]

mod address;
mod alive;
mod attachment;
mod check;
mod cluster;
mod config;
mod conflict;
mod document;
mod fields;
mod id;
mod key;
mod kubernetes;
mod node;
mod peer;
mod pool;
mod removed;
mod subnet;
mod unknown;
mod violation;
mod wireguard;

pub use alive::Alive;
pub use attachment::{AttachedPod, Attachment};
pub use check::{CheckError, Checked, check};
pub use cluster::Cluster;
pub use config::{Backend, BackendKind, NetworkConfig, PolicyMode, Pool};
pub use conflict::{ConfigChange, config_change, config_conflicts, node_conflicts, peer_conflicts};
pub use document::MAX_VALUE_BYTES;
pub use id::{ContainerId, InterfaceName, KubernetesName, NodeId, NodeName, PeerName, PodName, SiteName};
pub use key::{Key, KeyError, KubernetesKey, SubnetKey};
pub use kubernetes::{Labels, MIRROR_ANNOTATIONS, NamedPort, Namespace, Pod, PodPhase, PolicyEnvelope, Protocol};
pub use node::NodeRecord;
pub use peer::{Endpoint, OutsidePeer};
pub use removed::Removed;
pub use subnet::{SubnetLease, WireguardData};
pub use unknown::UnknownField;
pub use violation::{Violation, Violations};
pub use wireguard::{PresharedKey, PublicKey};
