//! Packet sockets: send and receive whole frames, in batches.

pub(crate) mod trace;

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

/// From `linux/if_packet.h`; the libc crate lacks some of them.
const PACKET_STATISTICS: libc::c_int = 6;
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const RECEIVE_BUFFER: libc::c_int = 128 << 20;

/// Frames that one system call takes or gives.
pub(crate) const BATCH: usize = 64;

/// A raw packet socket that receives what comes in (not what goes out), from one interface or all.
pub(crate) struct FrameSocket(OwnedFd);

/// Room for a batch of received frames.
pub(crate) struct Slots {
    room: usize,
    bytes: Vec<u8>,
    lengths: [usize; BATCH],
    sources: [libc::sockaddr_ll; BATCH],
    filled: usize,
}

/// A received frame.
pub(crate) struct Frame<'a> {
    /// From the Ethernet header on, as much as there was room for.
    pub(crate) bytes: &'a [u8],
    /// The length that it had.
    pub(crate) length: usize,
    /// Addressed to another machine's MAC: here only because a switch flooded it.
    pub(crate) to_another: bool,
}

impl Slots {
    /// Room for [`BATCH`] frames of at most `room` bytes each; the rest of a longer one is cut off.
    pub(crate) fn new(room: usize) -> Self {
        Self { room, bytes: vec![0; room * BATCH], lengths: [0; BATCH], sources: [NO_ADDRESS; BATCH], filled: 0 }
    }

    /// The received frames.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        let known = self.lengths.iter().zip(&self.sources).take(self.filled);
        self.bytes.chunks(self.room).zip(known).map(|(slot, (length, source))| Frame {
            bytes: &slot[..(*length).min(self.room)],
            length: *length,
            to_another: source.sll_pkttype == libc::PACKET_OTHERHOST,
        })
    }
}

impl FrameSocket {
    /// Opens one in the network namespace of the calling thread.
    pub(crate) fn open(interface: Option<&str>) -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let socket = Self(fd);
        socket.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
        socket.set(libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
        let index = match interface {
            None => 0,
            Some(name) => nix::net::if_::if_nametoindex(CString::new(name)?.as_c_str())?,
        };
        // Opened with protocol 0, it receives nothing before it is bound to its interface.
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index.cast_signed(),
            ..NO_ADDRESS
        };
        // SAFETY: the address is a whole sockaddr_ll and its size is given.
        let result = unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        check(result)?;
        Ok(socket)
    }

    /// Waits until there is something to receive, at most `limit`. Returns whether there is.
    pub(crate) fn await_readable(&self, limit: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.raw(), events: libc::POLLIN, revents: 0 };
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(limit.subsec_nanos().cast_signed()),
        };
        // SAFETY: one pollfd and a timespec that live until the call returns; no signal mask.
        let result = unsafe { libc::ppoll(&raw mut poll, 1, &raw const time, ptr::null()) };
        match check(result) {
            Ok(ready) => Ok(ready > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Receives what is there, up to a batch. Returns whether that was anything.
    pub(crate) fn receive(&self, slots: &mut Slots) -> io::Result<bool> {
        slots.filled = 0;
        let room = slots.room;
        let mut parts = [EMPTY_PART; BATCH];
        for (part, slot) in parts.iter_mut().zip(slots.bytes.chunks_mut(room)) {
            *part = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: room };
        }
        let mut messages = messages(&mut parts);
        for (message, source) in messages.iter_mut().zip(&mut slots.sources) {
            message.msg_hdr.msg_name = ptr::from_mut(source).cast();
            message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        }
        // SAFETY: each message has one part, which is a slot of `room` bytes, and room for one address of the given
        // size; all of them outlive the call.
        let result = unsafe {
            libc::recvmmsg(
                self.raw(),
                messages.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_TRUNC | libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let count = match check(result) {
            Ok(count) => count.unsigned_abs() as usize,
            // An interface that goes down reports so once, and the socket goes on.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
                    || error.raw_os_error() == Some(libc::ENETDOWN) =>
            {
                0
            }
            Err(error) => return Err(error),
        };
        for (length, message) in slots.lengths.iter_mut().zip(&messages[..count]) {
            *length = message.msg_len as usize;
        }
        slots.filled = count;
        Ok(count > 0)
    }

    /// Sends frames; those that the interface does not take are lost, as on a wire.
    pub(crate) fn send(&self, frames: &[Vec<u8>]) {
        for batch in frames.chunks(BATCH) {
            let mut parts = [EMPTY_PART; BATCH];
            for (part, frame) in parts.iter_mut().zip(batch) {
                *part = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
            }
            let mut messages = messages(&mut parts);
            let mut sent = 0;
            while sent < batch.len() {
                // SAFETY: each message has one part, a frame that is only read and outlives the call; the count is
                // that of the messages from `sent` on.
                let result = unsafe {
                    libc::sendmmsg(
                        self.raw(),
                        messages.as_mut_ptr().add(sent),
                        (batch.len() - sent) as libc::c_uint,
                        libc::MSG_DONTWAIT,
                    )
                };
                // An error is that of the first frame: it is skipped.
                sent += check(result).map_or(1, |count| count.unsigned_abs() as usize);
            }
        }
    }

    /// Frames that were lost since the last call because the receive buffer was full.
    pub(crate) fn lost(&self) -> io::Result<u64> {
        // struct tpacket_stats: packets, drops.
        let mut stats = [0u32; 2];
        let mut size = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes into `stats`.
        let result = unsafe {
            libc::getsockopt(self.raw(), libc::SOL_PACKET, PACKET_STATISTICS, stats.as_mut_ptr().cast(), &raw mut size)
        };
        check(result)?;
        Ok(u64::from(stats[1]))
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the value is an int and its size is given.
        let result = unsafe {
            libc::setsockopt(
                self.raw(),
                level,
                option,
                ptr::from_ref(&value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        check(result).map(drop)
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

const NO_ADDRESS: libc::sockaddr_ll = libc::sockaddr_ll {
    sll_family: 0,
    sll_protocol: 0,
    sll_ifindex: 0,
    sll_hatype: 0,
    sll_pkttype: 0,
    sll_halen: 0,
    sll_addr: [0; 8],
};
const EMPTY_PART: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

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

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
