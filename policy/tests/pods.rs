//! Pod objects and attachments joined, and who owns an address.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use policy::{
    engine::{Age, Cause, End, Engine, Flow, ObjectName, PodInfo, PodInterface},
    object::{Labels, PodObject},
};
use proptest::prelude::*;

const ADDRESS: &str = "10.244.1.7";

fn subnet(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn address() -> IpAddr {
    ADDRESS.parse().unwrap()
}

fn name(name: &str) -> ObjectName {
    ObjectName::new("shop", name)
}

fn object(uid: &str, app: &str) -> PodObject {
    let labels: Labels = [("app", app)].into_iter().collect();
    PodObject { uid: Some(uid.into()), labels, addresses: vec![address()], ..PodObject::default() }
}

fn attachment(pod: &str, uid: Option<&str>) -> PodInterface {
    PodInterface {
        pod: name(pod),
        uid: uid.map(Into::into),
        labels: uid.is_none().then(Labels::default),
        addresses: vec![address()],
        node: "one".into(),
        subnets: [subnet("10.244.1.0/24")].into(),
    }
}

fn owner(engine: &mut Engine) -> Arc<PodInfo> {
    match engine.commit(1).end(address()) {
        End::Pod(pod) => pod,
        other => panic!("{other:?}"),
    }
}

fn app(pod: &PodInfo) -> Option<String> {
    pod.labels.as_ref().and_then(|labels| labels.get("app").map(str::to_owned))
}

const KEPT: Age = Age { stored: false, created: 1_000_000 };

#[test]
fn a_static_pod_is_its_mirror_object_by_the_hash_of_its_manifest() {
    let mut engine = Engine::default();
    let mirror = PodObject { static_uid: Some("hash".into()), addresses: Vec::new(), ..object("u1", "dns") };
    engine.put_pod(name("dns-one"), mirror.clone(), 5);
    engine.put_attachment("a".into(), attachment("dns-one", Some("hash")), 6);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("dns"));
    assert!(engine.has_pod(&name("dns-one"), "hash") && engine.has_pod(&name("dns-one"), "u1"));
    // Another manifest, and an object that says nothing of a hash.
    engine.put_attachment("a".into(), attachment("dns-one", Some("other")), 6);
    assert_eq!(owner(&mut engine).labels, None);
    assert!(!engine.has_pod(&name("dns-one"), "other") && !engine.has_pod(&name("gone"), "u1"));
    engine.put_attachment("a".into(), attachment("dns-one", Some("hash")), 6);
    engine.put_pod(name("dns-one"), PodObject { static_uid: None, ..mirror }, 5);
    assert_eq!(owner(&mut engine).labels, None);
}

#[test]
fn a_pod_that_is_only_kept_in_force_gives_its_labels_to_nobody_elses_address() {
    let mut engine = Engine::default();
    engine.put_pod(name("old"), object("u1", "old"), KEPT);
    engine.put_attachment("a".into(), attachment("old", Some("u1")), KEPT);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("old"));
    // A younger store's numbers are lower.
    engine.put_pod(name("new"), object("u2", "new"), 7);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("new"));
    engine.delete_pod(&name("new"));
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("old"));
    engine.put_attachment("b".into(), attachment("new", Some("u2")), 8);
    assert_eq!((&*owner(&mut engine).name.name, owner(&mut engine).labels.clone()), ("new", None));
    // Also one of its own name: it is another pod.
    engine.put_attachment("b".into(), attachment("old", Some("u2")), 8);
    assert_eq!((owner(&mut engine).uid.as_deref(), owner(&mut engine).labels.clone()), (Some("u2"), None));
    // Stored again, it has what it attached last.
    engine.put_pod(name("old"), object("u2", "back"), 9);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("back"));
}

/// An attachment by node `two`, which holds 10.244.2.0/24.
fn at_two(pod: &str, uid: Option<&str>) -> PodInterface {
    let subnets = [subnet("10.244.2.0/24")].into();
    PodInterface { addresses: vec![ip("10.244.2.9")], node: "two".into(), subnets, ..attachment(pod, uid) }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(engine: &mut Engine, address: &str) -> Arc<PodInfo> {
    match engine.commit(1).end(ip(address)) {
        End::Pod(pod) => pod,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_node_gives_its_addresses_no_labels_of_another_nodes_pod() {
    for uid in [Some("u1"), None] {
        let mut engine = Engine::default();
        engine.set_networks([subnet("10.244.0.0/16")].into());
        for node in ["one", "two"] {
            engine.put_node(node.into(), Arc::default());
        }
        let pod = PodObject { node: Some("one".into()), ..object("u1", "db") };
        engine.put_pod(name("db"), pod.clone(), 5);
        engine.put_attachment("a".into(), attachment("db", uid), 6);
        engine.put_attachment("b".into(), at_two("db", uid), 7);
        assert_eq!(app(&owner(&mut engine)).as_deref(), Some("db"));
        assert_eq!(app(&at(&mut engine, "10.244.2.9")), None, "{uid:?}");
        let misplaced: Vec<_> = engine.misplaced().collect();
        assert_eq!((misplaced.len(), &*misplaced[0].node, &*misplaced[0].attached_at), (1, "one", "two"));
        // Nor is it the same pod, whose packets to itself no policy judges, when the object is gone.
        engine.delete_pod(&name("db"));
        assert!(!Arc::ptr_eq(&owner(&mut engine), &at(&mut engine, "10.244.2.9")), "{uid:?}");
        assert_eq!(engine.misplaced().count(), 0);
        // The Pod moves: the object is another, and the new node's.
        engine.put_pod(name("db"), PodObject { node: Some("two".into()), addresses: Vec::new(), ..pod }, 8);
        assert_eq!(app(&at(&mut engine, "10.244.2.9")).as_deref(), Some("db"));
        assert_eq!(app(&owner(&mut engine)), None);
    }
}

#[test]
fn a_node_that_takes_the_name_in_a_pods_node_name_gets_no_labels_of_it() {
    let mut engine = Engine::default();
    engine.set_networks([subnet("10.244.0.0/16")].into());
    for node in ["one", "ip-10-0-0-1"] {
        engine.put_node(node.into(), Arc::default());
    }
    // Kubernetes calls node `one` by another name, which node `two` gives itself.
    let pod = PodObject { node: Some("ip-10-0-0-1".into()), ..object("u1", "db") };
    engine.put_pod(name("db"), pod, 5);
    engine.put_attachment("a".into(), attachment("db", Some("u1")), 6);
    engine.put_attachment("b".into(), PodInterface { node: "ip-10-0-0-1".into(), ..at_two("db", Some("u1")) }, 7);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("db"));
    assert_eq!(app(&at(&mut engine, "10.244.2.9")), None);
    assert_eq!(engine.misplaced().count(), 1);
    // The mesh's networks do not contain the Pod's address: it says nothing of the node.
    engine.set_networks([subnet("10.99.0.0/16")].into());
    assert_eq!(app(&owner(&mut engine)), None);
    assert_eq!(app(&at(&mut engine, "10.244.2.9")).as_deref(), Some("db"));
    engine.set_networks([subnet("10.244.0.0/16")].into());
    assert_eq!(app(&at(&mut engine, "10.244.2.9")), None);
}

#[test]
fn attachments_of_two_nodes_are_two_pods_though_one_object_labels_both() {
    // Without a nodeName, and with one that no node has and an address outside of the mesh.
    for (node, addresses) in [(None, vec![]), (Some("elsewhere"), vec![]), (Some("elsewhere"), vec![ip("192.168.9.9")])]
    {
        let mut engine = Engine::default();
        engine.set_networks([subnet("10.244.0.0/16")].into());
        let pod = PodObject { node: node.map(Into::into), addresses: addresses.clone(), ..object("u1", "db") };
        engine.put_pod(name("db"), pod, 5);
        engine.put_attachment("a".into(), attachment("db", Some("u1")), 6);
        engine.put_attachment("b".into(), at_two("db", Some("u1")), 7);
        let pods = [owner(&mut engine), at(&mut engine, "10.244.2.9")];
        assert!(pods.iter().all(|pod| app(pod).as_deref() == Some("db")), "{node:?} {addresses:?}");
        assert_eq!(pods.each_ref().map(|pod| pod.node.as_deref()), [Some("one"), Some("two")]);
        let flow = Flow { source: ip("10.244.2.9"), destination: address(), protocol: 6, port: Some(80) };
        let verdicts = engine.commit(1).connection(&flow);
        assert_eq!([verdicts.egress, verdicts.ingress].map(|verdict| verdict.cause), [Cause::NoPolicy; 2]);
        // Of one node they are one.
        let second = PodInterface { addresses: vec![ip("10.244.1.8")], ..attachment("db", Some("u1")) };
        engine.put_attachment("c".into(), second, 8);
        assert!(Arc::ptr_eq(&owner(&mut engine), &at(&mut engine, "10.244.1.8")));
    }
}

#[test]
fn a_newer_attachment_of_another_node_changes_no_labels() {
    let mut engine = Engine::default();
    let labels = |app: &str| Some([("app", app)].into_iter().collect());
    engine.put_attachment("a".into(), PodInterface { labels: labels("db"), ..attachment("db", None) }, 6);
    engine.put_attachment("b".into(), PodInterface { labels: labels("evil"), ..at_two("db", None) }, 7);
    assert_eq!(app(&owner(&mut engine)).as_deref(), Some("db"));
    assert_eq!(app(&at(&mut engine, "10.244.2.9")).as_deref(), Some("evil"));
}

#[test]
fn a_cluster_with_other_names_for_its_nodes_keeps_its_labels() {
    let mut engine = Engine::default();
    engine.set_networks([subnet("10.244.0.0/16")].into());
    for node in ["one", "two"] {
        engine.put_node(node.into(), Arc::default());
    }
    let pod = |node: &str, address: &str| PodObject {
        node: Some(node.into()),
        addresses: (!address.is_empty()).then(|| ip(address)).into_iter().collect(),
        ..object("u1", "db")
    };
    engine.put_attachment("b".into(), at_two("db", Some("u1")), 7);
    let mut labelled = |node: &str, address: &str| {
        engine.put_pod(name("db"), pod(node, address), 5);
        app(&at(&mut engine, "10.244.2.9")).is_some()
    };
    // No node of the mesh has the name: before the pod has an address, after, and on a second network.
    assert!(labelled("ip-10-0-0-2", ""));
    assert!(labelled("ip-10-0-0-2", "10.244.2.9"));
    assert!(labelled("ip-10-0-0-2", "192.168.9.9"));
    // Its address is another node's.
    assert!(!labelled("ip-10-0-0-2", "10.244.1.7"));
    // A younger node whose name an older one has: the pod's address tells.
    assert!(!labelled("one", ""));
    assert!(labelled("one", "10.244.2.9"));
    // A node that comes takes its pods along, and one that goes leaves them.
    assert!(labelled("three", ""));
    engine.put_node("three".into(), Arc::default());
    assert_eq!(app(&at(&mut engine, "10.244.2.9")), None);
    engine.delete_node("three");
    assert_eq!(app(&at(&mut engine, "10.244.2.9")).as_deref(), Some("db"));
}

proptest! {
    /// However it came about: an attachment has the labels of its Pod object exactly if it may be of that object's
    /// node.
    #[test]
    fn attachments_are_joined_as_if_all_were_told_at_once(
        steps in prop::collection::vec((0..7_u8, 0..3_usize, 0..4_usize, 0..4_usize), 1..60),
    ) {
        const NODES: [&str; 3] = ["one", "two", "three"];
        let subnet_of = |node: usize| subnet(&format!("10.244.{}.0/24", node + 1));
        let mut engine = Engine::default();
        let (mut known, mut networks) = (std::collections::BTreeSet::new(), Vec::new());
        let mut object: Option<PodObject> = None;
        let mut attached: BTreeMap<usize, &str> = BTreeMap::new();
        for (what, node, other, more) in steps {
            match what {
                0 => {
                    known.insert(NODES[node]);
                    engine.put_node(NODES[node].into(), Arc::default());
                }
                1 => {
                    known.remove(NODES[node]);
                    engine.delete_node(NODES[node]);
                }
                2 => {
                    networks = (more > 0).then(|| subnet("10.244.0.0/16")).into_iter().collect();
                    engine.set_networks(networks.clone().into());
                }
                3 | 4 => {
                    let pod = PodObject {
                        node: NODES.get(other).map(|node| (*node).into()),
                        addresses: (more < 3).then(|| ip(&format!("10.244.{}.200", more + 1))).into_iter().collect(),
                        ..object_of_db()
                    };
                    engine.put_pod(name("db"), pod.clone(), 5);
                    object = Some(pod);
                }
                5 if more == 0 => {
                    engine.delete_pod(&name("db"));
                    object = None;
                }
                // The node of these addresses is called so.
                _ => {
                    let called = NODES[other.min(2)];
                    attached.insert(node, called);
                    let attachment = PodInterface {
                        addresses: vec![ip(&format!("10.244.{}.9", node + 1))],
                        node: called.into(),
                        subnets: [subnet_of(node)].into(),
                        ..attachment("db", Some("u1"))
                    };
                    engine.put_attachment(format!("{node}").into(), attachment, 6);
                }
            }
            let fits = |node: usize, called: &str| object.as_ref().is_some_and(|object| {
                let Some(on) = &object.node else { return true };
                let within = |net: &IpNet| object.addresses.iter().any(|ip| net.contains(ip));
                match networks.iter().any(within) {
                    true => within(&subnet_of(node)),
                    false => &**on == called || !known.contains(&**on),
                }
            });
            for (node, called) in &attached {
                let pod = at(&mut engine, &format!("10.244.{}.9", node + 1));
                prop_assert_eq!(app(&pod).is_some(), fits(*node, called), "{} {:?}", node, object);
            }
            for (one, two) in attached.iter().zip(attached.iter().skip(1)) {
                let mut pod = |node: usize| at(&mut engine, &format!("10.244.{}.9", node + 1));
                prop_assert!(one.1 == two.1 || !Arc::ptr_eq(&pod(*one.0), &pod(*two.0)), "{:?}", attached);
            }
            let expected = attached.iter().filter(|(node, called)| object.is_some() && !fits(**node, called)).count();
            prop_assert_eq!(engine.misplaced().count(), expected);
        }
    }
}

fn object_of_db() -> PodObject {
    object("u1", "db")
}
