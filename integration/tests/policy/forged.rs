//! Connection marks, packet marks and ICMP errors that other programs and pods write: none of them opens anything.
//!
//! ```text
//!   east1 (pods db, neighbour, third) ── router ── west1
//! ```

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use integration::{Namespace, await_ok};
use serde_json::json;

use crate::{
    SOON, await_in_force, mesh,
    objects::{delete_policy, put_pod, put_policy},
    raw::{Ear, ICMP, icmp_error, ipv4, send, udp},
};

/// Source ports of the datagrams that try; each has a mark of its own.
const FIRST_PORT: u16 = 20_000;

/// The marks that other programs try: the same small number in each byte, one bit alone, and any.
fn marks() -> Vec<u32> {
    let small = (0..=127).map(|number| number * 0x0101_0101);
    let bits = (0..32).map(|bit| 1 << bit);
    let mut state = 0x2545_f491_u32;
    let any = (0..64).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    });
    small.chain(bits).chain(any).chain([0x0004_0000, u32::MAX]).collect()
}

/// Rules in every hook that a packet to or from a pod passes before policies judge it.
fn marking(hook: &str, marks: &[u32]) -> String {
    let mut map = String::new();
    for (port, mark) in (FIRST_PORT..).zip(marks) {
        let _ = write!(map, "{port} : {mark:#010x}, ");
    }
    format!(
        "add table inet other\ndelete table inet other\ntable inet other {{\nchain c {{\n\
         type filter hook {hook} priority mangle\n\
         ct mark set udp sport map {{ {map} }}\nmeta mark set udp sport map {{ {map} }}\n}}\n}}"
    )
}

/// A port that was closed just now may be held a moment longer, by a process that another test is starting.
#[track_caller]
fn bound(on: &Namespace, at: SocketAddr) -> UdpSocket {
    await_ok("the port to be free", SOON, || on.enter(|| UdpSocket::bind(at)).map_err(|error| error.to_string()))
}

/// Sends one datagram from each port; then, once `open` has been called, another one until that arrives.
#[track_caller]
fn assert_none_arrives(from: &Namespace, source: IpAddr, to: &UdpSocket, count: usize, open: impl FnOnce()) {
    let at = to.local_addr().unwrap();
    for port in (FIRST_PORT..).take(count) {
        bound(from, (source, port).into()).send_to(&port.to_be_bytes(), at).unwrap();
    }
    open();
    let last = bound(from, (source, 10_000).into());
    to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut buffer = [0; 64];
    let first = await_ok("a datagram that is allowed", SOON, || {
        last.send_to(b"allowed", at).unwrap();
        to.recv(&mut buffer).map(|length| buffer[..length].to_vec()).map_err(|error| error.to_string())
    });
    assert_eq!(first, b"allowed", "a datagram with the mark of port {:?} passed a policy that denies it", &first);
}

#[test]
fn marks_that_others_write_let_nothing_pass_that_policies_deny() {
    let mesh = mesh("policy-forged-marks", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "neighbour"), &json!({"app": "neighbour"}), "east1", neighbour.addresses());
    let marks = marks();
    let node = |v4: bool| *east1.overlay().iter().find(|ip| ip.is_ipv4() == v4).unwrap();
    let closed = |app: &str, direction: &str| {
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [direction]});
        put_policy(&mesh.etcd, "shop", "closed", &spec);
        await_in_force(&mesh);
    };
    let open = || {
        delete_policy(&mesh.etcd, "shop", "closed");
        await_in_force(&mesh);
    };
    for hook in ["prerouting", "forward"] {
        east1.host().nft(&marking(hook, &marks));
        for (app, direction) in [("db", "Ingress"), ("neighbour", "Egress")] {
            for (source, address) in [(neighbour.v4(), db.v4()), (neighbour.v6(), db.v6())] {
                closed(app, direction);
                let server = bound(db, (address, 5432).into());
                assert_none_arrives(&neighbour, source, &server, marks.len(), open);
            }
        }
    }
    for hook in ["prerouting", "input"] {
        east1.host().nft(&marking(hook, &marks));
        for source in [neighbour.v4(), neighbour.v6()] {
            closed("neighbour", "Egress");
            let server = bound(east1.host(), (node(source.is_ipv4()), 5432).into());
            assert_none_arrives(&neighbour, source, &server, marks.len(), open);
        }
    }
    east1.host().nft("delete table inet other");
}

/// An ICMP error passes if policies allow the flow that it quotes, and it comes from an end of that flow or from whom
/// they let send such a packet by itself.
#[test]
fn an_error_passes_only_as_its_flow_does_and_from_an_end_of_it() {
    let mesh = mesh("policy-forged-errors", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let (neighbour, third) = (east1.pod("neighbour"), east1.pod("third"));
    for (pod, name) in [(db, "db"), (&neighbour, "neighbour"), (&third, "third")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), "east1", pod.addresses());
    }
    await_in_force(&mesh);
    let server = bound(db, (db.v4(), 5432).into());
    let client = bound(&neighbour, (neighbour.v4(), 5000).into());
    server.set_read_timeout(Some(SOON)).unwrap();
    client.send_to(b"begin", (db.v4(), 5432)).unwrap();
    server.recv(&mut [0; 16]).unwrap();
    server.send_to(b"answer", (neighbour.v4(), 5000)).unwrap();
    client.recv(&mut [0; 16]).unwrap();

    let quoted = ipv4(neighbour.v4(), db.v4(), 17, &udp(5000, 5432, b"begin"));
    let error = |number: u8| icmp_error(&quoted, number);
    let ear = Ear::on(&neighbour, ICMP);
    let arrives = |from: &Namespace, source: IpAddr, number: u8| {
        send(from, &ipv4(source, neighbour.v4(), ICMP, &error(number)));
        ear.hears(&error(number))
    };
    await_ok("an error of the flow's other end", SOON, || {
        arrives(db, db.v4(), 1).then_some(()).ok_or_else(|| "none".to_owned())
    });
    await_ok("an error of one that may send anything", SOON, || {
        arrives(&third, third.v4(), 2).then_some(()).ok_or_else(|| "none".to_owned())
    });
    let egress = |app: &str| json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Egress"]});
    put_policy(&mesh.etcd, "shop", "third", &egress("third"));
    await_in_force(&mesh);
    assert!(!arrives(&third, third.v4(), 3), "a pod that may send nothing sends an error about a flow of others");
    let overlay = *east1.overlay().iter().find(|ip| ip.is_ipv4()).unwrap();
    let node = bound(east1.host(), (overlay, 5001).into());
    node.send_to(b"begin", (db.v4(), 5432)).unwrap();
    server.recv(&mut [0; 16]).unwrap();
    let of_node = |number: u8| icmp_error(&ipv4(overlay, db.v4(), 17, &udp(5001, 5432, b"begin")), number);
    let node_ear = Ear::on(east1.host(), ICMP);
    await_ok("the node to hear of its own flow", SOON, || {
        send(db, &ipv4(db.v4(), overlay, ICMP, &of_node(4)));
        node_ear.hears(&of_node(4)).then_some(()).ok_or_else(|| "nothing".to_owned())
    });
    send(&third, &ipv4(third.v4(), overlay, ICMP, &of_node(7)));
    assert!(!node_ear.hears(&of_node(7)), "the node hears of its flow from a pod that may send it nothing");

    // The flow is cut; another program takes its mark away, as if it had never been judged.
    put_policy(&mesh.etcd, "shop", "db", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    await_in_force(&mesh);
    east1.host().nft(
        "table inet other {\nchain c {\ntype filter hook prerouting priority mangle\nct mark set 0\nmeta mark set 0\n}\n}",
    );
    assert!(!arrives(db, db.v4(), 5), "an error about a flow that is cut passes");
    delete_policy(&mesh.etcd, "shop", "db");
    await_in_force(&mesh);
    await_ok("an error of a flow that is allowed again", SOON, || {
        arrives(db, db.v4(), 6).then_some(()).ok_or_else(|| "none".to_owned())
    });
}

/// An entry of conntrack is no verdict: what policies deny they deny in both directions of a flow that was entered by
/// hand.
#[test]
fn conntrack_entries_that_others_make_open_no_flow_that_is_denied() {
    let mesh = mesh("policy-forged-conntrack", 1);
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "east1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "neighbour"), &json!({"app": "neighbour"}), "east1", neighbour.addresses());
    for (one, other) in [(neighbour.v4(), db.v4()), (neighbour.v6(), db.v6())] {
        put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
        await_in_force(&mesh);
        east1.host().run(&format!(
            "conntrack -I -p udp -s {one} -d {other} --sport {FIRST_PORT} --dport 5432 -u SEEN_REPLY,ASSURED -t 600"
        ));
        let server = bound(db, (other, 5432).into());
        assert_none_arrives(&neighbour, one, &server, 1, || {
            let client = bound(&neighbour, (one, FIRST_PORT).into());
            client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            server.send_to(b"the other way", (one, FIRST_PORT)).unwrap();
            assert!(client.recv(&mut [0; 64]).is_err(), "what looks like an answer to {one} passes");
            delete_policy(&mesh.etcd, "shop", "closed");
            await_in_force(&mesh);
        });
    }
}
