//! Addresses derived from a subnet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etcd_schema::SubnetKey;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An address family, where a thing exists once per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both, in the order they are worked through.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The family of a prefix.
    #[must_use]
    pub fn of_net(net: &IpNet) -> Self {
        Self::of(net.addr())
    }
}

/// The node's own overlay address in an IPv4 subnet: its first; `.1` stays free for a bridge.
#[must_use]
pub(crate) fn overlay_v4(subnet: Ipv4Net) -> Ipv4Addr {
    subnet.network()
}

/// The node's own overlay address in an IPv6 subnet: its last; the first is the subnet-router anycast address
/// (RFC 4291, 2.6.1), which a bridge would also take.
#[must_use]
pub(crate) fn overlay_v6(subnet: Ipv6Net) -> Ipv6Addr {
    subnet.broadcast()
}

/// The overlay addresses of a lease, IPv4 first.
pub fn overlay_addresses(subnet: &SubnetKey) -> impl Iterator<Item = IpAddr> + use<> {
    let v4 = subnet.v4.map(|net| overlay_v4(net).into());
    let v6 = subnet.v6.map(|net| overlay_v6(net).into());
    v4.into_iter().chain(v6)
}

/// The prefixes of a lease, IPv4 first.
pub fn prefixes(subnet: &SubnetKey) -> impl Iterator<Item = IpNet> + use<> {
    subnet.v4.map(IpNet::V4).into_iter().chain(subnet.v6.map(IpNet::V6))
}

/// The prefix that holds one address only.
#[must_use]
pub fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Whether two prefixes share an address.
#[must_use]
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_is_first_of_v4_and_last_of_v6() {
        let subnet =
            SubnetKey { v4: Some("10.244.3.0/24".parse().unwrap()), v6: Some("fd42:244:0:3::/64".parse().unwrap()) };
        let addresses: Vec<String> = overlay_addresses(&subnet).map(|a| a.to_string()).collect();
        assert_eq!(addresses, ["10.244.3.0", "fd42:244:0:3:ffff:ffff:ffff:ffff"]);
    }

    #[test]
    fn nested_prefixes_overlap_and_neighbours_do_not() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        assert!(overlap(&net("10.0.0.0/8"), &net("10.1.0.0/16")));
        assert!(overlap(&net("10.1.0.0/16"), &net("10.0.0.0/8")));
        assert!(!overlap(&net("10.1.0.0/16"), &net("10.2.0.0/16")));
        assert!(!overlap(&net("10.1.0.0/16"), &net("::/0")));
    }
}
