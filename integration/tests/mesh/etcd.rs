//! What comes from etcd, or no longer does: outages, compaction, members that die or hang, values that do not hold.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!                ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │              └─ west2 (pod)
//!                               etcd: stopped, compacted, of three members
//! ```

use std::time::Duration;

use integration::{
    Flow, FlowReport, MeshdNode, TcpCheck, await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{RouteWatch, SOON, await_well, problems};

/// Between two packets of a flow.
const PACE: Duration = Duration::from_millis(20);
/// A path is direct again after 30 s of success.
const DIRECT_AGAIN: Duration = Duration::from_secs(90);
/// WireGuard keys without an owner, one per peer.
const KEYS: [&str; 3] = [
    "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=",
    "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=",
    "yAnz5TF+lXXJte14tji3zlMNftft3gn3EH9Gw0CpNkA=",
];

/// An external peer that never calls.
fn outside_peer(number: usize) -> String {
    json!({"publicKey": KEYS[number], "allowedIPs": [format!("10.9.{number}.0/24")]}).to_string()
}

/// Flows between and inside the sites, one of each kind and family.
fn flows(mesh: &Mesh) -> Vec<Flow> {
    [("east1", "east2"), ("east1", "west1"), ("west2", "east2")]
        .into_iter()
        .flat_map(|(from, to)| {
            let (from, to) = (mesh.pod(from), mesh.pod(to));
            to.addresses().iter().map(move |address| Flow::udp(from, to, *address, PACE))
        })
        .collect()
}

#[track_caller]
fn assert_nothing_lost(flows: Vec<Flow>) {
    let reports: Vec<FlowReport> = flows.into_iter().map(Flow::finish).collect();
    for report in reports {
        report.assert_nothing_lost();
    }
}

fn config_with(change: impl Fn(&mut Value)) -> String {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap_or_else(|error| panic!("CONFIG: {error}"));
    change(&mut config);
    config.to_string()
}

fn await_peer(node: &MeshdNode, name: &str) {
    await_until(&format!("{} to know {name}", node.name()), SOON, || node.peer(name));
}

fn await_no_peer(node: &MeshdNode, name: &str) {
    await_until(&format!("{} to forget {name}", node.name()), SOON, || {
        let peers = node.try_json(&["peers"])?;
        peers.as_array()?.iter().all(|peer| peer["name"] != name).then_some(())
    });
}

/// Waits until the node names a problem with this code whose cause has all these words.
#[track_caller]
fn await_problem(node: &MeshdNode, code: &str, words: &[&str]) {
    await_ok(&format!("{} to name {code} with {words:?}", node.name()), SOON, || {
        let status = node.try_json(&["status"]).ok_or("no status")?;
        let named = problems(&status).any(|problem| {
            let cause = problem["cause"].as_str().unwrap_or_default();
            problem["code"] == code && words.iter().all(|word| cause.contains(word)) && problem["remedy"] != ""
        });
        if named { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn stopped_and_started_under_traffic() {
    let mesh = Mesh::start("etcd-stopped");
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    let flows = flows(&mesh);
    mesh.etcd.stop();
    for node in &mesh.nodes {
        node.await_status("to miss etcd", SOON, |status| {
            status["etcd"]["connected"] == false && status["etcd"]["age"].as_f64().is_some_and(|age| age > 2.0)
        });
    }
    await_problem(mesh.node("east1"), "etcd_unreachable", &["etcd unreachable"]);
    for flow in &flows {
        flow.await_answer(SOON);
    }
    mesh.etcd.start_again();
    mesh.etcd.put("/meshd/peers/laptop", &outside_peer(0));
    for node in &mesh.nodes {
        await_peer(node, "laptop");
        await_well(node);
    }
    assert_nothing_lost(flows);
    mesh.sniffer.assert_clean();
}

#[test]
fn what_was_compacted_while_a_node_stood_still_is_listed_and_no_route_flaps() {
    let mesh = Mesh::start("etcd-compacted");
    mesh.etcd.put("/meshd/peers/early", &outside_peer(0));
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    node.await_path("east2", "direct", SOON);
    for node in &mesh.nodes {
        await_peer(node, "early");
        await_well(node);
    }
    let direct = Flow::udp(mesh.pod("east1"), mesh.pod("east2"), mesh.pod("east2").v4(), PACE);
    node.stop();
    // A restart cuts its connection: the watch has to begin again, at a compacted revision.
    mesh.etcd.stop();
    mesh.etcd.start_again();
    for _ in 0..5 {
        mesh.etcd.put("/meshd/peers/late", &outside_peer(1));
    }
    mesh.etcd.del("/meshd/peers/early");
    mesh.etcd.compact();
    let routes = RouteWatch::start(node.host());
    node.cont();
    await_peer(node, "late");
    await_no_peer(node, "early");
    await_well(node);
    direct.finish().assert_nothing_lost();
    for change in routes.finish() {
        assert!(change.contains("10.9.0.0/24") || change.contains("10.9.1.0/24"), "an unaffected route: {change}");
    }
    mesh.await_all_reach_each_other();
}

#[test]
fn changes_arrive_while_a_member_of_three_is_dead_or_hangs() {
    let sites = TwoSites::with_hosts("etcd-members", 1);
    let etcd = sites.start_etcd(3);
    etcd.put("/meshd/config", CONFIG);
    let nodes = sites.start_nodes(&etcd, |meshd| meshd);
    for node in &nodes {
        node.await_ready(SOON);
    }
    for (number, member) in [0, 1, 2].into_iter().enumerate() {
        if member == 0 {
            etcd.kill_member(member);
        } else {
            etcd.pause_member(member);
        }
        let name = format!("peer{number}");
        // By a member that lives: etcdctl would wait for the one that hangs.
        let living = 2379 + 10 * ((member + 1) % 3);
        let (url, key) = (format!("--endpoints=http://127.0.0.1:{living}"), format!("/meshd/peers/{name}"));
        let value = outside_peer(number);
        await_ok("the other two to take a change", SOON, || {
            let put = ["env", "ETCDCTL_API=3", "etcdctl", &url, "put", "--", &key, &value];
            let output = sites.store.try_run(&put);
            if output.success() { Ok(()) } else { Err(output.describe()) }
        });
        for node in &nodes {
            await_until(&format!("{} to know {name}", node.name()), SOON * 2, || node.peer(&name));
        }
        if member == 0 {
            etcd.start_member(member);
        } else {
            etcd.resume_member(member);
        }
        etcd.await_ready();
    }
}

#[test]
fn a_bad_value_changes_nothing_is_named_and_heals() {
    let mesh = Mesh::start("bad-values");
    mesh.etcd.put("/meshd/peers/laptop", &outside_peer(0));
    mesh.await_all_reach_each_other();
    // Of every node that is watched: a route that turns direct later is a change, too.
    for (node, other) in [("east1", "east2"), ("east2", "east1"), ("west1", "west2"), ("west2", "west1")] {
        mesh.node(node).await_path(other, "direct", SOON);
    }
    for node in &mesh.nodes {
        await_peer(node, "laptop");
        await_well(node);
    }
    let flows = flows(&mesh);
    let routes: Vec<RouteWatch> = mesh.nodes.iter().map(|node| RouteWatch::start(node.host())).collect();
    let bad: [(&str, &str, &[&str]); 6] = [
        ("peers/laptop", r#"{"publicKey": "no key", "allowedIPs": ["10.9.0.0/24"]}"#, &["peers/laptop", "publicKey"]),
        (
            "peers/greedy",
            r#"{"publicKey": "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=", "allowedIPs": ["10.244.9.0/24"]}"#,
            &["peers/greedy", "10.244.9.0/24"],
        ),
        ("config", r#"{"Network": "10.244.0.0/99"}"#, &["config", "Network", "10.244.0.0/99"]),
        (
            "nodes/stranger",
            r#"{"name": "stranger", "publicKey": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#,
            &["nodes/stranger", "publicKey"],
        ),
        ("subnets/10.244.9.0-24", "[]", &["subnets/10.244.9.0-24"]),
        ("pears/laptop", "{}", &["pears/laptop"]),
    ];
    for (key, value, _) in bad {
        mesh.etcd.put(&format!("/meshd/{key}"), value);
    }
    for node in &mesh.nodes {
        for (key, _, words) in bad {
            let code = match key {
                "pears/laptop" => "bad_key",
                "peers/greedy" => "prefix_conflict",
                _ => "bad_value",
            };
            await_problem(node, code, words);
        }
        assert!(node.peer("laptop").is_some(), "its last good value holds");
    }
    // The healing: good values, or none.
    mesh.etcd.put("/meshd/peers/laptop", &outside_peer(0));
    mesh.etcd.put("/meshd/config", CONFIG);
    for key in ["peers/greedy", "nodes/stranger", "subnets/10.244.9.0-24", "pears/laptop"] {
        mesh.etcd.del(&format!("/meshd/{key}"));
    }
    for node in &mesh.nodes {
        await_well(node);
    }
    for watch in routes {
        assert_eq!(watch.finish(), Vec::<String>::new(), "no route changes for a bad value");
    }
    assert_nothing_lost(flows);
    mesh.sniffer.assert_clean();
}

#[test]
fn waits_for_a_config_that_holds() {
    let sites = TwoSites::with_hosts("no-config", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", r#"{"Network": "10.244.0.0/16", "SubnetLen": 8}"#);
    let nodes = sites.start_nodes(&etcd, |meshd| meshd);
    for node in &nodes {
        await_problem(node, "bad_value", &["config", "SubnetLen"]);
        assert_eq!(node.status()["state"], "starting");
    }
    etcd.put("/meshd/config", CONFIG);
    for node in &nodes {
        node.await_ready(SOON);
        await_well(node);
    }
}

#[test]
fn an_exhausted_pool_is_said_and_heals() {
    let sites = TwoSites::with_hosts("exhausted", 2);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", r#"{"Network": "10.244.0.0/22", "SubnetLen": 24, "SubnetMin": "10.244.0.0"}"#);
    // Kept from everybody; four nodes want the three that are left.
    etcd.put("/meshd/subnets/10.244.2.0-24", "{}");
    let nodes = sites.start_nodes(&etcd, |meshd| meshd);
    let without = await_until("three nodes to have a subnet, and one to have none", SOON, || {
        let statuses: Option<Vec<Value>> = nodes.iter().map(|node| node.try_json(&["status"])).collect();
        let statuses = statuses?;
        let without: Vec<usize> = (0..4)
            .filter(|index| problems(&statuses[*index]).any(|problem| problem["code"] == "pool_exhausted"))
            .collect();
        let with = statuses.iter().filter(|status| !status["subnets"].as_array().unwrap().is_empty()).count();
        (without.len() == 1 && with == 3).then(|| without[0])
    });
    assert_eq!(nodes[without].status()["state"], "joining");
    etcd.del("/meshd/subnets/10.244.2.0-24");
    nodes[without].await_ready(SOON);
    assert_eq!(nodes[without].subnets()[0].to_string(), "10.244.2.0/24");
    for node in &nodes {
        await_well(node);
    }
}

#[test]
fn config_changes_live_where_it_can_and_is_refused_where_it_cannot() {
    let mesh = Mesh::start("config-live");
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    node.await_path("east2", "direct", SOON);
    mesh.node("east2").await_path("east1", "direct", SOON);
    let pod = mesh.pod("east2");
    let direct = TcpCheck::start(mesh.pod("east1"), pod, pod.v4(), 100_000);
    let across = TcpCheck::start(mesh.pod("east1"), mesh.pod("west1"), mesh.pod("west1").v6(), 100_000);

    mesh.etcd.put("/meshd/config", &config_with(|config| config["Backend"]["MTU"] = json!(1300)));
    await_until("the MTU to arrive", SOON, || node.subnet_env("FLANNEL_MTU").filter(|mtu| mtu == "1300"));
    let link = format!("ip link show dev {}", node.interface());
    await_until("the device's MTU", SOON, || node.host().run(&link).stdout.contains("mtu 1300").then_some(()));

    mesh.etcd.put("/meshd/config", &config_with(|config| config["Backend"]["DirectRouting"] = json!(false)));
    node.await_path("east2", "wireguard", SOON);
    mesh.node("east2").await_path("east1", "wireguard", SOON);
    direct.await_progress(SOON);

    let refused = config_with(|config| config["Network"] = json!("10.99.0.0/16"));
    mesh.etcd.put("/meshd/config", &refused);
    for node in &mesh.nodes {
        await_problem(node, "config_refused", &["config"]);
        assert_eq!(node.subnets().len(), 2);
    }
    direct.await_progress(SOON);
    across.await_progress(SOON);

    // An idle peer's tunnel ticks from now on.
    let counted = || node.peer("west2").and_then(|peer| peer["tx"].as_u64()).unwrap_or(0);
    mesh.etcd.put("/meshd/config", &config_with(|config| config["Backend"]["PersistentKeepalive"] = json!(1)));
    for node in &mesh.nodes {
        await_well(node);
    }
    let before = counted();
    await_until("keepalives to an idle peer", SOON, || (counted() >= before + 3 * 32).then_some(()));

    node.await_path("east2", "direct", DIRECT_AGAIN);
    mesh.node("east2").await_path("east1", "direct", DIRECT_AGAIN);
    direct.await_progress(SOON);
    direct.finish().assert_intact();
    across.finish().assert_intact();
    mesh.sniffer.assert_clean();
}
