//! podCIDRs of Nodes as subnets of the mesh's nodes.

use integration::{await_ok, ping};
use serde_json::Value;

use crate::{SOON, cluster::Cluster};

const CONFIG: &str = r#"{"Networks": [{"cidr": "10.42.0.0/16", "cluster": "east", "Allocate": "kubernetes"},
    {"cidr": "10.244.0.0/16"}]}"#;
const STATUS: &str = r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]}}"#;

/// The Node object, made again with this podCIDR: the API server lets no one change it.
fn put_node(cluster: &Cluster, cidr: &str) {
    cluster.api.kubectl(&["delete", "node", "cp", "--ignore-not-found"], "");
    let node = serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "cp"},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}});
    cluster.api.apply(&node.to_string());
    cluster.api.kubectl(&["patch", "node", "cp", "--subresource=status", "--type=merge", "-p", STATUS], "");
}

#[test]
fn a_node_has_the_podcidr_of_its_node_object_and_gives_it_up_with_it() {
    let cluster = Cluster::start("kubernetes_blocks");
    cluster.etcd.put("/meshd/config", CONFIG);
    let node = cluster.node_of("--cluster east");
    let beside = cluster.node_beside();
    beside.await_ready(SOON);
    let status = node.await_status("to wait for its block", SOON, |status| {
        status["problems"].as_array().is_some_and(|all| all.iter().any(|one| one["code"] == "awaiting_block"))
    });
    let cause = status["problems"].to_string();
    assert!(cause.contains("cluster east") && cause.contains("the Node cp") && cause.contains("192.0.2.10"), "{cause}");
    assert_ne!(status["state"], "running");
    await_ok("the node to be not ready", SOON, || {
        let alive = cluster.etcd.get_prefix("/meshd/alive/");
        if alive.iter().any(|(_, value)| value.contains("Kubernetes allocates")) {
            Ok(())
        } else {
            Err(format!("{alive:?}"))
        }
    });

    // A podCIDR outside of the cluster's network, and one that is another's, give it nothing; Events say why.
    let sync = cluster.sync(&[]);
    let await_event = |words: &[&str]| {
        await_ok("an Event on the Node", SOON, || {
            let events = cluster.api.kubectl(&["get", "events", "-o", "json"], "").stdout;
            let told = words.iter().all(|word| events.contains(word));
            if told { Ok(()) } else { Err(format!("{events}{}", sync.log())) }
        });
    };
    put_node(&cluster, "10.43.7.0/24");
    await_event(&["RefusedByMeshd", "10.43.7.0/24 is outside 10.42.0.0/16"]);
    cluster.etcd.put("/meshd/subnets/10.42.6.0-25", r#"{"Node": "0123456789abcdef"}"#);
    put_node(&cluster, "10.42.6.0/24");
    await_event(&["subnets/10.42.6.0-25 belongs to node 0123456789abcdef"]);
    let east =
        || -> Vec<String> { cluster.etcd.get_prefix("/meshd/subnets/10.4").into_iter().map(|(key, _)| key).collect() };
    assert_eq!(east(), ["/meshd/subnets/10.42.6.0-25"]);

    put_node(&cluster, "10.42.7.0/25");
    node.await_ready(SOON);
    assert_eq!(node.subnets(), ["10.42.7.0/25".parse().unwrap()]);
    let (pod, far) = (node.pod("pod"), beside.pod("far"));
    let reached = |what: &str| {
        await_ok(what, SOON, || if ping(&far, pod.v4()).answers.is_empty() { Err(node.log()) } else { Ok(()) });
    };
    reached("the pod to be reached");

    // The Node is made again with another podCIDR while its kubelet, the daemon and a pod live on.
    put_node(&cluster, "10.42.9.0/24");
    node.await_status("to have both blocks", SOON, |status| {
        status["subnets"].as_array().is_some_and(|subnets| subnets.len() == 2)
    });
    await_ok("new pods to get addresses of the new block", SOON, || match node.subnet_env("FLANNEL_SUBNET") {
        Some(subnet) if subnet == "10.42.9.1/24" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let old = "/meshd/subnets/10.42.7.0-25";
    assert!(cluster.etcd.get(old).is_some(), "a pod has an address of it");
    reached("the pod of the old block to be reached");
    node.host().ip(&[&format!("link delete {}", pod.host_interface().name())]);
    await_ok("the old block to go with its last pod", SOON, || {
        cluster.etcd.get(old).map_or(Ok(()), |value| Err(format!("{value}\n{}", sync.log())))
    });
    node.await_status("to have the new block only", SOON, |status| {
        status["subnets"] == serde_json::json!(["10.42.9.0/24"])
    });

    // Deleted while the daemon lives: nothing happens. Once that is gone too, the block is free.
    cluster.api.kubectl(&["delete", "node", "cp"], "");
    let block =
        || -> Value { serde_json::from_str(&cluster.etcd.get("/meshd/subnets/10.42.9.0-24").unwrap()).unwrap() };
    await_ok("the copy to lack the Node", SOON, || {
        if cluster.keys().iter().any(|key| key.starts_with("nodes/")) { Err("it is there".to_owned()) } else { Ok(()) }
    });
    assert!(block()["Freed"].is_null());
    node.kill9();
    await_ok("the block to be given up", SOON, || {
        let value = block();
        if value["Freed"]["cluster"] == "east" && value["Node"].is_null() { Ok(()) } else { Err(value.to_string()) }
    });
}
