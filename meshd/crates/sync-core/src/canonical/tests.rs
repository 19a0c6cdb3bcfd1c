use etcd_schema::Key;
use policy::{object::PodObject, objects};

use super::*;

fn text(object: &CanonicalObject) -> &str {
    std::str::from_utf8(&object.value).unwrap()
}

/// What the nodes read of it; else the fields of what they refuse.
fn nodes_read(key: &str, value: &[u8]) -> Result<objects::Object, Vec<String>> {
    let Ok(Key::Kubernetes(_, key)) = Key::parse(&format!("k8s/east/{key}")) else { panic!("{key}") };
    let fields =
        |refusal: objects::ObjectRefusal| refusal.violations.as_slice().iter().map(|v| v.field.clone()).collect();
    objects::read(&key, value, false).map(|reading| reading.object).map_err(fields)
}

fn pod_read(value: &[u8]) -> PodObject {
    match nodes_read("pods/shop/db-0", value) {
        Ok(objects::Object::Pod(pod)) => pod,
        other => panic!("{other:?}"),
    }
}

const POD: &str = r#"{"metadata": {"name": "db-0", "namespace": "shop", "uid": "u1", "resourceVersion": "77",
    "labels": {"tier": "data", "app": "db"}, "managedFields": [{"manager": "kubelet"}],
    "annotations": {"a": "b", "kubernetes.io/config.mirror": "5f", "kubernetes.io/config.hash": "5f"}},
  "spec": {"nodeName": "e1", "hostNetwork": false,
    "initContainers": [{"name": "once", "ports": [{"name": "no", "containerPort": 1}]},
      {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "admin", "containerPort": 9901, "protocol": "TCP"}]}],
    "containers": [{"name": "db", "image": "x", "ports": [{"containerPort": 80}, {"name": "pg", "containerPort": 5432}]}]},
  "status": {"phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00::5"}],
    "conditions": [{"type": "Ready"}]}}"#;

#[test]
fn a_pod_keeps_what_policies_need_in_one_order() {
    let pod = read(ObjectKind::Pod, "v1", POD).unwrap();
    assert_eq!((pod.path.as_str(), pod.resource_version.as_str(), pod.verbatim), ("shop/db-0", "77", false));
    assert_eq!(
        text(&pod),
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"db-0","namespace":"shop","uid":"u1","labels":{"app":"db","tier":"data"},"annotations":{"kubernetes.io/config.hash":"5f","kubernetes.io/config.mirror":"5f"}},"spec":{"nodeName":"e1","containers":[{"ports":[{"name":"pg","containerPort":5432}]},{"ports":[{"name":"admin","protocol":"TCP","containerPort":9901}]}]},"status":{"phase":"Running","podIPs":[{"ip":"10.1.0.5"},{"ip":"fd00::5"}]}}"#
    );
    // What the nodes read of it is what they would read of the whole.
    let whole = POD.replacen('{', r#"{"apiVersion": "v1", "kind": "Pod", "#, 1);
    assert_eq!(pod_read(&pod.value), pod_read(whole.as_bytes()));
    // Conditions, managed fields and resource versions change nothing.
    let later = POD.replace("\"77\"", "\"78\"").replace("Ready", "Initialized").replace("kubelet", "kubectl");
    assert_eq!(read(ObjectKind::Pod, "v1", &later).unwrap().value, pod.value);
}

#[test]
fn terminated_pods_and_those_of_the_host_have_no_addresses() {
    for (from, to) in
        [("Running", "Succeeded"), ("Running", "Failed"), ("\"hostNetwork\": false", "\"hostNetwork\": true")]
    {
        let pod = read(ObjectKind::Pod, "v1", &POD.replace(from, to)).unwrap();
        let pod = pod_read(&pod.value);
        assert!(pod.addresses.is_empty() && (pod.host_network || pod.finished), "{to}");
    }
    let old = POD.replace(r#""podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00::5"}]"#, r#""podIPs": []"#);
    let pod = pod_read(&read(ObjectKind::Pod, "v1", &old).unwrap().value);
    assert_eq!((pod.addresses.len(), pod.finished), (1, false));
}

#[test]
fn policies_keep_their_spec_as_it_is() {
    let json = r#"{"apiVersion": "networking.k8s.io/v1", "metadata": {"name": "web", "namespace": "shop", "uid": "u2",
        "resourceVersion": "9", "generation": 3, "labels": {"a": "b"}}, "spec": {"podSelector":{},"frob":1.50}}"#;
    let policy = read(ObjectKind::NetworkPolicy, "networking.k8s.io/v1", json).unwrap();
    assert_eq!(
        text(&policy),
        r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"web","namespace":"shop","uid":"u2"},"spec":{"podSelector":{},"frob":1.50}}"#
    );
    assert_eq!(nodes_read("networkpolicies/shop/web", &policy.value), Err(vec!["spec.frob".to_owned()]));
    let json =
        r#"{"metadata": {"name": "deny"}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}}"#;
    let version = "policy.networking.k8s.io/v1beta1";
    let policy = read(ObjectKind::ClusterNetworkPolicy, version, json).unwrap();
    assert_eq!(policy.path, "deny");
    assert!(nodes_read("clusternetworkpolicies/deny", &policy.value).is_ok());
}

#[test]
fn namespaces_and_nodes() {
    let json = r#"{"metadata": {"name": "shop", "uid": "u", "labels": {"team": "a"}}, "spec": {"finalizers": ["x"]},
        "status": {"phase": "Active"}}"#;
    let namespace = read(ObjectKind::Namespace, "v1", json).unwrap();
    assert_eq!(
        text(&namespace),
        r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop","uid":"u","labels":{"team":"a"}}}"#
    );
    assert!(nodes_read("namespaces/shop", &namespace.value).is_ok());
    let json = r#"{"metadata": {"name": "e1", "uid": "u", "labels": {"topology.kubernetes.io/zone": "east"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00::/64"], "taints": []},
        "status": {"addresses": [{"type": "Hostname", "address": "e1"}, {"type": "InternalIP", "address": "192.0.2.1"}],
            "images": [{}]}}"#;
    let node = read(ObjectKind::Node, "v1", json).unwrap();
    assert_eq!(
        text(&node),
        r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"e1","uid":"u","labels":{"topology.kubernetes.io/zone":"east"}},"spec":{"podCIDRs":["10.1.0.0/24","fd00::/64"]},"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}"#
    );
}

#[test]
fn what_cannot_be_read_is_copied_as_it_is() {
    let odd = r#"{"metadata": {"name": "x", "namespace": "shop", "resourceVersion": "5"}, "spec": {"containers": 7}}"#;
    let pod = read(ObjectKind::Pod, "v1", odd).unwrap();
    assert_eq!((text(&pod), pod.verbatim, pod.path.as_str()), (odd, true, "shop/x"));
    for nameless in [
        r#"{"metadata": {}}"#,
        r#"{"metadata": {"name": "x"}}"#,
        r#"{"metadata": {"name": "a/b", "namespace": "shop"}}"#,
        r#"{"metadata": {"name": "", "namespace": "shop"}}"#,
        "[]",
    ] {
        assert!(read(ObjectKind::Pod, "v1", nameless).is_err(), "{nameless}");
    }
    assert!(read(ObjectKind::Namespace, "v1", r#"{"metadata": {"name": "x", "namespace": "shop"}}"#).is_err());
}

#[test]
fn what_etcd_would_refuse_for_its_length_is_an_object_that_the_nodes_refuse() {
    let long = format!(
        r#"{{"metadata": {{"name": "web", "namespace": "shop"}}, "spec": {{"podSelector": {{}}, "x": "{}"}}}}"#,
        "y".repeat(MAX_VALUE)
    );
    let policy = read(ObjectKind::NetworkPolicy, "networking.k8s.io/v1", &long).unwrap();
    assert!(policy.value.len() < 200);
    assert!(nodes_read("networkpolicies/shop/web", &policy.value).is_err());
    let spec: Value = serde_json::from_slice(&policy.value).unwrap();
    assert_eq!(spec["spec"], serde_json::json!({"podSelector": {}, "tooLong": true}));
    let egress = long.replace("\"x\"", "\"egress\": [], \"x\"");
    let policy = read(ObjectKind::NetworkPolicy, "networking.k8s.io/v1", &egress).unwrap();
    assert!(text(&policy).contains(r#""policyTypes":["Ingress","Egress"]"#), "{}", text(&policy));
    let long_selector = long.replace("podSelector", "z").replace("\"x\"", "\"podSelector\"");
    let policy = read(ObjectKind::NetworkPolicy, "networking.k8s.io/v1", &long_selector).unwrap();
    assert!(policy.value.len() < 200 && nodes_read("networkpolicies/shop/web", &policy.value).is_err());
}
