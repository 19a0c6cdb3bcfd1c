//! One end of a link.

use std::{fmt, time::Duration};

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use super::namespace::Namespace;
use crate::await_until;

/// The kernel notices a new carrier in the background, within a second.
const CARRIER: Duration = Duration::from_secs(60);

/// An interface inside a namespace: one end of a veth pair.
#[derive(Clone)]
pub struct Interface {
    end: End,
    /// The other end of the cable.
    peer: End,
}

#[derive(Clone)]
struct End {
    namespace: Namespace,
    name: String,
}

impl Interface {
    /// A veth pair between two namespaces, both ends up, without addresses.
    pub(crate) fn pair(a: (&Namespace, String), b: (&Namespace, String)) -> (Self, Self) {
        // Indices that differ: the kernel takes a link for a local one where both ends have the same, and then lets
        // a new carrier wait for up to a second.
        let index = a.0.lab().next_link_index();
        a.0.ip(&[&format!(
            "link add name {} index {index} netns {} type veth peer name {} index {} netns {}",
            a.1,
            a.0.netns(),
            b.1,
            index + 1,
            b.0.netns()
        )]);
        let (a, b) = (End::new(a), End::new(b));
        let (a, b) = (Self { end: a.clone(), peer: b.clone() }, Self { end: b, peer: a });
        b.end.ip_set("up");
        a.up();
        (a, b)
    }

    /// Its name inside its namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.end.name
    }

    /// Brings it up and, unless the other end is down, waits until the cable can be used.
    pub fn up(&self) {
        self.end.ip_set("up");
        await_until(&format!("carrier on {self:?}"), CARRIER, || {
            (!self.peer.enabled() || (self.end.running() && self.peer.running())).then_some(())
        });
    }

    /// Takes it down: the cable is pulled. The kernel drops its routes and its IPv6 addresses.
    pub fn down(&self) {
        self.end.ip_set("down");
    }

    /// Sets the MTU of this end.
    pub fn set_mtu(&self, mtu: u16) {
        self.end.ip_set(&format!("mtu {mtu}"));
    }

    /// Adds an address with its prefix length, usable at once.
    pub fn add_address(&self, address: &str) {
        // Without this an IPv6 address is tentative until the kernel's background work has got round to it, although
        // there is no duplicate address detection to wait for.
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.end.namespace.ip(&[&format!("addr add {address} dev {} {nodad}", self.end.name)]);
    }

    /// Takes an address away.
    pub fn remove_address(&self, address: &str) {
        self.end.namespace.ip(&[&format!("addr del {address} dev {}", self.end.name)]);
    }

    /// Turns segmentation and checksum offloads of this end off: what leaves it are packets as they are on a wire.
    pub fn disable_offloads(&self) {
        self.end.namespace.run_args(&["ethtool", "-K", &self.end.name, "tx", "off"]);
    }

    /// Turns them on again.
    pub fn enable_offloads(&self) {
        self.end.namespace.run_args(&["ethtool", "-K", &self.end.name, "tx", "on", "tso", "on", "gso", "on"]);
    }
}

impl fmt::Debug for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.end.namespace.name(), self.end.name)
    }
}

impl End {
    fn new((namespace, name): (&Namespace, String)) -> Self {
        Self { namespace: namespace.clone(), name }
    }

    fn ip_set(&self, what: &str) {
        self.namespace.ip(&[&format!("link set {} {what}", self.name)]);
    }

    fn running(&self) -> bool {
        self.flags().contains(InterfaceFlags::IFF_RUNNING)
    }

    fn enabled(&self) -> bool {
        self.flags().contains(InterfaceFlags::IFF_UP)
    }

    fn flags(&self) -> InterfaceFlags {
        let interfaces = self.namespace.enter(|| getifaddrs().map(|all| all.collect::<Vec<_>>()));
        interfaces
            .unwrap_or_else(|error| panic!("{}: cannot list interfaces: {error}", self.namespace.name()))
            .into_iter()
            .find(|interface| interface.interface_name == self.name)
            .map_or(InterfaceFlags::empty(), |interface| interface.flags)
    }
}
