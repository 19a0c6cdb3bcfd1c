//! Our own state in the kernel, read before a plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
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
