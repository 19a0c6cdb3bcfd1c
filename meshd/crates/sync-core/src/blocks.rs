//! Address blocks of a cluster's nodes, below `subnets/`: reservations for their podCIDRs, and blocks of nodes that are
//! gone.
//!
//! [`NodeBlocks`] is given what etcd holds and returns transactions. Every transaction is fenced by the leader key and
//! compares everything that it was derived from, so a stale view writes nothing.
//!
//! - With `"Allocate": "kubernetes"`, a block is reserved for the running node that is bound to the Node object, if the
//!   block is free. A block that another node owns is never taken: its owner may live on it.
//! - A node whose Node object was deleted and that shows no sign of life for `GONE` gives up its blocks. So does one that
//!   shows none for `REPLACED` while one other node runs that is its Node and waits for its first block: the machine was
//!   installed again. The key says so, and a node draws such a block when no other is left. Its record stays until its lease ends: a program that
//!   may write `nodes/` can replace any node's key, so `meshd-sync` may not.

mod text;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use control_core::types::{Compare, Entry, KeyListing, Transaction, Write};
use etcd_schema::{
    Cluster, ClusterNetworks, Freed, Key, KubernetesKey, KubernetesName, NetworkConfig, NodeId, SubnetKey, SubnetLease,
};
use ipnet::IpNet;
use mesh::{
    address::{overlay_addresses, prefixes},
    records::Revision,
};
use policy::objects::{KubernetesNode, Object, bind, read};

pub(crate) use self::text::keys_within;
use crate::{ClusterKeys, MeshNode, Now, Refused};

/// How long a node without a Node object shows no sign of life before its blocks are free. `alive/ID` outlives a daemon
/// by up to 30 s.
const GONE: Duration = Duration::from_secs(20);
/// The same for a node in whose place another one runs as its Node: longer than a machine takes to start again.
const REPLACED: Duration = Duration::from_secs(300);
/// How long etcd was observed before an absence means anything.
const OBSERVED: Duration = Duration::from_secs(60);
/// Changes in one transaction; etcd takes 128 operations.
const MOST_CHANGES: usize = 20;

/// Prefixes of the keys to list for [`NodeBlocks::step`], besides the cluster's Node objects and
/// [`mesh_nodes::LISTED`](crate::mesh_nodes::LISTED).
pub const LISTED: [&str; 2] = ["config", "subnets/"];

/// The reason why a Node gets no block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum BlockNotice {
    /// The podCIDRs cannot be one node's subnet.
    Unusable {
        /// The Node.
        node: KubernetesName,
        /// Why not.
        reason: String,
    },
    /// The block, or one that overlaps it, is another's.
    Claimed {
        /// The Node.
        node: KubernetesName,
        /// Its block.
        block: String,
        /// The key that conflicts.
        by: String,
        /// The owner, in messages.
        owner: String,
    },
    /// Several nodes of the mesh match the Node.
    Ambiguous {
        /// The Node.
        node: KubernetesName,
        /// Their ids.
        ids: Vec<NodeId>,
    },
}

impl fmt::Display for BlockNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable { node, reason } => {
                write!(f, "no block for Node {node}: {reason}; correct podCIDRs, or Networks in config")
            }
            Self::Claimed { node, block, by, owner } => write!(
                f,
                "no block for Node {node}: its podCIDR needs subnets/{block}, and {by} belongs to {owner}; if that one is \
                 gone for good: meshctl node remove, or delete the key"
            ),
            Self::Ambiguous { node, ids } => {
                let ids: Vec<&str> = ids.iter().map(NodeId::as_str).collect();
                write!(
                    f,
                    "no block for Node {node}: several nodes of the mesh have its name and an address ({}); one that has \
                     not run for 5 minutes gives way to a new one that runs; remove others that are not that Node: \
                     meshctl node remove ID",
                    ids.join(", ")
                )
            }
        }
    }
}

impl BlockNotice {
    /// The Event on the Node.
    #[must_use]
    pub fn refused(&self) -> Refused {
        let (Self::Unusable { node, .. } | Self::Claimed { node, .. } | Self::Ambiguous { node, .. }) = self;
        Refused::of_node(node, self.to_string())
    }
}

/// The result of a step.
#[derive(Debug, Default)]
pub struct BlockStep {
    /// Run this, then list again.
    pub transaction: Option<Transaction>,
    /// New notices.
    pub notices: Vec<BlockNotice>,
}

/// The blocks of one cluster during one term.
#[derive(Debug)]
pub struct NodeBlocks {
    keys: ClusterKeys,
    cluster: Cluster,
    fence: Revision,
    began: Duration,
    /// Nodes that were bound to a Node object in this term. A node that names no cluster is of this one only if it was.
    seen: BTreeMap<NodeId, KubernetesName>,
    /// Nodes that ran without a Node object in this term: a missing one proves nothing for them.
    strangers: BTreeSet<NodeId>,
    /// Nodes without a Node object, or replaced as their Node, that show no sign of life, since when.
    gone: BTreeMap<NodeId, Duration>,
    noticed: BTreeSet<BlockNotice>,
}

/// A node of the mesh that may be gone for good.
#[derive(Debug)]
struct Departed {
    /// Its Node.
    name: KubernetesName,
    /// The running node that is this Node now; `None`: the Node was deleted.
    replaced_by: Option<NodeId>,
}

impl Departed {
    /// How long it shows no sign of life before its blocks are free.
    const fn wait(&self) -> Duration {
        if self.replaced_by.is_some() { REPLACED } else { GONE }
    }
}

/// A value with the revision of its key's last write.
type At<T> = (T, Revision);

/// The readable records of etcd.
#[derive(Debug, Default)]
struct BlockRecords<'a> {
    config: Option<At<NetworkConfig>>,
    nodes: BTreeMap<&'a NodeId, &'a MeshNode>,
    /// Revisions of `nodes/`.
    records: BTreeMap<NodeId, Revision>,
    alive: BTreeSet<NodeId>,
    subnets: BTreeMap<SubnetKey, At<Option<SubnetLease>>>,
    /// Subnets whose key has an etcd lease: not reserved by an operator.
    leased: BTreeSet<SubnetKey>,
    objects: BTreeMap<KubernetesName, At<Option<Arc<KubernetesNode>>>>,
    /// Up to which `subnets/` is known.
    revision: Revision,
}

/// A transaction in the making.
#[derive(Default)]
struct TransactionDraft {
    transaction: Transaction,
    compared: BTreeSet<String>,
    /// Blocks that it takes or gives up.
    touched: Vec<SubnetKey>,
}

impl TransactionDraft {
    fn compare(&mut self, compare: Compare) {
        let key = match &compare {
            Compare::ModRevision { key, .. } | Compare::CreateRevision { key, .. } => key.clone(),
            Compare::AllModifiedBefore { prefix, .. } => format!("{prefix}*"),
        };
        if self.compared.insert(key) {
            self.transaction.compares.push(compare);
        }
    }

    fn unchanged(&mut self, key: String, revision: Revision) {
        self.compare(Compare::ModRevision { key, equals: revision });
    }

    fn put(&mut self, key: &SubnetKey, lease: &SubnetLease) {
        self.touched.push(*key);
        let write = Write::Put { key: Key::Subnet(*key).to_string(), value: lease.to_json(), lease: None };
        self.transaction.writes.push(write);
    }

    fn delete(&mut self, key: &SubnetKey) {
        self.touched.push(*key);
        self.transaction.writes.push(Write::Delete { key: Key::Subnet(*key).to_string() });
    }
}

impl NodeBlocks {
    /// Begins a term with this fence, the create_revision of the leader key.
    #[must_use]
    pub fn new(cluster: Cluster, fence: Revision, now: Now) -> Self {
        let keys = ClusterKeys::new(&cluster);
        Self {
            keys,
            cluster,
            fence,
            began: now.monotonic,
            seen: BTreeMap::new(),
            strangers: BTreeSet::new(),
            gone: BTreeMap::new(),
            noticed: BTreeSet::new(),
        }
    }

    /// Decides by the content of etcd: the nodes of the mesh, and lists of [`LISTED`], `nodes/`, `alive/` and the
    /// cluster's Node objects. `complete`: every Node object is copied, and absence is certain.
    pub fn step(&mut self, now: Now, complete: bool, nodes: &[MeshNode], lists: &[KeyListing]) -> BlockStep {
        let view = BlockRecords::of(&self.cluster, nodes, lists);
        let mut draft = TransactionDraft::default();
        let mut notices = BTreeSet::new();
        let (bound, replaced) = self.bind(&view, &mut notices);
        self.seen.extend(bound.iter().map(|(id, name)| ((*id).clone(), (*name).clone())));
        self.seen.retain(|id, _| view.nodes.contains_key(id));
        self.strangers.retain(|id| view.nodes.contains_key(id) && !self.seen.contains_key(id));
        if complete {
            let unbound = view.alive.iter().filter(|id| view.nodes.contains_key(*id) && !self.seen.contains_key(*id));
            self.strangers.extend(unbound.cloned());
        }
        for (id, name) in bound {
            if let Err(notice) = self.reserve(&view, id, name, &mut draft) {
                notices.insert(notice);
            }
        }
        let mut freeing = TransactionDraft::default();
        self.free(now, complete, &view, replaced, &mut freeing);
        // In transactions of their own: one that etcd denies keeps no other back.
        if draft.transaction.writes.is_empty() {
            draft = freeing;
        }
        let fresh = notices.difference(&self.noticed).cloned().collect();
        self.noticed = notices;
        let transaction = (!draft.transaction.writes.is_empty()).then(|| {
            draft.compare(Compare::CreateRevision { key: self.keys.leader(), equals: self.fence });
            draft.transaction
        });
        BlockStep { transaction, notices: fresh }
    }

    /// Nodes of the mesh with their Node objects, and nodes in whose place another runs. A node without a subnet or a liveness record makes no match
    /// ambiguous: it is the leftover of a deleted one.
    fn bind<'v>(
        &self,
        view: &'v BlockRecords<'_>,
        notices: &mut BTreeSet<BlockNotice>,
    ) -> (BTreeMap<&'v NodeId, &'v KubernetesName>, BTreeMap<NodeId, Departed>) {
        let ours = view.nodes.values().filter(|node| node.cluster.is_flat() || node.cluster == self.cluster);
        let published: Vec<(&NodeId, &str, Vec<IpAddr>)> = ours
            .filter(|node| node.runs || view.owned(&node.id).next().is_some())
            .map(|node| (&node.id, node.name.as_str(), view.addresses(node)))
            .collect();
        let objects = view.objects.iter().filter_map(|(name, (object, _))| Some((name, object.as_ref()?)));
        let binding = bind(
            published.iter().map(|(id, name, addresses)| (*id, *name, addresses.as_slice())),
            objects.map(|(name, object)| (name, name.as_str(), object.internal_ips.as_slice())),
        );
        let mut replaced = BTreeMap::new();
        for (name, ids) in &binding.objects {
            if let Some(by) = self.successor(view, name, ids) {
                let departed = || Departed { name: (*name).clone(), replaced_by: Some(by.clone()) };
                let silent = ids.iter().filter(|id| !view.alive.contains(**id));
                replaced.extend(silent.map(|id| ((*id).clone(), departed())));
            }
            let by_kubernetes = |id: &&NodeId| view.networks_of(id).is_some_and(|of| of.is_allocated_by_kubernetes());
            if ids.iter().any(by_kubernetes) {
                let ids = ids.iter().map(|id| (*id).clone()).collect();
                notices.insert(BlockNotice::Ambiguous { node: (*name).clone(), ids });
            }
        }
        (binding.bound, replaced)
    }

    /// The only one of these that runs, if it can have been installed in place of the others: it waits for its first
    /// block. One that has a subnet, or was another Node, only says that it is this Node.
    fn successor<'v>(
        &self,
        view: &BlockRecords<'_>,
        name: &KubernetesName,
        ids: &BTreeSet<&'v NodeId>,
    ) -> Option<&'v NodeId> {
        let mut running = ids.iter().filter(|id| view.alive.contains(**id));
        let by = *running.next().filter(|_| running.next().is_none())?;
        let waits =
            view.networks_of(by).is_some_and(|of| of.is_allocated_by_kubernetes()) && view.owned(by).next().is_none();
        (waits && self.seen.get(by).is_none_or(|seen| seen == name)).then_some(by)
    }

    /// Reserves the block of a Node for its node, if Kubernetes allocates and the node does not have it.
    fn reserve(
        &self,
        view: &BlockRecords<'_>,
        id: &NodeId,
        name: &KubernetesName,
        draft: &mut TransactionDraft,
    ) -> Result<(), BlockNotice> {
        let unusable = |reason: String| BlockNotice::Unusable { node: name.clone(), reason };
        let (Some((_, config_at)), Some(networks)) = (&view.config, view.networks_of(id)) else { return Ok(()) };
        let (Some((Some(object), object_at)), Some(record_at)) = (view.objects.get(name), view.records.get(id)) else {
            return Ok(());
        };
        if !networks.is_allocated_by_kubernetes() || !view.alive.contains(id) {
            return Ok(());
        }
        let Some(block) = block_of(&object.pod_cidrs).map_err(unusable)? else { return Ok(()) };
        if !networks.contain(&block) {
            return Err(unusable(outside(&block, networks)));
        }
        let of_another = view.owned(id).find_map(|(key, lease)| {
            let (cluster, other) = lease.kubernetes_node.as_ref()?;
            (*cluster != self.cluster).then(|| format!("its node is Node {other} of cluster {cluster} (subnets/{key})"))
        });
        if let Some(reason) = of_another {
            return Err(unusable(reason));
        }
        let mut given_up = Vec::new();
        let mut reserved = SubnetLease::reserved(id.clone(), &self.cluster, name);
        let mut present = 0;
        for (key, (lease, at)) in view.subnets.iter().filter(|(key, _)| key.overlaps(&block)) {
            let owner = lease.as_ref().and_then(|lease| lease.node.as_ref());
            match lease {
                Some(lease) if lease.freed.is_some() && *key == block => present = *at,
                Some(lease) if lease.freed.is_some() => given_up.push((key, *at)),
                Some(lease) if *key == block && owner == Some(id) => {
                    if lease.kubernetes_node == reserved.kubernetes_node && !view.is_superseded(id, *at) {
                        return Ok(());
                    }
                    // The node drew it, put it back after etcd lost it, or had another block since.
                    present = *at;
                    reserved = SubnetLease { kubernetes_node: reserved.kubernetes_node, ..lease.clone() };
                }
                _ => {
                    return Err(BlockNotice::Claimed {
                        node: name.clone(),
                        block: block.to_string(),
                        by: Key::Subnet(*key).to_string(),
                        owner: owner_for_people(lease.as_ref(), id),
                    });
                }
            }
        }
        if draft.transaction.writes.len() >= MOST_CHANGES || draft.touched.iter().any(|other| other.overlaps(&block)) {
            return Ok(());
        }
        draft.unchanged(Key::Config.to_string(), *config_at);
        draft.unchanged(Key::Node(id.clone()).to_string(), *record_at);
        draft.unchanged(self.node_key(name), *object_at);
        draft.compare(Compare::CreateRevision { key: Key::Removed(id.clone()).to_string(), equals: 0 });
        let all = Compare::AllModifiedBefore { prefix: "subnets/".to_owned(), revision: view.revision + 1 };
        draft.compare(all);
        // In an etcd that went back, everything is older than the list: the keys themselves are compared, too.
        draft.unchanged(Key::Subnet(block).to_string(), present);
        for (key, at) in given_up.iter().take(MOST_CHANGES) {
            draft.unchanged(Key::Subnet(**key).to_string(), *at);
            draft.delete(key);
        }
        if given_up.len() <= MOST_CHANGES {
            // Else the rest goes with the next transactions, and the block after them.
            draft.put(&block, &reserved);
        }
        Ok(())
    }

    /// Gives up the blocks of nodes whose daemon is gone, and whose Node object was deleted or is another node's now.
    fn free(
        &mut self,
        now: Now,
        complete: bool,
        view: &BlockRecords<'_>,
        replaced: BTreeMap<NodeId, Departed>,
        draft: &mut TransactionDraft,
    ) {
        let mut candidates = replaced;
        let deleted = self.deleted(view).into_iter();
        candidates.extend(deleted.map(|(id, name)| (id, Departed { name, replaced_by: None })));
        self.gone.retain(|id, _| candidates.contains_key(id) && !view.alive.contains(id));
        // Signs of life of the others are the proof that etcd has any.
        let others = || view.nodes.keys().filter(|id| !candidates.contains_key(*id));
        let absent = others().filter(|id| !view.alive.contains(*id)).count();
        if absent * 2 > others().count() {
            self.gone.clear();
            return;
        }
        let silent: Vec<_> = candidates.iter().filter(|(id, _)| !view.alive.contains(*id)).collect();
        for (id, _) in &silent {
            self.gone.entry((*id).clone()).or_insert(now.monotonic);
        }
        if !complete || now.monotonic.saturating_sub(self.began) < OBSERVED {
            return;
        }
        for (id, departed) in silent {
            let since = self.gone.get(id).copied().unwrap_or(now.monotonic);
            if now.monotonic.saturating_sub(since) < departed.wait() {
                continue;
            }
            for (key, (lease, revision)) in &view.subnets {
                let owned = lease.as_ref().is_some_and(|lease| {
                    let by_operator = lease.kubernetes_node.is_none() && !view.leased.contains(key);
                    lease.node.as_ref() == Some(id) && !by_operator
                });
                // Keys outside are not this program's to write.
                let in_share = view.networks_of(id).or_else(|| view.networks(&self.cluster));
                let in_share = in_share.is_some_and(|networks| networks.contain(key));
                if !owned || !in_share || draft.transaction.writes.len() >= MOST_CHANGES {
                    continue;
                }
                draft.compare(Compare::CreateRevision { key: Key::Alive(id.clone()).to_string(), equals: 0 });
                // The Node is as gone as it was, or as much the other node's.
                let object_at = view.objects.get(&departed.name).map_or(0, |(_, at)| *at);
                draft.unchanged(self.node_key(&departed.name), object_at);
                if let Some(by) = &departed.replaced_by {
                    let record_at = view.records.get(by).copied().unwrap_or_default();
                    draft.unchanged(Key::Node(by.clone()).to_string(), record_at);
                }
                let record_at = view.records.get(id).copied().unwrap_or_default();
                draft.unchanged(Key::Node(id.clone()).to_string(), record_at);
                draft.unchanged(Key::Subnet(*key).to_string(), *revision);
                draft.put(key, &SubnetLease::freed(Freed { cluster: self.cluster.clone(), at: now.unix }));
            }
        }
        self.forget_freed(now, view, draft);
    }

    /// Nodes of this cluster without a Node object, each with the object's name.
    fn deleted(&self, view: &BlockRecords<'_>) -> BTreeMap<NodeId, KubernetesName> {
        let named = view.nodes.values().filter(|node| node.cluster == self.cluster);
        let named = named.filter(|node| !self.strangers.contains(&node.id));
        let named = named.filter_map(|node| Some((node.id.clone(), node.name.parse().ok()?)));
        // The former node, even without a record.
        let reserved = view.subnets.values().filter_map(|(lease, _)| {
            let lease = lease.as_ref()?;
            let (_, name) = lease.kubernetes_node.as_ref().filter(|(cluster, _)| *cluster == self.cluster)?;
            Some((lease.node.clone()?, name.clone()))
        });
        let seen = self.seen.iter().map(|(id, name)| (id.clone(), name.clone()));
        let mut all: BTreeMap<NodeId, KubernetesName> = reserved.chain(seen).collect();
        all.extend(named);
        // A node that was renamed is the Node of its new name.
        let renamed = |id: &NodeId| view.nodes.get(id).and_then(|node| node.name.parse::<KubernetesName>().ok());
        let exists = |name: &KubernetesName| view.objects.contains_key(name);
        all.retain(|id, name| !exists(name) && !renamed(id).is_some_and(|name| exists(&name)));
        all
    }

    /// Deletes keys of blocks that were given up so long ago that nothing is left of their last use.
    fn forget_freed(&self, now: Now, view: &BlockRecords<'_>, draft: &mut TransactionDraft) {
        let Some((config, _)) = &view.config else { return };
        for (key, (lease, revision)) in &view.subnets {
            let freed = lease.as_ref().and_then(|lease| lease.freed.as_ref());
            let is_old = |freed: &Freed| now.unix.saturating_sub(freed.at) >= config.lease_ttl.as_secs();
            if freed.is_some_and(|freed| freed.cluster == self.cluster && is_old(freed))
                && draft.transaction.writes.len() < MOST_CHANGES
            {
                draft.unchanged(Key::Subnet(*key).to_string(), *revision);
                draft.delete(key);
            }
        }
    }

    fn node_key(&self, name: &KubernetesName) -> String {
        Key::Kubernetes(self.cluster.clone(), KubernetesKey::Node(name.clone())).to_string()
    }
}

impl<'a> BlockRecords<'a> {
    fn of(cluster: &Cluster, nodes: &'a [MeshNode], lists: &[KeyListing]) -> Self {
        let revision = lists.iter().map(|list| list.revision).min().unwrap_or_default();
        let nodes = nodes.iter().map(|node| (&node.id, node)).collect();
        let mut view = Self { revision, nodes, ..Self::default() };
        for entry in lists.iter().flat_map(|list| &list.entries) {
            view.add(cluster, entry);
        }
        view
    }

    fn add(&mut self, of: &Cluster, entry: &Entry) {
        let at = entry.mod_revision;
        match Key::parse(&entry.key) {
            Ok(Key::Config) => self.config = NetworkConfig::parse(&entry.value).ok().map(|config| (config, at)),
            Ok(Key::Node(id)) => {
                self.records.insert(id, at);
            }
            Ok(Key::Alive(id)) => {
                self.alive.insert(id);
            }
            Ok(Key::Subnet(key)) => {
                self.subnets.insert(key, (SubnetLease::parse(&entry.value).ok(), at));
                if entry.lease.is_some() {
                    self.leased.insert(key);
                }
            }
            Ok(Key::Kubernetes(cluster, key @ KubernetesKey::Node(_))) if cluster == *of => {
                let object = match read(&key, &entry.value, false).map(|reading| reading.object) {
                    Ok(Object::Node(node)) => Some(node),
                    _ => None,
                };
                if let KubernetesKey::Node(name) = key {
                    self.objects.insert(name, (object, at));
                }
            }
            _ => {}
        }
    }

    fn owned(&self, id: &NodeId) -> impl Iterator<Item = (&SubnetKey, &SubnetLease)> {
        let leases = self.subnets.iter().filter_map(|(key, (lease, _))| Some((key, lease.as_ref()?)));
        leases.filter(move |(_, lease)| lease.node.as_ref() == Some(id))
    }

    /// Whether a node has a reserved block that was written after this revision: it takes the newest one.
    fn is_superseded(&self, id: &NodeId, at: Revision) -> bool {
        self.subnets.values().any(|(lease, other)| {
            let reserved = lease.as_ref().filter(|lease| lease.kubernetes_node.is_some());
            *other > at && reserved.is_some_and(|lease| lease.node.as_ref() == Some(id))
        })
    }

    /// The networks of the cluster that the node names.
    fn networks_of(&self, id: &NodeId) -> Option<&ClusterNetworks> {
        self.networks(&self.nodes.get(id)?.cluster)
    }

    fn networks(&self, cluster: &Cluster) -> Option<&ClusterNetworks> {
        self.config.as_ref()?.0.of_cluster(cluster)
    }

    /// The addresses by which a node is recognised: of the underlay in its record, and of the overlay.
    fn addresses(&self, node: &MeshNode) -> Vec<IpAddr> {
        let overlay = self.owned(&node.id).flat_map(|(key, _)| overlay_addresses(key));
        node.addresses.iter().copied().chain(overlay).collect()
    }
}

/// The block that these podCIDRs are; `None`: there are none yet.
fn block_of(cidrs: &[IpNet]) -> Result<Option<SubnetKey>, String> {
    let mut block = SubnetKey { v4: None, v6: None };
    for cidr in cidrs {
        let twice = match cidr.trunc() {
            IpNet::V4(net) => block.v4.replace(net).is_some(),
            IpNet::V6(net) => block.v6.replace(net).is_some(),
        };
        if twice {
            return Err("it has two podCIDRs of one family".to_owned());
        }
    }
    if cidrs.is_empty() {
        return Ok(None);
    }
    // The key's rules decide which subnets are valid.
    match Key::parse(&Key::Subnet(block).to_string()) {
        Ok(_) => Ok(Some(block)),
        Err(error) => Err(error.to_string()),
    }
}

/// Which part of a block lies outside the networks, for people.
fn outside(block: &SubnetKey, networks: &ClusterNetworks) -> String {
    let v4 = block.v4.map(|net| SubnetKey { v4: Some(net), v6: None });
    let v6 = block.v6.map(|net| SubnetKey { v4: None, v6: Some(net) });
    let parts = v4.into_iter().chain(v6).filter(|part| !networks.contain(part)).flat_map(|part| prefixes(&part));
    let parts: Vec<String> = parts.map(|net| net.to_string()).collect();
    let all: Vec<String> = networks.networks().map(|net| net.to_string()).collect();
    format!("{} is outside {}", parts.join(" and "), all.join(" and "))
}

fn owner_for_people(lease: Option<&SubnetLease>, wanted: &NodeId) -> String {
    match lease {
        None => "an unknown owner: its value cannot be read".to_owned(),
        Some(SubnetLease { node: Some(node), .. }) if node == wanted => "the node itself, as another block".to_owned(),
        Some(SubnetLease { node: Some(node), .. }) => format!("node {node}"),
        Some(_) => "a reservation of an operator".to_owned(),
    }
}

#[cfg(test)]
mod tests;
