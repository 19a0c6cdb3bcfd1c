//! IPv4 packets as they are sent, byte by byte.

use std::{
    io::Read as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use integration::Namespace;
use socket2::{Domain, Protocol, Socket, Type};

/// IANA's number of SCTP.
pub(crate) const SCTP: u8 = 132;
/// IANA's number of UDP.
pub(crate) const UDP: u8 = 17;
/// IANA's number of ICMP.
pub(crate) const ICMP: u8 = 1;
/// A socket that sends whole packets.
const IPPROTO_RAW: i32 = 255;
/// How long is waited for what should not come.
const PATIENCE: Duration = Duration::from_millis(500);

/// An IPv4 packet; a kernel that sends it fills in the identification.
pub(crate) fn ipv4(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (source, destination) else { panic!("IPv4 only") };
    let mut packet = vec![0x45, 0];
    packet.extend(u16::try_from(payload.len() + 20).unwrap().to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = internet_checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// A UDP datagram, without a checksum.
pub(crate) fn udp(source: u16, destination: u16, data: &[u8]) -> Vec<u8> {
    let mut out = source.to_be_bytes().to_vec();
    out.extend(destination.to_be_bytes());
    out.extend(u16::try_from(data.len() + 8).unwrap().to_be_bytes());
    out.extend([0, 0]);
    out.extend(data);
    out
}

/// An ICMP error, port unreachable, that quotes an IPv4 packet and ends with a number of its own.
pub(crate) fn icmp_error(quoted: &[u8], number: u8) -> Vec<u8> {
    let mut out = vec![3, 3, 0, 0, 0, 0, 0, 0];
    out.extend(quoted);
    out.extend([number; 2]);
    out.resize(out.len().next_multiple_of(2), number);
    let sum = internet_checksum(&out);
    out[2..4].copy_from_slice(&sum.to_be_bytes());
    out
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

/// An SCTP packet that begins an association.
pub(crate) fn sctp_init(source: u16, destination: u16) -> Vec<u8> {
    let mut out = source.to_be_bytes().to_vec();
    out.extend(destination.to_be_bytes());
    // No verification tag yet, and the checksum.
    out.extend([0; 8]);
    // INIT, 20 bytes: tag, window, streams out and in, first number.
    out.extend([1, 0, 0, 20]);
    out.extend(0x1234_5678u32.to_be_bytes());
    out.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let sum = crc32c(&out);
    out[8..12].copy_from_slice(&sum.to_le_bytes());
    out
}

/// An SCTP packet in the middle of an association.
pub(crate) fn sctp_data(source: u16, destination: u16) -> Vec<u8> {
    let mut out = source.to_be_bytes().to_vec();
    out.extend(destination.to_be_bytes());
    out.extend([0, 0, 0, 77, 0, 0, 0, 0]);
    // DATA, whole, 20 bytes: number, stream, sequence, protocol, four bytes.
    out.extend([0, 3, 0, 20, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(b"data");
    let sum = crc32c(&out);
    out[8..12].copy_from_slice(&sum.to_le_bytes());
    out
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// Sends a packet as it is.
pub(crate) fn send(from: &Namespace, packet: &[u8]) {
    let [a, b, c, d] = packet[16..20] else { panic!("no packet") };
    let to = SocketAddr::from((Ipv4Addr::new(a, b, c, d), 0));
    from.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW))).unwrap();
        socket.set_header_included_v4(true).unwrap();
        // What the kernel itself does not send is refused, too.
        let _ = socket.send_to(packet, &to.into());
    });
}

/// Hears all IPv4 packets of one protocol that a namespace receives.
pub(crate) struct Ear(Socket);

impl Ear {
    pub(crate) fn on(place: &Namespace, protocol: u8) -> Self {
        let socket = place.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(i32::from(protocol)))));
        Self(socket.unwrap())
    }

    /// Whether a packet comes that ends with these bytes.
    pub(crate) fn hears(&self, end: &[u8]) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.0.set_read_timeout(Some(left)).unwrap();
            let Ok(length) = (&self.0).read(&mut buffer) else { continue };
            if buffer[..length].ends_with(end) {
                return true;
            }
        }
    }
}
