//! Routes that are missing, after a boot or because something flushed them: nothing of the mesh leaves in the clear.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘             sniffs │            └─ west2 (pod)
//!                                    etcd
//! ```

use std::{fs, net::IpAddr};

use integration::{
    MeshdNode, await_until, key_pair, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON,
    outside_peer::{await_known, record},
    problems,
};

/// Addresses of external peers.
const OUTSIDE: [&str; 3] = ["10.9.0.1", "10.50.3.7", "fd09::1"];

/// Whether the kernel refuses to send to each of these.
fn are_unreachable(node: &MeshdNode, addresses: &[&str]) -> bool {
    let lookup = |to: &&str| node.host().try_run(&["ip", "route", "get", to]);
    addresses.iter().map(lookup).all(|output| !output.success() && output.stderr.contains("No route to host"))
}

fn cache_of(node: &MeshdNode) -> std::path::PathBuf {
    node.state_dir().join("cache").join("store.json")
}

/// After a boot: nothing of the mesh is in the kernel, containers are there, and something else has enabled forwarding.
fn as_after_a_boot(node: &MeshdNode) {
    let cleaned = node.cleanup(&["--force"]);
    assert!(cleaned.success(), "{}", cleaned.describe());
    node.host().enable_forwarding();
}

#[test]
fn after_a_boot_outside_peers_are_unreachable_until_the_tunnel_leads_to_them() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("fallback-outside", 1), CONFIG, |meshd| meshd);
    let outside: Vec<_> = ["10.9.0.0/24", "10.50.0.0/16", "fd09::/64"].iter().map(|net| net.parse().unwrap()).collect();
    let sniffer = mesh.sites.router.sniff(&outside);
    mesh.await_all_reach_each_other();
    let (node, pod) = (mesh.node("east1"), mesh.pod("east1"));
    let put = |name: &str, nets: &[&str]| {
        let (_, key) = key_pair(node.host());
        let nets: Vec<String> = nets.iter().map(|net| (*net).to_owned()).collect();
        mesh.etcd.put(&format!("/meshd/peers/{name}"), &record(&key, &nets, &Value::Null));
    };
    put("laptop", &["10.9.0.1/32", "fd09::1/128"]);
    put("branch", &["10.50.0.0/16"]);
    // Both are refused: one covers this node's next hop, the other a prefix of the mesh.
    put("of-hop", &["192.0.2.1/32"]);
    put("of-mesh", &["10.244.0.0/15"]);
    await_known(&mesh, "laptop");
    await_known(&mesh, "branch");
    await_until("the peers to be on disk", SOON, || {
        let cache = fs::read_to_string(cache_of(node)).ok()?;
        ["laptop", "branch", "of-hop", "of-mesh"]
            .iter()
            .all(|name| cache.contains(&format!("peers/{name}")))
            .then_some(())
    });

    // While the daemon runs, the fallback lies under the tunnel's route: the device is gone, and it remains.
    node.stop();
    node.host().ip(&[&format!("link delete {}", node.interface())]);
    assert!(are_unreachable(node, &OUTSIDE), "under the routes of the TUN device");
    node.cont();
    mesh.await_all_reach_each_other();

    mesh.etcd.stop();
    node.term();
    as_after_a_boot(node);
    assert!(!are_unreachable(node, &OUTSIDE), "the default route leads out in the clear");
    for _ in 0..2 {
        let floor = node.floor();
        assert!(floor.success(), "{}", floor.describe());
        assert!(are_unreachable(node, &OUTSIDE));
        assert!(!are_unreachable(node, &["192.0.2.1", "203.0.113.10"]), "what is refused is no claim of the mesh");
    }
    for to in OUTSIDE {
        ping(pod, to).assert_none_answered();
        ping(node.host(), to).assert_none_answered();
    }

    // From a cache that is too old to forward by, too, and over a start that has nothing else to go by.
    as_after_a_boot(node);
    let mut document: Value = serde_json::from_slice(&fs::read(cache_of(node)).unwrap()).unwrap();
    document["writtenAt"] = json!(document["writtenAt"].as_u64().unwrap() - 8 * 86_400);
    fs::write(cache_of(node), document.to_string()).unwrap();
    // A fallback route that an earlier boot made before it had addresses, over the next hop.
    node.host().ip(&["route add unreachable 192.0.2.1/32 metric 4000000159 protocol 158"]);
    node.start();
    node.await_status("to wait for etcd", SOON, |status| {
        problems(status).any(|problem| problem["code"] == "waiting_for_etcd")
    });
    assert!(are_unreachable(node, &OUTSIDE));
    await_until("the next hop, which is needed to reach etcd", SOON, || {
        (!are_unreachable(node, &["192.0.2.1"])).then_some(())
    });
    for to in OUTSIDE {
        ping(pod, to).assert_none_answered();
    }

    // The daemon takes the fallback away with the claim.
    mesh.etcd.start_again();
    await_known(&mesh, "laptop");
    mesh.etcd.del("/meshd/peers/branch");
    let left = |net: &str| node.host().run(&format!("ip route show root {net} proto 158")).stdout;
    await_until("the claim's fallback to go", SOON, || left("10.50.0.0/16").is_empty().then_some(()));
    assert!(left("10.9.0.1/32").contains("unreachable"));
    mesh.await_all_reach_each_other();
    sniffer.assert_clean();
    mesh.sniffer.assert_clean();
}

#[test]
fn flushed_routes_send_nothing_to_a_router() {
    let mesh = Mesh::start("fallback-flushed");
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    node.await_path("east2", "direct", SOON);
    let others: Vec<IpAddr> = ["east2", "west1"].iter().flat_map(|name| mesh.pod(name).addresses().to_vec()).collect();
    // The daemon stands still, as long as this takes: it does not put them back.
    node.stop();
    node.host().run("ip route flush proto 158");
    node.host().run("ip -6 route flush proto 158");
    for to in &others {
        let route = node.host().run(&format!("ip route get {to}")).stdout;
        assert!(route.contains("via 192.0.2.1 ") || route.contains("via 2001:db8:1::1 "), "{route}");
        ping(mesh.pod("east1"), to).assert_none_answered();
        ping(node.host(), to).assert_none_answered();
    }
    // Nor may what a router's redirect or an operator's route leads to another machine on the same interface.
    let west = mesh.pod("west1").v4();
    node.host().ip(&[&format!("route add {west} via 192.0.2.12")]);
    ping(mesh.pod("east1"), west).assert_none_answered();
    node.host().ip(&[&format!("route delete {west} via 192.0.2.12")]);
    mesh.sniffer.assert_clean();
    node.cont();
    mesh.await_all_reach_each_other();
    node.await_path("east2", "direct", SOON);
    mesh.sniffer.assert_clean();
}
