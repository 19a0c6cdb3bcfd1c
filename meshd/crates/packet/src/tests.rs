use proptest::prelude::*;

use super::*;

fn v4(protocol: u8, flags_and_offset: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(payload);
    let len = packet.len() as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    packet
}

fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x62, 0x80, 0, 0, 0, 0, next, 64];
    packet.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    let len = payload.len() as u16;
    packet[4..6].copy_from_slice(&len.to_be_bytes());
    packet
}

const UDP: [u8; 8] = [0x10, 0x01, 0x00, 0x35, 0, 8, 0, 0];
const TCP: [u8; 20] = [0x10, 0x01, 0x00, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0];

#[test]
fn reads_ports_flags_and_addresses() {
    let packet = Packet::parse(&v4(6, 0x4000, &TCP)).unwrap();
    assert_eq!(packet.source, "10.0.0.1".parse::<IpAddr>().unwrap());
    assert_eq!(packet.destination, "10.0.0.2".parse::<IpAddr>().unwrap());
    assert!(packet.dont_fragment);
    assert_eq!((packet.total_len, packet.payload_offset), (40, 20));
    assert_eq!(packet.transport, Transport::Tcp { source: 0x1001, destination: 80, flags: tcp_flags::SYN });
    let packet = Packet::parse(&v6(17, &UDP)).unwrap();
    assert_eq!(packet.destination, "fd00::2".parse::<IpAddr>().unwrap());
    assert_eq!(packet.traffic_class, 0x28);
    assert_eq!(packet.transport, Transport::Udp { source: 0x1001, destination: 53 });
}

#[test]
fn what_lies_beyond_the_stated_length_is_not_the_packets() {
    let mut bytes = v4(17, 0, &UDP);
    let packet = Packet::parse(&bytes).unwrap();
    bytes.extend([0xff; 20]);
    assert_eq!(Packet::parse(&bytes), Ok(packet));
    // A UDP length that reaches into the padding does not.
    bytes[20 + 5] = 9;
    assert_eq!(Packet::parse(&bytes), Err(ParseError::Length));
}

#[test]
fn every_shortening_is_refused() {
    for bytes in [v4(6, 0, &TCP), v6(6, &TCP), v4(17, 0, &UDP), v6(17, &UDP)] {
        for len in 0..bytes.len() {
            let error = Packet::parse(&bytes[..len]).unwrap_err();
            assert!(matches!(error, ParseError::Truncated | ParseError::Version));
        }
    }
}

#[test]
fn extension_headers_are_walked_to_the_protocol() {
    let mut payload = vec![43, 0, 0, 0, 0, 0, 0, 0];
    payload.extend([51, 0, 0, 0, 0, 0, 0, 0]);
    payload.extend([60, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    payload.extend([17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    payload.extend(UDP);
    let packet = Packet::parse(&v6(0, &payload)).unwrap();
    assert_eq!(packet.protocol, Some(17));
    assert_eq!(usize::from(packet.payload_offset), 40 + payload.len() - 8);
    assert!(matches!(packet.transport, Transport::Udp { destination: 53, .. }));
}

#[test]
fn an_unknown_header_ends_the_walk_unread() {
    // What follows looks like TCP, and is not.
    let packet = Packet::parse(&v6(253, &TCP)).unwrap();
    assert_eq!((packet.protocol, packet.transport), (Some(253), Transport::Unknown));
    // Likewise ESP, "no next header", and the other family's ICMP.
    for (bytes, protocol) in [(v6(50, &TCP), 50), (v6(59, &TCP), 59), (v6(1, &TCP), 1), (v4(58, 0, &TCP), 58)] {
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.protocol, packet.transport), (Some(protocol), Transport::Unknown));
    }
}

#[test]
fn too_many_misplaced_or_endless_extension_headers_are_refused() {
    let mut payload = Vec::new();
    for _ in 0..MAX_EXTENSION_HEADERS {
        payload.extend([60, 0, 0, 0, 0, 0, 0, 0]);
    }
    let last = payload.len() - 8;
    payload[last] = 17;
    payload.extend(UDP);
    assert!(Packet::parse(&v6(60, &payload)).is_ok());
    let one_more = [&[60, 0, 0, 0, 0, 0, 0, 0][..], &payload].concat();
    assert_eq!(Packet::parse(&v6(60, &one_more)), Err(ParseError::ExtensionHeaders));
    let hop_by_hop_late = [&[0, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0][..], &UDP].concat();
    assert_eq!(Packet::parse(&v6(60, &hop_by_hop_late)), Err(ParseError::ExtensionHeaders));
    let longer_than_packet = [&[17, 9, 0, 0, 0, 0, 0, 0][..], &UDP].concat();
    assert_eq!(Packet::parse(&v6(60, &longer_than_packet)), Err(ParseError::Truncated));
}

#[test]
fn fragments_are_told_apart() {
    let first = Packet::parse(&v4(17, 0x2000, &UDP)).unwrap();
    assert_eq!(first.fragment, Fragment::First(0x1234));
    assert!(matches!(first.transport, Transport::Udp { .. }));
    let later = Packet::parse(&v4(17, 0x0010, &TCP)).unwrap();
    assert_eq!(later.fragment, Fragment::Later(0x1234));
    assert_eq!(later.transport, Transport::Unknown);

    let header = |next, field: u16| [&[next, 0][..], &field.to_be_bytes(), &[0, 0, 0, 7]].concat();
    let atomic = [header(17, 0), UDP.to_vec()].concat();
    let packet = Packet::parse(&v6(44, &atomic)).unwrap();
    assert_eq!(packet.fragment, Fragment::Whole);
    assert!(matches!(packet.transport, Transport::Udp { .. }));
    let later = [header(17, 0x0101), UDP.to_vec()].concat();
    let packet = Packet::parse(&v6(44, &later)).unwrap();
    assert_eq!(packet.fragment, Fragment::Later(7));
    assert_eq!((packet.protocol, packet.transport), (Some(17), Transport::Unknown));
    // The real protocol stood in the first fragment only.
    let later = [header(60, 0x0100), UDP.to_vec()].concat();
    assert_eq!(Packet::parse(&v6(44, &later)).unwrap().protocol, None);
    let twice = [header(44, 1), header(17, 1), UDP.to_vec()].concat();
    assert_eq!(Packet::parse(&v6(44, &twice)), Err(ParseError::ExtensionHeaders));
}

#[test]
fn fragments_that_cut_or_overwrite_a_transport_header_are_refused() {
    assert_eq!(Packet::parse(&v4(6, 0x2000, &TCP[..16])), Err(ParseError::TinyFragment));
    assert_eq!(Packet::parse(&v4(6, 0x0001, &TCP)), Err(ParseError::TinyFragment));
    // The last fragment of a packet larger than 64 KiB.
    assert_eq!(Packet::parse(&v4(17, 0x1fff, &[0; 64])), Err(ParseError::Length));
}

#[test]
fn source_routes_are_refused() {
    for kind in [0x83, 0x89] {
        let mut bytes = v4(17, 0, &[1, kind, 7, 4, 10, 0, 0, 9]);
        bytes[0] = 0x47;
        bytes.extend(UDP);
        let len = bytes.len() as u16;
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        assert_eq!(Packet::parse(&bytes), Err(ParseError::SourceRouted));
    }
    let mut routing = vec![17, 2, 0, 1];
    routing.extend([0; 20]);
    routing.extend(UDP);
    assert_eq!(Packet::parse(&v6(43, &routing)), Err(ParseError::SourceRouted));
    routing[3] = 0;
    assert!(Packet::parse(&v6(43, &routing)).is_ok());
}

proptest! {
    #[test]
    fn never_reads_beyond_the_stated_length(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        v6 in any::<bool>(),
        next in prop::sample::select(vec![0u8, 1, 6, 17, 43, 44, 50, 51, 58, 59, 60, 132, 253]),
        len in 0u16..220,
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        // Random bytes made likely enough to be packets.
        if let Some(first) = bytes.first_mut() {
            *first = if v6 { 0x60 } else { 0x45 };
        }
        if bytes.len() >= 10 {
            if v6 { bytes[4..6].copy_from_slice(&len.to_be_bytes()); bytes[6] = next; }
            else { bytes[2..4].copy_from_slice(&len.to_be_bytes()); bytes[9] = next; }
        }
        if let Ok(packet) = Packet::parse(&bytes) {
            let total = usize::from(packet.total_len);
            prop_assert!(total <= bytes.len());
            prop_assert!(usize::from(packet.payload_offset) <= total);
            prop_assert_eq!(packet.source.is_ipv4(), packet.destination.is_ipv4());
            // The same without what lies behind, and with something else there.
            prop_assert_eq!(Packet::parse(&bytes[..total]), Ok(packet));
            let other = [&bytes[..total], &tail].concat();
            prop_assert_eq!(Packet::parse(&other), Ok(packet));
            // Ports are where the transport header is, and only then.
            let payload = &bytes[usize::from(packet.payload_offset)..total];
            match packet.transport {
                Transport::Tcp { source, destination, .. }
                | Transport::Udp { source, destination }
                | Transport::Sctp { source, destination } => {
                    prop_assert!(!matches!(packet.fragment, Fragment::Later(_)));
                    prop_assert_eq!(&payload[..4], &[source.to_be_bytes(), destination.to_be_bytes()].concat()[..]);
                }
                Transport::Icmp { kind, code, .. } => prop_assert_eq!(&payload[..2], &[kind, code]),
                Transport::Unknown => {}
            }
        }
    }
}
