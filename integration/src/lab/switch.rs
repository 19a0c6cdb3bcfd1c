//! Switches.

use std::ops::Deref;

use super::{interface::Interface, namespace::Namespace};

/// The bridge's name inside its namespace.
const BRIDGE: &str = "bridge";

/// A layer 2 switch: a bridge in a namespace of its own, which is also where a scenario can filter frames
/// (`nft` family `bridge`). Dereferences to the namespace.
#[derive(Debug, Clone)]
pub struct Switch(Namespace);

impl Switch {
    pub(crate) fn new(namespace: Namespace) -> Self {
        namespace.ip(&[
            &format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
            &format!("link set {BRIDGE} up"),
        ]);
        Self(namespace)
    }

    /// A cable from `name` in `namespace` to a new port: that end and the port.
    pub(crate) fn plug(&self, namespace: &Namespace, name: String) -> (Interface, Interface) {
        let port = self.next_interface("port");
        let (end, port) = Interface::pair((namespace, name), (&self.0, port));
        self.ip(&[&format!("link set {} master {BRIDGE}", port.name())]);
        (end, port)
    }
}

impl Deref for Switch {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.0
    }
}
