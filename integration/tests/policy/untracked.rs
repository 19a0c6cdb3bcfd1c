//! Packets that conntrack does not track (NOTRACK) are new ones in either direction: their own header is judged.
//!
//! ```text
//!   east1 (pods client, db; a service on an address of the node) ── router ── west1 (pod far)
//! ```

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use integration::{Host, Namespace, await_ok};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_pod, put_policy},
    probe::Server,
    raw::{Ear, UDP, ipv4, send},
    reported::await_flow,
};

/// Addresses as node-local DNS has them, on the node itself.
const LOCAL: [&str; 2] = ["169.254.20.10", "fd53::10"];

fn isolated(app: &str, types: &[&str], rules: &Value) -> Value {
    let mut spec = json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": types});
    spec.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
    spec
}

/// Takes what goes to and comes from this UDP or TCP port out of conntrack.
fn not_tracked(host: &Host, port: u16) {
    let rules = ["dport", "sport"].map(|end| format!("meta l4proto {{ tcp, udp }} th {end} {port} notrack"));
    let chain =
        |hook: &str| format!("chain {hook} {{\ntype filter hook {hook} priority raw\n{}\n}}\n", rules.join("\n"));
    host.nft(&format!("table inet raw {{\n{}{}}}", chain("prerouting"), chain("output")));
}

#[track_caller]
fn await_udp_answer(server: &Server, from: &Namespace) {
    let what = format!("{} to answer {}", server.at, from.name());
    await_ok(&what, SOON, || server.udp_answers(from).then_some(()).ok_or_else(|| "it does not".to_owned()));
}

#[test]
fn node_local_dns_is_reached_as_policy_says() {
    let mesh = mesh("policy-node-local-dns", 1);
    let (east1, client) = (mesh.node("east1"), mesh.pod("east1"));
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    for (address, bits, tables) in [(LOCAL[0], 32, "iptables-nft"), (LOCAL[1], 128, "ip6tables-nft")] {
        east1.host().ip(&[&format!("address add {address}/{bits} dev lo nodad")]);
        for port in [53, 54] {
            east1.host().run(&format!("{tables} -t raw -A PREROUTING -d {address} -p udp --dport {port} -j NOTRACK"));
            east1.host().run(&format!("{tables} -t raw -A OUTPUT -s {address} -p udp --sport {port} -j NOTRACK"));
        }
    }
    let servers = LOCAL.map(|address| {
        let address: IpAddr = address.parse().unwrap();
        [53, 54].map(|port| Server::start(east1.host(), address, port))
    });
    for server in servers.iter().flatten() {
        server.assert_reached(client);
    }
    let blocks = json!([{"ipBlock": {"cidr": "169.254.20.10/32"}}, {"ipBlock": {"cidr": "fd53::10/128"}}]);
    let rules = json!({"egress": [{"to": blocks, "ports": [{"port": 53, "protocol": "UDP"}]}]});
    put_policy(&mesh.etcd, "shop", "dns", &isolated("client", &["Egress"], &rules));
    await_in_force(&mesh);
    for [open, closed] in &servers {
        await_udp_answer(open, client);
        assert!(!open.tcp_answers(client), "{} answers by TCP", open.at);
        assert!(!closed.udp_answers(client), "{} answers", closed.at);
        for (server, service, code, verdict) in [(open, "udp/53", 0, "allowed"), (closed, "udp/54", 6, "denied")] {
            let address = server.at.ip().to_string();
            let explained = east1.meshctl(&["policy", "explain", "shop/client", &address, service]);
            assert_eq!(explained.code(), Some(code), "{}", explained.describe());
            let flow = await_flow(east1, verdict, |flow| {
                flow["verdict"] == verdict && flow["destination"] == address && flow["port"] == server.at.port()
            });
            assert_eq!((&flow["at"], &flow["sourcePod"]), (&json!("nftables"), &json!("shop/client")), "{flow}");
        }
    }
}

#[test]
fn nothing_is_reversed_for_packets_that_are_not_tracked() {
    let mesh = mesh("policy-untracked", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let client = east1.pod("client");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    not_tracked(east1.host(), 5432);
    let servers = [Server::start(db, db.v4(), 5432), Server::start(db, db.v6(), 5432)];
    let other = Server::start(db, db.v4(), 5433);
    let reach = |wanted: bool, what: &str| {
        await_in_force(&mesh);
        for server in &servers {
            match wanted {
                true => server.assert_reached(&client),
                false => assert!(!server.tcp_answers(&client) && !server.udp_answers(&client), "{what}: {}", server.at),
            }
        }
    };
    reach(true, "no policy");
    let from_client = json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
        "ports": [{"port": 5432}, {"port": 5432, "protocol": "UDP"}]}]});
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress"], &from_client));
    reach(true, "a rule for the port");
    assert!(!other.udp_answers(&client), "another port");
    // What is tracked would be let in as an answer.
    put_policy(&mesh.etcd, "shop", "client", &isolated("client", &["Ingress"], &json!({})));
    reach(false, "answers that no rule of the client lets in");
    let from_db = json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]});
    put_policy(&mesh.etcd, "shop", "client", &isolated("client", &["Ingress"], &from_db));
    reach(true, "answers that a rule lets in");
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress", "Egress"], &from_client));
    reach(false, "answers that no rule lets out");
    let mut both = from_client;
    both["egress"] = json!([{"to": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]);
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress", "Egress"], &both));
    reach(true, "answers that a rule lets out");
}

/// Packets that the rules of the policies have refused on this node, in either direction.
fn refused(host: &Host) -> u64 {
    let rules =
        ["refused_in", "refused_out"].map(|chain| host.run(&format!("nft list chain inet meshd_policy {chain}")));
    let counted = |text: &str| -> u64 {
        let counts = text.split("counter packets ").skip(1).filter_map(|rest| rest.split_whitespace().next());
        counts.map(|count| count.parse::<u64>().unwrap()).sum()
    };
    rules.iter().map(|output| counted(&output.stdout)).sum()
}

/// A reply that is refused, although the request passes, is named with the policy that refuses it.
#[test]
fn refused_replies_that_are_not_tracked_are_explained_shown_and_counted() {
    let mesh = mesh("policy-untracked-replies", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let client = east1.pod("client");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    not_tracked(east1.host(), 5432);
    let ends = [(client.v4(), db.v4()), (client.v6(), db.v6())];
    let servers = ends.map(|(_, server)| Server::start(db, server, 5432));
    let from_client = json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}]});
    let closed = |app: &str, direction: &str, port: u16| {
        let (types, rules) = match direction {
            "ingress" => (&["Ingress"][..], json!({})),
            _ => (&["Ingress", "Egress"][..], from_client.clone()),
        };
        put_policy(&mesh.etcd, "shop", app, &isolated(app, types, &rules));
        await_in_force(&mesh);
        for (own, server) in ends {
            let (request, reply) = (format!("{own} to {server}"), format!("{server} to {own}"));
            let before = refused(east1.host());
            let socket = client.enter(|| UdpSocket::bind((own, port))).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket.send_to(b"request", (server, 5432)).unwrap();
            assert!(socket.recv(&mut [0; 16]).is_err(), "{reply}: passes");
            assert!(refused(east1.host()) > before, "{reply}: is not counted");
            let flow = await_flow(east1, &reply, |flow| {
                flow["verdict"] == "denied" && flow["destination"] == json!(own) && flow["port"] == port
            });
            assert_eq!((&flow["source"], &flow["sourcePod"]), (&json!(server), &json!("shop/db")), "{flow}");
            assert_eq!((&flow["direction"], &flow["at"]), (&json!(direction), &json!("nftables")), "{flow}");
            assert!(flow["why"].as_str().is_some_and(|why| why.contains(&format!("shop/{app}"))), "{flow}");
            let explain = |from: &str, to: &IpAddr, service: String| {
                let explained = east1.meshctl(&["-o", "json", "policy", "explain", from, &to.to_string(), &service]);
                let answer: Value = serde_json::from_str(&explained.stdout).unwrap();
                (explained.code(), answer)
            };
            let (code, explained) = explain("shop/client", &server, "udp/5432".to_owned());
            assert_eq!(code, Some(0), "{request}: {explained}");
            let (code, explained) = explain("shop/db", &own, format!("udp/{port}"));
            assert_eq!((code, &explained[direction]["allowed"]), (Some(6), &json!(false)), "{reply}: {explained}");
            let text = explained[direction]["text"].to_string();
            assert!(text.contains(&format!("shop/{app}")), "{reply}: {text}");
        }
    };
    for server in &servers {
        server.assert_reached(&client);
    }
    closed("client", "ingress", 40_001);
    mesh.etcd.del("/meshd/networkpolicies/shop/client");
    closed("db", "egress", 40_002);
}

/// The node's own processes reach its pods, and what answers them is let pass as the pod's rules say.
#[test]
fn the_nodes_own_packets_are_its_own_without_tracking() {
    let mesh = mesh("policy-untracked-node", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    not_tracked(east1.host(), 5432);
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress"], &json!({})));
    await_in_force(&mesh);
    let server = Server::start(db, db.v4(), 5432);
    server.assert_reached(east1.host());
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress", "Egress"], &json!({})));
    await_in_force(&mesh);
    server.assert_not_reached(east1.host());
    Server::start(db, db.v4(), 5433).assert_reached(east1.host());
}

/// The tunnel's end keeps flows of its own: what answers a local pod passes there, and nothing else does.
#[test]
fn answers_by_the_tunnel_pass_and_nothing_new_does() {
    let mesh = mesh("policy-untracked-tunnel", 1);
    let (east1, client, far) = (mesh.node("east1"), mesh.pod("east1"), mesh.pod("west1"));
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    put_pod(&mesh.etcd, ("shop", "far"), &json!({"app": "far"}), "west1", far.addresses());
    not_tracked(east1.host(), 5432);
    let to_far = json!({"egress": [{"to": [{"podSelector": {"matchLabels": {"app": "far"}}}],
        "ports": [{"port": 5432, "protocol": "UDP"}]}]});
    put_policy(&mesh.etcd, "shop", "client", &isolated("client", &["Ingress", "Egress"], &to_far));
    await_in_force(&mesh);
    for (own, address) in [(client.v4(), far.v4()), (client.v6(), far.v6())] {
        let server = Server::start(far, address, 5432);
        for restart in [false, true] {
            if restart {
                east1.restart();
                await_in_force(&mesh);
            }
            await_udp_answer(&server, client);
            assert!(!server.tcp_answers(client), "{address} answers by TCP");
        }
        let back = client.enter(|| UdpSocket::bind((own, 5432))).unwrap();
        back.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        far.enter(|| UdpSocket::bind((address, 0))).unwrap().send_to(b"new", (own, 5432)).unwrap();
        assert!(back.recv(&mut [0; 16]).is_err(), "a new datagram reaches {own}");
    }
}

/// Later fragments have no ports. Conntrack puts fragments together; where it does not, they pass no rules that deny
/// any.
#[test]
fn later_fragments_that_are_not_tracked_pass_no_rules_that_deny() {
    let mesh = mesh("policy-untracked-fragments", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let client = east1.pod("client");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    east1.host().nft("table inet raw {\nchain c {\ntype filter hook prerouting priority -450\nnotrack\n}\n}");
    let ear = Ear::on(db, UDP);
    let heard = |from: &Namespace, text: &[u8]| {
        let mut later = ipv4(client.v4(), db.v4(), UDP, text);
        later[4..8].copy_from_slice(&[0x12, 0x34, 0, 4]);
        send(from, &later);
        // The pod's kernel keeps a fragment until it is whole: one that is first makes it so.
        let mut first = ipv4(client.v4(), db.v4(), UDP, &crate::raw::udp(1, 5433, &[0; 24]));
        first[4..8].copy_from_slice(&[0x12, 0x34, 0x20, 0]);
        send(from, &first);
        ear.hears(text)
    };
    await_ok("it to pass where nothing is denied", SOON, || {
        if heard(&client, b"a later fragment") { Ok(()) } else { Err("it does not".to_owned()) }
    });
    let deny = json!({"ingress": [{"from": [{"podSelector": {}}]}]});
    put_policy(&mesh.etcd, "shop", "db", &isolated("db", &["Ingress"], &deny));
    await_in_force(&mesh);
    assert!(!heard(&client, b"another fragment"), "a later fragment passes");
}
