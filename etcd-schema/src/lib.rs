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
//! | `namespaces/NS`, `pods/NS/NAME` | an object of Kubernetes, which `policy` reads |
//! | `networkpolicies/NS/NAME`, `clusternetworkpolicies/NAME` | the same |
//! | `endpoints/ID/CONTAINERID/IFNAME` | [`Attachment`] |
//! | `k8s/CLUSTER/…` | the same objects of a Kubernetes [`Cluster`], its nodes, and the state of their copy |
//!
//! Each type parses itself from JSON or YAML with `parse`, which reports all errors at once. Types that the mesh writes
//! have `to_json`. A hostile value costs no more memory than the largest valid one. [`check()`] validates any key with
//! its value; [`peer_conflicts`], [`config_conflicts`] and related functions find conflicts with other records.

#![forbid(unsafe_code)]

/// Reading of one value field by field, with all that is wrong with it; for values of other crates.
pub mod reading {
    pub use crate::{
        address::unicast,
        document::describe,
        fields::{Expected, Fields},
        kinds::timestamp,
        labels::uid,
        summary::{counted, list},
        violation::{Report, quoted},
    };
}

mod address;
mod check;
mod cluster;
mod conflict;
mod document;
mod fields;
mod id;
mod key;
mod key_parts;
mod kinds;
mod labels;
mod mac;
mod pool;
mod spelling;
mod subnet_key;
mod summary;
mod unknown;
mod violation;
mod wireguard;

pub use check::{CheckError, Checked, check};
pub use cluster::Cluster;
pub use conflict::{ConfigChange, config_change, config_conflicts, node_conflicts, peer_conflicts};
pub use document::MAX_VALUE_BYTES;
pub use id::{ContainerId, InterfaceName, KubernetesName, NodeId, NodeName, PeerName, PodName, SiteName};
pub use key_parts::KeyError;
pub use kinds::{
    Alive, Allocate, AttachedPod, Attachment, BackendConfig, BackendKind, ClusterNetworks, Endpoint, Freed, Key,
    KindRules, KubernetesKey, LeaseData, NetworkConfig, NodeRecord, OutsidePeer, PolicyMode, Reader, Readiness,
    RecordClass, RecordValue, Removed, SubnetLease, Value, Vtep, VxlanData, VxlanOptions, WireguardData,
};
pub use labels::Labels;
pub use mac::MacAddress;
pub use pool::Pool;
pub use subnet_key::SubnetKey;
pub use unknown::UnknownField;
pub use violation::{Violation, Violations};
pub use wireguard::{PresharedKey, PublicKey};
