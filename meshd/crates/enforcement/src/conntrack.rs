//! Queries to the kernel's conntrack by ctnetlink: one flow, or all of them.

mod forget;
mod message;

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
        sockopt,
    },
};
use policy::flow::Tuple;

pub(super) use self::message::KnownFlow;
use self::message::{CtReply, answers, may_begin, request};

/// Holds any datagram of a listing: the kernel fills at most 32 KiB at a time.
const BUFFER: usize = 64 << 10;
/// How long a listing may be without a next part.
const PATIENCE_MS: u16 = 2000;

/// A socket to ctnetlink in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Conntrack {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Conntrack {
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        // A host may allow less, and a listing then is read in more parts.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(1 << 20));
        Ok(Self { socket, buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// Whether a packet of this tuple is a reply in a flow that the kernel knows and did not rewrite.
    pub(super) fn is_reply(&mut self, tuple: &Tuple) -> io::Result<bool> {
        let begun = tuple.reversed();
        if !may_begin(&begun) {
            return Ok(false);
        }
        self.sequence = self.sequence.wrapping_add(1);
        self.send(&request(Some(&begun), false, self.sequence))?;
        // The kernel answers within the send: nothing to wait for.
        loop {
            let length = self.receive()?;
            match answers(&self.buffer[..length], self.sequence).next() {
                Some(CtReply::Flow(flow)) => return Ok(flow.tuple == begun && !flow.rewritten),
                Some(CtReply::Done(0 | libc::ENOENT)) => return Ok(false),
                Some(CtReply::Done(error)) => return Err(io::Error::from_raw_os_error(error)),
                // Of an earlier question.
                None => {}
            }
        }
    }

    /// Calls `each` with every flow.
    pub(super) fn dump(&mut self, mut each: impl FnMut(KnownFlow)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.send(&request(None, true, self.sequence))?;
        loop {
            let fd = std::os::fd::AsFd::as_fd(&self.socket);
            let mut wait = [PollFd::new(fd, PollFlags::POLLIN)];
            if poll(&mut wait, PollTimeout::from(PATIENCE_MS))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let length = self.receive()?;
            for answer in answers(&self.buffer[..length], self.sequence) {
                match answer {
                    CtReply::Flow(flow) => each(flow),
                    CtReply::Done(0) => return Ok(()),
                    CtReply::Done(error) => return Err(io::Error::from_raw_os_error(error)),
                }
            }
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        sendto(self.socket.as_raw_fd(), message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

#[cfg(test)]
mod tests;
