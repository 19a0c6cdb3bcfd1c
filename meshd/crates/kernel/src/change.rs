//! The single steps of a plan.

use std::fmt;

use ipnet::IpNet;

use super::{
    foreign::ForeignEdit,
    nft::NftTransaction,
    route::{KernelRoute, KernelRule, NextHop},
    sysctl::Setting,
    vxlan::VxlanChange,
};

/// A step. Logs and `meshctl` show its `Display`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelChange {
    /// Our table: additions that this pass's routes need.
    FirewallBefore(NftTransaction),
    /// Our table: removals, once the last pass's routes are gone.
    FirewallAfter(NftTransaction),
    /// The TUN device's MTU.
    Mtu {
        /// The device's index.
        index: u32,
        /// In bytes.
        mtu: u32,
    },
    /// The TUN device's queue.
    TxQueueLen {
        /// The device's index.
        index: u32,
        /// In packets.
        packets: u32,
    },
    /// The TUN device up or down.
    Up {
        /// The device's index.
        index: u32,
        /// Up, or down.
        up: bool,
    },
    /// An address put on the TUN device.
    AddressAdd {
        /// The device's index.
        index: u32,
        /// The address.
        address: IpNet,
    },
    /// An address taken off the TUN device.
    AddressRemove {
        /// The device's index.
        index: u32,
        /// The address.
        address: IpNet,
    },
    /// A route that is not there.
    RouteAdd(KernelRoute),
    /// A route that takes the place of the one with its key, in one step.
    RouteReplace(KernelRoute),
    /// A route of ours that is wanted no more.
    RouteRemove(KernelRoute),
    /// A rule that is not there.
    RuleAdd(KernelRule),
    /// A rule of ours that is wanted no more.
    RuleRemove(KernelRule),
    /// A step that concerns a VXLAN device.
    Vxlan(VxlanChange),
    /// A kernel setting.
    Sysctl(Setting),
    /// A tagged rule in another's chain.
    Foreign(ForeignEdit),
}

impl KernelChange {
    /// Whether it is a transaction on our own nftables table.
    pub(crate) fn is_firewall(&self) -> bool {
        matches!(self, Self::FirewallBefore(_) | Self::FirewallAfter(_))
    }

    /// The step lets packets take a path, so it waits for the firewall.
    pub(crate) fn needs_firewall(&self) -> bool {
        match self {
            Self::RouteAdd(route) | Self::RouteReplace(route) => route.target != NextHop::Unreachable,
            Self::Vxlan(change) => change.needs_firewall(),
            Self::Sysctl(setting) => setting.opens,
            Self::Foreign(edit) => edit.opens(),
            _ => false,
        }
    }
}

impl fmt::Display for KernelChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirewallBefore(t) => write!(f, "nftables: {} commands", t.len()),
            Self::FirewallAfter(t) => write!(f, "nftables: {} commands, after routes", t.len()),
            Self::Mtu { mtu, .. } => write!(f, "TUN: mtu {mtu}"),
            Self::TxQueueLen { packets, .. } => write!(f, "TUN: txqueuelen {packets}"),
            Self::Up { up, .. } => write!(f, "TUN: {}", if *up { "up" } else { "down" }),
            Self::AddressAdd { address, .. } => write!(f, "TUN: address {address} added"),
            Self::AddressRemove { address, .. } => write!(f, "TUN: address {address} removed"),
            Self::RouteAdd(route) => write!(f, "route {route} added"),
            Self::RouteReplace(route) => write!(f, "route {route} replaced"),
            Self::RouteRemove(route) => write!(f, "route {route} removed"),
            Self::RuleAdd(rule) => write!(f, "rule {rule} added"),
            Self::RuleRemove(rule) => write!(f, "rule {rule} removed"),
            Self::Vxlan(change) => change.fmt(f),
            Self::Sysctl(setting) => write!(f, "{} set to {}", setting.key, setting.value),
            Self::Foreign(edit) => edit.fmt(f),
        }
    }
}
