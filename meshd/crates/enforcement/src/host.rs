//! State of this machine that decides whether nftables sees packets unchanged.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use netlink::{Link, Mac, Netlink, NetlinkError};

use super::ruleset::{PodPort, switched_judged};

/// Ports that a problem names.
const NAMED: usize = 8;

/// The machine at one time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Host {
    /// Bridged packets traverse nftables' `inet` chains.
    pub(super) switched_judged: bool,
    /// A pod of this node is attached to a bridge.
    pub(super) bridged: bool,
    /// Hardware addresses of the bridges of this node's attachments.
    pub(super) bridges: BTreeSet<Mac>,
    /// Some ports of such bridges without an attachment.
    pub(super) strangers: Vec<String>,
    /// `allowedSources` that are not in force, each with the reason.
    pub(super) refused_sources: Vec<String>,
    /// Bridges of pods that still learn from frames that no rule sees, each with the reason.
    pub(super) learning: Vec<String>,
    /// There are virtual services of IPVS.
    pub(super) ipvs: bool,
    /// Addresses of this machine in the node's own subnets: of the gateway of a bridge, for example.
    pub(super) addresses: Arc<BTreeSet<IpAddr>>,
}

/// Interfaces and sysctls as read from the kernel.
#[derive(Debug)]
struct Looked {
    links: Vec<Link>,
    addresses: Vec<IpAddr>,
    /// [`Host::learning`]
    learning: Vec<String>,
}

impl Host {
    /// Reads the state of this thread's network namespace, and makes pods' bridges learn only from frames that rules
    /// see. `ports`: the host's ends of pods' interfaces; `own`: the node's subnets. Unreadable parts stay as `before`.
    pub(super) fn prepared(ports: &BTreeMap<String, PodPort>, own: &[IpNet], before: &Self) -> Self {
        let look = || {
            let mut netlink = Netlink::open()?;
            let links = netlink.links()?;
            let addresses = netlink.all_addresses()?;
            let bridges = links.iter().filter(|link| is_of(link, &links, ports));
            let learning = stop_learning(&mut netlink, bridges);
            Ok::<_, NetlinkError>(Looked { links, addresses, learning })
        };
        let services = fs::read_to_string("/proc/thread-self/net/ip_vs");
        Self { switched_judged: switched_judged(), ..before.updated(look(), services, (ports, own)) }
    }

    /// Replaces the readable parts by `looked`.
    fn updated(
        &self,
        looked: Result<Looked, NetlinkError>,
        services: io::Result<String>,
        (ports, own): (&BTreeMap<String, PodPort>, &[IpNet]),
    ) -> Self {
        let ipvs = match services {
            Ok(services) => has_services(&services),
            Err(error) => error.kind() != io::ErrorKind::NotFound && self.ipvs,
        };
        let host = Self { refused_sources: Vec::new(), ipvs, ..self.clone() };
        let Looked { links, addresses, learning } = match looked {
            Ok(looked) => looked,
            Err(error) => {
                tracing::warn!(%error, "cannot list interfaces; keeping the last known state");
                return host;
            }
        };
        let (bridged, strangers) = bridges(&links, ports);
        let macs = links.iter().filter(|link| is_of(link, &links, ports)).filter_map(|bridge| bridge.mac).collect();
        let is_own = |address: &IpAddr| own.iter().any(|net| net.contains(address));
        let addresses = addresses.into_iter().filter(is_own).collect::<BTreeSet<_>>();
        Self { bridged, strangers, bridges: macs, learning, addresses: addresses.into(), ..host }
    }
}

/// Whether a link is a bridge that any of `ports` is on.
fn is_of(bridge: &Link, links: &[Link], ports: &BTreeMap<String, PodPort>) -> bool {
    bridge.is_bridge && links.iter().any(|link| link.master == Some(bridge.index) && ports.contains_key(&link.name))
}

/// Turns off link-local learning on these bridges; returns those where that failed, each with the reason.
fn stop_learning<'a>(netlink: &mut Netlink, bridges: impl Iterator<Item = &'a Link>) -> Vec<String> {
    let failed = bridges.filter(|bridge| bridge.learns_from_link_local).filter_map(|bridge| {
        let failed = netlink.stop_link_local_learning(bridge.index).err()?;
        Some(format!("{} ({failed})", bridge.name))
    });
    failed.collect()
}

/// Whether any of `ports` is on a bridge, and the other ports of such bridges.
fn bridges(links: &[Link], ports: &BTreeMap<String, PodPort>) -> (bool, Vec<String>) {
    let is_bridge = |index: u32| links.iter().any(|link| link.index == index && link.is_bridge);
    let is_pods = |name: &str| ports.get(name).is_some_and(|port| port.in_mesh);
    let of_pods: BTreeSet<u32> =
        links.iter().filter(|link| is_pods(&link.name)).filter_map(|link| link.master).collect();
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
    fn what_cannot_be_read_is_as_it_was() {
        let link = |index, name: &str, is_bridge, master| Link {
            index,
            name: name.to_owned(),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            is_bridge,
            master,
            ..Link::default()
        };
        let looked = Looked {
            links: vec![
                link(1, "cni0", true, None),
                link(2, "veth1", false, Some(1)),
                link(3, "veth2", false, Some(1)),
            ],
            addresses: vec!["10.244.3.1".parse().unwrap(), "192.0.2.1".parse().unwrap()],
            learning: vec!["cni0 (refused)".to_owned()],
        };
        let ports = [("veth1".to_owned(), PodPort { in_mesh: true, ..PodPort::default() })].into();
        let own = ["10.244.3.0/24".parse().unwrap()];
        let services = "one\ntwo\nthree\nTCP  0A600001:01BB rr\n".to_owned();
        let seen = Host::default().updated(Ok(looked), Ok(services), (&ports, &own));
        assert_eq!(
            seen,
            Host {
                switched_judged: false,
                bridged: true,
                bridges: [[2, 0, 0, 0, 0, 1]].into(),
                strangers: vec!["veth2".to_owned()],
                refused_sources: Vec::new(),
                learning: vec!["cni0 (refused)".to_owned()],
                ipvs: true,
                addresses: Arc::new(["10.244.3.1".parse().unwrap()].into()),
            }
        );
        let full = || io::Error::from_raw_os_error(nix::errno::Errno::EMFILE as i32);
        let failed = NetlinkError { what: "interfaces".to_owned(), source: full() };
        assert_eq!(seen.updated(Err(failed), Err(full()), (&ports, &own)), seen);
    }

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
        let in_mesh = PodPort { in_mesh: true, ..PodPort::default() };
        let ports = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), in_mesh.clone())).collect();
        assert_eq!(bridges(&links, &ports(&["routed"])), (false, vec![]));
        assert_eq!(bridges(&links, &ports(&["veth1", "routed"])), (true, vec!["veth2".to_owned()]));
        assert_eq!(bridges(&links, &ports(&["veth1", "veth2"])), (true, vec![]));
        let elsewhere = [("veth1".to_owned(), PodPort::default())].into();
        assert_eq!(bridges(&links, &elsewhere), (false, vec![]));
    }
}
