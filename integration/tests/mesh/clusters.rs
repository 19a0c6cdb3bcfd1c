//! Two clusters with different pod networks in one mesh.
//!
//! ```text
//!   east1 (pod of 10.244.0.0/16) ─ switch ── router ── switch ─ west1 (pod of 10.42.0.0/16)
//!                                        sniffs │ └── store: etcd
//!                                             abroad ── outside1: an external peer that forges
//! ```

use std::{fs, net::IpAddr};

use integration::{
    Implementation, Meshd, Ping, await_ok, key_pair, ping,
    topology::{Mesh, TwoSites},
};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{
    SOON,
    outside_peer::{OutsidePeer, add_abroad, drops, record, seen_as},
    problems,
};

const CLUSTERS: &str = r#"{"Networks": [
    {"cidr": "10.244.0.0/16", "cluster": "east"}, {"cidr": "fd42:244::/48", "cluster": "east"},
    {"cidr": "10.42.0.0/16", "cluster": "west", "SubnetLen": 25}, {"cidr": "fd42:42::/48", "cluster": "west"}]}"#;

fn in_cluster(meshd: Meshd) -> Meshd {
    let cluster = if meshd.is_at("west") { "--cluster west" } else { "--cluster east" };
    meshd.args(cluster)
}

#[test]
fn two_clusters_with_networks_of_their_own_are_one_mesh() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("clusters", 1), CLUSTERS, in_cluster);
    mesh.await_all_reach_each_other();
    for (name, networks, len) in
        [("east1", ["10.244.0.0/16", "fd42:244::/48"], 24), ("west1", ["10.42.0.0/16", "fd42:42::/48"], 25)]
    {
        let node = mesh.node(name);
        let networks = networks.map(|net| net.parse::<IpNet>().unwrap());
        let subnets = node.subnets();
        assert_eq!(subnets.iter().find(|net| net.addr().is_ipv4()).unwrap().prefix_len(), len);
        assert!(subnets.iter().all(|subnet| networks.iter().any(|net| net.contains(subnet))), "{name}: {subnets:?}");
        let status = node.status();
        assert_eq!(status["cluster"], name.trim_end_matches('1'));
        let all = node.subnet_env("FLANNEL_NETWORK").unwrap();
        assert!(all.starts_with(&networks[0].to_string()), "{name}: {all}");
        assert_eq!(all.split(',').count(), 2, "{name}: {all}");
        let env = fs::read_to_string(node.run_dir().join("subnet.env")).unwrap();
        assert!(env.contains("fd42:42::/48") && env.contains("fd42:244::/48"), "{env}");
        // Every network has its fallback route, this node's own and the other's.
        let routes = node.routes();
        for net in ["10.244.0.0/16", "10.42.0.0/16", "fd42:244::/48", "fd42:42::/48"] {
            let floor = |route: &&Value| route["dst"] == net && route["path"] == "unreachable";
            assert!(routes.as_array().unwrap().iter().any(|route| floor(&route)), "{name}: {routes}");
        }
    }
    // Nothing is masqueraded between clusters, so policies see who sends.
    let (east, west) = (mesh.pod("east1"), mesh.pod("west1"));
    for (from, to) in [(east, west), (west, east)] {
        assert_eq!(seen_as(from, to, to.v4()), from.v4());
        assert_eq!(seen_as(from, to, to.v6()), from.v6());
    }
    judged(&mesh);
    claims_inside_a_network_are_refused(&mesh);
    without_routes_nothing_leaves_in_the_clear(&mesh);
    mesh.sniffer.assert_clean();
}

/// A policy judges packets from the other cluster's network as those from the own.
fn judged(mesh: &Mesh) {
    let (east, west) = (mesh.pod("east1"), mesh.pod("west1"));
    let pod = |name: &str, node: &str, addresses: &[IpAddr]| {
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": name, "labels": {"app": name}},
            "spec": {"nodeName": node}, "status": {"phase": "Running", "podIPs": ips}});
        mesh.etcd.put(&format!("/meshd/pods/shop/{name}"), &object.to_string());
    };
    let policy = |from: &str| {
        let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": "shop", "name": "db"},
            "spec": {"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": from}}}]}]}});
        mesh.etcd.put("/meshd/networkpolicies/shop/db", &object.to_string());
    };
    pod("db", "east1", east.addresses());
    pod("web", "west1", west.addresses());
    policy("other");
    for address in east.addresses() {
        await_ok("the policy to refuse the other cluster's pod", SOON, || {
            let report = ping(west, address);
            if report.lost() == 0 { Err(report.text) } else { Ok(()) }
        });
        ping(west, address).assert_none_answered();
    }
    policy("web");
    for address in east.addresses() {
        await_ok("the policy to let the other cluster's pod in", SOON, || {
            let report = ping(west, address);
            if report.lost() == 0 { Ok(()) } else { Err(report.text) }
        });
    }
    mesh.etcd.del("/meshd/networkpolicies/shop/db");
}

/// Neither an external peer nor a configuration takes anything of a cluster's network.
fn claims_inside_a_network_are_refused(mesh: &Mesh) {
    let east = mesh.node("east1");
    let (_, key) = key_pair(east.host());
    let taken = mesh.pod("west1").v4();
    mesh.etcd.put("/meshd/peers/thief", &record(&key, &[format!("{taken}/32")], &Value::Null));
    let status = east.await_status("to refuse the peer", SOON, |status| {
        problems(status).any(|problem| problem["cause"].to_string().contains("peers/thief"))
    });
    let cause = problems(&status).find(|problem| problem["code"] == "prefix_conflict").unwrap()["cause"].to_string();
    assert!(cause.contains("must not overlap the network 10.42.0.0/16 of cluster west of config"), "{cause}");
    ping(mesh.pod("east1"), taken).assert_all_answered();
    mesh.etcd.del("/meshd/peers/thief");

    // A configuration in which two clusters overlap, and one without a network that is in use.
    let overlapping = CLUSTERS.replace("10.42.0.0/16", "10.244.64.0/18");
    let without = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48"}"#;
    for (config, says) in [(&*overlapping, "must not overlap 10.244.0.0/16 of cluster east"), (without, "10.42.")] {
        mesh.etcd.put("/meshd/config", config);
        east.await_status("to keep the configuration", SOON, |status| {
            problems(status).any(|problem| problem["cause"].to_string().contains(says))
        });
        ping(mesh.pod("east1"), taken).assert_all_answered();
    }
    mesh.etcd.put("/meshd/config", CLUSTERS);
    east.await_status("to be well", SOON, |status| problems(status).next().is_none());
}

/// While the routes into the other cluster's network are away, the fallback route and then the guard stop its packets.
fn without_routes_nothing_leaves_in_the_clear(mesh: &Mesh) {
    let (node, pod, far) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    let subnets = mesh.node("west1").subnets();
    node.stop();
    for subnet in &subnets {
        let route = format!("route delete {subnet} dev {}", node.interface());
        node.host().ip(&[&route]);
    }
    let frames = mesh.sniffer.frames();
    for address in far.addresses() {
        ping(pod, address).assert_none_answered();
        ping(node.host(), address).assert_none_answered();
    }
    // Without the fallback routes the default route leads out, to the router that sniffs.
    for (network, family) in [("10.42.0.0/16", "-4"), ("fd42:42::/48", "-6")] {
        node.host().run(&format!("ip {family} route delete unreachable {network}"));
    }
    for address in far.addresses() {
        let out = node.host().run(&format!("ip route get {address}"));
        assert!(!out.stdout.contains(node.interface()), "{}", out.stdout);
        ping(pod, address).assert_none_answered();
        ping(node.host(), address).assert_none_answered();
    }
    assert!(mesh.sniffer.frames() >= frames);
    mesh.sniffer.assert_clean();
    node.cont();
    mesh.await_all_reach_each_other();
}

/// A source of one cluster's network counts from the node that owns it and from no other sender.
#[test]
fn a_source_of_the_other_clusters_network_is_refused() {
    let sites = TwoSites::with_hosts("clusters-forged", 1);
    let abroad = add_abroad(&sites, 1);
    let mesh = Mesh::start_on(sites, CLUSTERS, in_cluster);
    let forger = OutsidePeer::join(&mesh, &abroad.hosts[0], Implementation::WireguardGo, "forger", 1, &Value::Null);
    let (east, west) = (mesh.pod("east1"), mesh.pod("west1"));
    mesh.await_all_reach_each_other();
    forger.await_reaches(east.addresses().to_vec());

    // Through the tunnel: a pod of cluster west, and an unused address of its network.
    for source in [west.v4(), west.v6(), "10.42.255.200".parse().unwrap()] {
        let destination = if source.is_ipv4() { east.v4() } else { east.v6() };
        let len = if source.is_ipv4() { 32 } else { 128 };
        forger.host.ip(&[&format!("addr add {source}/{len} dev {}", forger.wg.interface())]);
        let before = drops(&mesh.node("east1").status(), "in_wrong_source");
        await_ok(&format!("packets from {source} to be dropped"), SOON, || {
            Ping::new(destination).option(&format!("-I {source}")).run(&forger.host).assert_none_answered();
            let after = drops(&mesh.node("east1").status(), "in_wrong_source");
            if after >= before + 3 { Ok(()) } else { Err(format!("{before} drops before, {after} after")) }
        });
        forger.host.ip(&[&format!("addr del {source}/{len} dev {}", forger.wg.interface())]);
    }

    // From a pod of cluster west, whose node is a member of the mesh, with an address of cluster east's network.
    let subnet = mesh.node("east1").subnets().into_iter().find(|net| net.addr().is_ipv4()).unwrap();
    let stolen = subnet.hosts().nth(200).unwrap();
    west.interface().add_address(&format!("{stolen}/32"));
    let sniffer = east.sniff(&[IpNet::from(stolen)]);
    Ping::new(east.v4()).option(&format!("-I {stolen}")).run(west).assert_none_answered();
    assert_eq!(sniffer.violations(), 0, "packets with a stolen source came to a pod");
    ping(west, east.v4()).assert_all_answered();
    mesh.sniffer.assert_clean();
}
