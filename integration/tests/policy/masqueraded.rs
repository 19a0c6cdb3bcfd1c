//! Another program on a node gives its pods' packets the node's address. The far end refuses them and names that node.
//!
//! ```text
//!   east1 (client) ─┐
//!                   ├─ switch ──── router ──── switch ─┬─ west1 (db)
//!   east2 (db) ─────┘                │                 └─ west2
//!                                  store
//! ```

use integration::{MeshdNode, await_ok, ping};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_pod, put_policy},
    probe::Server,
};

const PORT: u16 = 5432;

/// The refused flows that this node has sampled.
fn refused(node: &MeshdNode) -> Vec<Value> {
    let output = node.meshctl(&["-o", "json", "flows", "--denied"]);
    output.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn hints(node: &MeshdNode) -> Vec<Value> {
    let status = node.status();
    let problems = status["problems"].as_array().unwrap();
    problems.iter().filter(|problem| problem["code"] == "peer_masquerades").cloned().collect()
}

#[test]
fn the_far_end_names_the_node_that_masquerades() {
    let mesh = mesh("policy-masqueraded", 2);
    let east1 = mesh.node("east1");
    east1.await_path("east2", "direct", SOON);
    mesh.node("east2").await_path("east1", "direct", SOON);
    let client = mesh.pod("east1");
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    for node in ["east2", "west1"] {
        put_pod(&mesh.etcd, ("shop", &format!("db-{node}")), &json!({"app": "db"}), node, mesh.pod(node).addresses());
    }
    let from = json!([{"podSelector": {"matchLabels": {"app": "client"}}}]);
    put_policy(
        &mesh.etcd,
        "shop",
        "db",
        &json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": from, "ports": [{"port": PORT}]}]}),
    );
    await_in_force(&mesh);
    let ends = ["east2", "west1"].map(|node| {
        let pod = mesh.pod(node);
        let servers = pod.addresses().iter().map(|address| Server::start(pod, *address, PORT)).collect::<Vec<_>>();
        (mesh.node(node), servers)
    });
    for (far, servers) in &ends {
        servers.iter().for_each(|server| {
            await_ok("the client to be let in", SOON, || {
                if server.tcp_answers(client) { Ok(()) } else { Err(far.name().to_owned()) }
            })
        });
        // The node itself may not, and no pod of it may do the same: that hints at nothing.
        servers.iter().for_each(|server| ping(east1.host(), server.at.ip()).assert_none_answered());
        await_ok("that to be sampled", SOON, || {
            let refused = refused(far);
            let sampled = refused.iter().any(|flow| matches!(flow["protocol"].as_u64(), Some(1 | 58)));
            if sampled { Ok(()) } else { Err(format!("{refused:?}")) }
        });
        assert!(refused(far).iter().all(|flow| flow["hint"].is_null()), "{:?}", refused(far));
        assert_eq!(hints(far), Vec::<Value>::new());
    }
    for (tool, but) in [("iptables-nft", "10.10.0.0/16"), ("ip6tables-nft", "fd00:10::/64")] {
        east1
            .host()
            .run(&format!("{tool} -t nat -A POSTROUTING -m addrtype ! --dst-type LOCAL ! -d {but} -j MASQUERADE"));
    }
    for (far, servers) in &ends {
        for server in servers {
            assert!(!server.tcp_answers(client), "{} is still reached", server.at);
            await_ok("a refused flow to name the node", SOON, || {
                let refused = refused(far);
                let hinted = refused.iter().any(|flow| {
                    let hint = flow["hint"].as_str().unwrap_or_default();
                    flow["destination"] == json!(server.at.ip())
                        && hint.contains("an address of node east1, whose pod shop/client would be allowed")
                        && hint.contains("meshctl doctor on east1")
                });
                if hinted { Ok(()) } else { Err(format!("{refused:?}")) }
            });
        }
        let named = hints(far);
        assert_eq!(named.len(), 1, "one for the node: {named:?}");
        assert!(named[0]["cause"].as_str().unwrap().contains("an address of node east1"), "{named:?}");
        assert!(named[0]["remedy"].as_str().unwrap().starts_with("meshctl doctor # on east1"), "{named:?}");
        // Nothing of the far end is wrong.
        far.await_status("to be well", SOON, |status| status["state"] == "running");
    }
    assert_eq!(hints(mesh.node("west2")), Vec::<Value>::new());
}
