//! Packets that try to pass for others: by protocol, in pieces, under a borrowed address, as answers.
//!
//! ```text
//!   east1 (pod client) ─┬─ switch ─ router ─ switch ─┬─ west1 (pods db, neighbour)
//!   east2 (pod friend) ─┘                            └─ west2 (pod)
//! ```

use std::net::{IpAddr, UdpSocket};

use integration::{Namespace, Ping, Pod, await_ok, await_until, topology::Mesh};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_pod, put_policy},
    probe::Server,
    raw::{Ear, SCTP, UDP, ipv4, sctp_data, sctp_init, send, udp},
};

struct World {
    mesh: Mesh,
    neighbour: Pod,
}

impl World {
    fn start(title: &str, hosts: u8) -> Self {
        let mesh = mesh(title, hosts);
        let neighbour = mesh.node("west1").pod("neighbour");
        let pod = |name: &str, node: &str, addresses: &[IpAddr]| {
            put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, addresses);
        };
        pod("client", "east1", mesh.pod("east1").addresses());
        pod("db", "west1", mesh.pod("west1").addresses());
        pod("neighbour", "west1", neighbour.addresses());
        if hosts > 1 {
            pod("friend", "east2", mesh.pod("east2").addresses());
        }
        Self { mesh, neighbour }
    }

    fn db(&self) -> &Pod {
        self.mesh.pod("west1")
    }

    fn client(&self) -> &Pod {
        self.mesh.pod("east1")
    }

    fn policy(&self, app: &str, ingress: &Value) {
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "ingress": ingress});
        put_policy(&self.mesh.etcd, "shop", app, &spec);
        await_in_force(&self.mesh);
    }
}

/// Sends an IP payload until it is heard.
#[track_caller]
fn assert_arrives(ear: &Ear, from: &Namespace, packet: &[u8]) {
    await_ok(&format!("a packet of {} to arrive", from.name()), SOON, || {
        send(from, packet);
        if ear.hears(&packet[20..]) { Ok(()) } else { Err("it does not".to_owned()) }
    });
}

#[track_caller]
fn assert_lost(ear: &Ear, from: &Namespace, packet: &[u8]) {
    send(from, packet);
    assert!(!ear.hears(&packet[20..]), "a packet of {} arrives", from.name());
}

#[test]
fn sctp_is_judged_by_its_ports_and_begins_only_with_init() {
    let world = World::start("policy-sctp", 1);
    let db = world.db();
    let ear = Ear::on(db, SCTP);
    let to = |from: &Pod, payload: &[u8]| ipv4(from.v4(), db.v4(), SCTP, payload);
    for from in [world.client(), &world.neighbour] {
        assert_arrives(&ear, from, &to(from, &sctp_init(1000, 7001)));
    }
    world.policy("db", &json!([{"ports": [{"port": 7000, "protocol": "SCTP"}]}]));
    for from in [world.client(), &world.neighbour] {
        assert_arrives(&ear, from, &to(from, &sctp_init(2000, 7000)));
        assert_lost(&ear, from, &to(from, &sctp_init(2000, 7002)));
        // That was allowed to begin before.
        assert_lost(&ear, from, &to(from, &sctp_init(1000, 7001)));
        assert_lost(&ear, from, &to(from, &sctp_data(3000, 7002)));
    }
    // UDP to the same port is something else.
    let datagrams = Ear::on(db, UDP);
    for from in [world.client(), &world.neighbour] {
        assert_lost(&datagrams, from, &ipv4(from.v4(), db.v4(), UDP, &udp(2000, 7000, b"not sctp")));
    }
}

/// Whether a datagram that takes several packets is answered.
fn long_datagram_answered(from: &Namespace, server: &Server) -> bool {
    from.enter(|| {
        let any: IpAddr = if server.at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(700))).unwrap();
        let mut buffer = [0; 4096];
        // The server answers with as much of it as it has room for: two fragments.
        socket.send_to(&[7; 2000], server.at).is_ok() && socket.recv(&mut buffer).is_ok_and(|length| length == 2000)
    })
}

#[test]
fn fragments_pass_with_the_first_one_or_not_at_all() {
    let world = World::start("policy-fragments", 1);
    let db = world.db();
    let ports = json!([{"port": 5432, "protocol": "UDP"}]);
    world.policy("db", &json!([{"ports": ports}]));
    for address in [db.v4(), db.v6()] {
        let (open, closed) = (Server::start(db, address, 5432), Server::start(db, address, 5433));
        for from in [world.client(), &world.neighbour] {
            await_ok(&format!("a long datagram of {} to be answered", from.name()), SOON, || {
                if long_datagram_answered(from, &open) { Ok(()) } else { Err("it is not".to_owned()) }
            });
            assert!(!long_datagram_answered(from, &closed), "{} reaches a closed port in fragments", from.name());
        }
    }
    // Later fragments alone, as if the first one had passed.
    let ear = Ear::on(db, UDP);
    for from in [world.client(), &world.neighbour] {
        let mut later = ipv4(from.v4(), db.v4(), UDP, b"a later fragment, without a port");
        later[4..8].copy_from_slice(&[0x12, 0x34, 0, 4]);
        assert_lost(&ear, from, &later);
    }
}

#[test]
fn an_error_about_a_flow_passes_as_the_flow_does() {
    let world = World::start("policy-errors", 1);
    let db = world.db();
    world.policy("db", &json!([{"ports": [{"port": 5432, "protocol": "UDP"}]}]));
    // The answer to a datagram to a closed port.
    let refused = |from: &Namespace, to: IpAddr, port: u16| {
        from.enter(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_millis(700))).unwrap();
            socket.connect((to, port)).unwrap();
            let _ = socket.send(b"anybody?");
            socket.recv(&mut [0; 16]).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        })
    };
    for from in [world.client(), &world.neighbour] {
        for to in [db.v4(), db.v6()] {
            await_ok(&format!("{} to learn that the port is closed", from.name()), SOON, || {
                if refused(from, to, 5432) { Ok(()) } else { Err("it is told nothing".to_owned()) }
            });
            assert!(!refused(from, to, 5433), "{} hears of what is behind a closed port", from.name());
        }
    }
}

#[test]
fn a_ping_lets_in_its_answers_only() {
    let world = World::start("policy-ping", 1);
    let (client, db) = (world.client(), world.db());
    world.policy("client", &json!([]));
    for (from_client, from_db, kind) in [(db.v4(), client.v4(), 8), (db.v6(), client.v6(), 128)] {
        for identifier in [77, kind] {
            await_ok("the client's ping to be answered", SOON, || {
                let report = Ping::new(from_client).identifier(identifier).run(client);
                if report.lost() == 0 { Ok(()) } else { Err(report.text) }
            });
            Ping::new(from_db).identifier(identifier).run(db).assert_none_answered();
        }
    }
}

#[test]
fn a_borrowed_address_opens_nothing() {
    let world = World::start("policy-spoof", 2);
    let (mesh, db) = (&world.mesh, world.db());
    let friend = mesh.pod("east2");
    world.policy("db", &json!([{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}]));
    let ear = Ear::on(db, UDP);
    let packet = |port: u16| ipv4(friend.v4(), db.v4(), UDP, &udp(port, 5432, b"from a friend"));
    assert_arrives(&ear, friend, &packet(1));
    // By a pod of another node, whose own node stops it; by one of the same node; by another node itself, whose key
    // does not cover the address; by the friend's neighbour node, direct.
    for (port, from) in [
        (2, world.client() as &Namespace),
        (3, &world.neighbour),
        (4, mesh.node("east1").host()),
        (5, mesh.node("west2").host()),
        (6, mesh.pod("west2")),
    ] {
        assert_lost(&ear, from, &packet(port));
    }
    assert_arrives(&ear, friend, &packet(7));
}

#[test]
fn a_reply_by_the_other_path_passes_and_a_beginning_does_not() {
    let world = World::start("policy-two-paths", 2);
    let mesh = &world.mesh;
    let (client, friend) = (mesh.pod("east1"), mesh.pod("east2"));
    for (node, other) in [("east1", "east2"), ("east2", "east1")] {
        mesh.node(node).await_path(other, "direct", SOON);
    }
    // No one may open a flow to the client; its own requests go direct, and the responses come out of the tunnel.
    world.policy("client", &json!([]));
    let east2 = mesh.node("east2");
    for address in [client.v4(), client.v6()] {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        east2.host().route(&format!("{address}/{bits}"), &format!("dev {}", east2.interface()));
    }
    let servers = [Server::start(friend, friend.v4(), 5432), Server::start(friend, friend.v6(), 5432)];
    let back = [Server::start(client, client.v4(), 80), Server::start(client, client.v6(), 80)];
    let asked = || verdicts(mesh.node("east1").status(), "asked_conntrack");
    let before = asked();
    for server in &servers {
        server.assert_reached(client);
    }
    // The answers came by the tunnel, which knew nothing of what they answer.
    await_until("conntrack to have been asked", SOON, || (asked() > before).then_some(()));
    for server in &back {
        server.assert_not_reached(friend);
        server.assert_reached(mesh.node("east1").host());
    }
}

fn verdicts(status: Value, reason: &str) -> u64 {
    let list = status["policy"]["verdicts"].as_array().cloned().unwrap_or_default();
    list.iter().find(|count| count["reason"] == reason).and_then(|count| count["packets"].as_u64()).unwrap_or(0)
}

#[test]
fn what_a_node_rewrites_to_a_remote_pod_is_judged_there_as_the_nodes() {
    let world = World::start("policy-remote-port", 2);
    let mesh = &world.mesh;
    let (client, west1, far) = (world.client(), mesh.node("west1"), mesh.pod("west2"));
    put_pod(&mesh.etcd, ("shop", "far"), &json!({"app": "far"}), "west2", far.addresses());
    let overlay = *west1.overlay().iter().find(|ip| ip.is_ipv4()).unwrap();
    let rewrite = |masquerade: &str| {
        format!(
            "add table ip nodeport\ndelete table ip nodeport\ntable ip nodeport {{\nchain pre {{\n\
             type nat hook prerouting priority dstnat\n\
             ip daddr {overlay} meta l4proto {{ tcp, udp }} th dport 30080 dnat to {}:5432\n}}\n\
             chain post {{\ntype nat hook postrouting priority srcnat - 1\n{masquerade}\n}}\n}}",
            far.v4()
        )
    };
    let behind = Server::start(far, far.v4(), 5432);
    let node_port = behind.at_port(overlay, 30080);
    // With the client's address it would come out of another node's hands than the key says.
    west1.host().nft(&rewrite(""));
    behind.assert_reached(client);
    node_port.assert_not_reached(client);
    west1.host().nft(&rewrite(&format!("ip daddr {} ct status dnat snat to {overlay}", far.v4())));
    node_port.assert_reached(client);
    let from = |address: IpAddr| json!([{"from": [{"ipBlock": {"cidr": format!("{address}/32")}}]}]);
    world.policy("far", &from(client.v4()));
    behind.assert_reached(client);
    node_port.assert_not_reached(client);
    // A process of that node is the same address to it.
    behind.assert_not_reached(west1.host());
    world.policy("far", &from(overlay));
    node_port.assert_reached(client);
    behind.assert_not_reached(client);
    behind.assert_reached(west1.host());
}
