//! The underlay: interfaces, addresses and gateways of outer packets, and neighbours on it.

use std::{cmp::Reverse, collections::HashMap, net::IpAddr};

use ipnet::IpNet;
use mesh::interface::InterfaceName;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use thiserror::Error;

use super::{
    Kernel,
    netlink::{KernelLink, LinkAddress, Rtnetlink, RtnetlinkError},
};

/// Which interface carries the outer packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnderlaySelection {
    /// Per family, that of the default route with the lowest metric.
    Auto,
    /// This one, for both families.
    Named(InterfaceName),
}

/// The underlay as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Underlay {
    /// For outer IPv4, if the node has any.
    pub ipv4: Option<UnderlayFamily>,
    /// For outer IPv6, if the node has any.
    pub ipv6: Option<UnderlayFamily>,
}

/// The underlay of one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayFamily {
    /// The interface's index.
    pub index: u32,
    /// Its name.
    pub name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses of this family with their prefix lengths, of global scope, neither deprecated, tentative,
    /// temporary nor link-local. In the order in which others should try them: by RFC 6724's precedence, then the
    /// oldest first.
    pub addresses: Vec<IpNet>,
    /// The next hop of its default route.
    pub gateway: Option<IpAddr>,
}

/// Why the underlay is not known.
#[derive(Debug, Error)]
pub enum UnderlayError {
    /// Asking the kernel failed.
    #[error(transparent)]
    Netlink(#[from] RtnetlinkError),
    /// The named interface is not there.
    #[error("interface {0} does not exist: check --iface, or use --iface auto")]
    NoInterface(InterfaceName),
    /// No default route, so nothing to choose by.
    #[error("no default route with a usable IPv4 or IPv6 address: set the underlay interface with --iface")]
    NoDefaultRoute,
}

/// A neighbour's hardware address, as the kernel last knew it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The kernel has confirmed it lately, or an operator has set it: reachable, permanent, or without resolution.
    /// `false` for stale, delay and probe: known, not confirmed.
    pub confirmed: bool,
}

impl Kernel {
    /// Looks up the interface that carries the outer packets, per family. A family without an interface, or whose
    /// interface has no usable address, is `None`.
    ///
    /// # Errors
    /// [`UnderlayError`].
    pub async fn underlay(&self, selection: &UnderlaySelection) -> Result<Underlay, UnderlayError> {
        let netlink = Rtnetlink::open()?;
        let links = netlink.links().await?;
        let addresses = netlink.addresses(None).await?;
        let mut found = Underlay::default();
        for ipv4 in [true, false] {
            let mut defaults = netlink.defaults(ipv4).await?;
            defaults.sort_by_key(|route| route.metric);
            defaults
                .retain(|route| links.iter().any(|l| l.index == route.index && l.name != self.options.tun.as_str()));
            let link = match selection {
                UnderlaySelection::Named(name) => Some(
                    links
                        .iter()
                        .find(|l| l.name == name.as_str())
                        .ok_or_else(|| UnderlayError::NoInterface(name.clone()))?,
                ),
                UnderlaySelection::Auto => {
                    defaults.first().and_then(|route| links.iter().find(|l| l.index == route.index))
                }
            };
            let family = link.and_then(|link| {
                let gateway = defaults.iter().find(|route| route.index == link.index).and_then(|route| route.gateway);
                family(link, &addresses, ipv4, gateway)
            });
            if ipv4 {
                found.ipv4 = family;
            } else {
                found.ipv6 = family;
            }
        }
        if found == Underlay::default() && *selection == UnderlaySelection::Auto {
            return Err(UnderlayError::NoDefaultRoute);
        }
        Ok(found)
    }

    /// The neighbour entry for `address` on the interface with `index`. `None` if the kernel has none with a MAC
    /// address, or the neighbour does not answer.
    ///
    /// # Errors
    /// [`RtnetlinkError`].
    pub async fn neighbour(&self, index: u32, address: IpAddr) -> Result<Option<Neighbour>, RtnetlinkError> {
        Ok(self.neighbours(index, address.is_ipv4()).await?.remove(&address))
    }

    /// The neighbour entries of one family on the interface with `index`, without those that have no MAC address or do
    /// not answer.
    ///
    /// # Errors
    /// [`RtnetlinkError`].
    pub async fn neighbours(&self, index: u32, ipv4: bool) -> Result<HashMap<IpAddr, Neighbour>, RtnetlinkError> {
        let entries = Rtnetlink::open()?.neighbours(index, ipv4).await?;
        Ok(entries.iter().filter_map(neighbour).collect())
    }
}

fn neighbour(entry: &NeighbourMessage) -> Option<(IpAddr, Neighbour)> {
    let confirmed = match entry.header.state {
        NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => true,
        NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe => false,
        _ => return None,
    };
    let address = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    })?;
    let mac = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    })?;
    Some((address, Neighbour { mac, confirmed }))
}

fn family(link: &KernelLink, addresses: &[LinkAddress], ipv4: bool, gateway: Option<IpAddr>) -> Option<UnderlayFamily> {
    let usable = addresses.iter().filter(|a| a.index == link.index && a.usable && a.address.addr().is_ipv4() == ipv4);
    let addresses = in_order(usable.map(|a| (a.address, a.created)).collect());
    if addresses.is_empty() {
        return None;
    }
    Some(UnderlayFamily {
        index: link.index,
        name: InterfaceName::new(&link.name).ok()?,
        mtu: link.mtu,
        addresses,
        gateway,
    })
}

/// The addresses, each with when it was added, in the order in which others should try them.
fn in_order(mut addresses: Vec<(IpNet, u32)>) -> Vec<IpNet> {
    // The kernel lists the newest IPv6 address first; of those that came at once the last one listed is the oldest.
    if addresses.iter().any(|(net, _)| net.addr().is_ipv6()) {
        addresses.reverse();
    }
    addresses.sort_by_key(|(net, created)| (Reverse(precedence(net.addr())), *created));
    addresses.into_iter().map(|(net, _)| net).collect()
}

/// Precedence of an address as a destination, from the default policy table (RFC 6724, 2.1); of link-local and loopback
/// addresses none is listed here.
fn precedence(address: IpAddr) -> u8 {
    let IpAddr::V6(v6) = address else { return 35 };
    match v6.segments() {
        [0x2002, ..] => 30,
        [0x2001, 0, ..] => 5,
        [first, ..] if first & 0xfe00 == 0xfc00 => 3,
        [0, 0, 0, 0, 0, 0, ..] => 1,
        [first, ..] if first & 0xffc0 == 0xfec0 => 1,
        [0x3ffe, ..] => 1,
        _ => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ordered(listed: &[(&str, u32)]) -> Vec<IpNet> {
        in_order(listed.iter().map(|(text, created)| (text.parse().unwrap(), *created)).collect())
    }

    #[test]
    fn a_global_address_goes_before_a_unique_local_one_and_the_oldest_first() {
        let listed = [
            ("fd00:9::11/64", 50),
            ("2001:db8:2::77/128", 900),
            ("2001:db8:2::61/64", 400),
            ("2001:db8:2::11/64", 100),
            ("2002:c000:204::1/64", 10),
            ("2001:0:1::1/64", 10),
        ];
        let expected = nets(&[
            "2001:db8:2::11/64",
            "2001:db8:2::61/64",
            "2001:db8:2::77/128",
            "2002:c000:204::1/64",
            "2001:0:1::1/64",
            "fd00:9::11/64",
        ]);
        assert_eq!(ordered(&listed), expected);
        let mut reversed = listed;
        reversed.reverse();
        assert_eq!(ordered(&reversed), expected, "whatever the kernel's order is");
    }

    #[test]
    fn of_addresses_that_came_at_once_the_one_that_the_kernel_had_first_is_first() {
        assert_eq!(
            ordered(&[("2001:db8::2/64", 7), ("2001:db8::1/64", 7)]),
            nets(&["2001:db8::1/64", "2001:db8::2/64"])
        );
        assert_eq!(ordered(&[("192.0.2.1/24", 7), ("10.0.0.1/24", 7)]), nets(&["192.0.2.1/24", "10.0.0.1/24"]));
        assert_eq!(ordered(&[("192.0.2.1/24", 8), ("10.0.0.1/24", 7)]), nets(&["10.0.0.1/24", "192.0.2.1/24"]));
    }
}
