//! A node with two underlay addresses of each family: it answers from the one that was called (N19), and from another
//! one when that one is gone (N18).
//!
//! ```text
//!   east1 (pod) ── switch ──── router ──── switch ── west1 (pod), .11 and .61
//!                         sniffs │ └── store: etcd
//!                              abroad
//!                                └── outside1: wireguard-go
//! ```

use integration::{
    Implementation, await_ok, ping,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

use crate::{
    SOON,
    outside_peer::{OutsidePeer, add_abroad, await_reaches},
    underlay::ipv6_underlay_on,
};

#[test]
fn the_source_is_the_address_that_was_called_as_long_as_it_is_there() {
    let sites = TwoSites::with_hosts("two-addresses", 1);
    let abroad = add_abroad(&sites, 1);
    let interface = sites.west.interfaces[0].clone();
    sites.west.hosts[0].sysctl("net/ipv4/conf/all/promote_secondaries", "1");
    interface.add_address("198.51.100.61/24");
    interface.add_address("2001:db8:2::61/64");
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    let peer = OutsidePeer::join(&mesh, &abroad.hosts[0], Implementation::WireguardGo, "roadie", 1, &Value::Null);
    let (pod, west) = (mesh.pod("west1"), mesh.node("west1"));
    peer.await_reaches(pod.addresses().to_vec());

    let answers_from = |wanted: &str, called: Option<&str>| {
        await_ok(&format!("answers from {wanted}"), SOON, || {
            // A keepalive in flight from the earlier address takes the peer back there: it calls again.
            if let Some(called) = called {
                peer.call(&mesh, "west1", called);
            }
            let report = ping(&peer.host, pod.v4());
            // The peer's endpoint follows what it receives.
            let at = peer.endpoint(&mesh, "west1");
            if report.lost() == 0 && at == format!("{wanted}:51820") {
                Ok(())
            } else {
                Err(format!("{at}\n{}", report.text))
            }
        });
        await_reaches(pod, peer.v6);
    };
    for (called, shown) in [
        ("198.51.100.61", "198.51.100.61"),
        ("2001:db8:2::11", "[2001:db8:2::11]"),
        ("2001:db8:2::61", "[2001:db8:2::61]"),
        ("198.51.100.11", "198.51.100.11"),
        ("198.51.100.61", "198.51.100.61"),
    ] {
        answers_from(shown, Some(called));
    }

    // The address in use goes: the node sends from the one that is left, and the peer follows.
    interface.remove_address("198.51.100.61/24");
    await_reaches(pod, peer.v4);
    answers_from("198.51.100.11", None);
    answers_from("[2001:db8:2::61]", Some("2001:db8:2::61"));
    interface.remove_address("2001:db8:2::61/64");
    await_reaches(pod, peer.v4);
    answers_from("[2001:db8:2::11]", None);

    // The nodes have followed, too.
    await_reaches(mesh.pod("east1"), pod.v4());
    await_reaches(pod, mesh.pod("east1").v6());
    west.await_path("east1", "wireguard", SOON);
}

/// The node's first address, which its record names, is replaced by another: the others find it there.
#[test]
fn a_node_that_changes_its_address_is_found_again() {
    let sites = TwoSites::with_hosts("renumbered", 1);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let (host, interface) = (&mesh.sites.west.hosts[0], &mesh.sites.west.interfaces[0]);
    interface.remove_address("198.51.100.11/24");
    interface.add_address("198.51.100.88/24");
    host.route("default", "via 198.51.100.1");
    await_ok("east1 to see west1 at its new address", SOON, || {
        let report = ping(mesh.pod("east1"), mesh.pod("west1").v4());
        let at = mesh.node("east1").peer("west1").map(|peer| peer["endpoint"].to_string()).unwrap_or_default();
        if report.lost() == 0 && at.contains("198.51.100.88:") { Ok(()) } else { Err(format!("{at}\n{}", report.text)) }
    });
    mesh.await_all_reach_each_other();
}

/// Waits until the record of the node with this name has these endpoints.
#[track_caller]
fn await_published(mesh: &Mesh, name: &str, endpoints: [&str; 2]) {
    await_ok(&format!("{name} to publish {endpoints:?}"), SOON, || {
        let records = mesh.etcd.get_prefix("/meshd/nodes/").into_iter();
        let mut records = records.map(|(_, value)| serde_json::from_str::<Value>(&value).unwrap());
        let record = records.find(|record| record["name"] == name).ok_or("no record")?;
        if record["endpoints"] == json!(endpoints) { Ok(()) } else { Err(record.to_string()) }
    });
}

/// The kernel lists the newest address first: that may be one that leads nowhere, or that another machine has next.
#[test]
fn a_floating_and_a_unique_local_address_do_not_hide_the_global_one() {
    let sites = TwoSites::with_hosts("ipv6-addresses", 1);
    sites.west.interfaces[0].add_address("2001:db8:2::77/128");
    sites.west.interfaces[0].add_address("fd99:2::11/64");
    let mesh = ipv6_underlay_on(sites);
    mesh.await_all_reach_each_other();
    await_published(&mesh, "west1", ["[2001:db8:2::11]:51820", "[fd99:2::11]:51820"]);
}

#[test]
fn a_candidate_that_does_not_answer_is_followed_by_the_next() {
    let sites = TwoSites::with_hosts("ipv6-candidates", 1);
    sites.west.interfaces[0].add_address("2001:db8:2::61/64");
    sites.router.nft(
        "table ip6 cut {\nchain forward {\ntype filter hook forward priority 0; policy accept\n\
         ip6 daddr 2001:db8:2::11 udp dport 51820 drop\nip6 saddr 2001:db8:2::11 udp sport 51820 drop\n}\n}",
    );
    let mesh = ipv6_underlay_on(sites);
    await_published(&mesh, "west1", ["[2001:db8:2::11]:51820", "[2001:db8:2::61]:51820"]);
    await_reaches(mesh.pod("east1"), mesh.pod("west1").v4());
    let at = mesh.node("east1").peer("west1").unwrap()["endpoint"].clone();
    assert_eq!(at, "[2001:db8:2::61]:51820", "what authenticated is kept");
}
