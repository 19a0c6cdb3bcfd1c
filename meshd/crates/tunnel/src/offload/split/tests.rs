use proptest::prelude::*;

use super::*;
use crate::offload::packets::{Like, any_packet, checksums_are_right};

/// What the kernel would hand over for `like`, to be cut into segments of `size`.
fn super_packet(like: &Like, size: usize) -> (Vec<u8>, Vnet, GsoKind) {
    let kind = match (like.tcp, like.v4) {
        (true, true) => GsoKind::Tcp4,
        (true, false) => GsoKind::Tcp6,
        (false, _) => GsoKind::Udp,
    };
    let vnet = Vnet::gso(kind, like.header_len() as u16, size as u16, like.network_len() as u16);
    (like.build(), vnet, kind)
}

fn cut(packet: &[u8], vnet: &Vnet, kind: GsoKind) -> Result<Vec<Vec<u8>>, Malformed> {
    let parsed = Packet::parse(packet).map_err(|_| Malformed)?;
    let mut segments = Segments::new(packet, &parsed, vnet, kind)?;
    let mut bytes = packet.to_vec();
    // What lies behind is not ours.
    bytes.extend([0xee; PADDING]);
    let longest = segments.longest();
    let mut cut = Vec::new();
    while let Some(len) = segments.next_len() {
        let segment = segments
            .next(&mut bytes, |segment| {
                let (packet, padded) = (segment.packet(), segment.padded(usize::MAX));
                assert_eq!(padded.len(), len);
                assert!(padded.starts_with(packet) && padded[packet.len()..].iter().all(|b| *b == 0));
                assert!(packet.len() <= longest);
                assert_eq!(segment.padded(packet.len() + 1).len(), padded.len().min(packet.len() + 1));
                packet.to_vec()
            })
            .unwrap();
        cut.push(segment);
    }
    assert_eq!(segments.next(&mut bytes, |_| ()), None);
    assert!(bytes.ends_with(&[0xee; PADDING]));
    Ok(cut)
}

proptest! {
    #[test]
    fn cuts_as_a_naive_sender_would_have(like in any_packet(1..4000), size in 1usize..1500) {
        let (packet, vnet, kind) = super_packet(&like, size);
        prop_assert_eq!(cut(&packet, &vnet, kind), Ok(like.cut(size)));
    }

    #[test]
    fn what_contradicts_itself_is_refused_or_cut_into_whole_packets(
        like in any_packet(1..3000),
        size in 0u16..2000,
        spoilt in prop::collection::vec((0usize..80, any::<u8>()), 0..3),
        header in any::<[u8; 10]>(),
        keep in any::<bool>(),
    ) {
        let (mut packet, mut vnet, _) = super_packet(&like, 1);
        vnet.gso_size = size;
        if !keep {
            vnet = Vnet::read(&header);
        }
        for (at, byte) in spoilt {
            let len = packet.len();
            packet[at % len] = byte;
        }
        let Ok(parsed) = Packet::parse(&packet) else { return Ok(()) };
        packet.truncate(usize::from(parsed.total_len));
        if let Ok(Some(kind)) = vnet.kind()
            && let Ok(segments) = cut(&packet, &vnet, kind)
        {
            for segment in segments {
                prop_assert!(checksums_are_right(&segment));
            }
        }
        let _ = complete_checksum(&mut packet, &vnet);
    }

    #[test]
    fn completes_checksums(like in any_packet(0..100)) {
        let whole = like.build();
        let mut packet = whole.clone();
        let transport = like.network_len();
        let field = if like.tcp { 16 } else { 6 };
        packet[transport + field..][..2].fill(0);
        let addresses = if like.v4 { 12..20 } else { 8..40 };
        let len = (packet.len() - transport) as u16;
        let partial = super::super::checksum::fold(pseudo_header(&packet[addresses], if like.tcp { 6 } else { 17 }, len));
        packet[transport + field..][..2].copy_from_slice(&partial.to_ne_bytes());
        let mut vnet = Vnet::NOTHING;
        vnet.checksum_start = transport as u16;
        vnet.checksum_offset = field as u16;
        complete_checksum(&mut packet, &vnet).unwrap();
        prop_assert!(checksums_are_right(&packet));
        prop_assert!(packet == whole || like.tcp, "UDP and TCP differ in how they write zero only");
    }
}

#[test]
fn vnet_headers_survive_the_way_through_bytes() {
    let vnet = Vnet::gso(GsoKind::Tcp6, 60, 1360, 40);
    let mut bytes = [0; 10];
    vnet.write(&mut bytes);
    assert_eq!(Vnet::read(&bytes), vnet);
    assert_eq!(vnet.kind(), Ok(Some(GsoKind::Tcp6)));
    // The kernel's ECN flag stands beside the kind.
    bytes[1] |= 0x80;
    assert_eq!(Vnet::read(&bytes).kind(), Ok(Some(GsoKind::Tcp6)));
    bytes[1] = 3;
    assert!(Vnet::read(&bytes).kind().is_err());
}
