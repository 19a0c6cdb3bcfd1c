//! Removes a node permanently, for `meshctl node remove`.
//!
//! One transaction puts `removed/ID` and deletes the node's own keys, so no reader sees one without the other. While
//! `removed/ID` exists, all nodes refuse that id and its WireGuard keys, and the node itself, if it runs, does not
//! restore its keys. Attachments of the node's pods (`endpoints/ID/…`) name subnets that it no longer owns, and are
//! ignored from then on. If a node is online and has pods attached, only [`Live::Removed`] removes it.

use control_core::types::{CallError, Compare, Entry, KeyListing, Transaction, Write};
use etcd_schema::{Attachment, Key, NodeId, NodeName, NodeRecord, PublicKey, Removed, SubnetKey, SubnetLease};
use mesh::records::Revision;

use super::session::Session;

/// How often a removal is tried while the node's records change under it.
const ATTEMPTS: usize = 10;

/// Keys deleted in one transaction at most: etcd's own limit is 128 operations.
const MOST_SUBNETS: usize = 100;

/// The removed records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The node.
    pub id: NodeId,
    /// Its name, if its record is readable.
    pub name: Option<NodeName>,
    /// The subnets that are free again.
    pub subnets: Vec<SubnetKey>,
    /// Keys that no node may use from now on.
    pub public_keys: Vec<PublicKey>,
    /// Whether it had been removed before; anything left of it is gone now.
    pub repeated: bool,
    /// Pods attached there, `NAMESPACE/NAME`, by their records in etcd: they are cut off.
    pub pods: Vec<String>,
}

/// The treatment of a node that is online and has pods attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Live {
    /// Refuse to remove it.
    Refused,
    /// Remove it like any other.
    Removed,
}

/// Why a node was not removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemovalError {
    /// Nothing in etcd has this name or id.
    #[error(
        "no node has the name or id {0:?} (meshctl peers lists names; for a node without a readable record, use its id)"
    )]
    NotFound(String),
    /// Several nodes that were removed had this name.
    #[error("{} removed nodes had the name {name:?}: select one by its id ({})", ids.len(), list(ids))]
    Ambiguous {
        /// The name.
        name: String,
        /// The nodes with that name.
        ids: Vec<NodeId>,
    },
    /// The node is online and has pods attached.
    #[error(
        "node {} ({id}) is online with {} attached, which would lose the mesh: {}",
        name.as_ref().map_or("without a readable name", NodeName::as_str),
        if pods.len() == 1 { "1 pod".to_owned() } else { format!("{} pods", pods.len()) },
        first(pods)
    )]
    Live {
        /// The node.
        id: NodeId,
        /// Its name, where a record has it.
        name: Option<NodeName>,
        /// Its pods, `NAMESPACE/NAME`.
        pods: Vec<String>,
    },
    /// Its records changed each time they had been read.
    #[error("the node's records keep changing; try again")]
    Contended,
    /// etcd did not answer or refused.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Removes the node with this name or id; `time` (RFC 3339) is noted for people. Of several nodes with this name, the
/// oldest is meant.
///
/// Does the same again when repeated, and works for a node that is away, whose record cannot be read, or of which
/// only its subnet is left.
///
/// # Errors
/// When nothing or too much goes by that name, or etcd does not do it. After [`CallError::Indeterminate`] it may
/// have happened: repeat it.
pub async fn remove_node(session: &Session, name_or_id: &str, live: Live, time: &str) -> Result<Removal, RemovalError> {
    for _ in 0..ATTEMPTS {
        let KeyListing { revision, mut entries, .. } = session.list_below("nodes/").await?;
        for kind in ["subnets/", "removed/", "alive/"] {
            entries.extend(session.list_below(kind).await?.entries);
        }
        let id = find(&parse(&entries), name_or_id)?;
        entries.extend(session.list_below(&Key::endpoints_of(&id)).await?.entries);
        let (removal, transaction) = plan(&entries, revision, name_or_id, live, time)?;
        if session.transact(&transaction).await?.succeeded {
            return Ok(removal);
        }
    }
    Err(RemovalError::Contended)
}

/// `revision`: nothing of `entries` was read before it.
fn plan(
    entries: &[Entry],
    revision: Revision,
    name_or_id: &str,
    live: Live,
    time: &str,
) -> Result<(Removal, Transaction), RemovalError> {
    let parsed = parse(entries);
    let id = find(&parsed, name_or_id)?;

    let mut removal = Removal {
        id: id.clone(),
        name: None,
        subnets: Vec::new(),
        public_keys: Vec::new(),
        repeated: false,
        pods: Vec::new(),
    };
    let mut online = false;
    let mut compares = Vec::new();
    let mut writes = Vec::new();
    for (key, entry) in &parsed {
        online |= *key == Key::Alive(id.clone());
        let deleted = removal.note(key, &entry.value);
        // Only the node itself rewrites `alive`; its value does not matter here.
        if deleted && !matches!(key, Key::Alive(_)) || matches!(key, Key::Removed(node) if *node == id) {
            compares.push(unchanged(entry));
        }
        if deleted {
            writes.push(Write::Delete { key: entry.key.clone() });
        }
    }
    removal.pods.sort_unstable();
    removal.pods.dedup();
    if live == Live::Refused {
        if online && !removal.pods.is_empty() {
            return Err(RemovalError::Live { id, name: removal.name, pods: removal.pods });
        }
        // A pod that is attached meanwhile is looked at too.
        compares.push(Compare::AllModifiedBefore { prefix: Key::endpoints_of(&id), revision: revision + 1 });
    }
    removal.public_keys.sort_unstable();
    removal.public_keys.dedup();
    removal.public_keys.truncate(Removed::MAX_KEYS);

    let key = Key::Removed(id.clone()).to_string();
    if !removal.repeated {
        compares.push(Compare::ModRevision { key: key.clone(), equals: 0 });
    }
    if removal.name.is_none() && !parsed.iter().any(|(key, _)| *key == Key::Node(id.clone())) {
        compares.push(Compare::ModRevision { key: Key::Node(id).to_string(), equals: 0 });
    }
    let value = Removed { name: removal.name.clone(), public_keys: removal.public_keys.clone(), time: time.to_owned() };
    writes.push(Write::Put { key, value: value.to_json(), lease: None });
    Ok((removal, Transaction { compares, writes }))
}

impl Removal {
    /// Takes note of a key of the node. Returns whether the key goes with the node.
    fn note(&mut self, key: &Key, value: &[u8]) -> bool {
        match key {
            Key::Node(node) if *node == self.id => {
                if let Ok(record) = NodeRecord::parse(value) {
                    self.public_keys.extend(record.public_keys());
                    self.name = Some(record.name);
                }
                true
            }
            Key::Subnet(subnet) => {
                let ours = SubnetLease::parse(value).is_ok_and(|lease| lease.node.as_ref() == Some(&self.id))
                    && self.subnets.len() < MOST_SUBNETS;
                if ours {
                    self.subnets.push(*subnet);
                }
                ours
            }
            Key::Alive(node) => *node == self.id,
            // Its daemon takes it back itself, and without the node it counts for nothing.
            Key::Endpoint(node, container, _) if *node == self.id => {
                self.pods.push(Attachment::parse(value).map_or_else(
                    |_| format!("container {container}"),
                    |attachment| format!("{}/{}", attachment.pod.namespace, attachment.pod.name),
                ));
                false
            }
            Key::Removed(node) if *node == self.id => {
                self.repeated = true;
                if let Ok(before) = Removed::parse(value) {
                    self.public_keys.extend(before.public_keys);
                    self.name = self.name.take().or(before.name);
                }
                false
            }
            _ => false,
        }
    }
}

fn parse(entries: &[Entry]) -> Vec<(Key, &Entry)> {
    entries.iter().filter_map(|entry| Some((Key::parse(&entry.key).ok()?, entry))).collect()
}

/// The one node that goes by this name or id. An id wins over a name.
fn find(parsed: &[(Key, &Entry)], name_or_id: &str) -> Result<NodeId, RemovalError> {
    let mut named = Vec::new();
    let wanted: Option<NodeId> = name_or_id.parse().ok();
    for (key, entry) in parsed {
        let (id, name) = match key {
            Key::Node(id) => (id.clone(), NodeRecord::parse(&entry.value).ok().map(|record| record.name)),
            Key::Removed(id) => (id.clone(), Removed::parse(&entry.value).ok().and_then(|removed| removed.name)),
            Key::Alive(id) => (id.clone(), None),
            Key::Subnet(_) => match SubnetLease::parse(&entry.value).ok().and_then(|lease| lease.node) {
                Some(id) => (id, None),
                None => continue,
            },
            _ => continue,
        };
        if wanted.as_ref() == Some(&id) {
            return Ok(id);
        }
        if name.is_some_and(|name| name.as_str() == name_or_id) {
            named.push((matches!(key, Key::Removed(_)), entry.create_revision, id));
        }
    }
    // A name may have gone over to a new node: then that one is meant, not the one that was removed. Of several, the
    // oldest has the name, as at every node.
    let present = named.iter().filter(|(removed, ..)| !removed).min();
    if let Some((_, _, id)) = present {
        return Ok(id.clone());
    }
    let mut ids: Vec<NodeId> = named.into_iter().map(|(_, _, id)| id).collect();
    ids.sort();
    ids.dedup();
    match <[NodeId; 1]>::try_from(ids) {
        Ok([id]) => Ok(id),
        Err(ids) if ids.is_empty() => Err(RemovalError::NotFound(name_or_id.to_owned())),
        Err(ids) => Err(RemovalError::Ambiguous { name: name_or_id.to_owned(), ids }),
    }
}

fn unchanged(entry: &Entry) -> Compare {
    Compare::ModRevision { key: entry.key.clone(), equals: entry.mod_revision }
}

/// The first few of these, and how many follow.
fn first(pods: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = pods[..pods.len().min(SHOWN)].join(", ");
    if pods.len() > SHOWN { format!("{shown} and {} more", pods.len() - SHOWN) } else { shown }
}

fn list(ids: &[NodeId]) -> String {
    ids.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, mod_revision: i64) -> Entry {
        Entry {
            key: key.into(),
            value: value.as_bytes().into(),
            create_revision: mod_revision,
            mod_revision,
            lease: None,
        }
    }

    fn deleted(transaction: &Transaction) -> Vec<&str> {
        transaction
            .writes
            .iter()
            .filter_map(|write| match write {
                Write::Delete { key } => Some(key.as_str()),
                Write::Put { .. } => None,
            })
            .collect()
    }

    #[test]
    fn a_node_whose_record_cannot_be_read_goes_by_its_id_with_all_that_is_its() {
        let entries = [
            entry("nodes/a", "garbage", 3),
            entry("subnets/10.0.1.0-24", r#"{"Node":"a"}"#, 4),
            entry("subnets/10.0.2.0-24", r#"{"Node":"b"}"#, 5),
            entry("alive/a", "{}", 6),
        ];
        let (removal, transaction) = plan(&entries, 9, "a", Live::Refused, "2026-01-31T12:00:00Z").unwrap();
        assert_eq!(removal.subnets.len(), 1);
        assert!(removal.public_keys.is_empty() && !removal.repeated);
        assert_eq!(deleted(&transaction), ["nodes/a", "subnets/10.0.1.0-24", "alive/a"]);
        assert!(transaction.compares.contains(&Compare::ModRevision { key: "removed/a".into(), equals: 0 }));
    }

    #[test]
    fn repeating_it_keeps_the_keys_that_were_named_before() {
        let key = PublicKey::from_bytes([9; 32]);
        let before = format!(r#"{{"name":"gone","publicKeys":["{key}"],"time":"2026-01-31T12:00:00Z"}}"#);
        let entries = [entry("removed/a", &before, 7), entry("subnets/10.0.1.0-24", r#"{"Node":"a"}"#, 8)];
        let (removal, transaction) = plan(&entries, 9, "gone", Live::Refused, "2026-02-01T12:00:00Z").unwrap();
        assert!(removal.repeated);
        assert_eq!(removal.public_keys, [key]);
        assert_eq!(deleted(&transaction), ["subnets/10.0.1.0-24"]);
    }

    #[test]
    fn a_name_means_the_oldest_node_and_an_id_its_own() {
        let record = |key: u8| {
            let key = PublicKey::from_bytes([key; 32]);
            format!(r#"{{"name": "east-1", "publicKey": "{key}", "listenPort": 51820}}"#)
        };
        let entries =
            [entry("nodes/a", &record(1), 9), entry("nodes/b", &record(2), 5), entry("nodes/c", &record(3), 7)];
        let removed = |name| plan(&entries, 9, name, Live::Refused, "2026-01-31T12:00:00Z").unwrap().0.id;
        assert_eq!(removed("east-1").as_str(), "b");
        assert_eq!(removed("c").as_str(), "c");
    }

    #[test]
    fn what_nobody_is_named_is_not_found() {
        assert!(matches!(plan(&[], 9, "a", Live::Refused, ""), Err(RemovalError::NotFound(_))));
    }

    #[test]
    fn a_node_that_is_online_with_pods_stays_unless_that_is_asked_for() {
        let pod = r#"{"pod":{"namespace":"shop","name":"web"},"addresses":["10.0.1.2"],"interface":"eth0"}"#;
        let mut entries = vec![
            entry("nodes/a", "garbage", 3),
            entry("subnets/10.0.1.0-24", r#"{"Node":"a"}"#, 4),
            entry("alive/a", "{}", 6),
            entry("endpoints/a/c1/eth0", pod, 7),
            entry("endpoints/b/c2/eth0", pod, 7),
        ];
        let removed = |entries: &[Entry], live| plan(entries, 9, "a", live, "2026-01-31T12:00:00Z");
        match removed(&entries, Live::Refused) {
            Err(RemovalError::Live { pods, .. }) => assert_eq!(pods.len(), 1),
            other => panic!("{other:?}"),
        }
        let (removal, transaction) = removed(&entries, Live::Removed).unwrap();
        assert_eq!((removal.pods.len(), deleted(&transaction).len()), (1, 3));
        // One that is off has nothing to lose.
        entries.remove(2);
        let (_, transaction) = removed(&entries, Live::Refused).unwrap();
        let unchanged = Compare::AllModifiedBefore { prefix: "endpoints/a/".into(), revision: 10 };
        assert!(transaction.compares.contains(&unchanged), "{transaction:?}");
    }
}
