use super::*;

fn name(text: &str) -> KubernetesName {
    text.parse().unwrap()
}

fn pod(rest: &str) -> Result<Pod, Violations> {
    let value = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web-0, namespace: shop}}\n{rest}");
    Pod::parse(&name("shop"), &name("web-0"), value.as_bytes())
}

fn ports(spec: &str) -> Vec<(String, &'static str, u16)> {
    let pod = pod(&format!("spec:\n{spec}")).unwrap();
    pod.ports.into_iter().map(|p| (p.name, p.protocol.as_str(), p.port)).collect()
}

#[test]
fn a_bare_pod_has_nothing_and_is_pending() {
    let pod = pod("").unwrap();
    assert_eq!((pod.phase, pod.host_network, pod.node_name), (PodPhase::Pending, false, None));
    assert!(pod.pod_ips.is_empty() && pod.ports.is_empty() && pod.labels.is_empty() && pod.uid.is_none());
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
        let pod = pod(&format!("status: {status}")).unwrap();
        pod.pod_ips.iter().map(ToString::to_string).collect::<Vec<_>>()
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
        assert_eq!(pod(&format!("status: {{phase: {phase}}}")).unwrap().is_finished(), finished, "{phase}");
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
    let pod = Pod::parse(&name("shop"), &name("web-0"), value.as_bytes());
    assert!(pod.is_ok(), "{pod:?}");
}

#[test]
fn an_object_of_another_place_is_refused() {
    let value = br#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web-0","namespace":"shop"}}"#;
    assert!(Pod::parse(&name("shop"), &name("web-0"), value).is_ok());
    for (ns, pod) in [("shop", "web-1"), ("other", "web-0")] {
        assert!(Pod::parse(&name(ns), &name(pod), value).is_err());
    }
    // A cluster-scoped kind may say its namespace as empty, as API machinery prints it at times.
    let namespace = |ns: &str| {
        let value =
            format!(r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"shop","namespace":{ns}}}}}"#);
        Namespace::parse(&name("shop"), value.as_bytes()).is_ok()
    };
    assert!(namespace("\"\"") && namespace("null"));
    assert!(!namespace("\"shop\""));
}

#[test]
fn a_policys_spec_is_kept_as_it_was_written() {
    let value = br#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy",
        "metadata":{"name":"p","namespace":"shop","uid":"u"},"spec":{"podSelector":{},"ingress":null,"later":[{}]}}"#;
    let policy = PolicyEnvelope::parse_network_policy(&name("shop"), &name("p"), value).unwrap();
    assert_eq!(policy.spec, serde_json::json!({"podSelector": {}, "ingress": null, "later": [{}]}));
    assert_eq!((policy.namespace, policy.uid), (Some(name("shop")), Some("u".into())));
}

#[test]
fn a_mirror_object_has_the_uid_of_its_static_pod() {
    let static_uid = |annotations: &str| {
        let value = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-0, namespace: shop, uid: u, annotations: {annotations}}}"
        );
        Pod::parse(&name("shop"), &name("web-0"), value.as_bytes()).unwrap().static_uid
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
            r#"{{"apiVersion":"policy.networking.k8s.io/{version}","kind":"ClusterNetworkPolicy","metadata":{{"name":"p"}},"spec":{{}}}}"#
        );
        PolicyEnvelope::parse_cluster_network_policy(&name("p"), value.as_bytes())
    };
    assert_eq!(parse("v1alpha2").unwrap(), parse("v1beta1").unwrap());
    for other in ["v1alpha1", "v1beta2", "v1", ""] {
        assert!(parse(other).is_err(), "{other}");
    }
}
