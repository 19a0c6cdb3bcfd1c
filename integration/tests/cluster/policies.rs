//! Policies as users put, change and delete them, and what else decides whom they select.

use std::time::Duration;

use integration::{ProxyMode, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON,
    fixture::{Cluster, NAME},
    workload::{IMAGE, PORT, Probe, container, now, pod},
};

/// Of few addresses each, so that they are used again soon.
const SMALL: &str = r#"{"Network": "10.244.0.0/16", "SubnetLen": 28, "Backend": {"Type": "wireguard"}}"#;

#[test]
fn policies_follow_kubectl() {
    let cluster = Cluster::start("cluster-policies", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&[pod("shop", "web", "web", "west1"), pod("shop", "client", "client", "east1")]);
    cluster.await_pods("shop", 2);
    let web = cluster.address("shop", "web");
    let url = format!("{web}:{PORT}/hostname");
    cluster.await_answer("shop", "client", &url, "web");
    let probe = cluster.probe("shop", "client", &url);
    let step = |what: &str, answered: bool, change: &dyn Fn()| measure(&probe, what, answered, change);

    step("a policy put", false, &|| {
        cluster.apply(&[policy(&json!([{"podSelector": {"matchLabels": {"app": "buyer"}}}]))])
    });
    step("a label added", true, &|| label(&cluster, "pod client -n shop app=buyer"));
    step("a label taken away", false, &|| label(&cluster, "pod client -n shop app-"));
    step("a policy changed", true, &|| cluster.apply(&[policy(&json!([{"namespaceSelector": {}}]))]));
    step("a policy made closer", false, &|| cluster.apply(&[policy(&in_namespaces("team", "a"))]));
    step("a namespace labelled", true, &|| label(&cluster, "namespace shop team=a"));
    step("a namespace's label changed", false, &|| label(&cluster, "namespace shop team=b"));
    step("a policy deleted", true, &|| drop(cluster.kubectl("-n shop delete networkpolicy web")));

    namespace_deleted(&cluster, &url);
    cluster.sniffer.assert_clean();
}

/// Makes a change, and prints how long it took until a request went by it, from when kubectl began.
#[track_caller]
pub(crate) fn measure(probe: &Probe, what: &str, answered: bool, change: &dyn Fn()) -> Duration {
    let since = now();
    change();
    let said = now() - since;
    let took = probe.await_change(what, since, answered);
    println!("{what}: in force {took:?} after kubectl began, which took {said:?}");
    took
}

/// Everything of a namespace goes with it, also from etcd; a policy of another namespace that named it lets it in no
/// more.
#[track_caller]
fn namespace_deleted(cluster: &Cluster, url: &str) {
    cluster.create_namespace("guests");
    label(cluster, "namespace guests team=guests");
    cluster.apply(&[pod("guests", "guest", "guest", "east2"), policy(&in_namespaces("team", "guests"))]);
    cluster.apply(&[in_namespace(policy(&json!([{"podSelector": {}}])), "guests")]);
    cluster.await_pods("guests", 1);
    cluster.await_answer("guests", "guest", url, "web");
    assert!(!keys(cluster, "guests").is_empty());
    cluster.kubectl("delete namespace guests");
    await_ok("the namespace's keys to be deleted", SOON, || {
        let keys = keys(cluster, "guests");
        if keys.is_empty() { Ok(()) } else { Err(format!("{keys:?}")) }
    });
}

/// The copied keys that are about a namespace.
fn keys(cluster: &Cluster, namespace: &str) -> Vec<String> {
    let keys = cluster.etcd().get_prefix(&format!("/meshd/k8s/{NAME}/")).into_iter().map(|(key, _)| key);
    keys.filter(|key| key.split('/').any(|part| part == namespace)).collect()
}

#[test]
fn addresses_of_ended_pods_mean_who_has_them_now() {
    let cluster = Cluster::start_with("cluster-jobs", ProxyMode::Iptables, SMALL);
    cluster.create_namespace("shop");
    cluster.apply(&[
        pod("shop", "web", "web", "west1"),
        policy(&json!([{"podSelector": {"matchLabels": {"app": "job"}}}])),
    ]);
    cluster.await_pods("shop", 1);
    let url = format!("{}:{PORT}/hostname", cluster.address("shop", "web"));

    // The Job's pod may ask; it succeeds by that, and its object stays.
    cluster.apply(&[job(&url)]);
    cluster.kubectl("-n shop wait --for=condition=Complete job/ask --timeout=50s");
    let ended = cluster.pods("shop").into_iter().find(|pod| pod["status"]["phase"] == "Succeeded").unwrap();
    let address = ended["status"]["podIPs"][0]["ip"].as_str().unwrap().to_owned();

    // Another pod gets its address, and may not.
    let again = reuse(&cluster, &address);
    println!("the Job's address {address} has been given to {again}");
    let refused = cluster.ask("shop", &again, &url);
    assert!(refused.is_err(), "{again} has a Job's address and gets {refused:?}");
    label(&cluster, &format!("pod {again} -n shop app=job"));
    cluster.await_answer("shop", &again, &url, "web");
    cluster.sniffer.assert_clean();
}

/// Starts pods on the Job's node until one has its address.
#[track_caller]
fn reuse(cluster: &Cluster, address: &str) -> String {
    for number in 0..60 {
        let name = format!("other{number}");
        cluster.apply(&[pod("shop", &name, "other", "east1")]);
        let own = await_ok("an address", SOON, || {
            let pod = cluster.get(&format!("pod -n shop {name}"));
            pod["status"]["podIPs"][0]["ip"].as_str().map(str::to_owned).ok_or_else(|| pod["status"].to_string())
        });
        if own == address {
            cluster.kubectl(&format!("-n shop wait --for=condition=Ready pod/{name} --timeout=50s"));
            return name;
        }
        cluster.kubectl(&format!("-n shop delete pod {name} --wait=false"));
    }
    panic!("{address} has not been given again");
}

pub(crate) fn label(cluster: &Cluster, what: &str) {
    cluster.kubectl(&format!("label --overwrite {what}"));
}

/// Of `app=web` in `shop`: in from these peers only.
pub(crate) fn policy(from: &Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": from, "ports": [{"port": "http"}]}]}})
}

fn in_namespaces(key: &str, value: &str) -> Value {
    json!([{"namespaceSelector": {"matchLabels": {key: value}}}])
}

fn in_namespace(mut object: Value, namespace: &str) -> Value {
    object["metadata"]["namespace"] = namespace.into();
    object
}

/// A Job whose pod on east1 asks until it is answered.
fn job(url: &str) -> Value {
    let script = format!("until curl -sS -m 2 http://{url}; do sleep 0.2; done");
    let ask = json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script]});
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "shop", "name": "ask"},
        "spec": {"template": {"metadata": {"labels": {"app": "job"}}, "spec": {"restartPolicy": "Never",
            "nodeSelector": {"kubernetes.io/hostname": "east1"}, "containers": [ask]}}}})
}

#[test]
fn static_pods_are_as_their_objects_say() {
    let cluster = Cluster::start("cluster-static", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&[pod("shop", "client", "client", "east1")]);
    let manifest = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": "static", "labels": {"app": "web"}},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [container()]}});
    cluster.node("west1").sh(&format!("cat > /etc/kubernetes/manifests/web.yaml <<'.'\n{manifest}\n."));
    cluster.await_pods("shop", 2);
    let url = format!("{}:{PORT}/hostname", cluster.address("shop", "static-west1"));
    cluster.await_answer("shop", "client", &url, "static-west1");
    let probe = cluster.probe("shop", "client", &url);
    measure(&probe, "a policy on a static pod", false, &|| {
        cluster.apply(&[policy(&json!([{"podSelector": {"matchLabels": {"app": "buyer"}}}]))]);
    });
    measure(&probe, "a label of its client", true, &|| label(&cluster, "pod client -n shop app=buyer"));
    cluster.sniffer.assert_clean();
}
