//! What comes out of the tunnel for a pod is judged in user space.
//!
//! ```text
//!   east1 (pod client) ── router ── west1 (pod db)
//! ```

use std::{net::IpAddr, time::Duration};

use serde_json::json;

use crate::{
    SOON, await_in_force, mesh,
    objects::{delete_policy, put_namespace, put_pod, put_policy},
    probe::{Server, round_trip},
};
use integration::{await_until, topology::Mesh};

#[track_caller]
fn two_pods(title: &str) -> Mesh {
    let mesh = mesh(title, 1);
    put_namespace(&mesh.etcd, "shop", &json!({"team": "a"}));
    for (node, name) in [("east1", "client"), ("west1", "db")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, mesh.pod(node).addresses());
    }
    mesh
}

#[test]
fn a_policy_refuses_and_allows_and_goes() {
    let mesh = two_pods("policy-tunnel");
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    let servers = [Server::start(db, db.v4(), 5432), Server::start(db, db.v6(), 5432)];
    let back = Server::start(client, client.v4(), 80);
    for server in &servers {
        server.assert_reached(client);
    }
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_not_reached(client);
    }
    // The isolated pod may still ask, and gets its answers.
    back.assert_reached(db);
    let allow = json!({
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
                     "ports": [{"port": 5432}, {"port": 5432, "protocol": "UDP"}]}],
    });
    put_policy(&mesh.etcd, "shop", "db", &allow);
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(client);
    }
    delete_policy(&mesh.etcd, "shop", "db");
    await_in_force(&mesh);
    for server in &servers {
        server.assert_not_reached(client);
    }
    delete_policy(&mesh.etcd, "shop", "closed");
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(client);
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn what_comes_for_a_process_of_the_node_is_judged_where_it_begins_alone() {
    let mesh = two_pods("policy-process");
    let (client, west) = (mesh.pod("east1"), mesh.node("west1"));
    let servers: Vec<Server> =
        west.overlay().into_iter().map(|address| Server::start(west.host(), address, 9000)).collect();
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {}}));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(client);
    }
    let blocks: Vec<_> =
        west.overlay().iter().map(|ip| json!({"ipBlock": {"cidr": format!("{ip}/{}", bits(*ip))}})).collect();
    let egress =
        |rules| json!({"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"], "egress": rules});
    put_policy(&mesh.etcd, "shop", "out", &egress(json!([])));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_not_reached(client);
    }
    put_policy(&mesh.etcd, "shop", "out", &egress(json!([{"to": blocks}])));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(client);
    }
    mesh.sniffer.assert_clean();
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

#[test]
fn an_established_connection_is_cut_and_taken_up_again() {
    let mesh = two_pods("policy-rejudge");
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    let server = Server::start(db, db.v4(), 5432);
    let mut connection = server.connect(client);
    assert!(round_trip(&mut connection, SOON));
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    assert!(!round_trip(&mut connection, Duration::from_millis(700)), "the connection goes on");
    delete_policy(&mesh.etcd, "shop", "closed");
    await_in_force(&mesh);
    // What was sent meanwhile is sent again by TCP itself.
    await_until("the connection to go on", SOON, || round_trip(&mut connection, Duration::from_secs(1)).then_some(()));
}

#[test]
fn a_restart_of_the_daemons_cuts_no_connection() {
    let mesh = two_pods("policy-restart");
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    // Each isolated for what comes: replies pass by what the kernel knows only.
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "client"}}}));
    await_in_force(&mesh);
    let server = Server::start(db, db.v4(), 5432);
    let mut connection = server.connect(client);
    assert!(round_trip(&mut connection, SOON));
    for node in &mesh.nodes {
        node.kill9();
        node.start();
    }
    await_until("the connection to go on", SOON, || round_trip(&mut connection, Duration::from_secs(1)).then_some(()));
    let stranger = Server::start(client, client.v4(), 80);
    stranger.assert_not_reached(db);
}
