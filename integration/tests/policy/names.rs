//! What names prove. A pod's own node reaches it whatever its policies say; a name does not make a node that one. Nor
//! does a Pod's name and UID make a container that Pod.
//!
//! ```text
//!   edge (pod0) ─┐
//!   edge (pod1) ─┴─ switch ──── router ──── switch ── edge (pod2)
//!                                 │
//!                               store
//! ```

use std::{net::IpAddr, time::Duration};

use integration::{
    CniPod, Namespace, Ping, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{SOON, await_in_force, mesh, objects::put_policy, probe::Server, start::has_problem};

/// Whether one echo request is answered soon.
fn reaches(from: &Namespace, to: IpAddr) -> bool {
    Ping::new(to).count(1).wait(Duration::from_secs(1)).run(from).lost() == 0
}

#[test]
fn a_node_of_the_same_name_is_not_exempt_from_a_pods_policies() {
    let mut sites = TwoSites::with_hosts("one-name", 1);
    sites.east.add_host(&sites.lab);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.name("edge"));
    let pod = |nth: usize| {
        let of = json!({"pod": {"namespace": "shop", "name": format!("pod{nth}"), "labels": {}}});
        mesh.nodes[nth].cni("1.0.0", &of).pod(&format!("pod{nth}"))
    };
    let pods: Vec<CniPod> = (0..mesh.nodes.len()).map(pod).collect();
    // Every node and its pod send to every pod of another node: direct at the first two, else through the tunnel.
    let pairs = || (0..3).flat_map(|from| (0..3).map(move |to| (from, to))).filter(|(from, to)| from != to);
    let senders = |nth: usize| -> [(&str, &Namespace); 2] { [("node", mesh.nodes[nth].host()), ("pod", &pods[nth])] };
    for (from, to) in pairs() {
        for (what, sender) in senders(from) {
            for address in &pods[to].addresses {
                await_ok(&format!("{what} {from} to reach pod {to} at {address}"), SOON, || {
                    if reaches(sender, *address) { Ok(()) } else { Err("it does not".to_owned()) }
                });
            }
        }
    }
    put_policy(&mesh.etcd, "shop", "deny-all", &json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    await_in_force(&mesh);
    for (from, to) in pairs() {
        for (what, sender) in senders(from) {
            for address in &pods[to].addresses {
                assert!(!reaches(sender, *address), "{what} {from} reaches pod {to} at {address}");
            }
        }
    }
    for (nth, pod) in pods.iter().enumerate() {
        for address in &pod.addresses {
            await_ok(&format!("node {nth} to reach its own pod at {address}"), SOON, || {
                if reaches(mesh.nodes[nth].host(), *address) { Ok(()) } else { Err("it does not".to_owned()) }
            });
        }
        for (from, node) in mesh.nodes.iter().enumerate() {
            let address = node.overlay()[0].to_string();
            let said = mesh.nodes[nth].meshctl(&["policy", "explain", &address, &format!("shop/pod{nth}"), "tcp/80"]);
            assert_eq!(said.code(), Some(if from == nth { 0 } else { 6 }), "{from} to {nth}: {}", said.describe());
        }
    }
}

#[test]
fn a_container_gets_no_labels_of_a_pod_on_another_node() {
    let mesh = mesh("borrowed-labels", 1);
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    let db = json!({"pod": {"namespace": "shop", "name": "db", "labels": {"app": "db"}}});
    let db = west1.cni("1.0.0", &db).pod("db");
    let server = Server::start(&db, db.v4(), 5432);
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
    });
    put_policy(&mesh.etcd, "shop", "db", &spec);
    let put_client = |node: &str, addresses: &[IpAddr]| {
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": "client", "uid": "u-1", "labels": {"app": "client"}},
            "spec": {"nodeName": node}, "status": {"phase": "Running", "podIPs": ips},
        });
        mesh.etcd.put("/meshd/pods/shop/client", &object.to_string());
        await_in_force(&mesh);
    };
    // The Pod of west1, as a runtime of east1 claims to run it.
    put_client("west1", &[]);
    let of = |more: Value| east1.cni("1.0.0", &more).args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=client;K8S_POD_UID=u-1");
    let client = of(json!({})).pod("client");
    await_in_force(&mesh);
    server.assert_not_reached(&client);
    for node in [east1, west1] {
        node.await_status("to name the attachment", SOON * 3, |status| has_problem(status, "attachment_on_other_node"));
    }
    let status = west1.status();
    assert!(status.to_string().contains("shop/client on east1 (nodeName west1)"), "{status}");
    // East1's own Pod is reached by, also where the cluster calls that node otherwise.
    for (node, addresses) in [("east1", &[][..]), ("ip-10-0-0-1", &[]), ("west1", &client.addresses)] {
        put_client(node, addresses);
        server.assert_reached(&client);
        put_client("west1", &[]);
        server.assert_not_reached(&client);
    }
    put_client("east1", &[]);
    for node in [east1, west1] {
        node.await_status("to be well", SOON, |status| !has_problem(status, "attachment_on_other_node"));
    }
}

/// kubelet gives the runtime the hash of a static pod's manifest for its UID; its mirror object has another, and the
/// hash in annotations.
#[test]
fn an_attachment_without_its_pod_is_named_until_the_mirror_object_comes() {
    const HASH: &str = "5f4dcc3b5aa765d61d8327deb882cf99";
    let mesh = mesh("static-pod", 1);
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    let db = json!({"pod": {"namespace": "shop", "name": "db", "labels": {"app": "db"}}});
    let db = west1.cni("1.0.0", &db).pod("db");
    let server = Server::start(&db, db.v4(), 5432);
    let spec = json!({
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
    });
    put_policy(&mesh.etcd, "shop", "db", &spec);
    let arguments = format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=client;K8S_POD_UID={HASH}");
    let client = east1.cni("1.0.0", &json!({})).args(&arguments).pod("client");
    let ips: Vec<Value> = client.addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let put_client = |annotations: Value| {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "namespace": "shop", "name": "client", "uid": "u-1", "labels": {"app": "client"},
                "annotations": annotations,
            },
            "spec": {"nodeName": "east1"}, "status": {"phase": "Running", "podIPs": ips},
        });
        mesh.etcd.put("/meshd/pods/shop/client", &object.to_string());
        await_in_force(&mesh);
    };
    put_client(json!({"kubernetes.io/config.hash": HASH}));
    server.assert_not_reached(&client);
    let named =
        east1.await_status("to name the attachment", SOON, |status| has_problem(status, "attachment_without_pod"));
    assert!(named.to_string().contains(&format!("shop/client (UID {HASH})")), "{named}");
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(4));
    assert!(!has_problem(&west1.status(), "attachment_without_pod"), "{}", west1.status());

    put_client(json!({"kubernetes.io/config.hash": HASH, "kubernetes.io/config.mirror": HASH}));
    server.assert_reached(&client);
    east1.await_status("to be well", SOON, |status| !has_problem(status, "attachment_without_pod"));
}
