use std::{fs, time::Instant};

use api_types::Question;

use super::{check, explain, test};

const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: n1, containers: [{ports: [{name: pg, containerPort: 5432}]}]}
status: {phase: Running, podIP: 10.244.1.11}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: pg}]
";

fn question(source: &str, destination: &str, service: &str) -> Question {
    Question { source: source.into(), destination: destination.into(), service: service.into() }
}

#[test]
fn a_folder_answers() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), CLUSTER).unwrap();
    let web = r#"{"kind": "List", "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web",
        "namespace": "shop", "labels": {"app": "web"}}, "status": {"podIPs": [{"ip": "10.244.1.10"}]}}]}"#;
    fs::create_dir(folder.path().join("more")).unwrap();
    fs::write(folder.path().join("more/web.json"), web).unwrap();

    let said = explain(folder.path(), &question("shop/web", "shop/db", "tcp/5432")).unwrap();
    assert!(said.allowed, "{said:?}");
    assert_eq!((said.ingress.policy.as_deref(), said.ingress.rule), (Some("NetworkPolicy shop/db"), Some(0)));

    let said = explain(folder.path(), &question("shop/web", "shop/db", "tcp/80")).unwrap();
    assert!(!said.allowed && said.ingress.isolated && said.egress.allowed);
    assert!(said.ingress.nearest_miss.as_deref().is_some_and(|miss| miss.contains("TCP/pg")), "{said:?}");
    assert!(said.text().starts_with("denied\n"), "{}", said.text());

    let said = explain(folder.path(), &question("203.0.113.9", "10.244.1.11", "tcp/5432")).unwrap();
    assert!(!said.allowed);
    assert!(said.ingress.nearest_miss.as_deref().is_some_and(|miss| miss.contains("port matches")), "{said:?}");
    for (source, service) in [("shop/none", "tcp/1"), ("shop", "tcp/1"), ("shop/web", "tcp"), ("shop/web", "icmp/8")] {
        assert!(explain(folder.path(), &question(source, "shop/db", service)).is_err(), "{source} {service}");
    }
}

#[test]
fn a_policy_that_does_not_hold_isolates_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), CLUSTER.replace("[{port: pg}]", "[{port: 0}]")).unwrap();
    let said = explain(folder.path(), &question("203.0.113.9", "shop/db", "udp/53")).unwrap();
    assert!(!said.allowed && said.problems.len() == 1, "{said:?}");
    assert!(said.problems[0].contains("spec.ingress[0].ports[0].port"), "{said:?}");
}

/// Read as the daemon reads them.
#[test]
fn objects_of_a_raw_list_and_without_a_namespace_count_and_bad_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let list = r#"{"apiVersion": "v1", "kind": "PodList", "items": [
        {"metadata": {"name": "web", "namespace": "shop"}, "status": {"podIP": "10.244.1.10"}},
        {"metadata": {"name": "api"}, "status": {"podIP": "10.244.1.11"}},
        {"metadata": {"name": "bad"}, "spec": {"hostNetwork": "no"}, "status": {"podIP": "10.244.1.12"}}]}"#;
    fs::write(folder.path().join("a.json"), list).unwrap();
    let said = explain(folder.path(), &question("shop/web", "default/api", "tcp/80")).unwrap();
    assert!(said.allowed, "{said:?}");
    let expected = "Pod bad: spec.hostNetwork is \"no\": must be true or false; its labels are treated as unknown";
    assert_eq!(said.problems, [expected]);
}

#[test]
fn worlds_are_read_as_lines_and_as_yaml() {
    let folder = tempfile::tempdir().unwrap();
    let (lines, yaml) = (folder.path().join("a.jsonl"), folder.path().join("b.yaml"));
    let probe = r#"{"from":{"ip":"10.0.0.1"},"to":{"ip":"10.0.0.2"},"port":1,"expect":"EXPECT"}"#;
    let world =
        |name: &str, expect: &str| format!(r#"{{"name":"{name}","probes":[{}]}}"#, probe.replace("EXPECT", expect));
    fs::write(&lines, format!("{}\n{}\n", world("a", "allow"), world("b", "deny"))).unwrap();
    fs::write(
        &yaml,
        "name: c\nprobes:\n- {from: {ip: 10.0.0.1}, to: {ip: 10.0.0.2}, expect: allow}\n---\nname: d\nprobes: 7\n",
    )
    .unwrap();
    let tested = test(&[lines, yaml], Instant::now()).unwrap();
    assert_eq!((tested.worlds, tested.checked, tested.agrees()), (4, 4, false));
    let wrong: Vec<&str> = tested.differences.iter().map(|d| d.world.as_str()).collect();
    assert_eq!(wrong, ["b", "d"]);
    assert!(tested.text().ends_with("4 test cases, 4 expectations, 2 differences\n"));
    assert!(test(&[folder.path().join("none")], Instant::now()).is_err());
}

#[test]
fn a_policys_spec_is_checked_too() {
    let policy = |spec: serde_json::Value| {
        let object = serde_json::json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "shop", "name": "db"}, "spec": spec});
        check("networkpolicies/shop/db", object.to_string().as_bytes())
    };
    let summary = policy(serde_json::json!({"ingress": [{"ports": [{"port": 80}]}]})).unwrap().summary;
    let expected = "NetworkPolicy shop/db\npods {}\ningress: denied except\n  [0] any peer, TCP/80\negress: not restricted by this policy";
    assert_eq!(summary, expected);
    let error = policy(serde_json::json!({"ingress": [{"ports": [{"port": 80, "protocol": "tcp"}]}]})).unwrap_err();
    assert!(error.to_string().contains("spec.ingress[0].ports[0].protocol"), "{error}");
    let cluster = serde_json::json!({"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "c"}, "spec": {"tier": "Admin", "priority": 7}});
    assert!(check("clusternetworkpolicies/c", cluster.to_string().as_bytes()).is_err());
}
