//! Pods reach each other, and Services, from every place.

use integration::{ProxyMode, await_ok};

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
            cluster.await_answer("shop", from, &format!("{address}:{PORT}/hostname"), to);
            let ping = cluster.exec("shop", from, &format!("ping -c 2 -W 5 {address}"));
            assert!(ping.success(), "{}", ping.describe());
        }
    }
    await_direct(&cluster);
    cluster.sniffer.assert_clean();
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
