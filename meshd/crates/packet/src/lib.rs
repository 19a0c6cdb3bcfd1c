//! A strict, allocation-free reader of IPv4 and IPv6 packets.
//!
//! [`Packet::parse`] accepts a packet only if all its stated lengths fit the buffer and all headers that a policy needs
//! are present. These rules make the result trustworthy:
//!
//! - Bytes beyond the stated total length are ignored (WireGuard pads), never read as part of the packet.
//! - Ports, TCP flags and ICMP types are read only from the first fragment or an unfragmented packet, and only when the
//!   transport header is complete there. A first fragment too short for its transport header, and a later
//!   fragment that would overwrite one, are refused: both exist to slip past filters (RFC 1858, RFC 3128).
//! - IPv6 extension headers are walked, at most [`MAX_EXTENSION_HEADERS`] of them. The walk ends at a protocol that is
//!   not a known extension header, which is reported as is; its payload stays unread.
//! - A packet whose destination is not its final one (source routes, a routing header with segments left) is refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most IPv6 extension headers that a packet may carry; more is refused. Senders use three or four.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// Protocol numbers (IANA) that this parser knows.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;
}

/// TCP flag bits as they stand in byte 13 of the header.
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Ends a connection at once.
    pub const RST: u8 = 0x04;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 0x10;
}

/// The parsed headers of one IP packet. Created by [`Packet::parse`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Inner source address.
    pub source: IpAddr,
    /// Inner destination address; the final one.
    pub destination: IpAddr,
    /// Length in bytes that the packet states; at most the buffer's.
    pub total_len: u16,
    /// Upper-layer protocol. `None`: a later IPv6 fragment whose extension headers went with the first one.
    pub protocol: Option<u8>,
    /// Its place in a fragmented packet.
    pub fragment: Fragment,
    /// Ports, flags and the like, where they are in this packet.
    pub transport: Transport,
    /// Offset of the transport header or, in a later fragment, of the payload.
    pub payload_offset: u16,
    /// Type of service (IPv4) or traffic class (IPv6): DSCP in the upper six bits, ECN in the lower two.
    pub traffic_class: u8,
    /// Routers must not fragment it: IPv4 with DF, every IPv6 packet.
    pub dont_fragment: bool,
}

/// A packet's place among its fragments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// The first of several; it has the transport header. Carries the identification.
    First(u32),
    /// A later one, with no transport header. Carries the identification.
    Later(u32),
}

/// The part of the transport header that policies and flow tables go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// See [`tcp_flags`].
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP inside IPv4 or ICMPv6 inside IPv6.
    Icmp {
        /// ICMP type.
        kind: u8,
        /// ICMP code.
        code: u8,
        /// Bytes 4 and 5: the identifier of echo messages.
        identifier: u16,
    },
    /// Not in this packet, or of a protocol that is not one of the above.
    Unknown,
}

/// Why a packet was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// The first four bits are neither 4 nor 6, or the buffer is empty.
    #[error("neither IPv4 nor IPv6")]
    Version,
    /// A header or the stated length runs past the buffer or the packet.
    #[error("shorter than its headers say")]
    Truncated,
    /// A length field is smaller than its own header.
    #[error("a length field contradicts the header")]
    Length,
    /// Too many, repeated or misplaced IPv6 extension headers.
    #[error("IPv6 extension headers in an order or number that no sender makes")]
    ExtensionHeaders,
    /// The destination address is not the final one.
    #[error("source-routed")]
    SourceRouted,
    /// A fragment that splits or overwrites the transport header.
    #[error("a fragment that cuts the transport header")]
    TinyFragment,
}

impl Packet {
    /// Reads the packet at the start of `bytes`; bytes beyond its stated length are ignored.
    ///
    /// # Errors
    /// When it is not a well-formed IP packet, or one that says different things to different readers.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        match bytes.first().map(|b| b >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            _ => Err(ParseError::Version),
        }
    }

    fn parse_v4(bytes: &[u8]) -> Result<Self, ParseError> {
        let header: &[u8; 20] = bytes.first_chunk().ok_or(ParseError::Truncated)?;
        let header_len = usize::from(header[0] & 0x0f) * 4;
        let total_len = u16::from_be_bytes([header[2], header[3]]);
        if header_len < 20 || usize::from(total_len) < header_len {
            return Err(ParseError::Length);
        }
        let packet = bytes.get(..usize::from(total_len)).ok_or(ParseError::Truncated)?;
        refuse_source_route(&packet[20..header_len])?;

        let identification = u32::from(u16::from_be_bytes([header[4], header[5]]));
        let flags = u16::from_be_bytes([header[6], header[7]]);
        let offset = (flags & 0x1fff) * 8;
        let fragment = fragment(offset, flags & 0x2000 != 0, identification);
        let protocol = header[9];
        let payload = &packet[header_len..];
        check_fragment(protocol, offset, payload.len())?;
        Ok(Self {
            source: IpAddr::V4(Ipv4Addr::new(header[12], header[13], header[14], header[15])),
            destination: IpAddr::V4(Ipv4Addr::new(header[16], header[17], header[18], header[19])),
            total_len,
            protocol: Some(protocol),
            fragment,
            transport: transport(protocol, protocol::ICMP, fragment, payload)?,
            payload_offset: header_len as u16,
            traffic_class: header[1],
            dont_fragment: flags & 0x4000 != 0,
        })
    }

    fn parse_v6(bytes: &[u8]) -> Result<Self, ParseError> {
        let header: &[u8; 40] = bytes.first_chunk().ok_or(ParseError::Truncated)?;
        // A jumbogram states 0 here and its length in an option; it cannot come through a tunnel of 64 KiB datagrams,
        // and is refused as truncated by the walk below.
        let total_len = usize::from(u16::from_be_bytes([header[4], header[5]])) + 40;
        let packet = bytes.get(..total_len).ok_or(ParseError::Truncated)?;
        let total_len = u16::try_from(total_len).map_err(|_| ParseError::Length)?;

        let walk = walk_extension_headers(header[6], packet)?;
        let payload = &packet[walk.offset..];
        if let Some(protocol) = walk.protocol {
            check_fragment(protocol, walk.fragment_offset, payload.len())?;
        }
        Ok(Self {
            source: IpAddr::V6(address_v6(&header[8..24])),
            destination: IpAddr::V6(address_v6(&header[24..40])),
            total_len,
            protocol: walk.protocol,
            fragment: walk.fragment,
            transport: match walk.protocol {
                Some(protocol) => transport(protocol, protocol::ICMPV6, walk.fragment, payload)?,
                None => Transport::Unknown,
            },
            payload_offset: walk.offset as u16,
            traffic_class: (header[0] << 4) | (header[1] >> 4),
            dont_fragment: true,
        })
    }
}

fn address_v6(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(bytes);
    Ipv6Addr::from(octets)
}

fn fragment(offset: u16, more: bool, identification: u32) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First(identification),
        _ => Fragment::Later(identification),
    }
}

/// Refuses later fragments that reach beyond 64 KiB or start where transport headers lie: no sender cuts so small.
fn check_fragment(protocol: u8, offset: u16, payload_len: usize) -> Result<(), ParseError> {
    if offset == 0 {
        return Ok(());
    }
    if usize::from(offset) + payload_len > usize::from(u16::MAX) {
        return Err(ParseError::Length);
    }
    if offset < 16 || (protocol == protocol::TCP && offset < 20) {
        return Err(ParseError::TinyFragment);
    }
    Ok(())
}

/// Refuses loose and strict source routes among IPv4 options, and options that do not add up.
fn refuse_source_route(mut options: &[u8]) -> Result<(), ParseError> {
    while let Some(&kind) = options.first() {
        match kind {
            0 => return Ok(()),
            1 => options = &options[1..],
            0x83 | 0x89 => return Err(ParseError::SourceRouted),
            _ => {
                let len = usize::from(*options.get(1).ok_or(ParseError::Length)?);
                if len < 2 {
                    return Err(ParseError::Length);
                }
                options = options.get(len..).ok_or(ParseError::Length)?;
            }
        }
    }
    Ok(())
}

struct Walk {
    protocol: Option<u8>,
    fragment: Fragment,
    fragment_offset: u16,
    offset: usize,
}

fn walk_extension_headers(first: u8, packet: &[u8]) -> Result<Walk, ParseError> {
    let mut walk = Walk { protocol: Some(first), fragment: Fragment::Whole, fragment_offset: 0, offset: 40 };
    let mut next = first;
    let mut seen_fragment = false;
    for position in 0..=MAX_EXTENSION_HEADERS {
        let rest = &packet[walk.offset..];
        let len = match next {
            protocol::HOP_BY_HOP if position > 0 => return Err(ParseError::ExtensionHeaders),
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {
                let &[_, units, _, segments_left] = rest.first_chunk().ok_or(ParseError::Truncated)?;
                if next == protocol::ROUTING && segments_left != 0 {
                    return Err(ParseError::SourceRouted);
                }
                (usize::from(units) + 1) * 8
            }
            protocol::AUTHENTICATION => {
                let &[_, units] = rest.first_chunk().ok_or(ParseError::Truncated)?;
                (usize::from(units) + 2) * 4
            }
            protocol::FRAGMENT if seen_fragment => return Err(ParseError::ExtensionHeaders),
            protocol::FRAGMENT => {
                let header: &[u8; 8] = rest.first_chunk().ok_or(ParseError::Truncated)?;
                seen_fragment = true;
                let field = u16::from_be_bytes([header[2], header[3]]);
                let identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                walk.fragment_offset = field & 0xfff8;
                walk.fragment = fragment(walk.fragment_offset, field & 1 != 0, identification);
                if walk.fragment_offset != 0 {
                    walk.offset += 8;
                    // Extension headers that were fragmented along stand in the first fragment only.
                    walk.protocol = (!is_extension_header(header[0])).then_some(header[0]);
                    return Ok(walk);
                }
                8
            }
            upper => {
                walk.protocol = Some(upper);
                return Ok(walk);
            }
        };
        if rest.len() < len {
            return Err(ParseError::Truncated);
        }
        next = rest[0];
        walk.offset += len;
    }
    Err(ParseError::ExtensionHeaders)
}

fn is_extension_header(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION_OPTIONS
    )
}

/// Reads the transport header; `icmp` is the ICMP that belongs to the address family (the other one is not read).
fn transport(protocol: u8, icmp: u8, fragment: Fragment, payload: &[u8]) -> Result<Transport, ParseError> {
    let first = match fragment {
        Fragment::Whole => false,
        Fragment::First(_) => true,
        Fragment::Later(_) => return Ok(Transport::Unknown),
    };
    let short = if first { ParseError::TinyFragment } else { ParseError::Truncated };
    let port = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
    match protocol {
        protocol::TCP => {
            if payload.len() < 20 {
                return Err(short);
            }
            let header_len = usize::from(payload[12] >> 4) * 4;
            if header_len < 20 {
                return Err(ParseError::Length);
            }
            if header_len > payload.len() {
                return Err(short);
            }
            Ok(Transport::Tcp { source: port(0), destination: port(2), flags: payload[13] })
        }
        protocol::UDP => {
            if payload.len() < 8 {
                return Err(short);
            }
            let stated = usize::from(port(4));
            if stated < 8 || (!first && stated > payload.len()) {
                return Err(ParseError::Length);
            }
            Ok(Transport::Udp { source: port(0), destination: port(2) })
        }
        protocol::SCTP => {
            if payload.len() < 12 {
                return Err(short);
            }
            Ok(Transport::Sctp { source: port(0), destination: port(2) })
        }
        _ if protocol == icmp => {
            if payload.len() < 8 {
                return Err(short);
            }
            Ok(Transport::Icmp { kind: payload[0], code: payload[1], identifier: port(4) })
        }
        _ => Ok(Transport::Unknown),
    }
}

#[cfg(test)]
mod tests;
