//! All that ever happened in etcd, and what must be true of it.

use std::collections::{BTreeMap, HashMap};

use control_core::{model::EtcdModel, types::WatchEvent};
use etcd_schema::{Key, SubnetKey, SubnetLease};
use mesh::records::{Records, Revision};

/// All that ever happened in etcd, over restores.
#[derive(Debug, Default)]
pub(crate) struct EtcdHistory {
    taken: Revision,
    sequence: u64,
    /// When each value was put: by key and revision, the last time.
    puts: HashMap<(String, Revision), u64>,
    /// When a key was last deleted, or another node's.
    gone: HashMap<String, u64>,
    /// Owners of the keys under `subnets/`.
    owners: BTreeMap<String, Option<String>>,
}

impl EtcdHistory {
    /// Takes what is new. Returns whether anything is.
    pub(crate) fn take(&mut self, seed: u64, etcd: &EtcdModel, by_operator: bool) -> bool {
        let events = etcd.events(self.taken, etcd.revision);
        if events.is_empty() {
            return false;
        }
        self.taken = etcd.revision;
        for event in events {
            self.sequence += 1;
            match event {
                WatchEvent::Put(entry) => {
                    self.puts.insert((entry.key.clone(), entry.mod_revision), self.sequence);
                    let Some(leased) = subnet(&entry.key) else { continue };
                    let node = SubnetLease::parse(&entry.value).ok().and_then(|lease| lease.node);
                    let node = node.map(|node| node.to_string());
                    let before = self.owners.insert(entry.key.clone(), node.clone());
                    let same = before.clone().flatten() == node;
                    let others = self.owners.keys().filter(|other| **other != entry.key);
                    let rival = others.filter_map(|other| subnet(other)).find(|other| other.overlaps(&leased));
                    assert_eq!(rival, None, "seed {seed}: {leased} is leased, too");
                    // One that cannot be read has no owner.
                    let free = before.flatten().is_none();
                    assert!(by_operator || free || same, "seed {seed}: {} was overwritten", entry.key);
                }
                WatchEvent::Delete { key, .. } => {
                    self.owners.remove(&key);
                    self.gone.insert(key, self.sequence);
                }
            }
        }
        true
    }

    pub(crate) fn restored(&mut self, etcd: &EtcdModel) {
        self.taken = etcd.revision;
        self.owners.clear();
        for (key, entry) in &etcd.keys {
            if subnet(key).is_some() {
                let node = SubnetLease::parse(&entry.value).ok().and_then(|lease| lease.node);
                self.owners.insert(key.clone(), node.map(|node| node.to_string()));
            }
        }
    }

    /// The keys under `subnets/` that this node owns.
    pub(crate) fn subnets_of<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a String> {
        self.owners.iter().filter(move |(_, owner)| owner.as_deref() == Some(node)).map(|(key, _)| key)
    }

    /// Invariant 2: what leaves the records was deleted in etcd since it was put.
    pub(crate) fn withdraws(&self, seed: u64, before: &Records, after: &Records) {
        let nodes = before.nodes.iter().filter(|(id, _)| !after.nodes.contains_key(*id));
        let nodes = nodes.map(|(id, record)| (Key::Node(id.clone()), record.mod_revision));
        let subnets = before.subnets.iter().filter(|(key, _)| !after.subnets.contains_key(*key));
        let subnets = subnets.map(|(key, record)| (Key::Subnet(*key), record.mod_revision));
        for (key, revision) in nodes.chain(subnets) {
            let text = key.to_string();
            let put = self.puts.get(&(text.clone(), revision));
            let gone = self.gone.get(&text);
            let overlapped =
                matches!(key, Key::Subnet(subnet) if after.subnets.keys().any(|other| other.overlaps(&subnet)));
            assert!(
                gone > put || overlapped,
                "seed {seed}: {text} of revision {revision} was withdrawn without evidence"
            );
        }
        assert!(
            before.config.is_none() || after.config.is_some() || self.gone.contains_key(Key::CONFIG),
            "seed {seed}: the configuration was withdrawn without evidence"
        );
    }
}

fn subnet(key: &str) -> Option<SubnetKey> {
    match Key::parse(key) {
        Ok(Key::Subnet(subnet)) => Some(subnet),
        _ => None,
    }
}
