//! System calls: unsafe code.

use std::{io, os::fd::OwnedFd};

use tokio::{io::Interest, io::unix::AsyncFd};

/// Registers a descriptor for reading with the current runtime.
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is a valid open descriptor. `AsyncFd` owns it from here on, and nothing replaces, duplicates
    // over or closes it while it does.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(registered?)
}
