//! Pods on a bridge while no policies are in force: only the node's own processes reach them, and they reach nothing.
//!
//! ```text
//!   east1: bridge ─┬─ db         ┌─ switch ── router ── store
//!                  ├─ neighbour ─┤
//!                  └─ third      └─ east2 (pod)
//! ```

use std::{
    fs,
    net::{IpAddr, UdpSocket},
};

use integration::{
    CniRuntime, MeshdNode, Namespace, Wire, await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::{
    SOON,
    bridged::{Bridged, network},
    frames::{BROADCAST, Capture, datagram, frame, host_end, mac},
    groups::own_bridge,
    identity::Listener,
    probe::Server,
    start::{Nft, has_problem},
};

const PORT: u16 = 7000;
const OUTSIDE: [&str; 2] = ["203.0.113.10", "2001:db8:3::10"];

#[test]
fn on_debians_bridge_pods_are_closed_while_nothing_is_in_force() {
    are_closed("policy-bridge-not-in-force", network, "cni0");
}

#[test]
fn on_the_plugins_bridge_pods_are_closed_while_nothing_is_in_force() {
    are_closed("policy-own-bridge-not-in-force", own_bridge, "shop0");
}

fn are_closed(title: &str, network: impl Fn(&MeshdNode) -> CniRuntime, bridge: &str) {
    let sites = TwoSites::with_hosts(title, 2);
    let nft = Nft::new(&sites);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.env("PATH", &nft.path()));
    mesh.await_all_reach_each_other();
    mesh.node("east1").await_path("east2", "direct", SOON);
    let mut places = Places::of(Bridged::on(mesh, network), bridge);
    for way in Places::WAYS {
        for v6 in [false, true] {
            await_ok(&format!("a packet {way:?} to arrive"), SOON, || {
                if places.arrives(way, v6, b"open") { Ok(()) } else { Err("it does not".to_owned()) }
            });
        }
    }
    let east1 = || places.bridged.mesh.node("east1");
    east1().kill9();
    nft.refuse("pods");
    east1().host().nft("delete table inet meshd_policy; delete table bridge meshd_policy");
    east1().start();
    east1().await_status("to say why", SOON, |status| has_problem(status, "policies_not_in_force"));
    places.assert_closed(b"refused");
    // Rules, cache and etcd are gone: the attachments are what is known.
    let mesh = &places.bridged.mesh;
    let east1 = mesh.node("east1");
    east1.kill9();
    nft.refuse("none");
    mesh.etcd.stop();
    fs::remove_dir_all(east1.state_dir().join("cache")).unwrap();
    east1.host().nft("delete table inet meshd_policy; delete table bridge meshd_policy");
    east1.start();
    await_ok("the way to pods to be closed", SOON, || {
        let [listed, ports] = ["inet", "bridge"]
            .map(|family| east1.host().try_run(&["nft", "list", "table", family, "meshd_policy"]).stdout);
        let closed = listed.contains("chain closed") && ports.contains(&host_end(&places.bridged.pods[0]));
        if closed { Ok(()) } else { Err(format!("{listed}{ports}")) }
    });
    places.assert_closed(b"unknown");
}

/// Where a packet comes from, and where it goes.
#[derive(Debug, Clone, Copy)]
enum Way {
    PortToPort,
    PortToAll,
    PodToNode,
    PodToOutside,
    PeerToPod,
}

struct Places {
    bridged: Bridged,
    bridge: String,
    /// The overlay addresses of east1, also for while it knows none.
    overlay: [IpAddr; 2],
    at_db: Capture,
    on_node: [Listener; 2],
    on_store: [Listener; 2],
    /// Answer the node's probes.
    probed: [Server; 2],
    _services: [Server; 2],
}

impl Places {
    const WAYS: [Way; 5] = [Way::PortToPort, Way::PortToAll, Way::PodToNode, Way::PodToOutside, Way::PeerToPod];

    fn of(bridged: Bridged, bridge: &str) -> Self {
        let Bridged { mesh, pods: [db, ..] } = &bridged;
        let east1 = mesh.node("east1");
        let of_family = |v6: bool| east1.overlay().into_iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        let overlay = [false, true].map(of_family);
        let listeners = |place: &Namespace| [true, false].map(|v4| Listener::on(place, v4, PORT));
        Self {
            overlay,
            at_db: Capture::on(db, "eth0"),
            on_node: listeners(east1.host()),
            on_store: listeners(&mesh.sites.store),
            probed: [db.v4(), db.v6()].map(|address| Server::start(db, address, 5432)),
            _services: overlay.map(|address| Server::start(east1.host(), address, 8080)),
            bridge: bridge.to_owned(),
            bridged,
        }
    }

    /// Sends a packet that way; whether it arrives.
    fn arrives(&mut self, way: Way, v6: bool, marker: &[u8]) -> bool {
        let Bridged { mesh, pods: [db, _, third] } = &self.bridged;
        let family = usize::from(v6);
        let (to_db, from_third) = ([db.v4(), db.v6()][family], [third.v4(), third.v6()][family]);
        let send = |station: &[u8], to: IpAddr| {
            let packet = datagram((from_third, PORT), (to, PORT), marker);
            Wire::on(third, "eth0").send(&[frame(station, &mac(third, "eth0"), &packet)]);
        };
        let gateway = || mac(mesh.node("east1").host(), &self.bridge);
        match way {
            Way::PortToPort => {
                send(&mac(db, "eth0"), to_db);
                self.at_db.hears(marker)
            }
            Way::PortToAll => {
                let group: IpAddr = if v6 { "ff02::1".parse().unwrap() } else { [224, 0, 0, 1].into() };
                send(if v6 { &[0x33, 0x33, 0, 0, 0, 1] } else { &BROADCAST }, group);
                self.at_db.hears(marker)
            }
            Way::PodToNode => {
                send(&gateway(), self.overlay[family]);
                self.on_node[family].hears(marker)
            }
            Way::PodToOutside => {
                send(&gateway(), OUTSIDE[family].parse().unwrap());
                self.on_store[family].hears(marker)
            }
            Way::PeerToPod => {
                let peer = mesh.pod("east2");
                peer.enter(|| {
                    let socket = UdpSocket::bind(([peer.v4(), peer.v6()][family], 0)).unwrap();
                    // Behind an error about an earlier one, a socket does not send.
                    let _ = socket.send_to(marker, (to_db, PORT));
                });
                self.at_db.hears(marker)
            }
        }
    }

    #[track_caller]
    fn assert_closed(&mut self, marker: &[u8]) {
        for way in Self::WAYS {
            for v6 in [false, true] {
                assert!(!self.arrives(way, v6, marker), "a packet {way:?} passes unjudged; IPv6: {v6}");
            }
        }
        let Bridged { mesh, pods: [_, neighbour, third] } = &self.bridged;
        let node = mesh.node("east1").host();
        for server in &self.probed {
            for from in [&**neighbour, &**third] {
                server.assert_not_reached(from);
            }
            server.assert_reached(node);
        }
        for address in self.overlay {
            Server::at_port(&self.probed[0], address, 8080).assert_not_reached(third);
        }
    }
}
