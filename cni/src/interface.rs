//! A container's interface: a veth pair, routed or on a bridge.
//!
//! ```text
//! routed   container eth0 10.244.3.5/32, default via 169.254.1.1 and fe80::1, both known by hardware address
//!          host      mesh…, fe80::1, a route to each address
//! bridge   container eth0 10.244.3.5/24, default via the bridge, 10.244.3.1 and fd42:244:0:3::1
//!          host      mesh…, a port of the bridge, which has those addresses
//! ```
//!
//! The routed form needs no ARP or neighbour proxy, because the container never resolves the gateway's address. The
//! gateway does not depend on the node's subnet, so a container survives a change of the node's addresses.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use ipnet::IpNet;
use netlink::{Link, Mac, Netlink, NetlinkError, UnicastRoute, VethEnd};
use nix::errno::Errno;

use crate::{
    bridge,
    daemon::Network,
    environment::AttachmentName,
    error::{CniError, Code},
    link::{forward, hash, mac, mac_text, quiet},
    namespace::{NetworkNamespace, sysctl},
    result,
};

/// The gateway of routed containers.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6; the host's end has it.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

impl From<NetlinkError> for CniError {
    fn from(error: NetlinkError) -> Self {
        let code = match &error {
            error if error.is(Errno::EEXIST) => Code::InvalidEnvironment,
            _ => Code::Kernel,
        };
        Self::new(code, error.to_string())
    }
}

/// The interface to create.
#[derive(Debug)]
pub struct InterfacePlan<'a> {
    /// The attachment.
    pub name: &'a AttachmentName,
    /// Where the container is.
    pub namespace: &'a NetworkNamespace,
    /// Its addresses, with the length of their subnet's prefix.
    pub addresses: Vec<IpNet>,
    /// Routes that the IPAM plugin wants besides the default ones.
    pub routes: Vec<result::ResultRoute>,
    /// The hardware address inside, if one is asked for.
    pub mac: Option<Mac>,
    /// The largest packet.
    pub mtu: u32,
    /// The bridge to join, for that mode.
    pub bridge: Option<&'a str>,
    /// Where the daemon's files are.
    pub run_dir: &'a Path,
}

impl InterfacePlan<'_> {
    /// The hardware address that the interface has inside.
    #[must_use]
    pub(crate) fn inside_mac(&self) -> Mac {
        self.mac.unwrap_or_else(|| mac(self.name, 2))
    }
}

/// An interface whose container's end is ready, and whose host's end leads nowhere yet.
#[derive(Debug)]
pub struct Prepared {
    host: Link,
    inside: Link,
    addresses: Vec<IpNet>,
    routes: Vec<UnicastRoute>,
}

/// Name of the host's end: the same for the same attachment, so that it is found again without being remembered.
#[must_use]
pub fn host_name(name: &AttachmentName) -> String {
    let hash = hash(name, 0);
    // 11 of 32 letters: 55 bits.
    let letter = |at: u32| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[(hash >> (5 * at)) as usize & 31]);
    "mesh".chars().chain((0..11).map(letter)).collect()
}

/// Makes the pair and all that is inside the container. On failure nothing is left.
///
/// # Errors
/// The kernel's error; [`Code::InvalidEnvironment`] when there is such an interface already.
pub fn prepare(netlink: &mut Netlink, plan: &InterfacePlan<'_>) -> Result<Prepared, CniError> {
    let host_name = host_name(plan.name);
    let here = VethEnd { name: &host_name, mac: mac(plan.name, 1) };
    let inside = VethEnd { name: &plan.name.ifname, mac: plan.inside_mac() };
    use std::os::fd::AsFd as _;
    netlink.create_veth(here, inside, plan.namespace.as_fd(), plan.mtu)?;
    let made = (|| {
        let host = netlink.link(&host_name)?.ok_or_else(|| gone(&host_name))?;
        let (addresses, routes) = match plan.bridge {
            None => routed(plan),
            Some(_) => bridged(plan),
        };
        let gateway_mac = plan.bridge.is_none().then_some(here.mac);
        let inside =
            plan.namespace.enter(|netlink| configure(netlink, &plan.name.ifname, &addresses, &routes, gateway_mac))?;
        let routes = routes.into_iter().map(|route| UnicastRoute { index: inside.index, ..route }).collect();
        Ok(Prepared { host, inside, addresses, routes })
    })();
    if made.is_err() {
        // The error that counts is the first one.
        let _ = netlink.delete(&host_name);
    }
    made
}

/// Opens the way to the container.
///
/// # Errors
/// The kernel's error.
pub fn open(
    netlink: &mut Netlink,
    plan: &InterfacePlan<'_>,
    network: &Network,
    prepared: &Prepared,
) -> Result<(), CniError> {
    let host = &prepared.host;
    quiet(&host.name)?;
    match plan.bridge {
        Some(name) => bridge::join(netlink, plan.run_dir, name, network, host.index)?,
        None => {
            // Its one link-local address is the gateway's, and is had at once.
            sysctl(&format!("ipv6/conf/{}/addr_gen_mode", host.name), "1")?;
            netlink.set_up(host.index)?;
            if plan.addresses.iter().any(|address| address.addr().is_ipv4()) {
                forward(&host.name)?;
            }
            if plan.addresses.iter().any(|address| address.addr().is_ipv6()) {
                sysctl(&format!("ipv6/conf/{}/disable_ipv6", host.name), "0")?;
                netlink.add_address(host.index, link_local(GATEWAY_V6))?;
            }
            for address in &plan.addresses {
                let dst = IpNet::from(address.addr());
                netlink.add_route(&UnicastRoute { dst, gateway: None, index: host.index, mtu: None })?;
            }
        }
    }
    Ok(())
}

impl Prepared {
    /// The result of ADD.
    #[must_use]
    pub fn result(&self, plan: &InterfacePlan<'_>) -> result::AddResult {
        let interface = |link: &Link, sandbox: String| result::Interface {
            name: link.name.clone(),
            mac: link.mac.map(|mac| mac_text(&mac)).unwrap_or_default(),
            mtu: Some(link.mtu),
            sandbox,
        };
        let gateway = |address: &IpNet| {
            let default = self
                .routes
                .iter()
                .find(|route| route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4() == address.addr().is_ipv4());
            default.and_then(|route| route.gateway)
        };
        result::AddResult {
            interfaces: vec![
                interface(&self.host, String::new()),
                interface(&self.inside, plan.namespace.path().to_string_lossy().into_owned()),
            ],
            ips: self
                .addresses
                .iter()
                .map(|address| result::Ip {
                    version: None,
                    address: *address,
                    gateway: gateway(address),
                    interface: Some(1),
                })
                .collect(),
            routes: self.routes.iter().map(|route| result::ResultRoute { dst: route.dst, gw: route.gateway }).collect(),
            dns: serde_json::Map::new(),
        }
    }
}

fn routed(plan: &InterfacePlan<'_>) -> (Vec<IpNet>, Vec<UnicastRoute>) {
    let addresses: Vec<IpNet> = plan.addresses.iter().map(|address| IpNet::from(address.addr())).collect();
    let gateway = |v4: bool| if v4 { IpAddr::from(GATEWAY_V4) } else { GATEWAY_V6.into() };
    let routes = routes(plan, gateway);
    (addresses, routes)
}

fn bridged(plan: &InterfacePlan<'_>) -> (Vec<IpNet>, Vec<UnicastRoute>) {
    let first = |v4: bool| {
        let subnet = plan.addresses.iter().find(|address| address.addr().is_ipv4() == v4);
        subnet.map_or_else(
            || if v4 { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() },
            |subnet| bridge::address(&subnet.trunc()).addr(),
        )
    };
    (plan.addresses.clone(), routes(plan, first))
}

/// A default route for each family with an address, and the routes of the IPAM plugin.
fn routes(plan: &InterfacePlan<'_>, gateway: impl Fn(bool) -> IpAddr) -> Vec<UnicastRoute> {
    let mut routes: Vec<UnicastRoute> = Vec::new();
    for v4 in [true, false] {
        if plan.addresses.iter().any(|address| address.addr().is_ipv4() == v4) {
            let unspecified: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let dst = IpNet::new(unspecified, 0).unwrap_or_else(|_| IpNet::from(unspecified));
            routes.push(UnicastRoute { dst, gateway: Some(gateway(v4)), index: 0, mtu: None });
        }
    }
    for wanted in &plan.routes {
        if routes.iter().all(|route| route.dst != wanted.dst) {
            let gateway = wanted.gw.unwrap_or_else(|| gateway(wanted.dst.addr().is_ipv4()));
            routes.push(UnicastRoute { dst: wanted.dst, gateway: Some(gateway), index: 0, mtu: None });
        }
    }
    routes
}

/// Everything inside the container, in its namespace.
fn configure(
    netlink: &mut Netlink,
    ifname: &str,
    addresses: &[IpNet],
    routes: &[UnicastRoute],
    gateway_mac: Option<Mac>,
) -> Result<Link, CniError> {
    let link = netlink.link(ifname)?.ok_or_else(|| gone(ifname))?;
    quiet(ifname)?;
    if addresses.iter().any(|address| address.addr().is_ipv6()) {
        sysctl(&format!("ipv6/conf/{ifname}/disable_ipv6"), "0")?;
    }
    netlink.set_up(link.index)?;
    for address in addresses {
        netlink.add_address(link.index, *address)?;
    }
    if let Some(mac) = gateway_mac {
        for gateway in routes.iter().filter_map(|route| route.gateway).filter(is_own_gateway) {
            netlink.add_neighbour(link.index, gateway, mac)?;
        }
    }
    for route in routes {
        netlink.add_route(&UnicastRoute { index: link.index, ..route.clone() })?;
    }
    Ok(Link { up: true, ..link })
}

fn is_own_gateway(gateway: &IpAddr) -> bool {
    *gateway == GATEWAY_V4 || *gateway == GATEWAY_V6
}

fn link_local(address: Ipv6Addr) -> IpNet {
    IpNet::new(address.into(), 64).unwrap_or_else(|_| IpNet::from(IpAddr::from(address)))
}

fn gone(name: &str) -> CniError {
    CniError::new(Code::Kernel, format!("interface {name} disappeared right after its creation"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn name(id: u32) -> AttachmentName {
        AttachmentName { container_id: format!("c{id}"), ifname: "eth0".to_owned() }
    }

    #[test]
    fn names_and_hardware_addresses_are_the_same_again_and_each_its_own() {
        assert_eq!(host_name(&name(1)), host_name(&name(1)));
        let names: BTreeSet<String> = (0..10_000).map(|id| host_name(&name(id))).collect();
        assert_eq!(names.len(), 10_000);
        assert!(names.iter().all(|name| name.len() == 15));
        let macs: BTreeSet<Mac> = (0..10_000).flat_map(|id| [mac(&name(id), 1), mac(&name(id), 2)]).collect();
        assert_eq!(macs.len(), 20_000);
        assert!(macs.iter().all(|mac| mac[0] & 3 == 2), "unicast, locally administered");
    }
}
