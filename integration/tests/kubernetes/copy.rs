//! What is put, changed and deleted by kubectl, and an API server and an etcd that fail.

use integration::{await_ok, await_until};

use crate::{
    SOON,
    cluster::{Cluster, list, namespace, pod},
    definition,
};

/// An ingress policy of pods `app=web` in the namespace `shop`.
pub(crate) const POLICY: &str = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"ports": [{"port": "http"}]}]}}"#;

const NODE: &str = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "e1", "labels": {"rack": "1"}},
    "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]}}"#;

const CLUSTER_POLICY: &str = r#"{"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "deny"}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [{"name": "all", "action": "Deny", "from": [{"namespaces": {}}]}]}}"#;

#[test]
fn objects_are_copied_as_they_come_change_and_go() {
    let cluster = Cluster::start("kubernetes_copy");
    let api = &cluster.api;
    api.apply(&list([namespace("shop", "a"), POLICY.to_owned(), NODE.to_owned(), pod("web", "web"), pod("db", "db")]));
    cluster.etcd.put("/meshd/networkpolicies/shop/web", POLICY);
    let planned = cluster.dry_run();
    assert!(planned.contains(&"create k8s/east/pods/shop/web".to_owned()), "{planned:?}");
    assert!(planned.iter().any(|line| line.ends_with("0 to change, 0 to delete")), "{planned:?}");
    assert!(planned.last().unwrap().starts_with("stored twice: networkpolicies/shop/web"), "{planned:?}");
    cluster.etcd.del("/meshd/networkpolicies/shop/web");
    assert!(cluster.keys().is_empty() && cluster.state().is_none());

    let sync = cluster.sync(&["--metrics-addr", "127.0.0.1:9475"]);
    cluster.await_copy(false);
    api.set_pod_status("shop", "web", r#"{"phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}]}"#);
    api.set_pod_status("shop", "db", r#"{"phase": "Running", "podIP": "10.1.0.6", "podIPs": [{"ip": "10.1.0.6"}]}"#);
    api.kubectl(&["label", "pod", "db", "-n", "shop", "app=other", "--overwrite"], "");
    api.kubectl(&["label", "namespace", "shop", "team=b", "--overwrite"], "");
    cluster.await_copy(false);
    assert!(cluster.copied()["pods/shop/web"].contains("10.1.0.5"));
    // Its address may be another pod's from now on.
    api.set_pod_status("shop", "db", r#"{"phase": "Succeeded"}"#);
    api.kubectl(&["delete", "networkpolicy", "web", "-n", "shop"], "");
    cluster.await_copy(false);
    let done = &cluster.copied()["pods/shop/db"];
    assert!(done.contains("Succeeded") && !done.contains("10.1.0.6"), "{done}");

    // What says nothing new to a policy is not written.
    let before = cluster.etcd.get("/meshd/k8s/east/pods/shop/web");
    let revision = cluster.etcd.revision();
    api.kubectl(&["annotate", "pod", "web", "-n", "shop", "note=x"], "");
    api.kubectl(&["label", "pod", "db", "-n", "shop", "app=third", "--overwrite"], "");
    cluster.await_copy(false);
    assert_eq!(cluster.etcd.get("/meshd/k8s/east/pods/shop/web"), before);
    assert!(cluster.etcd.revision() > revision);

    // The definition comes later.
    definition::serve(api);
    api.apply(CLUSTER_POLICY);
    cluster.await_copy(true);
    assert!(cluster.dry_run().last().unwrap().starts_with("0 to create, 0 to change, 0 to delete"));

    await_ok("metrics and status to say so", SOON, || {
        let metrics = cluster.sh("curl -sf http://127.0.0.1:9475/readyz http://127.0.0.1:9475/metrics");
        let status = cluster.meshctl(&["sync", "status", "east"]).stdout;
        let pods = metrics.contains("meshd_sync_objects{cluster=\"east\",kind=\"pods\"} 2\n");
        let leads = metrics.starts_with("ok") && metrics.contains("meshd_sync_leading{cluster=\"east\"} 1\n");
        if pods && leads && status.contains(" 2 pods") { Ok(()) } else { Err(format!("{metrics}{status}")) }
    });

    // etcd's away for a while; what happens meanwhile is carried when it is back.
    cluster.etcd.stop();
    api.kubectl(&["delete", "pod", "web", "-n", "shop", "--grace-period=0", "--force"], "");
    api.apply(&pod("new", "new"));
    sync.await_log("leadership", SOON);
    cluster.etcd.start_again();
    cluster.await_copy(true);
    assert!(sync.running(), "{}", sync.log());
    assert!(sync.term(SOON).success());
    assert_eq!(cluster.etcd.get("/meshd/k8s/east/leader"), None, "given up at the end");
}

#[test]
fn an_api_server_that_comes_back_empty_deletes_nothing() {
    let cluster = Cluster::start("kubernetes_empty");
    let api = &cluster.api;
    let pods = (0..15).map(|number| pod(&format!("p{number}"), "x"));
    api.apply(&list([namespace("shop", "a"), POLICY.to_owned(), NODE.to_owned()].into_iter().chain(pods)));
    let sync = cluster.sync(&[]);
    cluster.await_copy(false);
    let (before, uid) = (cluster.copied(), cluster.state().unwrap()["uid"].clone());

    // It is gone, and back: nothing is lost, nothing changes.
    api.kill_server();
    sync.await_log("API server not followed", SOON);
    api.start_server_again();
    sync.await_log("API server followed again", SOON);
    api.apply(&pod("later", "x"));
    cluster.await_copy(false);
    api.kubectl(&["delete", "pod", "later", "-n", "shop", "--grace-period=0", "--force"], "");
    cluster.await_copy(false);
    assert_eq!(cluster.copied(), before);

    // It comes back with an empty etcd: another cluster of that name.
    api.kill_server();
    api.empty_store();
    api.start_server_again();
    let line = sync.await_log("is that of another cluster", SOON);
    assert!(line.contains("ERROR") && line.contains(uid.as_str().unwrap()), "{line}");
    // A leader of its own begins with that list, and finds the same.
    let second = cluster.sync(&[]);
    assert!(sync.term(SOON).success());
    second.await_log("is that of another cluster", SOON);
    let held = await_until("the state to say so", SOON, || {
        cluster.state()?["held"].as_array().filter(|held| !held.is_empty()).cloned()
    });
    assert!(held[0]["reason"].as_str().unwrap().contains("another cluster"), "{held:?}");
    assert_eq!(cluster.copied(), before);
    assert_eq!(cluster.state().unwrap()["uid"], uid);

    // An operator means it. What is gone with the old cluster is still doubted: it waits a minute, or for its own
    // token.
    assert_eq!(cluster.meshctl(&["sync", "confirm", "east", "delete-pods-1"]).code(), Some(5), "no such finding");
    let confirm = || cluster.meshctl(&["sync", "confirm", "east"]);
    let confirmed = confirm();
    assert!(confirmed.success() && confirmed.stdout.contains("another cluster"), "{}", confirmed.describe());
    await_until("the deletions to be held", SOON, || {
        let held = cluster.state()?["held"].as_array().filter(|held| !held.is_empty())?.clone();
        held[0]["reason"].as_str()?.contains("would be deleted").then_some(())
    });
    assert!(cluster.keys().iter().filter(|key| key.starts_with("pods/")).count() == 15);
    let confirmed = confirm();
    assert!(confirmed.success(), "{}", confirmed.describe());
    cluster.await_copy(false);
    assert_ne!(cluster.state().unwrap()["uid"], uid);
}
