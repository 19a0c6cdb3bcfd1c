//! Fragments with another pod's source: none of them gets into a datagram of that pod.
//!
//! Conntrack reassembles before any policy is applied, and does not care which interface a fragment comes from.
//!
//! ```text
//!   east1 (victim, rogue, server) ─┬─ switch ─ router ─ switch ─ west1
//!   east2 ─────────────────────────┘
//! ```

use std::net::IpAddr;

use integration::{CniPod, Namespace, Wire, await_ok};

use crate::{
    SOON,
    bridged::{Bridged, network},
    frames::{datagram, fragments, frame, host_end, mac},
    identity::Listener,
    mesh,
};

const PORT: u16 = 7000;

/// What sends fragments: frames from its interface to a hardware address.
struct Sender<'a> {
    wire: Wire,
    own: [u8; 6],
    to: [u8; 6],
    name: &'a str,
}

impl<'a> Sender<'a> {
    fn new(name: &'a str, place: &Namespace, interface: &str, to: [u8; 6]) -> Self {
        Self { wire: Wire::on(place, interface), own: mac(place, interface), to, name }
    }

    fn send(&self, packet: &[u8]) {
        self.wire.send(&[frame(&self.to, &self.own, packet)]);
    }
}

/// Datagrams of `victim` to `server`, of which `rogues` forge fragments.
fn assert_none_is_mixed(victim: &Sender<'_>, rogues: &[Sender<'_>], from: &[IpAddr; 2], server: &CniPod) {
    let mut id = 0x7000_u16;
    for (source, to) in from.iter().zip([server.v4(), server.v6()]) {
        let listener = Listener::on(server, source.is_ipv4(), PORT);
        let of = |data: &[u8], id: u16| fragments(&datagram((*source, PORT), (to, PORT), data), 16, id);
        let (own, forged) = (b"the victim's own data in two parts", b"forged: and data in other two part");
        await_ok(&format!("fragments of {source} to arrive"), SOON, || {
            id += 1;
            of(own, id).iter().for_each(|fragment| victim.send(fragment));
            if listener.hears(own) { Ok(()) } else { Err("they do not".to_owned()) }
        });
        for rogue in rogues {
            let who = rogue.name;
            // The forged beginning waits for the victim's end. Both ends are the same, so that the checksum is right.
            let mut mixed = forged.to_vec();
            mixed[8..].copy_from_slice(&own[8..]);
            id += 1;
            rogue.send(&of(&mixed, id)[0]);
            victim.send(&of(own, id)[1]);
            assert!(!listener.hears(&mixed), "a beginning that {who} forges gets into a datagram of {source}");
            victim.send(&of(own, id)[0]);
            assert!(listener.hears_within(SOON, own), "a beginning that {who} forges cuts a datagram of {source}");
            // The victim's beginning waits for its end, and gets a forged one.
            id += 1;
            let [begins, ends] = of(own, id);
            victim.send(&begins);
            rogue.send(&of(forged, id)[1]);
            victim.send(&ends);
            assert!(listener.hears_within(SOON, own), "an end that {who} forges cuts a datagram of {source}");
        }
    }
}

#[test]
fn forged_fragments_do_not_reach_the_datagrams_of_another_pod() {
    let mesh = mesh("policy-fragments", 2);
    let east1 = mesh.node("east1");
    let [victim, rogue, server] =
        ["victim", "rogue", "server"].map(|name| east1.cni("1.0.0", &serde_json::json!({})).pod(name));
    let gateway = |pod: &CniPod| mac(east1.host(), &host_end(pod));
    let underlay = &mesh.sites.east.interfaces;
    let rogues = [
        Sender::new("a neighbour", &rogue, "eth0", gateway(&rogue)),
        Sender::new(
            "a host of the underlay",
            mesh.node("east2").host(),
            underlay[1].name(),
            mac(east1.host(), underlay[0].name()),
        ),
    ];
    let sender = Sender::new("the victim", &victim, "eth0", gateway(&victim));
    assert_none_is_mixed(&sender, &rogues, &[victim.v4(), victim.v6()], &server);
}

#[test]
fn forged_fragments_do_not_cross_a_bridge() {
    let Bridged { mesh: _mesh, pods: [server, victim, rogue] } = Bridged::start_by("policy-fragments-bridge", network);
    let at_server = mac(&server, "eth0");
    let rogues = [Sender::new("a neighbour", &rogue, "eth0", at_server)];
    let sender = Sender::new("the victim", &victim, "eth0", at_server);
    assert_none_is_mixed(&sender, &rogues, &[victim.v4(), victim.v6()], &server);
}
