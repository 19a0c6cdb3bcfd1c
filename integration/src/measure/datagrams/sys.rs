//! Sends and receives datagrams on a connected or bound UDP socket, many per system call.

use std::{io, mem, net::UdpSocket, os::fd::AsRawFd as _, ptr};

/// Messages that one system call takes or gives.
pub(super) const BATCH: usize = 64;

/// Buffers of equal size for one batch.
pub(super) struct Buffers {
    size: usize,
    bytes: Vec<u8>,
    lengths: [usize; BATCH],
}

impl Buffers {
    /// [`BATCH`] buffers of `size` bytes each, zeroed.
    pub(super) fn new(size: usize) -> Self {
        Self { size, bytes: vec![0; size * BATCH], lengths: [0; BATCH] }
    }

    /// All of them.
    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(self.size)
    }

    /// What the last call has received into the first `count`.
    pub(super) fn received(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.size).zip(self.lengths).take(count).map(|(slot, length)| &slot[..length])
    }

    fn parts(&mut self) -> [libc::iovec; BATCH] {
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        for (part, slot) in parts.iter_mut().zip(self.bytes.chunks_exact_mut(self.size)) {
            *part = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
        }
        parts
    }
}

/// Sends the first `count` buffers, whole, by a connected socket. Returns how many went; those that a full queue of the
/// system did not take are not sent again.
pub(super) fn send(socket: &UdpSocket, buffers: &mut Buffers, count: usize) -> io::Result<usize> {
    let mut parts = buffers.parts();
    let mut messages = messages(&mut parts);
    let count = count.min(BATCH);
    // SAFETY: each of the first `count` messages has one part, a buffer of the given length; both outlive the call.
    let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count as libc::c_uint, 0) };
    check(result)
}

/// Receives what is there, up to a batch, and waits for the first as long as the socket's read timeout says. Returns
/// how many came; none after the timeout.
pub(super) fn receive(socket: &UdpSocket, buffers: &mut Buffers) -> io::Result<usize> {
    let mut parts = buffers.parts();
    let mut messages = messages(&mut parts);
    // SAFETY: each message has one part, a buffer of the given length; both outlive the call, and no time is given.
    let result = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            BATCH as libc::c_uint,
            libc::MSG_WAITFORONE,
            ptr::null_mut(),
        )
    };
    let count = match check(result) {
        Ok(count) => count,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
        Err(error) => return Err(error),
    };
    for (length, message) in buffers.lengths.iter_mut().zip(&messages[..count]) {
        *length = message.msg_len as usize;
    }
    Ok(count)
}

/// Sets the receive buffer of the socket in bytes, beyond the system's limit.
pub(super) fn set_receive_buffer(socket: &UdpSocket, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            ptr::from_ref(&bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// One message header for each part.
fn messages(parts: &mut [libc::iovec; BATCH]) -> [libc::mmsghdr; BATCH] {
    // SAFETY: all-zero bytes are a valid mmsghdr: null pointers and zero lengths.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for (message, part) in messages.iter_mut().zip(parts) {
        message.msg_hdr.msg_iov = part;
        message.msg_hdr.msg_iovlen = 1;
    }
    messages
}

fn check(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
