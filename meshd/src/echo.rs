//! ICMP echo (RFC 792, RFC 4443) on a raw socket, to test reachability. Blocking; needs CAP_NET_RAW.

use std::{
    io::{self, ErrorKind, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use nix::{
    libc, setsockopt_impl,
    sys::socket::{setsockopt, sockopt::SetUsize},
};
use socket2::{Domain, Protocol, Socket, Type};

/// How the kernel chooses the size of IPv4 packets, `IP_MTU_DISCOVER`.
#[derive(Debug, Clone, Copy)]
struct Ipv4MtuDiscover;
setsockopt_impl!(Ipv4MtuDiscover, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, usize, SetUsize);

/// The same of IPv6, `IPV6_MTU_DISCOVER`.
#[derive(Debug, Clone, Copy)]
struct Ipv6MtuDiscover;
setsockopt_impl!(Ipv6MtuDiscover, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, usize, SetUsize);

/// Bytes of an IPv4 header without options, of an IPv6 header, and of an echo's own.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const ECHO_HEADER: usize = 8;
/// The length of the token that identifies a reply.
const TOKEN: usize = 8;
/// Smallest whole packet that there is room for all of that in.
pub const MIN_PACKET: u16 = (IPV6_HEADER + ECHO_HEADER + TOKEN) as u16;

/// An echo request.
#[derive(Debug, Clone, Copy)]
pub struct Echo {
    /// The destination.
    pub to: IpAddr,
    /// Length of the whole IP packet in bytes; it is sent with DF. Shorter ones than [`MIN_PACKET`] are filled up.
    pub packet: u16,
    /// How long to wait for the answer.
    pub patience: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EchoError {
    /// Nothing came back in time.
    #[error("no answer")]
    NoAnswer,
    /// The packet is longer than the interface or the route takes.
    #[error("a packet of {0} bytes exceeds the route's MTU")]
    TooLong(u16),
    /// A firewall at the kernel's output hook refused the packet.
    #[error("blocked by a firewall on this machine")]
    Barred,
    /// No route: reported by the kernel, or by a host on the path.
    #[error("no route to host: {0}")]
    NoWay(#[source] io::Error),
    /// There is no socket to be had.
    #[error("cannot send echo requests: {0}; CAP_NET_RAW is required")]
    Socket(#[source] io::Error),
}

impl Echo {
    /// A short request with a patience of a second.
    #[must_use]
    pub const fn to(to: IpAddr) -> Self {
        Self { to, packet: 84, patience: Duration::from_secs(1) }
    }

    /// Asks, and returns how long the answer took.
    ///
    /// # Errors
    /// See [`EchoError`].
    pub fn ask(&self) -> Result<Duration, EchoError> {
        let mut socket = open(self.to).map_err(EchoError::Socket)?;
        let token: [u8; TOKEN] = rand::random();
        let identifier: [u8; 2] = rand::random();
        let request = request(self.to, self.packet, identifier, token);
        let start = Instant::now();
        let connected = socket.connect(&SocketAddr::new(self.to, 0).into());
        connected.and_then(|()| socket.send(&request)).map_err(|error| match error.raw_os_error() {
            Some(libc::EMSGSIZE) => EchoError::TooLong(self.packet),
            Some(libc::EPERM) => EchoError::Barred,
            _ => EchoError::NoWay(error),
        })?;
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let left = self.patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(EchoError::NoAnswer);
            }
            socket.set_read_timeout(Some(left)).map_err(EchoError::Socket)?;
            match socket.read(&mut buffer) {
                Ok(length) if answers(self.to, &buffer[..length], identifier, token) => return Ok(start.elapsed()),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(EchoError::NoWay(error)),
            }
        }
    }
}

/// The outcome of a datagram to a UDP port that does not answer unknown senders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpPort {
    /// The host reported that the port is closed.
    Closed,
    /// A firewall at the kernel's output hook refused the datagram.
    Barred,
    /// No route: reported by a host on the path, or by the kernel.
    NoWay,
    /// Nothing came back, as from a WireGuard port that is open, and from one that a firewall hides.
    Silent,
}

/// Sends a datagram that is no message of any protocol, and waits for a reply or an error for `patience`.
///
/// # Errors
/// When there is no socket to be had.
pub(crate) fn probe_udp(at: SocketAddr, patience: Duration) -> io::Result<UdpPort> {
    let any: IpAddr = if at.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(patience))?;
    let heard = |error: &io::Error| match error.kind() {
        ErrorKind::ConnectionRefused => UdpPort::Closed,
        ErrorKind::PermissionDenied => UdpPort::Barred,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => UdpPort::Silent,
        _ => UdpPort::NoWay,
    };
    if let Err(error) = socket.connect(at).and_then(|()| socket.send(&[0]).map(drop)) {
        return Ok(heard(&error));
    }
    Ok(socket.recv(&mut [0; 16]).map_or_else(|error| heard(&error), |_| UdpPort::Silent))
}

fn open(to: IpAddr) -> io::Result<Socket> {
    // With PROBE the kernel sets DF and uses the interface's MTU, not the learned path MTU.
    if to.is_ipv4() {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        setsockopt(&socket, Ipv4MtuDiscover, &(libc::IP_PMTUDISC_PROBE as usize))?;
        Ok(socket)
    } else {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        setsockopt(&socket, Ipv6MtuDiscover, &(libc::IPV6_PMTUDISC_PROBE as usize))?;
        Ok(socket)
    }
}

/// The ICMP message that makes a packet of `packet` bytes with its IP header.
fn request(to: IpAddr, packet: u16, identifier: [u8; 2], token: [u8; TOKEN]) -> Vec<u8> {
    let header = if to.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
    let length = usize::from(packet.max(MIN_PACKET)) - header;
    let mut message = vec![0; length];
    message[0] = if to.is_ipv4() { 8 } else { 128 };
    message[4..6].copy_from_slice(&identifier);
    message[7] = 1;
    message[ECHO_HEADER..ECHO_HEADER + TOKEN].copy_from_slice(&token);
    if to.is_ipv4() {
        // The kernel sums ICMPv6 itself.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// Whether a packet is the reply to the request.
fn answers(to: IpAddr, received: &[u8], identifier: [u8; 2], token: [u8; TOKEN]) -> bool {
    // IPv4 comes with its header, IPv6 without.
    let (start, kind) = match to {
        IpAddr::V4(_) => (received.first().map_or(0, |first| usize::from(first & 0x0f) * 4), 0),
        IpAddr::V6(_) => (0, 129),
    };
    let message = received.get(start..).unwrap_or_default();
    message.len() >= ECHO_HEADER + TOKEN
        && message[0] == kind
        && message[4..6] == identifier
        && message[ECHO_HEADER..ECHO_HEADER + TOKEN] == token
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    #[test]
    fn a_request_is_as_long_as_asked_for_and_sums_up() {
        for (to, header) in [(V4, 20), (V6, 40)] {
            for packet in [0, MIN_PACKET, 84, 1420, 65_535] {
                let message = request(to, packet, [1, 2], [7; 8]);
                assert_eq!(message.len() + header, usize::from(packet.max(MIN_PACKET)));
            }
        }
        assert_eq!(checksum(&request(V4, 85, [1, 2], [7; 8])), 0);
    }

    #[test]
    fn only_its_own_answer_counts() {
        let answer = |identifier, token| {
            let mut message = request(V4, 84, identifier, token);
            message[0] = 0;
            [&[0x45][..], &[0; 19], &message].concat()
        };
        assert!(answers(V4, &answer([1, 2], [7; 8]), [1, 2], [7; 8]));
        assert!(!answers(V4, &answer([1, 3], [7; 8]), [1, 2], [7; 8]));
        assert!(!answers(V4, &answer([1, 2], [8; 8]), [1, 2], [7; 8]));
        for short in 0..36 {
            assert!(!answers(V4, &answer([1, 2], [7; 8])[..short], [1, 2], [7; 8]), "{short}");
        }
        let mut v6 = request(V6, 84, [1, 2], [7; 8]);
        assert!(!answers(V6, &v6, [1, 2], [7; 8]), "a request is no answer");
        v6[0] = 129;
        assert!(answers(V6, &v6, [1, 2], [7; 8]));
        assert!(!answers(V4, &[0xff], [1, 2], [7; 8]));
    }

    #[test]
    fn loopback_answers_and_a_closed_port_says_so() {
        for address in [Ipv4Addr::LOCALHOST.into(), V6] {
            // A second may go by on a busy machine before the answer is looked for.
            assert!((0..20).any(|_| Echo::to(address).ask().is_ok()), "{address}");
        }
        // Another program may take the port up once it is free.
        let closed = (0..5).any(|_| {
            let bound = UdpSocket::bind("127.0.0.1:0").unwrap();
            let at = bound.local_addr().unwrap();
            assert_eq!(probe_udp(at, Duration::from_millis(50)).unwrap(), UdpPort::Silent);
            drop(bound);
            probe_udp(at, Duration::from_secs(5)).unwrap() == UdpPort::Closed
        });
        assert!(closed);
    }
}
