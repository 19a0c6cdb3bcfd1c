//! Underlays that several scenarios use.

use integration::{
    Sniffer,
    topology::{CONFIG, Mesh, TwoSites},
};

use crate::SOON;

/// A mesh of both families on [`TwoSites`] whose machines have IPv6 addresses only.
#[track_caller]
pub(crate) fn ipv6_underlay(title: &str, hosts: u8) -> Mesh {
    ipv6_underlay_on(TwoSites::with_hosts(title, hosts))
}

/// The same on sites that have been prepared.
#[track_caller]
pub(crate) fn ipv6_underlay_on(sites: TwoSites) -> Mesh {
    for site in [&sites.east, &sites.west] {
        for (index, interface) in site.interfaces.iter().enumerate() {
            interface.remove_address(&format!("{}/24", site.v4(index)));
        }
    }
    let sniffer: Sniffer = sites.router.sniff(&["10.244.0.0/16".parse().unwrap(), "fd42:244::/48".parse().unwrap()]);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let nodes = sites.start_nodes(&etcd, |meshd| meshd.endpoints(etcd.endpoints_at(1)));
    let pods = nodes
        .iter()
        .map(|node| {
            node.await_ready(SOON);
            node.pod("pod")
        })
        .collect();
    Mesh { sniffer, pods, nodes, etcd, sites }
}
