//! From kubectl to a node: a policy is in force there, and no longer when it is deleted.

use integration::{Output, await_ok, topology::CONFIG};

use crate::{
    SOON,
    cluster::{Cluster, list, namespace},
    copy::POLICY,
};

const NODE: &str = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "cp"}}"#;
const STATUS: &str = r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]}}"#;

#[test]
fn a_policy_put_by_kubectl_is_in_force_on_a_node_until_it_is_deleted() {
    let cluster = Cluster::start("kubernetes_enforced");
    cluster.etcd.put("/meshd/config", CONFIG);
    let node = cluster.node();
    node.await_ready(SOON);
    let api = &cluster.api;
    api.apply(&list([namespace("shop", "a"), NODE.to_owned(), POLICY.to_owned()]));
    api.kubectl(&["patch", "node", "cp", "--subresource=status", "--type=merge", "-p", STATUS], "");
    let sync = cluster.sync(&[]);
    let shown = |what: &str, wanted: fn(&Output) -> bool| {
        await_ok(what, SOON, || {
            let shown = node.meshctl(&["policy", "show", "east:shop/web"]);
            if wanted(&shown) { Ok(()) } else { Err(format!("{}{}", shown.describe(), sync.log())) }
        });
    };
    shown("the policy to be in force", Output::success);
    // Valid for the API server, and refused by nodes.
    let block = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "mapped", "namespace": "shop"},
        "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}}]}]}}"#;
    api.apply(block);
    await_ok("an Event on the refused policy", SOON, || {
        let events = api.kubectl(&["get", "events", "-n", "shop", "-o", "json"], "").stdout;
        let told = ["RefusedByMeshd", "\"name\": \"mapped\"", "isolated"].iter().all(|word| events.contains(word));
        if told { Ok(()) } else { Err(format!("{events}{}", sync.log())) }
    });
    api.kubectl(&["delete", "networkpolicy", "mapped", "-n", "shop"], "");
    api.kubectl(&["delete", "networkpolicy", "web", "-n", "shop"], "");
    shown("the policy to be gone", |shown| shown.code() == Some(5));
    cluster.await_copy(false);
    let status = node.status();
    assert_eq!(status["problems"].as_array().map(Vec::len), Some(0), "{status}");
}
