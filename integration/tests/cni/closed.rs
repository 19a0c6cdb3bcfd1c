//! A daemon that has nothing to go by but the attachments: their pods are closed.
//!
//! ```text
//!   east1 (db, neighbour; on a bridge bridged, beside) ─┬─ switch ── router ── etcd
//!   east2 (peer) ──────────────────────────────────────┘
//! ```

use std::fs;

use integration::{CniPod, Namespace, await_ok, ping};
use serde_json::json;

use crate::{Nodes, SOON, await_reaches, pod_interfaces};

#[test]
fn attached_pods_are_closed_when_rules_cache_and_etcd_are_gone() {
    let mesh = Nodes::start("cni-closed", 2, 0);
    let [east1, east2] = [&mesh.nodes[0], &mesh.nodes[1]];
    let networks = [east1, east2].map(|node| node.cni("1.1.0", &json!({})));
    let (db, neighbour, peer) = (networks[0].pod("db"), networks[0].pod("neighbour"), networks[1].pod("peer"));
    let bridge = east1.cni("1.1.0", &json!({"mode": "bridge"}));
    let [bridged, beside] = ["bridged", "beside"].map(|name| bridge.pod(name));
    east1.await_path("east2", "direct", SOON);
    east2.await_path("east1", "direct", SOON);
    let ways: [(&Namespace, &CniPod); 4] = [(&neighbour, &db), (&peer, &db), (&peer, &bridged), (&beside, &bridged)];
    for (from, to) in ways {
        await_reaches(from, to);
    }

    mesh.etcd.stop();
    east1.kill9();
    fs::remove_dir_all(east1.state_dir().join("cache")).unwrap();
    fs::remove_file(east1.run_dir().join("subnet.env")).unwrap();
    east1.host().run("nft flush ruleset");
    east1.start();
    east1.await_status("to wait for etcd", SOON, |status| {
        status["problems"].as_array().is_some_and(|all| all.iter().any(|one| one["code"] == "waiting_for_etcd"))
    });
    // Status may say so before the kernel has the rules.
    await_ok("the way to pods to be closed", SOON, || {
        let listed = east1.host().try_run(&["nft", "list", "table", "inet", "meshd_policy"]);
        let known = pod_interfaces(east1).iter().all(|interface| listed.stdout.contains(interface));
        if known && listed.stdout.contains("chain closed") { Ok(()) } else { Err(listed.describe()) }
    });
    let is_closed = |from: &Namespace, to: &CniPod| {
        for address in &to.addresses {
            ping(from, address).assert_none_answered();
        }
    };
    for (from, to) in ways {
        is_closed(from, to);
    }
    is_closed(&db, &neighbour);
    is_closed(&db, &peer);
    is_closed(&bridged, &peer);
    // The node's own processes reach its pods, as kubelet's probes do.
    await_reaches(east1.host(), &db);
    await_reaches(east1.host(), &bridged);

    mesh.etcd.start_again();
    for (from, to) in ways {
        await_reaches(from, to);
    }
}
