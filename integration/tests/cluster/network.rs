//! Pods reach each other, and Services, from every place.

use std::os::unix::fs::symlink;

use integration::{ProxyMode, await_ok, binary};
use serde_json::Value;

use crate::{
    SOON,
    fixture::{Cluster, NODES},
    workload::{PORT, pod},
};

#[test]
fn pods_reach_each_other_in_the_site_and_across() {
    let cluster = Cluster::start("cluster-network", ProxyMode::Iptables);
    cluster.create_namespace("shop");
    cluster.apply(&NODES.map(|node| pod("shop", node, "web", node)));
    let pods = cluster.await_pods("shop", NODES.len());
    for (from, _) in &pods {
        for (to, address) in &pods {
            let other = v6(&cluster, to);
            cluster.await_answer("shop", from, &format!("{address}:{PORT}/hostname"), to);
            cluster.await_answer("shop", from, &format!("[{other}]:{PORT}/hostname"), to);
            let ping = cluster.exec("shop", from, &format!("ping -c 2 -W 5 {address} && ping -c 2 -W 5 {other}"));
            assert!(ping.success(), "{}", ping.describe());
        }
    }
    await_direct(&cluster);
    assert_plugin_asks_a_node(&cluster);
    cluster.sniffer.assert_clean();
}

/// `kubectl meshd` is meshctl at the daemon of the node that it names.
#[track_caller]
fn assert_plugin_asks_a_node(cluster: &Cluster) {
    let plugin = cluster.sites.lab.folder().join("kubectl-meshd");
    symlink(binary("meshctl"), &plugin).unwrap();
    for node in ["east2", "west1"] {
        let status = cluster.api.kubectl_plugin(&plugin, &["--node", node, "-o", "json", "status"]).stdout;
        let status: Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["node"], node, "{status}");
    }
    let any = cluster.api.kubectl_plugin(&plugin, &["peers"]).stdout;
    assert!(any.contains("REASON"), "{any}");
}

/// The IPv6 address of a pod.
fn v6(cluster: &Cluster, pod: &str) -> String {
    let addresses = cluster.get(&format!("pod -n shop {pod}"))["status"]["podIPs"].clone();
    let mut addresses = addresses.as_array().unwrap().iter().filter_map(|one| one["ip"].as_str());
    addresses.find(|ip| ip.contains(':')).unwrap().to_owned()
}

/// Waits until the two nodes of the site have a direct path to each other.
#[track_caller]
fn await_direct(cluster: &Cluster) {
    await_ok("a direct path", SOON, || {
        let peers = cluster.meshctl("east1", "peers").stdout;
        let direct = peers.lines().any(|line| line.contains("east2") && line.contains("direct"));
        if direct { Ok(()) } else { Err(peers) }
    });
}
