//! Keeps the topology up to date: a changed record is resolved together with all records that it affects.
//!
//! ```text
//! differing records of two revisions ─▶ closure over their claims ─▶ fold ─▶ that part of the Topology
//! ```
//!
//! Records affect each other if both claim one key, name, address at a site or node id, or overlapping prefixes. A node
//! and an external peer also affect each other if the peer's prefixes contain the node's endpoint. The fold covers all
//! records linked to a changed one in this way, over any number of steps. So the result equals a fold of all records;
//! in a mesh without conflicts, the set is a node with its subnets.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::Arc,
};

use etcd_schema::{NodeId, SubnetKey, SubnetLease};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use crate::{
    address::{host, prefixes},
    fold::{Folded, NodeEndpoints, RecordId, Selected, fold},
    problem::Problem,
    records::Records,
    topology::{PeerId, Topology},
};

/// Resolves the records of one node's view incrementally. See the [module](self).
#[derive(Debug)]
pub struct TopologyResolver {
    me: NodeId,
    records: Records,
    claims: Index,
    endpoints: NodeEndpoints,
    problems: BTreeMap<RecordId, Vec<Problem>>,
    topology: Topology,
}

impl TopologyResolver {
    /// The resolver of the node `me`, of no records yet.
    #[must_use]
    pub fn new(me: NodeId) -> Self {
        Self {
            me,
            records: Records::default(),
            claims: Index::default(),
            endpoints: NodeEndpoints::default(),
            problems: BTreeMap::new(),
            topology: Topology::default(),
        }
    }

    /// The mesh as the last records have it.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The last records.
    #[must_use]
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Applies records, at the cost of their difference from the previous ones. Another configuration folds all records
    /// again.
    pub fn apply(&mut self, records: &Records) {
        let before = std::mem::replace(&mut self.records, records.clone());
        self.topology.revision = records.revision;
        let network = records.config.as_ref().map(|config| config.value.as_ref());
        let changed = changed(&before, records);
        let selected = if self.topology.network.as_ref() == network {
            self.closed(changed, &before)
        } else {
            self.topology.network = network.cloned();
            self.reindex(&changed, &before);
            // Removed records are among the changed ones, all others in the new records.
            let all = all(records);
            all.into_iter().chain(changed).collect()
        };
        if !selected.is_empty() {
            self.work_out(&selected, &before);
        }
    }

    /// Brings the index up to date, and returns the changed records with all those that they concern.
    fn closed(&mut self, changed: BTreeSet<RecordId>, before: &Records) -> BTreeSet<RecordId> {
        self.reindex(&changed, before);
        let mut selected = changed.clone();
        let mut queue: Vec<RecordId> = changed.iter().cloned().collect();
        let mut found = Vec::new();
        while let Some(id) = queue.pop() {
            if changed.contains(&id) {
                self.claims.concerned(before, &id, &mut found);
            }
            self.claims.concerned(&self.records, &id, &mut found);
            for other in found.drain(..) {
                if !selected.contains(&other) {
                    selected.insert(other.clone());
                    queue.push(other);
                }
            }
        }
        selected
    }

    fn reindex(&mut self, changed: &BTreeSet<RecordId>, before: &Records) {
        for id in changed {
            self.claims.remove(before, id);
            self.claims.add(&self.records, id);
        }
    }

    /// Folds the selected records and replaces their earlier results.
    fn work_out(&mut self, selected: &BTreeSet<RecordId>, before: &Records) {
        let records = &self.records;
        let mut of_view = Selected::default();
        for id in selected {
            of_view.add(records, id);
            if let RecordId::Node(id) = id {
                for node in [before, records].into_iter().filter_map(|records| records.nodes.get(id)) {
                    self.endpoints.remove(id, &node.value);
                }
            }
        }
        let mut folded = fold(records, &self.me, of_view, &mut self.endpoints);
        let mut owners = BTreeSet::new();
        let mut mine = false;
        if selected.contains(&RecordId::Node(self.me.clone())) {
            self.topology.own_record = std::mem::take(&mut folded.own_record);
        }
        for id in selected {
            match id {
                RecordId::Removed(_) => {}
                RecordId::Node(id) => owners.extend([PeerId::Node(id.clone())]),
                RecordId::Subnet(key) => {
                    owners.insert(PeerId::Lease(*key));
                    for record in [before, records].into_iter().filter_map(|records| records.subnets.get(key)) {
                        let Some(node) = &record.value.node else { continue };
                        mine |= *node == self.me;
                        owners.insert(PeerId::Node(node.clone()));
                    }
                }
                RecordId::Peer(name) => {
                    let outside = folded.outside.remove(name).map(Arc::new);
                    self.topology.outside.set(name.clone(), outside);
                }
            }
        }
        for owner in owners {
            let member = folded.members.remove(&owner).map(Arc::new);
            self.topology.members.set(owner, member);
        }
        if mine {
            self.topology.own_subnets = std::mem::take(&mut folded.own_subnets);
        }
        self.take_problems(selected, folded);
    }

    fn take_problems(&mut self, selected: &BTreeSet<RecordId>, mut folded: Folded) {
        let mut differ = false;
        for id in selected {
            let now = folded.problems.remove(id);
            if self.problems.get(id) != now.as_ref() {
                differ = true;
                match now {
                    Some(now) => self.problems.insert(id.clone(), now),
                    None => self.problems.remove(id),
                };
            }
        }
        if differ {
            let mut all: Vec<Problem> = self.problems.values().flatten().cloned().collect();
            all.sort();
            self.topology.problems = Arc::new(all);
        }
    }
}

/// The records that differ between two revisions.
fn changed(before: &Records, records: &Records) -> BTreeSet<RecordId> {
    let removed = records.removed.changes(&before.removed).into_iter().cloned().map(RecordId::Removed);
    let nodes = records.nodes.changes(&before.nodes).into_iter().cloned().map(RecordId::Node);
    let subnets = records.subnets.changes(&before.subnets).into_iter().copied().map(RecordId::Subnet);
    let peers = records.peers.changes(&before.peers).into_iter().cloned().map(RecordId::Peer);
    removed.chain(nodes).chain(subnets).chain(peers).collect()
}

fn all(records: &Records) -> BTreeSet<RecordId> {
    changed(&Records::default(), records)
}

/// No record sorts before it.
const FIRST: RecordId = RecordId::Subnet(SubnetKey { v4: None, v6: None });

/// All claims, granted or not.
#[derive(Debug, Default)]
struct Index {
    /// By the hash of the claim. A collision only links unrelated records, which costs a little.
    by_claim: BTreeSet<(u64, RecordId)>,
    v4: PrefixMap<Ipv4Net, Vec<RecordId>>,
    v6: PrefixMap<Ipv6Net, Vec<RecordId>>,
}

impl Index {
    fn add(&mut self, records: &Records, id: &RecordId) {
        claims(records, id, |claim| {
            self.by_claim.insert((claim, id.clone()));
        });
        claimed_prefixes(records, id, |net| {
            let holders = match net {
                IpNet::V4(net) => self.v4.entry(net.trunc()).or_default(),
                IpNet::V6(net) => self.v6.entry(net.trunc()).or_default(),
            };
            holders.push(id.clone());
        });
    }

    fn remove(&mut self, records: &Records, id: &RecordId) {
        claims(records, id, |claim| {
            self.by_claim.remove(&(claim, id.clone()));
        });
        claimed_prefixes(records, id, |net| match net {
            IpNet::V4(net) => release(&mut self.v4, net.trunc(), id),
            IpNet::V6(net) => release(&mut self.v6, net.trunc(), id),
        });
    }

    /// Adds the records that the record `id` concerns, as it is in `records`; itself and others may be among them, and
    /// twice.
    fn concerned(&self, records: &Records, id: &RecordId, found: &mut Vec<RecordId>) {
        claims(records, id, |claim| {
            let from = self.by_claim.range((claim, FIRST)..).take_while(|(held, _)| *held == claim);
            found.extend(from.map(|(_, id)| id.clone()));
        });
        claimed_prefixes(records, id, |net| self.overlapping(net, |other| found.push(other.clone())));
        if let RecordId::Node(id) = id
            && let Some(node) = records.nodes.get(id)
        {
            for endpoint in &node.value.endpoints {
                self.overlapping(host(endpoint.ip()), |other| {
                    if matches!(other, RecordId::Peer(_)) {
                        found.push(other.clone());
                    }
                });
            }
        }
    }

    fn overlapping(&self, net: IpNet, mut each: impl FnMut(&RecordId)) {
        match net {
            IpNet::V4(net) => {
                let net = net.trunc();
                self.v4.cover_values(&net).flatten().for_each(&mut each);
                self.v4.children(&net).flat_map(|(_, ids)| ids).for_each(&mut each);
            }
            IpNet::V6(net) => {
                let net = net.trunc();
                self.v6.cover_values(&net).flatten().for_each(&mut each);
                self.v6.children(&net).flat_map(|(_, ids)| ids).for_each(&mut each);
            }
        }
    }
}

fn release<P: prefix_trie::Prefix>(map: &mut PrefixMap<P, Vec<RecordId>>, net: P, id: &RecordId) {
    if let Some(holders) = map.get_mut(&net) {
        holders.retain(|held| held != id);
        if holders.is_empty() {
            map.remove(&net);
        }
    }
}

/// Each thing that only one record can have and that the record `id` of `records` claims, as a hash.
fn claims(records: &Records, id: &RecordId, mut each: impl FnMut(u64)) {
    match id {
        RecordId::Removed(id) => {
            each(claim("node", id));
            let keys = records.removed.get(id).map(|record| &record.value.public_keys);
            keys.into_iter().flatten().for_each(|key| each(claim("key", key)));
        }
        RecordId::Node(id) => {
            each(claim("node", id));
            let Some(record) = records.nodes.get(id) else { return };
            let node = &record.value;
            [Some(node.public_key), node.next_public_key].iter().flatten().for_each(|key| each(claim("key", key)));
            each(claim("name", &node.name));
            for address in node.site.iter().flat_map(|_| &node.addresses) {
                each(claim("address", (&node.site, address.addr())));
            }
        }
        RecordId::Subnet(key) => {
            let Some(record) = records.subnets.get(key) else { return };
            match &record.value.node {
                Some(id) => each(claim("node", id)),
                None => flannel_keys(&record.value, each),
            }
        }
        RecordId::Peer(name) => {
            records.peers.get(name).into_iter().for_each(|record| each(claim("key", record.value.public_key)));
        }
    }
}

fn flannel_keys(lease: &SubnetLease, mut each: impl FnMut(u64)) {
    for data in [lease.wireguard_v4(), lease.wireguard_v6()].into_iter().flatten() {
        each(claim("key", data.public_key));
    }
}

fn claimed_prefixes(records: &Records, id: &RecordId, mut each: impl FnMut(IpNet)) {
    match id {
        RecordId::Subnet(key) if records.subnets.contains_key(key) => prefixes(key).for_each(each),
        RecordId::Peer(name) => {
            let allowed = records.peers.get(name).map(|record| &record.value.allowed_ips);
            allowed.into_iter().flatten().for_each(|net| each(*net));
        }
        RecordId::Removed(_) | RecordId::Node(_) | RecordId::Subnet(_) => {}
    }
}

fn claim(kind: &str, what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (kind, what).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
