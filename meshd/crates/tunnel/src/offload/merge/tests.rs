use proptest::prelude::*;

use super::*;
use crate::{
    batch::{HEADROOM, PADDING},
    offload::{
        packets::{Like, any_packet, checksum, checksums_are_right},
        split::Segments,
    },
};

const ALL: Joinable = Joinable { tcp: true, udp: true };

fn batch(packets: &[Vec<u8>]) -> Batch {
    let mut batch = Batch::new();
    for packet in packets {
        batch.spare()[HEADROOM..][..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), 0);
    }
    for (slot, bytes) in batch.iter_mut() {
        slot.packet = Packet::parse(bytes).ok();
    }
    batch
}

/// What is written to the device: vnet header and packet of each group.
fn merged(packets: &[Vec<u8>], joinable: Joinable) -> Vec<(Vnet, Vec<u8>)> {
    let mut batch = batch(packets);
    let mut merger = Merger::new();
    merger.merge(&mut batch, joinable);
    let group = |group: &PacketGroup| {
        let mut bytes = Vec::new();
        for at in merger.slots(group) {
            let from = if bytes.is_empty() { 0 } else { group.header_len() };
            bytes.extend(batch.bytes_from(at, from));
        }
        assert_eq!(merger.slots(group).count(), group.count());
        (group.vnet(), bytes)
    };
    merger.groups().iter().map(group).collect()
}

/// What comes of it when the kernel cuts what was written.
fn cut_again(written: &[(Vnet, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (vnet, packet) in written {
        let Some(kind) = vnet.kind().unwrap() else {
            all.push(packet.clone());
            continue;
        };
        let parsed = Packet::parse(packet).unwrap();
        assert_eq!(usize::from(parsed.total_len), packet.len());
        assert_eq!(usize::from(vnet.checksum_start), usize::from(parsed.payload_offset));
        if parsed.source.is_ipv4() {
            assert_eq!(checksum(&packet[..20]), [0, 0]);
        }
        // Completing the partial checksum gives the right one.
        let mut whole = packet.clone();
        super::super::split::complete_checksum(&mut whole, vnet).unwrap();
        assert!(checksums_are_right(&whole));
        let mut segments = Segments::new(packet, &parsed, vnet, kind).unwrap();
        let mut bytes = packet.clone();
        bytes.extend([0; PADDING]);
        while let Some(segment) = segments.next(&mut bytes, |s| s.packet().to_vec()) {
            all.push(segment);
        }
    }
    all
}

/// The packets of each flow, in order. Identifications are left out where nothing can be fragmented: they mean nothing
/// there.
fn by_flow(packets: &[Vec<u8>]) -> Vec<Vec<Vec<u8>>> {
    let mut flows: Vec<(Vec<u8>, Vec<Vec<u8>>)> = Vec::new();
    for packet in packets {
        let mut packet = packet.clone();
        let key = if packet[0] >> 4 == 4 { packet[9..24].to_vec() } else { packet[6..44].to_vec() };
        // Hop limit and IPv4 checksum are no part of what makes a flow.
        let key: Vec<u8> =
            if packet[0] >> 4 == 4 { [&key[..1], &key[3..]].concat() } else { [&key[..1], &key[2..]].concat() };
        if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        match flows.iter_mut().find(|(k, _)| *k == key) {
            Some((_, flow)) => flow.push(packet),
            None => flows.push((key, vec![packet])),
        }
    }
    flows.sort();
    flows.into_iter().map(|(_, flow)| flow).collect()
}

/// Streams cut into segments, mixed with each other, with what happens to packets on their way.
fn traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let stream = (any_packet(0..4000), 100usize..1400).prop_map(|(mut like, size)| {
        // Mostly plain data, as what cannot be joined is soon seen.
        if like.flow < 3 {
            like.flags &= !0xa7;
        }
        if like.payload.is_empty() { vec![like.build()] } else { like.cut(size) }
    });
    (prop::collection::vec(stream, 1..8), prop::collection::vec((0u8..40, any::<u16>()), 0..80)).prop_map(
        |(streams, fates)| {
            let mut streams: Vec<_> = streams.into_iter().map(|s| s.into_iter().peekable()).collect();
            let mut fates = fates.into_iter().cycle();
            let mut packets = Vec::new();
            while !streams.is_empty() {
                let (fate, place) = fates.next().unwrap_or((0, 0));
                // Runs of a few packets of one stream.
                let at = usize::from(place) % streams.len();
                for _ in 0..=place % 5 {
                    let Some(mut packet) = streams[at].next() else { break };
                    match fate {
                        0 => continue,
                        1 => {
                            let spoilt = usize::from(place) % packet.len();
                            packet[spoilt] ^= 1 << (place % 8);
                        }
                        2 => packets.push(packet.clone()),
                        _ => {}
                    }
                    if Packet::parse(&packet).is_ok_and(|p| usize::from(p.total_len) == packet.len()) {
                        packets.push(packet);
                    }
                }
                streams.retain_mut(|s| s.peek().is_some());
            }
            packets.truncate(BATCH);
            packets
        },
    )
}

proptest! {
    #[test]
    fn cutting_what_was_joined_gives_back_each_flow(packets in traffic()) {
        let written = merged(&packets, ALL);
        prop_assert_eq!(by_flow(&cut_again(&written)), by_flow(&packets));
    }

    #[test]
    fn what_was_joined_can_be_taken_apart_again(packets in traffic()) {
        let mut batch = batch(&packets);
        let mut merger = Merger::new();
        merger.merge(&mut batch, ALL);
        for group in merger.groups().iter().filter(|group| group.count() > 1) {
            let head = merger.slots(group).next().unwrap();
            group.restore_head(batch.bytes_mut(head));
        }
        for (slot, packet) in batch.slots().iter().zip(&packets) {
            prop_assert_eq!(batch.bytes(slot), packet.as_slice());
        }
    }

    #[test]
    fn joins_a_whole_stream(mut like in any_packet(3000..9000), size in 1000usize..1400) {
        like.flags = 0x18;
        let packets = like.cut(size);
        let written = merged(&packets, ALL);
        prop_assert_eq!(written.len(), 1);
        prop_assert_eq!(usize::from(written[0].0.gso_size), size);
        prop_assert_eq!(cut_again(&written), packets);
    }
}

fn plain(v4: bool, tcp: bool) -> Like {
    Like {
        v4,
        tcp,
        flow: 1,
        identification: 7,
        dont_fragment: true,
        class: 0,
        ttl: 64,
        sequence: 1000,
        ack: 1,
        flags: 0x10,
        window: 100,
        options: vec![1; 12],
        payload: (0..100).collect(),
    }
}

fn counts(packets: &[Like]) -> Vec<usize> {
    let packets: Vec<_> = packets.iter().map(Like::build).collect();
    let mut batch = batch(&packets);
    let mut merger = Merger::new();
    merger.merge(&mut batch, ALL);
    merger.groups().iter().map(PacketGroup::count).collect()
}

#[test]
fn differences_that_cutting_would_not_bring_back_keep_packets_apart() {
    type Change = (&'static str, fn(&mut Like));
    let changes: [Change; 12] = [
        ("class and ECN", |p| p.class ^= 3),
        ("hop limit", |p| p.ttl -= 1),
        ("sequence", |p| p.sequence += 1),
        ("acknowledgment", |p| p.ack += 1),
        ("window", |p| p.window += 1),
        ("options", |p| p.options[0] = 0),
        ("length of options", |p| p.options.truncate(8)),
        ("longer", |p| p.payload.push(0)),
        ("CWR", |p| p.flags |= 0x80),
        ("ECE", |p| p.flags |= 0x40),
        ("RST", |p| p.flags |= 0x04),
        ("no payload", |p| p.payload.clear()),
    ];
    for v4 in [true, false] {
        let first = plain(v4, true);
        let mut second = first.clone();
        second.sequence += 100;
        second.identification += 1;
        assert_eq!(counts(&[first.clone(), second.clone()]), [2]);
        for (what, change) in changes {
            let mut changed = second.clone();
            change(&mut changed);
            assert_eq!(counts(&[first.clone(), changed]), [1, 1], "{what}");
        }
    }
}

#[test]
fn identifications_count_where_fragmenting_is_allowed() {
    let mut first = plain(true, false);
    for (dont_fragment, step, expected) in [
        (true, 1, &[2][..]),
        (true, 0, &[2]),
        (true, 9, &[2]),
        (false, 1, &[2]),
        (false, 0, &[1, 1]),
        (false, 2, &[1, 1]),
    ] {
        first.dont_fragment = dont_fragment;
        let mut second = first.clone();
        second.identification += step;
        assert_eq!(counts(&[first.clone(), second]), expected, "{dont_fragment} {step}");
    }
}

#[test]
fn a_shorter_a_pushed_and_a_last_segment_end_a_group() {
    let next = |p: &Like| {
        let mut next = p.clone();
        next.sequence += p.payload.len() as u32;
        next.identification += 1;
        next
    };
    let a = plain(true, true);
    let b = next(&a);
    for end in [0x08, 0x01, 0] {
        let mut b = b.clone();
        b.flags |= end;
        if end == 0 {
            b.payload.truncate(50);
        }
        let c = next(&b);
        assert_eq!(counts(&[a.clone(), b, c]), [2, 1]);
    }
    // Another flow in between does not, an acknowledgment of the same flow does.
    let mut other = a.clone();
    other.flow = 2;
    assert_eq!(counts(&[a.clone(), other, b.clone()]), [2, 1]);
    let mut ack = b.clone();
    ack.payload.clear();
    assert_eq!(counts(&[a, ack, b]), [1, 1, 1]);
}

#[test]
fn groups_are_bounded_and_switches_are_obeyed() {
    let mut datagrams = vec![plain(false, false); 100];
    assert_eq!(counts(&datagrams), [64, 36]);
    for datagram in &mut datagrams {
        datagram.payload = vec![5; 1300];
    }
    assert_eq!(counts(&datagrams), [50, 50]);
    let packets: Vec<_> = datagrams.iter().map(Like::build).collect();
    assert_eq!(merged(&packets, Joinable { tcp: true, udp: false }).len(), 100);
    let mut bad = packets[..3].to_vec();
    bad[1][60] ^= 1;
    assert_eq!(merged(&bad, ALL).len(), 3);
}
