//! Addresses and control messages of datagrams in system calls.

use std::{
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

use libc::{c_int, c_void};
use socket2::SockAddr;

use super::super::batch::SourceAddress;

/// Room for the control messages that we send or receive with one datagram: address, segment length, overflow count.
pub(super) const CONTROL: usize = 128;

/// Memory aligned as control messages need it.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub(super) struct ControlBuffer([u8; CONTROL]);

impl ControlBuffer {
    /// Nothing in it.
    pub(super) const EMPTY: Self = Self([0; CONTROL]);
}

/// A boxed slice of `len` structures whose fields are integers, arrays and raw pointers.
pub(super) fn zeroed<T: Zeroable>(len: usize) -> Box<[T]> {
    // SAFETY: implementors of Zeroable are valid with all bytes zero.
    (0..len).map(|_| unsafe { MaybeUninit::<T>::zeroed().assume_init() }).collect()
}

/// Types that are valid with all bytes zero.
///
/// # Safety
/// All-zero bytes are a valid value.
pub(super) unsafe trait Zeroable {}
// SAFETY: integers and raw pointers.
unsafe impl Zeroable for libc::mmsghdr {}
// SAFETY: a raw pointer and an integer.
unsafe impl Zeroable for libc::iovec {}
// SAFETY: integers and arrays of integers.
unsafe impl Zeroable for libc::sockaddr_storage {}

/// Types of integers and byte arrays only, which any bytes make a valid value of.
///
/// # Safety
/// Any bytes are a valid value.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for i32 {}
// SAFETY: integers only.
unsafe impl Plain for libc::sock_extended_err {}
// SAFETY: integers only.
unsafe impl Plain for libc::in_pktinfo {}
// SAFETY: integers only.
unsafe impl Plain for libc::in6_pktinfo {}

pub(super) fn read_plain<T: Plain>(data: &[u8]) -> Option<T> {
    if data.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are enough bytes, alignment is not required, and any bytes are a T.
    Some(unsafe { data.as_ptr().cast::<T>().read_unaligned() })
}

/// Calls `each` with level, type and data of every control message that the kernel put behind `header`.
pub(super) fn for_each_control(header: &libc::msghdr, mut each: impl FnMut(c_int, c_int, &[u8])) {
    // SAFETY: the header is one that the kernel filled in; its control buffer is memory we own that is still there.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a pointer to a whole header in the control buffer.
        let (level, kind, len) = unsafe { ((*message).cmsg_level, (*message).cmsg_type, (*message).cmsg_len) };
        // SAFETY: as above; the result is the address behind the header.
        let data = unsafe { libc::CMSG_DATA(message) };
        let header_len = data as usize - message as usize;
        // They are size_t with glibc and socklen_t with musl.
        let (len, control_len): (usize, usize) = (len as _, header.msg_controllen as _);
        let end = header.msg_control as usize + control_len;
        let len = len.saturating_sub(header_len).min(end.saturating_sub(data as usize));
        // SAFETY: the bytes from `data` on are inside the control buffer, as computed in the lines before.
        each(level, kind, unsafe { std::slice::from_raw_parts(data, len) });
        // SAFETY: `message` is a header in the control buffer of `header`.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
}

/// Control data of received datagrams.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RecvMeta {
    /// The address they came to.
    pub(super) source: Option<SourceAddress>,
    /// Length of each of several datagrams.
    pub(super) stride: Option<usize>,
    /// Datagrams that this socket has lost so far for want of room.
    pub(super) overflows: Option<u32>,
}

/// Reads the control messages of datagrams received from `from`.
pub(super) fn read_beside(header: &libc::msghdr, from: SocketAddr) -> RecvMeta {
    let mut beside = RecvMeta::default();
    for_each_control(header, |level, kind, data| match (level, kind) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            if let Some(info) = read_plain::<libc::in_pktinfo>(data) {
                beside.source = Some(SourceAddress {
                    address: IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))),
                    interface: 0,
                });
            }
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            if let Some(info) = read_plain::<libc::in6_pktinfo>(data) {
                let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                beside.source = Some(SourceAddress {
                    address: IpAddr::V6(address),
                    interface: if is_link_local(from) || address.is_unicast_link_local() {
                        info.ipi6_ifindex
                    } else {
                        0
                    },
                });
            }
        }
        (libc::SOL_UDP, libc::UDP_GRO) => {
            beside.stride = read_plain::<i32>(data).and_then(|len| usize::try_from(len).ok()).filter(|len| *len > 0);
        }
        (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => beside.overflows = read_plain::<u32>(data),
        _ => {}
    });
    beside
}

fn is_link_local(address: SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(a) if a.ip().is_unicast_link_local())
}

/// Writes the control messages that set a datagram's source, and the length that it is to be cut into; returns the
/// length of the control data.
pub(super) fn write_beside(control: &mut ControlBuffer, source: Option<SourceAddress>, segment: Option<u16>) -> usize {
    let mut used = match source.map(|s| (s.address, s.interface)) {
        Some((IpAddr::V4(address), interface)) => write_control(
            control,
            0,
            libc::IPPROTO_IP,
            libc::IP_PKTINFO,
            libc::in_pktinfo {
                ipi_ifindex: interface as c_int,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(address).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            },
        ),
        Some((IpAddr::V6(address), interface)) => write_control(
            control,
            0,
            libc::IPPROTO_IPV6,
            libc::IPV6_PKTINFO,
            libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: address.octets() }, ipi6_ifindex: interface },
        ),
        None => 0,
    };
    if let Some(segment) = segment {
        used = write_control(control, used, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    used
}

/// Writes a control message behind the `used` bytes that are there, and returns how many there are then.
fn write_control<T: Plain>(control: &mut ControlBuffer, used: usize, level: c_int, kind: c_int, value: T) -> usize {
    let len = size_of::<T>() as u32;
    // SAFETY: both only compute lengths.
    let (header_len, space) = unsafe { (libc::CMSG_LEN(len), libc::CMSG_SPACE(len)) };
    let end = used + space as usize;
    assert!(end <= CONTROL && used.is_multiple_of(align_of::<libc::cmsghdr>()));
    let header: *mut libc::cmsghdr = (&raw mut control.0[used]).cast();
    // SAFETY: the buffer and `used` are aligned for a cmsghdr and, as asserted, there is room for the header and the
    // value; CMSG_DATA is the address behind the header in that same buffer.
    unsafe {
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = header_len as _;
        let data: *mut c_void = libc::CMSG_DATA(header).cast();
        data.cast::<T>().write_unaligned(value);
    }
    end
}

pub(super) fn write_address(storage: &mut libc::sockaddr_storage, address: SocketAddr) -> libc::socklen_t {
    let address = SockAddr::from(address);
    let len = address.len();
    // SAFETY: a SockAddr is a sockaddr_storage of which `len` bytes count; it is copied as a whole.
    *storage = unsafe { address.as_ptr().cast::<libc::sockaddr_storage>().read_unaligned() };
    len
}

pub(super) fn read_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let storage: *const libc::sockaddr_storage = storage;
    // SAFETY: a sockaddr_storage is large enough and aligned for either address type, and its family states which one
    // the kernel wrote.
    unsafe {
        match c_int::from((*storage).ss_family) {
            libc::AF_INET => {
                let a = &*storage.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(a.sin_port)).into())
            }
            libc::AF_INET6 => {
                let a = &*storage.cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
                let port = u16::from_be(a.sin6_port);
                Some(SocketAddrV6::new(ip, port, 0, a.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}
