//! Failures of one pass, worded so that an operator can act on them.

use std::{fmt, io, net::IpAddr};

use mesh::interface::InterfaceName;

/// A change that stays undone until its cause is gone; the rest of the pass is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The object, with its values: a route, an address, a setting.
    pub what: String,
    /// Why.
    pub problem: FailureCause,
}

/// Why something stays undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureCause {
    /// The TUN device is not there.
    NoTun,
    /// No interface has that name.
    NoDevice {
        /// The name.
        dev: InterfaceName,
    },
    /// The device of that name is no VXLAN device.
    NotVxlan,
    /// A VXLAN device of that name has other options, and this program has not made it.
    OtherVxlan,
    /// Another device has the same network identifier and port.
    VniTaken {
        /// VXLAN network identifier.
        vni: u32,
        /// UDP port.
        port: u16,
    },
    /// The next hop is of the other address family.
    OtherFamily {
        /// The next hop.
        via: IpAddr,
    },
    /// The same destination was asked for before.
    Twice,
    /// A route with this destination, table and metric belongs to someone else.
    Foreign,
    /// The kernel refused.
    Kernel {
        /// The error number.
        errno: i32,
    },
    /// The netlink connection failed.
    Netlink {
        /// Its error message.
        message: String,
    },
    /// nftables refused.
    Firewall {
        /// Its error message.
        message: String,
        /// The remedy.
        remedy: &'static str,
    },
    /// Held back: it would let packets pass while the firewall is not in place.
    NoFirewall,
    /// A kernel setting cannot be read or written.
    Setting {
        /// The file system's error.
        message: String,
    },
    /// The earlier values of kernel settings cannot be read or kept, so those settings are not touched.
    Saved {
        /// Of the file that holds them.
        message: String,
    },
    /// A foreign table or chain has a name that cannot be written safely.
    ForeignName,
}

impl Failure {
    pub(crate) fn new(what: String, problem: FailureCause) -> Self {
        Self { what, problem }
    }

    /// Whether a route, or its prerequisite, may be missing or outdated.
    #[must_use]
    pub fn may_concern_routes(&self) -> bool {
        !matches!(
            self.problem,
            FailureCause::Firewall { .. }
                | FailureCause::Setting { .. }
                | FailureCause::Saved { .. }
                | FailureCause::ForeignName
        )
    }

    /// The remedy.
    pub fn remedy(&self) -> &'static str {
        match &self.problem {
            FailureCause::NoTun => "none needed while the daemon creates the device; else see its log",
            FailureCause::NoDevice { .. } => "check --iface and the interface's name",
            FailureCause::NotVxlan => "rename or delete that device",
            FailureCause::OtherVxlan => "stop the program that made the device, then delete it: ip link del NAME",
            FailureCause::VniTaken { .. } => {
                "delete the other device (ip -d link show type vxlan), or put a config with another Backend.VNI or Port"
            }
            FailureCause::OtherFamily { .. } | FailureCause::Twice => "report this as a bug",
            FailureCause::Foreign => "remove the other route, or give it another metric",
            FailureCause::Kernel { errno } => kernel_remedy(*errno),
            FailureCause::Netlink { .. } => "none needed: the next reconcile opens a new connection",
            FailureCause::Firewall { remedy, .. } => remedy,
            FailureCause::NoFirewall => "fix the nftables failure reported with this one",
            FailureCause::Setting { .. } => "run with CAP_NET_ADMIN and a writable /proc/sys, or set it by hand",
            FailureCause::Saved { .. } => {
                "make the state directory writable; move a damaged file away: the settings are applied then, but \
                 cleanup cannot restore their earlier values"
            }
            FailureCause::ForeignName => "add an accept rule for the mesh networks there by hand",
        }
    }
}

fn kernel_remedy(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => "run with CAP_NET_ADMIN; for IPv6, check net.ipv6.conf.*.disable_ipv6",
        libc::ENETUNREACH | libc::EHOSTUNREACH => "the next hop is not on-link on that interface: check its addresses",
        libc::ENETDOWN => "bring the interface up",
        libc::EINVAL => "the source address is not on this node, or the kernel lacks the feature",
        libc::EAFNOSUPPORT | libc::EOPNOTSUPP => "the kernel lacks this address family or feature",
        libc::ENOBUFS | libc::ENOMEM => "the host is short of memory",
        _ => "see the kernel's message",
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.what, self.problem, self.remedy())
    }
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTun => f.write_str("the TUN device does not exist, so the tunnel carries no packets"),
            Self::NoDevice { dev } => write!(f, "interface {dev} does not exist"),
            Self::NotVxlan => f.write_str("a device of that name exists and is no VXLAN device"),
            Self::OtherVxlan => {
                f.write_str("a VXLAN device of that name exists with other options, and it is not meshd's")
            }
            Self::VniTaken { vni, port } => write!(f, "another VXLAN device has VNI {vni} and UDP port {port}"),
            Self::OtherFamily { via } => write!(f, "next hop {via} is of the wrong address family"),
            Self::Twice => f.write_str("requested twice"),
            Self::Foreign => f.write_str("a foreign route with the same metric is in its place"),
            Self::Kernel { errno } => {
                write!(f, "{}", io::Error::from_raw_os_error(*errno))
            }
            Self::Netlink { message } => write!(f, "netlink: {message}"),
            Self::Firewall { message, .. } => f.write_str(message),
            Self::NoFirewall => f.write_str("postponed until the firewall is in place"),
            Self::Setting { message } | Self::Saved { message } => f.write_str(message),
            Self::ForeignName => f.write_str("its name cannot be quoted safely"),
        }
    }
}
