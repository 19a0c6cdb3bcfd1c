//! What goes through the steps.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use tunnel::PrefixTable;

/// Names of super-packets, their bytes of payload, and what they are cut into.
pub(crate) const SHAPES: [(&str, usize, u16); 3] =
    [("48 of 1400 B", 48 * 1348, 1348), ("16 of 1400 B", 16 * 1348, 1348), ("200 of 64 B", 200 * 12, 12)];

/// That many networks of 256 addresses.
pub(crate) fn table(prefixes: u32) -> PrefixTable<u32> {
    let mut table = PrefixTable::default();
    for n in 0..prefixes {
        if let Ok(net) = Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (n << 8)), 24) {
            table.insert(IpNet::V4(net), n);
        }
    }
    table
}

/// The `n`th of addresses that are spread over them.
pub(crate) fn address(n: u32, prefixes: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n.wrapping_mul(0x9e37_79b1) % (prefixes << 8)))
}
