//! Feeds changes of etcd records into the engine.

mod own;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use api_types::{Policy, ShownPolicy};
use control_core::world::{self, WorldItem, WorldRecord};
use etcd_schema::{Cluster, Key, KubernetesKey, KubernetesName, NodeId};
use mesh::{records::Revision, snapshot::Owner};
use policy::{
    engine::{Age, Attachment, Classifier, End, Engine, Misplaced, ObjectName, PodInfo, PolicyState},
    nft::{LocalPod, Ruleset},
};

use self::own::Own;
use super::{MeshFacts, NodeFacts, mailbox::Letter};

/// All that policies are made of.
#[derive(Debug)]
pub(super) struct World {
    engine: Engine,
    own: Own,
    /// Of all nodes.
    attachments: HashMap<Key, Attached>,
    /// Addresses that keys claim, whether or not they have them.
    claims: HashMap<Key, Box<[IpAddr]>>,
    /// Claimed addresses in this node's own subnets, each with the number of its claims.
    local: BTreeMap<IpAddr, usize>,
    /// Policies in force, by key, with what they were understood as.
    policies: BTreeMap<Key, (Policy, Box<str>)>,
    /// Whose each node's name is: one, but for a node without a record whose id is another's name. The last counts.
    nodes: HashMap<Arc<str>, BTreeSet<Owner>>,
    mesh: Option<Arc<MeshFacts>>,
    complete: bool,
    revision: Revision,
}

#[derive(Debug)]
struct Attached {
    id: NodeId,
    record: Arc<etcd_schema::Attachment>,
    create_revision: Revision,
    /// etcd does not hold it, and it stays in force.
    held: bool,
    /// Its node as the engine knows it, while it does.
    node: Option<Arc<NodeFacts>>,
}

impl World {
    /// What is known of nothing yet, at this node.
    pub(super) fn new(node: NodeId) -> Self {
        Self {
            engine: Engine::default(),
            own: Own::new(node),
            attachments: HashMap::new(),
            claims: HashMap::new(),
            local: BTreeMap::new(),
            policies: BTreeMap::new(),
            nodes: HashMap::new(),
            mesh: None,
            complete: false,
            revision: 0,
        }
    }

    /// Takes what came. Returns whether it changed anything.
    pub(super) fn take(&mut self, letter: Letter) -> bool {
        let mut changed = letter.mesh.is_some() || (letter.complete && !self.complete);
        self.complete |= letter.complete;
        self.revision = letter.revision.unwrap_or(self.revision);
        if let Some(mesh) = letter.mesh {
            self.take_mesh(mesh);
        }
        if let Some(table) = letter.attachments {
            changed |= self.take_table(table);
        }
        for (key, record) in letter.changes {
            if self.own.is_own(&key) {
                changed |= self.take_echo(key, record.map(|record| record.create_revision));
            } else {
                self.take_record(key, record);
                changed = true;
            }
        }
        changed
    }

    /// Whether there is a whole picture.
    pub(super) const fn is_complete(&self) -> bool {
        self.complete && self.mesh.is_some() && self.own.is_known()
    }

    pub(super) const fn mesh(&self) -> Option<&Arc<MeshFacts>> {
        self.mesh.as_ref()
    }

    pub(super) const fn revision(&self) -> Revision {
        self.revision
    }

    /// The addresses of the pods of this name.
    pub(super) fn addresses_of(&self, name: &ObjectName) -> Vec<IpAddr> {
        self.engine.pods_named(name).flat_map(|pod| pod.addresses.iter().copied()).collect()
    }

    /// All policies in force.
    pub(super) fn list(&self) -> Vec<Policy> {
        self.policies.values().map(|(policy, _)| policy.clone()).collect()
    }

    /// The policy `NAMESPACE/NAME`, or the ClusterNetworkPolicy `NAME`.
    pub(super) fn shown(&self, name: &str) -> Option<ShownPolicy> {
        let key = match name.split_once('/') {
            Some((namespace, name)) => KubernetesKey::NetworkPolicy(namespace.parse().ok()?, name.parse().ok()?),
            None => KubernetesKey::ClusterNetworkPolicy(name.parse().ok()?),
        };
        let (policy, understood) = self.policies.get(&Key::Kubernetes(Cluster::default(), key))?;
        Some(ShownPolicy { policy: policy.clone(), understood: understood.to_string() })
    }

    pub(super) fn pods(&self) -> usize {
        self.engine.pods()
    }

    pub(super) fn policies(&self) -> usize {
        self.engine.policies()
    }

    /// What the kernel is to do for this node's pods as of the last [`commit`](Self::commit); `before` is what it does now.
    pub(super) fn ruleset(&mut self, classifier: &Classifier) -> Ruleset {
        let pods = self.local_pods(classifier);
        self.engine.ruleset(&pods)
    }

    /// Addresses of this node's attachments in subnets that were this node's and are not any more. They are another
    /// node's, or nobody's, and what policies say of them is not said of these pods.
    pub(super) fn displaced(&self) -> BTreeSet<IpAddr> {
        let Some(mesh) = &self.mesh else { return BTreeSet::new() };
        let is_displaced = |address: &IpAddr| mesh.is_in_networks(*address) && !mesh.is_own(*address);
        self.own.addresses().filter(is_displaced).collect()
    }

    /// Attachments of this node with the UID of a Pod that nothing in etcd is, for people.
    pub(super) fn unmatched(&self) -> Vec<String> {
        let own = self.attachments.iter().filter(|(key, _)| self.own.is_own(key)).map(|(_, attached)| &attached.record);
        own.filter_map(|record| {
            let (pod, uid) = (&record.pod, record.uid.as_deref()?);
            let name = ObjectName::new(pod.namespace.as_str(), pod.name.as_str());
            (!self.engine.has_pod(&name, uid)).then(|| format!("{name} (UID {uid})"))
        })
        .collect()
    }

    /// Attachments of all nodes that are not their Pod object's because it is on another node, for people.
    pub(super) fn misplaced(&self) -> impl Iterator<Item = String> {
        let shown = |misplaced: &Misplaced| {
            let Misplaced { pod, node, attached_at } = misplaced;
            format!("{pod} on {attached_at} (nodeName {node})")
        };
        self.engine.misplaced().map(shown)
    }

    /// This node's pods, each with its own addresses in order.
    fn local_pods(&mut self, classifier: &Classifier) -> Vec<LocalPod> {
        let mut pods: HashMap<*const PodInfo, Vec<IpAddr>> = HashMap::new();
        for address in self.local.keys() {
            if let End::Pod(pod) = classifier.end(*address) {
                pods.entry(Arc::as_ptr(&pod)).or_default().push(*address);
            }
        }
        let mut pods: Vec<LocalPod> = pods.into_values().map(|addresses| LocalPod { addresses }).collect();
        pods.sort();
        pods
    }

    /// Notes which addresses a key claims; none: it claims no more.
    fn claim(&mut self, key: &Key, addresses: &[IpAddr]) {
        let before = match addresses {
            [] => self.claims.remove(key),
            addresses => self.claims.insert(key.clone(), addresses.into()),
        };
        let Some(mesh) = &self.mesh else { return };
        // Who is known by its Pod object alone: nobody says when it is detached, but its address is free from here on.
        if self.complete && matches!(key, Key::Kubernetes(_, KubernetesKey::Pod(..))) {
            let gone = before.iter().flatten().filter(|address| mesh.is_own(**address) && !addresses.contains(address));
            self.own.release(gone);
        }
        for address in addresses.iter().filter(|address| mesh.is_own(**address)) {
            *self.local.entry(*address).or_default() += 1;
        }
        for address in before.iter().flatten() {
            if let Some(claims) = self.local.get_mut(address) {
                *claims -= 1;
                if *claims == 0 {
                    self.local.remove(address);
                }
            }
        }
    }

    /// What judges from now on.
    pub(super) fn commit(&mut self) -> Arc<Classifier> {
        self.engine.commit(u64::try_from(self.revision).unwrap_or_default())
    }

    fn take_record(&mut self, key: Key, record: Option<WorldRecord>) {
        let (item, create_revision, held) = match record {
            Some(record) => (Some(record.item), record.create_revision, record.held),
            None => (None, 0, false),
        };
        match item.as_ref().and_then(|item| summary(&key, item)) {
            Some(policy) => {
                self.policies.insert(key.clone(), policy);
            }
            None => {
                self.policies.remove(&key);
            }
        }
        match &item {
            Some(WorldItem::Pod(pod)) if !pod.host_network => self.claim(&key, &pod.addresses),
            // See below.
            _ if matches!(key, Key::Endpoint(..)) => {}
            _ => self.claim(&key, &[]),
        }
        match key {
            Key::Kubernetes(cluster, object) => {
                self.take_object(&cluster, &object, item, age(create_revision, held));
            }
            key @ Key::Endpoint(..) => {
                let record = item.and_then(|item| match item {
                    WorldItem::Attachment(record) => Some(record),
                    _ => None,
                });
                self.put_attachment(key, record, create_revision, held);
            }
            _ => {}
        }
    }

    fn take_object(&mut self, cluster: &Cluster, key: &KubernetesKey, item: Option<WorldItem>, age: Age) {
        let in_namespace =
            |namespace: &str, name: &KubernetesName| ObjectName::new(namespace, name.as_str()).of(cluster);
        let named = |namespace: &KubernetesName, name| in_namespace(namespace.as_str(), name);
        let cluster_wide = |name| in_namespace("", name);
        match (key, item) {
            (KubernetesKey::Namespace(name), Some(WorldItem::Namespace(labels))) => {
                self.engine.put_namespace(cluster, &name.as_str().into(), labels);
            }
            (KubernetesKey::Namespace(name), _) => self.engine.delete_namespace(cluster, &name.as_str().into()),
            (KubernetesKey::Pod(namespace, name), Some(WorldItem::Pod(pod))) => {
                self.engine.put_pod(named(namespace, name), pod, age);
            }
            (KubernetesKey::Pod(namespace, name), _) => self.engine.delete_pod(&named(namespace, name)),
            (KubernetesKey::NetworkPolicy(namespace, name), Some(WorldItem::Policy(policy))) => {
                self.engine.put_policy(named(namespace, name), &policy);
            }
            (KubernetesKey::NetworkPolicy(namespace, name), _) => self.engine.delete_policy(&named(namespace, name)),
            (KubernetesKey::ClusterNetworkPolicy(name), Some(WorldItem::ClusterPolicy(policy))) => {
                self.engine.put_cluster_policy(cluster_wide(name), &policy);
            }
            (KubernetesKey::ClusterNetworkPolicy(name), _) => self.engine.delete_cluster_policy(&cluster_wide(name)),
            _ => {}
        }
    }

    /// Takes an attachment of any node, or forgets it.
    fn put_attachment(
        &mut self,
        key: Key,
        record: Option<Arc<etcd_schema::Attachment>>,
        create_revision: Revision,
        held: bool,
    ) {
        let Key::Endpoint(id, ..) = &key else { return };
        let node = self.attachments.remove(&key).and_then(|attached| attached.node);
        let Some(record) = record else {
            self.claim(&key, &[]);
            if node.is_some() {
                self.engine.delete_attachment(&key.to_string().into());
            }
            return;
        };
        self.claim(&key, &record.addresses);
        let mut attached = Attached { id: id.clone(), record, create_revision, held, node };
        rejoin(&mut self.engine, self.mesh.as_deref(), &key, &mut attached, true);
        self.attachments.insert(key, attached);
    }

    fn take_mesh(&mut self, mesh: Arc<MeshFacts>) {
        let before = self.mesh.take().unwrap_or_default();
        if before.networks != mesh.networks {
            self.engine.set_networks(mesh.networks.clone().into());
        }
        let changed: BTreeSet<Owner> = mesh.nodes.changes(&before.nodes).into_iter().cloned().collect();
        self.take_nodes(&before, &mesh, &changed);
        for (key, attached) in &mut self.attachments {
            if changed.contains(&Owner::Node(attached.id.clone())) {
                rejoin(&mut self.engine, Some(&mesh), key, attached, false);
            }
        }
        self.take_sources(&before, &mesh);
        let moved = before.own != mesh.own;
        self.mesh = Some(Arc::clone(&mesh));
        if moved {
            self.local.clear();
            for address in self.claims.values().flatten().filter(|address| mesh.is_own(**address)) {
                *self.local.entry(*address).or_default() += 1;
            }
            self.retake_table();
        }
    }

    /// Tells the engine what changed of what overlay addresses count as.
    fn take_sources(&mut self, before: &MeshFacts, mesh: &MeshFacts) {
        let changed = mesh.sources.changes(&before.sources);
        // An overlay address may have gone from one node to another.
        for was in changed.iter().filter_map(|owner| before.sources.get(*owner)) {
            was.overlay.iter().for_each(|address| self.engine.set_source(*address, Arc::default()));
        }
        for is in changed.iter().filter_map(|owner| mesh.sources.get(*owner)) {
            is.overlay.iter().for_each(|address| self.engine.set_source(*address, Arc::clone(&is.aliases)));
        }
    }

    /// Tells the engine of the nodes that changed, by name.
    fn take_nodes(&mut self, before: &MeshFacts, mesh: &MeshFacts, changed: &BTreeSet<Owner>) {
        let mut names: BTreeSet<Arc<str>> = BTreeSet::new();
        for owner in changed {
            if let Some(was) = before.nodes.get(owner) {
                names.insert(Arc::clone(&was.name));
                if let Some(owners) = self.nodes.get_mut(&was.name) {
                    owners.remove(owner);
                }
            }
            if let Some(is) = mesh.nodes.get(owner) {
                names.insert(Arc::clone(&is.name));
                self.nodes.entry(Arc::clone(&is.name)).or_default().insert(owner.clone());
            }
        }
        for name in names {
            let last = self.nodes.get(&name).and_then(BTreeSet::last).and_then(|owner| mesh.nodes.get(owner));
            match last {
                Some(node) => self.engine.put_node(name, node.addresses.clone().into()),
                None => {
                    self.engine.delete_node(&name);
                    self.nodes.remove(&name);
                }
            }
        }
    }
}

fn age(create_revision: Revision, held: bool) -> Age {
    Age { stored: !held, created: u64::try_from(create_revision).unwrap_or_default() }
}

fn summary(key: &Key, item: &WorldItem) -> Option<(Policy, Box<str>)> {
    let (state, ingress, egress, understood) = match item {
        WorldItem::Policy(PolicyState::Valid(policy)) => {
            let (ingress, egress) = (policy.ingress.as_ref().map(Vec::len), policy.egress.as_ref().map(Vec::len));
            ("valid", ingress, egress, policy.to_string())
        }
        WorldItem::Policy(PolicyState::Isolates(subject, directions)) => {
            let understood = format!("invalid; pods {subject}: denied in the policy's directions\n");
            ("isolates", directions.ingress.then_some(0), directions.egress.then_some(0), understood)
        }
        WorldItem::Policy(PolicyState::IsolatesNamespace) => {
            let understood = "invalid; all pods of its namespace: ingress and egress denied\n".to_owned();
            ("isolatesNamespace", Some(0), Some(0), understood)
        }
        WorldItem::ClusterPolicy(policy) => {
            let some = |rules: usize| (rules > 0).then_some(rules);
            ("valid", some(policy.ingress.len()), some(policy.egress.len()), policy.to_string())
        }
        WorldItem::Namespace(_) | WorldItem::Pod(_) | WorldItem::Attachment(_) => return None,
    };
    let directions = [("ingress", ingress), ("egress", egress)];
    let policy = Policy {
        key: key.to_string(),
        state: state.to_owned(),
        directions: directions
            .iter()
            .filter(|(_, rules)| rules.is_some())
            .map(|(name, _)| (*name).to_owned())
            .collect(),
        rules: ingress.unwrap_or(0) + egress.unwrap_or(0),
    };
    Some((policy, understood.into()))
}

/// Tells the engine of an attachment whose record or whose node changed. One outside of its node's subnets is none.
fn rejoin(engine: &mut Engine, mesh: Option<&MeshFacts>, key: &Key, attached: &mut Attached, record_changed: bool) {
    let record = &attached.record;
    let node = mesh.and_then(|mesh| mesh.owner(&attached.id, &record.addresses)).map(Arc::clone);
    let told =
        |node: &Option<Arc<NodeFacts>>| node.as_ref().map(|node| (Arc::clone(&node.name), Arc::clone(&node.prefixes)));
    if told(&node) == told(&attached.node) && !record_changed {
        return;
    }
    let name: Arc<str> = key.to_string().into();
    match &node {
        Some(node) => {
            let attachment = Attachment {
                pod: ObjectName::new(record.pod.namespace.as_str(), record.pod.name.as_str()),
                uid: record.uid.as_deref().map(Into::into),
                // Kubernetes always tells the plugin the pod's uid.
                labels: record.uid.is_none().then(|| world::labels(&record.pod.labels)),
                addresses: record.addresses.clone(),
                node: Arc::clone(&node.name),
                subnets: Arc::clone(&node.prefixes),
            };
            engine.put_attachment(name, attachment, age(attached.create_revision, attached.held));
        }
        None if attached.node.is_some() => engine.delete_attachment(&name),
        None => {}
    }
    attached.node = node;
}

#[cfg(test)]
mod tests {
    use control_core::world::WorldChanges;
    use policy::engine::{End, Flow, Side, SourceAliases};

    use super::*;
    use crate::NodeSource;

    fn facts(prefix: &str) -> Arc<MeshFacts> {
        Arc::new(MeshFacts {
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            nodes: [(
                Owner::Node("n1".parse().unwrap()),
                Arc::new(NodeFacts {
                    name: "one".into(),
                    addresses: vec!["10.244.1.0".parse().unwrap()],
                    prefixes: [prefix.parse().unwrap()].into(),
                }),
            )]
            .into_iter()
            .collect(),
            ..MeshFacts::default()
        })
    }

    /// Without attachments of its own.
    fn world() -> World {
        let mut world = World::new("own".parse().unwrap());
        world.take(Letter { attachments: Some(Arc::default()), ..Letter::default() });
        world
    }

    fn letter(changes: &[(&str, Option<WorldItem>)]) -> Letter {
        let record = |item: &WorldItem| WorldRecord { item: item.clone(), create_revision: 5, held: false };
        let changes: WorldChanges =
            changes.iter().map(|(key, item)| (Key::parse(key).unwrap(), item.as_ref().map(record))).collect();
        Letter { changes, revision: Some(9), complete: true, ..Letter::default() }
    }

    #[test]
    fn an_attachment_counts_while_its_addresses_are_its_nodes() {
        let mut world = world();
        let json = br#"{"pod": {"namespace": "shop", "name": "db"}, "addresses": ["10.244.1.7"], "interface": "v1"}"#;
        let attachment = WorldItem::Attachment(Arc::new(etcd_schema::Attachment::parse(json).unwrap()));
        let key = "endpoints/n1/c1/eth0";
        let end = |world: &mut World| match world.commit().end("10.244.1.7".parse().unwrap()) {
            End::Pod(pod) => pod.name.to_string(),
            other => format!("{other:?}"),
        };
        assert!(world.take(letter(&[(key, Some(attachment))])));
        assert!(!world.is_complete(), "nothing is known of the mesh");
        world.take(Letter { mesh: Some(facts("10.244.1.0/24")), ..Letter::default() });
        assert!(world.is_complete());
        assert_eq!(end(&mut world), "shop/db");
        world.take(Letter { mesh: Some(facts("10.244.2.0/24")), ..Letter::default() });
        assert_eq!(end(&mut world), "UnknownPod");
        world.take(Letter { mesh: Some(facts("10.244.1.0/24")), ..Letter::default() });
        assert_eq!(end(&mut world), "shop/db");
        world.take(letter(&[(key, None)]));
        assert_eq!(end(&mut world), "UnknownPod");
        assert!(!world.take(Letter { revision: Some(10), ..Letter::default() }), "a revision alone changes nothing");
        assert_eq!(world.revision(), 10);
    }

    #[test]
    fn an_attachment_has_the_labels_of_its_pod_only_at_the_pods_node() {
        let mut world = world();
        let json = br#"{"pod": {"namespace": "shop", "name": "db"}, "uid": "u1", "addresses": ["10.244.1.7"], "interface": "v1"}"#;
        let attachment = WorldItem::Attachment(Arc::new(etcd_schema::Attachment::parse(json).unwrap()));
        let pod = policy::object::PodObject {
            uid: Some("u1".into()),
            node: Some("two".into()),
            ..policy::object::PodObject::default()
        };
        world.take(letter(&[("endpoints/n1/c1/eth0", Some(attachment)), ("pods/shop/db", Some(WorldItem::Pod(pod)))]));
        let mut labelled = |names: &[(&str, &str)]| {
            let nodes = names.iter().map(|(id, name)| {
                let prefix = if *id == "n1" { "10.244.1.0/24" } else { "10.244.2.0/24" };
                let node = NodeFacts {
                    name: (*name).into(),
                    addresses: Vec::new(),
                    prefixes: [prefix.parse().unwrap()].into(),
                };
                (Owner::Node(id.parse().unwrap()), Arc::new(node))
            });
            let facts = MeshFacts { nodes: nodes.collect(), ..(*facts("10.244.1.0/24")).clone() };
            world.take(Letter { mesh: Some(Arc::new(facts)), ..Letter::default() });
            let labelled = match world.commit().end("10.244.1.7".parse().unwrap()) {
                End::Pod(pod) => pod.labels.is_some(),
                other => panic!("{other:?}"),
            };
            (labelled, world.misplaced().collect::<Vec<_>>().join(", "))
        };
        assert_eq!(labelled(&[("n1", "one")]), (true, String::new()), "the mesh has no node two");
        let misplaced = "shop/db on one (nodeName two)".to_owned();
        assert_eq!(labelled(&[("n1", "one"), ("n2", "two")]), (false, misplaced));
        // They change names.
        assert_eq!(labelled(&[("n1", "two"), ("n2", "one")]), (true, String::new()));
        // The younger of two nodes with one name.
        assert!(!labelled(&[("n1", "two (n1)"), ("n2", "two")]).0);
    }

    #[test]
    fn an_overlay_address_counts_as_what_is_proven_of_the_node_that_has_it_now() {
        let mut world = world();
        let spec =
            serde_json::json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}]});
        let policy = WorldItem::Policy(PolicyState::Valid(policy::object::NetworkPolicy::parse(&spec).unwrap()));
        let pod = policy::object::PodObject {
            addresses: vec!["10.244.1.7".parse().unwrap()],
            ..policy::object::PodObject::default()
        };
        world.take(letter(&[("pods/shop/db", Some(WorldItem::Pod(pod))), ("networkpolicies/shop/p", Some(policy))]));
        let mut allowed = |sources: &[(&str, &str)]| {
            let source = |(id, proven): &(&str, &str)| {
                let aliases = SourceAliases { proven: vec![proven.parse().unwrap()], published: Vec::new() };
                let overlay = vec!["10.244.2.0".parse().unwrap()];
                let id = Owner::Node(id.parse().unwrap());
                (id, Arc::new(NodeSource { overlay, aliases: Arc::new(aliases) }))
            };
            let sources = sources.iter().map(source).collect();
            let facts = MeshFacts { sources, ..(*facts("10.244.1.0/24")).clone() };
            world.take(Letter { mesh: Some(Arc::new(facts)), ..Letter::default() });
            let flow = Flow {
                source: "10.244.2.0".parse().unwrap(),
                destination: "10.244.1.7".parse().unwrap(),
                protocol: 6,
                port: Some(80),
            };
            world.commit().verdict(Side::Ingress, &flow).allowed
        };
        assert!(!allowed(&[]));
        assert!(allowed(&[("n2", "192.0.2.1")]));
        assert!(!allowed(&[("n2", "203.0.113.1")]));
        // The address goes to another node, which sorts before the one that had it, and back.
        assert!(allowed(&[("n1", "192.0.2.1")]));
        assert!(!allowed(&[("n2", "203.0.113.1")]));
        assert!(allowed(&[("n3", "192.0.2.1")]));
        assert!(!allowed(&[]));
    }

    #[test]
    fn a_policy_isolates_and_goes() {
        let mut world = world();
        world.take(Letter { mesh: Some(facts("10.244.1.0/24")), ..Letter::default() });
        let spec = serde_json::json!({"podSelector": {}});
        let policy = policy::object::NetworkPolicy::parse(&spec).unwrap();
        let policy = WorldItem::Policy(PolicyState::Valid(policy));
        let pod = policy::object::PodObject {
            addresses: vec!["10.244.1.7".parse().unwrap()],
            ..policy::object::PodObject::default()
        };
        let allowed = |world: &mut World| {
            let flow = Flow {
                source: "192.0.2.1".parse().unwrap(),
                destination: "10.244.1.7".parse().unwrap(),
                protocol: 6,
                port: Some(80),
            };
            world.commit().verdict(Side::Ingress, &flow).allowed
        };
        world.take(letter(&[("pods/shop/db", Some(WorldItem::Pod(pod)))]));
        assert!(allowed(&mut world));
        world.take(letter(&[("networkpolicies/shop/p", Some(policy))]));
        assert!(!allowed(&mut world));
        world.take(letter(&[("networkpolicies/shop/p", None)]));
        assert!(allowed(&mut world));
    }
}
