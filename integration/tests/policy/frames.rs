//! Packets of both families in frames that a pod sends from its interface, byte by byte.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use integration::{CniPod, Namespace, Wire};

use crate::raw::{UDP, ipv4, udp};

/// IANA's number of ICMPv6.
pub(crate) const ICMPV6: u8 = 58;
/// All stations.
pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];
/// How long is waited for what should not come.
pub(crate) const PATIENCE: Duration = Duration::from_millis(500);

/// An IPv6 packet with this hop limit.
pub(crate) fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, hops]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// A packet with a UDP datagram.
pub(crate) fn datagram(from: (IpAddr, u16), to: (IpAddr, u16), data: &[u8]) -> Vec<u8> {
    let payload = udp(from.1, to.1, data);
    match (from.0, to.0) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let payload = with_checksum(source, destination, UDP, payload, 6);
            ipv6(source, destination, UDP, 64, &payload)
        }
        (source, destination) => ipv4(source, destination, UDP, &payload),
    }
}

/// The same packet as two fragments of this identification, of which the first one carries `at` bytes of the payload.
pub(crate) fn fragments(packet: &[u8], at: usize, id: u16) -> [Vec<u8>; 2] {
    assert_eq!(at % 8, 0, "offsets count units of eight bytes");
    let eighths = u16::try_from(at / 8).unwrap();
    if packet[0] >> 4 == 4 {
        let (header, payload) = packet.split_at(20);
        return [(0x2000, &payload[..at]), (eighths, &payload[at..])].map(|(flags, part)| {
            let mut out = header.to_vec();
            out[2..4].copy_from_slice(&u16::try_from(20 + part.len()).unwrap().to_be_bytes());
            out[4..6].copy_from_slice(&id.to_be_bytes());
            out[6..8].copy_from_slice(&u16::to_be_bytes(flags));
            out[10..12].fill(0);
            let sum = !folded(sum_of(&out));
            out[10..12].copy_from_slice(&sum.to_be_bytes());
            [&out, part].concat()
        });
    }
    let (header, payload) = packet.split_at(40);
    [(1, &payload[..at]), (eighths << 3, &payload[at..])].map(|(flags, part)| {
        let mut out = header.to_vec();
        out[4..6].copy_from_slice(&u16::try_from(8 + part.len()).unwrap().to_be_bytes());
        out[6] = 44;
        let [high, low] = u16::to_be_bytes(flags);
        let [id_high, id_low] = id.to_be_bytes();
        [&out, &[header[6], 0, high, low, 0, 0, id_high, id_low][..], part].concat()
    })
}

/// An ICMPv6 message from its type on, with its checksum.
pub(crate) fn icmpv6(source: Ipv6Addr, destination: Ipv6Addr, hops: u8, message: Vec<u8>) -> Vec<u8> {
    ipv6(source, destination, ICMPV6, hops, &with_checksum(source, destination, ICMPV6, message, 2))
}

/// The ICMP error that tells the sender of `packet` that its port is closed.
pub(crate) fn port_unreachable(from: IpAddr, to: IpAddr, packet: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let message = [&[1, 4, 0, 0, 0, 0, 0, 0], packet].concat();
            icmpv6(source, destination, 64, message)
        }
        _ => {
            let mut message = [&[3, 3, 0, 0, 0, 0, 0, 0], packet].concat();
            let sum = !folded(sum_of(&message));
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            ipv4(from, to, 1, &message)
        }
    }
}

/// The packet in a frame.
pub(crate) fn frame(to: &[u8], from: &[u8], packet: &[u8]) -> Vec<u8> {
    let kind: &[u8] = if packet[0] >> 4 == 4 { &[0x08, 0x00] } else { &[0x86, 0xdd] };
    [to, from, kind, packet].concat()
}

/// An ARP request or answer (2) of this sender.
pub(crate) fn arp(operation: u8, sender: ([u8; 6], IpAddr), target: IpAddr) -> Vec<u8> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (sender.1, target) else { panic!("IPv4 only") };
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let body = [&head[..], &sender.0, &from.octets(), &[0; 6], &to.octets()].concat();
    [&BROADCAST[..], &sender.0, &[0x08, 0x06], &body].concat()
}

/// The hardware address of a namespace's interface.
pub(crate) fn mac(place: &Namespace, interface: &str) -> [u8; 6] {
    let shown = place.run(&format!("ip -brief link show {interface}")).stdout;
    let text = shown.split_whitespace().find(|word| word.len() == 17 && word.matches(':').count() == 5).unwrap();
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// The link-local address of a namespace's interface.
pub(crate) fn link_local(place: &Namespace, interface: &str) -> Ipv6Addr {
    let shown = place.run(&format!("ip -brief -6 address show dev {interface} scope link")).stdout;
    let address = shown.split_whitespace().find_map(|word| word.strip_suffix("/64")?.parse().ok());
    address.unwrap_or_else(|| panic!("{}: no link-local address in {shown:?}", place.name()))
}

/// The index of a namespace's interface.
pub(crate) fn index(place: &Namespace, interface: &str) -> u32 {
    let shown = place.run(&format!("ip -oneline link show dev {interface}")).stdout;
    shown.split(':').next().and_then(|text| text.trim().parse().ok()).unwrap()
}

/// Name of the host's end of a pod's interface.
pub(crate) fn host_end(pod: &CniPod) -> String {
    let interfaces = pod.result["interfaces"].as_array().unwrap();
    let is_end = |name: &&str| name.starts_with("mesh") || name.starts_with("veth");
    interfaces.iter().filter_map(|one| one["name"].as_str()).find(is_end).unwrap().to_owned()
}

/// All that comes in by an interface.
pub(crate) struct Capture(Wire);

impl Capture {
    pub(crate) fn on(place: &Namespace, interface: &str) -> Self {
        Self(Wire::on(place, interface))
    }

    /// Whether a frame comes that ends with these bytes.
    pub(crate) fn hears(&mut self, end: &[u8]) -> bool {
        self.hears_within(PATIENCE, end)
    }

    /// The same with another patience, for what is sent once and is to come.
    pub(crate) fn hears_within(&mut self, patience: Duration, end: &[u8]) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let frames = self.0.receive(Duration::from_millis(50)).unwrap();
            if frames.iter().any(|frame| frame.ends_with(end)) {
                return true;
            }
        }
        false
    }
}

/// The ICMPv6 or UDP message with its checksum at this place.
fn with_checksum(source: Ipv6Addr, destination: Ipv6Addr, next: u8, mut message: Vec<u8>, at: usize) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    let pseudo = [&source.octets()[..], &destination.octets(), &length.to_be_bytes(), &[0, 0, 0, next]].concat();
    let sum = !folded(sum_of(&pseudo) + sum_of(&message));
    message[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    message
}

fn sum_of(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low))).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
