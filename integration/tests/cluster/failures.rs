//! What fails beside the nodes: meshd-sync, the mesh's etcd, the API server.

use integration::{ProxyMode, await_ok};
use serde_json::json;

use crate::{
    SOON,
    fixture::{Cluster, NAME, NODES},
    policies::{label, measure, policy},
    workload::{PORT, Probe, now, pod},
};

#[test]
fn failures_beside_the_nodes_change_no_traffic() {
    let mut cluster = Cluster::start("cluster-failures", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&[pod("shop", "web", "web", "west1"), pod("shop", "client", "buyer", "east1")]);
    cluster.apply(&[policy(&json!([{"podSelector": {"matchLabels": {"app": "buyer"}}}]))]);
    cluster.await_pods("shop", 2);
    let url = format!("{}:{PORT}/hostname", cluster.address("shop", "web"));
    cluster.await_answer("shop", "client", &url, "web");
    // Every answer passes the policy.
    let probe = cluster.probe("shop", "client", &url);

    sync_killed(&cluster, &probe);
    etcd_killed(&cluster, &probe);
    // kubectl's own connection ends with the server.
    drop(probe);
    api_server_killed(&cluster, &url);
    api_server_empty(&mut cluster, &url);
    cluster.sniffer.assert_clean();
}

/// Another process takes over, and carries on.
fn sync_killed(cluster: &Cluster, probe: &Probe) {
    let killed = NODES
        .map(|node| cluster.node(node).sh("for pid in $(pidof meshd-sync); do kill -9 $pid; echo $pid; done").stdout);
    assert!(killed.iter().any(|line| !line.is_empty()), "no process of meshd-sync was there");
    toggle(cluster, probe, "after meshd-sync was killed");
}

/// What changes meanwhile follows afterwards; traffic goes on.
fn etcd_killed(cluster: &Cluster, probe: &Probe) {
    cluster.etcd().stop();
    let since = now();
    label(cluster, "pod client -n shop app=other");
    await_ok("requests without etcd", SOON, || {
        let later: Vec<_> = probe.attempts().into_iter().filter(|(at, _)| *at > since).collect();
        assert!(later.iter().all(|(_, answered)| *answered), "{later:?}");
        if later.len() > 50 { Ok(()) } else { Err(format!("{}", later.len())) }
    });
    measure(probe, "a label taken away while etcd was down, once it is back", false, &|| cluster.etcd().start_again());
    measure(probe, "the label again", true, &|| label(cluster, "pod client -n shop app=buyer"));
}

fn api_server_killed(cluster: &Cluster, url: &str) {
    let before = cluster.etcd().get_prefix(&format!("/meshd/k8s/{NAME}/pods/"));
    cluster.api.kill_server();
    cluster.node("east1").sh(&format!("{} curl -sS -m 3 http://{url}", inside(cluster)));
    assert_eq!(cluster.etcd().get_prefix(&format!("/meshd/k8s/{NAME}/pods/")), before);
    cluster.api.start_server_again();
    let probe = cluster.probe("shop", "client", url);
    toggle(cluster, &probe, "after the API server was killed");
}

/// A server without any object: nothing is deleted in the mesh.
fn api_server_empty(cluster: &mut Cluster, url: &str) {
    let copied = || cluster.etcd().get_prefix(&format!("/meshd/k8s/{NAME}/"));
    let keys = |pairs: Vec<(String, String)>| -> Vec<String> {
        pairs
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| !key.ends_with("/leader") && !key.ends_with("/state"))
            .collect()
    };
    let before = keys(copied());
    let prefix = inside(cluster);
    // Kubelets and proxies would do as the empty server says.
    for node in NODES {
        cluster.node(node).sh("pidof kubelet kube-proxy | xargs kill -STOP");
    }
    cluster.api.start_with_other_store();
    // The server does not know meshd-sync's account.
    await_ok("meshd-sync to meet the empty server", SOON, || {
        let logs =
            NODES.map(|node| cluster.node(node).sh("cat /var/log/pods/*sync*/sync/*.log || true").stdout).concat();
        if logs.contains("says 401") { Ok(()) } else { Err(logs) }
    });
    assert_eq!(keys(copied()), before);
    cluster.node("east1").sh(&format!("{prefix} curl -sS -m 3 http://{url}"));
    cluster.api.start_with_own_store();
    for node in NODES {
        cluster.node(node).sh("pidof kubelet kube-proxy | xargs kill -CONT");
    }
    cluster.await_nodes_ready();
    let probe = cluster.probe("shop", "client", url);
    toggle(cluster, &probe, "after the API server was empty");
    assert_eq!(keys(copied()), before);
}

/// A change in both directions.
fn toggle(cluster: &Cluster, probe: &Probe, when: &str) {
    measure(probe, &format!("a label taken away {when}"), false, &|| label(cluster, "pod client -n shop app=other"));
    measure(probe, &format!("a label {when}"), true, &|| label(cluster, "pod client -n shop app=buyer"));
}

/// What runs a command in the client's network without the API server.
fn inside(cluster: &Cluster) -> String {
    // The one pod with a network of its own there.
    let namespace = cluster.node("east1").sh("ls /run/netns | grep ^cni- | head -n 1").stdout;
    format!("nsenter --net=/run/netns/{}", namespace.trim())
}
