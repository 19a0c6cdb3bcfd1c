//! Validation of addresses, prefixes and endpoints by their use. Each check returns the violated rule.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::fields::Expected;

/// An address of one host.
///
/// # Errors
/// The violated rule.
pub fn unicast(text: &str) -> Result<IpAddr, Expected> {
    let address: IpAddr = text.parse().map_err(|_| "must be an IP address, such as 192.0.2.7 or 2001:db8::7")?;
    host_address(address)?;
    Ok(address)
}

/// An IPv4 address of one host.
pub(crate) fn unicast_v4(text: &str) -> Result<Ipv4Addr, Expected> {
    match unicast(text)? {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err("must be an IPv4 address".into()),
    }
}

/// An IPv6 address of one host.
pub(crate) fn unicast_v6(text: &str) -> Result<Ipv6Addr, Expected> {
    match unicast(text)? {
        IpAddr::V6(address) => Ok(address),
        IpAddr::V4(_) => Err("must be an IPv6 address".into()),
    }
}

/// Where a tunnel may be reached: an address of one host that others can reach, and a port.
pub(crate) fn endpoint(text: &str) -> Result<SocketAddr, Expected> {
    let Ok(endpoint) = text.parse::<SocketAddr>() else {
        return Err(match text.rsplit_once(':') {
            _ if text.parse::<IpAddr>().is_ok() => {
                "must have a port: write 192.0.2.7:51820 or [2001:db8::7]:51820".into()
            }
            Some((host, port)) if port.parse::<u16>().is_ok() && is_host_name(host) => {
                "must be an address, not a host name: names are not resolved, since an answer could move the peer"
                    .into()
            }
            _ => "must be IP:PORT, such as 192.0.2.7:51820 or [2001:db8::7]:51820".into(),
        });
    };
    if endpoint.port() == 0 {
        return Err("the port must be 1 to 65535".into());
    }
    if matches!(endpoint, SocketAddr::V6(v6) if v6.scope_id() != 0 || v6.ip().is_unicast_link_local()) {
        return Err(
            "must not be link-local, which means nothing to other hosts: write a global or unique local address".into(),
        );
    }
    host_address(endpoint.ip())?;
    Ok(endpoint)
}

/// An interface's address with its prefix length, host bits kept.
pub(crate) fn interface_address(text: &str) -> Result<IpNet, Expected> {
    let net: IpNet = text.parse().map_err(|_| "must be IP/LEN, such as 192.0.2.7/24 or 2001:db8::7/64")?;
    if net.prefix_len() == 0 {
        return Err("the prefix length must be at least 1".into());
    }
    host_address(net.addr())?;
    if matches!(net, IpNet::V6(v6) if v6.addr().is_unicast_link_local()) {
        return Err("must not be link-local, which every interface has: leave it out".into());
    }
    Ok(net)
}

/// A prefix that is routed to one peer, or comes from one pod: no host bits, no default route, nothing that hosts use
/// for themselves.
pub(crate) fn routed_prefix(text: &str) -> Result<IpNet, Expected> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => text
            .parse::<IpAddr>()
            .map(IpNet::from)
            .map_err(|_| "must be a prefix IP/LEN, such as 10.9.0.0/24 or fd00:9::/64")?,
    };
    if net.prefix_len() == 0 {
        return Err("must not be a default route: list specific prefixes".into());
    }
    if net != net.trunc() {
        return Err(format!("must have no bits beyond its prefix length: write {}", net.trunc()).into());
    }
    match net {
        IpNet::V4(net) => ordinary_v4(&net)?,
        IpNet::V6(net) => ordinary_v6(&net)?,
    }
    Ok(net)
}

/// Checks that `net` contains no special address (this host, loopback, link-local, multicast, reserved).
pub(crate) fn ordinary_v4(net: &Ipv4Net) -> Result<(), Expected> {
    const SPECIAL: [(Ipv4Net, &str); 5] = [
        (v4([0, 0, 0, 0], 8), "0.0.0.0/8 (this host)"),
        (v4([127, 0, 0, 0], 8), "127.0.0.0/8 (loopback)"),
        (v4([169, 254, 0, 0], 16), "169.254.0.0/16 (link-local)"),
        (v4([224, 0, 0, 0], 4), "224.0.0.0/4 (multicast)"),
        (v4([240, 0, 0, 0], 4), "240.0.0.0/4 (reserved)"),
    ];
    SPECIAL
        .iter()
        .find(|(special, _)| special.contains(net) || net.contains(special))
        .map_or(Ok(()), |(_, name)| Err(no_overlap(name)))
}

/// Checks that `net` contains no special address (unspecified, loopback, IPv4-mapped, link-local, multicast).
pub(crate) fn ordinary_v6(net: &Ipv6Net) -> Result<(), Expected> {
    const SPECIAL: [(Ipv6Net, &str); 4] = [
        (v6([0; 8], 96), "::/96 (unspecified, loopback)"),
        (v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96), "::ffff:0:0/96 (IPv4-mapped)"),
        (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "fe80::/10 (link-local)"),
        (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "ff00::/8 (multicast)"),
    ];
    SPECIAL
        .iter()
        .find(|(special, _)| special.contains(net) || net.contains(special))
        .map_or(Ok(()), |(_, name)| Err(no_overlap(name)))
}

fn host_address(address: IpAddr) -> Result<(), Expected> {
    let what = match address {
        _ if address.is_unspecified() => "the unspecified address",
        _ if address.is_loopback() => "a loopback address",
        _ if address.is_multicast() => "a multicast address",
        IpAddr::V4(a) if a.octets()[0] == 0 => "in 0.0.0.0/8",
        IpAddr::V4(a) if a.is_broadcast() => "the broadcast address",
        IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => {
            return Err("must not be IPv4-mapped: write the IPv4 address itself".into());
        }
        _ => return Ok(()),
    };
    Err(format!("must not be {what}: write the address of one host that others can reach").into())
}

fn is_host_name(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        && text.bytes().any(|b| b.is_ascii_alphabetic())
}

fn no_overlap(name: &str) -> Expected {
    format!("must not overlap {name}").into()
}

const fn v4(octets: [u8; 4], len: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]), len)
}

const fn v6(segments: [u16; 8], len: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), len)
}
