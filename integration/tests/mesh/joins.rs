//! Nodes come, go, are removed, cloned and cut off; records are deleted under them.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!   east2 (pod) ─┼─ switch ──── router ──── switch ┤
//!   east3, later ┘         sniffs │ │            └─ west2 (pod)
//!                              etcd └── nat ── home1 (pod), home2 (pod)
//! ```

use std::time::Duration;

use integration::{
    Flow, Meshd, MeshdNode, await_ok, await_until, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{RouteWatch, SOON, await_well, monitoring::await_code, outside_peer::await_reaches, problems};

/// Between two packets of a flow.
const PACE: Duration = Duration::from_millis(20);
/// A clone is found out when its `alive` record has been replaced, after at most its 30 s.
const CLONE_FOUND: Duration = Duration::from_secs(90);

fn has_problem(status: &Value, code: &str) -> bool {
    problems(status).any(|problem| problem["code"] == code)
}

/// The node's key under `subnets/`, whole.
#[track_caller]
fn subnet_key(node: &MeshdNode) -> String {
    let names: Vec<String> = node.subnets().iter().map(|subnet| subnet.to_string().replace('/', "-")).collect();
    format!("/meshd/subnets/{}", names.join("&"))
}

#[track_caller]
fn id(node: &MeshdNode) -> String {
    node.status()["id"].as_str().unwrap_or_else(|| panic!("{} has no id", node.name())).to_owned()
}

#[track_caller]
fn remove(by: &MeshdNode, mesh: &Mesh, name: &str) {
    let endpoints = mesh.etcd.endpoints();
    let output = by.meshctl(&["node", "remove", name, "--etcd-endpoints", &endpoints, "--etcd-allow-plaintext"]);
    assert!(output.success(), "{}", output.describe());
}

#[test]
fn a_node_joins_a_running_mesh() {
    let mut mesh = Mesh::start("joins");
    mesh.await_all_reach_each_other();
    let flow = Flow::udp(mesh.pod("east1"), mesh.pod("west1"), mesh.pod("west1").v4(), PACE);
    let host = mesh.sites.east.add_host(&mesh.sites.lab).clone();
    let node = Meshd::on(&host, &mesh.etcd).site("east").start();
    node.await_ready(SOON);
    mesh.pods.push(node.pod("pod"));
    mesh.nodes.push(node);
    mesh.await_all_reach_each_other();
    mesh.node("east3").await_path("east1", "direct", SOON);
    mesh.node("west1").await_path("east3", "wireguard", SOON);
    flow.finish().assert_nothing_lost();
    mesh.sniffer.assert_clean();
}

#[test]
fn removed_running_and_away_and_let_in_again() {
    let mesh = Mesh::start("removed");
    mesh.await_all_reach_each_other();
    let (east1, west1, west2) = (mesh.node("east1"), mesh.node("west1"), mesh.node("west2"));
    let away = id(west1);
    let running = id(west2);
    west1.term();
    remove(east1, &mesh, "west1");
    remove(east1, &mesh, "west2");
    west2.await_status("to know that it is removed", SOON, |status| status["state"] == "removed");
    let not_ready = await_code(west2, "/readyz", 503);
    assert!(not_ready.contains("[-]identity failed"), "{not_ready}");
    assert_eq!(await_code(west2, "/livez", 200), "ok");
    let others = [mesh.node("east1"), mesh.node("east2")];
    for node in others {
        for name in ["west1", "west2"] {
            await_until(&format!("{} to forget {name}", node.name()), SOON, || {
                let peers = node.try_json(&["peers"])?;
                peers.as_array()?.iter().all(|peer| peer["name"] != name).then_some(())
            });
        }
    }
    for name in ["west1", "west2"] {
        for address in mesh.pod(name).addresses() {
            ping(mesh.pod("east1"), address).assert_none_answered();
            ping(mesh.pod(name), mesh.pod("east1").v4()).assert_none_answered();
        }
    }
    // One that is away cannot come back by itself either.
    west1.start();
    west1.await_status("to know that it is removed", SOON, |status| status["state"] == "removed");
    await_code(west1, "/readyz", 503);
    assert!(mesh.etcd.get(&format!("/meshd/nodes/{away}")).is_none());
    ping(mesh.pod("west1"), mesh.pod("east1").v4()).assert_none_answered();
    mesh.sniffer.assert_clean();

    for id in [&away, &running] {
        mesh.etcd.del(&format!("/meshd/removed/{id}"));
    }
    for node in [west1, west2] {
        node.await_ready(SOON);
        await_well(node);
        assert_eq!(await_code(node, "/readyz", 200), "ok");
        east1.await_path(node.name(), "wireguard", SOON);
    }
    for (name, node) in [("west1", west1), ("west2", west2)] {
        // A subnet may have become another one: then so do the pods.
        let pod = if node.subnets().iter().all(|subnet| mesh.pod(name).addresses().iter().any(|ip| subnet.contains(ip)))
        {
            None
        } else {
            Some(node.pod("again"))
        };
        let target = pod.as_ref().unwrap_or_else(|| mesh.pod(name)).v4();
        await_ok("the node to be reached again", SOON, || {
            let report = ping(mesh.pod("east1"), target);
            if report.lost() == 0 { Ok(()) } else { Err(report.text) }
        });
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn own_keys_that_were_deleted_are_put_back() {
    let mesh = Mesh::start("keys-deleted");
    mesh.await_all_reach_each_other();
    let node = mesh.node("west1");
    mesh.node("west2").await_path("west1", "direct", SOON);
    node.await_path("west2", "direct", SOON);
    await_well(node);
    let keys = [subnet_key(node), format!("/meshd/nodes/{}", id(node))];
    let pod = mesh.pod("west1");
    let local = Flow::udp(node.host(), pod, pod.v4(), PACE);
    let routes = RouteWatch::start(node.host());
    for key in &keys {
        assert!(mesh.etcd.get(key).is_some(), "{key} is there");
        mesh.etcd.del(key);
        let start = std::time::Instant::now();
        await_until(&format!("{key} to be put back"), SOON, || mesh.etcd.get(key));
        println!("{key} was back after {:?}", start.elapsed());
    }
    local.finish().assert_nothing_lost();
    assert_eq!(routes.finish(), Vec::<String>::new(), "the node's own routes stay");
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

#[test]
fn a_mass_deletion_withdraws_nothing() {
    let mesh = Mesh::start("mass-deletion");
    mesh.await_all_reach_each_other();
    // Of every node that is watched: a route that turns direct later is a change, too.
    for (node, other) in [("east1", "east2"), ("east2", "east1"), ("west1", "west2"), ("west2", "west1")] {
        mesh.node(node).await_path(other, "direct", SOON);
    }
    for node in &mesh.nodes {
        await_well(node);
    }
    let flows: Vec<Flow> = ["east2", "west1"]
        .iter()
        .map(|to| Flow::udp(mesh.pod("east1"), mesh.pod(to), mesh.pod(to).v4(), PACE))
        .collect();
    let routes: Vec<RouteWatch> = mesh.nodes.iter().map(|node| RouteWatch::start(node.host())).collect();
    for prefix in ["subnets", "nodes"] {
        let keys = || -> Vec<String> {
            mesh.etcd.get_prefix(&format!("/meshd/{prefix}/")).into_iter().map(|(key, _)| key).collect()
        };
        let before = keys();
        assert_eq!(before.len(), 4);
        mesh.etcd.del_prefix(&format!("/meshd/{prefix}/"));
        await_until("every node to put its record back", SOON, || (keys() == before).then_some(()));
    }
    for node in &mesh.nodes {
        await_well(node);
    }
    for flow in flows {
        flow.finish().assert_nothing_lost();
    }
    for watch in routes {
        assert_eq!(watch.finish(), Vec::<String>::new(), "no route goes");
    }
    mesh.await_all_reach_each_other();
}

#[test]
fn a_clone_forwards_nothing_until_the_first_is_gone() {
    let mut mesh = Mesh::start("clone");
    mesh.await_all_reach_each_other();
    let host = mesh.sites.east.add_host(&mesh.sites.lab).clone();
    let flow = Flow::udp(mesh.pod("west1"), mesh.pod("east1"), mesh.pod("east1").v4(), PACE);
    let first = mesh.node("east1");
    let clone = Meshd::on(&host, &mesh.etcd).site("east").copy_state(first.state_dir()).start();
    let status = clone.await_status("to yield, and to have withdrawn what it had", CLONE_FOUND, |status| {
        status["state"] == "cloned" && status["subnets"] == json!([]) && status["overlay"] == json!([])
    });
    assert!(has_problem(&status, "cloned"), "{status}");
    let report = flow.finish();
    assert_eq!(report.lost, 0, "the clone calls no peer before it knows: {report}");
    let flow = Flow::udp(mesh.pod("west1"), mesh.pod("east1"), mesh.pod("east1").v4(), PACE);
    let not_ready = await_code(&clone, "/readyz", 503);
    assert!(not_ready.contains("[-]identity failed: another meshd runs with this node's identity"), "{not_ready}");
    assert_eq!(await_code(&clone, "/livez", 200), "ok");
    await_until("the clone to have no peers and no routes to pods", SOON, || {
        let (peers, routes) = (clone.peers(), clone.routes());
        let unreachable = |route: &Value| route["path"] == "unreachable";
        (peers == json!([]) && routes.as_array()?.iter().all(unreachable)).then_some(())
    });
    for address in mesh.pod("west1").addresses() {
        ping(&host, address).assert_none_answered();
    }
    mesh.await_all_reach_each_other();
    // A restart of the first, as for an upgrade, does not hand its place over.
    first.restart();
    first.await_ready(SOON);
    mesh.await_all_reach_each_other();
    assert_eq!(clone.status()["state"], "cloned");
    await_well(first);
    // The restart costs a moment.
    await_ok("more answers than losses", SOON, || {
        let report = flow.so_far();
        if report.answered > report.lost { Ok(()) } else { Err(report.to_string()) }
    });
    drop(flow);
    mesh.sniffer.assert_clean();

    first.term();
    clone.await_ready(CLONE_FOUND);
    await_code(&clone, "/readyz", 200);
    await_ok("west1 to be reached", SOON, || {
        let report = ping(&host, mesh.node("west1").overlay()[0]);
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
}

#[test]
fn a_foreign_write_to_alive_after_a_restart_is_put_back() {
    let mesh = Mesh::start("alive-overwritten");
    mesh.await_all_reach_each_other();
    let node = mesh.node("west1");
    let key = format!("/meshd/alive/{}", id(node));
    let before = mesh.etcd.get(&key).unwrap();
    node.kill9();
    node.start();
    node.await_ready(SOON);
    // What is lost because of the restart itself is not counted here.
    await_ok("west1 to be reached again", SOON, || {
        let report = ping(mesh.pod("east1"), mesh.pod("west1").v4());
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    let flow = Flow::udp(mesh.pod("east1"), mesh.pod("west1"), mesh.pod("west1").v4(), PACE);
    flow.await_answer(SOON);
    // It forwards by its cache before it has etcd: the record may still be that of its earlier life.
    let own = await_until("the record of this life", SOON, || mesh.etcd.get(&key).filter(|now| *now != before));
    let revision = mesh.etcd.revision();
    node.await_status("to have seen its record stand", SOON, |status| {
        status["etcd"]["revision"].as_u64() >= Some(revision)
    });
    mesh.etcd.put(&key, r#"{"bootId": "x", "startCount": 1, "incarnation": 7}"#);
    await_until("the record to be put back", SOON, || (mesh.etcd.get(&key)? == own).then_some(()));
    node.await_status("to report it", SOON, |status| has_problem(status, "alive_overwritten"));
    assert_eq!(await_code(node, "/readyz", 200), "ok");
    await_well(node);
    mesh.await_all_reach_each_other();
    flow.finish().assert_nothing_lost();
}

/// A machine is replaced, or its state directory lost: another id under the same name, while the earlier records last.
#[test]
fn a_node_made_again_under_its_old_name_is_a_full_peer() {
    let mut mesh = Mesh::start("made-again");
    mesh.await_all_reach_each_other();
    let old = id(mesh.node("east1"));
    mesh.node("east1").term();
    let host = mesh.sites.east.add_host(&mesh.sites.lab).clone();
    let new = Meshd::on(&host, &mesh.etcd).site("east").name("east1").start();
    new.await_ready(SOON);
    assert_eq!(await_code(&new, "/readyz", 200), "ok");
    let pod = new.pod("pod");
    let shown = format!("east1 ({})", id(&new));
    let west = mesh.node("west1");
    for (node, path) in [(west, "wireguard"), (mesh.node("east2"), "direct")] {
        node.await_path(&shown, path, SOON);
        for (from, to) in [(mesh.pod(node.name()), &pod), (&pod, mesh.pod(node.name()))] {
            await_ok("the pods to reach each other", SOON, || {
                let report = ping(from, to.v4());
                if report.lost() == 0 { Ok(()) } else { Err(report.text) }
            });
        }
        let status = node.status();
        let named = problems(&status).find(|problem| problem["code"] == "name_conflict").unwrap();
        assert!(named["remedy"].as_str().unwrap().starts_with(&format!("meshctl node remove {old} ")), "{named}");
    }
    for (target, answers) in [(id(&new).as_str(), true), ("east1", false)] {
        await_ok(&format!("{target} to answer: {answers}"), SOON, || {
            // Without an answer the command fails.
            let answer = west.try_json(&["ping", target]);
            let mut layers = answer.as_ref().and_then(|answer| answer["layers"].as_array()).into_iter().flatten();
            let passes = layers.any(|layer| layer["layer"] == "overlay" && layer["passes"] == true);
            if passes == answers { Ok(()) } else { Err(format!("{answer:?}")) }
        });
    }
    remove(west, &mesh, "east1");
    let own = json!(id(&new));
    await_ok("the new node alone to be east1", SOON, || {
        let peers = west.try_json(&["peers"]).ok_or("no peers")?;
        let called = |peer: &&Value| peer["name"].as_str().is_some_and(|name| name.starts_with("east1"));
        let ids: Vec<&Value> = peers.as_array().into_iter().flatten().filter(called).map(|peer| &peer["id"]).collect();
        let path = west.peer("east1").map(|peer| peer["path"].clone()).unwrap_or_default();
        if ids == [&own] && path == "wireguard" { Ok(()) } else { Err(peers.to_string()) }
    });
    await_reaches(mesh.pod("west1"), pod.v4());
    for node in [west, mesh.node("east2"), &new] {
        await_well(node);
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn a_reservation_is_honoured() {
    let sites = TwoSites::with_hosts("reservation", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let key = "/meshd/subnets/10.244.77.0-24&fd42:244:0:77::-64";
    etcd.put(key, &json!({"PublicIP": sites.east.v4(0)}).to_string());
    let nodes = sites.start_nodes(&etcd, |meshd| meshd);
    for node in &nodes {
        node.await_ready(SOON);
        await_well(node);
    }
    assert_eq!(subnet_key(&nodes[0]), key);
    assert_ne!(subnet_key(&nodes[1]), key);
    nodes[1].await_path("east1", "wireguard", SOON);
    // The node has filled in the rest, and its lease does not take the reservation away.
    let value: Value = await_until("the node to fill in its part", SOON, || {
        let value: Value = serde_json::from_str(&etcd.get(key)?).ok()?;
        (!value["BackendData"].is_null()).then_some(value)
    });
    assert_eq!(value["PublicIP"], sites.east.v4(0));
    let json: Value = serde_json::from_str(&etcd.ctl(&["get", "-w", "json", "--", key]).stdout).unwrap();
    assert!(json["kvs"][0]["lease"].is_null(), "{json}");
}

#[test]
fn two_nodes_behind_one_nat_reach_the_mesh() {
    let mut mesh = Mesh::start("nat");
    let (_nat, home) = mesh.sites.add_home(2);
    for host in &home.hosts {
        let node = Meshd::on(host, &mesh.etcd).site("home").args("--endpoint none").start();
        node.await_ready(SOON);
        mesh.pods.push(node.pod("pod"));
        mesh.nodes.push(node);
    }
    mesh.await_all_reach_each_other();
    mesh.node("home1").await_path("home2", "direct", SOON);
    mesh.node("home1").await_path("west1", "wireguard", SOON);
    mesh.sniffer.assert_clean();
}

#[test]
fn a_node_cut_off_from_etcd_forwards_and_gives_way_when_it_comes_back() {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    config["LeaseTTL"] = json!(10);
    let mesh = Mesh::start_on(TwoSites::new("cut-off"), &config.to_string(), |meshd| meshd);
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    let (address, key) = (mesh.sites.east.v4(0), subnet_key(node));
    let subnets = node.subnets();
    let local = Flow::udp(node.host(), mesh.pod("east1"), mesh.pod("east1").v4(), PACE);
    mesh.sites.router.nft(&format!(
        "table ip cut {{\nchain forward {{\ntype filter hook forward priority 0; policy accept\n\
         ip saddr {address} tcp dport 2379 drop\n}}\n}}"
    ));
    await_until("the lease to run out", SOON, || mesh.etcd.get(&key).is_none().then_some(()));
    // Cut off, it knows nothing of that.
    assert_eq!(node.subnets(), subnets);
    assert_eq!(await_code(node, "/readyz", 200), "ok");
    local.await_answer(SOON);
    let taken = json!({"PublicIP": "192.0.2.200"}).to_string();
    mesh.etcd.put(&key, &taken);
    mesh.sites.router.run("nft delete table ip cut");
    node.await_status("to say that its subnet is lost, and to have withdrawn it", SOON * 3, |status| {
        has_problem(status, "subnet_lost") && status["subnets"] == json!([])
    });
    let not_ready = await_code(node, "/readyz", 503);
    assert!(not_ready.contains("[-]subnet failed"), "{not_ready}");
    assert_eq!(mesh.etcd.get(&key).as_deref(), Some(taken.as_str()), "never overwritten");
    // The pod goes: nothing is attached any more.
    node.host().ip(&[&format!("link delete {}", mesh.pod("east1").host_interface().name())]);
    node.await_ready(SOON);
    assert_ne!(subnet_key(node), key);
    assert_eq!(await_code(node, "/readyz", 200), "ok");
    assert_eq!(mesh.etcd.get(&key).as_deref(), Some(taken.as_str()), "never overwritten");
    await_well(node);
    let pod = node.pod("new");
    await_ok("the new subnet to be reached", SOON, || {
        let report = ping(mesh.pod("west1"), pod.v4());
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    mesh.sniffer.assert_clean();
}
