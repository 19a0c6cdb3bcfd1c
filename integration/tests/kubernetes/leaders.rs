//! Two of them: one leads, and what it was about to write when it was stopped is never written.

use std::fs;

use integration::{await_ok, await_until};

use crate::{
    SOON,
    cluster::{Cluster, list, namespace, pod},
};

const PODS: usize = 250;
const NODE: &str =
    r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "cp"}, "spec": {"podCIDRs": ["10.42.5.0/24"]}}"#;
const NODE_STATUS: &str = r#"{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]}}"#;
const NODE_RECORD: &str = r#"{"name": "cp", "publicKey": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=",
    "listenPort": 51820, "addresses": ["192.0.2.10/24"]}"#;

#[test]
fn a_leader_that_was_stopped_in_mid_write_changes_nothing_after_the_next_one_took_over() {
    let cluster = Cluster::start("kubernetes_leaders");
    let api = &cluster.api;
    api.apply(&namespace("shop", "a"));
    let old = cluster.sync(&[]);
    old.await_log("leading", SOON);
    let new = cluster.sync(&[]);
    new.await_log("standing by", SOON);
    cluster.await_copy(false);

    std::thread::scope(|scope| {
        scope.spawn(|| api.kubectl(&["create", "-f", "-"], &list((0..PODS).map(|n| pod(&format!("p{n}"), "x")))));
        let copied = || cluster.keys().iter().filter(|key| key.starts_with("pods/")).count();
        await_until("some of the pods to be copied", SOON, || (copied() > PODS / 5).then_some(()));
        old.stop();
        assert!(copied() < PODS);
    });
    // What the old one has read and not written is no longer so.
    let all: Vec<String> = (0..PODS).map(|n| format!("p{n}")).collect();
    let names: Vec<&str> = all.iter().map(String::as_str).collect();
    api.kubectl(&[&["label", "pod", "-n", "shop", "--overwrite"], &names[..PODS / 2], &["app=y"]].concat(), "");
    let gone = [&["delete", "pod", "-n", "shop", "--grace-period=0", "--force"], &names[PODS / 2..][..9]].concat();
    api.kubectl(&gone, "");
    new.await_log("leading", SOON);
    cluster.await_copy(false);
    let before = cluster.copied();
    old.cont();
    old.await_log("leadership", SOON);
    old.await_log("standing by", SOON);
    assert_eq!(cluster.copied(), before);
    // The one that waits takes over at once when the leader ends in order.
    assert!(new.term(SOON).success());
    api.apply(&pod("last", "x"));
    cluster.await_copy(false);
    assert!(old.running(), "{}", old.log());

    // With the role that is meant for it, a third one copies, and can write nothing else.
    assert!(old.term(SOON).success());
    let roles = cluster.meshctl(&["etcd-roles", "--sync", "east", "--network", "10.42.0.0/16"]).stdout;
    for (key, value) in [
        ("config", r#"{"Network": "10.42.0.0/16", "Allocate": "kubernetes"}"#),
        ("nodes/a", NODE_RECORD),
        ("alive/a", r#"{"bootId": "b", "startCount": 1, "incarnation": 1, "reads": ["k8s"]}"#),
    ] {
        cluster.etcd.put(&format!("/meshd/{key}"), value);
    }
    api.apply(NODE);
    api.kubectl(&["patch", "node", "cp", "--subresource=status", "--type=merge", "-p", NODE_STATUS], "");
    cluster.sh(&format!(
        "export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s
         {roles}
         etcdctl user add root:secret && etcdctl user grant-role root root
         etcdctl user add sync:word && etcdctl user grant-role sync meshd-sync-east
         etcdctl auth enable"
    ));
    let password = api.kubeconfig().with_file_name("password");
    fs::write(&password, "word\n").unwrap();
    let third = cluster.sync(&["--etcd-username", "sync", "--etcd-password-file", password.to_str().unwrap()]);
    api.apply(&pod("with-role", "x"));
    let etcdctl = |user: &str, command: &str| {
        cluster.sh(&format!("ETCDCTL_API=3 etcdctl --command-timeout=60s --user {user} {command} 2>&1 || true"))
    };
    await_ok("the copy with its role", SOON, || {
        let got = etcdctl("root:secret", "get /meshd/k8s/east/pods/shop/with-role");
        if got.contains("with-role") { Ok(()) } else { Err(format!("{got}{}", third.log())) }
    });
    await_ok("the node's block with its role", SOON, || {
        let got = etcdctl("root:secret", "get /meshd/subnets/10.42.5.0-24");
        if got.contains("east/cp") { Ok(()) } else { Err(format!("{got}{}", third.log())) }
    });
    for key in ["config", "nodes/a", "alive/a", "removed/a", "subnets/10.43.5.0-24", "k8s/west/nodes/x"] {
        let denied = etcdctl("sync:word", &format!("put /meshd/{key} x"));
        assert!(denied.contains("permission denied"), "{key}: {denied}");
    }
}
