//! The facts that this machine publishes, from its settings and its underlay.

use std::net::{IpAddr, SocketAddr};

use etcd_schema::{NodeId, NodeRecord, Vtep};
use ipnet::IpNet;
use kernel::{Underlay, UnderlayFamily};
use mesh::{
    address::Family,
    plan::{Local, UnderlayLink},
    vxlan::mac,
};

use crate::settings::{EndpointSetting, Settings};

/// The endpoints to publish, best first; none for a node that only calls out.
pub(super) fn endpoints(settings: &Settings, underlay: &Underlay) -> Vec<SocketAddr> {
    let mut endpoints = Vec::new();
    match settings.endpoint {
        EndpointSetting::None => return endpoints,
        EndpointSetting::At(at) => endpoints.push(at),
        EndpointSetting::Derived => {}
    }
    let addresses = Family::BOTH.map(|family| {
        let public: Vec<IpAddr> = settings.public_ips.iter().copied().filter(|ip| Family::of(*ip) == family).collect();
        if public.is_empty() { published(underlay, family).map(|net| net.addr()).collect() } else { public }
    });
    for ip in alternate(addresses, NodeRecord::MAX_ENDPOINTS) {
        let endpoint = SocketAddr::new(ip, settings.listen_port);
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    endpoints.truncate(NodeRecord::MAX_ENDPOINTS);
    endpoints
}

/// The interface addresses to publish, best first.
pub(super) fn addresses(underlay: &Underlay) -> Vec<IpNet> {
    let addresses = Family::BOTH.map(|family| published(underlay, family).collect());
    alternate(addresses, NodeRecord::MAX_ADDRESSES).collect()
}

/// Every address of this machine on the underlay.
pub(super) fn own_addresses(underlay: &Underlay) -> impl Iterator<Item = IpAddr> {
    let links = Family::BOTH.into_iter().filter_map(|family| of(underlay, family));
    links.flat_map(|link| link.addresses.iter().map(IpNet::addr))
}

/// The addresses of a family that peers may use, best first. One without a prefix (/32, /128) beside one that has one
/// is a floating or anycast address: another machine may have it next.
fn published(underlay: &Underlay, family: Family) -> impl Iterator<Item = IpNet> {
    let addresses = of(underlay, family).map(|link| link.addresses.as_slice()).unwrap_or_default();
    let on_link = |net: &IpNet| net.prefix_len() < net.max_prefix_len();
    let any_on_link = addresses.iter().any(on_link);
    addresses.iter().copied().filter(move |net| !any_on_link || on_link(net))
}

/// The best of each family, then the second of each, and so on: one family that does not get through costs a peer one
/// try, not as many as it has addresses.
fn alternate<T>(families: [Vec<T>; 2], most: usize) -> impl Iterator<Item = T> {
    let ranked = families.into_iter().flat_map(|family| family.into_iter().enumerate());
    let mut ranked: Vec<(usize, T)> = ranked.collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, item)| item).take(most)
}

/// The ends of VXLAN tunnels to publish: of each family, the public address that is set, else the interface's.
pub(super) fn vteps(id: &NodeId, settings: &Settings, underlay: &Underlay) -> Vec<Vtep> {
    let end = |family| {
        let public = settings.public_ips.iter().copied().find(|ip| Family::of(*ip) == family);
        let address = public.or_else(|| published(underlay, family).next().map(|net| net.addr()))?;
        of(underlay, family)?;
        Some(Vtep { address, mac: mac(id, family) })
    };
    Family::BOTH.into_iter().filter_map(end).collect()
}

/// What the planner knows of this machine.
pub(super) fn local(
    id: &NodeId,
    settings: &Settings,
    underlay: &Underlay,
    etcd_addresses: &[(IpAddr, String)],
    has_endpoint: bool,
) -> Local {
    let links = Family::BOTH.into_iter().filter_map(|family| {
        let link = of(underlay, family)?;
        // What the others hold to be this node's, so that both ends choose a direct path by the same addresses.
        let (name, addresses) = (link.name.clone(), published(underlay, family).collect());
        Some((family, UnderlayLink { name, index: link.index, mtu: link.mtu, addresses }))
    });
    let end = |family| {
        let address = published(underlay, family).next()?.addr();
        Some((family, Vtep { address, mac: mac(id, family) }))
    };
    Local {
        vteps: Family::BOTH.into_iter().filter_map(end).collect(),
        site: settings.site.as_ref().map(ToString::to_string),
        underlay: links.collect(),
        has_endpoint,
        listen_port: settings.listen_port,
        protected: protected(&settings.etcd.reread().endpoints, underlay, etcd_addresses),
        ip_masq: settings.ip_masq,
        forward_accept: settings.forward_accept,
    }
}

/// Addresses that must never be routed into the mesh, each with what it is: this machine's own, its next hops, etcd's.
pub(super) fn protected(
    etcd_endpoints: &[String],
    underlay: &Underlay,
    etcd_addresses: &[(IpAddr, String)],
) -> Vec<(IpAddr, String)> {
    let mut protected: Vec<(IpAddr, String)> = Vec::new();
    for link in Family::BOTH.into_iter().filter_map(|family| of(underlay, family)) {
        protected
            .extend(link.addresses.iter().map(|net| (net.addr(), format!("this node's address on {}", link.name))));
        protected.extend(link.gateway.map(|gateway| (gateway, "this node's next hop".to_owned())));
    }
    let etcd = etcd_endpoints.iter().filter_map(|url| Some((literal_address(url)?, format!("etcd's {url}"))));
    protected.extend(etcd.chain(etcd_addresses.iter().cloned()).filter(|(ip, _)| !ip.is_loopback()));
    protected
}

pub(super) fn of(underlay: &Underlay, family: Family) -> Option<&UnderlayFamily> {
    match family {
        Family::V4 => underlay.ipv4.as_ref(),
        Family::V6 => underlay.ipv6.as_ref(),
    }
}

/// The host and port of an etcd URL that names a host, not an address.
pub(super) fn name_and_port(url: &str) -> Option<&str> {
    Some(authority(url)).filter(|_| literal_address(url).is_none())
}

/// The address in an etcd URL that names one, not a host.
fn literal_address(url: &str) -> Option<IpAddr> {
    authority(url).parse::<SocketAddr>().ok().map(|at| at.ip())
}

fn authority(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, rest)| rest).trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn underlay(v4: &[&str], v6: &[&str]) -> Underlay {
        let family = |texts: &[&str]| {
            (!texts.is_empty()).then(|| UnderlayFamily {
                index: 2,
                name: "eth0".parse().unwrap(),
                mtu: 1500,
                addresses: texts.iter().map(|text| text.parse().unwrap()).collect(),
                gateway: None,
            })
        };
        Underlay { ipv4: family(v4), ipv6: family(v6) }
    }

    fn shown(underlay: &Underlay) -> Vec<String> {
        addresses(underlay).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_addresses_are_published_but_those_without_a_prefix_beside_one_that_has_one() {
        let several = underlay(
            &["192.0.2.1/24", "192.0.2.99/32", "10.0.0.1/8"],
            &["2001:db8::1/64", "2001:db8::ff/128", "fd00::1/64"],
        );
        assert_eq!(shown(&several), ["192.0.2.1/24", "2001:db8::1/64", "10.0.0.1/8", "fd00::1/64"]);
        assert_eq!(own_addresses(&several).count(), 6, "they are this machine's all the same");
        let bare = underlay(&["192.0.2.1/32"], &["2001:db8::1/128", "2001:db8::2/128"]);
        assert_eq!(shown(&bare), ["192.0.2.1/32", "2001:db8::1/128", "2001:db8::2/128"]);
    }

    #[test]
    fn no_more_than_a_record_takes_and_of_both_families() {
        let v4: Vec<String> = (1..=40).map(|last| format!("192.0.2.{last}/24")).collect();
        let v4: Vec<&str> = v4.iter().map(String::as_str).collect();
        let shown = shown(&underlay(&v4, &["2001:db8::1/64", "fd00::1/64"]));
        assert_eq!(shown.len(), NodeRecord::MAX_ADDRESSES);
        assert_eq!(shown[..5], ["192.0.2.1/24", "2001:db8::1/64", "192.0.2.2/24", "fd00::1/64", "192.0.2.3/24"]);
    }
}
