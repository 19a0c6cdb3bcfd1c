//! Pods: objects joined with attachments, and the owner of each address.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    clusters::Clusters,
    input::{Age, ClusterNode, Misplaced, ObjectName, PodInterface},
    selection::Selection,
    storage::{AddressTable, Chunked, Owner, Slab},
};
use crate::object::{Labels, NamedPort, PodObject};

/// A pod in a classifier, or the remains of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    /// Its namespace and name.
    pub name: ObjectName,
    /// Its labels, if known.
    pub labels: Option<Labels>,
    /// Named ports of its containers.
    pub ports: Arc<[NamedPort]>,
    /// Its node's name in the mesh, if known.
    pub node: Option<Arc<str>>,
    /// Its UID, if known.
    pub uid: Option<Arc<str>>,
    /// Hash of its name and UID; never 0.
    pub(crate) stamp: u32,
    /// Addresses that it claims and may have. It owns each unless a newer pod claims it, too.
    pub addresses: Arc<[IpAddr]>,
}

#[derive(Debug, Default)]
struct PodEntry {
    object: Option<(PodObject, Age)>,
    /// By the caller's key.
    attachments: BTreeMap<Arc<str>, (PodInterface, Age)>,
    /// The pods that result.
    pods: Vec<u32>,
    /// The object's node, if an attachment is on another one.
    elsewhere: Option<Arc<str>>,
}

#[derive(Debug)]
struct Pod {
    info: Arc<PodInfo>,
    class: u32,
    /// Its index among the pods of its class.
    place: usize,
    claims: Vec<(IpAddr, Rank)>,
}

/// Precedence among pods that claim one address: stored before only kept in force, running before ended, attached
/// before others, then the newest.
type Rank = (bool, bool, bool, u64);

#[derive(Debug)]
enum AddressClaims {
    One(u32, Rank),
    Many(Vec<(u32, Rank)>),
}

#[derive(Debug, Default)]
pub(crate) struct Pods {
    entries: HashMap<ObjectName, PodEntry>,
    pods: Slab<Pod>,
    claims: HashMap<IpAddr, AddressClaims>,
    pub(crate) addresses: AddressTable,
    pub(crate) infos: Chunked<Option<Arc<PodInfo>>>,
    /// The generation of each pod.
    pub(crate) changed: Chunked<u64>,
    /// The generation of the next classifier.
    pub(crate) next_generation: u64,
    /// Pods in their node's network, by name: they own no address.
    pub(crate) host: HashMap<ObjectName, Arc<PodInfo>>,
    /// Since the last commit.
    pub(crate) host_changed: bool,
    /// The entry of each attachment, by the caller's key.
    attached: HashMap<Arc<str>, ObjectName>,
    /// The nodes of the mesh by name, each with its own addresses.
    pub(crate) nodes: HashMap<Arc<str>, Arc<[IpAddr]>>,
    networks: Arc<[IpNet]>,
    clusters: Clusters,
    /// Entries by [`PodEntry::elsewhere`]: they depend on whether the mesh has a node of that name.
    elsewhere: HashMap<Arc<str>, HashSet<ObjectName>>,
    misplaced: HashMap<ObjectName, Vec<Misplaced>>,
}

impl Pods {
    /// Sets a node of the mesh; `None` removes it.
    pub(crate) fn set_node(&mut self, name: Arc<str>, addresses: Option<Arc<[IpAddr]>>, selection: &mut Selection) {
        let before = match addresses {
            Some(addresses) => self.nodes.insert(Arc::clone(&name), addresses),
            None => self.nodes.remove(&name),
        };
        if before.is_some() != self.nodes.contains_key(&name) {
            for pod in self.elsewhere.get(&name).cloned().unwrap_or_default() {
                self.rejoin(&pod, selection);
            }
        }
    }

    /// Counts policies that name clusters: +1 or -1. Takes effect with [`Self::settle_clusters`].
    pub(crate) fn count_policy(&mut self, by: isize) {
        self.clusters.count_policy(by);
    }

    /// Sets the cluster of a node of the mesh. Takes effect with [`Self::settle_clusters`].
    pub(crate) fn set_cluster(&mut self, name: &Arc<str>, node: Option<ClusterNode>) {
        self.clusters.set(name, node);
    }

    /// The cluster of a node of the mesh.
    pub(crate) fn cluster_node(&self, name: &Arc<str>) -> Option<&ClusterNode> {
        self.clusters.of(name)
    }

    /// Joins the pods again that depend on changed nodes of clusters.
    pub(crate) fn settle_clusters(&mut self, selection: &mut Selection) {
        let Some(changed) = self.clusters.take_changed() else { return };
        let inside = |addresses: &[IpAddr]| addresses.iter().any(|ip| changed.subnets.get(*ip).is_some());
        let concerned = |(name, entry): &(&ObjectName, &PodEntry)| {
            let of_object = entry.object.as_ref().is_some_and(|(object, _)| {
                let node = object.node.as_ref().filter(|_| !name.cluster.is_flat());
                inside(&object.addresses)
                    || node.is_some_and(|node| changed.names.contains(&(name.cluster.clone(), Arc::clone(node))))
            });
            let mut attachments = entry.attachments.values().map(|(attachment, _)| attachment);
            of_object
                || (changed.strays && name.cluster.is_flat() && attachments.len() > 0)
                || attachments
                    .any(|attachment| inside(&attachment.addresses) || changed.nodes.contains(&attachment.node))
        };
        let entries = self.entries.iter().filter(concerned);
        for pod in entries.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.rejoin(&pod, selection);
        }
    }

    pub(crate) fn set_networks(&mut self, networks: Arc<[IpNet]>, selection: &mut Selection) {
        if self.networks == networks {
            return;
        }
        self.networks = networks;
        // The networks determine whether a pod's address or its nodeName gives its node.
        let placed = |name: &ObjectName, entry: &PodEntry| {
            entry.object.as_ref().is_some_and(|(object, _)| {
                let attached = object.node.is_some() && !entry.attachments.is_empty();
                attached || (object.host_network && !name.cluster.is_flat())
            })
        };
        let entries = self.entries.iter().filter(|(name, entry)| placed(name, entry));
        for pod in entries.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.rejoin(&pod, selection);
        }
    }

    /// Attachments that are not joined with their Pod object because of their node.
    pub(crate) fn misplaced(&self) -> impl Iterator<Item = &Misplaced> {
        self.misplaced.values().flatten()
    }

    /// Whether the node of an attachment permits to join it with this object: a node may only publish its own pods. A
    /// node chooses its name, but not its subnets, so addresses in the mesh count before the name.
    fn is_on_node_of(&self, attachment: &PodInterface, object: &PodObject) -> bool {
        let Some(node) = &object.node else { return true };
        let inside = |nets: &[IpNet]| object.addresses.iter().any(|ip| nets.iter().any(|net| net.contains(ip)));
        if inside(&self.networks) {
            return inside(&attachment.subnets);
        }
        let cluster = &attachment.pod.cluster;
        if !cluster.is_flat() {
            return self.clusters.node(cluster, node) == Some(&attachment.node);
        }
        // A cluster's names for its nodes may differ from the mesh's.
        *node == attachment.node || !self.nodes.contains_key(node)
    }

    pub(crate) fn set_object(&mut self, name: ObjectName, object: Option<(PodObject, Age)>, selection: &mut Selection) {
        self.entries.entry(name.clone()).or_default().object = object;
        self.rejoin(&name, selection);
    }

    pub(crate) fn set_attachment(
        &mut self,
        key: Arc<str>,
        attachment: Option<(PodInterface, Age)>,
        selection: &mut Selection,
    ) {
        if let Some(before) = self.attached.remove(&key) {
            if let Some(entry) = self.entries.get_mut(&before) {
                entry.attachments.remove(&key);
            }
            if attachment.as_ref().is_none_or(|(attachment, _)| attachment.pod != before) {
                self.rejoin(&before, selection);
            }
        }
        if let Some((attachment, age)) = attachment {
            let name = attachment.pod.clone();
            self.attached.insert(Arc::clone(&key), name.clone());
            self.entries.entry(name.clone()).or_default().attachments.insert(key, (attachment, age));
            self.rejoin(&name, selection);
        }
    }

    pub(crate) fn object(&self, name: &ObjectName) -> Option<&(PodObject, Age)> {
        self.entries.get(name)?.object.as_ref()
    }

    /// Whether a Pod object of this name exists that an attachment with this UID joins.
    pub(crate) fn has_object(&self, name: &ObjectName, uid: &str) -> bool {
        self.object(name)
            .is_some_and(|(object, _)| is_uid_of(Some(uid), object.uid.as_deref(), object.static_uid.as_deref()))
    }

    /// Pods of this name, including those with another UID than the object.
    pub(crate) fn named(&self, name: &ObjectName) -> impl Iterator<Item = &Arc<PodInfo>> {
        let pods = self.entries.get(name).map(|entry| entry.pods.as_slice()).unwrap_or_default();
        pods.iter().map(|pod| &self.pods[*pod].info).chain(self.host.get(name))
    }

    /// The addresses that a pod owns.
    pub(crate) fn owned(&self, pod: u32, each: &mut dyn FnMut(IpAddr)) {
        for (address, _) in self.pods.get(pod).into_iter().flat_map(|pod| &pod.claims) {
            if self.addresses.get(*address).is_some_and(|owner| owner.pod == pod) {
                each(*address);
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.pods.len()
    }

    /// Rebuilds the pods of a name.
    fn rejoin(&mut self, name: &ObjectName, selection: &mut Selection) {
        let Some((key, mut entry)) = self.entries.remove_entry(name) else { return };
        let old = std::mem::take(&mut entry.pods);
        self.note_elsewhere(name, &mut entry);
        let mut host = None;
        let mut joined: Vec<Joined> = Vec::new();
        if let Some((object, age)) = &entry.object {
            let info = self.info_of_object(name, object);
            if object.host_network {
                host = Some(Arc::new(info));
            } else {
                joined
                    .push(Joined { claims: claims_of_object(object, &info, *age), ..Joined::of_object(object, info) });
            }
        }
        // Newest first: of two attachments without UID, the newer one determines the labels.
        let mut attachments: Vec<&(PodInterface, Age)> = entry.attachments.values().collect();
        attachments.sort_by_key(|(_, age)| Reverse(*age));
        let mut misplaced = Vec::new();
        for (attachment, age) in attachments {
            let object = entry.object.as_ref().map(|(object, _)| object).filter(|object| !object.host_network);
            let of_its_uid = object.filter(|object| {
                is_uid_of(attachment.uid.as_deref(), object.uid.as_deref(), object.static_uid.as_deref())
            });
            let on_its_node = of_its_uid.filter(|object| self.is_on_node_of(attachment, object));
            if let (Some(PodObject { node: Some(node), .. }), None) = (of_its_uid, on_its_node) {
                let attached_at = Arc::clone(&attachment.node);
                misplaced.push(Misplaced { pod: name.clone(), node: Arc::clone(node), attached_at });
            }
            if self.clusters.is_stray(&name.cluster, attachment, on_its_node.is_some()) {
                continue;
            }
            self.attach(name, attachment, *age, on_its_node, &mut joined);
        }
        match misplaced.is_empty() {
            true => self.misplaced.remove(name),
            false => self.misplaced.insert(name.clone(), misplaced),
        };
        // Additions first: a common class or set survives.
        entry.pods = joined.into_iter().map(|pod| self.add(pod, selection)).collect();
        for pod in old {
            self.remove(pod, selection);
        }
        let host_before = match &host {
            Some(info) => self.host.insert(name.clone(), Arc::clone(info)),
            None => self.host.remove(name),
        };
        self.host_changed |= host_before != host;
        if entry.object.is_some() || !entry.attachments.is_empty() {
            self.entries.insert(key, entry);
        }
    }

    fn info_of_object(&self, name: &ObjectName, object: &PodObject) -> PodInfo {
        let node = object.node.as_ref();
        PodInfo {
            name: name.clone(),
            labels: Some(object.labels.clone()),
            ports: object.ports.as_slice().into(),
            node: if !name.cluster.is_flat() {
                node.and_then(|node| self.clusters.node(&name.cluster, node)).cloned()
            } else {
                node.cloned()
            },
            addresses: self.may_have(name, object).collect(),
            stamp: stamp(name, object.uid.as_deref()),
            uid: object.uid.clone(),
        }
    }

    /// Joins an attachment with its pod, or makes it a pod of its own. `object`: its Pod object, if that is on its
    /// node.
    fn attach(
        &self,
        name: &ObjectName,
        attachment: &PodInterface,
        age: Age,
        object: Option<&PodObject>,
        joined: &mut Vec<Joined>,
    ) {
        // Attachments on two nodes are never one pod: no policy judges a pod's packets to itself.
        let same = |pod: &Joined| {
            pod.is_object == object.is_some()
                && is_uid_of(attachment.uid.as_deref(), pod.uid.as_deref(), pod.static_uid.as_deref())
                && pod.attached_at.as_ref().is_none_or(|node| *node == attachment.node)
        };
        let at = joined.iter().position(same).unwrap_or_else(|| {
            joined.push(Joined::of_attachment(name, attachment, object));
            joined.len() - 1
        });
        let pod = &mut joined[at];
        pod.info.node = Some(Arc::clone(&attachment.node));
        pod.attached_at = Some(Arc::clone(&attachment.node));
        let may_have = |address: &&IpAddr| self.clusters.may_have(&name.cluster, **address);
        for address in attachment.addresses.iter().filter(may_have) {
            let rank = (age.stored, pod.living, true, age.created);
            match pod.claims.iter_mut().find(|(claimed, _)| claimed == address) {
                Some((_, own)) => *own = rank.max(*own),
                None => pod.claims.push((*address, rank)),
            }
        }
        pod.info.addresses = pod.claims.iter().map(|(address, _)| *address).collect();
    }

    /// The addresses of a Pod object that pods of its cluster may have. A pod in its node's network has the node's
    /// addresses, also outside the mesh's networks.
    fn may_have<'a>(&'a self, name: &'a ObjectName, object: &'a PodObject) -> impl Iterator<Item = IpAddr> {
        let outside = |address: &IpAddr| !self.networks.iter().any(|net| net.contains(address));
        let may_have = move |address: &IpAddr| {
            self.clusters.may_have(&name.cluster, *address) || (object.host_network && outside(address))
        };
        object.addresses.iter().copied().filter(may_have)
    }

    fn note_elsewhere(&mut self, name: &ObjectName, entry: &mut PodEntry) {
        let node = entry.object.as_ref().and_then(|(object, _)| object.node.as_ref());
        let elsewhere = |node: &&Arc<str>| entry.attachments.values().any(|(attachment, _)| attachment.node != **node);
        let now = node.filter(elsewhere).cloned();
        if now == entry.elsewhere {
            return;
        }
        if let Some(node) = &now {
            self.elsewhere.entry(Arc::clone(node)).or_default().insert(name.clone());
        }
        if let Some(before) = std::mem::replace(&mut entry.elsewhere, now)
            && let Some(names) = self.elsewhere.get_mut(&before)
        {
            names.remove(name);
            if names.is_empty() {
                self.elsewhere.remove(&before);
            }
        }
    }

    fn add(&mut self, joined: Joined, selection: &mut Selection) -> u32 {
        let namespace = selection.namespace(&joined.info.name.cluster, &joined.info.name.namespace);
        let class = selection.class(namespace, &joined.info.labels);
        let info = Arc::new(joined.info);
        let members = &mut selection.classes[class].pods;
        let pod = self.pods.insert(Pod {
            info: Arc::clone(&info),
            class,
            place: members.len(),
            claims: joined.claims.clone(),
        });
        members.push(pod);
        self.infos.set(pod, Some(info));
        self.changed.set(pod, self.next_generation);
        for (address, rank) in joined.claims {
            match self.claims.get_mut(&address) {
                None => {
                    self.claims.insert(address, AddressClaims::One(pod, rank));
                }
                Some(AddressClaims::Many(list)) => list.push((pod, rank)),
                Some(claims) => {
                    if let AddressClaims::One(other, its) = *claims {
                        *claims = AddressClaims::Many(vec![(other, its), (pod, rank)]);
                    }
                }
            }
            self.settle(address, selection);
        }
        pod
    }

    fn remove(&mut self, index: u32, selection: &mut Selection) {
        let Some(pod) = self.pods.remove(index) else { return };
        let members = &mut selection.classes[pod.class].pods;
        members.swap_remove(pod.place);
        if let Some(moved) = members.get(pod.place) {
            self.pods[*moved].place = pod.place;
        }
        self.infos.set(index, None);
        self.changed.set(index, self.next_generation);
        for (address, _) in &pod.claims {
            match self.claims.get_mut(address) {
                Some(AddressClaims::Many(list)) => {
                    list.retain(|(other, _)| *other != index);
                    if let [(last, rank)] = list[..] {
                        self.claims.insert(*address, AddressClaims::One(last, rank));
                    }
                }
                _ => {
                    self.claims.remove(address);
                }
            }
            self.settle(*address, selection);
        }
        selection.release_class(pod.class);
    }

    /// Gives an address to the pod with the best claim.
    fn settle(&mut self, address: IpAddr, selection: &mut Selection) {
        let best = match self.claims.get(&address) {
            None => None,
            Some(AddressClaims::One(pod, _)) => Some(*pod),
            Some(AddressClaims::Many(list)) => list.iter().max_by_key(|(_, rank)| *rank).map(|(pod, _)| *pod),
        };
        let owner = best.map(|pod| Owner { class: self.pods[pod].class, pod });
        let before = self.addresses.get(address);
        if before == owner {
            return;
        }
        for class in before.iter().chain(&owner).map(|owner| owner.class).collect::<HashSet<_>>() {
            selection.touch_addresses(class);
        }
        match owner {
            Some(owner) => self.addresses.insert(address, owner),
            None => self.addresses.remove(address),
        }
    }
}

fn stamp(name: &ObjectName, uid: Option<&str>) -> u32 {
    let mut hasher = DefaultHasher::new();
    (name, uid).hash(&mut hasher);
    (hasher.finish() as u32).max(1)
}

/// Whether an attachment may have the UID of a pod: an unknown UID matches any.
fn is_uid_of(attached: Option<&str>, pod: Option<&str>, static_uid: Option<&str>) -> bool {
    attached.is_none() || pod.is_none() || attached == pod || attached == static_uid
}

struct Joined {
    uid: Option<Arc<str>>,
    static_uid: Option<Arc<str>>,
    /// It has a Pod object, not only attachments.
    is_object: bool,
    living: bool,
    /// The node of its attachments, if it has any.
    attached_at: Option<Arc<str>>,
    info: PodInfo,
    claims: Vec<(IpAddr, Rank)>,
}

/// The distinct addresses of a Pod object; none if it is finished.
fn claims_of_object(object: &PodObject, info: &PodInfo, age: Age) -> Vec<(IpAddr, Rank)> {
    let mut claims: Vec<(IpAddr, Rank)> = Vec::new();
    for address in info.addresses.iter().filter(|_| !object.finished) {
        if claims.iter().all(|(claimed, _)| claimed != address) {
            claims.push((*address, (age.stored, true, false, age.created)));
        }
    }
    claims
}

impl Joined {
    /// The pod of an attachment that has none yet. `object`: its Pod object.
    fn of_attachment(name: &ObjectName, attachment: &PodInterface, object: Option<&PodObject>) -> Self {
        let uid = object.map_or(&attachment.uid, |object| &object.uid).clone();
        let info = PodInfo {
            name: name.clone(),
            labels: object.map_or_else(|| attachment.labels.clone(), |object| Some(object.labels.clone())),
            ports: object.map(|object| object.ports.as_slice().into()).unwrap_or_default(),
            node: None,
            addresses: Arc::default(),
            stamp: stamp(name, uid.as_deref()),
            uid: uid.clone(),
        };
        match object {
            Some(object) => Self::of_object(object, info),
            None => Self {
                uid,
                static_uid: None,
                is_object: false,
                living: true,
                attached_at: None,
                info,
                claims: Vec::new(),
            },
        }
    }

    fn of_object(object: &PodObject, info: PodInfo) -> Self {
        Self {
            uid: object.uid.clone(),
            static_uid: object.static_uid.clone(),
            is_object: true,
            living: !object.finished,
            attached_at: None,
            info,
            claims: Vec::new(),
        }
    }
}
