use control_core::objects::{Item, ObjectChanges};
use policy::engine::{End, Flow, Side, SourceAliases};

use super::*;
use crate::NodeSource;

fn facts(prefix: &str) -> Arc<MeshFacts> {
    Arc::new(MeshFacts {
        networks: vec!["10.244.0.0/16".parse().unwrap()],
        nodes: [(
            PeerId::Node("n1".parse().unwrap()),
            Arc::new(NodeFacts {
                name: "one".into(),
                addresses: vec!["10.244.1.0".parse().unwrap()],
                prefixes: [prefix.parse().unwrap()].into(),
                ..NodeFacts::default()
            }),
        )]
        .into_iter()
        .collect(),
        ..MeshFacts::default()
    })
}

/// Without attachments of its own.
fn world() -> PolicyInputs {
    let mut world = PolicyInputs::new("own".parse().unwrap());
    world.apply_pending(PendingInput { attachments: Some(Arc::default()), ..PendingInput::default() });
    world
}

fn pending(changes: &[(&str, Option<PolicyRecord>)]) -> PendingInput {
    let record =
        |input: &PolicyRecord| ObjectRecord { item: Item::new(input.clone()), create_revision: 5, held: false };
    let changes: ObjectChanges =
        changes.iter().map(|(key, item)| (Key::parse(key).unwrap(), item.as_ref().map(record))).collect();
    PendingInput { changes, revision: Some(9), complete: true, ..PendingInput::default() }
}

#[test]
fn an_attachment_counts_while_its_addresses_are_its_nodes() {
    let mut world = world();
    let json = br#"{"pod": {"namespace": "shop", "name": "db"}, "addresses": ["10.244.1.7"], "interface": "v1"}"#;
    let attachment = PolicyRecord::Attachment(Arc::new(etcd_schema::Attachment::parse(json).unwrap()));
    let key = "endpoints/n1/c1/eth0";
    let end = |world: &mut PolicyInputs| match world.commit().end("10.244.1.7".parse().unwrap()) {
        End::Pod(pod) => pod.name.to_string(),
        other => format!("{other:?}"),
    };
    assert!(world.apply_pending(pending(&[(key, Some(attachment))])));
    assert!(!world.is_complete(), "nothing is known of the mesh");
    world.apply_pending(PendingInput { mesh: Some(facts("10.244.1.0/24")), ..PendingInput::default() });
    assert!(world.is_complete());
    assert_eq!(end(&mut world), "shop/db");
    world.apply_pending(PendingInput { mesh: Some(facts("10.244.2.0/24")), ..PendingInput::default() });
    assert_eq!(end(&mut world), "UnknownPod");
    world.apply_pending(PendingInput { mesh: Some(facts("10.244.1.0/24")), ..PendingInput::default() });
    assert_eq!(end(&mut world), "shop/db");
    world.apply_pending(pending(&[(key, None)]));
    assert_eq!(end(&mut world), "UnknownPod");
    assert!(
        !world.apply_pending(PendingInput { revision: Some(10), ..PendingInput::default() }),
        "a revision alone changes nothing"
    );
    assert_eq!(world.revision(), 10);
}

#[test]
fn an_attachment_has_the_labels_of_its_pod_only_at_the_pods_node() {
    let mut world = world();
    let json =
        br#"{"pod": {"namespace": "shop", "name": "db"}, "uid": "u1", "addresses": ["10.244.1.7"], "interface": "v1"}"#;
    let attachment = PolicyRecord::Attachment(Arc::new(etcd_schema::Attachment::parse(json).unwrap()));
    let pod = policy::object::PodObject {
        uid: Some("u1".into()),
        node: Some("two".into()),
        ..policy::object::PodObject::default()
    };
    world.apply_pending(pending(&[
        ("endpoints/n1/c1/eth0", Some(attachment)),
        ("pods/shop/db", Some(PolicyRecord::Object(Object::Pod(pod)))),
    ]));
    let mut labelled = |names: &[(&str, &str)]| {
        let nodes = names.iter().map(|(id, name)| {
            let prefix = if *id == "n1" { "10.244.1.0/24" } else { "10.244.2.0/24" };
            let node = NodeFacts {
                name: (*name).into(),
                addresses: Vec::new(),
                prefixes: [prefix.parse().unwrap()].into(),
                ..NodeFacts::default()
            };
            (PeerId::Node(id.parse().unwrap()), Arc::new(node))
        });
        let facts = MeshFacts { nodes: nodes.collect(), ..(*facts("10.244.1.0/24")).clone() };
        world.apply_pending(PendingInput { mesh: Some(Arc::new(facts)), ..PendingInput::default() });
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
    let spec = serde_json::json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}]});
    let policy = PolicyRecord::Object(Object::NetworkPolicy(PolicyState::Valid(
        policy::object::NetworkPolicy::parse(&spec).unwrap(),
    )));
    let pod = policy::object::PodObject {
        addresses: vec!["10.244.1.7".parse().unwrap()],
        ..policy::object::PodObject::default()
    };
    world.apply_pending(pending(&[
        ("pods/shop/db", Some(PolicyRecord::Object(Object::Pod(pod)))),
        ("networkpolicies/shop/p", Some(policy)),
    ]));
    let mut allowed = |sources: &[(&str, &str)]| {
        let source = |(id, proven): &(&str, &str)| {
            let aliases = SourceAliases { proven: vec![proven.parse().unwrap()], published: Vec::new() };
            let overlay = vec!["10.244.2.0".parse().unwrap()];
            let id = PeerId::Node(id.parse().unwrap());
            (id, Arc::new(NodeSource { overlay, aliases: Arc::new(aliases) }))
        };
        let sources = sources.iter().map(source).collect();
        let facts = MeshFacts { sources, ..(*facts("10.244.1.0/24")).clone() };
        world.apply_pending(PendingInput { mesh: Some(Arc::new(facts)), ..PendingInput::default() });
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
    world.apply_pending(PendingInput { mesh: Some(facts("10.244.1.0/24")), ..PendingInput::default() });
    let spec = serde_json::json!({"podSelector": {}});
    let policy = policy::object::NetworkPolicy::parse(&spec).unwrap();
    let policy = PolicyRecord::Object(Object::NetworkPolicy(PolicyState::Valid(policy)));
    let pod = policy::object::PodObject {
        addresses: vec!["10.244.1.7".parse().unwrap()],
        ..policy::object::PodObject::default()
    };
    let allowed = |world: &mut PolicyInputs| {
        let flow = Flow {
            source: "192.0.2.1".parse().unwrap(),
            destination: "10.244.1.7".parse().unwrap(),
            protocol: 6,
            port: Some(80),
        };
        world.commit().verdict(Side::Ingress, &flow).allowed
    };
    world.apply_pending(pending(&[("pods/shop/db", Some(PolicyRecord::Object(Object::Pod(pod))))]));
    assert!(allowed(&mut world));
    world.apply_pending(pending(&[("networkpolicies/shop/p", Some(policy))]));
    assert!(!allowed(&mut world));
    world.apply_pending(pending(&[("networkpolicies/shop/p", None)]));
    assert!(allowed(&mut world));
}
