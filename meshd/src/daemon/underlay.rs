//! What this machine is to the others: the facts it publishes, from its settings and its underlay.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::{
    kernel::{Underlay, UnderlayFamily},
    mesh::{
        address::Family,
        plan::{Local, UnderlayLink},
    },
    settings::{EndpointSetting, Settings},
};

/// The endpoints to publish, best first; none for a node that only calls out.
pub(super) fn endpoints(settings: &Settings, underlay: &Underlay) -> Vec<SocketAddr> {
    let mut endpoints = Vec::new();
    match settings.endpoint {
        EndpointSetting::None => return endpoints,
        EndpointSetting::At(at) => endpoints.push(at),
        EndpointSetting::Derived => {}
    }
    for family in Family::BOTH {
        let public = settings.public_ips.iter().copied().find(|ip| Family::of(*ip) == family);
        let address = public.or_else(|| of(underlay, family).and_then(|link| link.addresses.first()).map(IpNet::addr));
        let endpoint = address.map(|ip| SocketAddr::new(ip, settings.listen_port));
        endpoints.extend(endpoint.filter(|endpoint| !endpoints.contains(endpoint)));
    }
    endpoints
}

/// The interface addresses to publish, IPv4 first.
pub(super) fn addresses(underlay: &Underlay) -> Vec<IpNet> {
    Family::BOTH.into_iter().filter_map(|family| of(underlay, family)).flat_map(|link| link.addresses.clone()).collect()
}

/// What the planner knows of this machine.
pub(super) fn local(
    settings: &Settings,
    underlay: &Underlay,
    etcd_addresses: &[(IpAddr, String)],
    has_endpoint: bool,
) -> Local {
    let links = Family::BOTH.into_iter().filter_map(|family| {
        let link = of(underlay, family)?;
        let (name, addresses) = (link.name.clone(), link.addresses.clone());
        Some((family, UnderlayLink { name, index: link.index, mtu: link.mtu, addresses }))
    });
    Local {
        site: settings.site.as_ref().map(ToString::to_string),
        underlay: links.collect(),
        has_endpoint,
        listen_port: settings.listen_port,
        protected: protected(&settings.etcd.endpoints, underlay, etcd_addresses),
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
