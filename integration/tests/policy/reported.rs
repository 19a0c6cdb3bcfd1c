//! What nftables decides is seen, and audit mode refuses nothing there.
//!
//! ```text
//!   east1 (pods db, neighbour) ── router ── west1 (pod)
//! ```

use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_pod, put_policy},
    probe::Server,
};
use integration::{MeshdNode, await_until, topology::CONFIG};

pub(crate) fn await_flow(node: &MeshdNode, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    await_until(&format!("a flow: {what}"), SOON, || flows(node).into_iter().find(|flow| wanted(flow)))
}

fn flows(node: &MeshdNode) -> Vec<Value> {
    let printed = node.meshctl(&["-o", "json", "flows"]).stdout;
    printed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Waits until this mode is in force. What config says does not come with the policies: their revision says nothing of
/// it.
#[track_caller]
pub(crate) fn await_mode(node: &MeshdNode, mode: &str) {
    node.await_status(&format!("to {mode}"), SOON, |status| status["policy"]["mode"] == mode);
}

#[test]
fn verdicts_of_nftables_are_reported_and_audit_mode_lets_pass() {
    let mesh = mesh("policy-nflog", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    for (pod, name) in [(db, "db"), (&neighbour, "neighbour")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), "east1", pod.addresses());
    }
    let server = Server::start(db, db.v4(), 5432);
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    server.assert_not_reached(&neighbour);
    let at_nftables = |flow: &Value, verdict: &str| flow["at"] == "nftables" && flow["verdict"] == verdict;
    let flow = await_flow(east1, "refused", |flow| at_nftables(flow, "denied") && flow["port"] == 5432);
    assert_eq!((&flow["sourcePod"], &flow["destinationPod"]), (&json!("shop/neighbour"), &json!("shop/db")));
    assert_eq!(flow["direction"], "ingress");
    assert!(flow["why"].as_str().is_some_and(|why| why.contains("shop/closed")), "{flow}");
    // The same for an unknown pod, and for IPv6.
    let v6 = Server::start(db, db.v6(), 5433);
    v6.assert_not_reached(&neighbour);
    await_flow(east1, "refused by IPv6", |flow| at_nftables(flow, "denied") && flow["port"] == 5433);
    mesh.etcd.put("/meshd/config", &CONFIG.replacen('{', "{\"policyMode\": \"audit\", ", 1));
    await_mode(east1, "audit");
    server.assert_reached(&neighbour);
    server.assert_reached(mesh.pod("west1"));
    let flow = await_flow(east1, "audited", |flow| at_nftables(flow, "audited") && flow["port"] == 5432);
    assert_eq!(flow["destinationPod"], "shop/db");
    mesh.etcd.put("/meshd/config", CONFIG);
    await_mode(east1, "enforce");
    server.assert_not_reached(&neighbour);
    server.assert_not_reached(mesh.pod("west1"));
}

#[test]
fn the_log_group_can_be_moved_and_marks_of_others_stay() {
    let sites = integration::topology::TwoSites::with_hosts("policy-log-group", 1);
    // Masks for marks are of an earlier version, and change nothing.
    let args = "--policy-marks 0x70,0x700 --policy-log-group 77";
    let mesh = integration::topology::Mesh::start_on(sites, CONFIG, |meshd| meshd.args(args));
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "neighbour"), &json!({"app": "neighbour"}), "east1", neighbour.addresses());
    let server = Server::start(db, db.v4(), 5432);
    for round in 0..4 {
        let port = if round % 2 == 0 { 5432 } else { 1 };
        let spec = json!({"podSelector": {"matchLabels": {"app": "db"}},
            "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": port}, {"port": port, "protocol": "UDP"}]}]});
        put_policy(&mesh.etcd, "shop", "db", &spec);
        await_in_force(&mesh);
        match round % 2 {
            0 => server.assert_reached(&neighbour),
            _ => server.assert_not_reached(&neighbour),
        }
    }
    let rules = east1.host().run("nft list table inet meshd_policy").stdout;
    assert!(rules.contains("log prefix \"meshd refused ingress\" group 77"), "{rules}");
    assert!(!rules.contains("mark"), "{rules}");
    assert!(east1.log().contains("--policy-marks is ignored"));
    await_flow(east1, "refused", |flow| flow["at"] == "nftables" && flow["verdict"] == "denied");
}

/// Another program's rules log into the daemon's group with its prefix. It can say what it likes there: nothing
/// follows.
#[test]
fn what_others_log_with_the_daemons_prefix_changes_no_verdict() {
    let mesh = mesh("policy-nflog-forged", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    for (pod, name) in [(db, "db"), (&neighbour, "neighbour")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), "east1", pod.addresses());
    }
    let server = Server::start(db, db.v4(), 5432);
    await_in_force(&mesh);
    let log = |prefix: &str| {
        east1.host().nft(&format!(
            "add table ip other; delete table ip other; table ip other {{ chain c {{ \
             type filter hook forward priority filter; ip daddr {} log prefix \"{prefix}\" group 15858; }}; }}",
            db.v4()
        ));
    };
    let logged = |flow: &Value, verdict: &str| flow["port"] == 5432 && flow["verdict"] == verdict;
    // What passes is said to be refused, and passes.
    log("meshd refused ingress");
    server.assert_reached(&neighbour);
    await_flow(east1, "forged refusal", |flow| logged(flow, "denied"));
    server.assert_reached(&neighbour);
    // What is refused is said to be allowed, and is refused.
    log("meshd allowed ingress");
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    let before = flows(east1).iter().filter_map(|flow| flow["number"].as_u64()).max();
    server.assert_not_reached(&neighbour);
    await_flow(east1, "refusal", |flow| logged(flow, "denied") && flow["number"].as_u64() > before);
    // It is no problem of the node.
    east1.await_status("to have no problem", SOON, |status| status["problems"] == json!([]));
}
