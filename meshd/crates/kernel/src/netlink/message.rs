//! Conversion between the kernel's messages and our types.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh::path::MacAddress;
use rtnetlink::packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{KernelLink, LinkAddress, MainRoute, VxlanShape};
use crate::route::{KernelRoute, KernelRule, NextHop};

pub(super) fn family_of(ipv4: bool) -> AddressFamily {
    if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(super) fn link(message: &LinkMessage) -> KernelLink {
    let mut link = KernelLink {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        txqueuelen: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        is_tun: false,
        vxlan: None,
        alias: None,
        mac: None,
        master: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::TxQueueLen(packets) => link.txqueuelen = *packets,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Address(address) => link.mac = <[u8; 6]>::try_from(address.as_slice()).ok().map(MacAddress),
            LinkAttribute::LinkInfo(infos) => {
                link.is_tun = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Tun)));
                link.vxlan = infos.iter().find_map(|info| match info {
                    LinkInfo::Data(InfoData::Vxlan(data)) => Some(vxlan(data)),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

/// What a VXLAN device cannot change while it lives.
fn vxlan(data: &[InfoVxlan]) -> VxlanShape {
    let mut shape = VxlanShape::default();
    for info in data {
        match info {
            InfoVxlan::Id(vni) => shape.vni = *vni,
            InfoVxlan::Link(index) => shape.underlay = *index,
            InfoVxlan::Local(address) => shape.local = Some((*address).into()),
            InfoVxlan::Local6(address) => shape.local = Some((*address).into()),
            InfoVxlan::Port(port) => shape.port = *port,
            InfoVxlan::Learning(learning) => shape.learning = *learning,
            InfoVxlan::Gbp => shape.gbp = true,
            InfoVxlan::Group(_) | InfoVxlan::Group6(_) | InfoVxlan::CollectMetadata(true) => shape.other = true,
            _ => {}
        }
    }
    shape
}

/// Neighbour and hardware address of a permanent entry.
pub(super) fn permanent_neighbour(message: &NeighbourMessage) -> Option<(IpAddr, MacAddress)> {
    let (address, mac) = neighbour(message);
    address.zip(mac).filter(|_| message.header.state == NeighbourState::Permanent)
}

/// A forwarding entry of a VXLAN device that was put, not learned; those of groups and of other devices have no
/// destination.
pub(super) fn forwarding_entry(message: &NeighbourMessage) -> Option<(MacAddress, IpAddr)> {
    let (address, mac) = neighbour(message);
    mac.zip(address).filter(|_| !matches!(message.header.state, NeighbourState::Reachable | NeighbourState::Stale))
}

fn neighbour(message: &NeighbourMessage) -> (Option<IpAddr>, Option<MacAddress>) {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => address = Some((*a).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some((*a).into()),
            // The decoder does not look into addresses of bridges.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => address = bytes_to_ip(bytes),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress)
            }
            _ => {}
        }
    }
    (address, mac)
}

fn bytes_to_ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

pub(super) fn link_address(message: &AddressMessage) -> Option<LinkAddress> {
    let (mut address, mut local, mut flags, mut created) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Flags(f) => flags = Some(*f),
            AddressAttribute::CacheInfo(cache) => created = cache.cstamp,
            _ => {}
        }
    }
    let flags = flags.unwrap_or_else(|| AddressFlags::from_bits_retain(u32::from(message.header.flags.bits())));
    // `Secondary` marks a second IPv4 address of a prefix, but a temporary one for IPv6.
    let address = local.or(address)?;
    let mut unfit = AddressFlags::Deprecated | AddressFlags::Tentative | AddressFlags::Dadfailed;
    if address.is_ipv6() {
        unfit |= AddressFlags::Secondary;
    }
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    Some(LinkAddress {
        index: message.header.index,
        address: IpNet::new(address, message.header.prefix_len).ok()?,
        usable: !flags.intersects(unfit) && !link_local && message.header.scope == AddressScope::Universe,
        created,
    })
}

pub(super) fn kernel_route(message: &RouteMessage) -> Option<KernelRoute> {
    let mut table = u32::from(message.header.table);
    let (mut destination, mut gateway, mut index) = (None, None, None);
    let (mut metric, mut mtu, mut src) = (0, None, None);
    let mut other = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => destination = ip(a),
            RouteAttribute::Gateway(a) => gateway = ip(a),
            RouteAttribute::PrefSource(a) => src = ip(a),
            RouteAttribute::Oif(i) => index = Some(*i),
            RouteAttribute::Priority(p) => metric = *p,
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|m| match m {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::NhId(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::Source(_) => other = true,
            _ => {}
        }
    }
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0u8; 16]),
        _ => return None,
    };
    let dst = destination.unwrap_or(any);
    let target = match (message.header.kind, index) {
        _ if other => NextHop::Other,
        (RouteType::Unreachable, _) => NextHop::Unreachable,
        (RouteType::Unicast, Some(index)) => {
            NextHop::Device { gateway, index, onlink: message.header.flags.contains(RouteFlags::Onlink) }
        }
        _ => NextHop::Other,
    };
    Some(KernelRoute {
        dst: IpNet::new(dst, message.header.destination_prefix_length).ok()?,
        table,
        metric,
        target,
        mtu,
        src,
    })
}

/// A unicast route of the main table, once for each next hop; nothing of any other route.
pub(super) fn main_routes(message: &RouteMessage) -> Vec<MainRoute> {
    if message.header.kind != RouteType::Unicast || message.header.table != 254 {
        return Vec::new();
    }
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0u8; 16]),
        _ => return Vec::new(),
    };
    let (mut destination, mut metric, mut index) = (any, 0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => destination = ip(a).unwrap_or(any),
            RouteAttribute::Priority(p) => metric = *p,
            RouteAttribute::Oif(i) => index = Some(*i),
            _ => {}
        }
    }
    let Ok(dst) = IpNet::new(destination, message.header.destination_prefix_length) else { return Vec::new() };
    let protocol = u8::from(message.header.protocol);
    let advertised = dst.prefix_len() == 0 && message.header.protocol == RouteProtocol::Ra;
    let mut routes = Vec::new();
    let mut one = |index: Option<u32>, attributes: &[RouteAttribute]| {
        let gateway = attributes.iter().find_map(|a| match a {
            RouteAttribute::Gateway(g) => ip(g),
            _ => None,
        });
        if let Some(index) = index {
            routes.push(MainRoute { dst, index, gateway, metric, protocol, advertised });
        }
    };
    one(index, &message.attributes);
    for attribute in &message.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            for hop in hops {
                one(Some(hop.interface_index), &hop.attributes);
            }
        }
    }
    routes
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

pub(super) fn route_message(route: &KernelRoute, protocol: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family_of(matches!(route.dst, IpNet::V4(_)));
    header.destination_prefix_length = route.dst.prefix_len();
    header.protocol = protocol.into();
    header.scope = RouteScope::Universe;
    let attributes = &mut message.attributes;
    match u8::try_from(route.table) {
        Ok(table) => header.table = table,
        Err(_) => attributes.push(RouteAttribute::Table(route.table)),
    }
    if route.dst.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route.dst.network().into()));
    }
    attributes.push(RouteAttribute::Priority(route.metric));
    match &route.target {
        NextHop::Unreachable => header.kind = RouteType::Unreachable,
        NextHop::Other => header.kind = RouteType::Unspec,
        NextHop::Device { gateway, index, onlink } => {
            header.kind = RouteType::Unicast;
            if *onlink {
                header.flags |= RouteFlags::Onlink;
            }
            attributes.push(RouteAttribute::Oif(*index));
            match gateway {
                Some(gateway) => attributes.push(RouteAttribute::Gateway((*gateway).into())),
                None => header.scope = RouteScope::Link,
            }
        }
    }
    if let Some(src) = route.src {
        attributes.push(RouteAttribute::PrefSource(src.into()));
    }
    if let Some(mtu) = route.mtu {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

pub(super) fn kernel_rule(message: &RuleMessage) -> KernelRule {
    let (mut mark, mut mask, mut priority) = (None, None, 0);
    let mut table = u32::from(message.header.table);
    let mut plain = message.header.action == RuleAction::ToTable;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::FwMark(m) => mark = Some(*m),
            RuleAttribute::FwMask(m) => mask = Some(*m),
            RuleAttribute::Priority(p) => priority = *p,
            RuleAttribute::Table(t) => table = *t,
            RuleAttribute::Source(_)
            | RuleAttribute::Destination(_)
            | RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::Goto(_) => plain = false,
            _ => {}
        }
    }
    KernelRule {
        ipv4: message.header.family == AddressFamily::Inet,
        priority,
        mark: mark.filter(|_| plain && mask.is_none_or(|m| m == u32::MAX)),
        table,
    }
}

pub(super) fn rule_message(rule: &KernelRule, protocol: u8) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family_of(rule.ipv4);
    message.header.action = RuleAction::ToTable;
    match u8::try_from(rule.table) {
        Ok(table) => message.header.table = table,
        Err(_) => message.attributes.push(RuleAttribute::Table(rule.table)),
    }
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Protocol(protocol.into()));
    if let Some(mark) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(u32::MAX));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether peers may be told of this address.
    fn usable(address: &str, scope: AddressScope, flags: AddressFlags) -> bool {
        let net: IpNet = address.parse().unwrap();
        let mut message = AddressMessage::default();
        message.header.prefix_len = net.prefix_len();
        message.header.scope = scope;
        // As the kernel sends it: eight bits in the header, all of them in the attribute.
        message.attributes = vec![AddressAttribute::Address(net.addr()), AddressAttribute::Flags(flags)];
        let parsed = link_address(&message).unwrap();
        assert_eq!(parsed.address, net);
        parsed.usable
    }

    #[test]
    fn addresses_that_will_not_last_are_not_published() {
        let (global, permanent) = ("2001:db8::5/64", AddressFlags::Permanent);
        assert!(usable(global, AddressScope::Universe, permanent));
        let will_not_last = [
            AddressFlags::Deprecated,
            AddressFlags::Tentative,
            AddressFlags::Dadfailed,
            // Temporary, of RFC 8981: the same bit as `Secondary`.
            AddressFlags::Secondary,
        ];
        for flag in will_not_last {
            assert!(!usable(global, AddressScope::Universe, permanent | flag), "{flag:?}");
        }
        assert!(!usable("fe80::5/64", AddressScope::Universe, permanent));
        assert!(!usable(global, AddressScope::Host, permanent));
        // In IPv4, a second address of a prefix lasts as the first does.
        assert!(usable("192.0.2.5/24", AddressScope::Universe, permanent | AddressFlags::Secondary));
        assert!(!usable("192.0.2.5/24", AddressScope::Universe, AddressFlags::Deprecated));
        assert!(!usable("169.254.1.5/16", AddressScope::Universe, permanent));
    }
}
