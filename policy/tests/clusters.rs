//! Pods of clusters: whose attachments they are, and which addresses they may have.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{net::IpAddr, sync::Arc};

use etcd_schema::Cluster;
use ipnet::IpNet;
use policy::{
    engine::{ClusterNode, End, Engine, Flow, ObjectName, PodInterface, PolicyState, Side},
    object::{ClusterPolicy, Labels, NetworkPolicy, PodObject},
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn subnet(number: u8) -> IpNet {
    format!("10.244.{number}.0/24").parse().unwrap()
}

fn cluster(name: &str) -> Cluster {
    name.parse().unwrap()
}

fn db(of: &str) -> ObjectName {
    ObjectName::new("shop", "db").of(&cluster(of))
}

/// Node `worker` of a cluster, which has the mesh's node of that number.
fn worker(of: &str, number: u8) -> Option<ClusterNode> {
    Some(ClusterNode { cluster: cluster(of), name: "worker".into(), subnets: [subnet(number)].into() })
}

fn pod(app: &str, address: Option<&str>) -> PodObject {
    let labels: Labels = [("app", app)].into_iter().collect();
    let addresses = address.map(ip).into_iter().collect();
    PodObject { uid: Some("u1".into()), labels, addresses, node: Some("worker".into()), ..PodObject::default() }
}

/// On the mesh's node of that number, of the cluster that it is in.
fn attachment(of: &str, number: u8) -> PodInterface {
    PodInterface {
        pod: db(of),
        uid: Some("u1".into()),
        labels: None,
        addresses: vec![ip(&format!("10.244.{number}.7"))],
        node: format!("m{number}").into(),
        subnets: [subnet(number)].into(),
    }
}

fn engine() -> Engine {
    let mut engine = Engine::new();
    engine.set_networks(["10.244.0.0/16".parse().unwrap()].into());
    for number in [1, 2] {
        engine.put_node(format!("m{number}").into(), Arc::default());
    }
    engine
}

/// The pod that has an address: its name and the value of its label `app`.
fn at(engine: &mut Engine, address: &str) -> String {
    match engine.commit(1).end(ip(address)) {
        End::Pod(pod) => {
            let app = pod.labels.as_ref().and_then(|labels| labels.get("app"));
            format!("{} {}", pod.name, app.unwrap_or("unknown"))
        }
        other => format!("{other:?}"),
    }
}

#[test]
fn an_attachment_is_of_its_clusters_pod_on_its_node() {
    let mut engine = engine();
    engine.set_cluster(&"m1".into(), worker("east", 1));
    engine.set_cluster(&"m2".into(), worker("west", 2));
    for (of, app) in [("east", "a"), ("west", "b"), ("", "c")] {
        engine.put_pod(db(of), pod(app, None), 5);
    }
    engine.put_attachment("one".into(), attachment("east", 1), 6);
    engine.put_attachment("two".into(), attachment("west", 2), 6);
    // UIDs, names and the names of the nodes are equal.
    assert_eq!(at(&mut engine, "10.244.1.7"), "east:shop/db a");
    assert_eq!(at(&mut engine, "10.244.2.7"), "west:shop/db b");
    // Another node is the cluster's worker.
    engine.set_cluster(&"m1".into(), worker("north", 1));
    engine.put_attachment("one".into(), attachment("north", 1), 6);
    assert_eq!(at(&mut engine, "10.244.1.7"), "north:shop/db unknown");
    let elsewhere = Some(ClusterNode { name: "other".into(), ..worker("west", 2).unwrap() });
    engine.set_cluster(&"m2".into(), elsewhere);
    assert_eq!(at(&mut engine, "10.244.2.7"), "west:shop/db unknown");
    assert_eq!(engine.misplaced().count(), 1);
    engine.set_cluster(&"m2".into(), worker("west", 2));
    assert_eq!(at(&mut engine, "10.244.2.7"), "west:shop/db b");
}

#[test]
fn an_address_is_a_pods_of_the_cluster_whose_nodes_subnet_it_is_in() {
    let mut engine = engine();
    engine.put_pod(db(""), pod("flat", Some("10.244.1.7")), 9);
    engine.put_pod(db("east"), pod("east", Some("10.244.1.7")), 5);
    engine.put_pod(db("west"), pod("west", Some("10.244.1.7")), 7);
    assert_eq!(at(&mut engine, "10.244.1.7"), "shop/db flat");
    for of in ["east", "west", "east"] {
        engine.set_cluster(&"m1".into(), worker(of, 1));
        assert_eq!(at(&mut engine, "10.244.1.7"), format!("{of}:shop/db {of}"));
    }
    engine.delete_pod(&db("east"));
    assert_eq!(at(&mut engine, "10.244.1.7"), "UnknownPod");
    // An attachment that a node of another cluster makes there is not one either.
    engine.put_attachment("x".into(), attachment("west", 1), 8);
    assert_eq!(at(&mut engine, "10.244.1.7"), "UnknownPod");
    engine.delete_attachment(&"x".into());
    engine.set_cluster(&"m1".into(), None);
    assert_eq!(at(&mut engine, "10.244.1.7"), "shop/db flat");
    // Its subnet goes to a node of another cluster, in either order.
    engine.set_cluster(&"m1".into(), worker("east", 1));
    engine.set_cluster(&"m2".into(), worker("west", 1));
    engine.set_cluster(&"m1".into(), worker("east", 2));
    assert_eq!(at(&mut engine, "10.244.1.7"), "west:shop/db west");
}

#[test]
fn a_pod_in_its_nodes_network_makes_no_address_of_another_cluster_a_nodes() {
    let mut engine = engine();
    engine.set_cluster(&"m1".into(), worker("east", 1));
    engine.set_cluster(&"m2".into(), worker("west", 2));
    let host = |address| PodObject { host_network: true, ..pod("host", Some(address)) };
    engine.put_pod(db("west"), host("10.244.1.9"), 5);
    assert_eq!(at(&mut engine, "10.244.1.9"), "UnknownPod");
    engine.put_pod(db("west"), host("10.244.2.9"), 5);
    assert_eq!(at(&mut engine, "10.244.2.9"), "Node(\"m2\")");
    engine.put_pod(db("west"), host("192.0.2.9"), 5);
    assert_eq!(at(&mut engine, "192.0.2.9"), "Node(\"m2\")");
    engine.set_networks(["192.0.2.0/24".parse().unwrap()].into());
    assert_eq!(at(&mut engine, "192.0.2.9"), "UnknownPod");
}

#[test]
fn an_attachment_that_may_be_of_a_cluster_is_no_pod_without_one() {
    let mut engine = engine();
    engine.set_cluster(&"m1".into(), worker("east", 1));
    engine.put_attachment("one".into(), attachment("east", 1), 6);
    engine.put_attachment("two".into(), attachment("", 2), 6);
    let made_by_hand = PodInterface { uid: None, addresses: vec![ip("10.244.2.8")], ..attachment("", 2) };
    engine.put_attachment("three".into(), PodInterface { pod: ObjectName::new("shop", "tool"), ..made_by_hand }, 6);
    assert_eq!(at(&mut engine, "10.244.2.7"), "shop/db unknown");
    // The Node object goes, and its attachments are those of a node without a cluster.
    let closed = PolicyState::Valid(NetworkPolicy::parse(&serde_json::json!({"podSelector": {}})).unwrap());
    engine.put_policy(ObjectName::new("shop", "closed").of(&cluster("east")), &closed);
    engine.set_cluster(&"m1".into(), None);
    engine.put_attachment("one".into(), attachment("", 1), 6);
    for address in ["10.244.1.7", "10.244.2.7"] {
        assert_eq!(at(&mut engine, address), "UnknownPod");
        let flow = Flow { source: ip("203.0.113.7"), destination: ip(address), protocol: 6, port: Some(80) };
        assert!(!engine.commit(1).verdict(Side::Ingress, &flow).allowed, "{address}");
    }
    assert_eq!(at(&mut engine, "10.244.2.8"), "shop/tool unknown");
    // A Pod object without a cluster has the UID.
    engine.put_pod(db(""), PodObject { node: None, ..pod("flat", None) }, 7);
    assert_eq!(at(&mut engine, "10.244.2.7"), "shop/db flat");
    engine.delete_pod(&db(""));
    assert_eq!(at(&mut engine, "10.244.2.7"), "UnknownPod");
    engine.delete_policy(&ObjectName::new("shop", "closed").of(&cluster("east")));
    assert_eq!(at(&mut engine, "10.244.2.7"), "shop/db unknown");
}

#[test]
fn a_flat_policy_that_names_a_cluster_takes_no_attachment_for_one_of_no_cluster() {
    let in_east = |operator: &str| serde_json::json!({"matchExpressions": [{"key": "meshd.io/cluster", "operator": operator, "values": ["east"]}]});
    let mut engine = engine();
    engine.put_attachment("one".into(), attachment("", 1), 6);
    let tool = ObjectName::new("shop", "tool");
    engine.put_attachment("two".into(), PodInterface { uid: None, pod: tool.clone(), ..attachment("", 2) }, 6);
    let allowed = |engine: &mut Engine, source: &str, destination: &str| {
        let flow = Flow { source: ip(source), destination: ip(destination), protocol: 6, port: Some(80) };
        engine.commit(1).verdict(Side::Ingress, &flow).allowed
    };
    let all = serde_json::json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]});
    engine.put_policy(tool.clone(), &PolicyState::Valid(NetworkPolicy::parse(&all).unwrap()));
    assert_eq!(at(&mut engine, "10.244.1.7"), "shop/db unknown");
    assert!(allowed(&mut engine, "10.244.1.7", "10.244.2.7"));

    let others =
        serde_json::json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": in_east("NotIn")}]}]});
    engine.put_policy(tool.clone(), &PolicyState::Valid(NetworkPolicy::parse(&others).unwrap()));
    assert_eq!(at(&mut engine, "10.244.1.7"), "UnknownPod");
    assert!(!allowed(&mut engine, "10.244.1.7", "10.244.2.7"));
    engine.delete_policy(&tool);
    assert_eq!(at(&mut engine, "10.244.1.7"), "shop/db unknown");

    let deny = ObjectName::new("", "deny");
    for (subject, peers, source, destination) in [
        (in_east("In"), serde_json::json!({}), "10.244.2.7", "10.244.1.7"),
        (serde_json::json!({}), in_east("In"), "10.244.1.7", "10.244.2.7"),
    ] {
        let spec = serde_json::json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": subject},
            "ingress": [{"action": "Deny", "from": [{"namespaces": peers}]}]});
        engine.put_cluster_policy(deny.clone(), &ClusterPolicy::parse(&spec).unwrap());
        assert!(!allowed(&mut engine, source, destination), "{spec}");
        engine.delete_cluster_policy(&deny);
        assert!(allowed(&mut engine, source, destination), "{spec}");
    }
}
