//! ICMP errors for packets that the tunnel cannot carry, written back to the TUN device.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use packet::{Fragment, Packet, Transport, protocol};

/// The error reported to the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Error {
    /// No peer can be reached that owns the destination.
    Unreachable,
    /// Larger than this many bytes.
    TooBig(u16),
}

/// ICMPv4 errors quote this much beyond the header; with IP and ICMP header it stays within 576 bytes (RFC 1812).
const QUOTE_V4: usize = 576 - 28;
/// ICMPv6 errors must fit the minimum MTU (RFC 4443).
const QUOTE_V6: usize = 1280 - 48;

/// Room that [`write()`] wants.
pub(super) const MAX_ERROR: usize = 1280;

/// Writes the error about `packet` (whose bytes are `bytes`) into `out` and returns its length; `None` where none may
/// be sent: about ICMP errors, later fragments, and packets from or to more than one host.
///
/// Its source is the packet's destination: the kernel refuses packets from a device with an address of its own, and
/// only addresses routed to the device pass its reverse path filter.
pub(super) fn write(error: Error, packet: &Packet, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    if matches!(packet.fragment, Fragment::Later(_)) || is_icmp_error(packet) {
        return None;
    }
    match (packet.source, packet.destination) {
        (IpAddr::V4(to), IpAddr::V4(from)) if is_host_v4(to) && is_host_v4(from) => {
            Some(write_v4(error, from, to, bytes, out))
        }
        (IpAddr::V6(to), IpAddr::V6(from)) if is_host_v6(to) && is_host_v6(from) => {
            Some(write_v6(error, from, to, bytes, out))
        }
        _ => None,
    }
}

fn is_host_v4(address: Ipv4Addr) -> bool {
    !address.is_multicast() && !address.is_broadcast() && !address.is_unspecified()
}

fn is_host_v6(address: Ipv6Addr) -> bool {
    !address.is_multicast() && !address.is_unspecified()
}

fn is_icmp_error(packet: &Packet) -> bool {
    match (packet.protocol, packet.transport) {
        // Everything but echo, and the information messages of old.
        (Some(protocol::ICMP), Transport::Icmp { kind, .. }) => !matches!(kind, 0 | 8 | 13 | 14 | 15 | 16 | 17 | 18),
        (Some(protocol::ICMPV6), Transport::Icmp { kind, .. }) => kind < 128,
        (Some(protocol::ICMP | protocol::ICMPV6) | None, _) => true,
        _ => false,
    }
}

fn write_v4(error: Error, from: Ipv4Addr, to: Ipv4Addr, bytes: &[u8], out: &mut [u8]) -> usize {
    let quote = &bytes[..bytes.len().min(QUOTE_V4)];
    let len = 28 + quote.len();
    let (header, icmp) = out[..len].split_at_mut(20);
    header.fill(0);
    header[0] = 0x45;
    header[1] = 0xc0;
    header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    header[8] = 64;
    header[9] = protocol::ICMP;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = checksum(0, header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());

    icmp[..8].fill(0);
    icmp[0] = 3;
    match error {
        Error::Unreachable => icmp[1] = 1,
        Error::TooBig(mtu) => {
            icmp[1] = 4;
            icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
        }
    }
    icmp[8..].copy_from_slice(quote);
    let sum = checksum(0, icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    len
}

fn write_v6(error: Error, from: Ipv6Addr, to: Ipv6Addr, bytes: &[u8], out: &mut [u8]) -> usize {
    let quote = &bytes[..bytes.len().min(QUOTE_V6)];
    let len = 48 + quote.len();
    let (header, icmp) = out[..len].split_at_mut(40);
    header.fill(0);
    header[0] = 0x60;
    header[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    header[6] = protocol::ICMPV6;
    header[7] = 64;
    header[8..24].copy_from_slice(&from.octets());
    header[24..40].copy_from_slice(&to.octets());

    icmp[..8].fill(0);
    match error {
        Error::Unreachable => icmp[0] = 1,
        Error::TooBig(mtu) => {
            icmp[0] = 2;
            icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
        }
    }
    icmp[8..].copy_from_slice(quote);
    let pseudo = (len - 40) as u32 + u32::from(protocol::ICMPV6);
    let pseudo = header[8..40].chunks_exact(2).fold(pseudo, |sum, w| sum + u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum = checksum(pseudo, icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    len
}

/// The Internet checksum of `bytes`, started with `sum`.
fn checksum(sum: u32, bytes: &[u8]) -> u16 {
    let mut words = bytes.chunks_exact(2);
    let mut sum = words.by_ref().fold(sum, |sum, w| sum + u32::from(u16::from_be_bytes([w[0], w[1]])));
    if let [last] = words.remainder() {
        sum += u32::from(*last) << 8;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// At most 50 errors at once and 1000 in a second.
#[derive(Debug)]
pub(super) struct Limit {
    tokens: u32,
    filled: Instant,
}

impl Limit {
    const BURST: u32 = 50;
    const EVERY: Duration = Duration::from_millis(1);

    pub(super) fn new(now: Instant) -> Self {
        Self { tokens: Self::BURST, filled: now }
    }

    pub(super) fn allow(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        let gained = (elapsed.as_nanos() / Self::EVERY.as_nanos()).min(u128::from(Self::BURST));
        if gained > 0 {
            self.tokens = Self::BURST.min(self.tokens + gained as u32);
            self.filled = now;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }
}
