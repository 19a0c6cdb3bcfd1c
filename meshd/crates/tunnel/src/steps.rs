//! Steps for the micro-benchmarks: each step of a packet's path separately, without system calls.

use std::{hint::black_box, ops::Range, time::Instant};

use arrayvec::ArrayVec;

use super::{
    batch::{Batch, PADDING},
    fuzzing::Pair,
    inbound::Received,
    offload::{Joinable, Merger, Segments},
    sys::RECEIVE,
    vnet::{GsoKind, VNET_HEADER, Vnet},
};

/// A super-packet on its way from one node to another, in memory. The steps follow each other in the order of the methods.
pub struct Steps {
    pair: Pair,
    vnet: Vnet,
    packet: Vec<u8>,
    /// The packet again, with room behind it, to be cut in place.
    scratch: Vec<u8>,
    merger: Merger,
    /// The sent bytes, and each message's position in them with the length of its datagrams.
    wire: Vec<u8>,
    messages: Vec<(Range<usize>, usize)>,
    /// How many packets the super-packet is on the wire.
    packets: usize,
    now: Instant,
}

/// One of them.
pub type Step = fn(&mut Steps);

/// All steps in their order, by name.
pub const STEPS: [(&str, Step); 6] = [
    ("split", Steps::split),
    ("load", Steps::load),
    ("seal", Steps::outbound),
    ("carry", Steps::carry),
    ("open", Steps::inbound),
    ("merge", Steps::merge),
];

impl Steps {
    /// TCP with `payload` bytes, to be cut into segments of `size`.
    #[must_use]
    pub fn new(payload: usize, size: u16) -> Self {
        let packet = super_packet(payload);
        let mut scratch = packet.clone();
        scratch.resize(packet.len() + PADDING, 0);
        Self {
            pair: Pair::connected(),
            vnet: Vnet::gso(GsoKind::Tcp4, 52, size, 20),
            packet,
            scratch,
            merger: Merger::new(),
            wire: Vec::new(),
            messages: Vec::new(),
            packets: payload.div_ceil(usize::from(size)),
            now: Instant::now(),
        }
    }

    /// How many packets the super-packet is on the wire.
    #[must_use]
    pub const fn packets(&self) -> usize {
        self.packets
    }

    /// Cuts it, checksums included.
    ///
    /// # Panics
    /// When it is not cut into all its packets.
    pub fn split(&mut self) {
        let parsed = packet::Packet::parse(&self.packet).ok();
        let segments = parsed.and_then(|parsed| Segments::new(&self.packet, &parsed, &self.vnet, GsoKind::Tcp4).ok());
        let mut count = 0;
        if let Some(mut segments) = segments {
            while segments.next(&mut self.scratch, |segment| black_box(segment.packet().len())).is_some() {
                count += 1;
            }
        }
        assert_eq!(count, self.packets, "not cut");
    }

    /// Puts it into the sender's batch, as if read from its TUN.
    pub fn load(&mut self) {
        let [sender, _] = self.pair.nodes();
        push(&mut sender.batch, &self.vnet, &self.packet);
    }

    /// Parses, routes, cuts and seals what was loaded.
    ///
    /// # Panics
    /// When one system call's worth of room is not enough.
    pub fn outbound(&mut self) {
        let [sender, _] = self.pair.nodes();
        sender
            .outbound
            .process(self.now, &mut sender.batch, &mut sender.out, &mut sender.back, &mut |_| panic!("full"));
    }

    /// Takes what was sealed to where the receiver takes it.
    pub fn carry(&mut self) {
        let [sender, receiver] = self.pair.nodes();
        self.wire.clear();
        self.messages.clear();
        for run in sender.out.runs() {
            let start = self.wire.len();
            self.wire.extend(sender.out.bytes(run));
            self.messages.push((start..self.wire.len(), run.segment as usize));
        }
        sender.out.clear();
        receiver.batch.clear();
    }

    /// Tells the datagrams apart, opens and checks them.
    pub fn inbound(&mut self) {
        let [sender, receiver] = self.pair.nodes();
        let from = sender.address;
        let received: ArrayVec<Received<'_>, RECEIVE> = self
            .messages
            .iter()
            .map(|(range, stride)| Received { bytes: &self.wire[range.clone()], stride: *stride, from, to: None })
            .collect();
        receiver.inbound.process(self.now, &received, &mut receiver.batch, &mut receiver.out, &mut receiver.queue);
        receiver.out.clear();
    }

    /// Joins what was opened, checksums included.
    ///
    /// # Panics
    /// When a packet was lost on the way.
    pub fn merge(&mut self) {
        let [_, receiver] = self.pair.nodes();
        self.merger.merge(&mut receiver.batch, Joinable { tcp: true, udp: true });
        let delivered = receiver.batch.slots().iter().filter(|slot| slot.drop.is_none()).count();
        assert_eq!(delivered, self.packets, "packets lost");
    }
}

fn push(batch: &mut Batch, vnet: &Vnet, packet: &[u8]) {
    batch.clear();
    let room = batch.spare_with_vnet();
    if let Some(header) = room.first_chunk_mut() {
        vnet.write(header);
    }
    room[VNET_HEADER..][..packet.len()].copy_from_slice(packet);
    batch.push_with_vnet(packet.len());
}

/// TCP with timestamps from 10.1.0.1 to 10.2.0.1.
fn super_packet(payload: usize) -> Vec<u8> {
    let len = (52 + payload) as u16;
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 1, 0, 1, 10, 2, 0, 1];
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet.extend([0x10, 0x00, 0x20, 0x00, 0, 0, 0, 1, 0, 0, 0, 1, 0x80, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1]);
    packet.extend((0..payload).map(|n| n as u8));
    packet
}
