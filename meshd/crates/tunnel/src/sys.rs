//! System calls of the data plane; the only `unsafe` code of the tunnel.

#[cfg(test)]
pub(super) mod count_allocations;
mod message;
#[cfg(test)]
pub(super) mod skewed_clock;
mod tun;
mod udp;
mod udp_errors;

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::eventfd::{EfdFlags, EventFd},
};

pub(super) use tun::TunDevice;
pub(super) use udp::{Lost, RECEIVE, ReceiveBuffers, SendError, Sender, UdpSockets};
pub(super) use udp_errors::drain_errors;

/// Wakes a thread that waits in [`wait`].
#[derive(Debug)]
pub(super) struct Waker(EventFd);

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Wakes the thread, now or as soon as it waits.
    pub(super) fn wake(&self) {
        // Fails only when 2^64 wake-ups are pending; it is awake then.
        let _ = self.0.write(1);
    }

    /// Forgets wake-ups up to now.
    pub(super) fn clear(&self) {
        let _ = self.0.read();
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.0.as_fd()
    }
}

/// Readiness of a descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ready {
    pub(super) readable: bool,
    /// There is an error to be fetched, or the device behind the descriptor is gone.
    pub(super) failed: bool,
}

/// Waits until one of up to three descriptors has something to read or failed, or the time is over.
pub(super) fn wait<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    timeout: Option<Duration>,
) -> io::Result<[Ready; N]> {
    let timeout = timeout.map_or(PollTimeout::NONE, |t| PollTimeout::try_from(t).unwrap_or(PollTimeout::MAX));
    let mut polled = arrayvec::ArrayVec::<PollFd<'_>, N>::new();
    let mut place = [usize::MAX; N];
    for (at, fd) in fds.iter().enumerate() {
        if let Some(fd) = fd {
            place[at] = polled.len();
            polled.push(PollFd::new(*fd, PollFlags::POLLIN));
        }
    }
    match nix::poll::poll(&mut polled, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut ready = [Ready::default(); N];
    for (at, ready) in ready.iter_mut().enumerate() {
        if let Some(events) = polled.get(place[at]).and_then(PollFd::revents) {
            ready.readable = events.contains(PollFlags::POLLIN);
            ready.failed = events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
        }
    }
    Ok(ready)
}

/// Waits until `fd` takes data again, for at most `timeout`.
fn wait_writable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    matches!(nix::poll::poll(&mut fds, timeout), Ok(n) if n > 0)
}

/// Sets a socket option that is an `int`.
fn set_int(fd: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the pointer is to an int that lives through the call, and the length is that of an int.
    let result = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<i32>() as libc::socklen_t)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
