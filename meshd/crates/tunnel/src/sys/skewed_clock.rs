//! A per-thread clock that tests can move: the WireGuard crate reads the system clock, and treats sessions by their
//! age.

use std::{cell::Cell, time::Duration};

thread_local! {
    static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Moves the calling thread's monotonic clock ahead.
pub(in super::super) fn advance(by: Duration) {
    AHEAD.set(AHEAD.get() + by);
}

/// Takes the place of the C library's, which the standard library and the crate call.
///
/// # Safety
/// As for `clock_gettime`: `at` points to a `timespec` that may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, at: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the arguments are passed on to the system call of the same name, which writes no more than a `timespec`.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, at) };
    // A thread that ends may ask for the time after its storage is gone; it never moved its clock then.
    let ahead = AHEAD.try_with(Cell::get).unwrap_or_default();
    if result == 0 && !ahead.is_zero() && matches!(clock, libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME) {
        // SAFETY: the system call has succeeded, so `at` points to a `timespec`, which it has written.
        let at = unsafe { &mut *at };
        let nanoseconds = at.tv_nsec + libc::c_long::from(ahead.subsec_nanos());
        at.tv_sec += ahead.as_secs() as libc::time_t + nanoseconds / 1_000_000_000;
        at.tv_nsec = nanoseconds % 1_000_000_000;
    }
    result as libc::c_int
}
