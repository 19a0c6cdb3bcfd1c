//! Routes and rules of the kernel, reduced to what we set.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use nix::net::if_::if_indextoname;

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
        /// The gateway counts as a neighbour although no prefix of the interface has it.
        onlink: bool,
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

impl fmt::Display for KernelRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            NextHop::Unreachable => write!(f, "unreachable {}", self.dst)?,
            NextHop::Device { gateway, index, onlink } => {
                write!(f, "{}", self.dst)?;
                if let Some(gateway) = gateway {
                    write!(f, " via {gateway}")?;
                }
                match if_indextoname(*index) {
                    Ok(name) => write!(f, " dev {}", name.to_string_lossy())?,
                    // The interface is gone already.
                    Err(_) => write!(f, " dev #{index}")?,
                }
                if *onlink {
                    write!(f, " onlink")?;
                }
            }
            NextHop::Other => write!(f, "{} (several next hops)", self.dst)?,
        }
        write!(f, " table {} metric {}", self.table, self.metric)?;
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(src) = self.src {
            write!(f, " src {src}")?;
        }
        Ok(())
    }
}

impl fmt::Display for KernelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv4 { "IPv4" } else { "IPv6" };
        write!(f, "{family} {}:", self.priority)?;
        if let Some(mark) = self.mark {
            write!(f, " fwmark {mark:#x}")?;
        }
        write!(f, " lookup {}", self.table)
    }
}
