//! ```text
//!   east1 (pods) ── switch ── router ── etcd
//! ```

use std::{collections::BTreeSet, thread};

use cni::environment::AttachmentName;
use integration::{CniPod, CniRuntime, MeshdNode, await_ok};
use serde_json::json;

use crate::{Nodes, SOON, assert_nothing_left, attachments, await_reaches, pod_interfaces, reserved};

#[test]
fn a_failed_add_leaves_nothing_and_del_never_fails() {
    let mesh = Nodes::start("cni-failures", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let code = |failure: integration::CniFailure| failure.code();

    // Things that are wrong in the runtime's call.
    let namespace = network.namespace("x");
    let bad_ipam = node.cni("1.0.0", &json!({"ipam": {"type": "../host-local"}}));
    assert_eq!(code(bad_ipam.add("x", &namespace).unwrap_err()), Some(7));
    let far = json!({"ipam": {"type": "host-local", "subnet": "192.0.2.0/24"}});
    assert_eq!(code(node.cni("1.0.0", &far).add("x", &namespace).unwrap_err()), Some(7));
    let bad_pod = node.cni("1.0.0", &json!({"pod": {"namespace": "Not A Name"}}));
    assert_eq!(code(bad_pod.add("x", &namespace).unwrap_err()), Some(7));
    assert_nothing_left(node);
    assert_eq!(namespace.run("ip -brief link").stdout.lines().count(), 1, "only lo");

    // Twice the same.
    let pod = network.pod("x2");
    let twice = network.add("x2", &pod).unwrap_err();
    assert_eq!(twice.code(), Some(4), "{twice}");
    await_reaches(node.host(), &pod);

    // Somebody has removed the interface; CHECK says so, DEL does not mind.
    node.host().ip(&[&format!("link delete {}", pod_interfaces(node)[0])]);
    assert_eq!(code(network.check("x2", &pod).unwrap_err()), Some(105));
    network.del("x2", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    assert_nothing_left(node);
    assert_eq!(code(network.check("x2", &pod).unwrap_err()), Some(7), "it has no result any more");

    // One that never was.
    network.del("never", None).unwrap_or_else(|failure| panic!("{failure}"));

    // Without the daemon.
    let pod = network.pod("x3");
    node.term();
    assert_eq!(code(network.status().unwrap_err()), Some(51));
    let fourth = network.namespace("x4");
    assert_eq!(code(network.add("x4", &fourth).unwrap_err()), Some(100));
    for _ in 0..2 {
        network.del("x3", Some(&pod)).unwrap_or_else(|failure| panic!("{failure}"));
    }
    assert_eq!((pod_interfaces(node), reserved(node)), (vec![], vec![]));
    node.start();
    node.await_ready(SOON);
    assert_nothing_left(node);
    mesh.await_endpoints(0);
    network.status().unwrap_or_else(|failure| panic!("{failure}"));
}

/// As after an uninstall in the wrong order.
#[test]
fn del_succeeds_when_daemon_state_and_mesh_are_gone() {
    let mesh = Nodes::start("cni-del-alone", 1, 0);
    let node = &mesh.nodes[0];
    let networks = [("routed", json!({})), ("bridged", json!({"mode": "bridge"}))].map(|(name, more)| {
        let network = node.cni("1.0.0", &more);
        drop((network.pod(&format!("{name}-one")), network.pod(&format!("{name}-two"))));
        (name, network)
    });
    // Another network's plugins delete what they did not make, as a runtime whose configuration was replaced has them
    // do.
    let namespace = networks[0].1.namespace("replaced");
    networks[0].1.add("replaced", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
    let bridge = json!({"type": "bridge", "bridge": "cni0", "ipam": node.host_local()});
    let other = CniRuntime::new(node.host(), "1.0.0", &[bridge, json!({"type": "portmap"})]).named("other");
    other.del("replaced", Some(&namespace)).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(namespace.run("ip -brief link").stdout.lines().count(), 1, "only lo");
    node.term();
    let cleaned = node.cleanup(&["--force"]);
    assert!(cleaned.success(), "{}", cleaned.describe());
    for (name, network) in &networks {
        let deleted = network.del(&format!("{name}-one"), None);
        deleted.unwrap_or_else(|failure| panic!("without the mesh: {failure}"));
    }
    for dir in [node.run_dir(), node.state_dir()] {
        std::fs::remove_dir_all(dir).unwrap();
    }
    for (name, network) in &networks {
        for number in ["one", "two"] {
            let deleted = network.del(&format!("{name}-{number}"), None);
            deleted.unwrap_or_else(|failure| panic!("without its folders: {failure}"));
        }
    }
    assert_eq!(pod_interfaces(node), [""; 0]);
    assert!(!node.host().try_run(&["ip", "link", "show", "meshbr0"]).success());
}

#[test]
fn pods_come_and_go_while_etcd_is_away_and_their_records_follow() {
    let mesh = Nodes::start("cni-no-etcd", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let first = network.pod("first");
    mesh.await_endpoints(1);
    mesh.etcd.stop();
    let second = network.pod("second");
    network.del("first", Some(&first)).unwrap_or_else(|failure| panic!("{failure}"));
    await_reaches(node.host(), &second);
    // The daemon itself starts without etcd, too.
    node.restart();
    node.await_ready(SOON);
    let third = network.pod("third");
    await_reaches(&second, &third);
    mesh.etcd.start_again();
    mesh.etcd.await_ready();
    await_ok("the records to follow", SOON, || {
        let names: Vec<String> =
            mesh.endpoints().iter().filter_map(|key| key.rsplit('/').nth(1).map(str::to_owned)).collect();
        if names == ["second", "third"] { Ok(()) } else { Err(format!("{names:?}")) }
    });
}

#[test]
fn no_two_of_many_at_once_get_one_address() {
    let mesh = Nodes::start("cni-at-once", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let pods: Vec<CniPod> = thread::scope(|scope| {
        let threads: Vec<_> = (0..24)
            .map(|i| {
                scope.spawn({
                    let network = &network;
                    move || network.pod(&format!("p{i}"))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = pods.iter().flat_map(|pod| pod.addresses.clone()).collect();
    assert_eq!(addresses.len(), 48);
    assert_eq!(reserved(node).len(), 48);
    mesh.await_endpoints(24);

    // GC keeps what the runtime lists, and nothing else.
    network.gc(&["p0", "p7"]).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(attachments(node), ["p0", "p7"]);
    assert_eq!((pod_interfaces(node).len(), reserved(node).len()), (2, 4));
    await_reaches(&pods[0], &pods[7]);
    network.gc(&[]).unwrap_or_else(|failure| panic!("{failure}"));
    assert_nothing_left(node);
    mesh.await_endpoints(0);
}

#[test]
fn status_and_add_say_that_no_address_is_left() {
    let mesh = Nodes::start("cni-exhausted", 1, 0);
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let pod = network.pod("one");
    let subnet = node.subnets()[0].to_string();
    let prefix = subnet.trim_end_matches("0/24");
    fill(node, prefix);
    let failure = network.status().unwrap_err();
    assert_eq!(failure.code(), Some(50), "{failure}");
    let two = network.namespace("two");
    let failure = network.add("two", &two).unwrap_err();
    assert_eq!(failure.code(), Some(103), "{failure}");
    assert!(failure.to_string().contains("no free address"), "{failure}");
    assert_eq!(attachments(node).len(), 253);
    // Addresses without an attachment are free again.
    network.gc(&["one"]).unwrap_or_else(|failure| panic!("{failure}"));
    network.status().unwrap_or_else(|failure| panic!("{failure}"));
    network.add("two", &two).unwrap_or_else(|failure| panic!("{failure}"));
    drop(pod);
    // No plugin to give any.
    let failure = node.cni("1.1.0", &json!({"ipam": {"type": "not-there"}})).status().unwrap_err();
    assert!(failure.code() == Some(50) && failure.to_string().contains("not-there"), "{failure}");
}

/// Gives all IPv4 addresses that are left to containers that do not come to anything.
fn fill(node: &MeshdNode, prefix: &str) {
    let client = cni::daemon::DaemonClient::new(node.run_dir());
    let range = json!({"subnet": format!("{prefix}0/24")});
    let addresses = json!({"ranges": [[range]]});
    for number in 0..252 {
        let begin = json!({"network": "mesh", "netns": "/proc/1/ns/net", "addresses": addresses});
        let name = AttachmentName { container_id: format!("nobody{number}"), ifname: "eth0".to_owned() };
        client.begin(&name, &serde_json::from_value(begin).unwrap()).unwrap_or_else(|error| panic!("{error}"));
    }
}
