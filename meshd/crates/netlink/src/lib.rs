//! A blocking rtnetlink socket: single requests and their responses, enough for a short-lived program.

mod message;

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        BridgeBooleanOptionFlags, BridgeBooleanOptions, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
        InfoPortKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

/// A hardware address.
pub type Mac = [u8; 6];

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct NetlinkError {
    /// The failed request.
    pub what: String,
    /// The kernel's error.
    pub source: io::Error,
}

impl NetlinkError {
    /// Whether the kernel returned this error.
    #[must_use]
    pub fn is(&self, errno: Errno) -> bool {
        self.source.raw_os_error() == Some(errno as i32)
    }
}

/// An rtnetlink socket in the network namespace that it was opened in.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, when that has six bytes.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it is one end of a veth pair.
    pub is_veth: bool,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Whether it is a bridge that learns hardware addresses from frames to link-local groups (01:80:c2:00:00:0x).
    pub learns_from_link_local: bool,
    /// Index of its other end, in the namespace where that is.
    pub peer: Option<u32>,
    /// Index of the bridge that it is a port of.
    pub master: Option<u32>,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnicastRoute {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Index of the interface.
    pub index: u32,
    /// Largest packet that it lets through; `None`: that of the interface.
    pub mtu: Option<u32>,
}

/// An end of a veth pair to create.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its hardware address.
    pub mac: Mac,
}

impl Netlink {
    /// A socket in the namespace of this thread.
    ///
    /// # Errors
    /// When the system gives none.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |source| NetlinkError { what: "netlink socket".to_owned(), source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The interface of this name, if there is one.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut wanted = LinkMessage::default();
        wanted.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.one_link(format!("interface {name}"), wanted)
    }

    /// The interface of this index, if there is one.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn link_at(&mut self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let mut wanted = LinkMessage::default();
        wanted.header.index = index;
        self.one_link(format!("interface {index}"), wanted)
    }

    /// All interfaces.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let answers = self.dump("interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers.iter().filter_map(message::link).collect())
    }

    /// Makes a veth pair, one end here, the other one in the namespace `there`. Both are down.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn create_veth(
        &mut self,
        here: VethEnd<'_>,
        other: VethEnd<'_>,
        there: BorrowedFd<'_>,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let end = |end: VethEnd<'_>| {
            vec![
                LinkAttribute::IfName(end.name.to_owned()),
                LinkAttribute::Address(end.mac.to_vec()),
                LinkAttribute::Mtu(mtu),
            ]
        };
        let mut peer = LinkMessage::default();
        peer.attributes = end(other);
        peer.attributes.push(LinkAttribute::NetNsFd(there.as_raw_fd()));
        let mut link = LinkMessage::default();
        link.attributes = end(here);
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.change(
            format!("veth {} and {}", here.name, other.name),
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Makes a bridge, down.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn create_bridge(&mut self, name: &str, mac: Mac, mtu: u32) -> Result<(), NetlinkError> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            // One of its own, so that it does not change as ports come and go.
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(format!("bridge {name}"), RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Turns off the learning of hardware addresses from frames to link-local groups (01:80:c2:00:00:0x) on a bridge.
    /// The bridge learns from these before its rules can drop them, so that a port could claim another port's address.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn stop_link_local_learning(&mut self, bridge: u32) -> Result<(), NetlinkError> {
        let off = BridgeBooleanOptionFlags::NoLinkLocalLearn;
        let mut link = LinkMessage::default();
        link.header.index = bridge;
        link.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MultiBoolOpt(BridgeBooleanOptions {
                value: off,
                mask: off,
            })])),
        ])];
        self.change(format!("disabling link-local learning on bridge {bridge}"), RouteNetlinkMessage::NewLink(link), 0)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.change(format!("interface {index} up"), RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Makes an interface a port of a bridge, which may send a packet back to where it came from.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_port(&mut self, index: u32, bridge: u32) -> Result<(), NetlinkError> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![LinkAttribute::Controller(bridge)];
        self.change(
            format!("adding interface {index} to bridge {bridge}"),
            RouteNetlinkMessage::NewLink(link.clone()),
            0,
        )?;
        link.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ])];
        self.change(format!("bridge port {index}"), RouteNetlinkMessage::NewLink(link), 0)
    }

    /// Deletes the interface of this name; returns whether there was one.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn delete(&mut self, name: &str) -> Result<bool, NetlinkError> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.change(format!("deleting {name}"), RouteNetlinkMessage::DelLink(link), 0) {
            Err(error) if error.is(Errno::ENODEV) => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// Gives an interface an address, usable at once; one that it has is no error.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn add_address(&mut self, index: u32, address: IpNet) -> Result<(), NetlinkError> {
        let what = format!("address {address}");
        let request = RouteNetlinkMessage::NewAddress(message::new_address(index, address));
        self.change(what, request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The addresses of an interface.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn addresses(&mut self, index: u32) -> Result<Vec<IpNet>, NetlinkError> {
        let request = RouteNetlinkMessage::GetAddress(Default::default());
        Ok(self.dump("addresses", request)?.iter().filter_map(|answer| message::address(answer, Some(index))).collect())
    }

    /// The addresses of all interfaces.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn all_addresses(&mut self) -> Result<Vec<IpAddr>, NetlinkError> {
        let request = RouteNetlinkMessage::GetAddress(Default::default());
        let answers = self.dump("addresses", request)?;
        Ok(answers.iter().filter_map(|answer| message::address(answer, None)).map(|net| net.addr()).collect())
    }

    /// Says where a neighbour is, for good.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn add_neighbour(&mut self, index: u32, neighbour: IpAddr, mac: Mac) -> Result<(), NetlinkError> {
        let request = RouteNetlinkMessage::NewNeighbour(message::neighbour(index, neighbour, mac));
        self.change(format!("neighbour {neighbour}"), request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Adds a route; one to the same destination is an error.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn add_route(&mut self, route: &UnicastRoute) -> Result<(), NetlinkError> {
        let request = RouteNetlinkMessage::NewRoute(message::route(route));
        self.change(format!("route to {}", route.dst), request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Unicast routes of the main table by an interface, both families.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn routes(&mut self, index: u32) -> Result<Vec<UnicastRoute>, NetlinkError> {
        Ok(self.raw_routes()?.iter().filter_map(message::unicast_route).filter(|route| route.index == index).collect())
    }

    /// Sets the MTU of those routes that `wanted` picks, and leaves all else of them as it is. Returns how many
    /// differed.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_route_mtu(
        &mut self,
        index: u32,
        mtu: u32,
        mut wanted: impl FnMut(&UnicastRoute) -> bool,
    ) -> Result<usize, NetlinkError> {
        let mut changed = 0;
        for answer in self.raw_routes()? {
            let Some(route) = message::unicast_route(&answer) else { continue };
            if route.index != index || route.mtu.is_some_and(|now| now <= mtu) || !wanted(&route) {
                continue;
            }
            let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(whole)) = answer else { continue };
            let request = RouteNetlinkMessage::NewRoute(message::with_mtu(whole, mtu));
            self.change(format!("MTU of the route to {}", route.dst), request, NLM_F_CREATE | NLM_F_REPLACE)?;
            changed += 1;
        }
        Ok(changed)
    }

    fn raw_routes(&mut self) -> Result<Vec<NetlinkPayload<RouteNetlinkMessage>>, NetlinkError> {
        self.dump("routes", RouteNetlinkMessage::GetRoute(Default::default()))
    }

    fn one_link(&mut self, what: String, wanted: LinkMessage) -> Result<Option<Link>, NetlinkError> {
        match self.request(what, RouteNetlinkMessage::GetLink(wanted), NLM_F_ACK) {
            Err(error) if error.is(Errno::ENODEV) => Ok(None),
            answers => Ok(answers?.iter().find_map(message::link)),
        }
    }

    fn change(&mut self, what: String, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.request(what, message, flags | NLM_F_ACK).map(drop)
    }

    fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<NetlinkPayload<RouteNetlinkMessage>>, NetlinkError> {
        self.request(what.to_owned(), message, NLM_F_DUMP)
    }

    /// Sends a request and reads all responses. Undecodable ones are skipped: no caller requests their kind.
    fn request(
        &mut self,
        what: String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<NetlinkPayload<RouteNetlinkMessage>>, NetlinkError> {
        self.exchange(message, flags).map_err(|source| NetlinkError { what, source })
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<NetlinkPayload<RouteNetlinkMessage>>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while let Some(length) = message::length(rest) {
                let (this, next) = rest.split_at(length.min(rest.len()));
                let aligned = length.div_ceil(4) * 4 - length;
                rest = next.get(aligned..).unwrap_or_default();
                match NetlinkMessage::<RouteNetlinkMessage>::deserialize(this) {
                    Ok(answer) if answer.header.sequence_number != self.sequence => {}
                    Ok(answer) => match answer.payload {
                        NetlinkPayload::Done(_) => return Ok(answers),
                        NetlinkPayload::Error(error) => {
                            return if error.code.is_none() { Ok(answers) } else { Err(error.to_io()) };
                        }
                        payload => answers.push(payload),
                    },
                    Err(_) => {}
                }
            }
        }
    }
}
