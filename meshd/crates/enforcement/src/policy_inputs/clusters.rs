//! Which node of the mesh is which node of a Kubernetes cluster.
//!
//! Node objects of clusters decide, never what a node says of its cluster. A Node is the mesh's node whose record has
//! its name and that publishes one of its InternalIPs. Any node can write both into its record, so if several match, they
//! are in no cluster: the age of a record does not tell which of them is right. Nor is a node that Nodes of several
//! clusters match. Status reports both.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use etcd_schema::{Cluster, Key, KubernetesKey, KubernetesName};
use mesh::{
    problem::{Problem, ProblemCode},
    topology::PeerId,
};
use policy::{
    engine::{ClusterNode, Engine},
    object::{CLUSTER, Labels},
    objects::{KubernetesNode, bind},
};

use crate::MeshFacts;

/// Most objects that a problem names.
const NAMED: usize = 3;

/// The Node objects of clusters, and what follows from them.
#[derive(Debug, Default)]
pub(super) struct ClusterNodes {
    objects: BTreeMap<Place, Arc<KubernetesNode>>,
    bound: BTreeMap<PeerId, Cluster>,
    /// The nodes that the engine knows, by their names in the mesh.
    told: HashMap<Arc<str>, ClusterNode>,
    disputed: Disputed,
    /// Namespaces whose objects have a label that is ignored, by key.
    labelled: BTreeSet<Key>,
}

/// A dispute that keeps nodes out of clusters, in words.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disputed {
    /// Nodes of the mesh that Node objects of several clusters match.
    nodes: BTreeSet<String>,
    /// Node objects that several nodes of the mesh match.
    objects: BTreeSet<String>,
    /// Nodes of the mesh that say another cluster of themselves than the Node objects do.
    claims: BTreeSet<String>,
}

/// Where a Node object is.
type Place = (Cluster, KubernetesName);

impl ClusterNodes {
    /// Takes a Node object; `None` removes it. Returns whether that is a change.
    pub(super) fn take(&mut self, cluster: &Cluster, name: &KubernetesName, node: Option<Arc<KubernetesNode>>) -> bool {
        let key = (cluster.clone(), name.clone());
        let before = match node {
            Some(node) => self.objects.insert(key.clone(), node),
            None => self.objects.remove(&key),
        };
        before.as_ref() != self.objects.get(&key)
    }

    /// Takes the labels of a Namespace object; `None` removes them.
    pub(super) fn take_labels(&mut self, cluster: &Cluster, name: &KubernetesName, labels: Option<&Labels>) {
        let key = Key::Kubernetes(cluster.clone(), KubernetesKey::Namespace(name.clone()));
        match labels.and_then(|labels| labels.get(CLUSTER)) {
            Some(_) => self.labelled.insert(key),
            None => self.labelled.remove(&key),
        };
    }

    /// The clusters that have nodes in the mesh.
    pub(super) fn names(&self) -> impl Iterator<Item = &Cluster> {
        self.bound.values().collect::<BTreeSet<_>>().into_iter()
    }

    /// The cluster that a node of the mesh is in.
    pub(super) fn of(&self, owner: &PeerId) -> Cluster {
        self.bound.get(owner).cloned().unwrap_or_default()
    }

    /// Finds the nodes of clusters among those of the mesh, and tells the engine. Returns those whose cluster changed.
    pub(super) fn bind(&mut self, mesh: &MeshFacts, engine: &mut Engine) -> BTreeSet<PeerId> {
        if self.objects.is_empty() && self.told.is_empty() && self.disputed == Disputed::default() {
            return BTreeSet::new();
        }
        let (found, disputed) = self.find(mesh);
        self.disputed = disputed;
        let bound: BTreeMap<PeerId, Cluster> =
            found.iter().map(|(owner, (cluster, _))| (owner.clone(), cluster.clone())).collect();
        let before = std::mem::replace(&mut self.bound, bound);
        let told = found.iter().filter_map(|(owner, (cluster, name))| {
            let node = mesh.nodes.get(owner)?;
            let subnets = Arc::clone(&node.prefixes);
            let (cluster, name) = (cluster.clone(), name.as_str().into());
            Some((Arc::clone(&node.name), ClusterNode { cluster, name, subnets }))
        });
        let before_told = std::mem::replace(&mut self.told, told.collect());
        for name in before_told.keys().filter(|name| !self.told.contains_key(*name)) {
            engine.set_cluster(name, None);
        }
        for (name, node) in &self.told {
            if before_told.get(name) != Some(node) {
                engine.set_cluster(name, Some(node.clone()));
            }
        }
        let owners = before.keys().chain(self.bound.keys());
        owners.filter(|owner| before.get(*owner) != self.bound.get(*owner)).cloned().collect()
    }

    /// Nodes of the mesh that are in one cluster each, with their names there, and why others are in none.
    fn find(&self, mesh: &MeshFacts) -> (BTreeMap<PeerId, Place>, Disputed) {
        let name = |owner: &PeerId| mesh.nodes.get(owner).map_or_else(String::new, |node| node.name.to_string());
        let nodes = mesh.nodes.iter().filter_map(|(owner, node)| {
            let published = node.published.as_ref()?;
            Some((owner, &*published.name, &*published.addresses))
        });
        let objects = self.objects.iter().map(|(place, object)| (place, place.1.as_str(), &*object.internal_ips));
        let binding = bind(nodes, objects);
        let mut disputed = Disputed::default();
        for (place, owners) in &binding.objects {
            let names: BTreeSet<String> = owners.iter().map(|owner| name(owner)).collect();
            disputed.objects.insert(format!("{} ({})", key(place), Vec::from_iter(names).join(", ")));
        }
        for (owner, places) in &binding.nodes {
            let keys: Vec<String> = places.iter().map(|place| key(place).to_string()).collect();
            disputed.nodes.insert(format!("{} ({})", name(owner), keys.join(", ")));
        }
        let mut found = BTreeMap::new();
        for (owner, place) in binding.bound {
            let claimed = mesh.nodes.get(owner).and_then(|node| node.published.as_ref()).map(|own| &own.cluster);
            // One that names none leases subnets of the networks of no cluster: right where its cluster has none.
            let counts = |claimed: &Cluster| !claimed.is_flat() || mesh.clusters.contains(&place.0);
            if let Some(claimed) = claimed.filter(|claimed| **claimed != place.0 && counts(claimed)) {
                let says = if claimed.is_flat() { "no cluster".to_owned() } else { claimed.to_string() };
                disputed.claims.insert(format!("{} (of {says}; {})", name(owner), key(place)));
            }
            found.insert(owner.clone(), place.clone());
        }
        (found, disputed)
    }

    /// Problems of the clusters' objects.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let shared = first(&self.disputed.objects).map(|objects| {
            Problem::new(
                ProblemCode::NodeObjectAmbiguous,
                format!(
                    "several nodes of the mesh have the name and an address of one Node object: {objects}; they are in no \
                     cluster, and their Kubernetes pods are unknown pods"
                ),
                "remove the node that is not that Node: meshctl node remove ID; if both are Nodes, of two clusters, give \
                 one another name or address",
            )
        });
        let disputed = first(&self.disputed.nodes).map(|nodes| {
            Problem::new(
                ProblemCode::NodeInSeveralClusters,
                format!(
                    "Node objects of several clusters are the same node of the mesh: {nodes}; it is in no cluster, and \
                     its Kubernetes pods are unknown pods"
                ),
                "delete the Node object of the cluster that the node is not in, and find out which program wrote it",
            )
        });
        let labelled = first(&self.labelled).map(|keys| {
            Problem::new(
                ProblemCode::ClusterLabelIgnored,
                format!("the label {CLUSTER} in these Namespace objects is ignored: {keys}"),
                format!("remove it: kubectl label namespace NAMESPACE {CLUSTER}-; every namespace has it by its key"),
            )
        });
        let claimed = first(&self.disputed.claims).map(|nodes| {
            Problem::new(
                ProblemCode::ClusterMismatch,
                format!(
                    "nodes say another cluster of themselves than their Node objects: {nodes}; policies go by the Node \
                     objects"
                ),
                "correct --cluster (MESHD_CLUSTER) on those nodes: they lease subnets from the networks of the cluster that it names",
            )
        });
        shared.into_iter().chain(disputed).chain(labelled).chain(claimed).collect()
    }
}

fn key((cluster, name): &Place) -> Key {
    Key::Kubernetes(cluster.clone(), KubernetesKey::Node(name.clone()))
}

/// The first few of these, and how many follow; `None`: there are none.
fn first<T: ToString>(all: &BTreeSet<T>) -> Option<String> {
    let shown: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
    let more = match all.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!shown.is_empty()).then(|| shown.join(", ") + &more)
}

#[cfg(test)]
mod tests {
    use control_core::objects::{Item, ObjectRecord};
    use policy::{
        engine::{Flow, PolicyState, Side},
        object::{NetworkPolicy, PodObject},
        objects::{Object, read},
    };

    use super::{super::PolicyInputs, *};
    use crate::{NodeFacts, input::PolicyRecord, mesh_facts::Published, policy_inputs::PendingInput};

    /// A node of the mesh: its id, the name in its record, its underlay address, and its subnet's number.
    type Node<'a> = (&'a str, &'a str, &'a str, u8);

    const EAST: Node<'_> = ("n1", "worker", "192.0.2.1", 1);
    const WEST: Node<'_> = ("n2", "worker", "198.51.100.1", 2);

    fn mesh(nodes: &[Node<'_>]) -> PendingInput {
        let facts = |(id, called, address, subnet): &Node<'_>| {
            let id: etcd_schema::NodeId = id.parse().unwrap();
            let published = Published {
                name: (*called).into(),
                addresses: [address.parse().unwrap()].into(),
                cluster: Cluster::default(),
            };
            let facts = NodeFacts {
                name: id.to_string().into(),
                addresses: vec![address.parse().unwrap()],
                prefixes: [format!("10.244.{subnet}.0/24").parse().unwrap()].into(),
                published: Some(published),
            };
            (PeerId::Node(id), Arc::new(facts))
        };
        let networks = vec!["10.244.0.0/16".parse().unwrap()];
        let facts = MeshFacts { networks, nodes: nodes.iter().map(facts).collect(), ..MeshFacts::default() };
        PendingInput {
            mesh: Some(Arc::new(facts)),
            attachments: Some(Arc::default()),
            complete: true,
            ..PendingInput::default()
        }
    }

    fn put(world: &mut PolicyInputs, items: Vec<(&str, Option<PolicyRecord>)>) {
        let record = |input| ObjectRecord { item: Item::new::<PolicyRecord>(input), create_revision: 5, held: false };
        let changes = items.into_iter().map(|(key, item)| (Key::parse(key).unwrap(), item.map(record))).collect();
        world.apply_pending(PendingInput { changes, revision: Some(9), ..PendingInput::default() });
    }

    fn node(address: &str) -> Option<PolicyRecord> {
        labelled(address, "none")
    }

    fn labelled(address: &str, zone: &str) -> Option<PolicyRecord> {
        let metadata = serde_json::json!({"name": "worker", "labels": {"zone": zone}});
        let json = serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata,
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        let key = KubernetesKey::Node("worker".parse().unwrap());
        Some(PolicyRecord::Object(read(&key, json.to_string().as_bytes(), false).unwrap().object))
    }

    fn attachment(subnet: u8) -> Option<PolicyRecord> {
        let json = format!(
            r#"{{"pod": {{"namespace": "shop", "name": "db"}}, "uid": "u1", "addresses": ["10.244.{subnet}.7"],
                "interface": "v1"}}"#
        );
        Some(PolicyRecord::Attachment(Arc::new(etcd_schema::Attachment::parse(json.as_bytes()).unwrap())))
    }

    fn pod(app: &str) -> Option<PolicyRecord> {
        let labels = [("app", app)].into_iter().collect();
        let uid = Some("u1".into());
        let pod = PodObject { uid, labels, node: Some("worker".into()), ..PodObject::default() };
        Some(PolicyRecord::Object(Object::Pod(pod)))
    }

    fn closed() -> Option<PolicyRecord> {
        let spec = serde_json::json!({"podSelector": {}});
        let policy = NetworkPolicy::parse(&spec).unwrap();
        Some(PolicyRecord::Object(Object::NetworkPolicy(PolicyState::Valid(policy))))
    }

    /// Attachments of pods with one name on all three nodes, and their Pod objects in two clusters.
    fn world(nodes: &[Node<'_>]) -> PolicyInputs {
        let mut world = PolicyInputs::new("own".parse().unwrap());
        world.apply_pending(mesh(nodes));
        put(
            &mut world,
            vec![
                ("endpoints/n1/c1/eth0", attachment(1)),
                ("endpoints/n2/c1/eth0", attachment(2)),
                ("endpoints/n3/c1/eth0", attachment(3)),
                ("k8s/east/nodes/worker", node("192.0.2.1")),
                ("k8s/west/nodes/worker", node("198.51.100.1")),
                ("k8s/east/pods/shop/db", pod("east")),
                ("k8s/west/pods/shop/db", pod("west")),
            ],
        );
        world
    }

    /// The pod at 10.244.SUBNET.7: its name, and the value of its label.
    fn at(world: &mut PolicyInputs, subnet: u8) -> String {
        match world.commit().end(format!("10.244.{subnet}.7").parse().unwrap()) {
            policy::engine::End::Pod(pod) => {
                let app = pod.labels.as_ref().and_then(|labels| labels.get("app"));
                format!("{} {}", pod.name, app.unwrap_or("unknown"))
            }
            other => format!("{other:?}"),
        }
    }

    fn receives(world: &mut PolicyInputs, subnet: u8) -> bool {
        let (source, destination) = ("203.0.113.7".parse().unwrap(), format!("10.244.{subnet}.7").parse().unwrap());
        world.commit().verdict(Side::Ingress, &Flow { source, destination, protocol: 6, port: Some(80) }).allowed
    }

    #[test]
    fn nodes_of_one_name_are_their_clusters_by_their_addresses() {
        let mut world = world(&[EAST, WEST]);
        assert_eq!([at(&mut world, 1), at(&mut world, 2)], ["east:shop/db east", "west:shop/db west"]);
        assert!(world.cluster_problems().is_empty());
        // The node has another address, and Kubernetes knows it a moment later.
        world.apply_pending(mesh(&[("n1", "worker", "192.0.2.9", 1), WEST]));
        assert_eq!(at(&mut world, 1), "shop/db unknown");
        put(&mut world, vec![("k8s/east/nodes/worker", node("192.0.2.9"))]);
        assert_eq!(at(&mut world, 1), "east:shop/db east");
        // Its subnet goes to a node that is in no cluster.
        world.apply_pending(mesh(&[("n1", "worker", "192.0.2.9", 4), WEST, ("n5", "other", "192.0.2.5", 1)]));
        assert_eq!(at(&mut world, 1), "UnknownPod");
    }

    #[test]
    fn a_node_that_claims_anothers_name_or_address_is_in_no_cluster() {
        for (impostor, address) in [("worker", "198.51.100.9"), ("other", "192.0.2.1"), ("other", "198.51.100.9")] {
            let mut world = world(&[EAST, WEST, ("n3", impostor, address, 3)]);
            let names = [at(&mut world, 1), at(&mut world, 2), at(&mut world, 3)];
            assert_eq!(names, ["east:shop/db east", "west:shop/db west", "shop/db unknown"], "{impostor} {address}");
            assert!(world.cluster_problems().is_empty());
        }
    }

    #[test]
    fn nodes_with_the_name_and_address_of_one_node_object_are_in_no_cluster() {
        for impostor in ["n0", "n3"] {
            let mut world = world(&[EAST, WEST]);
            put(&mut world, vec![(&format!("endpoints/{impostor}/c2/eth0"), attachment(3))]);
            put(&mut world, vec![("k8s/east/networkpolicies/shop/closed", closed())]);
            assert_eq!(at(&mut world, 1), "east:shop/db east");
            world.apply_pending(mesh(&[EAST, WEST, (impostor, "worker", "192.0.2.1", 3)]));
            let names = [at(&mut world, 1), at(&mut world, 2), at(&mut world, 3)];
            assert_eq!(names, ["UnknownPod", "west:shop/db west", "UnknownPod"], "{impostor}");
            assert_eq!([receives(&mut world, 1), receives(&mut world, 3)], [false, false], "{impostor}");
            let problems = world.cluster_problems();
            assert_eq!(problems[0].code, ProblemCode::NodeObjectAmbiguous);
            assert!(problems[0].cause.contains("k8s/east/nodes/worker (n"), "{problems:?}");
            assert!(problems[0].cause.contains(impostor) && problems[0].cause.contains("n1"), "{problems:?}");
            world.apply_pending(mesh(&[EAST, WEST]));
            assert_eq!(at(&mut world, 1), "east:shop/db east");
            assert!(world.cluster_problems().is_empty());
        }
    }

    #[test]
    fn a_node_of_one_cluster_that_claims_a_node_of_another_is_in_no_cluster() {
        let mut world = world(&[EAST, WEST]);
        let mut claims = mesh(&[EAST, WEST]);
        let facts = Arc::make_mut(claims.mesh.as_mut().unwrap());
        let west = PeerId::Node("n2".parse().unwrap());
        let mut node = NodeFacts::clone(&facts.nodes[&west]);
        let addresses = ["198.51.100.1", "192.0.2.1"].map(|address| address.parse().unwrap());
        node.published = node.published.map(|published| Published { addresses: addresses.into(), ..published });
        facts.nodes.set(west, Some(Arc::new(node)));
        world.apply_pending(claims);
        assert_eq!([at(&mut world, 1), at(&mut world, 2)], ["shop/db unknown", "shop/db unknown"]);
        let codes: Vec<ProblemCode> = world.cluster_problems().iter().map(|problem| problem.code).collect();
        assert_eq!(codes, [ProblemCode::NodeObjectAmbiguous, ProblemCode::NodeInSeveralClusters]);
    }

    #[test]
    fn a_node_that_two_clusters_have_is_in_none_and_its_pods_are_closed() {
        let mut world = world(&[EAST, WEST]);
        put(&mut world, vec![("k8s/east/networkpolicies/shop/closed", closed())]);
        assert_eq!([receives(&mut world, 1), receives(&mut world, 2)], [false, true]);
        put(&mut world, vec![("k8s/north/nodes/worker", node("192.0.2.1")), ("k8s/north/pods/shop/db", pod("north"))]);
        assert_eq!(at(&mut world, 1), "UnknownPod");
        assert!(!receives(&mut world, 1));
        let problems = world.cluster_problems();
        assert_eq!(problems[0].code, ProblemCode::NodeInSeveralClusters);
        assert!(problems[0].cause.contains("n1 (k8s/east/nodes/worker, k8s/north/nodes/worker)"), "{problems:?}");
        put(&mut world, vec![("k8s/north/nodes/worker", None)]);
        assert_eq!(at(&mut world, 1), "east:shop/db east");
        assert!(world.cluster_problems().is_empty());
        // Without its Node object it may be any cluster's.
        put(&mut world, vec![("k8s/east/nodes/worker", None)]);
        assert_eq!(at(&mut world, 1), "UnknownPod");
        assert!(!receives(&mut world, 1));
    }

    /// Of egress of the pod on the first node to a node's address.
    fn sends(world: &mut PolicyInputs, to: &str) -> bool {
        let (source, destination) = ("10.244.1.7".parse().unwrap(), to.parse().unwrap());
        world.commit().verdict(Side::Egress, &Flow { source, destination, protocol: 6, port: Some(80) }).allowed
    }

    #[test]
    fn policies_mean_nodes_by_their_objects_and_overlay_addresses() {
        let mut world = world(&[EAST, WEST]);
        let spec = serde_json::json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"nodes": {"matchLabels": {"zone": "a"}}}]}]});
        let policy = Object::ClusterNetworkPolicy(Arc::new(policy::object::ClusterPolicy::parse(&spec).unwrap()));
        put(&mut world, vec![("k8s/east/clusternetworkpolicies/p", Some(PolicyRecord::Object(policy)))]);
        let mut with_overlay = mesh(&[EAST, WEST]);
        let facts = Arc::make_mut(with_overlay.mesh.as_mut().unwrap());
        let east = PeerId::Node("n1".parse().unwrap());
        let mut node = NodeFacts::clone(&facts.nodes[&east]);
        node.addresses.push("10.244.1.0".parse().unwrap());
        facts.nodes.set(east, Some(Arc::new(node)));
        world.apply_pending(with_overlay);
        let denied = |world: &mut PolicyInputs| {
            ["192.0.2.1", "10.244.1.0", "198.51.100.1"].map(|address| !sends(world, address))
        };
        assert_eq!(denied(&mut world), [false; 3]);
        put(&mut world, vec![("k8s/east/nodes/worker", labelled("192.0.2.1", "a"))]);
        assert_eq!(denied(&mut world), [true, true, false]);
        put(&mut world, vec![("k8s/west/nodes/worker", labelled("198.51.100.1", "a"))]);
        assert_eq!(denied(&mut world), [true, true, false]);
        put(&mut world, vec![("k8s/east/nodes/worker", labelled("192.0.2.1", "b"))]);
        assert_eq!(denied(&mut world), [false; 3]);
    }

    #[test]
    fn a_node_that_names_no_cluster_is_reported_where_its_cluster_has_networks() {
        let mut world = world(&[EAST, WEST]);
        assert!(world.cluster_problems().is_empty());
        let mut facts = mesh(&[EAST, WEST]);
        Arc::make_mut(facts.mesh.as_mut().unwrap()).clusters = ["".parse().unwrap(), "east".parse().unwrap()].into();
        world.apply_pending(facts);
        let problems = world.cluster_problems();
        assert_eq!((problems.len(), problems[0].code), (1, ProblemCode::ClusterMismatch));
        assert!(problems[0].cause.contains("n1 (of no cluster; k8s/east/nodes/worker)"), "{problems:?}");
    }

    #[test]
    fn a_problem_ends_with_the_last_node_objects() {
        let mut world = world(&[EAST]);
        put(&mut world, vec![("k8s/west/nodes/worker", node("192.0.2.1"))]);
        assert_eq!(world.cluster_problems().len(), 1);
        put(&mut world, vec![("k8s/east/nodes/worker", None), ("k8s/west/nodes/worker", None)]);
        assert!(world.cluster_problems().is_empty());
    }

    #[test]
    fn a_label_that_is_ignored_is_a_problem() {
        let mut world = world(&[EAST, WEST]);
        let labelled = Some(PolicyRecord::Object(Object::Namespace([(CLUSTER, "east")].into_iter().collect())));
        put(&mut world, vec![("k8s/west/namespaces/shop", labelled), ("namespaces/ops", None)]);
        let problems = world.cluster_problems();
        assert_eq!(problems[0].code, ProblemCode::ClusterLabelIgnored);
        assert!(problems[0].cause.ends_with("k8s/west/namespaces/shop"), "{problems:?}");
        put(
            &mut world,
            vec![("k8s/west/namespaces/shop", Some(PolicyRecord::Object(Object::Namespace(Labels::default()))))],
        );
        assert!(world.cluster_problems().is_empty());
    }

    #[test]
    fn names_without_a_cluster_mean_the_only_object_of_that_name() {
        let mut world = world(&[EAST, WEST]);
        world.commit();
        let found = |world: &PolicyInputs, text: &str| world.pod_named(text).map_err(|error| error.to_string());
        assert_eq!(found(&world, "east:shop/db"), Ok(vec!["10.244.1.7".parse().unwrap()]));
        let ambiguous = found(&world, "shop/db").unwrap_err();
        assert!(ambiguous.contains("east:shop/db or west:shop/db"), "{ambiguous}");
        put(&mut world, vec![("endpoints/n2/c1/eth0", None)]);
        assert_eq!(found(&world, "shop/db"), found(&world, "east:shop/db"));
        assert!(found(&world, "west:shop/db").is_err() && found(&world, "db").is_err());

        put(&mut world, vec![("k8s/east/networkpolicies/shop/closed", closed())]);
        let shown = world.shown("shop/closed").unwrap();
        assert_eq!((shown.policy.cluster.as_str(), &shown.policy.key[..8]), ("east", "k8s/east"));
        assert!(shown.understood.starts_with("cluster east: "), "{}", shown.understood);
        put(&mut world, vec![("k8s/west/networkpolicies/shop/closed", closed())]);
        assert!(world.shown("shop/closed").is_none() && world.shown("west:shop/closed").is_some());
        put(&mut world, vec![("networkpolicies/shop/closed", closed())]);
        assert_eq!(world.shown("shop/closed").unwrap().policy.cluster, "");
        assert!(world.shown("north:shop/closed").is_none());
    }
}
