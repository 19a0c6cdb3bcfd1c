//! Feeds changes of etcd records into the engine.

mod clusters;
mod local_attachments;
mod pending;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use api_types::{Policy, QuestionError, ShownPolicy};
use cni::environment::AttachmentName;
use control_core::objects::ObjectRecord;
use etcd_schema::{Cluster, Key, KubernetesKey, NodeId};
use mesh::{problem::Problem, records::Revision, topology::PeerId};
use policy::{
    engine::{Age, Classifier, End, Engine, Misplaced, ObjectName, PodInfo, PodInterface, PolicyState},
    nft::{LocalPod, Ruleset},
    object::CLUSTER,
    objects::{self, Object},
};

pub(super) use self::pending::{PendingInput, Query};
use self::{clusters::ClusterNodes, local_attachments::LocalAttachments};
use super::{MeshFacts, NodeFacts, input::PolicyRecord};

/// All that policies are made of.
#[derive(Debug)]
pub(super) struct PolicyInputs {
    engine: Engine,
    own: LocalAttachments,
    clusters: ClusterNodes,
    /// Of all nodes.
    attachments: HashMap<Key, AttachmentState>,
    /// Addresses that keys claim, whether or not they have them.
    claims: HashMap<Key, Box<[IpAddr]>>,
    /// Claimed addresses in this node's own subnets, each with the number of its claims.
    local: BTreeMap<IpAddr, usize>,
    /// Policies in force, by key, with what they were understood as.
    policies: BTreeMap<Key, (Policy, Box<str>)>,
    /// Whose each node's name is: one, but for a node without a record whose id is another's name. The last counts.
    nodes: HashMap<Arc<str>, BTreeSet<PeerId>>,
    mesh: Option<Arc<MeshFacts>>,
    complete: bool,
    revision: Revision,
}

#[derive(Debug)]
struct AttachmentState {
    id: NodeId,
    record: Arc<etcd_schema::Attachment>,
    create_revision: Revision,
    /// etcd does not hold it, and it stays in force.
    held: bool,
    /// Its node and that one's cluster as the engine knows them, while it does.
    node: Option<(Arc<NodeFacts>, Cluster)>,
}

impl PolicyInputs {
    /// What is known of nothing yet, at this node.
    pub(super) fn new(node: NodeId) -> Self {
        Self {
            engine: Engine::default(),
            own: LocalAttachments::new(node),
            clusters: ClusterNodes::default(),
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
    pub(super) fn apply_pending(&mut self, pending: PendingInput) -> bool {
        let mut changed = pending.mesh.is_some() || (pending.complete && !self.complete);
        self.complete |= pending.complete;
        self.revision = pending.revision.unwrap_or(self.revision);
        // Which node is whose comes before what its pods are.
        let is_node = |key: &Key| matches!(key, Key::Kubernetes(_, KubernetesKey::Node(_)));
        let (nodes, changes): (Vec<_>, Vec<_>) = pending.changes.into_iter().partition(|(key, _)| is_node(key));
        let moved = self.take_cluster_nodes(nodes);
        changed |= moved;
        match pending.mesh {
            Some(mesh) => self.take_mesh(mesh),
            None if moved => self.bind(&BTreeSet::new()),
            None => {}
        }
        if let Some(table) = pending.attachments {
            changed |= self.take_table(table);
        }
        for (key, record) in changes {
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

    /// The pod that `text` names, as [`ObjectName::parse`] reads it. Without a cluster it is the flat one, or else the only
    /// one of that name.
    ///
    /// # Errors
    /// What is wrong with the text, or the pods that it may mean.
    pub(super) fn pod_named(&self, text: &str) -> Result<Vec<IpAddr>, QuestionError> {
        let Some(name) = ObjectName::parse(text) else {
            return Err(QuestionError::Invalid(format!(
                "{text:?} must be NAMESPACE/POD, CLUSTER:NAMESPACE/POD or an address"
            )));
        };
        let known = |name: &ObjectName| (name.clone(), self.addresses_of(name));
        let mut found = vec![known(&name)];
        if name.cluster.is_flat() && found[0].1.is_empty() {
            found.extend(self.clusters.names().map(|cluster| known(&name.clone().of(cluster))));
        }
        found.retain(|(_, addresses)| !addresses.is_empty());
        match found.len() {
            0 => Err(QuestionError::NotFound(format!("no known address of pod {text}"))),
            1 => Ok(found.remove(0).1),
            _ => {
                let names: Vec<String> = found.iter().map(|(name, _)| name.to_string()).collect();
                Err(QuestionError::Invalid(format!(
                    "{text} is a pod of several clusters: write {}",
                    names.join(" or ")
                )))
            }
        }
    }

    /// All policies in force.
    pub(super) fn list(&self) -> Vec<Policy> {
        self.policies.values().map(|(policy, _)| policy.clone()).collect()
    }

    /// The policy `NAMESPACE/NAME`, or the ClusterNetworkPolicy `NAME`, with `CLUSTER:` before it. Without a cluster it is
    /// the flat one, or else the only one of that name.
    pub(super) fn shown(&self, text: &str) -> Option<ShownPolicy> {
        let (cluster, name) = text.split_once(':').unwrap_or(("", text));
        let object = match name.split_once('/') {
            Some((namespace, name)) => KubernetesKey::NetworkPolicy(namespace.parse().ok()?, name.parse().ok()?),
            None => KubernetesKey::ClusterNetworkPolicy(name.parse().ok()?),
        };
        let key = Key::Kubernetes(cluster.parse().ok()?, object.clone());
        let (policy, understood) = self.policies.get(&key).or_else(|| {
            let of_name = |key: &Key| matches!(key, Key::Kubernetes(_, other) if *other == object);
            let mut found = self.policies.iter().filter(|(key, _)| cluster.is_empty() && of_name(key));
            found.next().filter(|_| found.next().is_none()).map(|(_, policy)| policy)
        })?;
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
        let cluster = self.clusters.of(&PeerId::Node(self.own.node.clone()));
        let own = self.attachments.iter().filter(|(key, _)| self.own.is_own(key)).map(|(_, attached)| &attached.record);
        own.filter_map(|record| {
            let (pod, uid) = (&record.pod, record.uid.as_deref()?);
            let name = ObjectName::new(pod.namespace.as_str(), pod.name.as_str()).of(&cluster);
            (!self.engine.has_pod(&name, uid)).then(|| format!("{name} (UID {uid})"))
        })
        .collect()
    }

    /// The same, if Pod objects of this node's cluster are copied: they will come.
    pub(super) fn awaited(&self) -> BTreeSet<AttachmentName> {
        let cluster = self.clusters.of(&PeerId::Node(self.own.node.clone()));
        if cluster.is_flat() {
            return BTreeSet::new();
        }
        let names = self.attachments.iter().filter_map(|(key, attached)| {
            let Key::Endpoint(_, container, interface) = key else { return None };
            let (pod, uid) = (&attached.record.pod, attached.record.uid.as_deref()?);
            let object = ObjectName::new(pod.namespace.as_str(), pod.name.as_str()).of(&cluster);
            let awaited = self.own.is_own(key) && !self.engine.has_pod(&object, uid);
            awaited.then(|| AttachmentName { container_id: container.to_string(), ifname: interface.to_string() })
        });
        names.collect()
    }

    /// What is wrong with the objects of clusters.
    pub(super) fn cluster_problems(&self) -> Vec<Problem> {
        self.clusters.problems()
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

    fn take_record(&mut self, key: Key, record: Option<ObjectRecord>) {
        let (input, create_revision, held) = match record {
            Some(record) => (record.item.into_read(), record.create_revision, record.held),
            None => (None, 0, false),
        };
        match (&key, input) {
            (Key::Kubernetes(cluster, object), Some(PolicyRecord::Object(read))) => {
                match summary(&key, &read) {
                    Some(policy) => self.policies.insert(key.clone(), policy),
                    None => self.policies.remove(&key),
                };
                match &read {
                    Object::Pod(pod) if !pod.host_network => self.claim(&key, &pod.addresses),
                    _ => self.claim(&key, &[]),
                }
                if let (KubernetesKey::Namespace(name), Object::Namespace(labels)) = (object, &read) {
                    self.clusters.take_labels(cluster, name, Some(labels));
                }
                objects::put(&mut self.engine, cluster, object, read, age(create_revision, held));
            }
            (Key::Kubernetes(cluster, object), _) => {
                self.policies.remove(&key);
                self.claim(&key, &[]);
                if let KubernetesKey::Namespace(name) = object {
                    self.clusters.take_labels(cluster, name, None);
                }
                objects::delete(&mut self.engine, cluster, object);
            }
            (Key::Endpoint(..), Some(PolicyRecord::Attachment(record))) => {
                self.put_attachment(key, Some(record), create_revision, held);
            }
            (Key::Endpoint(..), _) => self.put_attachment(key, None, create_revision, held),
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
        let mut attached = AttachmentState { id: id.clone(), record, create_revision, held, node };
        rejoin(&mut self.engine, &self.clusters, self.mesh.as_deref(), &key, &mut attached, true);
        self.attachments.insert(key, attached);
    }

    /// Takes Node objects of clusters. Returns whether one of them is another than before.
    fn take_cluster_nodes(&mut self, changes: Vec<(Key, Option<ObjectRecord>)>) -> bool {
        let mut changed = false;
        for (key, record) in changes {
            let Key::Kubernetes(cluster, KubernetesKey::Node(name)) = key else { continue };
            let node = record.and_then(|record| match record.item.into_read() {
                Some(PolicyRecord::Object(Object::Node(node))) => Some(node),
                _ => None,
            });
            let object = KubernetesKey::Node(name.clone());
            match node.clone().map(Object::Node) {
                Some(node) => objects::put(&mut self.engine, &cluster, &object, node, age(0, false)),
                None => objects::delete(&mut self.engine, &cluster, &object),
            }
            changed |= self.clusters.take(&cluster, &name, node);
        }
        changed
    }

    /// Finds the nodes of clusters again, and joins the attachments of those that changed and of `changed`.
    fn bind(&mut self, changed: &BTreeSet<PeerId>) {
        let Some(mesh) = self.mesh.clone() else { return };
        let mut changed = changed.clone();
        changed.extend(self.clusters.bind(&mesh, &mut self.engine));
        if changed.is_empty() {
            return;
        }
        for (key, attached) in &mut self.attachments {
            if changed.contains(&PeerId::Node(attached.id.clone())) {
                rejoin(&mut self.engine, &self.clusters, Some(&mesh), key, attached, false);
            }
        }
    }

    fn take_mesh(&mut self, mesh: Arc<MeshFacts>) {
        let before = self.mesh.take().unwrap_or_default();
        if before.networks != mesh.networks {
            self.engine.set_networks(mesh.networks.clone().into());
        }
        let changed: BTreeSet<PeerId> = mesh.nodes.changes(&before.nodes).into_iter().cloned().collect();
        self.take_nodes(&before, &mesh, &changed);
        self.take_sources(&before, &mesh);
        let moved = before.own != mesh.own;
        self.mesh = Some(Arc::clone(&mesh));
        self.bind(&changed);
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
    fn take_nodes(&mut self, before: &MeshFacts, mesh: &MeshFacts, changed: &BTreeSet<PeerId>) {
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

fn summary(key: &Key, object: &Object) -> Option<(Policy, Box<str>)> {
    let (state, ingress, egress, understood) = match object {
        Object::NetworkPolicy(PolicyState::Valid(policy)) => {
            let (ingress, egress) = (policy.ingress.as_ref().map(Vec::len), policy.egress.as_ref().map(Vec::len));
            ("valid", ingress, egress, policy.to_string())
        }
        Object::NetworkPolicy(PolicyState::Isolates(subject, directions)) => {
            let understood = format!("invalid; pods {subject}: denied in the policy's directions\n");
            ("isolates", directions.ingress.then_some(0), directions.egress.then_some(0), understood)
        }
        Object::NetworkPolicy(PolicyState::IsolatesNamespace) => {
            let understood = "invalid; all pods of its namespace: ingress and egress denied\n".to_owned();
            ("isolatesNamespace", Some(0), Some(0), understood)
        }
        Object::ClusterNetworkPolicy(policy) => {
            let some = |rules: usize| (rules > 0).then_some(rules);
            ("valid", some(policy.ingress.len()), some(policy.egress.len()), policy.to_string())
        }
        Object::Namespace(_) | Object::Pod(_) | Object::Node(_) => return None,
    };
    let directions = [("ingress", ingress), ("egress", egress)];
    let cluster = match key {
        Key::Kubernetes(cluster, _) => cluster.to_string(),
        _ => String::new(),
    };
    let understood = match cluster.as_str() {
        "" => understood,
        cluster => format!(
            "cluster {cluster}: its own pods, and as peers its own pods, unless the peer's namespace selector names \
             {CLUSTER}: that selects the clusters, others too\n{understood}"
        ),
    };
    let policy = Policy {
        key: key.to_string(),
        cluster,
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
fn rejoin(
    engine: &mut Engine,
    clusters: &ClusterNodes,
    mesh: Option<&MeshFacts>,
    key: &Key,
    attached: &mut AttachmentState,
    record_changed: bool,
) {
    let record = &attached.record;
    let node = mesh.and_then(|mesh| mesh.owner(&attached.id, &record.addresses)).map(|node| {
        let cluster = clusters.of(&PeerId::Node(attached.id.clone()));
        (Arc::clone(node), cluster)
    });
    let told = |node: &Option<(Arc<NodeFacts>, Cluster)>| {
        let (node, cluster) = node.as_ref()?;
        Some((Arc::clone(&node.name), Arc::clone(&node.prefixes), cluster.clone()))
    };
    if told(&node) == told(&attached.node) && !record_changed {
        return;
    }
    let name: Arc<str> = key.to_string().into();
    match &node {
        Some((node, cluster)) => {
            let attachment = PodInterface {
                pod: ObjectName::new(record.pod.namespace.as_str(), record.pod.name.as_str()).of(cluster),
                uid: record.uid.as_deref().map(Into::into),
                // Kubernetes always tells the plugin the pod's uid.
                labels: record.uid.is_none().then(|| objects::plain_labels(&record.pod.labels)),
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
mod tests;
