//! Errors of the path that the kernel queues on the UDP sockets.

use std::{mem::MaybeUninit, net::SocketAddr, os::fd::AsRawFd as _};

use socket2::Socket;

use super::{
    message::{ControlBuffer, for_each_control, read_address, read_plain},
    udp::UdpSockets,
};

/// The path MTU to `remote` in bytes of outer packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct PathError {
    pub(in super::super) remote: SocketAddr,
    pub(in super::super) mtu: u32,
}

/// Empties the sockets' error queues and calls `report` for paths with a lower MTU than was sent.
pub(in super::super) fn drain_errors(sockets: &UdpSockets, mut report: impl FnMut(PathError)) {
    for socket in [&sockets.v4, &sockets.v6].into_iter().flatten() {
        // An error may stand at the socket without one in the queue; reading it clears it.
        let _ = socket.take_error();
        // Bounded, so that a flood of ICMP errors cannot hold the thread.
        for _ in 0..256 {
            match next_error(socket) {
                Some(Some(error)) => report(error),
                Some(None) => {}
                None => break,
            }
        }
    }
}

/// Takes one entry out of the error queue; `Some(None)` when it is not about a path's MTU.
fn next_error(socket: &Socket) -> Option<Option<PathError>> {
    // SAFETY: all-zero bytes are a valid sockaddr_storage: integers and arrays.
    let mut name: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut control = [ControlBuffer::EMPTY; 4];
    let mut byte = [0u8; 1];
    let mut iovec = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // SAFETY: all-zero bytes are a valid msghdr: null pointers and zero lengths.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of_val(&name) as libc::socklen_t;
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header was set above; every pointer in it is to a local that outlives the call.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if result < 0 {
        return None;
    }
    let mut found = None;
    for_each_control(&header, |level, kind, data| {
        let is_error =
            matches!((level, kind), (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR));
        if is_error && let Some(error) = read_plain::<libc::sock_extended_err>(data) {
            found = (error.ee_errno == libc::EMSGSIZE as u32).then_some(error.ee_info);
        }
    });
    Some(match (found, read_address(&name)) {
        (Some(mtu), Some(remote)) => Some(PathError { remote, mtu }),
        _ => None,
    })
}
