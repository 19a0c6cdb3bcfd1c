//! Pods as they are: objects and attachments joined, and who owns which address.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use super::{
    input::{Attachment, ObjectName},
    selection::Selection,
    storage::{AddressTable, Chunked, Owner, Slab},
};
use crate::object::{Labels, NamedPort, PodObject};

/// A pod, or what is left of one, in a classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    /// Its namespace and name.
    pub name: ObjectName,
    /// Its labels, where they are known.
    pub labels: Option<Labels>,
    /// Named ports of its containers.
    pub ports: Arc<[NamedPort]>,
    /// The node that it is on, where that is known.
    pub node: Option<Arc<str>>,
    /// Its uid, where that is known.
    pub uid: Option<Arc<str>>,
    /// Of its name and uid; never 0.
    pub(crate) stamp: u32,
    /// Addresses it claims; each is its own unless a newer pod claims it too.
    pub addresses: Arc<[IpAddr]>,
}

#[derive(Debug, Default)]
struct Entry {
    object: Option<(PodObject, u64)>,
    /// By what the caller calls them.
    attachments: BTreeMap<Arc<str>, (Attachment, u64)>,
    /// What was made of these.
    pods: Vec<u32>,
}

#[derive(Debug)]
struct Pod {
    info: Arc<PodInfo>,
    class: u32,
    /// Its place among the pods of its class.
    place: usize,
    claims: Vec<(IpAddr, Rank)>,
}

/// Of several pods that claim one address, the one with the highest rank has it: living ones before ended ones, attached
/// ones before others, then the newest.
type Rank = (bool, bool, u64);

#[derive(Debug)]
enum Claims {
    One(u32, Rank),
    Many(Vec<(u32, Rank)>),
}

#[derive(Debug, Default)]
pub(crate) struct Pods {
    entries: HashMap<ObjectName, Entry>,
    pods: Slab<Pod>,
    claims: HashMap<IpAddr, Claims>,
    pub(crate) addresses: AddressTable,
    pub(crate) infos: Chunked<Option<Arc<PodInfo>>>,
    /// Pods in their node's network, by name: they own no address.
    pub(crate) host: HashMap<ObjectName, Arc<PodInfo>>,
    /// Since the last commit.
    pub(crate) host_changed: bool,
    /// Where an attachment stands, by what the caller calls it.
    attached: HashMap<Arc<str>, ObjectName>,
}

impl Pods {
    pub(crate) fn set_object(&mut self, name: ObjectName, object: Option<(PodObject, u64)>, selection: &mut Selection) {
        self.entries.entry(name.clone()).or_default().object = object;
        self.rejoin(&name, selection);
    }

    pub(crate) fn set_attachment(
        &mut self,
        key: Arc<str>,
        attachment: Option<(Attachment, u64)>,
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

    pub(crate) fn object(&self, name: &ObjectName) -> Option<&(PodObject, u64)> {
        self.entries.get(name)?.object.as_ref()
    }

    /// Pods of this name, with those whose uid is not the object's.
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

    /// Makes the pods of a name anew.
    fn rejoin(&mut self, name: &ObjectName, selection: &mut Selection) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let old = std::mem::take(&mut entry.pods);
        let mut host = None;
        let mut joined: Vec<Joined> = Vec::new();
        if let Some((object, age)) = &entry.object {
            let info = PodInfo {
                name: name.clone(),
                labels: Some(object.labels.clone()),
                ports: object.ports.as_slice().into(),
                node: object.node.clone(),
                addresses: object.addresses.as_slice().into(),
                stamp: stamp(name, object.uid.as_deref()),
                uid: object.uid.clone(),
            };
            if object.host_network {
                host = Some(Arc::new(info));
            } else {
                let mut claims: Vec<(IpAddr, Rank)> = Vec::new();
                for address in object.addresses.iter().filter(|_| !object.finished) {
                    // An address that is listed twice is claimed once.
                    if claims.iter().all(|(claimed, _)| claimed != address) {
                        claims.push((*address, (true, false, *age)));
                    }
                }
                joined.push(Joined { uid: object.uid.clone(), living: !object.finished, info, claims });
            }
        }
        // Newest first: of two attachments without uid the newer one says which labels count.
        let mut attachments: Vec<&(Attachment, u64)> = entry.attachments.values().collect();
        attachments.sort_by_key(|(_, age)| Reverse(*age));
        for (attachment, age) in attachments {
            let same = |pod: &Joined| match (&pod.uid, &attachment.uid) {
                (Some(pod), Some(attached)) => pod == attached,
                _ => true,
            };
            let at = joined.iter().position(same).unwrap_or_else(|| {
                joined.push(Joined {
                    uid: attachment.uid.clone(),
                    living: true,
                    info: PodInfo {
                        name: name.clone(),
                        labels: attachment.labels.clone(),
                        ports: Arc::default(),
                        node: Some(Arc::clone(&attachment.node)),
                        addresses: Arc::default(),
                        stamp: stamp(name, attachment.uid.as_deref()),
                        uid: attachment.uid.clone(),
                    },
                    claims: Vec::new(),
                });
                joined.len() - 1
            });
            let pod = &mut joined[at];
            pod.info.node = Some(Arc::clone(&attachment.node));
            for address in &attachment.addresses {
                let rank = (pod.living, true, *age);
                match pod.claims.iter_mut().find(|(claimed, _)| claimed == address) {
                    Some((_, own)) => *own = rank.max(*own),
                    None => pod.claims.push((*address, rank)),
                }
            }
            pod.info.addresses = pod.claims.iter().map(|(address, _)| *address).collect();
        }
        let gone = entry.object.is_none() && entry.attachments.is_empty();
        // The new ones first: what both have keeps its class and sets.
        let new: Vec<u32> = joined.into_iter().map(|pod| self.add(pod, selection)).collect();
        for pod in old {
            self.remove(pod, selection);
        }
        let host_before = match &host {
            Some(info) => self.host.insert(name.clone(), Arc::clone(info)),
            None => self.host.remove(name),
        };
        self.host_changed |= host_before != host;
        if gone {
            self.entries.remove(name);
        } else if let Some(entry) = self.entries.get_mut(name) {
            entry.pods = new;
        }
    }

    fn add(&mut self, joined: Joined, selection: &mut Selection) -> u32 {
        let namespace = selection.namespace(&joined.info.name.namespace);
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
        for (address, rank) in joined.claims {
            match self.claims.get_mut(&address) {
                None => {
                    self.claims.insert(address, Claims::One(pod, rank));
                }
                Some(Claims::Many(list)) => list.push((pod, rank)),
                Some(claims) => {
                    if let Claims::One(other, its) = *claims {
                        *claims = Claims::Many(vec![(other, its), (pod, rank)]);
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
        for (address, _) in &pod.claims {
            match self.claims.get_mut(address) {
                Some(Claims::Many(list)) => {
                    list.retain(|(other, _)| *other != index);
                    if let [(last, rank)] = list[..] {
                        self.claims.insert(*address, Claims::One(last, rank));
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

    /// Gives an address to whoever has the best claim.
    fn settle(&mut self, address: IpAddr, selection: &mut Selection) {
        let best = match self.claims.get(&address) {
            None => None,
            Some(Claims::One(pod, _)) => Some(*pod),
            Some(Claims::Many(list)) => list.iter().max_by_key(|(_, rank)| *rank).map(|(pod, _)| *pod),
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

struct Joined {
    uid: Option<Arc<str>>,
    living: bool,
    info: PodInfo,
    claims: Vec<(IpAddr, Rank)>,
}
