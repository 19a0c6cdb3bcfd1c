//! Conversion between the kernel's messages and our types.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{BridgeBooleanOptionFlags, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
        RouteType,
    },
};

use super::{Link, Mac, UnicastRoute};

/// The stated length of the first message in `bytes`; `None` without a complete header.
pub(super) fn length(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    (length >= 16).then_some(length)
}

pub(super) fn link(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<Link> {
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) = payload else { return None };
    let mut link =
        Link { index: message.header.index, up: message.header.flags.contains(LinkFlags::Up), ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            LinkAttribute::Controller(master) => link.master = Some(*master),
            LinkAttribute::LinkInfo(infos) => {
                link.is_veth = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
                link.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
                link.learns_from_link_local = link.is_bridge && !infos.iter().any(ignores_link_local);
            }
            _ => {}
        }
    }
    Some(link)
}

/// Whether these are the options of a bridge that does not learn from frames to link-local groups.
fn ignores_link_local(info: &LinkInfo) -> bool {
    let LinkInfo::Data(InfoData::Bridge(options)) = info else { return false };
    options.iter().any(|option| {
        matches!(option, InfoBridge::MultiBoolOpt(on) if on.value.contains(BridgeBooleanOptionFlags::NoLinkLocalLearn))
    })
}

pub(super) fn new_address(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.header.scope = match address.addr() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => AddressScope::Link,
        _ => AddressScope::Universe,
    };
    message.attributes = vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    if address.addr().is_ipv6() {
        // It is not looked for elsewhere first: who gives the addresses out knows that it is the only one.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

pub(super) fn address(payload: &NetlinkPayload<RouteNetlinkMessage>, index: Option<u32>) -> Option<IpNet> {
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) = payload else { return None };
    if index.is_some_and(|index| index != message.header.index) {
        return None;
    }
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    IpNet::new(local.or(address)?, message.header.prefix_len).ok()
}

pub(super) fn neighbour(index: u32, neighbour: IpAddr, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match neighbour {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes =
        vec![NeighbourAttribute::Destination(destination), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}

pub(super) fn route(route: &UnicastRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = RouteScope::Universe;
    message.attributes.push(RouteAttribute::Oif(route.index));
    if route.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route_address(route.dst.network())));
    }
    match route.gateway {
        Some(gateway) => {
            // No route need lead to the next hop: it is on the other end of the wire.
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
        }
        None if route.dst.addr().is_ipv4() => message.header.scope = RouteScope::Link,
        None => {}
    }
    if let Some(mtu) = route.mtu {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

pub(super) fn unicast_route(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<UnicastRoute> {
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) = payload else { return None };
    let mut table = u32::from(message.header.table);
    let (mut destination, mut gateway, mut index, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics
                    .iter()
                    .find_map(|metric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None });
            }
            _ => {}
        }
    }
    if message.header.kind != RouteType::Unicast || table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let destination = match (destination, message.header.address_family) {
        (Some(destination), _) => destination,
        (None, AddressFamily::Inet) => Ipv4Addr::UNSPECIFIED.into(),
        (None, AddressFamily::Inet6) => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let dst = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some(UnicastRoute { dst, gateway, index: index?, mtu })
}

/// The same route with another MTU, without attributes that the kernel only reports.
pub(super) fn with_mtu(mut message: RouteMessage, mtu: u32) -> RouteMessage {
    let mut metrics = vec![RouteMetric::Mtu(mtu)];
    message.attributes.retain(|attribute| match attribute {
        RouteAttribute::Metrics(known) => {
            metrics.extend(known.iter().filter(|metric| !matches!(metric, RouteMetric::Mtu(_))).cloned());
            false
        }
        RouteAttribute::CacheInfo(_) => false,
        _ => true,
    });
    message.attributes.push(RouteAttribute::Metrics(metrics));
    message.header.flags &= RouteFlags::Onlink;
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}
