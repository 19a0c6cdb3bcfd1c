//! One rtnetlink connection: complete dumps, and single changes.
//!
//! A connection lives for one pass. A message that the decoder cannot read ends it for good, and the next pass opens a
//! new one.

mod message;
mod vxlan;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::StreamExt as _;
use ipnet::IpNet;
use mesh::{interface::InterfaceName, path::MacAddress};
use message::{family_of, kernel_route, kernel_rule, link, link_address, main_routes, route_message, rule_message};
use rtnetlink::{
    Handle, LinkUnspec,
    packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{LinkAttribute, LinkExtentMask, LinkMessage},
        neighbour::{NeighbourAttribute, NeighbourMessage},
        route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAttribute, RuleMessage},
    },
    sys::AsyncSocket as _,
};
use thiserror::Error;

use super::{
    failure::FailureCause,
    route::{KernelRoute, KernelRule},
};

/// Why rtnetlink gave no answer.
#[derive(Debug, Error)]
pub enum RtnetlinkError {
    /// The socket cannot be opened.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] std::io::Error),
    /// The kernel refused.
    #[error("{what}: {source}")]
    Kernel {
        /// The failed request.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The connection ended, usually on a message that its decoder cannot read.
    #[error("{what}: the netlink connection ended")]
    Ended {
        /// The failed request.
        what: &'static str,
    },
    /// The tables changed under each of several dumps.
    #[error("{what}: the state kept changing while it was read")]
    Unsteady {
        /// The failed request.
        what: &'static str,
    },
}

/// How often a dump is repeated because something changed under it.
const DUMP_ATTEMPTS: usize = 8;

/// A connection with strict checking, so that the kernel filters dumps.
#[derive(Debug, Clone)]
pub struct Rtnetlink {
    handle: Handle,
    ended: Arc<AtomicBool>,
}

/// The ports of the sockets that this process lately made changes by. The kernel's notifications name the port of who
/// caused them.
#[derive(Debug, Clone, Default)]
pub struct OwnPorts(Arc<Mutex<VecDeque<u32>>>);

impl OwnPorts {
    /// Far more than passes whose notifications are still under way.
    const MOST: usize = 64;

    fn add(&self, port: u32) {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ports.len() == Self::MOST {
            ports.pop_front();
        }
        ports.push_back(port);
    }

    /// Whether one of our sockets has this port: the change is our own.
    pub fn contains(&self, port: u32) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&port)
    }

    #[cfg(test)]
    /// The ports of one socket.
    pub fn of(port: u32) -> Self {
        let ports = Self::default();
        ports.add(port);
        ports
    }
}

/// What a VXLAN device cannot change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VxlanShape {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Index of the interface of outer packets.
    pub underlay: u32,
    /// Source of outer packets.
    pub local: Option<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// The kernel learns where hardware addresses are.
    pub learning: bool,
    /// Group policy extension.
    pub gbp: bool,
    /// Something that we never set.
    pub other: bool,
}

/// A link, reduced to the attributes in use.
#[derive(Debug, Clone)]
pub struct KernelLink {
    /// Of the interface.
    pub index: u32,
    /// As the kernel has it.
    pub name: String,
    /// In bytes.
    pub mtu: u32,
    /// In packets.
    pub txqueuelen: u32,
    /// Administratively up.
    pub up: bool,
    /// A TUN device.
    pub is_tun: bool,
    /// A VXLAN device, and what it cannot change.
    pub vxlan: Option<VxlanShape>,
    /// What its maker wrote on it.
    pub alias: Option<String>,
    /// Its hardware address.
    pub mac: Option<MacAddress>,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
}

/// The TUN device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedTun {
    /// Its interface index.
    pub index: u32,
    /// In bytes.
    pub mtu: u32,
    /// In packets.
    pub txqueuelen: u32,
    /// Administratively up.
    pub up: bool,
}

/// An address on a link.
#[derive(Debug, Clone)]
pub struct LinkAddress {
    /// Of the interface.
    pub index: u32,
    /// With its prefix length.
    pub address: IpNet,
    /// Fit to be an endpoint: of global scope, neither deprecated, tentative, duplicate nor temporary.
    pub usable: bool,
    /// When it was added, in hundredths of a second since the boot.
    pub created: u32,
}

/// A unicast route of the main table, to one of its next hops.
#[derive(Debug, Clone)]
pub struct MainRoute {
    /// The destination.
    pub dst: IpNet,
    /// Of the interface.
    pub index: u32,
    /// The next hop, if there is one.
    pub gateway: Option<IpAddr>,
    /// Lower is preferred.
    pub metric: u32,
    /// Its protocol number, as in `ip route`.
    pub protocol: u8,
    /// A default route that came by router advertisement.
    pub advertised: bool,
}

impl Rtnetlink {
    /// Opens a connection in the network namespace of the calling thread, inside a tokio runtime.
    pub fn open() -> Result<Self, RtnetlinkError> {
        Self::open_known(&OwnPorts::default())
    }

    /// The same, for changes that are no news to who knows its port by `ports`.
    pub(crate) fn open_known(ports: &OwnPorts) -> Result<Self, RtnetlinkError> {
        let (mut connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().map_err(RtnetlinkError::Open)?;
        let bound = connection.socket_mut().socket_mut().bind_auto().map_err(RtnetlinkError::Open)?;
        ports.add(bound.port_number());
        let ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ended);
        tokio::spawn(async move {
            let mut connection = Box::pin(connection);
            (&mut connection).await;
            // Set before the answers' channels close with the connection: a dump that is cut short shows as such.
            flag.store(true, Ordering::SeqCst);
        });
        Ok(Self { handle, ended })
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// All interfaces.
    pub async fn links(&self) -> Result<Vec<KernelLink>, RtnetlinkError> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let messages = self
            .dump("links", RouteNetlinkMessage::GetLink(request), |m| match m {
                RouteNetlinkMessage::NewLink(m) => Some(m),
                _ => None,
            })
            .await?;
        Ok(messages.iter().map(link).collect())
    }

    /// Addresses of one link, or of all.
    pub async fn addresses(&self, index: Option<u32>) -> Result<Vec<LinkAddress>, RtnetlinkError> {
        let mut request = AddressMessage::default();
        request.header.index = index.unwrap_or(0);
        let messages = self
            .dump("addresses", RouteNetlinkMessage::GetAddress(request), |m| match m {
                RouteNetlinkMessage::NewAddress(m) => Some(m),
                _ => None,
            })
            .await?;
        Ok(messages.iter().filter_map(link_address).filter(|a| index.is_none_or(|index| a.index == index)).collect())
    }

    /// Routes with `protocol`, of both families, in any table.
    pub async fn routes(&self, protocol: u8) -> Result<Vec<KernelRoute>, RtnetlinkError> {
        let wanted = RouteProtocol::from(protocol);
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.protocol = wanted;
            let messages = self.dump_routes(request).await?;
            routes.extend(messages.iter().filter(|m| m.header.protocol == wanted).filter_map(kernel_route));
        }
        Ok(routes)
    }

    /// Unicast routes of the main table with any other protocol, of both families.
    pub(crate) async fn others_routes(&self, protocol: u8) -> Result<Vec<KernelRoute>, RtnetlinkError> {
        let ours = RouteProtocol::from(protocol);
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.table = 254;
            request.header.kind = RouteType::Unicast;
            let messages = self.dump_routes(request).await?;
            routes.extend(messages.iter().filter(|m| m.header.protocol != ours).filter_map(kernel_route));
        }
        Ok(routes)
    }

    /// The interface by which a packet of this machine to an address would leave, by all rules and tables; `None`:
    /// nothing leads there.
    pub async fn way_to(&self, address: IpAddr) -> Result<Option<u32>, RtnetlinkError> {
        let request = look_up(address);
        let mut answers = Box::pin(self.handle.route().get(request).execute());
        match answers.next().await {
            Some(Ok(route)) => Ok(route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })),
            // Unreachable is an answer, too.
            Some(Err(rtnetlink::Error::NetlinkError(_))) => Ok(None),
            Some(Err(_)) | None => Err(RtnetlinkError::Ended { what: "route lookup" }),
        }
    }

    /// Whether the kernel forwards a packet from `from` to `to` that arrives on the interface with index `by`, or its
    /// error number. The look-up is that of a packet, with rules, reverse path filter and, for IPv4, the interface's
    /// `forwarding`.
    pub async fn forwards(&self, from: IpAddr, by: u32, to: IpAddr) -> Result<Result<(), i32>, RtnetlinkError> {
        let mut request = look_up(to);
        request.header.source_prefix_length = request.header.destination_prefix_length;
        request.attributes.push(RouteAttribute::Source(from.into()));
        request.attributes.push(RouteAttribute::Iif(by));
        let mut answers = Box::pin(self.handle.route().get(request).execute());
        match answers.next().await {
            Some(Ok(_)) => Ok(Ok(())),
            Some(Err(rtnetlink::Error::NetlinkError(error))) => Ok(Err(error.raw_code().wrapping_neg())),
            Some(Err(_)) | None => Err(RtnetlinkError::Ended { what: "route lookup" }),
        }
    }

    /// Unicast routes of the main table with any protocol, once for each next hop.
    pub async fn main_routes(&self, ipv4: bool) -> Result<Vec<MainRoute>, RtnetlinkError> {
        let mut request = RouteMessage::default();
        request.header.address_family = family_of(ipv4);
        request.header.table = 254;
        request.header.kind = RouteType::Unicast;
        Ok(self.dump_routes(request).await?.iter().flat_map(main_routes).collect())
    }

    /// The default routes among them.
    pub async fn defaults(&self, ipv4: bool) -> Result<Vec<MainRoute>, RtnetlinkError> {
        let mut routes = self.main_routes(ipv4).await?;
        routes.retain(|route| route.dst.prefix_len() == 0);
        Ok(routes)
    }

    /// Rules with `protocol`, of both families.
    pub async fn rules(&self, protocol: u8) -> Result<Vec<KernelRule>, RtnetlinkError> {
        let wanted = RouteProtocol::from(protocol);
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RuleMessage::default();
            request.header.family = family;
            let messages = self
                .dump("rules", RouteNetlinkMessage::GetRule(request), |m| match m {
                    RouteNetlinkMessage::NewRule(m) => Some(m),
                    _ => None,
                })
                .await?;
            let ours = messages
                .iter()
                .filter(|m| m.attributes.iter().any(|a| matches!(a, RuleAttribute::Protocol(p) if *p == wanted)));
            rules.extend(ours.map(kernel_rule));
        }
        Ok(rules)
    }

    /// The neighbour entries of one link and family.
    pub async fn neighbours(&self, index: u32, ipv4: bool) -> Result<Vec<NeighbourMessage>, RtnetlinkError> {
        let mut request = NeighbourMessage::default();
        request.header.family = family_of(ipv4);
        request.attributes.push(NeighbourAttribute::IfIndex(index));
        let mut messages = self
            .dump("neighbours", RouteNetlinkMessage::GetNeighbour(request), |m| match m {
                RouteNetlinkMessage::NewNeighbour(m) => Some(m),
                _ => None,
            })
            .await?;
        messages.retain(|m| m.header.ifindex == index);
        Ok(messages)
    }

    pub(crate) async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), FailureCause> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        done(self.handle.link().set(message).execute().await, &[])
    }

    pub(crate) async fn set_txqueuelen(&self, index: u32, packets: u32) -> Result<(), FailureCause> {
        let message = LinkUnspec::new_with_index(index).txqueuelen(packets).build();
        done(self.handle.link().set(message).execute().await, &[])
    }

    pub(crate) async fn set_up(&self, index: u32, up: bool) -> Result<(), FailureCause> {
        let builder = LinkUnspec::new_with_index(index);
        let message = if up { builder.up() } else { builder.down() }.build();
        done(self.handle.link().set(message).execute().await, &[])
    }

    pub(crate) async fn delete_link(&self, index: u32) -> Result<(), FailureCause> {
        done(self.handle.link().del(index).execute().await, &[libc::ENODEV])
    }

    pub(crate) async fn add_address(&self, index: u32, address: IpNet) -> Result<(), FailureCause> {
        let mut request = self.handle.address().add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Nobody answers duplicate address detection on a TUN device; and the /128 needs no route of its own.
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        }
        done(request.execute().await, &[libc::EEXIST])
    }

    pub(crate) async fn remove_address(&self, index: u32, address: IpNet) -> Result<(), FailureCause> {
        let mut message = AddressMessage::default();
        message.header.family = family_of(address.addr().is_ipv4());
        message.header.prefix_len = address.prefix_len();
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address.addr()));
        done(self.handle.address().del(message).execute().await, &[libc::EADDRNOTAVAIL, libc::ENODEV])
    }

    /// Adds a route, or replaces the one with its key in a single message. Adding is exclusive: it fails where a route
    /// with that key exists, whose ever it is.
    pub async fn set_route(&self, route: &KernelRoute, protocol: u8, replace: bool) -> Result<(), FailureCause> {
        let request = self.handle.route().add(route_message(route, protocol));
        let request = if replace { request.replace() } else { request };
        done(request.execute().await, &[]).map_err(|problem| match problem {
            FailureCause::Kernel { errno: libc::EEXIST } => FailureCause::Foreign,
            other => other,
        })
    }

    pub(crate) async fn remove_route(&self, route: &KernelRoute, protocol: u8) -> Result<(), FailureCause> {
        let mut message = route_message(route, protocol);
        // The key attributes are enough: the rest is only compared.
        message.header.scope = RouteScope::NoWhere;
        message.attributes.retain(|a| !matches!(a, RouteAttribute::Metrics(_) | RouteAttribute::PrefSource(_)));
        done(self.handle.route().del(message).execute().await, &[libc::ESRCH, libc::ENOENT, libc::ENODEV])
    }

    pub(crate) async fn add_rule(&self, rule: &KernelRule, protocol: u8) -> Result<(), FailureCause> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule_message(rule, protocol);
        done(request.execute().await, &[libc::EEXIST])
    }

    pub(crate) async fn remove_rule(&self, rule: &KernelRule, protocol: u8) -> Result<(), FailureCause> {
        let message = rule_message(rule, protocol);
        done(self.handle.rule().del(message).execute().await, &[libc::ENOENT, libc::ESRCH])
    }

    async fn dump_routes(&self, mut request: RouteMessage) -> Result<Vec<RouteMessage>, RtnetlinkError> {
        request.header.scope = RouteScope::Universe;
        self.dump("routes", RouteNetlinkMessage::GetRoute(request), |m| match m {
            RouteNetlinkMessage::NewRoute(m) => Some(m),
            _ => None,
        })
        .await
    }

    /// A dump that nothing changed under, whole.
    async fn dump<T>(
        &self,
        what: &'static str,
        request: RouteNetlinkMessage,
        pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, RtnetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut message = NetlinkMessage::from(request.clone());
            message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut answers = self.handle.clone().request(message).map_err(|_| RtnetlinkError::Ended { what })?;
            let mut found = Vec::new();
            let mut steady = true;
            while let Some(answer) = answers.next().await {
                let (header, payload) = answer.into_parts();
                steady &= header.flags & NLM_F_DUMP_INTR == 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => found.extend(pick(message)),
                    NetlinkPayload::Error(error) => match error.raw_code().wrapping_neg() {
                        0 => {}
                        // A table that never had a route.
                        libc::ENOENT => {}
                        errno => {
                            return Err(RtnetlinkError::Kernel {
                                what,
                                source: std::io::Error::from_raw_os_error(errno),
                            });
                        }
                    },
                    _ => {}
                }
            }
            if self.has_ended() {
                return Err(RtnetlinkError::Ended { what });
            }
            if steady {
                return Ok(found);
            }
        }
        Err(RtnetlinkError::Unsteady { what })
    }
}

/// The question where packets to an address go.
fn look_up(address: IpAddr) -> RouteMessage {
    let mut request = RouteMessage::default();
    request.header.address_family = family_of(address.is_ipv4());
    request.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
    request.attributes.push(RouteAttribute::Destination(address.into()));
    request
}

/// The TUN device among `links`. A device of that name that is no TUN is not ours.
pub(crate) fn tun_among(links: &[KernelLink], name: &InterfaceName) -> Option<ObservedTun> {
    links.iter().find(|l| l.name == name.as_str() && l.is_tun).map(|l| ObservedTun {
        index: l.index,
        mtu: l.mtu,
        txqueuelen: l.txqueuelen,
        up: l.up,
    })
}

/// Interfaces with a default route by router advertisement.
pub(crate) async fn advertised(
    netlink: &Rtnetlink,
    names: &BTreeMap<String, u32>,
) -> Result<BTreeSet<InterfaceName>, RtnetlinkError> {
    let by_index: BTreeMap<u32, &String> = names.iter().map(|(n, i)| (*i, n)).collect();
    Ok(netlink
        .defaults(false)
        .await?
        .into_iter()
        .filter(|route| route.advertised)
        .filter_map(|route| InterfaceName::new(by_index.get(&route.index)?).ok())
        .collect())
}

/// Turns the kernel's answer into ours; errors in `fine` mean that it is so already.
fn done(result: Result<(), rtnetlink::Error>, fine: &[i32]) -> Result<(), FailureCause> {
    match result {
        Ok(()) => Ok(()),
        Err(rtnetlink::Error::NetlinkError(error)) => {
            let errno = error.raw_code().wrapping_neg();
            if errno == 0 || fine.contains(&errno) { Ok(()) } else { Err(FailureCause::Kernel { errno }) }
        }
        Err(other) => Err(FailureCause::Netlink { message: other.to_string() }),
    }
}
