//! Pods on a bridge of the node, by Debian's plugin.
//!
//! ```text
//!   east1: cni0 ─┬─ db           router ── west1 (pod)
//!                ├─ neighbour
//!                └─ third
//! ```

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use integration::{CniPod, CniRuntime, MeshdNode, Wire, await_ok, topology::Mesh};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{delete_policy, put_policy},
    probe::{Server, round_trip},
    raw::{UDP, ipv4, udp},
};

/// Debian's `bridge`, and `meshd-cni` behind it, which tells the daemon.
pub(crate) fn network(node: &MeshdNode) -> CniRuntime {
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": node.host_local()});
    CniRuntime::new(node.host(), "1.0.0", &[bridge, node.cni_plugin(&json!({}))])
}

pub(crate) struct Bridged {
    pub(crate) mesh: Mesh,
    pub(crate) pods: [CniPod; 3],
}

impl Bridged {
    fn start(title: &str) -> Self {
        Self::start_by(title, network)
    }

    /// With the pods `db`, `neighbour` and `third` of the namespace `shop` on a bridge of east1.
    pub(crate) fn start_by(title: &str, network: impl Fn(&MeshdNode) -> CniRuntime) -> Self {
        Self::on(mesh(title, 1), network)
    }

    /// The same in a mesh that is there.
    pub(crate) fn on(mesh: Mesh, network: impl Fn(&MeshdNode) -> CniRuntime) -> Self {
        let pods = ["db", "neighbour", "third"].map(|name| {
            let args = format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID=uid-of-{name}");
            let pod = network(mesh.node("east1")).args(&args).pod(name);
            let ips: Vec<Value> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
            let object = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-of-{name}"), "labels": {"app": name}},
                "spec": {"nodeName": "east1"},
                "status": {"phase": "Running", "podIPs": ips},
            });
            mesh.etcd.put(&format!("/meshd/pods/shop/{name}"), &object.to_string());
            pod
        });
        await_ok("the attachments in etcd", SOON, || {
            let known = mesh.etcd.get_prefix("/meshd/endpoints/").len();
            if known == pods.len() { Ok(()) } else { Err(known.to_string()) }
        });
        await_in_force(&mesh);
        Self { mesh, pods }
    }
}

pub(crate) fn allow(who: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "db"}},
           "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": who}}}]}]})
}

#[test]
fn two_pods_of_one_bridge_are_judged() {
    let Bridged { mesh, pods: [db, neighbour, third] } = Bridged::start("policy-bridge");
    let servers = [Server::start(&db, db.v4(), 5432), Server::start(&db, db.v6(), 5432)];
    for server in &servers {
        server.assert_reached(&neighbour);
        server.assert_reached(&third);
        server.assert_reached(mesh.pod("west1"));
    }
    let mut connection = servers[0].connect(&third);
    assert!(round_trip(&mut connection, SOON));
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(&neighbour);
        server.assert_not_reached(&third);
        server.assert_not_reached(mesh.pod("west1"));
        server.assert_reached(mesh.node("east1").host());
    }
    assert!(!round_trip(&mut connection, Duration::from_millis(700)), "the connection goes on");
    delete_policy(&mesh.etcd, "shop", "db");
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(&third);
    }
}

#[test]
fn a_pod_cannot_borrow_a_neighbours_address() {
    let Bridged { mesh, pods: [db, neighbour, third] } = Bridged::start("policy-borrowed");
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(&mesh);
    let servers = [Server::start(&db, db.v4(), 5432), Server::start(&db, db.v6(), 5432)];
    for server in &servers {
        server.assert_reached(&neighbour);
        server.assert_not_reached(&third);
    }
    // It takes the addresses of the one that may, and says so to everybody.
    let bits = |address: IpAddr| if address.is_ipv4() { 24 } else { 64 };
    for address in [neighbour.v4(), neighbour.v6()] {
        third.ip(&[&format!("addr add {address}/{} dev eth0 nodad", bits(address))]);
        third.ip(&[&format!("addr del {}/{} dev eth0", own(&third, address), bits(address))]);
    }
    neighbour.sysctl("net/ipv6/conf/eth0/keep_addr_on_down", "1");
    neighbour.ip(&["link set eth0 down"]);
    for server in &servers {
        server.assert_not_reached(&third);
    }
    // Tried again: counters begin at 0 when the daemon rebuilds its rules.
    await_ok("what is borrowed to be counted", SOON, || {
        servers.iter().for_each(|server| server.assert_not_reached(&third));
        if dropped(mesh.node("east1")) > 0 { Ok(()) } else { Err("it is not".to_owned()) }
    });
    neighbour.ip(&["link set eth0 up"]);
    for server in &servers {
        // The neighbour is found at its own port: the forged frames had no effect.
        server.assert_reached(&neighbour);
    }
    // In a frame with a VLAN's tag, which br_netfilter does not show to nftables.
    let mut at_db = Wire::on(&db, "eth0");
    let frame = |from: &CniPod, tag: &[u8], marker: &[u8]| {
        let packet = ipv4(neighbour.v4(), db.v4(), UDP, &udp(1, 5432, marker));
        [&mac(&db)[..], &mac(from), tag, &[0x08, 0x00], &packet].concat()
    };
    let mut hears = |from: &CniPod, frame: Vec<u8>, marker: &[u8]| {
        Wire::on(from, "eth0").send(&[frame]);
        let deadline = Instant::now() + Duration::from_millis(500);
        while Instant::now() < deadline {
            let frames = at_db.receive(Duration::from_millis(50)).unwrap();
            if frames.iter().any(|frame| frame.ends_with(marker)) {
                return true;
            }
        }
        false
    };
    await_ok("the friend's frame to arrive", SOON, || {
        if hears(&neighbour, frame(&neighbour, &[], b"friendly"), b"friendly") {
            Ok(())
        } else {
            Err("it does not".to_owned())
        }
    });
    assert!(!hears(&third, frame(&third, &[], b"borrowed"), b"borrowed"));
    assert!(!hears(&third, frame(&third, &[0x81, 0x00, 0, 7], b"with a tag"), b"with a tag"));
}

/// The hardware address of a pod's interface.
fn mac(pod: &CniPod) -> Vec<u8> {
    let shown = pod.run("ip -brief link show eth0").stdout;
    let text = shown.split_whitespace().find(|word| word.len() == 17 && word.matches(':').count() == 5).unwrap();
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// The address of the same family that the pod was given.
fn own(pod: &CniPod, other: IpAddr) -> IpAddr {
    if other.is_ipv4() { pod.v4() } else { pod.v6() }
}

/// What the chains of ports have dropped.
fn dropped(node: &MeshdNode) -> u64 {
    let listing = node.host().run("nft -j list table bridge meshd_policy").stdout;
    let listing: Value = serde_json::from_str(&listing).unwrap();
    let rules = listing["nftables"].as_array().unwrap().iter().filter_map(|item| item["rule"]["expr"].as_array());
    rules.flatten().filter_map(|expression| expression["counter"]["packets"].as_u64()).sum()
}

#[test]
fn without_br_netfilter_a_bridge_passes_nothing_between_pods() {
    let Bridged { mesh, pods: [db, neighbour, third] } = Bridged::start("policy-bridge-closed");
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(&mesh);
    let east1 = mesh.node("east1");
    let server = Server::start(&db, db.v4(), 5432);
    server.assert_reached(&neighbour);
    for name in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        east1.host().sysctl(name, "0");
        // The kernel reports no change of settings; the daemon reads them on other events.
        east1.host().nft("add table inet stranger; delete table inet stranger");
        east1.await_status("to name it", SOON, |status| problem(status, "bridge_not_filtered"));
        server.assert_not_reached(&third);
        server.assert_not_reached(&neighbour);
        // What is routed is judged as ever.
        server.assert_reached(east1.host());
        east1.host().sysctl(name, "1");
        east1.host().nft("add table inet stranger; delete table inet stranger");
        server.assert_reached(&neighbour);
        server.assert_not_reached(&third);
        // Or the next round would take this problem for its own.
        east1.await_status("to be content", SOON, |status| !problem(status, "bridge_not_filtered"));
    }
    // A port without an attachment may have any address.
    let strange = east1.host().pod("strange", &[]);
    let port = strange.host_interface().name().to_owned();
    east1.host().ip(&[&format!("link set {port} master cni0 up")]);
    east1.await_status("to name the port", SOON, |status| {
        problem(status, "bridge_port_unknown") && status.to_string().contains(&format!("unknown port {port} on"))
    });
}

fn problem(status: &Value, code: &str) -> bool {
    status["problems"].as_array().is_some_and(|problems| problems.iter().any(|problem| problem["code"] == code))
}
