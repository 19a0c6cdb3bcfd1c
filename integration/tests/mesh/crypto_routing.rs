//! Who may send what: keys, inner sources and destinations, and the errors that senders get.
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!                         sniffs │ └── store: etcd
//!                              abroad
//!                                ├── outside1: an honest peer, or one that forges
//!                                └── outside2: another honest one
//! ```

use std::{
    collections::BTreeSet,
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use integration::{
    Implementation, Ping, await_ok, await_until, key_pair, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON,
    outside_peer::{OutsidePeer, add_abroad, drops, node_key, record},
};

/// A source that is not the peer's own, and a destination that is not the node's, are dropped and counted; the packet
/// was authentic all the same, so the endpoint follows it (N9).
#[test]
fn forged_inner_addresses_are_dropped_and_the_endpoint_still_roams() {
    let sites = TwoSites::with_hosts("crypto-routing", 1);
    let abroad = add_abroad(&sites, 2);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    let forger = OutsidePeer::join(&mesh, &abroad.hosts[0], Implementation::WireguardGo, "forger", 1, &Value::Null);
    let other = OutsidePeer::join(&mesh, &abroad.hosts[1], Implementation::WireguardGo, "other", 2, &Value::Null);
    let (east, east_pod, west_pod) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    forger.await_reaches(east_pod.addresses().to_vec());
    other.await_reaches(east_pod.addresses().to_vec());

    // Sources: an unused one, another peer's, a pod's of another node, and one of the node's own pods.
    let own_pod = mesh.node("east1").subnets()[0].to_string().replace(".0/24", ".99");
    let sources: [(&str, IpAddr); 5] = [
        ("10.9.0.99/32", east_pod.v4()),
        ("10.9.0.2/32", east_pod.v4()),
        ("fd09::2/128", east_pod.v6()),
        (&format!("{}/32", west_pod.v4()), east_pod.v4()),
        (&format!("{own_pod}/32"), east_pod.v4()),
    ];
    for (number, (source, destination)) in sources.into_iter().enumerate() {
        forger.host.ip(&[&format!("addr add {source} dev {}", forger.wg.interface())]);
        let before = drops(&east.status(), "in_wrong_source");
        let port = 40_000 + number;
        forger.wg.set(&format!("listen-port {port}"));
        let from = source.split('/').next().unwrap();
        await_ok(&format!("the packets from {from}, port {port}, to be dropped"), SOON, || {
            Ping::new(destination).option(&format!("-I {from}")).run(&forger.host).assert_none_answered();
            let after = drops(&east.status(), "in_wrong_source");
            let at = east.peer("forger").map(|peer| peer["endpoint"].to_string()).unwrap_or_default();
            let is_right = after >= before + 3 && at.contains(&format!(":{port}"));
            if is_right { Ok(()) } else { Err(format!("{before} drops before, {after} after; the endpoint is {at}")) }
        });
        forger.host.ip(&[&format!("addr del {source} dev {}", forger.wg.interface())]);
    }
    forger.await_reaches(east_pod.addresses().to_vec());
    other.await_reaches(east_pod.addresses().to_vec());

    // Destinations through east1: a pod of another node, and an unused address.
    let nobody: IpAddr = "192.0.2.99".parse().unwrap();
    forger.allow_more(&node_key(&mesh, "east1"), &[west_pod.v4(), west_pod.v6(), nobody]);
    forger.wg.route(&nobody.to_string());
    for destination in [west_pod.v4(), west_pod.v6(), nobody] {
        let before = drops(&east.status(), "in_wrong_destination");
        await_ok(&format!("the packets to {destination} to be dropped"), SOON, || {
            ping(&forger.host, destination).assert_none_answered();
            let after = drops(&east.status(), "in_wrong_destination");
            if after >= before + 3 { Ok(()) } else { Err(format!("{before} drops before, {after} after")) }
        });
    }
    let west = drops(&mesh.node("west1").status(), "in_wrong_source");
    assert_eq!(west, 0, "what was meant to be dropped at east1 came to west1");
}

/// An unused destination, and a peer that has never been heard, are answered by ICMP at once (N17).
#[test]
fn what_goes_nowhere_is_answered_at_once() {
    let sites = TwoSites::with_hosts("unroutable", 1);
    let abroad = add_abroad(&sites, 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let pod = mesh.pod("east1");
    let taken: Vec<_> = mesh.nodes.iter().flat_map(integration::MeshdNode::subnets).collect();
    let free = |nets: [&str; 3]| -> IpAddr {
        nets.iter().map(|ip| ip.parse().unwrap()).find(|ip| !taken.iter().any(|net| net.contains(ip))).unwrap()
    };
    let (_, silent) = key_pair(&abroad.hosts[0]);
    let addresses = ["10.9.0.50/32".to_owned(), "fd09::50/128".to_owned()];
    mesh.etcd.put("/meshd/peers/silent", &record(&silent, &addresses, &Value::Null));
    mesh.node("east1").await_path("silent", "wireguard", SOON);
    let nowhere = [
        free(["10.244.1.7", "10.244.2.7", "10.244.3.7"]),
        free(["fd42:244:0:1::7", "fd42:244:0:2::7", "fd42:244:0:3::7"]),
        "10.9.0.50".parse().unwrap(),
        "fd09::50".parse().unwrap(),
    ];
    for address in nowhere {
        // A ping that is answered by an error ends with its last packet; one that is not waits.
        let report = await_until(&format!("an ICMP error for {address}"), SOON, || {
            let report = Ping::new(address).count(1).wait(Duration::from_secs(20)).run(pod);
            report.text.contains("nreachable").then_some(report)
        });
        report.assert_none_answered();
    }
}

/// The own key and keys of other nodes as external peers are refused, and harm no node (N24).
#[test]
fn keys_of_nodes_as_outside_peers_are_refused() {
    let sites = TwoSites::with_hosts("own-key", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let own = node_key(&mesh, "east1");
    mesh.etcd
        .put("/meshd/peers/mirror", &record(&own, &["10.9.0.9/32".to_owned()], &json!({"persistentKeepalive": 1})));
    for node in &mesh.nodes {
        let status = node.await_status("to refuse the key", SOON, |status| {
            status["problems"].as_array().is_some_and(|problems| {
                problems.iter().any(|problem| {
                    problem["code"] == "key_conflict"
                        && problem["cause"].as_str().is_some_and(|cause| cause.starts_with("peers/mirror "))
                })
            })
        });
        assert_eq!(status["state"], "degraded");
        assert!(node.peer("mirror").is_none());
    }
    mesh.await_all_reach_each_other();
    mesh.etcd.del("/meshd/peers/mirror");
    for node in &mesh.nodes {
        node.await_status("to be well again", SOON, |status| status["state"] == "running");
    }
}

/// The seven points of low order as keys: refused with a reason, and nothing is ever sent to where they are said to be,
/// while a good key at the same place is called (N26).
#[test]
fn low_order_keys_are_refused_and_nothing_is_sent() {
    let sites = TwoSites::with_hosts("low-order", 1);
    let abroad = add_abroad(&sites, 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    let host = &abroad.hosts[0];
    let listen = |port: u16| {
        let socket = host.enter(|| UdpSocket::bind(("100.65.0.11", port))).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let (low, good) = (listen(50_000), listen(50_001));
    let points = low_order_points();
    for (number, point) in points.iter().enumerate() {
        let key = STANDARD.encode(point);
        let more = json!({"endpoint": "100.65.0.11:50000", "persistentKeepalive": 1});
        mesh.etcd.put(&format!("/meshd/peers/low{number}"), &record(&key, &[format!("10.9.1.{number}/32")], &more));
    }
    let (_, key) = key_pair(host);
    let more = json!({"endpoint": "100.65.0.11:50001", "persistentKeepalive": 1});
    mesh.etcd.put("/meshd/peers/good", &record(&key, &["10.9.0.1/32".to_owned()], &more));
    for node in &mesh.nodes {
        node.await_path("good", "wireguard", SOON);
        for number in 0..points.len() {
            node.await_status(&format!("to refuse peers/low{number}"), SOON, |status| {
                status["problems"].as_array().is_some_and(|problems| {
                    problems.iter().any(|problem| problem["cause"].to_string().contains(&format!("peers/low{number}")))
                })
            });
            assert!(node.peer(&format!("low{number}")).is_none());
        }
    }
    // Two rounds of calls to the good one: a peer that is wanted up is tried every few seconds.
    let mut calls: BTreeSet<(String, u8)> = BTreeSet::new();
    let mut bytes = [0; 2048];
    await_until("two calls of each node to the good key", SOON, || {
        while let Ok((_, from)) = good.recv_from(&mut bytes) {
            let round = u8::from(calls.contains(&(from.to_string(), 0)));
            calls.insert((from.to_string(), round));
        }
        (calls.len() == 2 * mesh.nodes.len()).then_some(())
    });
    assert!(low.recv_from(&mut bytes).is_err(), "something was sent to a key of low order");
}

/// The seven encodings of points of low order on Curve25519.
fn low_order_points() -> [[u8; 32]; 7] {
    let prime = |last: u8| {
        let mut point = [0xff; 32];
        (point[0], point[31]) = (last, 0x7f);
        point
    };
    let mut one = [0; 32];
    one[0] = 1;
    let hex = |text: &str| -> [u8; 32] {
        std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
    };
    [
        [0; 32],
        one,
        hex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        hex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        prime(0xec),
        prime(0xed),
        prime(0xee),
    ]
}
