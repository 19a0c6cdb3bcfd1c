//! Policy that is not in force, or that the kernel does not take; and a node without a subnet.
//!
//! ```text
//!   east1 (the pods; its `nft` fails on demand) ─┐
//!                                                   ├─ switch ── router ── switch ── west1
//!   east2 ──────────────────────────────────────────┘               │
//!                                                                 etcd
//! ```

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use integration::{Meshd, await_ok, topology::CONFIG, topology::TwoSites};
use serde_json::json;

use crate::{
    Nodes, SOON, assert_nothing_left, attachments, await_reaches, pod_interfaces,
    race::{Race, shop},
    reserved,
};

/// An `nft` that is slow, or refuses, while a file of that name lies beside it.
struct Nft(PathBuf);

impl Nft {
    fn is(&self, how: &str) {
        fs::write(self.0.join(how), "").unwrap();
    }

    fn is_no_more(&self, how: &str) {
        fs::remove_file(self.0.join(how)).unwrap();
    }
}

/// Three nodes, the first of them with such an `nft`.
fn start(title: &str) -> (Nodes, Nft) {
    let sites = TwoSites::with_hosts(title, 2);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let folder = sites.lab.folder().join("nft");
    fs::create_dir_all(&folder).unwrap();
    let script = "#!/bin/sh\n[ -e \"${0%/*}/refuses\" ] && { echo told to refuse >&2; exit 1; }\n\
                  [ -e \"${0%/*}/slow\" ] && sleep 0.5\nexec /usr/sbin/nft \"$@\"\n";
    fs::write(folder.join("nft"), script).unwrap();
    fs::set_permissions(folder.join("nft"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
    let east1 = Meshd::on(&sites.east.hosts[0], &etcd).site("east").env("PATH", &path).start();
    let east2 = Meshd::on(&sites.east.hosts[1], &etcd).site("east").start();
    let west1 = Meshd::on(&sites.west.hosts[0], &etcd).site("west").start();
    let nodes = vec![east1, east2, west1];
    for node in &nodes {
        node.await_ready(SOON);
    }
    (Nodes { nodes, etcd, sites }, Nft(folder))
}

#[test]
fn an_add_waits_for_rules_that_take_their_time() {
    let (mesh, nft) = start("cni-slow-rules");
    let race = Race::new(mesh);
    let _floods = race.flood();
    race.open_pod("open");
    // The rules that let everyone in to the address are still in force when the next one gets it.
    nft.is("slow");
    race.closed_pod(&race.network(&shop("db", "db")), "db");
    race.open_pod("open2");
    race.closed_pod(&race.network(&shop("db", "db")), "db2");
}

#[test]
fn an_add_whose_rules_the_kernel_refuses_ends_with_11_and_leaves_nothing() {
    let (mesh, nft) = start("cni-refused-rules");
    let node = &mesh.nodes[0];
    let network = node.cni("1.1.0", &json!({}));
    let before = network.pod("before");
    await_reaches(node.host(), &before);
    network.status().unwrap_or_else(|failure| panic!("{failure}"));
    nft.is("refuses");
    let namespace = network.namespace("refused");
    let failure = network.add("refused", &namespace).unwrap_err();
    assert_eq!(failure.code(), Some(11), "{failure}");
    assert_eq!(attachments(node), ["before"]);
    assert_eq!((pod_interfaces(node).len(), reserved(node).len()), (1, 2));
    assert_eq!(namespace.run("ip -brief link").stdout.lines().count(), 1, "only lo");
    let failure = network.status().unwrap_err();
    assert_eq!(failure.code(), Some(50), "{failure}");
    await_reaches(node.host(), &before);
    nft.is_no_more("refuses");
    await_ok("STATUS to be well", SOON, || network.status().map_err(|failure| failure.to_string()));
    let after = network.add("refused", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(after["ips"].is_array());
}

#[test]
fn a_node_that_knows_no_subnet_takes_no_pod() {
    let sites = TwoSites::with_hosts("cni-no-subnet", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    etcd.stop();
    let node = Meshd::on(&sites.east.hosts[0], &etcd).site("east").start();
    let network = node.cni("1.1.0", &json!({}));
    await_ok("STATUS to say what is missing", SOON, || match network.status() {
        Err(failure) if failure.code() == Some(50) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let namespace = network.namespace("one");
    let failure = network.add("one", &namespace).unwrap_err();
    assert_eq!(failure.code(), Some(101), "{failure}");
    assert_nothing_left(&node);
    etcd.start_again();
    etcd.await_ready();
    node.await_ready(SOON);
    await_ok("STATUS to be well", SOON, || network.status().map_err(|failure| failure.to_string()));
    network.add("one", &namespace).unwrap_or_else(|failure| panic!("{failure}"));
}
