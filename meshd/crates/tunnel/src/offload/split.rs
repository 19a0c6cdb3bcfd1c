//! Splits a super-packet into segments, in place.
//!
//! Each segment's headers are written directly before its payload, over the end of the previous payload, which is no
//! longer needed: no payload is moved. The rules are those of the kernel's own segmentation (`tcp_gso_segment`,
//! `__udp_gso_segment`, `inet_gso_segment`, `ipv6_gso_segment`): sequence numbers and IPv4 identifications increase,
//! only the last segment has FIN and PSH, only the first has CWR, and all other fields are equal.

use packet::{Packet, Transport};

use super::checksum::{finish, finish_nonzero, pseudo_header, sum, word};
use crate::{
    batch::PADDING,
    vnet::{GsoKind, Vnet},
};

/// Longest headers of a super-packet: those of IPv4 and TCP with all options, or of IPv6 with some extensions.
const MAX_HEADER: usize = 192;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A super-packet, or its offload request, that contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Malformed;

/// How far the cutting of one super-packet has come. The packet's bytes are the caller's, and are to be left alone
/// between the calls.
#[derive(Debug, Clone)]
pub(in super::super) struct Segments {
    header: [u8; MAX_HEADER],
    header_len: usize,
    /// Where the transport header is.
    transport: usize,
    v4: bool,
    tcp: bool,
    /// Payload bytes of each segment but the last.
    size: usize,
    /// Where the next segment's payload starts and the last one's ends.
    at: usize,
    end: usize,
    /// Segments so far.
    nth: u16,
    identification: u16,
    sequence: u32,
    flags: u8,
    /// The sum of pseudo-header and transport header, without the fields that differ between segments.
    constant: u64,
}

/// A segment, with zeros behind it where there is room for padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Segment<'a> {
    padded: &'a [u8],
    len: usize,
}

impl<'a> Segment<'a> {
    /// The packet.
    pub(in super::super) fn packet(&self) -> &'a [u8] {
        &self.padded[..self.len]
    }

    /// The packet and zeros up to a multiple of [`PADDING`], but to no more than `limit` bytes.
    pub(in super::super) fn padded(&self, limit: usize) -> &'a [u8] {
        &self.padded[..self.padded.len().min(limit).max(self.len)]
    }
}

impl Segments {
    /// Prepares to cut `bytes`, of which `packet` and `vnet` tell, as `kind`.
    pub(in super::super) fn new(bytes: &[u8], packet: &Packet, vnet: &Vnet, kind: GsoKind) -> Result<Self, Malformed> {
        let transport = usize::from(packet.payload_offset);
        let v4 = packet.source.is_ipv4();
        let (tcp, of_kind) = match (kind, &packet.transport) {
            (GsoKind::Tcp4, Transport::Tcp { .. }) => (true, v4),
            (GsoKind::Tcp6, Transport::Tcp { .. }) => (true, !v4),
            (GsoKind::Udp, Transport::Udp { .. }) => (false, true),
            _ => return Err(Malformed),
        };
        let whole = packet.fragment == packet::Fragment::Whole;
        let size = usize::from(vnet.gso_size);
        if !of_kind || !whole || size == 0 || usize::from(vnet.checksum_start) != transport || !vnet.needs_checksum {
            return Err(Malformed);
        }
        let transport_len = if tcp { usize::from(bytes[transport + 12] >> 4) * 4 } else { 8 };
        let header_len = transport + transport_len;
        if header_len > MAX_HEADER || header_len >= bytes.len() {
            return Err(Malformed);
        }
        let mut header = [0; MAX_HEADER];
        header[..header_len].copy_from_slice(&bytes[..header_len]);
        let identification = u16::from_be_bytes([header[4], header[5]]);
        let (mut sequence, mut flags) = (0, 0);
        if tcp {
            let field = &mut header[transport + 4..transport + 8];
            sequence = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
            field.fill(0);
            flags = std::mem::take(&mut header[transport + 13]);
            header[transport + 16..transport + 18].fill(0);
        } else {
            header[transport + 4..transport + 8].fill(0);
        }
        let (addresses, protocol) = if v4 { (12..20, header[9]) } else { (8..40, if tcp { 6 } else { 17 }) };
        let constant = pseudo_header(&header[addresses], protocol, 0) + sum(&header[transport..header_len]);
        Ok(Self {
            header,
            header_len,
            transport,
            v4,
            tcp,
            size,
            at: header_len,
            end: bytes.len(),
            nth: 0,
            identification,
            sequence,
            flags,
            constant,
        })
    }

    /// Length of each segment's headers.
    #[cfg(any(test, feature = "testing"))]
    pub(in super::super) fn header_len(&self) -> usize {
        self.header_len
    }

    /// Length of the longest segment.
    pub(in super::super) fn longest(&self) -> usize {
        self.header_len + self.size.min(self.end - self.header_len)
    }

    /// Length of the next segment, padding included; `None` when there is none left.
    pub(in super::super) fn next_len(&self) -> Option<usize> {
        let payload = self.size.min(self.end - self.at);
        (payload > 0).then(|| (self.header_len + payload).next_multiple_of(PADDING))
    }

    /// Makes the next segment in `bytes`, which are the super-packet and at least [`PADDING`] more, and shows it to
    /// `see`. `None` when there is none left.
    pub(in super::super) fn next<R>(&mut self, bytes: &mut [u8], see: impl FnOnce(Segment<'_>) -> R) -> Option<R> {
        let payload = self.size.min(self.end - self.at);
        if payload == 0 {
            return None;
        }
        let start = self.at - self.header_len;
        let segment = &mut bytes[start..self.at + payload];
        self.write_headers(segment, self.at + payload == self.end);
        let len = segment.len();
        self.at += payload;
        self.nth = self.nth.wrapping_add(1);

        // The padding overlaps the next part.
        let padding = len.next_multiple_of(PADDING) - len;
        let mut kept = [0; PADDING];
        kept[..padding].copy_from_slice(&bytes[self.at..self.at + padding]);
        bytes[self.at..self.at + padding].fill(0);
        let seen = see(Segment { padded: &bytes[start..self.at + padding], len });
        bytes[self.at..self.at + padding].copy_from_slice(&kept[..padding]);
        Some(seen)
    }

    fn write_headers(&self, segment: &mut [u8], last: bool) {
        let len = segment.len();
        let (head, payload) = segment.split_at_mut(self.header_len);
        head.copy_from_slice(&self.header[..self.header_len]);
        if self.v4 {
            head[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            head[4..6].copy_from_slice(&self.identification.wrapping_add(self.nth).to_be_bytes());
            head[10..12].fill(0);
            // IP options stand before the transport header.
            let checksum = finish(sum(&head[..self.transport]));
            head[10..12].copy_from_slice(&checksum);
        } else {
            head[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        }
        let transport_len = (len - self.transport) as u16;
        let head = &mut head[self.transport..];
        let mut total = self.constant + word(transport_len) + sum(payload);
        if self.tcp {
            let sequence = self.sequence.wrapping_add(u32::from(self.nth) * self.size as u32);
            let mut flags = self.flags;
            if !last {
                flags &= !(FIN | PSH);
            }
            if self.nth > 0 {
                flags &= !CWR;
            }
            head[4..8].copy_from_slice(&sequence.to_be_bytes());
            head[13] = flags;
            total += word((sequence >> 16) as u16) + word(sequence as u16) + word(u16::from(flags));
            head[16..18].copy_from_slice(&finish(total));
        } else {
            head[4..6].copy_from_slice(&transport_len.to_be_bytes());
            total += word(transport_len);
            head[6..8].copy_from_slice(&finish_nonzero(total));
        }
    }
}

/// Completes the checksum of a packet that is whole otherwise.
pub(in super::super) fn complete_checksum(bytes: &mut [u8], vnet: &Vnet) -> Result<(), Malformed> {
    let start = usize::from(vnet.checksum_start);
    let field = start + usize::from(vnet.checksum_offset);
    if start >= bytes.len() || field + 2 > bytes.len() {
        return Err(Malformed);
    }
    // The field's content, the sum over the pseudo-header, is part of the sum.
    let checksum = finish_nonzero(sum(&bytes[start..]));
    bytes[field..field + 2].copy_from_slice(&checksum);
    Ok(())
}

#[cfg(test)]
mod tests;
