//! The nodes of the mesh, as their own records in etcd say.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use control_core::types::KeyListing;
use etcd_schema::{Alive, Cluster, Key, NodeId, NodeRecord, Readiness, Removed};

/// Prefixes of the keys to list for [`mesh_nodes`].
pub const LISTED: [&str; 3] = ["nodes/", "alive/", "removed/"];

/// Longest reason that a node may give, in characters.
const MAX_REASON: usize = 256;

/// A node with a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshNode {
    /// Its id.
    pub id: NodeId,
    /// Its name, which another may have too.
    pub name: String,
    /// The cluster in its record.
    pub cluster: Cluster,
    /// Its addresses on the underlay.
    pub addresses: Vec<IpAddr>,
    /// Its daemon gives a sign of life.
    pub runs: bool,
    /// The daemon acts on keys below `k8s/`.
    pub reads_kubernetes: bool,
    /// `None`: its daemon does not run, is older, or has just started.
    pub readiness: Option<Readiness>,
}

/// The nodes among these keys, which are those below [`LISTED`] and may be more. Those that an operator removed are
/// left out, and records that cannot be read: the other nodes refuse both.
#[must_use]
pub fn mesh_nodes(lists: &[KeyListing]) -> Vec<MeshNode> {
    let entries = || lists.iter().flat_map(|list| &list.entries);
    let mut removed_ids = HashSet::new();
    let mut removed_keys = HashSet::new();
    for entry in entries() {
        if let Ok(Key::Removed(id)) = Key::parse(&entry.key) {
            removed_ids.insert(id);
            removed_keys.extend(Removed::parse(&entry.value).into_iter().flat_map(|removed| removed.public_keys));
        }
    }
    let alive: HashMap<NodeId, Alive> = entries()
        .filter_map(|entry| match Key::parse(&entry.key) {
            Ok(Key::Alive(id)) => Some((id, Alive::parse(&entry.value).ok()?)),
            _ => None,
        })
        .collect();
    let nodes = entries().filter_map(|entry| {
        let Ok(Key::Node(id)) = Key::parse(&entry.key) else { return None };
        let record = NodeRecord::parse(&entry.value).ok()?;
        if removed_ids.contains(&id) || record.public_keys().any(|key| removed_keys.contains(&key)) {
            return None;
        }
        let alive = alive.get(&id);
        let mut addresses: Vec<IpAddr> = record.addresses.iter().map(|net| net.addr().to_canonical()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Some(MeshNode {
            id,
            name: record.name.to_string(),
            cluster: record.cluster,
            addresses,
            runs: alive.is_some(),
            reads_kubernetes: alive.is_some_and(|alive| alive.reads.iter().any(|read| read == Alive::KUBERNETES)),
            readiness: alive.and_then(|alive| alive.readiness.clone()).map(shortened),
        })
    });
    nodes.collect()
}

/// A node may write any text, and every watcher of Node objects gets it.
fn shortened(readiness: Readiness) -> Readiness {
    match readiness {
        Readiness::Ready => Readiness::Ready,
        Readiness::NotReady { reason } => {
            Readiness::NotReady { reason: reason.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect() }
        }
    }
}

#[cfg(test)]
mod tests {
    use control_core::types::Entry;

    use super::*;

    fn listing(entries: &[(&str, &str)]) -> KeyListing {
        let entries = entries.iter().map(|(key, value)| Entry {
            key: (*key).to_owned(),
            value: value.as_bytes().into(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        });
        KeyListing { entries: entries.collect(), ..KeyListing::default() }
    }

    #[test]
    fn a_node_is_what_its_record_and_its_sign_of_life_say() {
        let record = r#"{"name": "e1", "publicKey": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=", "listenPort": 51820,
            "endpoints": ["192.0.2.7:51820"], "addresses": ["192.168.1.7/24", "192.0.2.7/24"]}"#;
        let alive = |more: &str| format!(r#"{{"bootId": "b", "startCount": 1, "incarnation": 1{more}}}"#);
        let (reads, older) = (alive(r#", "reads": ["later", "k8s"], "ready": true"#), alive(""));
        let nodes = mesh_nodes(&[
            listing(&[("nodes/a", record), ("nodes/b", record), ("nodes/c", record), ("nodes/bad", "{")]),
            listing(&[("alive/a", &reads), ("alive/b", &older), ("alive/gone", &reads)]),
            listing(&[("removed/x", "{}")]),
        ]);
        let read: Vec<(&str, bool)> = nodes.iter().map(|node| (node.id.as_str(), node.reads_kubernetes)).collect();
        assert_eq!(read, [("a", true), ("b", false), ("c", false)]);
        assert_eq!((nodes[0].readiness.as_ref(), &nodes[1].readiness), (Some(&Readiness::Ready), &None));
        let addresses: Vec<IpAddr> = ["192.0.2.7", "192.168.1.7"].map(|ip| ip.parse().unwrap()).to_vec();
        assert_eq!((nodes[0].name.as_str(), &nodes[0].addresses), ("e1", &addresses));
        // Neither under its id nor by its key.
        let by_key = r#"{"publicKeys": ["xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="]}"#;
        for removed in [("removed/a", "{}"), ("removed/x", by_key)] {
            let records = listing(&[("nodes/a", record)]);
            assert_eq!(mesh_nodes(&[records, listing(&[removed])]), []);
        }
        let long = alive(&format!(r#", "ready": false, "reason": "a\u001b{}""#, "x".repeat(5000)));
        let nodes = mesh_nodes(&[listing(&[("nodes/a", record)]), listing(&[("alive/a", &long)])]);
        let Some(Readiness::NotReady { reason }) = &nodes[0].readiness else { panic!("{nodes:?}") };
        assert!(reason.len() == 256 && reason.starts_with("axx"), "{reason}");
    }
}
