//! The keys and values meshd keeps in etcd.
//!
//! Everything below the prefix (default `/meshd`) is a plain key that `etcdctl` can read and write. This crate
//! builds and parses those keys, gives each value a type, and refuses what does not hold, one record at a time,
//! naming the field, the value and the limit. It does no I/O and knows no clock.
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
//!
//! Each type reads itself from JSON or YAML with `parse`, which names all mistakes at once, and those that the mesh
//! writes have `to_json`. Reading costs no more memory for a hostile value than for the largest honest one. [`check()`]
//! judges any key with its value; what a record does to others is for [`peer_conflicts`], [`config_conflicts`] and
//! their kin.

#![forbid(unsafe_code)]

mod address;
mod alive;
mod attachment;
mod check;
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
pub use config::{Backend, BackendKind, NetworkConfig, PolicyMode, Pool};
pub use conflict::{ConfigChange, config_change, config_conflicts, node_conflicts, peer_conflicts};
pub use document::MAX_VALUE_BYTES;
pub use id::{ContainerId, InterfaceName, KubernetesName, NodeId, NodeName, PeerName, PodName, SiteName};
pub use key::{Key, KeyError, SubnetKey};
pub use kubernetes::{Labels, MIRROR_ANNOTATIONS, NamedPort, Namespace, Pod, PodPhase, PolicyEnvelope, Protocol};
pub use node::NodeRecord;
pub use peer::{Endpoint, OutsidePeer};
pub use removed::Removed;
pub use subnet::{SubnetLease, WireguardData};
pub use unknown::UnknownField;
pub use violation::{Violation, Violations};
pub use wireguard::{PresharedKey, PublicKey};
