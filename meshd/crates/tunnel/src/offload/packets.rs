//! Packets for tests, built without the code under test.

use std::net::IpAddr;

use packet::Packet;

/// Parameters of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Like {
    pub(in super::super) v4: bool,
    pub(in super::super) tcp: bool,
    /// Last byte of the source address, and the source port.
    pub(in super::super) flow: u8,
    pub(in super::super) identification: u16,
    pub(in super::super) dont_fragment: bool,
    pub(in super::super) class: u8,
    pub(in super::super) ttl: u8,
    pub(in super::super) sequence: u32,
    pub(in super::super) ack: u32,
    pub(in super::super) flags: u8,
    pub(in super::super) window: u16,
    /// Bytes of TCP options; made a multiple of 4.
    pub(in super::super) options: Vec<u8>,
    pub(in super::super) payload: Vec<u8>,
}

impl Like {
    fn options(&self) -> Vec<u8> {
        let mut options = self.options.clone();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 1);
        options
    }

    /// Length of the IP header.
    pub(in super::super) fn network_len(&self) -> usize {
        if self.v4 { 20 } else { 40 }
    }

    /// Length of all headers.
    pub(in super::super) fn header_len(&self) -> usize {
        self.network_len() + if self.tcp { 20 + self.options().len() } else { 8 }
    }

    /// The packet, all checksums right.
    pub(in super::super) fn build(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend((1000 + u16::from(self.flow)).to_be_bytes());
        transport.extend(5001u16.to_be_bytes());
        let options = self.options();
        if self.tcp {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.extend([(5 + options.len() as u8 / 4) << 4, self.flags]);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend(&options);
        } else {
            transport.extend((8 + self.payload.len() as u16).to_be_bytes());
            transport.extend([0; 2]);
        }
        transport.extend(&self.payload);
        let len = transport.len() as u16;
        let protocol = if self.tcp { 6 } else { 17 };
        let mut packet = Vec::new();
        let mut pseudo = Vec::new();
        if self.v4 {
            let addresses = [10, 1, 0, self.flow, 10, 2, 0, 1];
            packet.extend([0x45, self.class]);
            packet.extend((20 + len).to_be_bytes());
            packet.extend(self.identification.to_be_bytes());
            packet.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            packet.extend(addresses);
            let checksum = checksum(&packet);
            packet[10..12].copy_from_slice(&checksum);
            pseudo.extend(addresses);
        } else {
            let address = |net: u8, host: u8| [0xfd, 0, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host];
            packet.extend([0x60 | self.class >> 4, self.class << 4, 0, 7]);
            packet.extend(len.to_be_bytes());
            packet.extend([protocol, self.ttl]);
            packet.extend(address(1, self.flow));
            packet.extend(address(2, 1));
            pseudo.extend(&packet[8..40]);
        }
        pseudo.extend([0, protocol]);
        pseudo.extend(len.to_be_bytes());
        pseudo.extend(&transport);
        let mut sum = checksum(&pseudo);
        if !self.tcp && sum == [0, 0] {
            sum = [0xff; 2];
        }
        let field = if self.tcp { 16 } else { 6 };
        transport[field..field + 2].copy_from_slice(&sum);
        packet.extend(transport);
        packet
    }

    /// The segments that a kernel would create.
    pub(in super::super) fn cut(&self, size: usize) -> Vec<Vec<u8>> {
        let count = self.payload.len().div_ceil(size);
        self.payload
            .chunks(size)
            .enumerate()
            .map(|(nth, payload)| {
                let mut segment = self.clone();
                segment.payload = payload.to_vec();
                segment.identification = self.identification.wrapping_add(nth as u16);
                segment.sequence = self.sequence.wrapping_add((nth * size) as u32);
                if nth + 1 < count {
                    segment.flags &= !0x09;
                }
                if nth > 0 {
                    segment.flags &= !0x80;
                }
                segment.build()
            })
            .collect()
    }
}

/// RFC 1071, the slow way.
pub(in super::super) fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Whether the packet's checksums are right, the slow way.
pub(in super::super) fn checksums_are_right(bytes: &[u8]) -> bool {
    let Ok(packet) = Packet::parse(bytes) else { return false };
    let transport = &bytes[usize::from(packet.payload_offset)..];
    let mut pseudo = match (packet.source, packet.destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => [a.octets(), b.octets()].concat(),
        (IpAddr::V6(a), IpAddr::V6(b)) => [a.octets(), b.octets()].concat(),
        _ => return false,
    };
    pseudo.extend([0, packet.protocol.unwrap_or(0)]);
    pseudo.extend((transport.len() as u16).to_be_bytes());
    pseudo.extend(transport);
    let network = packet.source.is_ipv6() || checksum(&bytes[..usize::from(packet.payload_offset)]) == [0, 0];
    network && checksum(&pseudo) == [0, 0]
}

/// Any packet of one of three flows of each kind.
pub(in super::super) fn any_packet(payload: std::ops::Range<usize>) -> impl proptest::strategy::Strategy<Value = Like> {
    use proptest::{collection::vec, prelude::*};
    (
        (any::<bool>(), any::<bool>(), 1u8..4, any::<u16>(), any::<bool>(), 0u8..4, 60u8..62),
        (any::<u32>(), 0u32..2, any::<u8>(), 0u16..2, vec(any::<u8>(), 0..12), vec(any::<u8>(), payload)),
    )
        .prop_map(
            |(
                (v4, tcp, flow, identification, dont_fragment, class, ttl),
                (sequence, ack, flags, window, options, payload),
            )| {
                Like {
                    v4,
                    tcp,
                    flow,
                    identification,
                    dont_fragment,
                    class,
                    ttl,
                    sequence,
                    ack,
                    flags: flags & !0x06 | 0x10,
                    window,
                    options,
                    payload,
                }
            },
        )
}
