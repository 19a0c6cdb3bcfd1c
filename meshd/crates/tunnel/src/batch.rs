//! The units between stages: inner packets, and sealed datagrams.

use std::net::{IpAddr, SocketAddr};

use packet::Packet;

use super::{
    drops::DropReason,
    peer_index::PeerIndex,
    vnet::{VNET_HEADER, Vnet},
};

/// Bytes kept free in front of every inner packet: room for the `virtio_net_hdr` that a TUN device wants.
pub(crate) const HEADROOM: usize = 16;
/// Plaintexts are padded with zeros to a multiple of this (WireGuard, section 5.4.6).
pub(super) const PADDING: usize = 16;
/// Largest IP packet, and largest UDP datagram.
pub(super) const MAX_PACKET: usize = 65535;
/// Most packets of one batch.
pub(super) const BATCH: usize = 256;
/// Bytes of packets after which a batch takes no more. It has room for one more of any size then.
pub(super) const BATCH_BYTES: usize = 256 * 1024;
/// Bytes that WireGuard adds to a plaintext: message header and authentication tag.
pub(super) const OVERHEAD: usize = 32;
/// Room that the protocol engine wants for any message it may make instead of data.
pub(super) const MESSAGE_ROOM: usize = 148;

/// Inner IP packets that arrived together, in order, in one piece of memory.
///
/// A stage takes a packet out by setting [`Slot::drop`]; the bytes stay where they are.
#[derive(Debug)]
pub struct Batch {
    memory: Box<[u8]>,
    used: usize,
    slots: Vec<Slot>,
}

/// A packet of a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    start: u32,
    len: u32,
    /// The parsed headers; `None` until parsed.
    pub packet: Option<Packet>,
    /// Position, in the tables that the batch was processed with, of the peer it goes to or came from.
    pub(super) peer: u32,
    /// The offloads left to us by the kernel, or to the kernel by us.
    pub(super) vnet: Vnet,
    /// Set: a stage took the packet out, for this reason.
    pub drop: Option<DropReason>,
}

impl Slot {
    /// The peer that it came from, or goes to: a number that is the same for packets of one peer within a batch, and
    /// mostly beyond.
    #[must_use]
    pub const fn peer(&self) -> u32 {
        self.peer
    }
}

impl Batch {
    /// An empty batch. Memory is taken from the system as it is first used.
    pub(super) fn new() -> Self {
        Self {
            memory: vec![0; BATCH_BYTES + HEADROOM + MAX_PACKET + OVERHEAD + PADDING].into_boxed_slice(),
            used: 0,
            slots: Vec::with_capacity(BATCH),
        }
    }

    /// Forgets all packets.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.slots.clear();
    }

    /// Whether there is no packet, dropped ones included.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Number of packets, dropped ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of all packets, dropped ones included, with their overhead.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Whether a packet of any size still fits.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < BATCH && self.used <= BATCH_BYTES
    }

    /// Memory for the next packet, its headroom in front; at least `HEADROOM + MAX_PACKET + OVERHEAD` bytes when
    /// [`has_room`](Self::has_room).
    pub(super) fn spare(&mut self) -> &mut [u8] {
        &mut self.memory[self.used..]
    }

    /// Takes the `len` bytes behind the headroom of [`spare`](Self::spare) as a packet, with zeros behind it up to
    /// the next multiple of [`PADDING`].
    pub(super) fn push(&mut self, len: usize, peer: u32) {
        let start = self.used + HEADROOM;
        let padded = len.next_multiple_of(PADDING);
        self.memory[start + len..start + padded].fill(0);
        let vnet = Vnet::NOTHING;
        self.slots.push(Slot { start: start as u32, len: len as u32, packet: None, peer, vnet, drop: None });
        self.used = start + padded;
    }

    /// The packets, to be read and dropped.
    pub fn slots_mut(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    /// The packets.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The packet's bytes.
    #[must_use]
    pub fn bytes(&self, slot: &Slot) -> &[u8] {
        &self.memory[slot.start as usize..][..slot.len as usize]
    }

    /// The bytes of the packet at position `at`.
    pub(super) fn bytes_mut(&mut self, at: usize) -> &mut [u8] {
        let slot = &self.slots[at];
        &mut self.memory[slot.start as usize..][..slot.len as usize]
    }

    /// The same and [`PADDING`] bytes behind it, which are the next packet's headroom or no packet's.
    pub(super) fn bytes_and_padding_mut(&mut self, at: usize) -> &mut [u8] {
        let slot = &self.slots[at];
        &mut self.memory[slot.start as usize..][..slot.len as usize + PADDING]
    }

    /// Packets and their bytes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&mut Slot, &[u8])> {
        let memory = &self.memory;
        self.slots.iter_mut().map(move |slot| {
            let bytes = &memory[slot.start as usize..][..slot.len as usize];
            (slot, bytes)
        })
    }

    /// The packet's bytes with zeros behind them, up to a multiple of [`PADDING`] but to no more than `limit` bytes.
    pub(super) fn padded(&self, slot: &Slot, limit: usize) -> &[u8] {
        let len = slot.len as usize;
        let padded = len.next_multiple_of(PADDING).min(limit).max(len);
        &self.memory[slot.start as usize..][..padded]
    }

    /// Puts [`Slot::vnet`] in front of the packet.
    pub(super) fn write_vnet(&mut self, at: usize) {
        let slot = &self.slots[at];
        let start = slot.start as usize;
        if let Some(header) = self.memory[start - VNET_HEADER..].first_chunk_mut() {
            slot.vnet.write(header);
        }
    }

    /// The packet behind the header of [`write_vnet`](Self::write_vnet), in the form for a TUN device.
    pub(super) fn with_vnet(&self, at: usize) -> &[u8] {
        let slot = &self.slots[at];
        let start = slot.start as usize;
        &self.memory[start - VNET_HEADER..start + slot.len as usize]
    }

    /// The bytes of the packet at position `at` from `from` on.
    pub(super) fn bytes_from(&self, at: usize, from: usize) -> &[u8] {
        &self.bytes(&self.slots[at])[from..]
    }

    /// Room for a packet of any size behind a vnet header, to be read into from a TUN device.
    pub(super) fn spare_with_vnet(&mut self) -> &mut [u8] {
        &mut self.spare()[HEADROOM - VNET_HEADER..][..VNET_HEADER + MAX_PACKET]
    }

    /// Adds the content of [`spare_with_vnet`](Self::spare_with_vnet) as a packet of `len` bytes without the header.
    pub(super) fn push_with_vnet(&mut self, len: usize) {
        let header = self.spare()[HEADROOM - VNET_HEADER..].first_chunk().map_or(Vnet::NOTHING, Vnet::read);
        self.push(len, 0);
        if let Some(slot) = self.slots.last_mut() {
            slot.vnet = header;
        }
    }
}

/// Where a datagram of ours leaves from, so that a peer sees the address it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceAddress {
    pub(super) address: IpAddr,
    /// Interface index; used with link-local addresses only, other sources leave it to the routes.
    pub(super) interface: u32,
}

/// Where a peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) remote: SocketAddr,
    pub(super) source: Option<SourceAddress>,
}

/// Sealed datagrams on their way out, in order, in one piece of memory.
#[derive(Debug)]
pub(super) struct Outgoing {
    memory: Box<[u8]>,
    used: usize,
    runs: Vec<Run>,
}

/// Consecutive datagrams to one destination for one GSO send: of equal length, except that the last may be shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    start: u32,
    len: u32,
    /// Length of each datagram but the last.
    pub(super) segment: u32,
    count: u16,
    pub(super) to: Endpoint,
    /// The receiving peer; `None` for replies to unknown senders (cookies).
    pub(super) peer: Option<PeerIndex>,
    /// Routers may fragment it: the path carries too little for our smallest inner MTU.
    pub(super) without_df: bool,
}

impl Run {
    /// Number of datagrams.
    pub(super) fn count(&self) -> usize {
        usize::from(self.count)
    }

    fn takes(&self, len: usize, to: Endpoint, peer: Option<PeerIndex>, without_df: bool) -> bool {
        let segment = self.segment as usize;
        self.peer == peer
            && len <= segment
            && self.len as usize == segment * self.count()
            && self.count() < MAX_RUN
            && self.len as usize + len <= MAX_RUN_BYTES
            && self.without_df == without_df
            && self.to == to
    }
}

/// Most runs of one [`Outgoing`].
pub(super) const OUTGOING: usize = 256;
/// Bytes of one [`Outgoing`]: enough for all pending packets of a new session.
const OUTGOING_BYTES: usize = 512 * 1024;
/// Most datagrams of a GSO send (`UDP_MAX_SEGMENTS` in `linux/udp.h`, as it was up to 6.8).
const MAX_RUN: usize = 64;
/// Most bytes of a GSO send: it is one UDP datagram to the kernel until it is cut.
const MAX_RUN_BYTES: usize = 65507;

impl Outgoing {
    pub(super) fn new() -> Self {
        Self { memory: vec![0; OUTGOING_BYTES].into_boxed_slice(), used: 0, runs: Vec::with_capacity(OUTGOING) }
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.runs.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// All bytes of a run.
    pub(super) fn bytes(&self, run: &Run) -> &[u8] {
        &self.memory[run.start as usize..][..run.len as usize]
    }

    /// Each datagram of a run.
    pub(super) fn datagrams(&self, run: &Run) -> std::slice::Chunks<'_, u8> {
        self.bytes(run).chunks((run.segment as usize).max(1))
    }

    /// Whether a message of `len` bytes still fits.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.runs.len() < OUTGOING && self.memory.len() - self.used >= len.max(MESSAGE_ROOM)
    }

    /// Room for a message of at most `len` bytes, in which the engine may as well write any handshake message;
    /// `None` when this is full and must be sent first.
    pub(super) fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        let len = len.max(MESSAGE_ROOM);
        if self.runs.len() >= OUTGOING {
            return None;
        }
        self.memory.get_mut(self.used..self.used + len)
    }

    /// Takes the first `len` bytes of [`room`](Self::room) as a datagram.
    pub(super) fn commit(&mut self, len: usize, to: Endpoint, peer: Option<PeerIndex>, without_df: bool) {
        match self.runs.last_mut() {
            Some(run) if run.takes(len, to, peer, without_df) => {
                run.count += 1;
                run.len += len as u32;
            }
            _ => self.runs.push(Run {
                start: self.used as u32,
                len: len as u32,
                segment: len as u32,
                count: 1,
                to,
                peer,
                without_df,
            }),
        }
        self.used += len;
    }
}
