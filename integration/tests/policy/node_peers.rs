//! Nodes as peers of ClusterNetworkPolicies: by labels of Node objects, at InternalIPs and at overlay addresses.
//!
//! ```text
//!   east1 (web) ─┬─ switch ─ router ─ switch ─┬─ west1
//!   east2        ┘                            └─ west2      cluster east: east1, east2; cluster west: west1, west2
//! ```

use integration::{await_ok, topology::Mesh};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force,
    clusters::{put, put_pod},
    mesh,
    probe::Server,
};

const PORT: u16 = 5432;

/// The Node object of a node of its site's cluster, with this label `zone`.
fn put_node(mesh: &Mesh, node: &str, zone: &str) {
    let (cluster, number) = node.split_at(4);
    let site = if cluster == "east" { &mesh.sites.east } else { &mesh.sites.west };
    let number = number.parse::<usize>().unwrap() - 1;
    let ips = [site.v4(number), site.v6(number)].map(|ip| json!({"type": "InternalIP", "address": ip}));
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"labels": {"zone": zone}},
        "status": {"addresses": ips}});
    put(mesh, cluster, &format!("nodes/{node}"), object);
}

/// A ClusterNetworkPolicy of cluster east for all of its pods, with these egress rules: action and peer.
fn put_policy(mesh: &Mesh, rules: &[(&str, Value)]) {
    let rules: Vec<Value> = rules.iter().map(|(action, peer)| json!({"action": action, "to": [peer]})).collect();
    let spec = json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}}, "egress": rules});
    let object = json!({"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy",
        "metadata": {}, "spec": spec});
    put(mesh, "east", "clusternetworkpolicies/nodes", object);
    await_in_force(mesh);
}

fn nodes(zone: &str) -> Value {
    json!({"nodes": {"matchLabels": {"zone": zone}}})
}

/// A server of a process of this node at each of its addresses, of the overlay and below it.
fn servers(mesh: &Mesh, node: &str) -> Vec<Server> {
    let (site, number) = node.split_at(4);
    let site = if site == "east" { &mesh.sites.east } else { &mesh.sites.west };
    let number = number.parse::<usize>().unwrap() - 1;
    let below = [site.v4(number), site.v6(number)].map(|ip| ip.parse().unwrap());
    let node = mesh.node(node);
    node.overlay().into_iter().chain(below).map(|ip| Server::start(node.host(), ip, PORT)).collect()
}

#[test]
fn a_rule_for_nodes_means_those_of_its_cluster_at_all_of_their_addresses() {
    let mesh = mesh("policy-node-peers", 2);
    for (node, zone) in [("east1", "a"), ("east2", "b"), ("west1", "a"), ("west2", "b")] {
        put_node(&mesh, node, zone);
    }
    put_pod(&mesh, "east", ("web", "web"), "east1");
    await_in_force(&mesh);
    let web = mesh.pod("east1");
    let [own, near, far] = ["east1", "east2", "west2"].map(|node| servers(&mesh, node));
    let reached = |servers: &[Server]| servers.iter().for_each(|server| server.assert_reached(web));
    let refused = |servers: &[Server]| servers.iter().for_each(|server| server.assert_not_reached(web));
    for servers in [&own, &near, &far] {
        reached(servers);
    }

    // By the tunnel, by the underlay, and to the pod's own node: each packet meets the rule.
    put_policy(&mesh, &[("Deny", nodes("b"))]);
    refused(&near);
    reached(&own);
    reached(&far);
    let east1 = mesh.node("east1");
    for server in &near {
        let asked = ["policy", "explain", "east:shop/web", &server.at.ip().to_string(), &format!("tcp/{PORT}")];
        let explained = east1.meshctl(&asked);
        assert!(explained.stdout.contains("ClusterNetworkPolicy east:nodes (Admin), egress rule 0"), "{explained:?}");
    }
    let shown = east1.meshctl(&["policy", "show", "east:nodes"]);
    assert!(shown.stdout.contains("[0] Deny nodes {zone=b}"), "{shown:?}");
    await_ok("flows to name the rule", SOON, || {
        let flows = east1.meshctl(&["flows"]).stdout;
        if flows.contains("east:nodes") { Ok(()) } else { Err(flows) }
    });

    // Labels come and go.
    put_node(&mesh, "east1", "b");
    put_node(&mesh, "east2", "a");
    await_in_force(&mesh);
    refused(&own);
    reached(&near);
    put_node(&mesh, "east1", "a");
    put_node(&mesh, "east2", "b");
    await_in_force(&mesh);
    refused(&near);

    // Without its Node object it may be any Node: that is no way out of the rule.
    mesh.etcd.del("/meshd/k8s/east/nodes/east2");
    await_in_force(&mesh);
    refused(&near);

    // Nor may it be reached by a rule that accepts.
    let all = json!({"networks": ["0.0.0.0/0", "::/0"]});
    put_policy(&mesh, &[("Accept", nodes("b")), ("Deny", all)]);
    refused(&near);
    refused(&far);
    put_node(&mesh, "east2", "b");
    await_in_force(&mesh);
    reached(&near);
    refused(&far);
    mesh.sniffer.assert_clean();
}
