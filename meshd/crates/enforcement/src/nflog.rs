//! Verdicts that nftables reports through nfnetlink_log: a sample, limited at its source.
//!
//! One thread reads one group. Entries without our prefix belong to another program that uses the same number, and are
//! ignored.

mod message;

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
        sockopt,
    },
    unistd::pipe,
};
use packet::Packet;

use self::message::{acknowledged, bind, reports, settings};
use super::{
    gate::PolicyGate,
    samples::{JudgedPacket, Why},
};

/// Size of a read buffer: the most that the kernel sends at once.
const BUFFER: usize = 128 << 10;
/// The receive buffer in bytes; samples beyond it are lost.
const WAITING: usize = 1 << 20;

/// The reader of one group. Ends when dropped.
#[derive(Debug)]
pub(super) struct Reports {
    /// Closing it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Reports {
    /// Begins to read `group` in the network namespace of this thread.
    ///
    /// # Errors
    /// When the group cannot be had: another program reads it, or the kernel has no nfnetlink_log.
    pub(super) fn start(group: u16, gate: Arc<PolicyGate>) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        // A host may allow less, and more is lost then.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &WAITING);
        let mut buffer = vec![0; BUFFER];
        for message in [bind(group), settings(group)] {
            sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
            // The kernel answers within the send: nothing to wait for.
            let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            acknowledged(&buffer[..length])?;
        }
        let (stopped, stop) = pipe()?;
        let read = move || {
            while let Some(length) = next(&socket, &stopped, &mut buffer) {
                take(&gate, &buffer[..length], Instant::now());
            }
        };
        let thread = std::thread::Builder::new().name("nflog".into()).spawn(read)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("nflog reader thread panicked");
        }
    }
}

/// Waits for the next datagram; `None`: it is over.
fn next(socket: &OwnedFd, stopped: &OwnedFd, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut wait =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
        if wait[1].revents().is_some_and(|events| !events.is_empty()) {
            return None;
        }
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => return Some(length),
            // Lost samples are no harm.
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOBUFS) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot read nflog any more; no further verdicts of nftables are shown");
                return None;
            }
        }
    }
}

fn take(gate: &PolicyGate, datagram: &[u8], now: Instant) {
    let in_force = gate.in_force();
    let Some(in_force) = in_force.as_ref() else { return };
    for report in reports(datagram) {
        if let Ok(packet) = Packet::parse(report.packet) {
            let why = if report.spoofed { Why::Spoofed } else { Why::Policies };
            let seen = JudgedPacket { at: "nftables", side: report.side, packet: &packet, why };
            gate.samples().take(in_force, &seen, report.verdict, now);
        }
    }
}
