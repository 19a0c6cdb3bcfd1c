//! Our own state in the kernel, read before a plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use mesh::path::MacAddress;
use netfilter::ListedRuleset;

use super::{
    foreign::ForeignChain,
    netlink::ObservedTun,
    nft::ObservedTable,
    route::{KernelRoute, KernelRule},
    sysctl::Sysctls,
};

/// The state that one pass compares with [`Desired`](mesh::kernel_state::Desired).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedKernel {
    /// The TUN device, if there is one.
    pub tun: Option<ObservedTun>,
    /// Its addresses.
    pub addresses: BTreeSet<IpNet>,
    /// All interfaces: name to index. Names that we would never print into a rule are left out.
    pub links: BTreeMap<String, u32>,
    /// VXLAN devices of ours, and those of a name that one is to have.
    pub vxlan: BTreeMap<String, ObservedVxlan>,
    /// Routes with our protocol number, in any table.
    pub routes: Vec<KernelRoute>,
    /// Rules with our protocol number.
    pub rules: Vec<KernelRule>,
    /// Our nftables table.
    pub table: Option<ObservedTable>,
    /// Other tables' chains at the forward hook that would drop mesh packets, or that hold a tagged rule of ours.
    pub foreign: Vec<ForeignChain>,
    /// Other tables' rules that the mesh's own packets meet.
    pub met: Arc<ListedRuleset>,
    /// Kernel settings that matter here.
    pub sysctls: Sysctls,
}
/// A VXLAN device as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedVxlan {
    /// Its interface index.
    pub index: u32,
    /// In bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// It has this program's mark.
    pub is_ours: bool,
    /// Its hardware address.
    pub mac: Option<MacAddress>,
    /// Its permanent neighbours.
    pub neighbours: BTreeSet<(IpAddr, MacAddress)>,
    /// Its forwarding entries: where frames to a hardware address go.
    pub forwarding: BTreeSet<(MacAddress, IpAddr)>,
}
