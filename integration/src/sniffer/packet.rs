//! Finds the addresses that a frame shows in clear text, through all encapsulations without encryption.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Wrappings inside one another that are looked through.
const DEPTH: u8 = 4;
const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
/// UDP ports whose payload is an Ethernet frame after 8 bytes: VXLAN, and Linux's default from before the standard.
const VXLAN_PORTS: [u16; 2] = [4789, 8472];

/// Every network-layer address that the frame shows: sources, destinations, ARP and neighbour discovery targets,
/// also of packets inside VLANs, IP-in-IP, GRE and VXLAN, and of those that ICMP errors quote.
pub(crate) fn clear_addresses(frame: &[u8]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    ethernet(frame, DEPTH, &mut found);
    found
}

fn ethernet(frame: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    let mut offset = ETHERNET_HEADER;
    while let Some(kind) = be16(frame, offset - 2) {
        if matches!(kind, 0x8100 | 0x88a8 | 0x9100) {
            offset += VLAN_TAG;
            continue;
        }
        return layer3(kind, frame.get(offset..).unwrap_or_default(), depth, found);
    }
}

fn layer3(ether_type: u16, packet: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    if depth == 0 {
        return;
    }
    match ether_type {
        0x0800 => ipv4(packet, depth, found),
        0x86dd => ipv6(packet, depth, found),
        // ARP for IPv4: sender at 14, target at 24.
        0x0806 => found.extend([14, 24].into_iter().filter_map(|offset| v4(packet, offset))),
        _ => {}
    }
}

fn ipv4(packet: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    found.extend([12, 16].into_iter().filter_map(|offset| v4(packet, offset)));
    let (Some(first), Some(protocol), Some(fragment)) = (packet.first(), packet.get(9), be16(packet, 6)) else {
        return;
    };
    // A later fragment begins in the middle of something.
    if fragment & 0x1fff == 0 {
        let header = usize::from(first & 0xf) * 4;
        layer4(*protocol, packet.get(header..).unwrap_or_default(), depth, found);
    }
}

fn ipv6(packet: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    found.extend([8, 24].into_iter().filter_map(|offset| v6(packet, offset)));
    let Some(mut next) = packet.get(6).copied() else {
        return;
    };
    let mut rest = packet.get(40..).unwrap_or_default();
    // Hop-by-hop, routing, fragment and destination headers stand before what is inside.
    while matches!(next, 0 | 43 | 44 | 60) {
        let (Some(following), Some(length)) = (rest.first(), rest.get(1)) else {
            return;
        };
        if next == 44 && be16(rest, 2).is_none_or(|offset| offset & 0xfff8 != 0) {
            return;
        }
        let header = if next == 44 { 8 } else { (usize::from(*length) + 1) * 8 };
        next = *following;
        rest = rest.get(header..).unwrap_or_default();
    }
    layer4(next, rest, depth, found);
}

fn layer4(protocol: u8, rest: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    let inside = |offset: usize| rest.get(offset..).unwrap_or_default();
    match protocol {
        4 => layer3(0x0800, rest, depth - 1, found),
        41 => layer3(0x86dd, rest, depth - 1, found),
        47 => gre(rest, depth, found),
        17 if be16(rest, 2).is_some_and(|port| VXLAN_PORTS.contains(&port)) && depth > 1 => {
            ethernet(inside(16), depth - 1, found);
        }
        // Errors quote the packet that they are about: unreachable, redirect, time exceeded, parameter problem.
        1 if matches!(rest.first(), Some(3 | 5 | 11 | 12)) => layer3(0x0800, inside(8), depth - 1, found),
        58 => match rest.first() {
            Some(1..=4) => layer3(0x86dd, inside(8), depth - 1, found),
            // Neighbour solicitation and advertisement: the target.
            Some(135 | 136) => found.extend(v6(rest, 8)),
            _ => {}
        },
        _ => {}
    }
}

fn gre(rest: &[u8], depth: u8, found: &mut Vec<IpAddr>) {
    let (Some(flags), Some(kind)) = (be16(rest, 0), be16(rest, 2)) else {
        return;
    };
    // Checksum, key and sequence number are four bytes each, where present.
    let options = [0x8000, 0x2000, 0x1000].into_iter().filter(|bit| flags & bit != 0).count();
    let inside = rest.get(4 + 4 * options..).unwrap_or_default();
    match kind {
        // Bridged Ethernet.
        0x6558 if depth > 1 => ethernet(inside, depth - 1, found),
        _ => layer3(kind, inside, depth - 1, found),
    }
}

fn be16(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

fn v4(bytes: &[u8], offset: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.get(offset..offset + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets).into())
}

fn v6(bytes: &[u8], offset: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(offset..offset + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: [u8; 4] = [10, 244, 1, 2];
    const TARGET: [u8; 4] = [10, 244, 3, 4];

    fn v4_packet(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(SOURCE);
        packet.extend(TARGET);
        packet.extend(payload);
        packet
    }

    fn v6_packet(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet.extend([0xfd; 16]);
        packet.extend([0xfc; 16]);
        packet.extend(payload);
        packet
    }

    fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn shows_target(frame: &[u8]) -> bool {
        clear_addresses(frame).contains(&IpAddr::from(TARGET))
    }

    #[test]
    fn looks_through_every_clear_wrapping() {
        let inner = v4_packet(6, &[]);
        assert!(shows_target(&frame(0x0800, &inner)));
        let tagged = [&[0, 7, 0x08, 0][..], &inner].concat();
        assert!(shows_target(&frame(0x8100, &tagged)));
        assert!(shows_target(&frame(0x88a8, &[&[0, 7, 0x81, 0][..], &tagged].concat())));
        assert!(shows_target(&frame(0x86dd, &v6_packet(4, &inner))));
        assert!(shows_target(&frame(0x86dd, &v6_packet(0, &[&[4, 0, 0, 0, 0, 0, 0, 0][..], &inner].concat()))));
        assert!(shows_target(&frame(0x86dd, &v6_packet(47, &[&[0x20, 0, 8, 0, 1, 2, 3, 4][..], &inner].concat()))));
        let error = [&[3, 4, 0, 0, 0, 0, 0, 0][..], &inner].concat();
        assert!(shows_target(&frame(0x0800, &v4_packet(1, &error))));
        let vxlan = [&[0, 9, 0x21, 0x18, 0, 0, 0, 0][..], &[0; 8], &frame(0x0800, &inner)].concat();
        assert!(shows_target(&frame(0x86dd, &v6_packet(17, &vxlan))));
        let mut arp = vec![0; 24];
        arp.extend(TARGET);
        assert!(shows_target(&frame(0x0806, &arp)));
        let solicitation = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &[0xfe; 16]].concat();
        let found = clear_addresses(&frame(0x86dd, &v6_packet(58, &solicitation)));
        assert!(found.contains(&IpAddr::from([0xfe; 16])));
    }

    #[test]
    fn encrypted_payload_and_later_fragments_show_nothing_more() {
        let inner = v4_packet(6, &[]);
        let udp = [&[0, 1, 0xca, 0x6c, 0, 0, 0, 0][..], &[0; 8], &frame(0x0800, &inner)].concat();
        assert!(!shows_target(&frame(0x86dd, &v6_packet(17, &udp))));
        let mut fragment = v4_packet(4, &v6_packet(59, &[]));
        fragment[7] = 1;
        assert_eq!(clear_addresses(&frame(0x0800, &fragment)).len(), 2);
    }

    #[test]
    fn no_frame_is_too_short_or_too_odd() {
        let vxlan = [&[0, 9, 0x21, 0x18, 0, 0, 0, 0][..], &[0; 8], &frame(0x0800, &v4_packet(6, &[]))].concat();
        let whole = frame(0x8100, &[&[0, 7, 0x86, 0xdd][..], &v6_packet(17, &vxlan)].concat());
        for length in 0..whole.len() {
            for byte in [0, 1, 0x45, 0x81, 0xff] {
                let mut cut = whole[..length].to_vec();
                clear_addresses(&cut);
                if let Some(last) = cut.last_mut() {
                    *last = byte;
                }
                clear_addresses(&cut);
            }
        }
    }
}
