//! The key of a flow, equal for packets of both directions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::{Packet, Transport, protocol};

use super::icmp::{IcmpKind, request_of};
use crate::engine::Flow;

/// A flow as its first packet shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// The source.
    pub source: IpAddr,
    /// The destination.
    pub destination: IpAddr,
    /// IANA's number.
    pub protocol: u8,
    /// Source port. Of an ICMP request its identifier, of the answer the request's type. 0 for other protocols.
    pub source_port: u16,
    /// Destination port. Of an ICMP request its type, of the answer the identifier. 0 for other protocols.
    pub destination_port: u16,
    /// An ICMP answer. Without it a request whose identifier is its type would look like the answer to itself.
    pub answer: bool,
}

impl Tuple {
    /// The same flow seen from its other end.
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            protocol: self.protocol,
            source_port: self.destination_port,
            destination_port: self.source_port,
            answer: self.is_icmp() && !self.answer,
        }
    }

    const fn is_icmp(&self) -> bool {
        matches!((self.source, self.protocol), (IpAddr::V4(_), protocol::ICMP) | (IpAddr::V6(_), protocol::ICMPV6))
    }

    /// The flow as policies judge it.
    #[must_use]
    pub fn flow(&self) -> Flow {
        let ports = matches!(self.protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
        Flow {
            source: self.source,
            destination: self.destination,
            protocol: self.protocol,
            port: ports.then_some(self.destination_port),
        }
    }

    /// The tuple of a packet that is no later fragment. ICMP errors and the like have one without ports.
    pub(crate) fn of(packet: &Packet) -> Self {
        let ((source_port, destination_port), answer) = ports(packet);
        Self {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol.unwrap_or(NO_PROTOCOL),
            source_port,
            destination_port,
            answer,
        }
    }
}

/// The ports of a tuple, and whether the packet is a reply.
#[inline]
fn ports(packet: &Packet) -> ((u16, u16), bool) {
    match packet.transport {
        Transport::Tcp { source, destination, .. }
        | Transport::Udp { source, destination }
        | Transport::Sctp { source, destination } => ((source, destination), false),
        Transport::Icmp { kind, identifier, .. } => {
            let v4 = packet.source.is_ipv4();
            (icmp_ports(v4, kind, identifier), is_answer(v4, kind))
        }
        Transport::Unknown => ((0, 0), false),
    }
}

/// Stands for a protocol that is not known; IANA reserves it.
pub(super) const NO_PROTOCOL: u8 = 255;

/// In [`Key::rest`]: the lower end sends the requests.
const LOW_ASKS: u64 = 1 << 8;

/// The same for both directions of a flow.
#[derive(Debug, Clone, Copy, Eq, Default)]
pub(super) struct Key {
    /// Upper and lower half of the lower end's address, then of the higher one's. In halves, since a `u128` would
    /// ask for room to be aligned.
    ends: [u64; 4],
    /// Ports of low and high, which of them asks (ICMP only), protocol.
    rest: u64,
}

impl PartialEq for Key {
    /// Word by word: a key was just put together in words, and reading them back as one vector waits for all of them.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        let [a, b, c, d] = self.ends;
        let [e, f, g, h] = other.ends;
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) | (self.rest ^ other.rest) == 0
    }
}

impl Key {
    /// The key, and whether the tuple's source is its lower end.
    pub(super) fn new(tuple: &Tuple) -> (Self, bool) {
        let ports = (tuple.source_port, tuple.destination_port);
        Self::between(&tuple.source, &tuple.destination, tuple.protocol, ports, tuple.answer)
    }

    /// [`new`](Self::new) of the packet's tuple, without making that.
    #[inline]
    pub(super) fn of(packet: &Packet) -> (Self, bool) {
        let (ports, answer) = ports(packet);
        Self::between(&packet.source, &packet.destination, packet.protocol.unwrap_or(NO_PROTOCOL), ports, answer)
    }

    #[inline]
    fn between(source: &IpAddr, destination: &IpAddr, number: u8, ports: (u16, u16), answer: bool) -> (Self, bool) {
        let is_icmp = number == if source.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
        let (source, destination) = (halves(*source), halves(*destination));
        let forward = (source, ports.0) <= (destination, ports.1);
        let ((low, high), (low_port, high_port)) =
            if forward { ((source, destination), ports) } else { ((destination, source), (ports.1, ports.0)) };
        let low_asks = if is_icmp && forward != answer { LOW_ASKS } else { 0 };
        let rest = (u64::from(low_port) << 32) | (u64::from(high_port) << 16) | low_asks | u64::from(number);
        (Self { ends: [low.0, low.1, high.0, high.1], rest }, forward)
    }

    /// The tuple whose source is the lower end, or the other one.
    pub(super) fn tuple(&self, forward: bool) -> Tuple {
        let [low_upper, low_lower, high_upper, high_lower] = self.ends;
        let mut tuple = Tuple {
            source: address(low_upper, low_lower),
            destination: address(high_upper, high_lower),
            protocol: self.rest as u8,
            source_port: (self.rest >> 32) as u16,
            destination_port: (self.rest >> 16) as u16,
            answer: false,
        };
        tuple.answer = tuple.is_icmp() && self.rest & LOW_ASKS == 0;
        if forward { tuple } else { tuple.reversed() }
    }

    /// A hash that who does not know the seeds cannot steer.
    pub(super) fn hash(&self, seeds: &Seeds) -> u64 {
        let [a, b, c, d] = self.ends;
        let [s, t, u, v, w] = seeds.0;
        // Products that do not wait for each other.
        let mixed = fold(a ^ s, b ^ t) ^ fold(c ^ u, d ^ v).rotate_left(23) ^ fold(self.rest ^ w, s ^ v);
        fold(mixed ^ u, w | 1)
    }

    /// A hash of the lower end's address alone, or of the higher one's.
    pub(super) fn hash_of_end(&self, low: bool, seeds: &Seeds) -> u64 {
        let [a, b, c, d] = self.ends;
        let [s, t, _, _, w] = seeds.0;
        let (upper, lower) = if low { (a, b) } else { (c, d) };
        fold(fold(upper ^ s, lower ^ t) ^ t, w | 1)
    }
}

/// Secret numbers that a [`Key`] is hashed with.
#[derive(Debug)]
pub(super) struct Seeds([u64; 5]);

impl Seeds {
    /// From one secret number (by splitmix64).
    pub(super) fn new(seed: u64) -> Self {
        let mut state = seed;
        Self([(); 5].map(|()| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ (product >> 64) as u64
}

/// Upper and lower half; IPv4 as IPv4-mapped IPv6.
fn halves(address: IpAddr) -> (u64, u64) {
    match address {
        IpAddr::V4(v4) => (0, 0xffff_0000_0000 | u64::from(u32::from(v4))),
        IpAddr::V6(v6) => {
            let number = u128::from(v6);
            ((number >> 64) as u64, number as u64)
        }
    }
}

fn address(upper: u64, lower: u64) -> IpAddr {
    let v6 = Ipv6Addr::from((u128::from(upper) << 64) | u128::from(lower));
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// The tuple of the packet that an ICMP error quotes: its headers as far as they go, which is less than a packet.
///
/// `None` if the ports are unknown: fragments, truncated packets, errors about errors.
pub(super) fn quoted(bytes: &[u8]) -> Option<Tuple> {
    match bytes.first()? >> 4 {
        4 => quoted_v4(bytes),
        6 => quoted_v6(bytes),
        _ => None,
    }
}

fn quoted_v4(bytes: &[u8]) -> Option<Tuple> {
    let header: &[u8; 20] = bytes.first_chunk()?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    if header_len < 20 || offset != 0 {
        return None;
    }
    let address = |at: usize| IpAddr::V4(Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]));
    transport(address(12), address(16), header[9], protocol::ICMP, bytes.get(header_len..)?)
}

fn quoted_v6(bytes: &[u8]) -> Option<Tuple> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION_OPTIONS: u8 = 60;
    let header: &[u8; 40] = bytes.first_chunk()?;
    let address = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().ok()?;
        Some(IpAddr::V6(Ipv6Addr::from(octets)))
    };
    let (mut next, mut rest) = (header[6], &bytes[40..]);
    for _ in 0..=packet::MAX_EXTENSION_HEADERS {
        let len = match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(*rest.get(1)?) + 1) * 8,
            FRAGMENT => {
                let field = u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]);
                if field & 0xfff8 != 0 {
                    return None;
                }
                8
            }
            upper => return transport(address(8)?, address(24)?, upper, protocol::ICMPV6, rest),
        };
        next = *rest.first()?;
        rest = rest.get(len..)?;
    }
    None
}

fn is_answer(v4: bool, kind: u8) -> bool {
    IcmpKind::of(v4, kind) == Some(IcmpKind::Reply)
}

/// Requests and their answers as if they had ports, so that two ends that both ask with one identifier are two flows.
fn icmp_ports(v4: bool, kind: u8, identifier: u16) -> (u16, u16) {
    match IcmpKind::of(v4, kind) {
        Some(IcmpKind::Request) => (identifier, u16::from(kind)),
        Some(IcmpKind::Reply) => (u16::from(request_of(v4, kind)), identifier),
        Some(IcmpKind::Error) | None => (0, 0),
    }
}

fn transport(source: IpAddr, destination: IpAddr, protocol: u8, icmp: u8, payload: &[u8]) -> Option<Tuple> {
    let port = |at: usize| Some(u16::from_be_bytes([*payload.get(at)?, *payload.get(at + 1)?]));
    let mut answer = false;
    let (source_port, destination_port) = match protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => (port(0)?, port(2)?),
        _ if protocol == icmp => {
            let kind = *payload.first()?;
            IcmpKind::of(source.is_ipv4(), kind).filter(|kind| kind.is_query())?;
            answer = is_answer(source.is_ipv4(), kind);
            icmp_ports(source.is_ipv4(), kind, port(4)?)
        }
        _ => (0, 0),
    };
    Some(Tuple { source, destination, protocol, source_port, destination_port, answer })
}
