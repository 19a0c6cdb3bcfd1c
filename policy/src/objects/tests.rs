use etcd_schema::Key;

use super::*;
use crate::object::Action;

fn key(text: &str) -> KubernetesKey {
    match Key::parse(text) {
        Ok(Key::Kubernetes(_, key)) => key,
        other => panic!("{other:?}"),
    }
}

fn read_pod(key_text: &str, value: impl AsRef<[u8]>) -> Result<PodObject, ObjectRefusal> {
    match read(&key(key_text), value.as_ref(), false)?.object {
        Object::Pod(pod) => Ok(pod),
        other => panic!("{other:?}"),
    }
}

fn pod(rest: &str) -> PodObject {
    let value = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web-0, namespace: shop}}\n{rest}");
    read_pod("pods/shop/web-0", value).unwrap()
}

fn ports(spec: &str) -> Vec<(String, &'static str, u16)> {
    let pod = pod(&format!("spec:\n{spec}"));
    pod.ports.into_iter().map(|p| (p.name.to_string(), p.protocol.as_str(), p.port)).collect()
}

#[test]
fn a_bare_pod_has_nothing() {
    assert_eq!(pod(""), PodObject::default());
}

#[test]
fn ports_are_of_containers_that_go_on_running() {
    let spec = "  containers:
  - ports: [{name: http, containerPort: 80}, {containerPort: 81}, {name: '', containerPort: 82}]
  - ports: [{name: http, containerPort: 8080, protocol: SCTP}]
  - {}
  initContainers:
  - ports: [{name: once, containerPort: 1}]
  - {restartPolicy: Always, ports: [{name: dns, containerPort: 53, protocol: UDP}]}
";
    let expected = [("http", "TCP", 80), ("http", "SCTP", 8080), ("dns", "UDP", 53)];
    assert_eq!(ports(spec), expected.map(|(n, p, port)| (n.to_owned(), p, port)));
}

#[test]
fn addresses_are_pod_ips_or_else_the_one() {
    let addresses = |status: &str| {
        let pod = pod(&format!("status: {status}"));
        pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        addresses("{podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}, {ip: 10.0.0.1}]}"),
        ["10.0.0.1", "fd00::1"]
    );
    assert_eq!(addresses("{podIP: 10.0.0.1}"), ["10.0.0.1"]);
    assert_eq!(addresses("{podIP: '', podIPs: []}"), [""; 0]);
}

#[test]
fn finished_pods_are_known() {
    for (phase, finished) in
        [("Pending", false), ("Running", false), ("Unknown", false), ("Succeeded", true), ("Failed", true)]
    {
        assert_eq!(pod(&format!("status: {{phase: {phase}}}")).finished, finished, "{phase}");
    }
}

#[test]
fn what_kubectl_prints_beside_is_no_hindrance() {
    // Managed fields have keys so long that they are written with a question mark, and null where there is nothing.
    let value = "apiVersion: v1
kind: Pod
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {\"apiVersion\":\"v1\",\"kind\":\"Pod\"}
    octal: \"0755\"
  creationTimestamp: null
  managedFields:
  - apiVersion: v1
    fieldsType: FieldsV1
    fieldsV1:
      f:metadata:
        f:annotations:
          .: {}
      f:status:
        f:podIPs:
          .: {}
          ? k:{\"ip\":\"10.244.3.5\",\"and\":\"something that makes the key longer than one hundred and twenty eight characters in all, as they may be\"}
          : .: {}
            f:ip: {}
  name: web-0
  namespace: shop
spec:
  containers:
  - args:
    - |
      several
      lines
    env:
    - name: A
      value: \"yes\"
    image: nginx
    name: web
    resources: {}
status: {}
";
    let pod = read_pod("pods/shop/web-0", value);
    assert!(pod.is_ok(), "{pod:?}");
}

#[test]
fn an_object_of_another_place_is_refused() {
    let value = br#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web-0","namespace":"shop"}}"#;
    assert!(read_pod("pods/shop/web-0", value).is_ok());
    for other in ["pods/shop/web-1", "pods/other/web-0"] {
        assert!(read_pod(other, value).is_err());
    }
    // A cluster-scoped kind may say its namespace as empty, as API machinery prints it at times.
    let namespace = |ns: &str| {
        let value =
            format!(r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"shop","namespace":{ns}}}}}"#);
        read(&key("namespaces/shop"), value.as_bytes(), false).is_ok()
    };
    assert!(namespace("\"\"") && namespace("null"));
    assert!(!namespace("\"shop\""));
}

#[test]
fn a_mirror_object_has_the_uid_of_its_static_pod() {
    let static_uid = |annotations: &str| {
        let value = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-0, namespace: shop, uid: u, annotations: {annotations}}}"
        );
        read_pod("pods/shop/web-0", value).unwrap().static_uid
    };
    let both = "{kubernetes.io/config.mirror: 5f, kubernetes.io/config.hash: 5f, kubernetes.io/config.source: file}";
    assert_eq!(static_uid(both).as_deref(), Some("5f"));
    for other in [
        "{}",
        "null",
        "{kubernetes.io/config.mirror: 5f}",
        "{kubernetes.io/config.hash: 5f}",
        "{kubernetes.io/config.mirror: 5f, kubernetes.io/config.hash: 60}",
        "{kubernetes.io/config.mirror: 5, kubernetes.io/config.hash: 5}",
        "{kubernetes.io/config.mirror: '', kubernetes.io/config.hash: ''}",
        "[no, object]",
    ] {
        assert_eq!(static_uid(other), None, "{other}");
    }
}

#[test]
fn cluster_network_policies_of_both_versions_are_one_kind() {
    let parse = |version: &str| {
        let value = format!(
            r#"{{"apiVersion":"policy.networking.k8s.io/{version}","kind":"ClusterNetworkPolicy","metadata":{{"name":"p"}},
                "spec":{{"tier":"Admin","priority":1,"subject":{{"namespaces":{{}}}}}}}}"#
        );
        read(&key("clusternetworkpolicies/p"), value.as_bytes(), false)
    };
    let [alpha, beta] = ["v1alpha2", "v1beta1"].map(|version| parse(version).unwrap());
    assert_eq!((alpha.object, alpha.canonical), (beta.object, beta.canonical));
    for other in ["v1alpha1", "v1beta2", "v1", ""] {
        assert!(parse(other).is_err(), "{other}");
    }
}

#[test]
fn the_canonical_form_says_the_same_and_no_more() {
    let pod = r#"{"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "db", "namespace": "shop", "uid": "u1", "labels": {"app": "db"}, "managedFields": [{}],
            "annotations": {"kubernetes.io/config.mirror": "5f", "kubernetes.io/config.hash": "5f", "a": "b"}},
        "spec": {"nodeName": "n1", "initContainers": [{"restartPolicy": "Always",
            "ports": [{"name": "metrics", "containerPort": 9100}]}],
            "containers": [{"image": "x", "ports": [{"name": "pg", "containerPort": 5432, "protocol": "TCP"}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.10"}, {"ip": "fd42:244:0:1::10"}]}}"#;
    let policy = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop", "annotations": {"a": "b"}},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}}"#;
    let namespace = r#"{"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "annotations": {}, "labels": {"a": "b"}}}"#;
    let node = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"a": "b"}},
        "spec": {"podCIDR": "10.244.1.0/24"}, "status": {"addresses": [{"type": "Hostname", "address": "n1"},
        {"type": "InternalIP", "address": "192.0.2.1"}]}}"#;
    for (name, value) in [
        ("pods/shop/db", pod),
        ("networkpolicies/shop/p", policy),
        ("namespaces/shop", namespace),
        ("k8s/east/nodes/n1", node),
    ] {
        let first = read(&key(name), value.as_bytes(), false).unwrap();
        let again = read(&key(name), &first.canonical, false).unwrap();
        assert_eq!((&first.object, &first.canonical), (&again.object, &again.canonical));
        assert!(first.canonical.len() < value.len());
    }
}

#[test]
fn an_unreadable_policy_isolates_whom_it_can_be_seen_to_select() {
    let policy = |spec: &str, name: &str| {
        format!(
            r#"{{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {{"name": "{name}", "namespace": "shop"}}, "spec": {spec}}}"#
        )
    };
    let key = key("networkpolicies/shop/p");
    let stand_in =
        |value: &str, rewritten| read(&key, value.as_bytes(), rewritten).unwrap_err().stand_in.map(|object| *object);
    let isolates = |object: Option<Object>, ingress, egress| match object {
        Some(Object::NetworkPolicy(PolicyState::Isolates(_, directions))) => {
            assert_eq!((directions.ingress, directions.egress), (ingress, egress));
        }
        other => panic!("{other:?}"),
    };
    let bad_port = r#"{"podSelector": {}, "egress": [{"ports": [{"port": 0}]}]}"#;
    isolates(stand_in(&policy(bad_port, "p"), false), true, true);
    isolates(stand_in(&policy(r#"{"podSelector": {}, "frob": 1}"#, "p"), false), true, false);
    isolates(stand_in(&policy(r#"{"podSelector": {}}"#, "another"), false), true, false);
    for nothing in ["not an object: [", r#"{"kind": "NetworkPolicy"}"#, &policy("7", "p")] {
        assert_eq!(stand_in(nothing, false), None, "{nothing}");
        assert_eq!(stand_in(nothing, true), Some(Object::NetworkPolicy(PolicyState::IsolatesNamespace)));
    }
}

#[test]
fn a_cluster_policy_of_an_unknown_version_denies_its_subject_everything() {
    let key = key("clusternetworkpolicies/p");
    let policy = |version: &str, spec: &str| {
        format!(
            r#"{{"apiVersion": "policy.networking.k8s.io/{version}", "kind": "ClusterNetworkPolicy",
            "metadata": {{"name": "p"}}, "spec": {spec}}}"#
        )
    };
    let spec = r#"{"tier": "Admin", "priority": 5, "subject": {"namespaces": {}},
        "ingress": [{"action": "Accept", "from": [{"namespaces": {}}]}]}"#;
    let stand_in = |value: String| read(&key, value.as_bytes(), true).unwrap_err().stand_in.map(|object| *object);
    for spec in [spec.to_owned(), spec.replace("Accept", "Audit"), spec.replace("\"ingress\"", "\"inbound\"")] {
        let Some(Object::ClusterNetworkPolicy(policy)) = stand_in(policy("v3", &spec)) else { panic!("{spec}") };
        for rules in [&policy.ingress, &policy.egress] {
            assert!(matches!(&rules[..], [rule] if rule.action == Action::Deny && rule.peers.is_none()), "{policy:?}");
        }
        assert_eq!(policy.priority, 5);
        let told = effect(&key, Some(&Object::ClusterNetworkPolicy(policy)));
        assert!(told.starts_with("everything"), "{told}");
    }
    assert_eq!(stand_in(policy("v3", &spec.replace("subject", "target"))), None);
}
