//! Processes of other nodes: an `ipBlock` knows them by the addresses that are proven to be their node's.
//!
//! ```text
//!   east1 ─┬─ switch ─ router ─ switch ─┬─ west1 (pod db)
//!   east2 ─┘             │              └─ west2
//!                       nat ── home1, home2
//! ```

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use integration::{
    Meshd, MeshdNode, Ping, await_ok, await_until,
    topology::{CONFIG, Mesh, Site, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_pod, put_policy},
    probe::{Server, round_trip},
};

const PORT: u16 = 5432;
const EAST: [&str; 2] = ["192.0.2.0/24", "2001:db8:1::/64"];
const WEST: [&str; 2] = ["198.51.100.0/24", "2001:db8:2::/64"];

/// The pod db on west1, with a server on each of its addresses.
fn start_db(mesh: &Mesh) -> Vec<Server> {
    let db = mesh.pod("west1");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    db.addresses().iter().map(|address| Server::start(db, *address, PORT)).collect()
}

/// From now on db is reached from these blocks only.
#[track_caller]
fn allow(mesh: &Mesh, blocks: &[Value]) {
    let peers: Vec<Value> = blocks.iter().map(|block| json!({"ipBlock": block})).collect();
    let ingress = if peers.is_empty() { json!([]) } else { json!([{"from": peers}]) };
    put_policy(&mesh.etcd, "shop", "db", &json!({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": ingress}));
    await_in_force(mesh);
}

fn block(cidr: &str) -> Value {
    json!({"cidr": cidr})
}

fn all_but(cidr: &str, except: &str) -> Value {
    json!({"cidr": cidr, "except": [except]})
}

/// Waits until west1 says this of a flow of this node's process to db, in each family. It judges so from then on: where
/// a node is proven to be does not come with the policies, and their revision says nothing of it.
#[track_caller]
fn await_explained(mesh: &Mesh, from: &MeshdNode, allowed: bool, said: &str) {
    let code = if allowed { 0 } else { 6 };
    for overlay in from.overlay() {
        let asked = ["policy", "explain", &overlay.to_string(), "shop/db", &format!("tcp/{PORT}")];
        await_ok(&format!("{said:?} and the exit code {code}"), SOON, || {
            let explained = mesh.node("west1").meshctl(&asked);
            let is_so = explained.code() == Some(code) && explained.describe().contains(said);
            if is_so { Ok(()) } else { Err(explained.describe()) }
        });
    }
}

#[test]
fn a_block_of_the_nodes_network_lets_their_processes_in_through_the_tunnel_and_direct() {
    let mesh = mesh("policy-nodes", 2);
    for (node, other) in [("west1", "west2"), ("west2", "west1")] {
        mesh.node(node).await_path(other, "direct", SOON);
    }
    let servers = start_db(&mesh);
    let (far, near) = (mesh.node("east1"), mesh.node("west2"));
    let reached = |by: &[&MeshdNode], not_by: &[&MeshdNode]| {
        for server in &servers {
            by.iter().for_each(|node| server.assert_reached(node.host()));
            not_by.iter().for_each(|node| server.assert_not_reached(node.host()));
        }
    };
    allow(&mesh, &[]);
    reached(&[], &[far, near]);
    allow(&mesh, &EAST.map(block));
    reached(&[far], &[near]);
    await_explained(&mesh, far, true, "the source is node east1, matched by its address ");
    allow(&mesh, &WEST.map(block));
    reached(&[near], &[far]);
    await_explained(&mesh, near, true, "the source is node west2, matched by its address ");
    await_explained(&mesh, far, false, "the source is node east1, also matched by its addresses ");
    // One of its addresses in `except` is enough, in whatever family it is heard from.
    allow(&mesh, &[all_but("192.0.2.0/24", "192.0.2.11/32"), all_but("198.51.100.0/24", "198.51.100.12/32")]);
    await_explained(&mesh, near, false, "its address 198.51.100.12 is excepted by ipBlock 198.51.100.0/24");
    reached(&[], &[far, near]);
    // As a destination it is its overlay address and nothing else.
    let back: Vec<Server> = far.overlay().into_iter().map(|address| Server::start(far.host(), address, PORT)).collect();
    let egress: Vec<Value> = EAST.map(|cidr| json!({"ipBlock": {"cidr": cidr}})).to_vec();
    put_policy(
        &mesh.etcd,
        "shop",
        "out",
        &json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": egress}]}),
    );
    await_in_force(&mesh);
    back.iter().for_each(|server| server.assert_not_reached(mesh.pod("west1")));
    mesh.sniffer.assert_clean();
}

fn with_home(title: &str) -> (Mesh, Site) {
    let sites = TwoSites::with_hosts(title, 1);
    let (nat, home) = sites.add_home(2);
    // Nothing translates IPv6, so that a tunnel over it would go around what is to be shown.
    nat.nft("table ip6 none { chain forward { type filter hook forward priority filter; policy drop; }; }");
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    (mesh, home)
}

fn join_at_home(mesh: &mut Mesh, home: &Site, host: usize) {
    let node = Meshd::on(&home.hosts[host], &mesh.etcd).site("home").args("--endpoint none").start();
    node.await_ready(SOON);
    mesh.pods.push(node.pod("pod"));
    mesh.nodes.push(node);
}

#[test]
fn an_address_behind_which_several_nodes_are_lets_none_of_them_in() {
    let (mut mesh, home) = with_home("policy-nodes-nat");
    join_at_home(&mut mesh, &home, 0);
    mesh.await_all_reach_each_other();
    let servers = start_db(&mesh);
    // What it says of itself is no proof.
    allow(&mesh, &[block("192.168.1.11/32")]);
    servers.iter().for_each(|server| server.assert_not_reached(mesh.node("home1").host()));
    allow(&mesh, &[block("100.64.0.2/32")]);
    servers.iter().for_each(|server| server.assert_reached(mesh.node("home1").host()));
    await_explained(&mesh, mesh.node("home1"), true, "node home1, matched by its address 100.64.0.2");
    let mut connection = servers[0].connect(mesh.node("home1").host());
    assert!(round_trip(&mut connection, SOON));

    join_at_home(&mut mesh, &home, 1);
    let west1 = mesh.node("west1");
    await_ok("west1 to hear home2 from behind the NAT", SOON, || {
        Ping::new(mesh.pod("west1").v4()).count(1).run(mesh.pod("home2"));
        let peer = west1.peer("home2").unwrap_or_default();
        let heard = peer["endpoint"].as_str().is_some_and(|at| at.starts_with("100.64.0.2:"));
        if heard { Ok(()) } else { Err(peer.to_string()) }
    });
    for node in ["home1", "home2"] {
        await_explained(
            &mesh,
            mesh.node(node),
            false,
            &format!("{node}, none of whose underlay addresses is accepted as a source"),
        );
        servers.iter().for_each(|server| server.assert_not_reached(mesh.node(node).host()));
    }
    assert!(!round_trip(&mut connection, Duration::from_millis(700)), "the established connection goes on");
    mesh.sniffer.assert_clean();
}

/// A node that sends from another's address, as one whose network lets it: WireGuard authenticates it from there.
#[test]
fn a_node_that_is_heard_from_anothers_address_does_not_pass_for_it() {
    let sites = TwoSites::with_hosts("policy-nodes-forged", 2);
    sites.router.nft("table ip6 none { chain forward { type filter hook forward priority filter; policy drop; }; }");
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    await_ok("the pods to reach each other", SOON, || {
        let report = Ping::new(mesh.pod("west1").v4()).count(1).run(mesh.pod("east1"));
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
    let db = mesh.pod("west1");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    let (east1, west1) = (mesh.node("east1"), mesh.node("west1"));
    let overlay = east1.overlay().into_iter().find(IpAddr::is_ipv4).unwrap();
    let at = (db.v4(), PORT);
    let ear = db.enter(|| UdpSocket::bind(at).unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // Each phase has datagrams of its own: one of an earlier phase may come late.
    let arrives = |marker: &str| {
        east1.host().enter(|| UdpSocket::bind((overlay, 0)).unwrap().send_to(marker.as_bytes(), at).unwrap());
        let mut buffer = [0; 64];
        while let Ok(length) = ear.recv(&mut buffer) {
            if &buffer[..length] == marker.as_bytes() {
                return true;
            }
        }
        false
    };
    // Its own address, and one that no node has, work like that: the limit in docs/security.md.
    allow(&mesh, &[block("192.0.2.11/32")]);
    await_until("a datagram to arrive", SOON, || arrives("let me in").then_some(()));
    allow(&mesh, &[block("198.51.100.12/32")]);
    for (source, is_anothers) in [("198.51.100.12", true), ("203.0.113.77", false)] {
        mesh.sites.router.nft(&format!(
            "table ip forge\ndelete table ip forge\ntable ip forge {{ chain post {{
                 type nat hook postrouting priority srcnat
                 ip saddr 192.0.2.11 ip daddr 198.51.100.11 udp dport 51820 snat to {source}:51820
             }}; }}"
        ));
        // A flow that the router knows already keeps its source.
        mesh.sites.router.try_run(&["conntrack", "-F"]);
        allow(&mesh, &[block(&format!("{source}/32"))]);
        let mut arrived = false;
        await_ok(&format!("west1 to hear east1 from {source}"), SOON, || {
            arrived |= arrives(source);
            let peer = west1.peer("east1").unwrap_or_default();
            let heard = peer["endpoint"].as_str().is_some_and(|at| at.starts_with(source));
            if heard { Ok(()) } else { Err(peer.to_string()) }
        });
        if is_anothers {
            for _ in 0..10 {
                arrived |= arrives(source);
            }
            assert!(!arrived, "a datagram of east1 passes for one of west2");
        } else {
            await_until("a datagram to arrive", SOON, || arrives(source).then_some(()));
        }
    }
}
