//! Least-privilege roles of etcd: which keys nodes, operators and readers may use.

use etcd_schema::NodeId;
use serde::{Deserialize, Serialize};

/// A role and what it may do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Role {
    /// Its name in etcd.
    pub name: String,
    /// What it is for.
    pub purpose: String,
    /// Its rights.
    pub grants: Vec<Grant>,
}

/// A right to keys.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Grant {
    /// What may be done.
    pub permission: Permission,
    /// The key, with the mesh's prefix.
    pub key: String,
    /// All keys that begin so, and not the one alone.
    pub prefix: bool,
}

/// As etcdctl has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// Read and watch.
    Read,
    /// Both.
    ReadWrite,
}

impl Permission {
    /// As etcdctl has it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::ReadWrite => "readwrite",
        }
    }
}

impl Grant {
    /// Reading below `prefix`: the key, or with `whole` all that begin so.
    #[must_use]
    pub fn read(prefix: &str, key: &str, whole: bool) -> Self {
        Self { permission: Permission::Read, key: format!("{prefix}/{key}"), prefix: whole }
    }

    /// Reading and writing below `prefix`.
    #[must_use]
    pub fn read_write(prefix: &str, key: &str, whole: bool) -> Self {
        Self { permission: Permission::ReadWrite, ..Self::read(prefix, key, whole) }
    }
}

/// All keys.
#[must_use]
pub fn operator(prefix: &str) -> Role {
    Role {
        name: "meshd-operator".to_owned(),
        purpose: "writes config, peers, policies and pods; removes nodes".to_owned(),
        grants: vec![Grant::read_write(prefix, "", true)],
    }
}

/// All keys, to read.
#[must_use]
pub fn reader(prefix: &str) -> Role {
    Role {
        name: "meshd-reader".to_owned(),
        purpose: "reads everything, including pre-shared keys of external peers".to_owned(),
        grants: vec![Grant::read(prefix, "", true)],
    }
}

/// One node, which draws any subnet, or has this reservation.
#[must_use]
pub fn node(prefix: &str, id: &NodeId, subnet: Option<&str>) -> Role {
    let subnets = match subnet {
        Some(subnet) => Grant::read_write(prefix, &format!("subnets/{subnet}"), false),
        // A node does not know beforehand which one it will draw.
        None => Grant::read_write(prefix, "subnets/", true),
    };
    Role {
        name: format!("meshd-node-{id}"),
        purpose: format!("node {id}: reads the mesh, writes its own records"),
        grants: vec![
            Grant::read(prefix, "", true),
            subnets,
            Grant::read_write(prefix, &format!("nodes/{id}"), false),
            Grant::read_write(prefix, &format!("alive/{id}"), false),
            Grant::read_write(prefix, &format!("endpoints/{id}/"), true),
        ],
    }
}

/// All nodes that share a user: any node's records, but neither config nor policies.
#[must_use]
pub fn nodes(prefix: &str) -> Role {
    let written = ["nodes/", "alive/", "endpoints/", "subnets/"];
    Role {
        name: "meshd-nodes".to_owned(),
        purpose: "nodes that share a user: read the mesh, write records of nodes".to_owned(),
        grants: std::iter::once(Grant::read(prefix, "", true))
            .chain(written.map(|key| Grant::read_write(prefix, key, true)))
            .collect(),
    }
}
