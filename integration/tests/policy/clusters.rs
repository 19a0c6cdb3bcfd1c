//! Two Kubernetes clusters in one mesh, with equal names of namespaces, pods and policies.
//!
//! ```text
//!   east1 (db)  ─┬─ switch ─ router ─ switch ─┬─ west1 (web)
//!   east2 (web) ─┘                            └─ west2 (db)
//! ```

use integration::{Pod, await_ok, topology::Mesh};
use serde_json::{Value, json};

use crate::{SOON, await_in_force, mesh, probe::Server, start::has_problem};

const PORT: u16 = 5432;
/// The pods: cluster, node with its site and number there, name.
const PODS: [(&str, &str, usize, &str); 4] =
    [("east", "east1", 0, "db"), ("east", "east2", 1, "web"), ("west", "west1", 0, "web"), ("west", "west2", 1, "db")];

pub(crate) fn put(mesh: &Mesh, cluster: &str, key: &str, mut object: Value) {
    let name = key.rsplit('/').next().unwrap();
    object["metadata"]["name"] = name.into();
    mesh.etcd.put(&format!("/meshd/k8s/{cluster}/{key}"), &object.to_string());
}

fn put_node(mesh: &Mesh, (cluster, node, number, _): (&str, &str, usize, &str)) {
    let site = if cluster == "east" { &mesh.sites.east } else { &mesh.sites.west };
    let addresses = json!([{"type": "InternalIP", "address": site.v4(number)}]);
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {}, "status": {"addresses": addresses}});
    put(mesh, cluster, &format!("nodes/{node}"), object);
}

/// A Pod object of `cluster` with the addresses of the pod on `at`.
pub(crate) fn put_pod(mesh: &Mesh, cluster: &str, (name, app): (&str, &str), at: &str) {
    let ips: Vec<Value> = mesh.pod(at).addresses().iter().map(|ip| json!({"ip": ip})).collect();
    let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "labels": {"app": app}},
        "spec": {"nodeName": at}, "status": {"phase": "Running", "podIPs": ips}});
    put(mesh, cluster, &format!("pods/shop/{name}"), object);
}

fn put_policy(mesh: &Mesh, cluster: &str, name: &str, spec: &Value) {
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop"}, "spec": spec});
    put(mesh, cluster, &format!("networkpolicies/shop/{name}"), object);
    await_in_force(mesh);
}

/// Of pods `app=APP`, in one direction: only with `app=PEER`, of the clusters that `operator` and `values` name.
fn spec(app: &str, direction: &str, peer: &str, clusters: Option<Value>) -> Value {
    let mut other = json!({"podSelector": {"matchLabels": {"app": peer}}});
    if let Some(expression) = clusters {
        other["namespaceSelector"] = json!({"matchExpressions": [expression]});
    }
    let rules = if direction == "Ingress" { ("ingress", "from") } else { ("egress", "to") };
    json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [direction], (rules.0): [{(rules.1): [other]}]})
}

fn of_clusters(operator: &str, values: &[&str]) -> Option<Value> {
    let mut expression = json!({"key": "meshd.io/cluster", "operator": operator});
    if !values.is_empty() {
        expression["values"] = json!(values);
    }
    Some(expression)
}

#[test]
fn equal_names_of_two_clusters_are_two_pods_and_their_policies_meet_their_own() {
    let mesh = mesh("policy-clusters", 2);
    for pod in PODS {
        put_node(&mesh, pod);
        put_pod(&mesh, pod.0, (pod.3, pod.3), pod.1);
    }
    await_in_force(&mesh);
    let [db, near, far, other] = PODS.map(|(_, node, ..)| mesh.pod(node));
    let server = |pod: &Pod| -> Vec<Server> {
        pod.addresses().iter().map(|address| Server::start(pod, *address, PORT)).collect()
    };
    let (servers, others) = (server(db), server(other));
    let reached = |servers: &[Server], from| servers.iter().for_each(|server| server.assert_reached(from));
    let refused = |servers: &[Server], from| servers.iter().for_each(|server| server.assert_not_reached(from));

    // A packet with the peer's namespace, name and labels, of the other cluster: by the tunnel. The own one goes direct.
    put_policy(&mesh, "east", "db", &spec("db", "Ingress", "web", None));
    reached(&servers, near);
    refused(&servers, far);
    // Nor does the policy say anything of the other cluster's pods.
    reached(&others, far);
    reached(&others, near);

    // By the label both may, or one of them.
    put_policy(&mesh, "east", "db", &spec("db", "Ingress", "web", of_clusters("Exists", &[])));
    reached(&servers, far);
    reached(&servers, near);
    put_policy(&mesh, "east", "db", &spec("db", "Ingress", "web", of_clusters("In", &["west"])));
    refused(&servers, near);
    reached(&servers, far);
    // An object of the other cluster with the address of a pod of this one makes it none of the other's.
    put_pod(&mesh, "west", ("thief", "web"), "east2");
    await_in_force(&mesh);
    refused(&servers, near);

    // The other direction: what may be received here may not be sent there.
    put_policy(&mesh, "west", "db", &spec("web", "Egress", "db", None));
    refused(&servers, far);
    reached(&others, far);
    put_policy(&mesh, "west", "db", &spec("web", "Egress", "db", of_clusters("NotIn", &["west"])));
    reached(&servers, far);
    refused(&others, far);

    told(&mesh);

    // Without its Node object the node is in no cluster, and which cluster its pods are of is not known.
    mesh.etcd.del("/meshd/k8s/east/nodes/east1");
    await_in_force(&mesh);
    refused(&servers, far);
    refused(&servers, near);
    put_node(&mesh, PODS[0]);
    await_in_force(&mesh);
    reached(&servers, far);
    refused(&servers, near);
}

/// What operators are told of it.
fn told(mesh: &Mesh) {
    let east1 = mesh.node("east1");
    let service = format!("tcp/{PORT}");
    let explained = east1.meshctl(&["policy", "explain", "east:shop/web", "east:shop/db", &service]);
    assert_eq!(explained.code(), Some(6), "{explained:?}");
    assert!(explained.stdout.contains("isolated by NetworkPolicy east:shop/db"), "{explained:?}");
    let ambiguous = east1.meshctl(&["policy", "explain", "shop/web", "east:shop/db", &service]);
    assert!(ambiguous.stderr.contains("east:shop/web or west:shop/web"), "{ambiguous:?}");
    let listed = east1.try_json(&["policy", "list"]).unwrap();
    let clusters: Vec<&str> = listed.as_array().unwrap().iter().map(|p| p["cluster"].as_str().unwrap()).collect();
    assert_eq!(clusters, ["east", "west"]);
    await_ok("flows to name the cluster", SOON, || {
        let flows = east1.meshctl(&["flows"]).stdout;
        if flows.contains("west:shop/web") { Ok(()) } else { Err(flows) }
    });
    // How far the copy of a cluster is.
    let state = json!({"currentAt": 0, "counts": {"pods": 2}, "held": []});
    mesh.etcd.put("/meshd/k8s/east/state", &state.to_string());
    await_ok("status to show the copy", SOON, || {
        let copies = east1.status()["copies"].clone();
        let is_shown = copies[0]["cluster"] == "east" && copies[0]["objects"]["pods"] == 2;
        if is_shown && copies[0]["ageSeconds"].as_u64() > Some(60) { Ok(()) } else { Err(copies.to_string()) }
    });
    let shown = east1.meshctl(&["status"]).stdout;
    assert!(shown.contains("copy      cluster east: ") && shown.contains(" old, 2 pods"), "{shown}");
    mesh.etcd.del("/meshd/k8s/east/state");
    // The same object flat is reported, with the command that deletes it.
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    put(mesh, "east", "namespaces/shop", object.clone());
    mesh.etcd.put("/meshd/namespaces/shop", &object.to_string());
    let twice = || {
        let problems = east1.status()["problems"].as_array().cloned().unwrap_or_default();
        problems.into_iter().find(|problem| problem["code"] == "object_stored_twice")
    };
    await_ok("the object to be reported", SOON, || twice().ok_or_else(|| "no such problem".to_owned()));
    assert_eq!(twice().unwrap()["remedy"], "etcdctl del /meshd/namespaces/shop # if the flat ones are left over");
    mesh.etcd.del("/meshd/namespaces/shop");
    await_ok("the problem to be gone", SOON, || if twice().is_none() { Ok(()) } else { Err("it stays".to_owned()) });
}

/// A container of a cluster whose objects are copied is not ready before its labels are in force.
#[test]
fn an_add_waits_for_its_pod_object() {
    let mesh = mesh("pod-wait", 1);
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    put_node(&mesh, PODS[0]);
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "uid": "u-1"},
        "spec": {"nodeName": "east1"}, "status": {"phase": "Pending"}});
    await_in_force(&mesh);
    let network = east1.cni("1.0.0", &json!({})).args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u-1");
    let namespace = network.namespace("web");
    let attached = || {
        let known = cni::daemon::DaemonClient::new(east1.run_dir()).attachments().unwrap();
        known.into_iter().any(|one| one.attach.is_some())
    };
    std::thread::scope(|scope| {
        let add = scope.spawn(|| network.add("web", &namespace));
        await_ok(
            "the container to be attached",
            SOON,
            || if attached() { Ok(()) } else { Err("it is not".to_owned()) },
        );
        assert!(!add.is_finished(), "ADD is over before the Pod object is there");
        put(&mesh, "east", "pods/shop/web", pod);
        add.join().unwrap().unwrap_or_else(|failure| panic!("{failure}"));
    });
    assert!(!has_problem(&east1.status(), "attachment_without_pod"));
    // Where no objects are copied, none waits; where one does not come, it starts all the same.
    let args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=other;K8S_POD_UID=u-2";
    for node in [west1, east1] {
        let _started = node.cni("1.0.0", &json!({})).args(args).pod("other");
    }
}
