//! Objects → classifier, incrementally.
//!
//! [`Engine`] takes objects in any order and keeps indexes. [`Engine::commit`] compiles all changes since the last
//! commit and returns a [`Classifier`], an immutable snapshot that shares unchanged parts with its predecessor.

mod classifier;
mod clusters;
mod compiled;
mod explain;
mod input;
mod leading;
mod named_ports;
pub(crate) mod nodes;
mod pods;
mod policy_name;
pub(crate) mod rules;
pub(crate) mod selection;
pub(crate) mod set_cache;
mod sources;
pub(crate) mod storage;

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Weak},
};

use etcd_schema::Cluster;
use ipnet::IpNet;

use crate::object::{Action, ClusterPolicy, ClusterRule, Labels, PodObject, Rule, Selector, Tier};
pub(crate) use compiled::{ClassRules, Compiled, CompiledRule, NamespaceRules};
use compiled::{compile, compile_cluster, own_namespace};
use nodes::NodeSets;
use pods::Pods;
use rules::{PeerRules, RuleEntry, Tiers, Union};
use selection::Selection;
use set_cache::SetCache;
use storage::{Chunked, Slab, marked};

pub use classifier::{Cause, Classifier, Connection, End, Flow, Side, Verdict};
pub use explain::{Explanation, NearMiss, SourceNode};
pub use input::{Age, ClusterNode, ClusterPolicyState, Misplaced, ObjectName, PodInterface, PolicyState};
pub use pods::PodInfo;
pub use policy_name::{PolicyId, PolicyKind, PolicyName};
pub use sources::SourceAliases;

/// Policies by version, with whether each only may select: the key by which compiled forms are shared.
type Selected = Box<[u32]>;

/// Objects that policies depend on, and their compiled form.
#[derive(Debug)]
pub struct Engine {
    pub(crate) selection: Selection,
    pub(crate) pods: Pods,
    pub(crate) nodes: NodeSets,
    pub(crate) policies: Slab<Arc<Compiled>>,
    by_name: HashMap<ObjectName, u32>,
    cluster_by_name: HashMap<ObjectName, u32>,
    pub(crate) networks: Arc<[IpNet]>,
    node_addresses: Option<Arc<HashMap<IpAddr, Arc<str>>>>,
    /// By overlay address.
    pub(crate) sources: Arc<HashMap<IpAddr, Arc<SourceAliases>>>,
    versions: u32,
    generation: u64,
    /// The generation in which networks, nodes, sources or the presence of policies in a direction last changed.
    world_changed: u64,
    /// Whether there were policies in each direction at the last commit.
    had_policies: [bool; 2],
    pub(crate) set_cache: SetCache,
    unions: [HashMap<Selected, Weak<Union>>; 2],
    tiers: [HashMap<Selected, Weak<Tiers>>; 2],
    namespace_rules: Chunked<NamespaceRules>,
    class_rules: Chunked<ClassRules>,
    published: Chunked<Option<Arc<Compiled>>>,
    /// Number of policies that apply to each [`Side`].
    pub(crate) policies_per_direction: [usize; 2],
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// An engine without pods and policies: it allows everything.
    #[must_use]
    pub fn new() -> Self {
        Self {
            selection: Selection::new(),
            pods: Pods::default(),
            nodes: NodeSets::default(),
            policies: Slab::default(),
            by_name: HashMap::new(),
            cluster_by_name: HashMap::new(),
            networks: Arc::default(),
            node_addresses: None,
            sources: Arc::default(),
            versions: 0,
            generation: 0,
            world_changed: 0,
            had_policies: [false; 2],
            set_cache: SetCache::default(),
            unions: Default::default(),
            tiers: Default::default(),
            namespace_rules: Chunked::default(),
            class_rules: Chunked::default(),
            published: Chunked::default(),
            policies_per_direction: [0; 2],
        }
    }

    /// Sets the labels of the Namespace object `name` of `cluster`; `kubernetes.io/metadata.name` is implied.
    pub fn put_namespace(&mut self, cluster: &Cluster, name: &Arc<str>, labels: Labels) {
        self.selection.set_namespace_labels(cluster, name, Some(labels));
    }

    /// Removes a Namespace object: only its name and cluster remain known as labels.
    pub fn delete_namespace(&mut self, cluster: &Cluster, name: &Arc<str>) {
        self.selection.set_namespace_labels(cluster, name, None);
    }

    /// Sets the Pod object `name`. If several running pods claim an address, the one with the highest `age` owns it.
    pub fn put_pod(&mut self, name: ObjectName, pod: PodObject, age: impl Into<Age>) {
        self.pods.set_object(name, Some((pod, age.into())), &mut self.selection);
    }

    /// Replaces the labels of the Pod object of this name, if there is one.
    pub(crate) fn relabel_pod(&mut self, name: &ObjectName, labels: Labels) {
        if let Some((mut pod, age)) = self.pods.object(name).cloned() {
            pod.labels = labels;
            self.put_pod(name.clone(), pod, age);
        }
    }

    /// Whether a Pod object `name` exists that an attachment with this UID joins.
    #[must_use]
    pub fn has_pod(&self, name: &ObjectName, uid: &str) -> bool {
        self.pods.has_object(name, uid)
    }

    /// Removes a Pod object.
    pub fn delete_pod(&mut self, name: &ObjectName) {
        self.pods.set_object(name.clone(), None, &mut self.selection);
    }

    /// Sets an attachment, identified by `key`.
    pub fn put_attachment(&mut self, key: Arc<str>, attachment: PodInterface, age: impl Into<Age>) {
        self.pods.set_attachment(key, Some((attachment, age.into())), &mut self.selection);
    }

    /// Attachments that are not joined with their Pod object because another node published them.
    pub fn misplaced(&self) -> impl Iterator<Item = &Misplaced> {
        self.pods.misplaced()
    }

    /// Removes an attachment.
    pub fn delete_attachment(&mut self, key: &Arc<str>) {
        self.pods.set_attachment(Arc::clone(key), None, &mut self.selection);
    }

    /// Sets a node's own addresses, overlay and underlay. They are not pods, and the node's own pods accept them.
    pub fn put_node(&mut self, name: Arc<str>, addresses: Arc<[IpAddr]>) {
        self.pods.set_node(name, Some(addresses), &mut self.selection);
        self.nodes_changed();
    }

    /// Removes a node.
    pub fn delete_node(&mut self, name: &str) {
        self.pods.set_node(name.into(), None, &mut self.selection);
        self.nodes_changed();
    }

    /// Sets the cluster of the mesh's node `name`; `None`: it has none. Pods of a cluster have addresses in subnets of
    /// the cluster's nodes only.
    pub fn set_cluster(&mut self, name: &Arc<str>, node: Option<ClusterNode>) {
        self.pods.set_cluster(name, node);
        self.nodes.touch();
    }

    /// Sets the Node object `name`, which `nodes` peers select by its labels. [`Self::set_cluster`] maps it to a node
    /// of the mesh; without a cluster it is the node of the same name.
    pub fn put_node_object(&mut self, name: ObjectName, labels: &Labels, internal_ips: Box<[IpAddr]>) {
        self.nodes.set_object(name, Some((labels, internal_ips)));
    }

    /// Removes a Node object.
    pub fn delete_node_object(&mut self, name: ObjectName) {
        self.nodes.set_object(name, None);
    }

    /// Sets the addresses that another node's overlay address also counts as in ingress rules; empty: only itself.
    pub fn set_source(&mut self, overlay: IpAddr, aliases: Arc<SourceAliases>) {
        let aliases = Some(aliases).filter(|aliases| !aliases.is_empty());
        if self.sources.get(&overlay) == aliases.as_ref() {
            return;
        }
        let sources = Arc::make_mut(&mut self.sources);
        match aliases {
            Some(aliases) => sources.insert(overlay, aliases),
            None => sources.remove(&overlay),
        };
        self.set_cache.sources = true;
        self.world_changed = self.generation + 1;
    }

    /// Sets the mesh's networks: an address in them that belongs to no known pod and no node is an unknown pod.
    pub fn set_networks(&mut self, networks: Arc<[IpNet]>) {
        self.networks = Arc::clone(&networks);
        self.pods.set_networks(networks, &mut self.selection);
        self.nodes.touch();
        self.set_cache.everything = true;
        self.world_changed = self.generation + 1;
    }

    /// Sets a NetworkPolicy.
    pub fn put_policy(&mut self, name: ObjectName, state: &PolicyState) {
        let deny = |on: bool| on.then(Vec::new);
        let (subject, ingress, egress) = match state {
            PolicyState::Valid(policy) => {
                let side = |rules: &Option<Vec<Rule>>, selection: &mut Selection| {
                    rules.as_ref().map(|rules| rules.iter().map(|rule| compile(rule, &name, selection)).collect())
                };
                let ingress = side(&policy.ingress, &mut self.selection);
                let egress = side(&policy.egress, &mut self.selection);
                (policy.subject.clone(), ingress, egress)
            }
            PolicyState::Isolates(subject, directions) => {
                (subject.clone(), deny(directions.ingress), deny(directions.egress))
            }
            PolicyState::IsolatesNamespace => (Selector::default(), deny(true), deny(true)),
        };
        let kind = PolicyKind::NetworkPolicy;
        let subject = self.selection.acquire_set(&own_namespace(&name), subject);
        let id = self.add(PolicyName { kind, name: name.clone() }, (None, 0), subject, [ingress, egress]);
        if let Some(old) = self.by_name.insert(name, id) {
            self.remove(old);
        }
    }

    /// Removes a NetworkPolicy.
    pub fn delete_policy(&mut self, name: &ObjectName) {
        if let Some(old) = self.by_name.remove(name) {
            self.remove(old);
        }
    }

    /// Sets a ClusterNetworkPolicy. Its subject is of its own cluster, even if its selector names others.
    pub fn put_cluster_policy(&mut self, name: ObjectName, policy: &ClusterPolicy) {
        let cluster = name.cluster.as_str();
        let mut side = |rules: &[ClusterRule]| {
            let compiled =
                rules.iter().map(|rule| compile_cluster(rule, cluster, &mut self.selection, &mut self.nodes));
            let compiled = compiled.collect();
            (!rules.is_empty()).then_some(compiled)
        };
        let sides = [side(&policy.ingress), side(&policy.egress)];
        let namespaces = policy.subject.namespaces.in_cluster(cluster);
        let subject = self.selection.acquire_set(&namespaces, policy.subject.pods.clone());
        let kind = PolicyKind::ClusterNetworkPolicy(policy.tier);
        let full = PolicyName { kind, name: name.clone() };
        let id = self.add(full, (Some(policy.tier), policy.priority), subject, sides);
        if let Some(old) = self.cluster_by_name.insert(name, id) {
            self.remove(old);
        }
    }

    /// Removes a ClusterNetworkPolicy.
    pub fn delete_cluster_policy(&mut self, name: &ObjectName) {
        if let Some(old) = self.cluster_by_name.remove(name) {
            self.remove(old);
        }
    }

    /// Number of pods without `hostNetwork`.
    #[must_use]
    pub fn pods(&self) -> usize {
        self.pods.len()
    }

    /// Number of policies of both kinds.
    #[must_use]
    pub fn policies(&self) -> usize {
        self.policies.len()
    }

    /// The pods of this name: several if an attachment has another UID than the object.
    pub fn pods_named(&self, name: &ObjectName) -> impl Iterator<Item = &Arc<PodInfo>> {
        self.pods.named(name)
    }

    /// Compiles all changes since the last commit. The caller names this state by `revision`.
    pub fn commit(&mut self, revision: u64) -> Arc<Classifier> {
        self.pods.settle_clusters(&mut self.selection);
        if std::mem::take(&mut self.pods.host_changed) {
            self.nodes_changed();
        }
        if let Some(changed) = self.nodes.settle(&self.pods, &self.networks) {
            self.set_cache.nodes = true;
            if changed {
                self.world_changed = self.generation + 1;
            }
        }
        let has_policies = self.policies_per_direction.map(|count| count > 0);
        if std::mem::replace(&mut self.had_policies, has_policies) != has_policies {
            self.world_changed = self.generation + 1;
        }
        self.generation += 1;
        self.recompile_namespaces();
        self.recompile_classes();
        self.pods.next_generation = self.generation + 1;
        self.set_cache.changed.extend(self.selection.dirty_sets.drain());
        let node_addresses = self.node_addresses.get_or_insert_with(|| {
            let nodes = self.pods.nodes.iter();
            // Pods in a node's network have its addresses, even those that its record lacks.
            let host = self.pods.host.values().filter_map(|pod| Some((pod.node.as_ref()?, &pod.addresses)));
            let pairs = host
                .chain(nodes)
                .flat_map(|(name, addresses)| addresses.iter().map(move |address| (*address, Arc::clone(name))));
            Arc::new(pairs.collect())
        });
        Arc::new(Classifier {
            generation: self.generation,
            world_changed: self.world_changed,
            revision,
            addresses: self.pods.addresses.clone(),
            pods: self.pods.infos.clone(),
            pods_changed: self.pods.changed.clone(),
            namespaces: self.namespace_rules.clone(),
            classes: self.class_rules.clone(),
            policies: self.published.clone(),
            node_addresses: Arc::clone(node_addresses),
            node_sets: Arc::clone(self.nodes.addresses()),
            sources: Arc::clone(&self.sources),
            networks: Arc::clone(&self.networks),
            policies_per_direction: self.policies_per_direction,
        })
    }

    pub(crate) fn node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.node_addresses.iter().flat_map(|addresses| addresses.keys().copied())
    }

    fn nodes_changed(&mut self) {
        self.world_changed = self.generation + 1;
        self.node_addresses = None;
        self.nodes.touch();
        self.set_cache.everything = true;
    }

    fn add(
        &mut self,
        name: PolicyName,
        order: (Option<Tier>, u16),
        subject: u32,
        sides: [Option<Vec<CompiledRule>>; 2],
    ) -> u32 {
        for (policies, side) in self.policies_per_direction.iter_mut().zip(&sides) {
            *policies += usize::from(side.is_some());
        }
        self.versions += 1;
        let compiled = Arc::new(Compiled { name, order, subject, sides, version: self.versions });
        if compiled.sets().any(|set| self.selection.names_clusters(set)) {
            self.pods.count_policy(1);
        }
        let id = self.policies.insert(Arc::clone(&compiled));
        self.published.set(id, Some(compiled));
        self.selection.sets[subject].subjects.push(PolicyId(id));
        self.selection.touch_subject(subject, order.0.is_some());
        id
    }

    fn remove(&mut self, id: u32) {
        let Some(policy) = self.policies.remove(id) else { return };
        self.published.set(id, None);
        if policy.sets().any(|set| self.selection.names_clusters(set)) {
            self.pods.count_policy(-1);
        }
        for (policies, side) in self.policies_per_direction.iter_mut().zip(&policy.sides) {
            *policies -= usize::from(side.is_some());
        }
        self.selection.touch_subject(policy.subject, policy.order.0.is_some());
        let subjects = &mut self.selection.sets[policy.subject].subjects;
        if let Some(at) = subjects.iter().position(|other| other.0 == id) {
            subjects.swap_remove(at);
        }
        policy.sets().for_each(|set| self.selection.release_set(set));
        policy.node_sets().for_each(|set| self.nodes.release(set));
    }

    fn recompile_namespaces(&mut self) {
        for index in std::mem::take(&mut self.selection.dirty_namespaces) {
            let rules = match self.selection.namespaces.get(index) {
                None => NamespaceRules::default(),
                Some(namespace) => {
                    let sets = namespace.sets.as_slice().into();
                    let selected = self.selected(&namespace.sets, false);
                    NamespaceRules { sets, unions: self.union_sides(&selected), changed: self.generation }
                }
            };
            if !self.namespace_rules.get(index).is_some_and(|before| before.judges_as(&rules)) {
                self.namespace_rules.set(index, rules);
            }
        }
    }

    fn recompile_classes(&mut self) {
        for index in std::mem::take(&mut self.selection.dirty_classes) {
            let rules = match self.selection.classes.get(index) {
                None => ClassRules::default(),
                Some(class) => {
                    let namespace = class.namespace;
                    let sets = class.sets.as_slice().into();
                    let own = self.selected(&class.sets, false);
                    let mut cluster = self.selected(&class.sets, true);
                    cluster.extend(self.selected(&self.selection.namespaces[namespace].sets, true));
                    self.sort(&mut cluster);
                    let (unions, tiers) = (self.union_sides(&own), self.tier_sides(&cluster));
                    ClassRules { namespace, sets, unions, tiers, changed: self.generation }
                }
            };
            if !self.class_rules.get(index).is_some_and(|before| before.judges_as(&rules)) {
                self.class_rules.set(index, rules);
            }
        }
    }

    /// The policies whose subject is one of these sets, in order, each with whether it only may select.
    pub(crate) fn selected(&self, sets: &[u32], cluster: bool) -> Vec<(u32, bool)> {
        let mut selected = Vec::new();
        for set in sets {
            let (set, unknown) = marked(*set);
            for policy in &self.selection.sets[set].subjects {
                if self.policies[policy.0].order.0.is_some() == cluster {
                    selected.push((policy.0, unknown));
                }
            }
        }
        self.sort(&mut selected);
        selected
    }

    pub(crate) fn sort(&self, policies: &mut [(u32, bool)]) {
        policies.sort_by(|(a, _), (b, _)| {
            let (a, b) = (&self.policies[*a], &self.policies[*b]);
            a.order.cmp(&b.order).then_with(|| a.name.name.cmp(&b.name.name))
        });
    }

    /// The key by which a list of policies is shared; `None`: no policy applies on this side.
    fn key(&self, selected: &[(u32, bool)], side: usize) -> Option<(Vec<(u32, bool)>, Selected)> {
        let on_side: Vec<_> =
            selected.iter().filter(|(policy, _)| self.policies[*policy].sides[side].is_some()).copied().collect();
        let version = |(policy, unknown): &(u32, bool)| (self.policies[*policy].version << 1) | u32::from(*unknown);
        let key = on_side.iter().map(version).collect();
        (!on_side.is_empty()).then_some((on_side, key))
    }

    fn union_sides(&mut self, selected: &[(u32, bool)]) -> [Option<Arc<Union>>; 2] {
        [0, 1].map(|side| {
            let (selected, key) = self.key(selected, side)?;
            if let Some(union) = self.unions[side].get(&key).and_then(Weak::upgrade) {
                return Some(union);
            }
            let union = Arc::new(self.union(&selected, side)?);
            intern(&mut self.unions[side], key, &union);
            Some(union)
        })
    }

    fn union(&self, selected: &[(u32, bool)], side: usize) -> Option<Union> {
        let isolates = selected.iter().find(|(_, unknown)| !unknown).or_else(|| selected.first())?;
        let mut list = Vec::new();
        let mut seen = HashSet::new();
        for (id, _) in selected.iter().filter(|(_, unknown)| !unknown) {
            let rules = self.policies[*id].sides[side].iter().flatten();
            for (position, rule) in rules.enumerate() {
                for peer in &rule.peers {
                    if !seen.insert((peer, &rule.ports)) {
                        continue;
                    }
                    let entry = RuleEntry {
                        order: list.len() as u32,
                        policy: PolicyId(*id),
                        rule: position as u16,
                        action: Action::Accept,
                        unsure: false,
                        ports: rule.ports.clone(),
                    };
                    list.push((peer.clone(), entry));
                }
            }
        }
        Some(Union {
            isolates: (PolicyId(isolates.0), isolates.1),
            allows: PeerRules::new(list),
            policies: selected.iter().map(|(id, unknown)| (PolicyId(*id), *unknown)).collect(),
        })
    }

    fn tier_sides(&mut self, selected: &[(u32, bool)]) -> [Option<Arc<Tiers>>; 2] {
        [0, 1].map(|side| {
            let (selected, key) = self.key(selected, side)?;
            if let Some(tiers) = self.tiers[side].get(&key).and_then(Weak::upgrade) {
                return Some(tiers);
            }
            let tiers = Arc::new(self.tiers(&selected, side));
            intern(&mut self.tiers[side], key, &tiers);
            Some(tiers)
        })
    }

    fn tiers(&self, selected: &[(u32, bool)], side: usize) -> Tiers {
        let [admin, baseline] = [Tier::Admin, Tier::Baseline].map(|tier| {
            let mut list = Vec::new();
            let mut order = 0;
            for (id, unsure) in selected.iter().filter(|(id, _)| self.policies[*id].order.0 == Some(tier)) {
                for (position, rule) in self.policies[*id].sides[side].iter().flatten().enumerate() {
                    for peer in &rule.peers {
                        let entry = RuleEntry {
                            order,
                            policy: PolicyId(*id),
                            rule: position as u16,
                            action: rule.action,
                            unsure: *unsure,
                            ports: rule.ports.clone(),
                        };
                        list.push((peer.clone(), entry));
                    }
                    order += 1;
                }
            }
            PeerRules::new(list)
        });
        let policies = selected.iter().map(|(id, unsure)| (PolicyId(*id), *unsure)).collect();
        Tiers { admin, baseline, policies }
    }
}

/// Keeps `value` for sharing. If there are many, those without another holder are dropped.
fn intern<T>(map: &mut HashMap<Selected, Weak<T>>, key: Selected, value: &Arc<T>) {
    if map.len() == map.capacity() {
        map.retain(|_, weak| weak.strong_count() > 0);
    }
    map.insert(key, Arc::downgrade(value));
}
