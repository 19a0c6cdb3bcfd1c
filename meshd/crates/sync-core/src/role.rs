//! The role of etcd that `meshd-sync` needs.

use control_core::roles::{Grant, Role};
use etcd_schema::Cluster;
use ipnet::IpNet;

use crate::{
    ClusterKeys,
    blocks::{self, keys_within},
    mesh_nodes,
};

/// `meshd-sync` of this cluster. It reserves and frees subnets in `networks` alone.
#[must_use]
pub fn sync_role(prefix: &str, cluster: &Cluster, networks: &[IpNet]) -> Role {
    Role {
        name: format!("meshd-sync-{cluster}"),
        purpose: format!("meshd-sync of cluster {cluster}: writes its copy and its share of subnets, reads the nodes"),
        grants: std::iter::once(Grant::read_write(prefix, ClusterKeys::new(cluster).root(), true))
            .chain(mesh_nodes::LISTED.into_iter().chain(blocks::LISTED).map(|key| Grant::read(prefix, key, true)))
            .chain(networks.iter().flat_map(keys_within).map(|key| Grant::read_write(prefix, &key, true)))
            .collect(),
    }
}
