//! The UDP sockets, one per address family, and system calls for many datagrams at once.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    super::{
        batch::{MAX_PACKET, Outgoing, Run},
        inbound::Received,
        offload::{Switches, switch::Switch},
    },
    message::{CONTROL, ControlBuffer, read_address, read_beside, write_address, write_beside, zeroed},
    set_int, wait_writable,
};

/// The socket buffer in bytes; throughput falls by a third with the default.
const SOCKET_BUFFER: i32 = 7 * 1024 * 1024;
/// Messages received in one call.
pub(in super::super) const RECEIVE: usize = 64;
/// The same for large messages of many datagrams: their content is still in the cache when it is opened. The end of a
/// call splits a super-packet into two writes to the TUN, two steps through the kernel and two acknowledgements. A
/// sender's batch of three TCP super-packets is four messages, since a GSO send carries less than one.
const RECEIVE_LARGE: usize = 4;
/// Bytes of a large message.
const LARGE: usize = 4096;
/// Messages sent in one call.
const SEND: usize = 128;
/// How long a full socket is waited for before its datagrams are dropped.
const FULL_WAIT: Duration = Duration::from_millis(20);

/// The sockets of both families on one port.
#[derive(Debug)]
pub(in super::super) struct UdpSockets {
    pub(super) v4: Option<Socket>,
    pub(super) v6: Option<Socket>,
    port: u16,
}

impl UdpSockets {
    /// Binds both families to `port`, or to one free port that both have when it is 0. A host without one of the
    /// families has a socket for the other.
    pub(in super::super) fn bind(port: u16, mark: Option<u32>, switches: &Switches) -> io::Result<Self> {
        let mut tries = 0;
        loop {
            tries += 1;
            let v4 = optional(bind(Domain::IPV4, port, mark, switches))?;
            let bound = match &v4 {
                Some(socket) => local_port(socket)?,
                None => port,
            };
            match optional(bind(Domain::IPV6, bound, mark, switches)) {
                Ok(v6) => {
                    let port = match (&v4, &v6) {
                        (None, None) => return Err(io::ErrorKind::AddrNotAvailable.into()),
                        (None, Some(socket)) => local_port(socket)?,
                        _ => bound,
                    };
                    return Ok(Self { v4, v6, port });
                }
                // The free port of one family is taken in the other: draw again.
                Err(error) if port == 0 && tries < 16 && error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The port both are bound to.
    pub(in super::super) fn port(&self) -> u16 {
        self.port
    }

    /// Both sockets, to be waited for.
    pub(in super::super) fn fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.v4.as_ref().map(|s| s.as_fd()), self.v6.as_ref().map(|s| s.as_fd())]
    }

    fn socket(&self, v4: bool) -> Option<&Socket> {
        if v4 { self.v4.as_ref() } else { self.v6.as_ref() }
    }
}

/// `None` where the host lacks the family.
fn optional(result: io::Result<Socket>) -> io::Result<Option<Socket>> {
    match result {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn local_port(socket: &Socket) -> io::Result<u16> {
    let address = socket.local_addr()?;
    Ok(address.as_socket().map_or(0, |a| a.port()))
}

fn bind(domain: Domain, port: u16, mark: Option<u32>, switches: &Switches) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    let fd = socket.as_fd();
    let any: SocketAddr = if domain == Domain::IPV4 {
        set_int(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        set_int(fd, libc::IPPROTO_IP, libc::IP_RECVERR, 1)?;
        (Ipv4Addr::UNSPECIFIED, port).into()
    } else {
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1)?;
        (Ipv6Addr::UNSPECIFIED, port).into()
    };
    set_fragmentation(fd, domain == Domain::IPV4, false)?;
    for (force, option) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        if set_int(fd, libc::SOL_SOCKET, force, SOCKET_BUFFER).is_err() {
            set_int(fd, libc::SOL_SOCKET, option, SOCKET_BUFFER)?;
        }
    }
    set_int(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)?;
    if switches.udp_gro.is_on() && set_int(fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_err() {
        switches.udp_gro.missing();
    }
    // A kernel that does not know the option does not know the control message either, and would send one long
    // datagram. 0 is the socket's own default: not to cut.
    if switches.udp_gso.is_on() && set_int(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_err() {
        switches.udp_gso.missing();
    }
    if let Some(mark) = mark {
        set_int(fd, libc::SOL_SOCKET, libc::SO_MARK, mark as i32)?;
    }
    socket.bind(&SockAddr::from(any))?;
    Ok(socket)
}

/// Whether datagrams of this socket may be fragmented, here or on their way.
fn set_fragmentation(fd: BorrowedFd<'_>, v4: bool, allowed: bool) -> io::Result<()> {
    if v4 {
        let value = if allowed { libc::IP_PMTUDISC_DONT } else { libc::IP_PMTUDISC_DO };
        set_int(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value)
    } else {
        let value = if allowed { libc::IPV6_PMTUDISC_WANT } else { libc::IPV6_PMTUDISC_DO };
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value)?;
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, i32::from(!allowed))
    }
}

/// Why a datagram that came was not received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Lost {
    /// Larger than the buffer.
    Truncated,
    /// The socket's buffer was full.
    Overflow,
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum SendError {
    /// The socket stayed full.
    Full,
    /// Larger than the path's MTU; it was sent all the same, in fragments.
    Fragmented,
    /// Larger than the path's MTU, and in fragments it would not go either.
    TooBig,
    /// The kernel would not: no route, no permission, no socket of this family.
    Failed,
    /// The source address is no longer ours; the datagram was sent from another one.
    SourceGone,
}

/// Headers for sending many datagrams in one call.
pub(in super::super) struct Sender {
    headers: Box<[libc::mmsghdr]>,
    iovecs: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[ControlBuffer]>,
    /// The messages of each header: the number of a run, and its datagrams.
    messages: Vec<(u16, u16)>,
}

// SAFETY: the raw pointers in the headers point into the boxes next to them or into an argument of the call that sets
// them, and are followed only within that call.
unsafe impl Send for Sender {}

/// The outcome of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendOutcome {
    Sent,
    /// Not, or not as it should have been; it was reported.
    Failed,
    /// Not for want of room; it was not reported.
    Full,
}

impl Sender {
    pub(in super::super) fn new() -> Self {
        // One more than a call sends, for a datagram that is sent again by itself.
        let headers = SEND + 1;
        Self {
            headers: zeroed(headers),
            iovecs: zeroed(headers),
            names: zeroed(headers),
            controls: vec![ControlBuffer::EMPTY; headers].into_boxed_slice(),
            messages: Vec::with_capacity(SEND),
        }
    }

    /// Sends all datagrams of `out` in order, each run in one piece while `gso` is on, reports to `failed` how many of
    /// a run were not sent, and clears `out`.
    pub(in super::super) fn send(
        &mut self,
        sockets: &UdpSockets,
        gso: &Switch,
        out: &mut Outgoing,
        mut failed: impl FnMut(&Run, SendError, usize),
    ) {
        let kind = |r: &Run| (r.to.remote.is_ipv4(), r.without_df);
        let mut start = 0;
        for runs in out.runs().chunk_by(|a, b| kind(a) == kind(b)) {
            let (v4, without_df) = kind(&runs[0]);
            let numbers = start..start + runs.len();
            start += runs.len();
            let Some(socket) = sockets.socket(v4) else {
                for run in runs {
                    failed(run, SendError::Failed, run.count());
                }
                continue;
            };
            let fd = socket.as_fd();
            // The option is the socket's, and another thread may send meanwhile: its datagrams go without DF as well
            // then, which loses nothing.
            let lifted = without_df && set_fragmentation(fd, v4, true).is_ok();
            for number in numbers {
                let run = &out.runs()[number];
                // Datagrams that may be fragmented cannot use GSO.
                if gso.is_on() && run.count() > 1 && !without_df {
                    self.push(fd, out, number, out.bytes(run), run.count(), gso, &mut failed);
                } else {
                    for datagram in out.datagrams(run) {
                        self.push(fd, out, number, datagram, 1, gso, &mut failed);
                    }
                }
            }
            self.send_messages(fd, out, gso, &mut failed);
            if lifted {
                let _ = set_fragmentation(fd, v4, false);
            }
        }
        out.clear();
    }

    /// Adds a message of `count` datagrams of run `number`, after sending those before it if there is no room.
    #[expect(clippy::too_many_arguments, reason = "what sending takes, and one message")]
    fn push(
        &mut self,
        fd: BorrowedFd<'_>,
        out: &Outgoing,
        number: usize,
        bytes: &[u8],
        count: usize,
        gso: &Switch,
        failed: &mut impl FnMut(&Run, SendError, usize),
    ) {
        if self.messages.len() == SEND {
            self.send_messages(fd, out, gso, failed);
        }
        self.set(self.messages.len(), bytes, &out.runs()[number], count > 1);
        self.messages.push((number as u16, count as u16));
    }

    /// Sends the messages that were pushed.
    fn send_messages(
        &mut self,
        fd: BorrowedFd<'_>,
        out: &Outgoing,
        gso: &Switch,
        failed: &mut impl FnMut(&Run, SendError, usize),
    ) {
        let mut done = 0;
        while done < self.messages.len() {
            let left = self.messages.len() - done;
            // SAFETY: the headers from `done` on were set by `push`; every pointer in them is to memory of this object
            // or of `out`, which outlive the call.
            let result = unsafe { libc::sendmmsg(fd.as_raw_fd(), self.headers[done..].as_mut_ptr(), left as u32, 0) };
            if result > 0 {
                done += result as usize;
                continue;
            }
            let (number, count) = self.messages[done];
            let run = &out.runs()[usize::from(number)];
            let outcome = if count > 1 {
                self.send_run_again(fd, out, done, run, gso, failed)
            } else {
                self.send_one(fd, done, run, failed)
            };
            if outcome == SendOutcome::Full {
                // Waiting longer would delay other peers' datagrams.
                for (number, count) in &self.messages[done..] {
                    failed(&out.runs()[usize::from(*number)], SendError::Full, usize::from(*count));
                }
                break;
            }
            done += 1;
        }
        self.messages.clear();
    }

    /// Sends the run of header `at` again after the kernel refused it, then each datagram by itself. If those succeed,
    /// the kernel has refused an announced offload.
    fn send_run_again(
        &mut self,
        fd: BorrowedFd<'_>,
        out: &Outgoing,
        at: usize,
        run: &Run,
        gso: &Switch,
        failed: &mut impl FnMut(&Run, SendError, usize),
    ) -> SendOutcome {
        let mut waited = false;
        let errno = loop {
            let Err(errno) = self.send_header(fd, at) else { return SendOutcome::Sent };
            match errno {
                libc::EINTR => {}
                libc::EAGAIN | libc::ENOBUFS if waited || !wait_writable(fd, FULL_WAIT) => return SendOutcome::Full,
                libc::EAGAIN | libc::ENOBUFS => waited = true,
                errno => break errno,
            }
        };
        let mut all_sent = true;
        for datagram in out.datagrams(run) {
            self.set(SEND, datagram, run, false);
            match self.send_one(fd, SEND, run, failed) {
                SendOutcome::Sent => {}
                SendOutcome::Failed => all_sent = false,
                SendOutcome::Full => {
                    all_sent = false;
                    failed(run, SendError::Full, 1);
                }
            }
        }
        if all_sent && matches!(errno, libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::EOPNOTSUPP) {
            gso.refused(errno);
        }
        SendOutcome::Failed
    }

    /// Sends the datagram of header `at`, which was not sent yet or refused before.
    fn send_one(
        &mut self,
        fd: BorrowedFd<'_>,
        at: usize,
        run: &Run,
        failed: &mut impl FnMut(&Run, SendError, usize),
    ) -> SendOutcome {
        let mut retried = false;
        loop {
            let Err(errno) = self.send_header(fd, at) else { return SendOutcome::Sent };
            let error = match errno {
                libc::EINTR => continue,
                libc::EAGAIN | libc::ENOBUFS => {
                    if !retried && wait_writable(fd, FULL_WAIT) {
                        retried = true;
                        continue;
                    }
                    return SendOutcome::Full;
                }
                // An error that some earlier datagram met on its way is reported here, once: not this one's.
                _ if !retried => {
                    retried = true;
                    continue;
                }
                libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH
                    if self.headers[at].msg_hdr.msg_controllen != 0 =>
                {
                    failed(run, SendError::SourceGone, 1);
                    self.headers[at].msg_hdr.msg_control = std::ptr::null_mut();
                    self.headers[at].msg_hdr.msg_controllen = 0;
                    if self.send_header(fd, at).is_ok() {
                        return SendOutcome::Failed;
                    }
                    SendError::Failed
                }
                libc::EMSGSIZE if self.send_in_fragments(fd, run, at) => SendError::Fragmented,
                libc::EMSGSIZE => SendError::TooBig,
                _ => SendError::Failed,
            };
            failed(run, error, 1);
            return SendOutcome::Failed;
        }
    }

    /// Sends the message of header `at`, or returns the error number.
    fn send_header(&self, fd: BorrowedFd<'_>, at: usize) -> Result<(), i32> {
        // SAFETY: header `at` was set for the batch that is being sent; every pointer in it is to memory of this object
        // or of that batch.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const self.headers[at].msg_hdr, 0) };
        if sent >= 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    }

    /// Sends the datagram of header `at` without DF, so that nothing is lost while the path's MTU is being learned.
    fn send_in_fragments(&self, fd: BorrowedFd<'_>, run: &Run, at: usize) -> bool {
        let v4 = run.to.remote.is_ipv4();
        if set_fragmentation(fd, v4, true).is_err() {
            return false;
        }
        let sent = self.send_header(fd, at).is_ok();
        if !run.without_df {
            let _ = set_fragmentation(fd, v4, false);
        }
        sent
    }

    /// Makes header `at` that of `bytes`, to be cut as `run` is if `cut`.
    fn set(&mut self, at: usize, bytes: &[u8], run: &Run, cut: bool) {
        let name_len = write_address(&mut self.names[at], run.to.remote);
        self.iovecs[at] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let segment = cut.then_some(run.segment as u16);
        let control_len = write_beside(&mut self.controls[at], run.to.source, segment);
        let header = &mut self.headers[at].msg_hdr;
        header.msg_name = (&raw mut self.names[at]).cast();
        header.msg_namelen = name_len;
        header.msg_iov = &raw mut self.iovecs[at];
        header.msg_iovlen = 1;
        header.msg_control = if control_len == 0 { std::ptr::null_mut() } else { (&raw mut self.controls[at]).cast() };
        header.msg_controllen = control_len as _;
    }
}

/// Buffers and headers for receiving many datagrams in one call.
pub(in super::super) struct ReceiveBuffers {
    headers: Box<[libc::mmsghdr]>,
    iovecs: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[ControlBuffer]>,
    memory: Box<[u8]>,
    /// How many messages to ask for.
    want: usize,
    /// Overflows of each family's socket that were reported.
    overflows: [u32; 2],
}

// SAFETY: the raw pointers in the headers point into the boxes next to them and are set again in every call.
unsafe impl Send for ReceiveBuffers {}

impl ReceiveBuffers {
    /// Memory is taken from the system as it is first used.
    pub(in super::super) fn new() -> Self {
        Self {
            headers: zeroed(RECEIVE),
            iovecs: zeroed(RECEIVE),
            names: zeroed(RECEIVE),
            controls: vec![ControlBuffer::EMPTY; RECEIVE].into_boxed_slice(),
            memory: vec![0; RECEIVE * MAX_PACKET].into_boxed_slice(),
            want: RECEIVE,
            overflows: [0; 2],
        }
    }

    /// Receives up to [`RECEIVE`] pending messages of one family's socket into `into`, which has room for them. `lost`
    /// counts datagrams that were truncated or lost. `gro` is switched off if the kernel fails at it.
    pub(in super::super) fn receive<'a, const N: usize>(
        &'a mut self,
        sockets: &UdpSockets,
        v4: bool,
        gro: &Switch,
        into: &mut arrayvec::ArrayVec<Received<'a>, N>,
        mut lost: impl FnMut(Lost, u64),
    ) {
        let Some(socket) = sockets.socket(v4) else { return };
        for at in 0..self.want {
            self.iovecs[at] =
                libc::iovec { iov_base: (&raw mut self.memory[at * MAX_PACKET]).cast(), iov_len: MAX_PACKET };
            let header = &mut self.headers[at].msg_hdr;
            header.msg_name = (&raw mut self.names[at]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.iovecs[at];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[at]).cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
        }
        // SAFETY: as many headers as are asked for were set above; every pointer in them is to memory of this object,
        // of the length stated.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.want as u32,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).unwrap_or_else(|_| {
            // Most errors mean "no message", or belong to datagrams sent earlier, which the error queue reports. These
            // two are the kernel's refusal of GRO.
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            if matches!(errno, libc::EINVAL | libc::EIO) && gro.is_on() {
                for fd in sockets.fds().into_iter().flatten() {
                    let _ = set_int(fd, libc::SOL_UDP, libc::UDP_GRO, 0);
                }
                gro.refused(errno);
            }
            0
        });
        let mut bytes = 0;
        for at in 0..count {
            let header = &self.headers[at];
            if header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                lost(Lost::Truncated, 1);
                continue;
            }
            let Some(from) = read_address(&self.names[at]) else { continue };
            let beside = read_beside(&header.msg_hdr, from);
            if let Some(overflows) = beside.overflows {
                let seen = &mut self.overflows[usize::from(v4)];
                let new = overflows.wrapping_sub(*seen);
                if new > 0 {
                    lost(Lost::Overflow, new.into());
                    *seen = overflows;
                }
            }
            let len = (header.msg_len as usize).min(MAX_PACKET);
            bytes += len;
            let received = Received {
                bytes: &self.memory[at * MAX_PACKET..][..len],
                stride: beside.stride.unwrap_or(len),
                from,
                to: beside.source,
            };
            let _ = into.try_push(received);
        }
        self.want = if bytes > count * LARGE { RECEIVE_LARGE } else { RECEIVE };
    }
}

#[cfg(test)]
mod tests;
