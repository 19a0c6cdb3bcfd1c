//! Pods by `meshd-cni`: alone and behind other plugins, with real daemons and real plugins.

#![allow(clippy::unwrap_used, reason = "a scenario that fails says where")]

mod addresses;
mod api;
mod chained;
mod closed;
mod containers;
mod failures;
mod forwarding;
mod kills;
mod pods;
mod race;
mod refused;
mod services;
mod steps;

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use integration::{CniPod, CniRuntime, Etcd, MeshdNode, Namespace, await_ok, ping, topology::TwoSites};

/// For something that takes a moment, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(40);
/// For the daemon's sweep, which frees what it has seen to be gone twice, ten seconds apart.
pub(crate) const SWEPT: Duration = Duration::from_secs(90);

/// Two nodes on the east and one on the west, without pods.
pub(crate) struct Nodes {
    pub(crate) nodes: Vec<MeshdNode>,
    pub(crate) etcd: Etcd,
    pub(crate) sites: TwoSites,
}

impl Nodes {
    #[track_caller]
    pub(crate) fn start(title: &str, east: usize, west: usize) -> Self {
        let sites = TwoSites::with_hosts(title, u8::try_from(east.max(west)).unwrap_or(1));
        let etcd = sites.start_etcd(1);
        etcd.put("/meshd/config", integration::topology::CONFIG);
        let of = |site: &integration::topology::Site, count: usize| -> Vec<MeshdNode> {
            let hosts = site.hosts.iter().take(count);
            hosts.map(|host| integration::Meshd::on(host, &etcd).site(&site.name).start()).collect()
        };
        let mut nodes = of(&sites.east, east);
        nodes.extend(of(&sites.west, west));
        for node in &nodes {
            node.await_ready(SOON);
        }
        Self { nodes, etcd, sites }
    }

    /// Keys of the attachments that etcd knows.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.etcd.get_prefix("/meshd/endpoints/").into_iter().map(|(key, _)| key).collect()
    }

    #[track_caller]
    pub(crate) fn await_endpoints(&self, count: usize) {
        await_ok(&format!("{count} endpoints in etcd"), SOON, || {
            let endpoints = self.endpoints();
            if endpoints.len() == count { Ok(()) } else { Err(format!("{endpoints:?}")) }
        });
    }
}

/// Waits until every node enforces what etcd says now.
#[track_caller]
pub(crate) fn await_in_force(mesh: &Nodes) {
    let revision = i64::try_from(mesh.etcd.revision()).unwrap();
    for node in &mesh.nodes {
        node.await_status(&format!("to enforce revision {revision}"), SOON, |status| {
            status["policy"]["revision"].as_i64().is_some_and(|applied| applied >= revision)
        });
    }
}

/// Waits until `from` reaches `to` in both families.
#[track_caller]
pub(crate) fn await_reaches(from: &Namespace, to: &CniPod) {
    for address in [to.v4(), to.v6()] {
        await_reaches_address(from, address);
    }
}

#[track_caller]
pub(crate) fn await_reaches_address(from: &Namespace, address: IpAddr) {
    await_ok(&format!("{} to reach {address}", from.name()), SOON, || {
        let report = ping(from, address);
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
}

/// Addresses that attachments of this node have, or that host-local holds for chained ones.
pub(crate) fn reserved(node: &MeshdNode) -> Vec<String> {
    let of_host_local = reserved_by_host_local(node);
    let addresses = node.pod_addresses().into_iter().chain(of_host_local);
    let names: BTreeSet<String> = addresses.map(|address| address.to_string()).collect();
    names.into_iter().collect()
}

/// Interfaces of pods on this node's host.
pub(crate) fn pod_interfaces(node: &MeshdNode) -> Vec<String> {
    let text = node.host().run("ip -brief link").stdout;
    let names = text.lines().filter_map(|line| line.split([' ', '@']).next());
    names.filter(|name| name.starts_with("mesh") && name.len() == 15).map(str::to_owned).collect()
}

/// Names of the attachments that the daemon knows.
pub(crate) fn attachments(node: &MeshdNode) -> Vec<String> {
    let known = cni::daemon::DaemonClient::new(node.run_dir()).attachments();
    known.unwrap_or_else(|error| panic!("{error}")).into_iter().map(|one| one.container_id).collect()
}

/// DEL of a container whose plugin was killed. What that one had asked the daemon for just before is refused behind the
/// DEL.
#[track_caller]
pub(crate) fn del_until_free(network: &CniRuntime, node: &MeshdNode, name: &str, namespace: &Namespace, when: &str) {
    await_ok(&format!("DEL to succeed {when}"), SOON, || {
        network.del(name, Some(namespace)).map_err(|failure| failure.to_string())
    });
    assert_eq!(pod_interfaces(node), [""; 0], "{when}");
    await_ok(&format!("nothing to be left {when}"), SOON, || {
        let left = (attachments(node), reserved(node));
        if left == (vec![], vec![]) { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

/// Nothing of any pod is on this node.
#[track_caller]
pub(crate) fn assert_nothing_left(node: &MeshdNode) {
    assert_eq!(pod_interfaces(node), [""; 0]);
    assert_eq!(reserved(node), [""; 0]);
    assert_eq!(attachments(node), [""; 0]);
}

/// The addresses that host-local has given out in a folder of its own.
pub(crate) fn reserved_by_host_local(node: &MeshdNode) -> BTreeSet<IpAddr> {
    let networks = std::fs::read_dir(node.run_dir().join("host-local")).into_iter().flatten();
    let files = networks.flat_map(|network| std::fs::read_dir(network.unwrap().path()).unwrap());
    files.filter_map(|file| file.unwrap().file_name().to_str()?.parse().ok()).collect()
}
