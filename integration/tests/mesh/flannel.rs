//! Nodes of Flannel in the same etcd are peers, and a mesh's nodes are theirs.
//!
//! ```text
//!   east1 meshd ──┐                                 ┌─ west1 meshd
//!                 ├─ switch ──── router ──── switch ┤
//!   east2 Flannel ┘                │                └─ west2 Flannel
//!                                 etcd
//! ```

use std::net::{IpAddr, Ipv4Addr};

use integration::{Etcd, Flannel, Host, Meshd, MeshdNode, Ping, await_ok, topology::TwoSites};
use serde_json::Value;

use crate::SOON;

/// Where Flannel has its keys by default.
const PREFIX: &str = "/coreos.com/network";

struct Mixed {
    sites: TwoSites,
    etcd: Etcd,
    nodes: [MeshdNode; 2],
    flannels: [Flannel; 2],
}

impl Mixed {
    fn start(title: &str, config: &str) -> Self {
        let sites = TwoSites::new(title);
        let etcd = sites.start_etcd(1);
        etcd.put(&format!("{PREFIX}/config"), config);
        let node = |host: &Host, site: &str| {
            Meshd::on(host, &etcd).site(site).args(&format!("--etcd-prefix {PREFIX}")).start()
        };
        let nodes = [node(&sites.east.hosts[0], "east"), node(&sites.west.hosts[0], "west")];
        let flannels = [
            Flannel::start(&sites.east.hosts[1], &etcd, PREFIX, "192.0.2.12"),
            Flannel::start(&sites.west.hosts[1], &etcd, PREFIX, "198.51.100.12"),
        ];
        for node in &nodes {
            node.await_ready(SOON);
        }
        Self { sites, etcd, nodes, flannels }
    }

    fn flannel_hosts(&self) -> [&Host; 2] {
        [&self.sites.east.hosts[1], &self.sites.west.hosts[1]]
    }

    /// The address of each Flannel node in its own subnet.
    fn flannel_addresses(&self) -> [Ipv4Addr; 2] {
        [0, 1].map(|at| self.flannels[at].await_subnet().network())
    }

    /// The way from a meshd node to a Flannel node, by the key of its lease.
    fn peer(&self, node: &MeshdNode, address: Ipv4Addr) -> Value {
        node.peer(&format!("subnets/{address}-24")).unwrap_or(Value::Null)
    }
}

#[track_caller]
fn await_ping(from: &Host, source: IpAddr, to: IpAddr) {
    await_ok(&format!("{to} to answer {source} on {}", from.name()), SOON, || {
        let report = Ping::new(to).option(&format!("-I {source}")).run(from);
        if report.lost() == 0 { Ok(()) } else { Err(report.text) }
    });
}

fn overlay4(node: &MeshdNode) -> IpAddr {
    node.overlay().into_iter().find(IpAddr::is_ipv4).unwrap()
}

/// All four nodes reach each other, and pods of ours reach Flannel's nodes.
#[track_caller]
fn assert_all_reach_each_other(mixed: &Mixed) {
    let addresses = mixed.flannel_addresses();
    for node in &mixed.nodes {
        let pod = node.pod("p");
        for (host, address) in mixed.flannel_hosts().into_iter().zip(addresses) {
            await_ping(node.host(), overlay4(node), address.into());
            await_ping(host, address.into(), overlay4(node));
            await_ping(host, address.into(), pod.v4());
            await_ok("a pod to reach Flannel's node", SOON, || {
                let report = Ping::new(address).run(&pod);
                if report.lost() == 0 { Ok(()) } else { Err(report.text) }
            });
        }
    }
}

#[test]
fn with_vxlan_both_are_peers_of_each_other() {
    let config = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 5}}"#;
    let mixed = Mixed::start("flannel-vxlan", config);
    assert_all_reach_each_other(&mixed);
    let [east, west] = mixed.flannel_addresses();
    for address in [east, west] {
        let peer = mixed.peer(&mixed.nodes[0], address);
        assert_eq!(peer["path"], "vxlan", "{peer}");
        assert!(peer["reason"].as_str().unwrap().contains("answers no probes"), "{peer}");
    }
    // Our lease is one that Flannel reads: its type, its data, its lifetime.
    let own = mixed.etcd.get(&format!("{PREFIX}/subnets/{}-24", overlay4(&mixed.nodes[0]))).unwrap();
    let own: Value = serde_json::from_str(&own).unwrap();
    assert_eq!((&own["BackendType"], &own["BackendData"]["VNI"]), (&"vxlan".into(), &5.into()));
    assert_eq!(own["PublicIP"], "192.0.2.11");
    for flannel in &mixed.flannels {
        assert!(!flannel.log().contains("Ignoring"), "{}", flannel.log());
    }
    // A source that is another Flannel node's is dropped before it is unpacked.
    let (host, node) = (mixed.flannel_hosts()[1], &mixed.nodes[0]);
    host.ip(&[&format!("address add {east}/32 dev lo")]);
    Ping::new(overlay4(node)).option(&format!("-I {east}")).run(host).assert_none_answered();
    let counter = node.host().run("nft list counter inet meshd vxlan").stdout;
    assert!(!counter.contains("packets 0 "), "{counter}");
}

#[test]
fn with_direct_routing_those_on_one_subnet_are_direct() {
    let config = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": true}}"#;
    let mixed = Mixed::start("flannel-direct", config);
    assert_all_reach_each_other(&mixed);
    let [east, west] = mixed.flannel_addresses();
    assert_eq!(mixed.peer(&mixed.nodes[0], east)["path"], "direct");
    assert_eq!(mixed.peer(&mixed.nodes[0], west)["path"], "vxlan");
}

#[test]
fn with_host_gw_those_on_one_subnet_are_peers() {
    let config = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}}"#;
    let mixed = Mixed::start("flannel-host-gw", config);
    let [east, west] = mixed.flannel_addresses();
    let (node, host) = (&mixed.nodes[0], mixed.flannel_hosts()[0]);
    // With host-gw, Flannel gives its node no address in the subnet: this one stands for a pod.
    let pod = Ipv4Addr::from(u32::from(east) + 9);
    host.ip(&[&format!("address add {pod}/32 dev lo")]);
    await_ping(node.host(), overlay4(node), pod.into());
    await_ping(host, pod.into(), node.pod("p").v4());
    let peer = mixed.peer(node, west);
    assert_eq!(peer["path"], "unreachable", "{peer}");
    assert!(peer["reason"].as_str().unwrap().contains("not on a subnet of this node's"), "{peer}");
}
