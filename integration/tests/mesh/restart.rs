//! The daemon ends and starts under traffic, with and without etcd; `meshd cleanup` takes all of it back.
//!
//! ```text
//!   east1 (pod) ─┐                               ┌─ west1 (pod)
//!     killed     ├─ switch ──── router ──── switch ┤
//!   east2 (pod) ─┘         sniffs │              └─ west2 (pod)
//!                               etcd, stopped in some
//! ```

use std::{
    fs,
    net::{IpAddr, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use integration::{
    Host, MeshdNode, TcpCheck, await_until, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{SOON, await_well, problems};

/// Slow enough for a busy machine, fast enough that a gap shows.
const PACE: u64 = 200_000;

/// What the daemon has put into the kernel: routes, addresses, rules, firewall.
fn kernel_state(node: &MeshdNode) -> String {
    let device = node.interface();
    [
        "ip route show table all proto 158".to_owned(),
        "ip -6 route show table all proto 158".to_owned(),
        format!("ip -o address show dev {device}"),
        "ip rule".to_owned(),
        "ip -6 rule".to_owned(),
        "nft -s list ruleset".to_owned(),
    ]
    .iter()
    .map(|command| node.host().run(command).stdout)
    // A device without a reader has no carrier; the kernel notes that with each route.
    .map(|text| text.replace(" linkdown", "").replace(" dead", ""))
    .collect()
}

/// Everything on a host that a daemon could have changed.
fn host_state(host: &Host) -> Vec<String> {
    let mut lines = Vec::new();
    for command in [
        "ip -d link",
        "ip address",
        "ip route show table all",
        "ip -6 route show table all",
        "ip rule",
        "ip -6 rule",
        "nft -s list ruleset",
    ] {
        lines.extend(host.run(command).stdout.lines().map(|line| format!("{command}: {}", line.trim())));
    }
    let settings = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf", "/proc/sys/net/ipv4/ip_forward"];
    // Some files there cannot be read before they are written: grep then fails and tells the rest.
    let settings = host.try_run(&[&["grep", "-r", "."], &settings[..]].concat()).stdout;
    lines.extend(settings.lines().map(str::to_owned));
    lines.sort();
    lines
}

/// The same once the kernel has taken up every address, which it does in the background.
#[track_caller]
fn settled_state(host: &Host) -> Vec<String> {
    await_until("every address to be taken up", SOON, || {
        Some(host_state(host)).filter(|lines| !lines.iter().any(|line| line.contains("tentative")))
    })
}

fn cache_of(node: &MeshdNode) -> PathBuf {
    node.state_dir().join("cache").join("store.json")
}

/// The cache on disk, if there is one.
fn cached(node: &MeshdNode) -> Option<Value> {
    serde_json::from_slice(&fs::read(cache_of(node)).ok()?).ok()
}

#[track_caller]
fn assert_same(before: &[String], after: &[String]) {
    let missing: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    let left: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    assert!(missing.is_empty() && left.is_empty(), "missing: {missing:#?}\nleft behind: {left:#?}");
}

#[test]
fn streams_live_through_sigterm_and_kill() {
    let mesh = Mesh::start("restart");
    mesh.await_all_reach_each_other();
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    east1.await_path("east2", "direct", SOON);
    let subnets = east1.subnets();
    let stream = |to: &str, v6: bool| {
        let pod = mesh.pod(to);
        TcpCheck::start(mesh.pod("east1"), pod, if v6 { pod.v6() } else { pod.v4() }, PACE)
    };
    let direct = stream("east2", false);
    let across = [stream("west1", false), stream("west1", true)];
    for kill in [false, true] {
        for (node, neighbour) in [(east1, "east2"), (west1, "west2")] {
            // What the daemon does between the two looks is a change, too.
            await_well(node);
            node.await_path(neighbour, "direct", SOON);
            if kill {
                node.stop();
            }
            let before = kernel_state(node);
            if kill {
                node.kill9();
            } else {
                assert!(node.term().success());
            }
            assert_eq!(before, kernel_state(node), "{}: kernel state without a daemon", node.name());
            // The direct path is the kernel's alone.
            direct.await_progress(SOON);
            node.start();
            node.await_ready(SOON);
            for stream in &across {
                stream.await_progress(SOON);
            }
        }
        assert_eq!(east1.subnets(), subnets);
    }
    for stream in across.into_iter().chain([direct]) {
        stream.finish().assert_intact();
    }
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

/// Without a call, the far end sends for 10 s without an answer before it calls itself: 13 to 15 s.
const CALLED: Duration = Duration::from_secs(8);

/// The near end has lost its sessions and has nothing to send: it calls its peers because it starts.
#[test]
fn what_only_the_far_end_sends_arrives_soon_behind_a_restart() {
    let mesh = Mesh::start("one-way");
    mesh.await_all_reach_each_other();
    let (near, far) = (mesh.pod("east1"), mesh.pod("west1"));
    for to in near.addresses() {
        let receiver = near.enter(|| UdpSocket::bind((*to, 7000))).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let sender = far.enter(|| UdpSocket::bind((any, 0))).unwrap();
        let arrives = || {
            // Behind an error about an earlier one, a socket does not send.
            let _ = sender.send_to(b"one way", (*to, 7000));
            receiver.recv(&mut [0; 8]).is_ok().then_some(())
        };
        await_until("the datagrams to arrive", SOON, arrives);
        mesh.node("east1").kill9();
        while receiver.recv(&mut [0; 8]).is_ok() {}
        let start = Instant::now();
        mesh.node("east1").start();
        await_until("the datagrams to arrive again", SOON, arrives);
        let took = start.elapsed();
        println!("{to}: again after {took:?}");
        assert!(took < CALLED, "{to}: again after {took:?}");
        await_well(mesh.node("east1"));
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn nothing_leaves_in_the_clear_without_a_daemon() {
    let mesh = Mesh::start("no-daemon");
    mesh.await_all_reach_each_other();
    for node in &mesh.nodes {
        node.kill9();
    }
    let from = mesh.pod("east1");
    for address in mesh.pod("west1").addresses() {
        ping(from, address).assert_none_answered();
    }
    // An unused address of the network.
    ping(from, "10.244.255.77").assert_none_answered();
    mesh.sniffer.assert_clean();
    for node in &mesh.nodes {
        node.start();
    }
    mesh.await_all_reach_each_other();
}

#[test]
fn starts_without_etcd_from_its_cache() {
    let mesh = Mesh::start("cached");
    mesh.await_all_reach_each_other();
    let subnets: Vec<_> = mesh.nodes.iter().map(MeshdNode::subnets).collect();
    for node in &mesh.nodes {
        await_until(&format!("{} to have the whole mesh on disk", node.name()), SOON, || {
            let cache = cached(node)?;
            let entries = cache["entries"].as_array()?;
            let count =
                |kind: &str| entries.iter().filter(|entry| entry["key"].as_str().unwrap().starts_with(kind)).count();
            (!cache["subnet"].is_null() && count("subnets/") == 4 && count("nodes/") == 4).then_some(())
        });
    }
    mesh.etcd.stop();
    for (index, node) in mesh.nodes.iter().enumerate() {
        if index % 2 == 0 {
            node.kill9();
        } else {
            node.term();
        }
        node.start();
    }
    for (node, subnets) in mesh.nodes.iter().zip(&subnets) {
        node.await_ready(SOON);
        assert_eq!(&node.subnets(), subnets);
    }
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_status("to miss etcd", SOON, |status| status["state"] == "degraded");
    mesh.etcd.start_again();
    for (node, subnets) in mesh.nodes.iter().zip(&subnets) {
        node.await_status("to be well", SOON, |status| status["state"] == "running");
        assert_eq!(&node.subnets(), subnets);
    }
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

#[test]
fn a_cache_that_is_too_old_waits_for_etcd_and_lets_nothing_out() {
    let mesh = Mesh::start("old-cache");
    mesh.await_all_reach_each_other();
    let (old, none) = (mesh.node("east1"), mesh.node("west1"));
    let subnets = [old.subnets(), none.subnets()];
    mesh.etcd.stop();
    for node in [old, none] {
        node.term();
    }
    let mut document = cached(old).unwrap();
    let written = document["writtenAt"].as_u64().unwrap();
    // LeaseTTL is a week.
    document["writtenAt"] = json!(written - 8 * 86_400);
    fs::write(cache_of(old), document.to_string()).unwrap();
    fs::remove_file(cache_of(none)).unwrap();
    for node in [old, none] {
        node.start();
        node.await_status("to wait for etcd and to say so", SOON, |status| {
            status["state"] == "starting" && problems(status).any(|problem| problem["code"] == "waiting_for_etcd")
        });
        assert!(node.subnets().is_empty(), "{} waits", node.name());
    }
    for (from, to) in [("east1", "west1"), ("west1", "east1")] {
        for address in mesh.pod(to).addresses() {
            ping(mesh.pod(from), address).assert_none_answered();
        }
    }
    mesh.sniffer.assert_clean();
    mesh.etcd.start_again();
    for (node, subnets) in [old, none].into_iter().zip(&subnets) {
        node.await_ready(SOON);
        assert_eq!(&node.subnets(), subnets);
    }
    mesh.await_all_reach_each_other();
    mesh.sniffer.assert_clean();
}

/// After a boot: nothing of the mesh is in the kernel, containers are there, and something else has enabled forwarding.
fn as_after_a_boot(node: &MeshdNode) {
    let cleaned = node.cleanup(&["--force"]);
    assert!(cleaned.success(), "{}", cleaned.describe());
    node.host().enable_forwarding();
}

#[test]
fn after_a_boot_the_floor_lies_before_etcd_and_the_daemon_are_there() {
    // No neighbour of its site sends it probes, which it would pass on in the clear before there is a floor.
    let mesh = Mesh::start_on(TwoSites::with_hosts("floor", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (node, from) = (mesh.node("east1"), mesh.pod("east1"));
    let addresses = mesh.pod("west1").addresses();
    let is_unreachable = || {
        let lookup = |to: &IpAddr| node.host().try_run(&["ip", "route", "get", &to.to_string()]);
        addresses.iter().map(lookup).all(|output| !output.success() && output.stderr.contains("No route to host"))
    };
    mesh.etcd.stop();
    node.term();
    as_after_a_boot(node);
    assert!(!is_unreachable(), "the default route leads out in the clear");
    for _ in 0..2 {
        let floor = node.floor();
        assert!(floor.success(), "{}", floor.describe());
        assert!(is_unreachable());
    }
    assert_eq!(node.host().run("ip route show proto 158").stdout.lines().count(), 1);
    assert_eq!(node.host().run("ip -6 route show proto 158").stdout.lines().count(), 1);
    for address in addresses {
        ping(from, *address).assert_none_answered();
    }

    // The daemon lays it by itself, too: also from a cache that it must not forward by.
    as_after_a_boot(node);
    let mut document = cached(node).unwrap();
    document["writtenAt"] = json!(document["writtenAt"].as_u64().unwrap() - 8 * 86_400);
    fs::write(cache_of(node), document.to_string()).unwrap();
    node.start();
    node.await_status("to wait for etcd", SOON, |status| {
        problems(status).any(|problem| problem["code"] == "waiting_for_etcd")
    });
    assert!(is_unreachable());

    // Where etcd lies in the network, a floor would cut it off.
    node.term();
    as_after_a_boot(node);
    let mut document = cached(node).unwrap();
    let entries = document["entries"].as_array_mut().unwrap();
    let config = entries.iter_mut().find(|entry| entry["key"] == "config").unwrap();
    config["value"] = json!(r#"{"Network": "192.0.0.0/8"}"#);
    fs::write(cache_of(node), document.to_string()).unwrap();
    let refused = node.floor();
    assert!(refused.success() && refused.stderr.contains("no fallback route"), "{}", refused.describe());
    assert_eq!(node.host().run("ip route show proto 158").stdout, "");
    mesh.sniffer.assert_clean();
}

#[test]
fn cleanup_leaves_the_host_as_it_was() {
    let sites = TwoSites::new("cleanup");
    let before: Vec<_> = sites.hosts().map(settled_state).collect();
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let node = mesh.node("east1");
    let running = node.cleanup(&[]);
    assert_eq!(running.code(), Some(1), "the daemon runs: {}", running.describe());
    node.term();
    let state = kernel_state(node);
    let attached = node.cleanup(&[]);
    assert_eq!(attached.code(), Some(1), "a pod is attached: {}", attached.describe());
    assert!(attached.stderr.contains("attached"), "{}", attached.describe());
    assert_eq!(state, kernel_state(node), "a cleanup that is refused changes nothing");
    let forced = node.cleanup(&["--force"]);
    assert!(forced.success(), "{}", forced.describe());
    // The pod goes after; the switch does not affect what it left.
    node.host().ip(&[&format!("link delete {}", mesh.pod("east1").host_interface().name())]);
    assert_same(&before[0], &host_state(node.host()));

    // Without a pod no force is needed; a second cleanup finds nothing.
    let other = mesh.node("west2");
    other.host().ip(&[&format!("link delete {}", mesh.pod("west2").host_interface().name())]);
    other.kill9();
    for _ in 0..2 {
        let cleaned = other.cleanup(&[]);
        assert!(cleaned.success(), "{}", cleaned.describe());
    }
    assert_same(&before[3], &host_state(other.host()));
    mesh.sniffer.assert_clean();
}
