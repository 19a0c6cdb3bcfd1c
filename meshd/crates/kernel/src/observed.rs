//! Our own state in the kernel, read before a plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use netfilter::ListedRuleset;

use super::{foreign::ForeignChain, nft::ObservedTable, sysctl::Sysctls};

/// The state that one pass compares with [`Desired`](mesh::kernel_state::Desired).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedKernel {
    /// The TUN device, if there is one.
    pub tun: Option<ObservedTun>,
    /// Its addresses.
    pub addresses: BTreeSet<IpNet>,
    /// All interfaces: name to index. Names that we would never print into a rule are left out.
    pub links: BTreeMap<String, u32>,
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

/// A route, reduced to the attributes that we set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelRoute {
    /// The destination.
    pub dst: IpNet,
    /// The table's number.
    pub table: u32,
    /// Its metric, which with destination and table makes its identity.
    pub metric: u32,
    /// Where it leads.
    pub target: NextHop,
    /// Its MTU, if it has one.
    pub mtu: Option<u32>,
    /// Its preferred source.
    pub src: Option<IpAddr>,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NextHop {
    /// To an interface, by a gateway or none.
    Device {
        /// The next hop.
        gateway: Option<IpAddr>,
        /// The interface's index.
        index: u32,
    },
    /// Nowhere.
    Unreachable,
    /// Something that we never make, several next hops for example.
    Other,
}

/// A rule that sends marked packets to a table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelRule {
    /// `true` for IPv4.
    pub ipv4: bool,
    /// Its place: lower is asked earlier, main is at 32766.
    pub priority: u32,
    /// The mark, compared in full; `None` for a rule with our protocol number that we would not make.
    pub mark: Option<u32>,
    /// The table's number.
    pub table: u32,
}

impl KernelRoute {
    /// The key of a route in the kernel.
    pub fn key(&self) -> (IpNet, u32, u32) {
        (self.dst, self.table, self.metric)
    }
}
