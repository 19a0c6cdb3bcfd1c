//! Node objects say whether the mesh connects their nodes.

use integration::{await_ok, topology::CONFIG};
use serde_json::Value;

use crate::{
    SOON,
    cluster::{Cluster, list},
};

const NODE: &str = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "cp"}, "spec": {"taints": [
    {"key": "meshd.io/agent-not-ready", "effect": "NoSchedule"}, {"key": "kept", "value": "x", "effect": "NoSchedule"}]}}"#;
const OTHER: &str = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "other"}, "spec": {"taints": [
    {"key": "meshd.io/agent-not-ready", "effect": "NoSchedule"}]}}"#;
const STATUS: &str = r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}],
    "conditions": [{"type": "Ready", "status": "True"}]}}"#;

/// What a Node says of its network: two conditions, and the keys of its taints.
fn says(node: &Value) -> (Option<&str>, Option<&str>, Vec<&str>) {
    let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let status = |of: &str| conditions.iter().find(|condition| condition["type"] == of)?["status"].as_str();
    // The API server adds taints of its own.
    let taints = node["spec"]["taints"].as_array().into_iter().flatten().filter_map(|taint| taint["key"].as_str());
    let taints = taints.filter(|key| !key.starts_with("node.kubernetes.io/")).collect();
    (status("NetworkUnavailable"), status("meshd.io/NetworkReady"), taints)
}

#[test]
fn a_node_that_the_mesh_connects_says_so_and_loses_its_taint() {
    let cluster = Cluster::start("kubernetes_conditions");
    cluster.etcd.put("/meshd/config", CONFIG);
    let api = &cluster.api;
    api.apply(&list([NODE.to_owned(), OTHER.to_owned()]));
    api.kubectl(&["patch", "node", "cp", "--subresource=status", "--type=merge", "-p", STATUS], "");
    let sync = cluster.sync(&[]);
    let await_connected = |what: &str| {
        await_ok(what, SOON, || {
            let nodes = api.list("nodes");
            let cp = nodes.iter().find(|node| node["metadata"]["name"] == "cp").unwrap();
            let conditions = &cp["status"]["conditions"];
            if says(cp) != (Some("False"), Some("True"), vec!["kept"]) {
                return Err(format!("{:?} {conditions}\n{}", says(cp), sync.log()));
            }
            assert!(conditions.as_array().unwrap().iter().any(|it| it["type"] == "Ready"), "{conditions}");
            let other = nodes.iter().find(|node| node["metadata"]["name"] == "other").unwrap();
            assert_eq!(says(other), (None, None, vec!["meshd.io/agent-not-ready"]), "a Node without meshd");
            Ok(())
        });
    };
    let _node = cluster.node();
    await_connected("the node to be connected");
    api.kubectl(&["taint", "node", "cp", "meshd.io/agent-not-ready=:NoSchedule"], "");
    let change = r#"{"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True"}]}}"#;
    api.kubectl(&["patch", "node", "cp", "--subresource=status", "-p", change], "");
    await_connected("what others changed to be undone");
}
