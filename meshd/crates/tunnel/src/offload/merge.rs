//! Merges the segments of a flow into super-packets, so that the kernel processes them in one step.
//!
//! A [`Merger`] groups those packets of one [`Batch`] that one super-packet can represent: splitting it again yields
//! the same byte stream in the same segments. It merges nothing across batches, so no packet ever waits for another.
//! The rules are those of the kernel's own receive offload (`tcp_gro_receive`, `udp_gro_receive`, `inet_gro_receive`):
//!
//! - whole packets with payload and valid checksums, without IPv4 options or IPv6 extension headers;
//! - equal in all fields but length, identification, sequence number, FIN, PSH and checksum. If fragmentation is
//!   allowed, IPv4 identifications increase by one;
//! - TCP: each starts at the end of the previous one; ACK without SYN, RST, URG and CWR; FIN or PSH ends a group;
//! - UDP: with a checksum;
//! - equal payload lengths, except that the last of a group may be shorter.
//!
//! A packet that cannot join its flow's group ends the group and follows it, so that a flow is never reordered. Packets
//! that are neither TCP nor UDP, or not understood, end all groups.

use packet::{Fragment, Packet, Transport};

use super::checksum::{finish, finish_nonzero, fold, pseudo_header, sum};
use crate::{
    batch::{BATCH, Batch, MAX_PACKET},
    vnet::{GsoKind, Vnet},
};

/// Most packets of a group: the kernel's limit for UDP (`UDP_MAX_SEGMENTS`, once 64), and of parts of one write.
pub(in super::super) const MAX_GROUP: usize = 64;
/// Groups that may grow at a time; with more flows than that in a batch, the oldest group is closed.
const OPEN: usize = 64;
const NONE: u16 = u16::MAX;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;

/// The kinds of packets that may be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Joinable {
    pub(in super::super) tcp: bool,
    pub(in super::super) udp: bool,
}

/// Groups the packets of a batch. Keeps nothing from one batch to the next but its memory.
#[derive(Debug)]
pub(in super::super) struct Merger {
    groups: Vec<PacketGroup>,
    /// For each slot the next one of its group.
    next: Vec<u16>,
    /// Flow and group of each group that may still grow.
    open: Vec<(u32, u16)>,
}

/// Packets that are written together, as one.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct PacketGroup {
    head: u16,
    tail: u16,
    count: u16,
    /// Length of the headers, and where in them the transport header starts.
    header_len: u16,
    transport: u16,
    kind: GsoKind,
    /// Payload of each packet but the last.
    size: u16,
    /// Length of headers and payloads.
    len: u32,
    /// The expected sequence number of the next packet; 0 for UDP.
    sequence: u32,
    identification: u16,
    /// Whether the head's checksums were found right.
    verified: bool,
}

/// A packet that may be part of a group.
struct Candidate {
    header_len: usize,
    transport: usize,
    kind: GsoKind,
    payload: usize,
    sequence: u32,
    flags: u8,
}

impl Merger {
    pub(in super::super) fn new() -> Self {
        Self { groups: Vec::with_capacity(BATCH), next: Vec::with_capacity(BATCH), open: Vec::with_capacity(OPEN) }
    }

    /// Groups the packets of `batch` that are not dropped, in an order that keeps that of each flow, and makes the
    /// headers of each group's first packet those of the whole.
    pub(in super::super) fn merge(&mut self, batch: &mut Batch, joinable: Joinable) {
        self.groups.clear();
        self.open.clear();
        self.next.clear();
        self.next.resize(batch.len(), NONE);
        for at in 0..batch.len() {
            let slot = &batch.slots()[at];
            if slot.drop.is_none() {
                self.add(batch, at as u16, joinable);
            }
        }
        for group in &self.groups {
            if group.count > 1 {
                let tail = &batch.slots()[usize::from(group.tail)];
                let last_flags = if group.is_tcp() { batch.bytes(tail)[group.flags_field()] } else { 0 };
                group.write_headers(batch.bytes_mut(usize::from(group.head)), last_flags);
            }
        }
    }

    /// The groups, in the order in which they are to be written.
    pub(in super::super) fn groups(&self) -> &[PacketGroup] {
        &self.groups
    }

    /// Positions of the group's packets in the batch, in order.
    pub(in super::super) fn slots<'a>(&'a self, group: &PacketGroup) -> impl Iterator<Item = usize> + 'a {
        std::iter::successors(Some(group.head), |at| Some(self.next[usize::from(*at)]).filter(|next| *next != NONE))
            .map(usize::from)
    }

    fn add(&mut self, batch: &Batch, at: u16, joinable: Joinable) {
        let slot = &batch.slots()[usize::from(at)];
        let bytes = batch.bytes(slot);
        let Some((packet, flow)) = slot.packet.as_ref().and_then(|p| Some((p, flow(p)?))) else {
            self.open.clear();
            self.push(None, at, bytes);
            return;
        };
        // The newest group is the likeliest one.
        let open = self.open.iter().rposition(|(of, _)| *of == flow);
        let Some(candidate) = Candidate::of(packet, bytes, joinable) else {
            if let Some(open) = open {
                self.open.remove(open);
            }
            self.push(None, at, bytes);
            return;
        };
        if let Some(open) = open {
            let number = usize::from(self.open[open].1);
            let group = &mut self.groups[number];
            let head = batch.bytes(&batch.slots()[usize::from(group.head)]);
            if group.takes(head, &candidate, bytes) {
                self.next[usize::from(group.tail)] = at;
                group.tail = at;
                group.append(&candidate, bytes);
                if group.is_full(&candidate) {
                    self.open.remove(open);
                }
                return;
            }
            self.open.remove(open);
        }
        let closed = candidate.flags & (FIN | PSH) != 0;
        self.push(Some(&candidate), at, bytes);
        if !closed {
            if self.open.len() == OPEN {
                self.open.remove(0);
            }
            self.open.push((flow, self.groups.len() as u16 - 1));
        }
    }

    /// A new group of one packet.
    fn push(&mut self, candidate: Option<&Candidate>, at: u16, bytes: &[u8]) {
        let empty = Candidate { header_len: 0, transport: 0, kind: GsoKind::Udp, payload: 0, sequence: 0, flags: 0 };
        let candidate = candidate.unwrap_or(&empty);
        self.groups.push(PacketGroup {
            head: at,
            tail: at,
            count: 1,
            header_len: candidate.header_len as u16,
            transport: candidate.transport as u16,
            kind: candidate.kind,
            size: candidate.payload as u16,
            len: bytes.len() as u32,
            sequence: candidate.next_sequence(),
            identification: identification(bytes),
            verified: false,
        });
    }
}

impl PacketGroup {
    /// How many packets it is of.
    pub(in super::super) fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether its packets are TCP's; else they are UDP's if there are several.
    pub(in super::super) fn is_tcp(&self) -> bool {
        self.kind != GsoKind::Udp
    }

    /// Length of the headers that only the first packet contributes.
    pub(in super::super) fn header_len(&self) -> usize {
        usize::from(self.header_len)
    }

    /// Its header for the kernel.
    pub(in super::super) fn vnet(&self) -> Vnet {
        if self.count == 1 {
            return Vnet::NOTHING;
        }
        Vnet::gso(self.kind, self.header_len, self.size, self.transport)
    }

    /// Whether the packet continues this group, of which `head` is the first one.
    fn takes(&mut self, head: &[u8], candidate: &Candidate, bytes: &[u8]) -> bool {
        let fits = candidate.kind == self.kind
            && candidate.header_len == self.header_len()
            && candidate.sequence == self.sequence
            && candidate.payload <= usize::from(self.size)
            && usize::from(self.count) < MAX_GROUP
            && self.len as usize + candidate.payload <= MAX_PACKET;
        if !fits || !alike(head, bytes, candidate) {
            return false;
        }
        let fixed_id = head[0] >> 4 == 6 || bytes[6] & 0x40 != 0;
        if !fixed_id && identification(bytes) != self.identification.wrapping_add(1) {
            return false;
        }
        let right = |bytes: &[u8], payload: usize| checksums_hold(bytes, candidate, payload);
        if !self.verified {
            self.verified = right(head, usize::from(self.size));
        }
        self.verified && right(bytes, candidate.payload)
    }

    fn append(&mut self, candidate: &Candidate, bytes: &[u8]) {
        self.count += 1;
        self.len += candidate.payload as u32;
        self.sequence = candidate.next_sequence();
        self.identification = identification(bytes);
    }

    /// Whether nothing can come behind the packet that was appended last.
    fn is_full(&self, last: &Candidate) -> bool {
        last.payload < usize::from(self.size) || last.flags & (FIN | PSH) != 0 || usize::from(self.count) == MAX_GROUP
    }

    /// Makes the headers of the first packet those of the whole.
    fn write_headers(&self, head: &mut [u8], last_flags: u8) {
        let pseudo = self.write_lengths(head, self.len as usize);
        if self.is_tcp() {
            head[self.flags_field()] |= last_flags & (FIN | PSH);
        }
        // The kernel completes it, or trusts it if the packet stays here.
        head[self.checksum_field()].copy_from_slice(&fold(pseudo).to_ne_bytes());
    }

    /// Makes the headers of the first packet, `head`, its own again, so that each packet of the group can be written by
    /// itself.
    pub(in super::super) fn restore_head(&self, head: &mut [u8]) {
        let mut total = self.write_lengths(head, head.len());
        if self.is_tcp() {
            // A packet that has one of them is the last of its group.
            head[self.flags_field()] &= !(FIN | PSH);
        }
        head[self.checksum_field()].fill(0);
        total += sum(&head[usize::from(self.transport)..]);
        let checksum = if self.is_tcp() { finish(total) } else { finish_nonzero(total) };
        head[self.checksum_field()].copy_from_slice(&checksum);
    }

    /// Writes the length fields of the headers for a packet of `len` bytes, but not the transport checksum; returns the
    /// sum over the pseudo-header.
    fn write_lengths(&self, head: &mut [u8], len: usize) -> u64 {
        let transport = usize::from(self.transport);
        let transport_len = (len - transport) as u16;
        let (addresses, protocol) = if head[0] >> 4 == 4 {
            head[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            head[10..12].fill(0);
            let checksum = finish(sum(&head[..transport]));
            head[10..12].copy_from_slice(&checksum);
            (12..20, head[9])
        } else {
            head[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
            (8..40, head[6])
        };
        if !self.is_tcp() {
            head[transport + 4..transport + 6].copy_from_slice(&transport_len.to_be_bytes());
        }
        pseudo_header(&head[addresses], protocol, transport_len)
    }

    /// Where TCP's flags are.
    fn flags_field(&self) -> usize {
        usize::from(self.transport) + 13
    }

    fn checksum_field(&self) -> std::ops::Range<usize> {
        let at = usize::from(self.transport) + if self.is_tcp() { 16 } else { 6 };
        at..at + 2
    }
}

impl Candidate {
    fn next_sequence(&self) -> u32 {
        if self.kind == GsoKind::Udp { 0 } else { self.sequence.wrapping_add(self.payload as u32) }
    }

    fn of(packet: &Packet, bytes: &[u8], joinable: Joinable) -> Option<Self> {
        let transport = usize::from(packet.payload_offset);
        let v4 = packet.source.is_ipv4();
        if usize::from(packet.total_len) != bytes.len()
            || packet.fragment != Fragment::Whole
            || transport != if v4 { 20 } else { 40 }
        {
            return None;
        }
        // A reserved flag; it means something to somebody.
        if v4 && bytes[6] & 0x80 != 0 {
            return None;
        }
        match packet.transport {
            Transport::Tcp { flags, .. } if joinable.tcp => {
                let header_len = transport + usize::from(bytes[transport + 12] >> 4) * 4;
                let payload = bytes.len() - header_len;
                if payload == 0 || flags & ACK == 0 || flags & !(ACK | PSH | FIN | ECE) != 0 {
                    return None;
                }
                let sequence = bytes[transport + 4..].first_chunk().map(|s| u32::from_be_bytes(*s))?;
                let kind = if v4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
                Some(Self { header_len, transport, kind, payload, sequence, flags })
            }
            Transport::Udp { .. } if joinable.udp => {
                let header_len = transport + 8;
                let payload = bytes.len() - header_len;
                let stated = u16::from_be_bytes([bytes[transport + 4], bytes[transport + 5]]);
                let without_checksum = bytes[transport + 6..transport + 8] == [0, 0];
                if payload == 0 || usize::from(stated) != payload + 8 || without_checksum {
                    return None;
                }
                // Datagrams have no order among themselves that could be checked.
                Some(Self { header_len, transport, kind: GsoKind::Udp, payload, sequence: 0, flags: 0 })
            }
            _ => None,
        }
    }
}

fn identification(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[4], bytes[5]])
}

/// Whether two packets with headers of the same kind and length differ only in fields that splitting recomputes.
fn alike(a: &[u8], b: &[u8], of: &Candidate) -> bool {
    let same = |range: std::ops::Range<usize>| a[range.clone()] == b[range];
    let network = if of.transport == 20 {
        // Version to class; flags and offset to protocol; addresses.
        same(0..2) && same(6..10) && same(12..20)
    } else {
        // Version, class, flow label; next header, hop limit, addresses.
        same(0..4) && same(6..40)
    };
    let t = of.transport;
    network
        && same(t..t + 4)
        && (of.kind == GsoKind::Udp
            || same(t + 8..t + 13)
                && (a[t + 13] ^ b[t + 13]) & !(FIN | PSH) == 0
                && same(t + 14..t + 16)
                && same(t + 18..of.header_len))
}

fn checksums_hold(bytes: &[u8], of: &Candidate, payload: usize) -> bool {
    let (addresses, protocol) = if of.transport == 20 { (12..20, bytes[9]) } else { (8..40, bytes[6]) };
    if of.transport == 20 && fold(sum(&bytes[..20])) != 0xffff {
        return false;
    }
    let covered = of.header_len + payload - of.transport;
    let pseudo = pseudo_header(&bytes[addresses], protocol, covered as u16);
    fold(pseudo + sum(&bytes[of.transport..of.transport + covered])) == 0xffff
}

/// A number that packets of one flow share, and packets of others mostly do not.
fn flow(packet: &Packet) -> Option<u32> {
    let ports = match packet.transport {
        Transport::Tcp { source, destination, .. } => (source, destination, 6),
        Transport::Udp { source, destination } => (source, destination, 17),
        _ => return None,
    };
    if packet.fragment != Fragment::Whole {
        return None;
    }
    let half = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(a) => u64::from(u32::from(a)),
        std::net::IpAddr::V6(a) => {
            let a = u128::from(a);
            a as u64 ^ (a >> 64) as u64
        }
    };
    let ends = u64::from(ports.0) << 32 | u64::from(ports.1) << 16 | ports.2;
    let mut mixed = half(packet.source).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ half(packet.destination)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 32 ^ ends).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Some((mixed >> 32) as u32)
}

#[cfg(test)]
mod tests;
