//! Keeps the snapshot up to date: a changed record is resolved together with all records that it affects.
//!
//! ```text
//! differing records of two views ─▶ closure over their claims ─▶ fold ─▶ that part of the Snapshot
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
    fold::{Endpoints, Folded, RecordId, Selected, fold},
    problem::Problem,
    records::View,
    snapshot::{Owner, Snapshot},
};

/// What one node makes of the records. See the [module](self).
#[derive(Debug)]
pub struct Picture {
    me: NodeId,
    view: View,
    claims: Index,
    endpoints: Endpoints,
    problems: BTreeMap<RecordId, Vec<Problem>>,
    snapshot: Snapshot,
}

impl Picture {
    /// The picture of the node `me`, of no records yet.
    #[must_use]
    pub fn new(me: NodeId) -> Self {
        Self {
            me,
            view: View::default(),
            claims: Index::default(),
            endpoints: Endpoints::default(),
            problems: BTreeMap::new(),
            snapshot: Snapshot::default(),
        }
    }

    /// The mesh as the last view has it.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The last view.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Takes in a view; costs what differs from the one before. With another configuration all records are folded anew.
    pub fn see(&mut self, view: &View) {
        let before = std::mem::replace(&mut self.view, view.clone());
        self.snapshot.revision = view.revision;
        let network = view.config.as_ref().map(|config| config.value.as_ref());
        let changed = changed(&before, view);
        let selected = if self.snapshot.network.as_ref() == network {
            self.closed(changed, &before)
        } else {
            self.snapshot.network = network.cloned();
            self.reindex(&changed, &before);
            // What is gone is among the changed, all the others are in the view.
            let all = all(view);
            all.into_iter().chain(changed).collect()
        };
        if !selected.is_empty() {
            self.work_out(&selected, &before);
        }
    }

    /// Brings the index up to date, and returns the changed records with all those that they concern.
    fn closed(&mut self, changed: BTreeSet<RecordId>, before: &View) -> BTreeSet<RecordId> {
        self.reindex(&changed, before);
        let mut selected = changed.clone();
        let mut queue: Vec<RecordId> = changed.iter().cloned().collect();
        let mut found = Vec::new();
        while let Some(id) = queue.pop() {
            if changed.contains(&id) {
                self.claims.concerned(before, &id, &mut found);
            }
            self.claims.concerned(&self.view, &id, &mut found);
            for other in found.drain(..) {
                if !selected.contains(&other) {
                    selected.insert(other.clone());
                    queue.push(other);
                }
            }
        }
        selected
    }

    fn reindex(&mut self, changed: &BTreeSet<RecordId>, before: &View) {
        for id in changed {
            self.claims.remove(before, id);
            self.claims.add(&self.view, id);
        }
    }

    /// Folds the selected records and puts what they come to in the place of what they came to before.
    fn work_out(&mut self, selected: &BTreeSet<RecordId>, before: &View) {
        let view = &self.view;
        let mut of_view = Selected::default();
        for id in selected {
            of_view.add(view, id);
            if let RecordId::Node(id) = id {
                for node in [before, view].into_iter().filter_map(|view| view.nodes.get(id)) {
                    self.endpoints.remove(id, &node.value);
                }
            }
        }
        let mut folded = fold(view, &self.me, of_view, &mut self.endpoints);
        let mut owners = BTreeSet::new();
        let mut mine = false;
        if selected.contains(&RecordId::Node(self.me.clone())) {
            self.snapshot.own_record = std::mem::take(&mut folded.own_record);
        }
        for id in selected {
            match id {
                RecordId::Removed(_) => {}
                RecordId::Node(id) => owners.extend([Owner::Node(id.clone())]),
                RecordId::Subnet(key) => {
                    owners.insert(Owner::Lease(*key));
                    for record in [before, view].into_iter().filter_map(|view| view.subnets.get(key)) {
                        let Some(node) = &record.value.node else { continue };
                        mine |= *node == self.me;
                        owners.insert(Owner::Node(node.clone()));
                    }
                }
                RecordId::Peer(name) => {
                    let outside = folded.outside.remove(name).map(Arc::new);
                    self.snapshot.outside.set(name.clone(), outside);
                }
            }
        }
        for owner in owners {
            let member = folded.members.remove(&owner).map(Arc::new);
            self.snapshot.members.set(owner, member);
        }
        if mine {
            self.snapshot.own_subnets = std::mem::take(&mut folded.own_subnets);
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
            self.snapshot.problems = Arc::new(all);
        }
    }
}

/// The records that differ between two views.
fn changed(before: &View, view: &View) -> BTreeSet<RecordId> {
    let removed = view.removed.changes(&before.removed).into_iter().cloned().map(RecordId::Removed);
    let nodes = view.nodes.changes(&before.nodes).into_iter().cloned().map(RecordId::Node);
    let subnets = view.subnets.changes(&before.subnets).into_iter().copied().map(RecordId::Subnet);
    let peers = view.peers.changes(&before.peers).into_iter().cloned().map(RecordId::Peer);
    removed.chain(nodes).chain(subnets).chain(peers).collect()
}

fn all(view: &View) -> BTreeSet<RecordId> {
    changed(&View::default(), view)
}

/// No record sorts before it.
const FIRST: RecordId = RecordId::Subnet(SubnetKey { v4: None, v6: None });

/// Who claims what, whether or not it holds.
#[derive(Debug, Default)]
struct Index {
    /// By the hash of what is claimed: two things with one hash make records concern each other that need not, which
    /// costs a little and changes nothing.
    by_claim: BTreeSet<(u64, RecordId)>,
    v4: PrefixMap<Ipv4Net, Vec<RecordId>>,
    v6: PrefixMap<Ipv6Net, Vec<RecordId>>,
}

impl Index {
    fn add(&mut self, view: &View, id: &RecordId) {
        claims(view, id, |claim| {
            self.by_claim.insert((claim, id.clone()));
        });
        claimed_prefixes(view, id, |net| {
            let holders = match net {
                IpNet::V4(net) => self.v4.entry(net.trunc()).or_default(),
                IpNet::V6(net) => self.v6.entry(net.trunc()).or_default(),
            };
            holders.push(id.clone());
        });
    }

    fn remove(&mut self, view: &View, id: &RecordId) {
        claims(view, id, |claim| {
            self.by_claim.remove(&(claim, id.clone()));
        });
        claimed_prefixes(view, id, |net| match net {
            IpNet::V4(net) => release(&mut self.v4, net.trunc(), id),
            IpNet::V6(net) => release(&mut self.v6, net.trunc(), id),
        });
    }

    /// Adds the records that the record `id` concerns, as it is in `view`; itself and others may be among them, and twice.
    fn concerned(&self, view: &View, id: &RecordId, found: &mut Vec<RecordId>) {
        claims(view, id, |claim| {
            let from = self.by_claim.range((claim, FIRST)..).take_while(|(held, _)| *held == claim);
            found.extend(from.map(|(_, id)| id.clone()));
        });
        claimed_prefixes(view, id, |net| self.overlapping(net, |other| found.push(other.clone())));
        if let RecordId::Node(id) = id
            && let Some(node) = view.nodes.get(id)
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

/// Each thing that only one record can have and that the record `id` of `view` claims, as a hash.
fn claims(view: &View, id: &RecordId, mut each: impl FnMut(u64)) {
    match id {
        RecordId::Removed(id) => {
            each(claim("node", id));
            let keys = view.removed.get(id).map(|record| &record.value.public_keys);
            keys.into_iter().flatten().for_each(|key| each(claim("key", key)));
        }
        RecordId::Node(id) => {
            each(claim("node", id));
            let Some(record) = view.nodes.get(id) else { return };
            let node = &record.value;
            [Some(node.public_key), node.next_public_key].iter().flatten().for_each(|key| each(claim("key", key)));
            each(claim("name", &node.name));
            for address in node.site.iter().flat_map(|_| &node.addresses) {
                each(claim("address", (&node.site, address.addr())));
            }
        }
        RecordId::Subnet(key) => {
            let Some(record) = view.subnets.get(key) else { return };
            match &record.value.node {
                Some(id) => each(claim("node", id)),
                None => flannel_keys(&record.value, each),
            }
        }
        RecordId::Peer(name) => {
            view.peers.get(name).into_iter().for_each(|record| each(claim("key", record.value.public_key)));
        }
    }
}

fn flannel_keys(lease: &SubnetLease, mut each: impl FnMut(u64)) {
    for data in [lease.wireguard_v4(), lease.wireguard_v6()].into_iter().flatten() {
        each(claim("key", data.public_key));
    }
}

fn claimed_prefixes(view: &View, id: &RecordId, mut each: impl FnMut(IpNet)) {
    match id {
        RecordId::Subnet(key) if view.subnets.contains_key(key) => prefixes(key).for_each(each),
        RecordId::Peer(name) => {
            let allowed = view.peers.get(name).map(|record| &record.value.allowed_ips);
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
