//! Set membership: namespaces, classes of pods, interned selectors, and the indexes that keep a change small.
//!
//! A *class* is all pods of one namespace with the same labels. A *group* is the namespaces that one selector matches.
//! A *set* is a group with a selector of pods, used as a policy's subject or as a peer. A set without pod labels has
//! *namespaces* as members, all others have classes, so a namespace with many pods is one entry. Membership is kept in
//! both directions.
//!
//! Namespaces of two clusters may have one name. Policies tell them apart by selectors alone: each namespace bears its
//! cluster and its name as labels, whatever is known of the others.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use etcd_schema::Cluster;

use super::{
    leading::{is_virtual, leading_labels, leading_of_namespaces},
    policy_name::PolicyId,
    storage::{Slab, add_mark, mark, marked, remove_mark},
};
use crate::object::{CLUSTER, Labels, NAMESPACE_NAME, Selector, Truth};

type Fixed = BuildHasherDefault<DefaultHasher>;

/// The set of all pods.
pub(crate) const ALL_PODS: u32 = 0;

/// Namespaces with no more classes than this are searched one by one.
const FEW: usize = 8;

/// Which pods a set holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct SetKey {
    /// Of which namespaces.
    group: u32,
    pods: Selector,
}

#[derive(Debug)]
pub(crate) struct SelectedPods {
    key: SetKey,
    uses: u32,
    /// Policies whose subject it is.
    pub(crate) subjects: Vec<PolicyId>,
    /// Marks of namespaces or, where the key asks for pods' labels, of classes.
    pub(crate) members: Vec<u32>,
}

impl SelectedPods {
    /// Whether it has namespaces as members.
    pub(crate) fn of_namespaces(&self) -> bool {
        self.key.pods.is_everything()
    }
}

/// The sets of one group.
#[derive(Debug, Default)]
struct Scoped {
    /// The set of all its pods.
    whole: Option<u32>,
    /// Sets with conditions on pods' labels.
    sets: Vec<u32>,
    /// Sets of them without a leading label.
    rest: Vec<u32>,
}

impl Scoped {
    const fn is_empty(&self) -> bool {
        self.whole.is_none() && self.sets.is_empty()
    }
}

#[derive(Debug)]
pub(crate) struct Namespace {
    /// Index of its cluster.
    cluster: u32,
    pub(crate) name: Arc<str>,
    /// `None`: there is no such object, its labels are not known.
    pub(crate) labels: Option<Labels>,
    pub(crate) classes: HashMap<Option<Labels>, u32, Fixed>,
    /// Marks of the groups whose selector matches.
    groups: Vec<u32>,
    /// Marks of the sets that all its pods are in.
    pub(crate) sets: Vec<u32>,
}

/// Namespaces by one selector.
#[derive(Debug)]
struct Group {
    selector: Selector,
    scoped: Scoped,
    /// Marks of namespaces.
    members: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct Class {
    pub(crate) namespace: u32,
    pub(crate) labels: Option<Labels>,
    pub(crate) pods: Vec<u32>,
    /// Marks of the sets that its labels put it in.
    pub(crate) sets: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct Selection {
    /// All that were ever named, the flat one first. There are few.
    clusters: Vec<Cluster>,
    pub(crate) namespaces: Slab<Namespace>,
    /// By cluster and name.
    by_name: HashMap<(u32, Arc<str>), u32, Fixed>,
    pub(crate) classes: Slab<Class>,
    pub(crate) sets: Slab<SelectedPods>,
    by_key: HashMap<SetKey, u32, Fixed>,
    groups: Slab<Group>,
    group_by_selector: HashMap<Selector, u32, Fixed>,
    /// Sets that a label leads to, by hash of group and label.
    sets_by_label: HashMap<u64, Vec<u32>, Fixed>,
    /// Groups that a label leads to, by hash of the label.
    groups_by_label: HashMap<u64, Vec<u32>, Fixed>,
    /// Groups whose leading label only a Namespace object has.
    groups_by_object: Vec<u32>,
    /// Groups without a leading label.
    groups_rest: Vec<u32>,
    /// Classes that have a label, by hash of namespace and label.
    classes_by_label: HashMap<u64, Vec<u32>, Fixed>,
    /// Namespaces and classes whose sets, or the policies of these, changed.
    pub(crate) dirty_namespaces: HashSet<u32, Fixed>,
    pub(crate) dirty_classes: HashSet<u32, Fixed>,
    /// Sets whose members changed.
    pub(crate) dirty_sets: HashSet<u32, Fixed>,
}

impl Selection {
    pub(crate) fn new() -> Self {
        let mut selection = Self {
            clusters: vec![Cluster::default()],
            namespaces: Slab::default(),
            by_name: HashMap::default(),
            classes: Slab::default(),
            sets: Slab::default(),
            by_key: HashMap::default(),
            groups: Slab::default(),
            group_by_selector: HashMap::default(),
            sets_by_label: HashMap::default(),
            groups_by_label: HashMap::default(),
            groups_by_object: Vec::new(),
            groups_rest: Vec::new(),
            classes_by_label: HashMap::default(),
            dirty_namespaces: HashSet::default(),
            dirty_classes: HashSet::default(),
            dirty_sets: HashSet::default(),
        };
        let all = selection.acquire_set(&Selector::default(), Selector::default());
        debug_assert_eq!(all, ALL_PODS);
        selection
    }

    /// The index of a cluster, which is kept.
    fn cluster(&mut self, cluster: &Cluster) -> u32 {
        let known = self.clusters.iter().position(|known| known == cluster);
        known.unwrap_or_else(|| {
            self.clusters.push(cluster.clone());
            self.clusters.len() - 1
        }) as u32
    }

    /// The namespace `name` of `cluster`, made if there is none. [`Self::release_namespace`] takes it away again.
    pub(crate) fn namespace(&mut self, cluster: &Cluster, name: &Arc<str>) -> u32 {
        let cluster = self.cluster(cluster);
        if let Some(index) = self.by_name.get(&(cluster, Arc::clone(name))) {
            return *index;
        }
        let index = self.namespaces.insert(Namespace {
            cluster,
            name: Arc::clone(name),
            labels: None,
            classes: HashMap::default(),
            groups: Vec::new(),
            sets: Vec::new(),
        });
        self.by_name.insert((cluster, Arc::clone(name)), index);
        self.regroup(index);
        index
    }

    /// `None`: the object is gone.
    pub(crate) fn set_namespace_labels(&mut self, cluster: &Cluster, name: &Arc<str>, labels: Option<Labels>) {
        let index = self.namespace(cluster, name);
        if self.namespaces[index].labels != labels {
            self.namespaces[index].labels = labels;
            self.regroup(index);
        }
        self.release_namespace(index);
    }

    /// Forgets the namespace if nothing is known of it.
    pub(crate) fn release_namespace(&mut self, index: u32) {
        let namespace = &self.namespaces[index];
        if namespace.labels.is_some() || !namespace.classes.is_empty() {
            return;
        }
        for group in namespace.groups.clone() {
            remove_mark(&mut self.groups[group >> 1].members, index);
        }
        for set in self.namespaces[index].sets.clone() {
            remove_mark(&mut self.sets[set >> 1].members, index);
            self.dirty_sets.insert(set >> 1);
        }
        if let Some(namespace) = self.namespaces.remove(index) {
            self.by_name.remove(&(namespace.cluster, namespace.name));
        }
        self.dirty_namespaces.insert(index);
    }

    /// The class of the pods of a namespace that have these labels; `None`: labels that are not known.
    pub(crate) fn class(&mut self, namespace: u32, labels: &Option<Labels>) -> u32 {
        if let Some(index) = self.namespaces[namespace].classes.get(labels) {
            return *index;
        }
        let index =
            self.classes.insert(Class { namespace, labels: labels.clone(), pods: Vec::new(), sets: Vec::new() });
        self.namespaces[namespace].classes.insert(labels.clone(), index);
        for (key, value) in labels.iter().flat_map(Labels::iter) {
            self.classes_by_label.entry(hash((namespace, key, value))).or_default().push(index);
        }
        self.classify(index);
        self.dirty_classes.insert(index);
        index
    }

    /// Forgets the class if it has no pods.
    pub(crate) fn release_class(&mut self, index: u32) {
        if !self.classes[index].pods.is_empty() {
            return;
        }
        self.move_class(index, Vec::new());
        let Some(class) = self.classes.remove(index) else { return };
        self.namespaces[class.namespace].classes.remove(&class.labels);
        for (key, value) in class.labels.iter().flat_map(Labels::iter) {
            take_from(&mut self.classes_by_label, hash((class.namespace, key, value)), index);
        }
        self.dirty_classes.insert(index);
        self.release_namespace(class.namespace);
    }

    /// The set of the pods that `pods` matches in the namespaces that `namespaces` matches, used once more.
    /// [`Self::release_set`] is the other half.
    pub(crate) fn acquire_set(&mut self, namespaces: &Selector, pods: Selector) -> u32 {
        let key = SetKey { group: self.group(namespaces), pods };
        if let Some(index) = self.by_key.get(&key) {
            self.sets[*index].uses += 1;
            return *index;
        }
        let index =
            self.sets.insert(SelectedPods { key: key.clone(), uses: 1, subjects: Vec::new(), members: Vec::new() });
        let labels = leading_labels(&key.pods);
        for (name, value) in labels.iter().flatten() {
            self.sets_by_label.entry(hash((key.group, *name, *value))).or_default().push(index);
        }
        let scoped = &mut self.groups[key.group].scoped;
        if key.pods.is_everything() {
            scoped.whole = Some(index);
        } else {
            scoped.sets.push(index);
            if labels.is_none() {
                scoped.rest.push(index);
            }
        }
        self.fill(index);
        self.by_key.insert(key, index);
        index
    }

    pub(crate) fn release_set(&mut self, index: u32) {
        let set = &mut self.sets[index];
        set.uses -= 1;
        if set.uses > 0 {
            return;
        }
        let Some(set) = self.sets.remove(index) else { return };
        self.by_key.remove(&set.key);
        self.dirty_sets.insert(index);
        for member in &set.members {
            if set.of_namespaces() {
                remove_mark(&mut self.namespaces[member >> 1].sets, index);
                self.dirty_namespaces.insert(member >> 1);
            } else {
                remove_mark(&mut self.classes[member >> 1].sets, index);
                self.dirty_classes.insert(member >> 1);
            }
        }
        for (name, value) in leading_labels(&set.key.pods).iter().flatten() {
            take_from(&mut self.sets_by_label, hash((set.key.group, *name, *value)), index);
        }
        let scoped = &mut self.groups[set.key.group].scoped;
        if scoped.whole == Some(index) {
            scoped.whole = None;
        }
        scoped.sets.retain(|other| *other != index);
        scoped.rest.retain(|other| *other != index);
        self.release_group(set.key.group);
    }

    /// Whether the clusters of pods decide who is in a set, as they do in each of a cluster's policies.
    pub(crate) fn names_clusters(&self, set: u32) -> bool {
        self.sets.get(set).is_some_and(|set| self.groups[set.key.group].selector.names_clusters())
    }

    /// Hashes the meaning of a set, independent of its number and members.
    pub(crate) fn hash_set(&self, index: u32, hasher: &mut impl Hasher) {
        let set = self.sets.get(index);
        set.map(|set| (&self.groups[set.key.group].selector, &set.key.pods)).hash(hasher);
    }

    /// Everything whose rules change with those of the policies that have this subject.
    pub(crate) fn touch_subject(&mut self, set: u32, and_classes: bool) {
        let set = &self.sets[set];
        for member in &set.members {
            let (index, _) = marked(*member);
            if set.of_namespaces() {
                self.dirty_namespaces.insert(index);
                if and_classes {
                    self.dirty_classes.extend(self.namespaces[index].classes.values());
                }
            } else {
                self.dirty_classes.insert(index);
            }
        }
    }

    /// Notes that an address came to a pod of this class, or left one.
    pub(crate) fn touch_addresses(&mut self, class: u32) {
        let Some(class) = self.classes.get(class) else { return };
        let namespace = &self.namespaces[class.namespace];
        self.dirty_sets.extend(class.sets.iter().chain(&namespace.sets).map(|set| set >> 1));
    }

    /// Finds the groups that a namespace is in, and all that follows from it.
    fn regroup(&mut self, index: u32) {
        let namespace = &self.namespaces[index];
        let cluster = self.clusters[namespace.cluster as usize].as_str();
        let own = [(NAMESPACE_NAME, &*namespace.name), (CLUSTER, cluster)];
        let mut candidates = self.groups_rest.clone();
        let mut add = |label| candidates.extend(self.groups_by_label.get(&hash(label)).into_iter().flatten());
        own.into_iter().for_each(&mut add);
        match &namespace.labels {
            Some(labels) => {
                let others = labels.iter().filter(|(key, _)| own.iter().all(|(known, _)| key != known));
                others.for_each(&mut add);
            }
            None => candidates.extend(&self.groups_by_object),
        }
        candidates.sort_unstable();
        candidates.dedup();
        let mut groups = Vec::new();
        for group in candidates {
            match self.matches(&self.groups[group].selector, namespace) {
                Truth::No => {}
                truth => groups.push(mark(group, truth == Truth::Unknown)),
            }
        }
        groups.sort_unstable();
        let old = std::mem::replace(&mut self.namespaces[index].groups, groups.clone());
        for group in &old {
            remove_mark(&mut self.groups[group >> 1].members, index);
        }
        for group in &groups {
            add_mark(&mut self.groups[group >> 1].members, mark(index, group & 1 != 0));
        }
        self.refill_namespace(index);
        let classes: Vec<u32> = self.namespaces[index].classes.values().copied().collect();
        for class in classes {
            self.classify(class);
        }
    }

    /// Finds the sets that all pods of a namespace are in.
    fn refill_namespace(&mut self, index: u32) {
        let namespace = &self.namespaces[index];
        let mut sets = Vec::new();
        for group in &namespace.groups {
            let (group, unknown) = marked(*group);
            sets.extend(self.groups[group].scoped.whole.map(|set| mark(set, unknown)));
        }
        sets.sort_unstable();
        let old = std::mem::replace(&mut self.namespaces[index].sets, sets.clone());
        if old == sets {
            return;
        }
        for set in &old {
            remove_mark(&mut self.sets[set >> 1].members, index);
        }
        for set in &sets {
            add_mark(&mut self.sets[set >> 1].members, mark(index, set & 1 != 0));
        }
        self.dirty_sets.extend(old.iter().chain(&sets).map(|set| set >> 1));
        self.dirty_namespaces.insert(index);
        // ClusterNetworkPolicies are compiled for classes, whatever their subject.
        self.dirty_classes.extend(self.namespaces[index].classes.values());
    }

    /// Finds the sets that a class is in.
    fn classify(&mut self, index: u32) {
        let class = &self.classes[index];
        let namespace = &self.namespaces[class.namespace];
        let mut sets = Vec::new();
        let take = |candidates: &[u32], surely: Truth, sets: &mut Vec<u32>| {
            for set in candidates {
                match surely.and(self.sets[*set].key.pods.matches(class.labels.as_ref())) {
                    Truth::No => {}
                    truth => sets.push(mark(*set, truth == Truth::Unknown)),
                }
            }
        };
        for group in &namespace.groups {
            let (group, unknown) = marked(*group);
            let (scoped, surely) = (&self.groups[group].scoped, if unknown { Truth::Unknown } else { Truth::Yes });
            match &class.labels {
                Some(labels) if scoped.sets.len() > FEW => {
                    take(&scoped.rest, surely, &mut sets);
                    for (key, value) in labels.iter() {
                        if let Some(found) = self.sets_by_label.get(&hash((group, key, value))) {
                            take(found, surely, &mut sets);
                        }
                    }
                }
                _ => take(&scoped.sets, surely, &mut sets),
            }
        }
        sets.sort_unstable();
        sets.dedup();
        self.move_class(index, sets);
    }

    /// Makes these the sets of a class.
    fn move_class(&mut self, index: u32, sets: Vec<u32>) {
        let old = std::mem::replace(&mut self.classes[index].sets, sets.clone());
        if old == sets {
            return;
        }
        for set in old.iter().filter(|set| sets.binary_search(set).is_err()) {
            remove_mark(&mut self.sets[set >> 1].members, index);
            self.dirty_sets.insert(set >> 1);
        }
        for set in sets.iter().filter(|set| old.binary_search(set).is_err()) {
            add_mark(&mut self.sets[set >> 1].members, mark(index, set & 1 != 0));
            self.dirty_sets.insert(set >> 1);
        }
        self.dirty_classes.insert(index);
    }

    /// Finds the members of a new set.
    fn fill(&mut self, index: u32) {
        let set = &self.sets[index];
        let namespaces = self.groups[set.key.group].members.clone();
        if set.of_namespaces() {
            for namespace in &namespaces {
                let (namespace, unknown) = marked(*namespace);
                add_mark(&mut self.namespaces[namespace].sets, mark(index, unknown));
                self.dirty_namespaces.insert(namespace);
            }
            self.sets[index].members = namespaces;
            return;
        }
        let labels = leading_labels(&set.key.pods);
        let mut members = Vec::new();
        for namespace in namespaces {
            let (namespace, unknown) = marked(namespace);
            let surely = if unknown { Truth::Unknown } else { Truth::Yes };
            let mut take = |class: u32| match surely.and(set.key.pods.matches(self.classes[class].labels.as_ref())) {
                Truth::No => {}
                truth => members.push(mark(class, truth == Truth::Unknown)),
            };
            let classes = &self.namespaces[namespace].classes;
            match &labels {
                Some(labels) if classes.len() > FEW => {
                    for (key, value) in labels {
                        let found = self.classes_by_label.get(&hash((namespace, *key, *value)));
                        found.into_iter().flatten().copied().for_each(&mut take);
                    }
                    classes.get(&None).copied().into_iter().for_each(&mut take);
                }
                _ => classes.values().copied().for_each(&mut take),
            }
        }
        members.sort_unstable();
        members.dedup();
        for member in &members {
            let (class, unknown) = marked(*member);
            add_mark(&mut self.classes[class].sets, mark(index, unknown));
            self.dirty_classes.insert(class);
        }
        self.sets[index].members = members;
    }

    /// Whether a selector matches a namespace: its name and its cluster are known even where its labels are not.
    fn matches(&self, selector: &Selector, namespace: &Namespace) -> Truth {
        let cluster = self.clusters[namespace.cluster as usize].as_str();
        selector.matches_namespace(cluster, &namespace.name, namespace.labels.as_ref())
    }

    fn group(&mut self, selector: &Selector) -> u32 {
        if let Some(group) = self.group_by_selector.get(selector) {
            return *group;
        }
        let lead = leading_of_namespaces(selector);
        let mut members = Vec::new();
        let mut add = |index: u32, namespace| match self.matches(selector, namespace) {
            Truth::No => {}
            truth => members.push(mark(index, truth == Truth::Unknown)),
        };
        match &lead {
            Some(labels) if labels.iter().all(|(key, _)| *key == NAMESPACE_NAME) => {
                let clusters = 0..self.clusters.len() as u32;
                for named in clusters.flat_map(|at| labels.iter().map(move |(_, name)| (at, Arc::from(*name)))) {
                    self.by_name.get(&named).into_iter().for_each(|index| add(*index, &self.namespaces[*index]));
                }
                members.sort_unstable();
            }
            _ => self.namespaces.iter().for_each(|(index, namespace)| add(index, namespace)),
        }
        let group = self.groups.insert(Group {
            selector: selector.clone(),
            scoped: Scoped::default(),
            members: members.clone(),
        });
        for member in members {
            let (namespace, unknown) = marked(member);
            add_mark(&mut self.namespaces[namespace].groups, mark(group, unknown));
        }
        match lead {
            Some(labels) => {
                if !labels.iter().all(|(key, _)| is_virtual(key)) {
                    self.groups_by_object.push(group);
                }
                for label in labels {
                    self.groups_by_label.entry(hash(label)).or_default().push(group);
                }
            }
            None => self.groups_rest.push(group),
        }
        self.group_by_selector.insert(selector.clone(), group);
        group
    }

    fn release_group(&mut self, index: u32) {
        if !self.groups[index].scoped.is_empty() {
            return;
        }
        let Some(group) = self.groups.remove(index) else { return };
        for member in &group.members {
            remove_mark(&mut self.namespaces[member >> 1].groups, index);
        }
        match leading_of_namespaces(&group.selector) {
            Some(labels) => {
                if !labels.iter().all(|(key, _)| is_virtual(key)) {
                    self.groups_by_object.retain(|other| *other != index);
                }
                for label in labels {
                    take_from(&mut self.groups_by_label, hash(label), index);
                }
            }
            None => self.groups_rest.retain(|other| *other != index),
        }
        self.group_by_selector.remove(&group.selector);
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn take_from(index: &mut HashMap<u64, Vec<u32>, Fixed>, key: u64, value: u32) {
    if let Some(list) = index.get_mut(&key) {
        if let Some(at) = list.iter().position(|other| *other == value) {
            list.swap_remove(at);
        }
        if list.is_empty() {
            index.remove(&key);
        }
    }
}
