//! What of this machine decides whether packets come by nftables as they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

use cni::netlink::{Link, Netlink};

use super::ruleset::switched_judged;

/// Ports that a problem names.
const NAMED: usize = 8;

/// The machine at one time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Host {
    /// What bridges pass from port to port comes by nftables' `inet` chains.
    pub(super) switched_judged: bool,
    /// A pod of this node is attached to a bridge.
    pub(super) bridged: bool,
    /// Some ports of such bridges that no attachment tells the addresses of.
    pub(super) strangers: Vec<String>,
    /// There are virtual services of IPVS.
    pub(super) ipvs: bool,
}

impl Host {
    /// Reads it in the network namespace of this thread; `ports` are the host's ends of the interfaces of its pods.
    pub(super) fn now(ports: &BTreeMap<String, Vec<IpAddr>>) -> Self {
        let services = fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
        let links = match ports.is_empty() {
            true => Vec::new(),
            false => Netlink::open().and_then(|mut netlink| netlink.links()).unwrap_or_else(|error| {
                tracing::warn!(%error, "interfaces cannot be listed: ports of bridges are not looked at");
                Vec::new()
            }),
        };
        let (bridged, strangers) = bridges(&links, ports);
        Self { switched_judged: switched_judged(), bridged, strangers, ipvs: has_services(&services) }
    }
}

/// Whether any of `ports` is a bridge's, and what other ports such bridges have.
fn bridges(links: &[Link], ports: &BTreeMap<String, Vec<IpAddr>>) -> (bool, Vec<String>) {
    let is_bridge = |index: u32| links.iter().any(|link| link.index == index && link.is_bridge);
    let of_pods: BTreeSet<u32> =
        links.iter().filter(|link| ports.contains_key(&link.name)).filter_map(|link| link.master).collect();
    let of_pods: BTreeSet<u32> = of_pods.into_iter().filter(|index| is_bridge(*index)).collect();
    let on_them = links.iter().filter(|link| link.master.is_some_and(|master| of_pods.contains(&master)));
    let strangers = on_them.filter(|link| !ports.contains_key(&link.name)).take(NAMED);
    (!of_pods.is_empty(), strangers.map(|link| link.name.clone()).collect())
}

/// Whether the listing of IPVS names any service, below its three lines of headings.
fn has_services(listing: &str) -> bool {
    listing.lines().skip(3).any(|line| !line.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_of_ipvs_are_below_its_headings() {
        let headings = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  \
                        -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n";
        assert!(!has_services(""));
        assert!(!has_services(headings));
        assert!(has_services(&format!("{headings}TCP  0A600001:01BB rr\n")));
    }

    #[test]
    fn ports_of_pods_bridges_that_nobody_has_told_of_are_named() {
        let link = |index, name: &str, is_bridge, master| Link {
            index,
            name: name.to_owned(),
            is_bridge,
            master,
            ..Link::default()
        };
        let links = [
            link(1, "cni0", true, None),
            link(2, "veth1", false, Some(1)),
            link(3, "veth2", false, Some(1)),
            link(4, "docker0", true, None),
            link(5, "veth3", false, Some(4)),
            link(6, "routed", false, None),
        ];
        let ports = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), Vec::new())).collect();
        assert_eq!(bridges(&links, &ports(&["routed"])), (false, vec![]));
        assert_eq!(bridges(&links, &ports(&["veth1", "routed"])), (true, vec!["veth2".to_owned()]));
        assert_eq!(bridges(&links, &ports(&["veth1", "veth2"])), (true, vec![]));
    }
}
