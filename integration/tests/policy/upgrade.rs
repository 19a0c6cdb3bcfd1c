//! Nodes go from the previous release to this one, one after the other, and back, under traffic and policies.
//!
//! ```text
//!   east1 (db) ─┐                             ┌─ west1 (client, stranger)
//!               ├─ switch ── router ── switch ┤
//!   east2 (client, stranger) ┘        │       └─ west2
//!                                   etcd
//! ```

use std::path::Path;

use integration::{
    CniPod, CniRuntime, MeshdNode, Namespace, TcpCheck, await_ok, binary, previous,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::json;

use crate::{
    SOON, await_in_force,
    objects::{put_pod, put_policy},
    probe::Server,
};

/// Slow enough for a busy machine, fast enough that a gap shows.
const PACE: u64 = 200_000;
const PORT: u16 = 5432;

/// What every step of an upgrade is checked by.
struct Traffic<'m> {
    mesh: &'m Mesh,
    streams: Vec<TcpCheck>,
    servers: Vec<Server>,
    clients: [&'m Namespace; 2],
    strangers: [&'m Namespace; 2],
}

impl Traffic<'_> {
    /// The streams go on, new flows are allowed and refused as policies say, and direct paths are direct.
    #[track_caller]
    fn check(&self) {
        for stream in &self.streams {
            stream.await_progress(SOON);
        }
        for server in &self.servers {
            for client in self.clients {
                server.assert_reached(client);
            }
            for stranger in self.strangers {
                server.assert_not_reached(stranger);
            }
        }
        self.mesh.node("east1").await_path("east2", "direct", SOON);
        self.mesh.node("east1").await_path("west1", "wireguard", SOON);
        self.mesh.sniffer.assert_clean();
    }

    /// Ends the node's daemon and starts this build of it.
    #[track_caller]
    fn change(&self, node: &MeshdNode, program: Option<&Path>) {
        assert!(node.term().success());
        for (server, stranger) in self.servers.iter().flat_map(|server| self.strangers.map(|from| (server, from))) {
            server.assert_not_reached(stranger);
        }
        node.set_program(program);
        node.start();
        node.await_ready(SOON);
        self.check();
    }
}

fn pod_on(mesh: &Mesh, network: &CniRuntime, node: &str, name: &str) -> CniPod {
    let pod = network.pod(name);
    put_pod(&mesh.etcd, ("default", name), &json!({"app": name.split('-').next()}), node, &pod.addresses);
    pod
}

#[test]
fn nodes_change_release_one_by_one_and_back_without_a_broken_stream_or_an_unjudged_packet() {
    let old = previous("meshd");
    let plugins = old.parent().unwrap();
    let sites = TwoSites::with_hosts("upgrade", 2);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.program(&old));
    let network = |node: &str| mesh.node(node).cni("1.0.0", &json!({})).plugins_from(plugins);
    let [east1, east2, west1] = ["east1", "east2", "west1"].map(network);
    let db = pod_on(&mesh, &east1, "east1", "db");
    let near = [pod_on(&mesh, &east2, "east2", "client-near"), pod_on(&mesh, &east2, "east2", "stranger-near")];
    let far = [pod_on(&mesh, &west1, "west1", "client-far"), pod_on(&mesh, &west1, "west1", "stranger-far")];
    let spec = json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]});
    put_policy(&mesh.etcd, "default", "db", &spec);
    await_in_force(&mesh);
    let servers = [db.v4(), db.v6()].map(|address| Server::start(&db, address, PORT));
    for (server, client) in servers.iter().flat_map(|server| [(server, &near[0]), (server, &far[0])]) {
        server.assert_reached(client);
    }
    let stream = |from: &CniPod, v6: bool| TcpCheck::start(from, &db, if v6 { db.v6() } else { db.v4() }, PACE);
    let traffic = Traffic {
        mesh: &mesh,
        streams: vec![stream(&near[0], false), stream(&near[0], true), stream(&far[0], false), stream(&far[0], true)],
        servers: servers.into(),
        clients: [&near[0], &far[0]],
        strangers: [&near[1], &far[1]],
    };
    traffic.check();

    // The receiver first, then the senders: each of them meets both releases at the other end.
    for name in ["east1", "west1", "east2", "west2"] {
        traffic.change(mesh.node(name), None);
    }
    // Back, and forward again.
    for program in [Some(old.as_path()), None] {
        traffic.change(mesh.node("east1"), program);
    }
    for stream in traffic.streams {
        stream.finish().assert_intact();
    }
    for node in &mesh.nodes {
        node.await_status("to have no problem", SOON, |status| status["problems"] == json!([]));
    }

    drop(traffic.servers);
    // An old plugin speaks to a new daemon while a node is upgraded.
    let late = pod_on(&mesh, &east1, "east1", "client-late");
    east1.del(&late.id, Some(&late)).unwrap_or_else(|failure| panic!("DEL by the old plugin: {failure}"));
    // The new plugin checks and frees what the old one attached.
    let east1 = east1.plugins_from(binary("meshd-cni").parent().unwrap());
    east1.check(&db.id, &db).unwrap_or_else(|failure| panic!("CHECK by the new plugin: {failure}"));
    east1.del(&db.id, Some(&db)).unwrap_or_else(|failure| panic!("DEL by the new plugin: {failure}"));
    await_ok("no attachment to be left on east1", SOON, || {
        let keys = mesh.etcd.get_prefix("/meshd/endpoints/").into_iter().map(|(key, _)| key);
        let left: Vec<String> = keys.filter(|key| key.contains("/db/") || key.contains("/client-late/")).collect();
        if left.is_empty() { Ok(()) } else { Err(left.join(" ")) }
    });
}
