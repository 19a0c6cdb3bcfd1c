//! What the micro benchmark times: each step of a packet's way by itself, without system calls.

use std::time::{Duration, Instant};

use super::{
    batch::{Batch, Outgoing, PADDING},
    fuzzing::Pair,
    inbound::Received,
    offload::{Joinable, Merger, Segments, VNET_HEADER, Vnet, vnet::GsoKind},
};

/// Time spent in each step, and what went through it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Steps {
    /// Packets on the wire.
    pub packets: u64,
    /// Their inner bytes.
    pub bytes: u64,
    /// Cutting super-packets, checksums included.
    pub split: Duration,
    /// Parsing, routing, cutting and sealing.
    pub outbound: Duration,
    /// Telling datagrams apart, opening and checking.
    pub inbound: Duration,
    /// Joining, checksums included.
    pub merge: Duration,
}

/// Sends super-packets of `payload` bytes, cut into segments of `size`, from one node to another in memory.
///
/// # Panics
/// When a packet is lost.
#[must_use]
pub fn time_steps(payload: usize, size: u16, rounds: u32) -> Steps {
    let mut pair = Pair::connected();
    let packet = super_packet(payload);
    let vnet = Vnet::gso(GsoKind::Tcp4, 52, size, 20);
    let mut steps = Steps::default();
    let mut merger = Merger::new();
    let mut wire: Vec<u8> = Vec::new();
    let now = Instant::now();
    for _ in 0..rounds {
        let [sender, receiver] = pair.nodes();
        let parsed = policy::packet::Packet::parse(&packet);
        let mut bytes = packet.clone();
        bytes.resize(packet.len() + PADDING, 0);
        let start = Instant::now();
        if let Ok(mut segments) =
            parsed.map_err(drop).and_then(|p| Segments::new(&packet, &p, &vnet, GsoKind::Tcp4).map_err(drop))
        {
            while segments.next(&mut bytes, |segment| std::hint::black_box(segment.packet().len())).is_some() {}
        }
        steps.split += start.elapsed();

        push(&mut sender.batch, &vnet, &packet);
        let start = Instant::now();
        sender.outbound.process(now, &mut sender.batch, &mut sender.out, &mut sender.back, &mut |_| panic!("full"));
        steps.outbound += start.elapsed();

        let received = take(&mut sender.out, &mut wire);
        let received: Vec<Received<'_>> = received
            .into_iter()
            .map(|(range, stride)| Received { bytes: &wire[range], stride, from: sender.address, to: None })
            .collect();
        receiver.batch.clear();
        let start = Instant::now();
        receiver.inbound.process(now, &received, &mut receiver.batch, &mut receiver.out, &mut receiver.queue);
        steps.inbound += start.elapsed();
        receiver.out.clear();

        let start = Instant::now();
        merger.merge(&mut receiver.batch, Joinable { tcp: true, udp: true });
        steps.merge += start.elapsed();
        let delivered = receiver.batch.slots().iter().filter(|slot| slot.drop.is_none());
        let lens = delivered.map(|slot| receiver.batch.bytes(slot).len() as u64);
        let (packets, bytes) = lens.fold((0, 0), |(n, sum), len| (n + 1, sum + len));
        assert_eq!(packets, payload.div_ceil(usize::from(size)) as u64, "packets lost");
        steps.packets += packets;
        steps.bytes += bytes;
    }
    steps
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

/// Moves what is to be sent into `wire`; where each message is there, and the length of its datagrams.
fn take(out: &mut Outgoing, wire: &mut Vec<u8>) -> Vec<(std::ops::Range<usize>, usize)> {
    wire.clear();
    let mut messages = Vec::new();
    for run in out.runs() {
        let start = wire.len();
        wire.extend(out.bytes(run));
        messages.push((start..wire.len(), run.segment as usize));
    }
    out.clear();
    messages
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
