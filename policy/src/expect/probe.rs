//! One probe of a connection.

use std::net::IpAddr;

use packet::protocol;
use serde_json::Value;

use super::{Problem, problem, store::WorldObjects};
use crate::engine::Flow;

pub(super) struct Expectation {
    pub(super) flow: Flow,
    pub(super) expect_allow: bool,
    /// As it was asked.
    pub(super) text: String,
}

impl Expectation {
    pub(super) fn read(value: &Value, store: &WorldObjects) -> Result<Self, Problem> {
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        let family = match text("family") {
            None => None,
            Some("IPv4" | "ipv4" | "4") => Some(true),
            Some("IPv6" | "ipv6" | "6") => Some(false),
            Some(other) => return Err(problem("family", format!("{other}: must be IPv4 or IPv6"))),
        };
        let expect_allow = match text("expect") {
            Some("allow") => true,
            Some("deny") => false,
            other => return Err(problem("expect", format!("{other:?}: must be allow or deny"))),
        };
        let (from, to) = (ends(value, "from", store)?, ends(value, "to", store)?);
        let (source, destination) =
            pair(&from, &to, family).ok_or_else(|| problem("to", "the two ends have no common address family"))?;
        let name = text("protocol").unwrap_or("TCP");
        let number = protocol_number(name, destination)
            .ok_or_else(|| problem("protocol", format!("{name}: no such protocol")))?;
        let port = match value.get("port") {
            None | Some(Value::Null) => None,
            Some(port) => {
                let port = port.as_u64().and_then(|port| u16::try_from(port).ok());
                Some(port.ok_or_else(|| problem("port", "must be a number up to 65535"))?)
            }
        };
        let has_ports = matches!(number, protocol::TCP | protocol::UDP | protocol::SCTP);
        let port = has_ports.then(|| port.unwrap_or(0));
        let named = |end: &str| value.get(end).map_or_else(String::new, ToString::to_string);
        let shown = port.map_or_else(String::new, |port| format!("/{port}"));
        Ok(Self {
            flow: Flow { source, destination, protocol: number, port },
            expect_allow,
            text: format!("{} -> {} {name}{shown}", named("from"), named("to")),
        })
    }
}

/// The number of a protocol by name, or of its number as text; ICMP is that of the address's family.
pub(super) fn protocol_number(name: &str, address: IpAddr) -> Option<u8> {
    Some(match name.to_ascii_uppercase().as_str() {
        "TCP" => protocol::TCP,
        "UDP" => protocol::UDP,
        "SCTP" => protocol::SCTP,
        "ICMP" | "ICMPV6" | "ICMP6" if address.is_ipv6() => protocol::ICMPV6,
        "ICMP" => protocol::ICMP,
        "IGMP" => 2,
        "IPIP" => 4,
        "GRE" => 47,
        "ESP" => 50,
        "AH" => 51,
        "OSPF" => 89,
        "VRRP" => 112,
        other => other.parse().ok()?,
    })
}

fn ends(value: &Value, name: &str, store: &WorldObjects) -> Result<Vec<IpAddr>, Problem> {
    let end = value.get(name).ok_or_else(|| problem(name, "missing"))?;
    if let Some(text) = end.get("ip").and_then(Value::as_str) {
        return Ok(vec![text.parse().map_err(|_| problem(format!("{name}.ip"), format!("{text}: no address")))?]);
    }
    let text = end.get("pod").and_then(Value::as_str).ok_or_else(|| problem(name, "must have a pod or an ip"))?;
    let addresses = store.addresses_of(text);
    if addresses.is_empty() {
        return Err(problem(format!("{name}.pod"), format!("{text}: no such pod, or no address")));
    }
    Ok(addresses)
}

/// The first addresses of one family; IPv4 where both would do.
fn pair(from: &[IpAddr], to: &[IpAddr], family: Option<bool>) -> Option<(IpAddr, IpAddr)> {
    let families: &[bool] = match family {
        None => &[true, false],
        Some(true) => &[true],
        Some(false) => &[false],
    };
    families.iter().find_map(|v4| {
        let first = |list: &[IpAddr]| list.iter().find(|address| address.is_ipv4() == *v4).copied();
        first(from).zip(first(to))
    })
}
