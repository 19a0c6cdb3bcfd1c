//! Nodes that restart, are replaced and upgraded.

use std::time::Duration;

use integration::{ProxyMode, await_ok, await_until};
use serde_json::{Value, json};

use crate::{
    SOON,
    fixture::{Cluster, DAEMON_SETS, IMAGE, NODES, RELEASE, condition, images, name},
    workload::{PORT, Probe, container, now, pod},
};

/// What a node without its last state may need until other nodes take it for the one of that name.
const REPLACED: Duration = Duration::from_secs(300);

#[test]
fn nodes_restart_and_are_replaced() {
    let mut cluster = Cluster::start("cluster-nodes", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);

    let node = cluster.node("east2");
    node.power_off();
    await_ready(&cluster, "east2", "Unknown");
    node.power_on();
    node.await_booted();
    cluster.await_nodes_ready();
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);

    // As a broken machine is replaced: its object is deleted, a new one comes under its name.
    let place = cluster.nodes.iter().position(|node| node.name() == "west1").unwrap();
    cluster.nodes.remove(place).destroy();
    cluster.kubectl("delete node west1");
    cluster.kubectl("-n shop delete pod west1 --force --grace-period=0 --ignore-not-found");
    let new = cluster.boot("west1", images());
    new.await_booted();
    cluster.nodes.push(new);
    cluster.await_nodes_ready();
    cluster.apply(&[pod("shop", "west1", "web", "west1")]);
    cluster.await_pods("shop", NODES.len());
    let begin = now();
    await_mesh_of_pods(&cluster);
    println!("pods of the replaced node are reached {:?} after they were Ready", now() - begin);
    cluster.sniffer.assert_clean();
}

/// As a machine is replaced that still runs: its pods leave it first. A Node of Windows beside it gets nothing.
#[test]
fn a_node_is_cordoned_drained_and_replaced() {
    let mut cluster = Cluster::start("cluster-drain", ProxyMode::Iptables);
    cluster.apply(&[json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "windows1", "labels": {"kubernetes.io/os": "windows", "topology.kubernetes.io/zone": "east"}}})]);
    cluster.create_namespace("shop");
    let spec = json!({"terminationGracePeriodSeconds": 0, "enableServiceLinks": false, "containers": [container()]});
    cluster.apply(&[
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec}}}),
    ]);
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);
    let id = |cluster: &Cluster| -> String {
        let status: Value = serde_json::from_str(&cluster.meshctl("west1", "-o json status").stdout).unwrap();
        status["id"].as_str().unwrap().to_owned()
    };
    let before = id(&cluster);

    cluster.kubectl("drain west1 --ignore-daemonsets --delete-emptydir-data --timeout=50s");
    let elsewhere = |pod: &Value| pod["spec"]["nodeName"] != "west1";
    assert!(cluster.pods("shop").iter().all(elsewhere), "{:?}", cluster.pods("shop"));
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);
    cluster.kubectl("delete node west1");
    let place = cluster.nodes.iter().position(|node| node.name() == "west1").unwrap();
    cluster.nodes.remove(place).destroy();
    let new = cluster.boot("west1", images());
    new.await_booted();
    cluster.nodes.push(new);
    cluster.await_nodes_ready();
    assert_ne!(id(&cluster), before);
    cluster.apply(&[pod("shop", "west1", "web", "west1")]);
    cluster.await_pods("shop", NODES.len() + 1);
    await_mesh_of_pods(&cluster);

    let windows = cluster.get("node windows1");
    assert_eq!(condition(&windows, "meshd.io/NetworkReady"), None, "{windows:#}");
    let there = cluster.kubectl("get pods -A --field-selector=spec.nodeName=windows1 -o name");
    assert_eq!(there, "", "pods on a node of Windows");
    cluster.sniffer.assert_clean();
}

/// Waits until all pods reach each other.
#[track_caller]
pub(crate) fn await_mesh_of_pods(cluster: &Cluster) {
    let pods = cluster.await_pods("shop", NODES.len());
    for (from, _) in &pods {
        for (to, address) in &pods {
            await_ok(&format!("{from} to reach {to}"), REPLACED, || {
                let got = cluster.ask("shop", from, &format!("{address}:{PORT}/hostname"))?;
                if got == *to { Ok(()) } else { Err(got) }
            });
        }
    }
}

#[track_caller]
fn await_ready(cluster: &Cluster, node: &str, wanted: &str) {
    await_ok(&format!("{node} to be {wanted}"), SOON, || {
        let object = cluster.get(&format!("node {node}"));
        let ready = condition(&object, "Ready").unwrap_or_default().to_owned();
        if ready == wanted { Ok(()) } else { Err(ready) }
    });
}

#[test]
fn an_upgrade_interrupts_traffic_for_moments_only() {
    let cluster = Cluster::start("cluster-upgrade", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    cluster.await_pods("shop", NODES.len());
    await_mesh_of_pods(&cluster);
    let url = |to: &str| format!("{}:{PORT}/hostname", cluster.address("shop", to));
    let pairs = [("east1", "west1"), ("west1", "east2"), ("east1", "east2"), ("east2", "east2")];
    let probes = pairs.map(|(from, to)| cluster.probe("shop", from, &url(to)));
    let since = now();
    for set in DAEMON_SETS {
        cluster.kubectl(&format!("-n kube-system rollout restart ds/{set}"));
    }
    for set in DAEMON_SETS {
        cluster.kubectl(&format!("-n kube-system rollout status ds/{set} --timeout=100s"));
    }
    let until = now();
    for ((from, to), probe) in pairs.into_iter().zip(&probes) {
        probe.await_change(&format!("{from} to reach {to} afterwards"), until, true);
        let (lost, all) = lost(probe, since);
        println!("{from} to {to}: {lost} of {all} requests lost");
        assert!(lost < all, "{from} to {to}");
        // Within a node nothing is interrupted.
        assert!(from != to || lost == 0, "{from} to itself: {lost} of {all} requests lost");
    }
    cluster.sniffer.assert_clean();
}

fn lost(probe: &Probe, since: Duration) -> (usize, usize) {
    let attempts: Vec<_> = probe.attempts().into_iter().filter(|(at, _)| *at >= since).collect();
    (attempts.iter().filter(|(_, answered)| !answered).count(), attempts.len())
}

/// As docs/kubernetes.md has it, and with pods that were left where it says that they must not be.
#[test]
fn an_uninstall_leaves_no_pod_that_cannot_be_deleted() {
    let cluster = Cluster::start("cluster-uninstall", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&[daemon_set("early"), daemon_set("late")]);
    cluster.await_pods("shop", 2 * NODES.len());

    let gone = |app: &str| {
        cluster.kubectl(&format!("-n shop delete daemonset {app}"));
        await_until(&format!("the pods of {app} to be gone"), SOON, || {
            let of = |pod: &Value| pod["metadata"]["labels"]["app"] == app;
            (!cluster.pods("shop").iter().any(of)).then_some(())
        });
    };
    gone("early");
    cluster.helm(&["uninstall", RELEASE, "-n", "kube-system", "--wait"]);
    // The pods that are left keep the plugin from being removed, and the network from being cleaned up.
    let (cleanup, remove) = (
        "cleanup --state-dir /host/var/lib/meshd --run-dir /host/run/meshd",
        "install-cni --remove --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d --run-dir /host/run/meshd",
    );
    for command in [cleanup, remove] {
        let (done, said) = meshd_on(&cluster, "east1", command);
        assert!(!done, "{command} went on although there are pods: {said}");
        println!("while pods are left: {said}");
    }
    gone("late");
    for node in NODES {
        for command in [cleanup, remove] {
            let (done, said) = meshd_on(&cluster, node, command);
            assert!(done, "{command} on {node}: {said}");
        }
        let left =
            cluster.node(node).sh("ip route show proto 158; nft list tables | grep meshd || true; ls /etc/cni/net.d");
        assert_eq!(left.stdout.trim(), "", "{node}");
    }
}

/// One pod on each node.
fn daemon_set(app: &str) -> Value {
    let spec = json!({"terminationGracePeriodSeconds": 0, "enableServiceLinks": false, "containers": [container()]});
    json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"namespace": "shop", "name": app},
        "spec": {"selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": spec}}})
}

/// Runs `meshd COMMAND` as root on a node, as the page does. Returns whether it succeeded, and what it printed.
fn meshd_on(cluster: &Cluster, node: &str, command: &str) -> (bool, String) {
    cluster.kubectl(&format!("debug node/{node} --profile=sysadmin --image={IMAGE} -- /usr/bin/meshd {command}"));
    let ended = await_ok(&format!("meshd {command} on {node} to end"), SOON, || {
        let pods = cluster.pods("default");
        let ended = pods.iter().find_map(|pod| {
            let phase = pod["status"]["phase"].as_str().filter(|phase| matches!(*phase, "Succeeded" | "Failed"))?;
            Some((name(pod)?.to_owned(), phase == "Succeeded"))
        });
        ended.ok_or_else(|| format!("{pods:?}"))
    });
    let said = cluster.kubectl(&format!("logs {}", ended.0));
    cluster.kubectl(&format!("delete pod {}", ended.0));
    (ended.1, said)
}
