//! ctnetlink messages (linux/netfilter/nfnetlink_conntrack.h), limited to the fields of a flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netfilter::nfnetlink::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, attribute};
use packet::protocol;
use policy::flow::Tuple;

/// A flow as its first packet went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KnownFlow {
    pub(crate) tuple: Tuple,
    /// ICMP's code, which is a part of its name; 0 with other protocols.
    pub(crate) code: u8,
    /// Packets went both ways.
    pub(crate) answered: bool,
    /// Its replies do not simply go the other way: an address or a port is rewritten.
    pub(crate) rewritten: bool,
    /// Source and destination of replies.
    pub(crate) reply: [IpAddr; 2],
}

/// A message that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CtReply {
    Flow(KnownFlow),
    /// There is no more; with the error number, if it is an error.
    Done(i32),
}

const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP: u16 = 0x300;
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// Identifier, type and code, of ICMP and of ICMPv6.
const CTA_PROTO_ICMP: [u16; 3] = [4, 5, 6];
const CTA_PROTO_ICMPV6: [u16; 3] = [7, 8, 9];
const IPS_SEEN_REPLY: u32 = 2;
const HEADER: usize = 16;

/// A question for the flow that begins with `tuple` (of ICMP: with code 0), or for all flows.
pub(super) fn request(tuple: Option<&Tuple>, dump: bool, sequence: u32) -> Vec<u8> {
    named(tuple.map(|tuple| (tuple, 0)), dump, sequence)
}

fn named(flow: Option<(&Tuple, u8)>, dump: bool, sequence: u32) -> Vec<u8> {
    let tuple = flow.map(|(tuple, _)| tuple);
    let mut out = vec![0; HEADER];
    let family = match tuple.map(|tuple| tuple.source) {
        Some(IpAddr::V4(_)) => libc::AF_INET,
        Some(IpAddr::V6(_)) => libc::AF_INET6,
        None => libc::AF_UNSPEC,
    };
    // struct nfgenmsg
    out.extend([u8::try_from(family).unwrap_or_default(), 0, 0, 0]);
    if let Some((tuple, code)) = flow {
        nest(&mut out, CTA_TUPLE_ORIG, |out| write_tuple(out, tuple, code));
    }
    let length = u32::try_from(out.len()).unwrap_or_default();
    let flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { 0 };
    out[..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET).to_ne_bytes());
    out[6..8].copy_from_slice(&flags.to_ne_bytes());
    out[8..12].copy_from_slice(&sequence.to_ne_bytes());
    out
}

/// Removes a flow. The kernel acknowledges it.
pub(super) fn removal(flow: &KnownFlow, sequence: u32) -> Vec<u8> {
    let mut out = named(Some((&flow.tuple, flow.code)), false, sequence);
    out[4..6].copy_from_slice(&(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE).to_ne_bytes());
    out[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    out
}

/// The replies in a datagram to the request `sequence`; replies to earlier requests are skipped.
pub(super) fn answers(mut datagram: &[u8], sequence: u32) -> impl Iterator<Item = CtReply> {
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?)).ok()?;
            let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
            let number = u32::from_ne_bytes(datagram.get(8..12)?.try_into().ok()?);
            let body = datagram.get(HEADER..length)?;
            datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
            if number != sequence {
                continue;
            }
            const FLOW: u16 = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW;
            match kind {
                NLMSG_ERROR | NLMSG_DONE => {
                    let error = body.first_chunk().map_or(0, |error| i32::from_ne_bytes(*error));
                    return Some(CtReply::Done(-error));
                }
                FLOW => {
                    // One of a protocol that cannot be named is none to us.
                    if let Some(flow) = body.get(4..).and_then(read_flow) {
                        return Some(CtReply::Flow(flow));
                    }
                }
                _ => {}
            }
        }
    })
}

fn read_flow(attributes: &[u8]) -> Option<KnownFlow> {
    let (tuple, code) = read_tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?;
    let (reply, _) = read_tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?;
    let status = attribute(attributes, CTA_STATUS)
        .and_then(|status| status.first_chunk())
        .map_or(0, |status| u32::from_be_bytes(*status));
    let rewritten = reply != tuple.reversed();
    let reply = [reply.source, reply.destination];
    Some(KnownFlow { tuple, code, answered: status & IPS_SEEN_REPLY != 0, rewritten, reply })
}

/// Also ICMP's code.
fn read_tuple(attributes: &[u8]) -> Option<(Tuple, u8)> {
    let ip = attribute(attributes, CTA_TUPLE_IP)?;
    let (source, destination) = match (attribute(ip, 1), attribute(ip, 2)) {
        (Some(source), Some(destination)) => (v4(source)?, v4(destination)?),
        _ => (v6(attribute(ip, 3)?)?, v6(attribute(ip, 4)?)?),
    };
    let proto = attribute(attributes, CTA_TUPLE_PROTO)?;
    let protocol = *attribute(proto, CTA_PROTO_NUM)?.first()?;
    let number = |kind| Some(u16::from_be_bytes(*attribute(proto, kind)?.first_chunk()?));
    let (mut answer, mut icmp_code) = (false, 0);
    let (source_port, destination_port) = match icmp(protocol) {
        Some([identifier, kind, code]) => {
            icmp_code = attribute(proto, code).and_then(|code| code.first().copied()).unwrap_or(0);
            let (identifier, kind) = (number(identifier)?, *attribute(proto, kind)?.first()?);
            answer = !is_request(source.is_ipv4(), kind);
            icmp_ports(source.is_ipv4(), kind, identifier)?
        }
        // A protocol without ports has zeros for them, or none.
        None => (number(CTA_PROTO_SRC_PORT).unwrap_or(0), number(CTA_PROTO_DST_PORT).unwrap_or(0)),
    };
    Some((Tuple { source, destination, protocol, source_port, destination_port, answer }, icmp_code))
}

fn write_tuple(out: &mut Vec<u8>, tuple: &Tuple, icmp_code: u8) {
    nest(out, CTA_TUPLE_IP, |out| match (tuple.source, tuple.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            put(out, 1, &source.octets());
            put(out, 2, &destination.octets());
        }
        (source, destination) => {
            for (kind, address) in [(3, source), (4, destination)] {
                if let IpAddr::V6(address) = address {
                    put(out, kind, &address.octets());
                }
            }
        }
    });
    nest(out, CTA_TUPLE_PROTO, |out| {
        put(out, CTA_PROTO_NUM, &[tuple.protocol]);
        match icmp(tuple.protocol) {
            Some([identifier, kind, code]) => {
                put(out, identifier, &tuple.source_port.to_be_bytes());
                put(out, kind, &[u8::try_from(tuple.destination_port).unwrap_or_default()]);
                put(out, code, &[icmp_code]);
            }
            None => {
                put(out, CTA_PROTO_SRC_PORT, &tuple.source_port.to_be_bytes());
                put(out, CTA_PROTO_DST_PORT, &tuple.destination_port.to_be_bytes());
            }
        }
    });
}

const fn icmp(protocol: u8) -> Option<[u16; 3]> {
    match protocol {
        protocol::ICMP => Some(CTA_PROTO_ICMP),
        protocol::ICMPV6 => Some(CTA_PROTO_ICMPV6),
        _ => None,
    }
}

/// Whether a flow can begin so: of ICMP, only with a query.
pub(super) fn may_begin(tuple: &Tuple) -> bool {
    match icmp(tuple.protocol) {
        Some(_) => {
            let kind = u8::try_from(tuple.destination_port);
            !tuple.answer && kind.is_ok_and(|kind| is_request(tuple.source.is_ipv4(), kind))
        }
        None => true,
    }
}

const fn is_request(v4: bool, kind: u8) -> bool {
    matches!((v4, kind), (true, 8 | 13 | 15 | 17) | (false, 128 | 139))
}

/// A query as [`Tuple`] has it.
fn icmp_ports(v4: bool, kind: u8, identifier: u16) -> Option<(u16, u16)> {
    Some(match (v4, kind) {
        _ if is_request(v4, kind) => (identifier, u16::from(kind)),
        (true, 0) => (8, identifier),
        // An answer's type is one more than its request's.
        (true, 14 | 16 | 18) | (false, 129 | 140) => (u16::from(kind) - 1, identifier),
        _ => return None,
    })
}

fn v4(bytes: &[u8]) -> Option<IpAddr> {
    Some(IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk::<4>()?)))
}

fn v6(bytes: &[u8]) -> Option<IpAddr> {
    Some(IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>()?)))
}

fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or_default();
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn nest(out: &mut Vec<u8>, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put(out, kind | NESTED, &[]);
    write(out);
    let length = u16::try_from(out.len() - start).unwrap_or_default();
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
}
