//! A cluster with Flannel moves to meshd, node by node, as docs/kubernetes.md has it.

use std::fs;

use integration::{ProxyMode, await_ok, kubernetes_programs};
use serde_json::{Value, json};

use crate::{
    SOON,
    etcd::make_control_plane,
    fixture::{Cluster, NODES, condition, name},
    policies::policy,
    workload::{PORT, container},
};

/// Of Flannel, and what each node has of it.
const FLANNEL: &str = "10.243.0.0/16";
const POD_CIDRS: [&str; 3] = ["10.243.1.0/24", "10.243.2.0/24", "10.243.3.0/24"];

#[test]
fn a_cluster_moves_from_flannel_by_draining() {
    let cluster = Cluster::boot_all("cluster-flannel", ProxyMode::Iptables, None);
    start_with_flannel(&cluster);
    cluster.create_namespace("shop");
    cluster.apply(&[workload("Deployment"), workload("DaemonSet")]);
    await_all_reach_each_other(&cluster, "10.243.");

    // For nodes that have a label which none has yet: only setup, etcd and meshd-sync run.
    make_control_plane(&cluster, "east1");
    cluster.install_release(&format!(
        r#"{{{}, "nodeSelector": {{"meshd": "on"}}, "config": {{"Network": "10.244.0.0/16", "Allocate": "mesh"}}}}"#,
        Cluster::image_values()
    ));
    for node in NODES {
        move_node(&cluster, node);
    }
    cluster.kubectl("delete namespace kube-flannel");
    for node in NODES {
        cluster.node(node).sh("ip link delete flannel.1; ip link delete cni0");
    }
    await_all_reach_each_other(&cluster, "10.244.");

    // Flannel enforces no policies.
    let pods = cluster.pods("shop");
    let (client, server) = (name(&pods[0]).unwrap(), &pods[1]);
    let url = format!("{}:{PORT}/hostname", server["status"]["podIP"].as_str().unwrap());
    cluster.await_answer("shop", client, &url, name(server).unwrap());
    cluster.apply(&[policy(&json!([{"podSelector": {"matchLabels": {"app": "buyer"}}}]))]);
    await_ok("the policy to be in force", SOON, || match cluster.ask("shop", client, &url) {
        Err(_) => Ok(()),
        Ok(answered) => Err(answered),
    });
    cluster.sniffer.assert_clean();
}

/// As kubeadm and Flannel's own manifest do it.
fn start_with_flannel(cluster: &Cluster) {
    let programs = kubernetes_programs("flannel");
    let manifest = fs::read_to_string(programs.join("manifest.yaml")).unwrap();
    for (node, pod_cidr) in NODES.into_iter().zip(POD_CIDRS) {
        // Of the package kubernetes-cni.
        cluster.node(node).sh(&format!(
            "cp /usr/lib/cni/{{bridge,host-local,loopback,portmap}} /opt/cni/bin
            ctr -n k8s.io images import --no-unpack {}",
            programs.join("image.tar").display()
        ));
        await_ok(&format!("node {node} to be registered"), SOON, || {
            let patch = format!(r#"{{"spec": {{"podCIDR": "{pod_cidr}", "podCIDRs": ["{pod_cidr}"]}}}}"#);
            let done = cluster.api.try_kubectl(&["patch", "node", node, "-p", &patch], "");
            if done.success() { Ok(()) } else { Err(done.describe()) }
        });
    }
    cluster.api.apply(&manifest.replace("10.244.0.0/16", FLANNEL));
    cluster.await_ready();
}

fn move_node(cluster: &Cluster, node: &str) {
    cluster.kubectl(&format!("drain {node} --ignore-daemonsets --delete-emptydir-data --timeout=50s"));
    cluster.kubectl(&format!("label node {node} meshd=on"));
    let running = || -> Result<Value, String> {
        let select = format!(
            "-n kube-system get pods -l app.kubernetes.io/name=meshd --field-selector=spec.nodeName={node} -o json"
        );
        let pods: Value = serde_json::from_str(&cluster.kubectl(&select)).unwrap();
        pods["items"].get(0).cloned().ok_or_else(|| "no pod of meshd".to_owned())
    };
    let ready = |container: &str, wanted: bool| {
        await_ok(&format!("{container} on {node} to be ready: {wanted}"), SOON, || {
            let pod = running()?;
            let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
            let is = statuses.iter().find(|it| it["name"] == container).map(|it| it["ready"] == true);
            if is == Some(wanted) { Ok(()) } else { Err(format!("{statuses:?}")) }
        });
    };
    ready("meshd", true);
    // Flannel's configuration sorts first; the pod says so until it is away.
    await_ok("the pod's event", SOON, || {
        let events = cluster.kubectl("-n kube-system get events -o json");
        if events.contains("10-flannel.conflist sorts before 10-meshd.conflist") { Ok(()) } else { Err(events) }
    });
    ready("cni", false);
    cluster.node(node).sh("mv /etc/cni/net.d/10-flannel.conflist /root/");
    ready("cni", true);
    cluster.kubectl(&format!("-n shop delete pods -l app=web,kind=DaemonSet --field-selector=spec.nodeName={node}"));
    cluster.kubectl(&format!("uncordon {node}"));
    await_ok(&format!("a pod on {node}"), SOON, || {
        let pods = cluster.pods("shop");
        let moved =
            pods.iter().find(|pod| pod["spec"]["nodeName"] == node && pod["metadata"]["labels"]["kind"] == "DaemonSet");
        let pod = moved.ok_or("none")?;
        let address = pod["status"]["podIP"].as_str().unwrap_or_default();
        let ready = condition(pod, "Ready") == Some("True");
        if ready && address.starts_with("10.244.") { Ok(()) } else { Err(pod["status"].to_string()) }
    });
}

/// Pods that answer, three or one on each node.
fn workload(kind: &str) -> Value {
    let labels = json!({"app": "web", "kind": kind});
    let template = json!({"metadata": {"labels": labels}, "spec": {"terminationGracePeriodSeconds": 0,
        "enableServiceLinks": false, "containers": [container()]}});
    let mut object = json!({"apiVersion": "apps/v1", "kind": kind,
        "metadata": {"namespace": "shop", "name": kind.to_lowercase()},
        "spec": {"selector": {"matchLabels": labels}, "template": template}});
    if kind == "Deployment" {
        object["spec"]["replicas"] = 3.into();
    }
    object
}

/// Waits until all pods, each with an address in this network, reach each other.
#[track_caller]
fn await_all_reach_each_other(cluster: &Cluster, network: &str) {
    await_ok(&format!("pods in {network}"), SOON, || {
        let pods = cluster.pods("shop");
        let inside = |pod: &&Value| pod["status"]["podIP"].as_str().is_some_and(|it| it.starts_with(network));
        let count = pods.iter().filter(|pod| condition(pod, "Ready") == Some("True")).filter(inside).count();
        if count == 6 && pods.len() == 6 { Ok(()) } else { Err(format!("{count} of {}", pods.len())) }
    });
    let pods = cluster.await_pods("shop", 6);
    for (from, _) in &pods {
        for (to, address) in &pods {
            cluster.await_answer("shop", from, &format!("{address}:{PORT}/hostname"), to);
        }
    }
}
