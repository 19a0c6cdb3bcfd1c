//! Hosts and pods.

use std::{net::IpAddr, ops::Deref};

use super::{interface::Interface, namespace::Namespace, switch::Switch};

/// The gateway that pods see: any address does, since its MAC is given to them.
const POD_GATEWAY: (&str, &str) = ("169.254.1.1", "fe80::1");
/// The MAC of the host's end of every pod's veth.
const POD_GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// A machine: a namespace with `lo` up. Dereferences to it.
#[derive(Debug, Clone)]
pub struct Host(Namespace);

impl Host {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self(namespace)
    }

    /// Plugs the host into a switch and gives the new interface these addresses (with prefix length).
    pub fn connect(&self, switch: &Switch, addresses: &[&str]) -> Interface {
        let (interface, _port) = switch.plug(self, self.next_interface("eth"));
        for address in addresses {
            interface.add_address(address);
        }
        interface
    }

    /// A cable from this host to another, and the address (with prefix length) of either end: this one's first.
    pub fn join(&self, other: &Self, addresses: [&str; 2]) -> [Interface; 2] {
        let (own, its) = Interface::pair((self, self.next_interface("eth")), (other, other.next_interface("eth")));
        own.add_address(addresses[0]);
        its.add_address(addresses[1]);
        [own, its]
    }

    /// Lets the host forward packets of both families.
    pub fn enable_forwarding(&self) {
        self.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")]);
    }

    /// A pod with these addresses, joined by a routed veth as a CNI plugin does it: the host has a route to
    /// each address, the pod a default route to the host. The host must forward for it to get further.
    #[must_use]
    pub fn pod(&self, name: &str, addresses: &[IpAddr]) -> Pod {
        let namespace = self.sibling(&format!("{}-{name}", self.name()));
        let (outside, inside) = Interface::pair((self, self.next_interface("pod")), (&namespace, "eth0".to_owned()));
        let outer = outside.name();
        self.ip(&[&format!("link set {outer} address {POD_GATEWAY_MAC}")]);
        for (family, gateway) in [(4, POD_GATEWAY.0), (6, POD_GATEWAY.1)] {
            let own: Vec<&IpAddr> = addresses.iter().filter(|ip| ip.is_ipv6() == (family == 6)).collect();
            if own.is_empty() {
                continue;
            }
            let (bits, nodad) = if family == 6 { (128, "nodad") } else { (32, "") };
            let mut commands: Vec<String> =
                own.iter().map(|ip| format!("addr add {ip}/{bits} dev eth0 {nodad}")).collect();
            commands.push(format!("neigh add {gateway} lladdr {POD_GATEWAY_MAC} dev eth0 nud permanent"));
            commands.push(format!("route add default via {gateway} dev eth0 onlink"));
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            namespace.ip(&commands);
            let routes: Vec<String> = own.iter().map(|ip| format!("route add {ip}/{bits} dev {outer}")).collect();
            let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
            self.ip(&routes);
        }
        Pod { namespace, inside, outside, addresses: addresses.to_vec() }
    }
}

impl Deref for Host {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.0
    }
}

/// A pod: a namespace behind a host. Dereferences to it.
#[derive(Debug, Clone)]
pub struct Pod {
    namespace: Namespace,
    inside: Interface,
    outside: Interface,
    addresses: Vec<IpAddr>,
}

impl Pod {
    /// Its addresses, in the order they were given.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its first IPv4 address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    #[track_caller]
    pub fn v4(&self) -> IpAddr {
        self.first(IpAddr::is_ipv4)
    }

    /// Its first IPv6 address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    #[track_caller]
    pub fn v6(&self) -> IpAddr {
        self.first(IpAddr::is_ipv6)
    }

    /// Sets the MTU of both ends of its veth.
    pub fn set_mtu(&self, mtu: u16) {
        self.outside.set_mtu(mtu);
        self.inside.set_mtu(mtu);
    }

    /// The pod's own end of its veth.
    #[must_use]
    pub fn interface(&self) -> &Interface {
        &self.inside
    }

    /// The host's end of its veth.
    #[must_use]
    pub fn host_interface(&self) -> &Interface {
        &self.outside
    }

    #[track_caller]
    fn first(&self, family: fn(&IpAddr) -> bool) -> IpAddr {
        match self.addresses.iter().find(|ip| family(ip)) {
            Some(ip) => *ip,
            None => panic!("{}: no address of that family", self.name()),
        }
    }
}

impl Deref for Pod {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}
