//! Outside WireGuard peers, put into etcd by an operator.
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod)
//!                         sniffs │ └── store: etcd
//!                              abroad
//!                                ├── outside1: wireguard-go, the newest
//!                                ├── outside2: wireguard-go of Debian
//!                                └── outside3: boringtun-cli
//! ```

use std::net::IpAddr;

use integration::{
    Implementation, await_ok, await_until, key_pair, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON,
    outside_peer::{
        Abroad, OutsidePeer, add_abroad, await_known, await_reaches, config, drops, node_key, record, seen_as,
    },
};

fn mesh(title: &str, outside: u8) -> (Mesh, Abroad) {
    let sites = TwoSites::with_hosts(title, 1);
    let abroad = add_abroad(&sites, outside);
    (Mesh::start_on(sites, CONFIG, |meshd| meshd), abroad)
}

fn every_pod(mesh: &Mesh) -> Vec<IpAddr> {
    mesh.pods.iter().flat_map(|pod| pod.addresses().to_vec()).collect()
}

/// Each implementation, configured by the printed file, reaches every pod and is reached, as itself; two of them do not
/// reach each other through a node.
#[test]
fn each_implementation_reaches_every_pod_as_itself_and_nobody_through_a_node() {
    let (mesh, abroad) = mesh("outside-implementations", 3);
    let implementations =
        [Implementation::WireguardGo, Implementation::DebianWireguardGo, Implementation::BoringtunCli];
    let peers: Vec<OutsidePeer> = implementations
        .into_iter()
        .zip(1..)
        .map(|(implementation, number)| {
            let host = &abroad.hosts[usize::from(number) - 1];
            OutsidePeer::join(&mesh, host, implementation, &format!("peer{number}"), number, &Value::Null)
        })
        .collect();
    for peer in &peers {
        peer.await_reaches(every_pod(&mesh));
        for pod in &mesh.pods {
            await_reaches(pod, peer.v4);
            await_reaches(pod, peer.v6);
            assert_eq!(seen_as(&peer.host, pod, pod.v4()), peer.v4);
            assert_eq!(seen_as(&peer.host, pod, pod.v6()), peer.v6);
            assert_eq!(seen_as(pod, &peer.host, peer.v4), pod.v4());
            assert_eq!(seen_as(pod, &peer.host, peer.v6), pod.v6());
        }
    }

    // Transit: the first peer thinks that the second one is behind east1.
    let (first, second) = (&peers[0], &peers[1]);
    let east = mesh.node("east1");
    let before = drops(&east.status(), "in_wrong_destination");
    first.allow_more(&node_key(&mesh, "east1"), &[second.v4, second.v6]);
    for address in [second.v4, second.v6] {
        first.wg.route(&address.to_string());
    }
    await_ok("the packets for another peer to be counted", SOON, || {
        for address in [second.v4, second.v6] {
            ping(&first.host, address).assert_none_answered();
        }
        let after = drops(&east.status(), "in_wrong_destination");
        if after >= before + 6 { Ok(()) } else { Err(format!("{before} before, {after} after")) }
    });
    // What was a peer's stays one.
    first.await_reaches(every_pod(&mesh));
}

/// With a pre-shared key; another one in etcd needs the other one at the peer. Deleting the record ends it at once.
#[test]
fn a_preshared_key_is_needed_and_a_deleted_peer_is_out_at_once() {
    let (mesh, abroad) = mesh("outside-psk", 1);
    let host = &abroad.hosts[0];
    let psk = || host.run("wg genpsk").stdout.trim().to_owned();
    let (old, new) = (psk(), psk());
    let peer = OutsidePeer::join(&mesh, host, Implementation::WireguardGo, "laptop", 1, &json!({"presharedKey": old}));
    peer.await_reaches(every_pod(&mesh));

    let addresses = [format!("{}/32", peer.v4), format!("{}/128", peer.v6)];
    let key = format!("/meshd/peers/{}", peer.name);
    mesh.etcd.put(&key, &record(&peer.public_key, &addresses, &json!({"presharedKey": new})));
    let pod = mesh.pod("east1");
    // The nodes have dropped the sessions of the old key: nothing gets through, and no new session comes about.
    await_until("the old pre-shared key to be refused", SOON, || {
        let answers = pod.addresses().iter().map(|address| ping(host, address).answers.len()).sum::<usize>();
        (answers == 0).then_some(())
    });
    peer.wg.setconf(&config(&mesh, &peer.name, &peer.private_key, Some(&new)));
    peer.await_reaches(every_pod(&mesh));
    let printed = mesh.nodes[0].meshctl(&["peers", "config", &peer.name]).stdout;
    assert!(!printed.contains(&new), "the pre-shared key is printed:\n{printed}");

    mesh.etcd.del(&key);
    await_until("the deleted peer to be out", SOON, || ping(host, pod.v4()).answers.is_empty().then_some(()));
    for node in &mesh.nodes {
        await_until("the peer to be gone", SOON, || {
            let peers = node.try_json(&["peers"])?;
            peers.as_array()?.iter().all(|known| known["name"] != peer.name.as_str()).then_some(())
        });
        for net in &addresses {
            await_ok(&format!("the route to {net} to be gone"), SOON, || {
                let routes = node.host().run(&format!("ip route show root {net} dev {}", node.interface())).stdout;
                if routes.is_empty() { Ok(()) } else { Err(routes) }
            });
        }
    }
    for address in every_pod(&mesh) {
        ping(host, address).assert_none_answered();
    }
    // Put again, it comes back.
    mesh.etcd.put(&key, &record(&peer.public_key, &addresses, &json!({"presharedKey": new})));
    await_known(&mesh, &peer.name);
    peer.await_reaches(every_pod(&mesh));
}

/// Without an endpoint in etcd, the nodes find it wherever its packets come from: another port, another address, the
/// other family.
#[test]
fn a_peer_without_endpoint_roams() {
    let (mesh, abroad) = mesh("outside-roams", 1);
    let (host, interface) = (&abroad.hosts[0], &abroad.interfaces[0]);
    let peer = OutsidePeer::join(&mesh, host, Implementation::WireguardGo, "phone", 1, &Value::Null);
    let pods = every_pod(&mesh);
    peer.await_reaches(pods.clone());
    let is_at = |wanted: &str| {
        for node in &mesh.nodes {
            await_ok(&format!("{} to see the peer at {wanted}", node.name()), SOON, || {
                let report = ping(host, pods[0]);
                ping(host, *pods.last().unwrap());
                let at = node.peer("phone").map(|peer| peer["endpoint"].to_string()).unwrap_or_default();
                if at.contains(wanted) { Ok(()) } else { Err(format!("{at}\n{}", report.text)) }
            });
        }
        // And back along the new path, with what the pods send first.
        for pod in &mesh.pods {
            await_reaches(pod, peer.v4);
            await_reaches(pod, peer.v6);
        }
    };
    is_at("100.65.0.11:");

    // Another port (N7).
    peer.wg.set("listen-port 34567");
    is_at("100.65.0.11:34567");

    // Another address (N7).
    host.sysctl("net/ipv4/conf/all/promote_secondaries", "1");
    interface.add_address("100.65.0.77/24");
    interface.remove_address("100.65.0.11/24");
    host.ip(&["route replace default via 100.65.0.1"]);
    is_at("100.65.0.77:34567");

    // IPv6, and another address of it (N8).
    let call = |v6: bool| {
        for site in [&mesh.sites.east, &mesh.sites.west] {
            peer.call(&mesh, &format!("{}1", site.name), &if v6 { site.v6(0) } else { site.v4(0) });
        }
    };
    call(true);
    is_at("[2001:db8:9::11]:34567");
    interface.add_address("2001:db8:9::77/64");
    interface.remove_address("2001:db8:9::11/64");
    is_at("[2001:db8:9::77]:34567");

    // And back to IPv4.
    call(false);
    is_at("100.65.0.77:34567");

    // A restarted node knows the peer's endpoint: the first packets of its pods get there.
    for (node, pod) in mesh.nodes.iter().zip(&mesh.pods) {
        node.restart();
        node.await_ready(SOON);
        await_reaches(pod, peer.v4);
        await_reaches(pod, peer.v6);
    }
}

/// Records that would take what is others' are refused everywhere, each with its reason, and change nothing.
#[test]
fn prefixes_that_are_others_are_refused() {
    let (mesh, abroad) = mesh("outside-overlaps", 1);
    let host = &abroad.hosts[0];
    let peer = OutsidePeer::join(&mesh, host, Implementation::WireguardGo, "good", 1, &Value::Null);
    peer.await_reaches(every_pod(&mesh));
    let cases = [
        ("of-network", "10.244.0.0/24", "prefix_conflict"),
        ("of-network6", "fd42:244:0:7::/64", "prefix_conflict"),
        ("around-network", "10.0.0.0/8", "prefix_conflict"),
        ("of-peer", "10.9.0.0/24", "prefix_conflict"),
        ("of-node", "198.51.100.0/24", "covers_underlay"),
        ("of-etcd", "203.0.113.0/28", "covers_underlay"),
        ("of-hop", "192.0.2.1/32", "covers_underlay"),
    ];
    for (name, net, _) in cases {
        let (_, public_key) = key_pair(host);
        mesh.etcd.put(&format!("/meshd/peers/{name}"), &record(&public_key, &[net.to_owned()], &Value::Null));
    }
    let east = mesh.node("east1");
    for (name, net, code) in cases {
        let status = east.await_status(&format!("to refuse peers/{name}"), SOON, |status| {
            let problems = status["problems"].as_array().into_iter().flatten();
            let cause = |problem: &Value| problem["cause"].as_str().unwrap_or_default().to_owned();
            let named = format!("peers/{name} ");
            problems.into_iter().any(|problem| problem["code"] == code && cause(problem).starts_with(&named))
        });
        assert_eq!(status["state"], "degraded");
        let routes = east.host().run(&format!("ip -o route show root {net} dev {}", east.interface())).stdout;
        assert!(!routes.split_whitespace().any(|word| word == net), "{name}: {routes}");
    }
    await_reaches(mesh.pod("east1"), mesh.pod("west1").v4());
    peer.await_reaches(every_pod(&mesh));
}
