//! `struct virtio_net_hdr` (`linux/virtio_net.h`), which precedes every packet of a TUN device.

/// Its length without the fields that only virtio 1 has.
pub(super) const VNET_HEADER: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Only the first segment bears CWR.
const GSO_ECN: u8 = 0x80;

/// The protocol of a super-packet's segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GsoKind {
    Tcp4,
    Tcp6,
    Udp,
}

/// The offload header of an unfinished packet, in either direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Vnet {
    /// The transport checksum is to be completed: its field holds the sum over the pseudo-header only.
    pub(super) needs_checksum: bool,
    gso_type: u8,
    /// Length of all headers; a hint only.
    pub(super) header_len: u16,
    /// Payload bytes of each segment but the last.
    pub(super) gso_size: u16,
    /// Start of the checksummed bytes, and the offset of the checksum field from there.
    pub(super) checksum_start: u16,
    pub(super) checksum_offset: u16,
}

/// A segmentation that was never asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnknownGso;

impl Vnet {
    /// A whole packet with its checksum.
    pub(super) const NOTHING: Self = Self {
        needs_checksum: false,
        gso_type: GSO_NONE,
        header_len: 0,
        gso_size: 0,
        checksum_start: 0,
        checksum_offset: 0,
    };

    /// A super-packet whose transport header starts at `transport`.
    pub(super) fn gso(kind: GsoKind, header_len: u16, gso_size: u16, transport: u16) -> Self {
        let (gso_type, checksum_offset) = match kind {
            GsoKind::Tcp4 => (GSO_TCPV4, 16),
            GsoKind::Tcp6 => (GSO_TCPV6, 16),
            GsoKind::Udp => (GSO_UDP_L4, 6),
        };
        Self { needs_checksum: true, gso_type, header_len, gso_size, checksum_start: transport, checksum_offset }
    }

    /// The kind of segmentation, if any.
    pub(super) fn kind(&self) -> Result<Option<GsoKind>, UnknownGso> {
        match self.gso_type & !GSO_ECN {
            GSO_NONE => Ok(None),
            GSO_TCPV4 => Ok(Some(GsoKind::Tcp4)),
            GSO_TCPV6 => Ok(Some(GsoKind::Tcp6)),
            GSO_UDP_L4 => Ok(Some(GsoKind::Udp)),
            _ => Err(UnknownGso),
        }
    }

    /// Reads the header. Its numbers are in the machine's byte order.
    pub(super) fn read(bytes: &[u8; VNET_HEADER]) -> Self {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            needs_checksum: bytes[0] & NEEDS_CSUM != 0,
            gso_type: bytes[1],
            header_len: number(2),
            gso_size: number(4),
            checksum_start: number(6),
            checksum_offset: number(8),
        }
    }

    /// Writes the header.
    pub(super) fn write(&self, bytes: &mut [u8; VNET_HEADER]) {
        bytes[0] = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        bytes[1] = self.gso_type;
        let numbers = [self.header_len, self.gso_size, self.checksum_start, self.checksum_offset];
        for (at, number) in numbers.into_iter().enumerate() {
            bytes[2 + 2 * at..][..2].copy_from_slice(&number.to_ne_bytes());
        }
    }
}
