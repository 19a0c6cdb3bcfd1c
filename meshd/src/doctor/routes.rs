//! The kernel's main routing table, as `/proc/net` shows it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// `RTF_DEFAULT` and `RTF_ADDRCONF` of `linux/ipv6_route.h`: a default route by router advertisement.
const ADVERTISED: u32 = 0x0005_0000;

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub net: IpNet,
    /// By which interface.
    pub device: String,
    /// A default route that came by router advertisement.
    pub advertised: bool,
}

/// All routes of both families, in the network namespace of this thread.
#[must_use]
pub fn main_table() -> Vec<Route> {
    let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let mut routes: Vec<Route> = read("route").lines().skip(1).filter_map(ipv4).collect();
    routes.extend(read("ipv6_route").lines().filter_map(ipv6));
    routes
}

/// A line of `/proc/net/route`: interface, destination, gateway, flags, …, mask (eighth); in the machine's byte order.
fn ipv4(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address =
        |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok().map(|raw| Ipv4Addr::from(raw.to_ne_bytes()));
    let net = IpNet::with_netmask(address(1)?.into(), address(7)?.into()).ok()?;
    Some(Route { net, device: (*fields.first()?).to_owned(), advertised: false })
}

/// A line of `/proc/net/ipv6_route`: destination, its length, …, flags (ninth), interface (tenth); in hex.
fn ipv6(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address = Ipv6Addr::from(u128::from_str_radix(fields.first()?, 16).ok()?);
    let length = u8::from_str_radix(fields.get(1)?, 16).ok()?;
    let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
    let net = IpNet::new(IpAddr::V6(address), length).ok()?;
    Some(Route { net, device: (*fields.get(9)?).to_owned(), advertised: flags & ADVERTISED == ADVERTISED })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = format!(
            "eth0\t{:08X}\t00000000\t0001\t0\t0\t0\t{:08X}\t0\t0\t0",
            u32::from_ne_bytes([10, 244, 3, 0]),
            u32::from_ne_bytes([255, 255, 255, 0])
        );
        let read = ipv4(&line).unwrap();
        assert_eq!((read.net.to_string().as_str(), read.device.as_str()), ("10.244.3.0/24", "eth0"));
        let line = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 \
                    00000400 00000001 00000000 00450003     eth0";
        let read = ipv6(line).unwrap();
        assert_eq!((read.net.to_string().as_str(), read.advertised), ("::/0", true));
        assert_eq!(ipv4("eth0 zz"), None);
        assert_eq!(ipv6(""), None);
    }
}
