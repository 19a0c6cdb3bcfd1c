//! The desired kernel state: plain data, created by the planner, only compared.

use std::net::IpAddr;

use cow_map::CowMap;
use etcd_schema::Vtep;
use ipnet::IpNet;

use crate::interface::InterfaceName;

/// The whole state that belongs to this node's mesh. Everything of ours that is not named here is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// The TUN device, made by the tunnel under the name that the settings give it.
    pub tun: Tun,
    /// This node's overlay addresses, kept on the TUN device as /32 and /128. The device is ours: any other address
    /// on it is removed, link-local ones included.
    pub overlay: Vec<IpAddr>,
    /// The routes by destination, in the main table.
    pub routes: CowMap<IpNet, PeerRoute>,
    /// Fallback routes: all prefixes of the mesh are unreachable without another route.
    pub floor: Floor,
    /// Where probes go, in the probe table, which ends in an `unreachable` default for both families.
    pub probes: Vec<ProbeRoute>,
    /// The VXLAN devices, at most one a family. Others of ours are removed.
    pub vxlan: Vec<VxlanDevice>,
    /// The desired nftables table.
    pub firewall: Firewall,
    /// The families that this node forwards. `false` leaves the host's setting as it is.
    pub forwarding: Forwarding,
    /// Interfaces of outer packets and direct routes: reverse path filtering is loosened there, and routes learned by
    /// router advertisement survive forwarding.
    pub underlay: Vec<InterfaceName>,
    /// The one of them that carries IPv4. Whether it forwards is the operator's setting: it is named where it does not.
    pub underlay4: Option<InterfaceName>,
    /// The host's ends of pods' interfaces, which forward IPv4 like the TUN device, whatever the default for new
    /// interfaces is.
    pub pods: Vec<InterfaceName>,
    /// Puts one tagged rule at the top of every chain that would drop forwarded mesh packets.
    pub forward_accept: bool,
}

impl Desired {
    /// Puts a route in the place of the one to its destination.
    pub fn put_route(&mut self, route: PeerRoute) {
        self.routes.insert(route.dst.trunc(), route);
    }
}

/// The prefixes with an `unreachable` fallback route, behind any other route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Floor {
    /// The mesh's networks.
    pub networks: Vec<IpNet>,
    /// Prefixes of external peers. Their fallback routes have a metric of their own: pods of this node have addresses
    /// in the networks only, which decides whether containers are attached.
    pub outside: Vec<IpNet>,
}

impl Floor {
    /// All of them, networks first.
    pub fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.networks.iter().chain(&self.outside)
    }
}

/// The TUN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tun {
    /// In bytes, inner packets.
    pub mtu: u32,
    /// In packets. The kernel's 500 is too short for a tunnel that reads in batches: keep it at 1000 or more.
    pub txqueuelen: u32,
    /// Administratively up.
    pub up: bool,
}

/// A VXLAN device. It needs no address: packets of this node itself have its overlay address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Its name.
    pub name: InterfaceName,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port, here and at the peers.
    pub port: u16,
    /// The interface of outer packets.
    pub underlay: InterfaceName,
    /// This end: the source of outer packets, and the device's hardware address.
    pub local: Vtep,
    /// In bytes, inner packets.
    pub mtu: u32,
    /// The kernel learns where hardware addresses are from what arrives.
    pub learning: bool,
    /// Group policy extension.
    pub gbp: bool,
    /// The peers' ends.
    pub peers: Vec<VxlanPeer>,
}

/// A peer's end of a VXLAN tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanPeer {
    /// The next hop of routes to its prefixes: a neighbour of the device, known nowhere else.
    pub next_hop: IpAddr,
    /// Its end: the only source of outer packets with inner sources of these prefixes.
    pub vtep: Vtep,
    /// Its prefixes of the device's family.
    pub prefixes: Vec<IpNet>,
}

/// A route to a peer's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRoute {
    /// The destination.
    pub dst: IpNet,
    /// How packets leave.
    pub via: RouteVia,
    /// Lowers the path MTU of this destination, in bytes.
    pub mtu: Option<u16>,
    /// The source address that this node's own packets take.
    pub src: Option<IpAddr>,
}

/// How packets to a peer leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteVia {
    /// By the TUN device.
    Tunnel,
    /// In the clear to a neighbour on a subnet that both share.
    Neighbour {
        /// The neighbour's address, of the same family as the destination.
        via: IpAddr,
        /// The interface that the neighbour is on.
        dev: InterfaceName,
    },
    /// By a VXLAN device to a peer's end.
    Vtep {
        /// The next hop that stands for the end, a neighbour of the device.
        via: IpAddr,
        /// The device.
        dev: InterfaceName,
    },
    /// Nowhere: senders get ICMP unreachable.
    Unreachable,
}

/// A route of the probe table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeRoute {
    /// The peer's overlay address.
    pub overlay: IpAddr,
    /// The interface address that its record states.
    pub via: IpAddr,
    /// The interface that this address is on.
    pub dev: InterfaceName,
}

/// The desired nftables table. Prefixes may nest and repeat: the wider one counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Firewall {
    /// The mesh networks and the prefixes of external peers.
    pub networks: Vec<IpNet>,
    /// This node's own subnets and overlay addresses.
    pub own: Vec<IpNet>,
    /// Destinations that may leave in the clear, by which interface and to which next hop.
    pub direct: Vec<PrefixVia>,
    /// Sources that may come in the clear, and by which interface: every eligible peer's prefixes.
    pub accepted: Vec<PrefixOn>,
    /// Masquerades packets from this node's own subnets out of the mesh.
    pub ip_masq: bool,
    /// The UDP port that this node's probes leave from: the listen port + 1. `None` where no probes are sent.
    pub probe_port: Option<u16>,
}

/// A prefix behind an interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixOn {
    /// The prefix.
    pub prefix: IpNet,
    /// The interface.
    pub dev: InterfaceName,
}

/// A prefix behind a next hop on an interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixVia {
    /// The prefix.
    pub prefix: IpNet,
    /// The interface.
    pub dev: InterfaceName,
    /// The next hop, of the same family as the prefix.
    pub via: IpAddr,
}

/// The families that are forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Forwarding {
    /// `net.ipv4.ip_forward`.
    pub ipv4: bool,
    /// `net.ipv6.conf.all.forwarding`.
    pub ipv6: bool,
}

/// The reading of other programs' rules in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SeenOthers {
    /// They have not changed since they were read.
    #[default]
    Unchanged,
    /// They were read, or failed to be.
    Read,
    /// Not read although they may have changed: the last reading counts.
    Kept,
}

/// Whether a pass may read other programs' nftables rules, if they have changed. Listing them takes as long as all
/// rulesets of the machine are large, and they may change all the time: the caller sets the pace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OthersRules {
    /// They are read.
    Read,
    /// Keep the last reading.
    Keep,
}
