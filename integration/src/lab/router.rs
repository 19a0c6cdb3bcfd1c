//! Routers and NATs.

use std::{ops::Deref, time::Duration};

use super::{host::Host, interface::Interface, namespace::Namespace, switch::Switch};
use crate::relay::Relay;

/// A host that forwards. Dereferences to [`Host`].
#[derive(Debug, Clone)]
pub struct Router(Host);

impl Router {
    pub(crate) fn new(namespace: Namespace) -> Self {
        let host = Host::new(namespace);
        host.enable_forwarding();
        // Scenarios look for errors; none may be held back.
        host.sysctls(&[("net/ipv4/icmp_ratemask", "0"), ("net/ipv6/icmp/ratelimit", "0")]);
        Self(host)
    }

    /// [`connect`](Host::connect) by a line that can be made bad.
    pub fn connect_by_relay(&self, switch: &Switch, addresses: &[&str]) -> (Relay, Interface) {
        let (relay, interface) = Relay::between(switch, self, self.next_interface("eth"));
        for address in addresses {
            interface.add_address(address);
        }
        (relay, interface)
    }
}

impl Deref for Router {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

/// A router that hides IPv4 behind its own address, as a home router does, and lets in only what answers.
/// IPv6 is not rewritten, but new connections from outside are dropped too. Dereferences to [`Router`].
#[derive(Debug, Clone)]
pub struct Nat(Router);

impl Nat {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self(Router::new(namespace))
    }

    /// Says which interface leads outside and turns translation on.
    pub fn masquerade(&self, outside: &Interface) {
        let outside = outside.name();
        self.nft(&format!(
            "table inet lab_nat {{
                 chain forward {{
                     type filter hook forward priority filter; policy accept;
                     iifname {outside} ct state new drop
                 }}
             }}
             table ip lab_nat4 {{
                 chain postrouting {{
                     type nat hook postrouting priority srcnat; policy accept;
                     oifname {outside} masquerade
                 }}
             }}"
        ));
    }

    /// How long (whole seconds) an idle UDP mapping lasts, both before and after it has been answered.
    pub fn set_udp_timeout(&self, timeout: Duration) {
        let seconds = timeout.as_secs().to_string();
        self.sysctls(&[
            ("net/netfilter/nf_conntrack_udp_timeout", &seconds),
            ("net/netfilter/nf_conntrack_udp_timeout_stream", &seconds),
        ]);
    }

    /// Forgets all mappings, as a restart does.
    pub fn forget_mappings(&self) {
        self.run("conntrack -F");
    }
}

impl Deref for Nat {
    type Target = Router;

    fn deref(&self) -> &Router {
        &self.0
    }
}
