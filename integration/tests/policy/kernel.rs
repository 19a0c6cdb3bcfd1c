//! What never enters a tunnel, or is rewritten behind it, is judged by nftables.
//!
//! ```text
//!   east1 (pods a, b) ─┐
//!                      ├─ switch ─ router ─ switch ─ west1 (pod db), west2
//!   east2 (pod) ───────┘
//! ```

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use serde_json::json;

use crate::{
    SOON, await_in_force, mesh,
    objects::{delete_policy, put_pod, put_policy},
    probe::{Server, round_trip},
};
use integration::{Namespace, await_ok, await_until};

const TABLE: &str = "nft list table inet meshd_policy";

/// How long is waited for a datagram.
const PATIENCE: Duration = Duration::from_millis(500);

/// A socket whose datagrams are told apart: one that was sent earlier may come late.
struct Sender {
    socket: UdpSocket,
    sent: Cell<u64>,
}

impl Sender {
    fn new(place: &Namespace, address: IpAddr, port: u16) -> Self {
        let socket = place.enter(|| UdpSocket::bind((address, port))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, sent: Cell::new(0) }
    }

    /// Sends a datagram; where it came from, if it comes to `other`.
    fn arrives(&self, other: &Self, at: SocketAddr) -> Option<SocketAddr> {
        self.sent.set(self.sent.get() + 1);
        let datagram = format!("{} of {:?}", self.sent.get(), self.socket.local_addr());
        self.socket.send_to(datagram.as_bytes(), at).unwrap();
        let mut buffer = [0; 128];
        while let Ok((length, from)) = other.socket.recv_from(&mut buffer) {
            if &buffer[..length] == datagram.as_bytes() {
                return Some(from);
            }
        }
        None
    }
}

#[test]
fn two_pods_of_one_node_and_a_direct_peer() {
    let mesh = mesh("policy-direct", 2);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    let (peer, far) = (mesh.pod("east2"), mesh.pod("west1"));
    mesh.node("east1").await_path("east2", "direct", SOON);
    for (pod, name, node) in [(db, "db", "east1"), (&neighbour, "neighbour", "east1"), (peer, "peer", "east2")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, pod.addresses());
    }
    let servers = [Server::start(db, db.v4(), 5432), Server::start(db, db.v6(), 5432)];
    for server in &servers {
        for from in [&neighbour, peer, far] {
            server.assert_reached(from);
        }
    }
    let mut connection = servers[0].connect(&neighbour);
    assert!(round_trip(&mut connection, SOON));
    let allow = |who: &str| {
        json!({"podSelector": {"matchLabels": {"app": "db"}},
               "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": who}}}]}]})
    };
    put_policy(&mesh.etcd, "shop", "db", &allow("peer"));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(peer);
        server.assert_not_reached(&neighbour);
        // No pod of that address is known.
        server.assert_not_reached(far);
        // The node itself reaches its pods whatever policies say.
        server.assert_reached(east1.host());
    }
    assert!(!round_trip(&mut connection, Duration::from_millis(700)), "the established connection goes on");
    put_policy(&mesh.etcd, "shop", "db", &allow("neighbour"));
    await_in_force(&mesh);
    for server in &servers {
        server.assert_reached(&neighbour);
        server.assert_not_reached(peer);
    }
    await_until("the connection to go on", SOON, || round_trip(&mut connection, Duration::from_secs(1)).then_some(()));
    mesh.sniffer.assert_clean();
}

/// Whatever way a flow goes on that policies cut: what answers it is no more let pass than what it began with.
#[test]
fn a_flow_that_is_cut_is_cut_in_both_directions() {
    let mesh = mesh("policy-cut", 2);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    let (peer, far) = (mesh.pod("east2"), mesh.pod("west1"));
    east1.await_path("east2", "direct", SOON);
    for (pod, name, node) in
        [(db, "db", "east1"), (&neighbour, "neighbour", "east1"), (peer, "peer", "east2"), (far, "far", "west1")]
    {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, pod.addresses());
    }
    await_in_force(&mesh);
    for address in [db.v4(), db.v6()] {
        let server = Sender::new(db, address, 5432);
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let clients: Vec<(Sender, SocketAddr)> = [&neighbour, peer, far]
            .iter()
            .map(|from| {
                let client = Sender::new(from, any, 0);
                let at = await_ok(&format!("{} to begin a flow", from.name()), SOON, || {
                    client.arrives(&server, (address, 5432).into()).ok_or_else(|| "it does not".to_owned())
                });
                (client, at)
            })
            .collect();
        // The server sends, and the client only listens.
        let hears = |(client, at): &(Sender, SocketAddr)| server.arrives(client, *at).is_some();
        for client in &clients {
            await_ok("the client to hear", SOON, || if hears(client) { Ok(()) } else { Err(client.1.to_string()) });
        }
        put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
        await_in_force(&mesh);
        for client in &clients {
            assert!(!hears(client), "{} still hears of a flow that is cut", client.1);
        }
        delete_policy(&mesh.etcd, "shop", "closed");
        await_in_force(&mesh);
        for client in &clients {
            await_ok("the flow to go on", SOON, || if hears(client) { Ok(()) } else { Err(client.1.to_string()) });
        }
    }
}

/// The same where the pod goes out under its node's own address: what comes back through the tunnel to that address is
/// turned back to the pod behind it.
#[test]
fn a_masqueraded_flow_is_cut_in_both_directions() {
    let mesh = mesh("policy-cut-masqueraded", 1);
    let (east1, db, far) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "far"), &json!({"app": "far"}), "west1", far.addresses());
    east1.host().nft(&format!(
        "add table inet others; add chain inet others out {{ type nat hook postrouting priority 100; }}; \
         add rule inet others out oifname {0} ip saddr {1} masquerade; \
         add rule inet others out oifname {0} ip6 saddr {2} masquerade",
        east1.interface(),
        db.v4(),
        db.v6()
    ));
    await_in_force(&mesh);
    for (from, to) in [(db.v4(), far.v4()), (db.v6(), far.v6())] {
        let (far, client) = (Sender::new(far, to, 5432), Sender::new(db, from, 0));
        let at = await_ok("the flow to begin", SOON, || {
            client.arrives(&far, (to, 5432).into()).ok_or_else(|| "it does not".to_owned())
        });
        assert!(east1.overlay().contains(&at.ip()), "{at} is not masqueraded");
        let hears = || far.arrives(&client, at).is_some();
        await_ok("the client to hear", SOON, || if hears() { Ok(()) } else { Err(to.to_string()) });
        put_policy(
            &mesh.etcd,
            "shop",
            "closed",
            &json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"]}),
        );
        await_in_force(&mesh);
        assert!(!hears(), "{to} is still heard in a flow that is cut");
        delete_policy(&mesh.etcd, "shop", "closed");
        await_in_force(&mesh);
        await_ok("the flow to go on", SOON, || if hears() { Ok(()) } else { Err(to.to_string()) });
    }
}

#[test]
fn egress_is_judged_where_it_begins() {
    let mesh = mesh("policy-egress", 2);
    let (east1, client) = (mesh.node("east1"), mesh.pod("east1"));
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", mesh.pod("west1").addresses());
    let (db, peer) = (mesh.pod("west1"), mesh.pod("east2"));
    let (far, near) = (Server::start(db, db.v4(), 5432), Server::start(peer, peer.v4(), 5432));
    let overlay = *east1.overlay().iter().find(|ip| ip.is_ipv4()).unwrap();
    let on_node = Server::start(east1.host(), overlay, 8080);
    for server in [&far, &near, &on_node] {
        server.assert_reached(client);
    }
    let spec = json!({"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"],
                      "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]});
    put_policy(&mesh.etcd, "shop", "out", &spec);
    await_in_force(&mesh);
    far.assert_reached(client);
    near.assert_not_reached(client);
    on_node.assert_not_reached(client);
    delete_policy(&mesh.etcd, "shop", "out");
    await_in_force(&mesh);
    for server in [&far, &near, &on_node] {
        server.assert_reached(client);
    }
}

#[test]
fn a_node_port_through_the_tunnel_is_judged_behind_the_rewrite() {
    let mesh = mesh("policy-node-port", 1);
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    let west = mesh.node("west1");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    let overlay = *west.overlay().iter().find(|ip| ip.is_ipv4()).unwrap();
    west.host().nft(&format!(
        "table ip nodeport {{\nchain pre {{\ntype nat hook prerouting priority dstnat\n\
           ip daddr {overlay} meta l4proto {{ tcp, udp }} th dport 30080 dnat to {}:5432\n}}\n}}",
        db.v4()
    ));
    let behind = Server::start(db, db.v4(), 5432);
    let node_port = behind.at_port(overlay, 30080);
    node_port.assert_reached(client);
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    behind.assert_not_reached(client);
    node_port.assert_not_reached(client);
    delete_policy(&mesh.etcd, "shop", "closed");
    await_in_force(&mesh);
    node_port.assert_reached(client);
}

#[test]
fn a_pod_reaches_itself_by_a_service_whatever_policies_say() {
    let mesh = mesh("policy-hairpin", 1);
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    let neighbour = mesh.node("west1").pod("neighbour");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "neighbour"), &json!({"app": "neighbour"}), "west1", neighbour.addresses());
    // As kube-proxy does it: rewritten to a pod, and what goes back to whom it came from bears the node's address.
    mesh.node("west1").host().nft(&format!(
        "table ip service {{\nchain pre {{\ntype nat hook prerouting priority dstnat\n\
           ip daddr 198.18.0.1 meta l4proto {{ tcp, udp }} th dport 80 dnat to {db}:5432\n}}\n\
         chain post {{\ntype nat hook postrouting priority srcnat - 1\n\
           ip saddr {db} ip daddr {db} masquerade\n}}\n}}",
        db = db.v4()
    ));
    let behind = Server::start(db, db.v4(), 5432);
    let service = behind.at_port("198.18.0.1".parse().unwrap(), 80);
    service.assert_reached(db);
    service.assert_reached(&neighbour);
    let closed = json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress", "Egress"]});
    put_policy(&mesh.etcd, "shop", "closed", &closed);
    await_in_force(&mesh);
    service.assert_reached(db);
    service.assert_not_reached(&neighbour);
    behind.assert_not_reached(client);
}

/// What `nft list` prints, in an order of its own: nft's is that in which things were made. Counters are left out, and
/// so are verdicts that nftables remembers.
fn lines(listing: &str) -> Vec<&str> {
    let constant = |line: &'_ str| line.find("counter packets").unwrap_or(line.len());
    let lines = listing.lines().filter(|line| !line.contains(" expires "));
    let mut lines: Vec<&str> = lines.map(|line| &line[..constant(line)]).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn rules_that_others_remove_are_put_back() {
    let mesh = mesh("policy-flushed", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    let server = Server::start(db, db.v4(), 5432);
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    server.assert_not_reached(&neighbour);
    let listed = east1.host().run(TABLE).stdout;
    let before = lines(&listed);
    for removal in [
        "flush ruleset",
        "delete table inet meshd_policy",
        "flush chain inet meshd_policy forward",
        "flush map inet meshd_policy ingress4",
        &format!("delete element inet meshd_policy ingress4 {{ {} }}", db.v4()),
        "flush chain inet meshd_policy refused_in",
        "insert rule inet meshd_policy forward accept",
    ] {
        east1.host().nft(removal);
        await_ok(&format!("the rules to be back after {removal}"), SOON, || {
            let now = east1.host().try_run(&TABLE.split(' ').collect::<Vec<_>>());
            if lines(&now.stdout) == before { Ok(()) } else { Err(now.describe()) }
        });
        server.assert_not_reached(&neighbour);
        server.assert_not_reached(mesh.pod("west1"));
    }
    // Without a daemon they stay.
    east1.kill9();
    assert_eq!(lines(&east1.host().run(TABLE).stdout), before);
    server.assert_not_reached(&neighbour);
    east1.start();
    await_in_force(&mesh);
    server.assert_not_reached(&neighbour);
}
