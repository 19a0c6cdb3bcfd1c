//! Stops a program before a chosen system call that changes state.

use std::{
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Command, ExitStatus},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::sys::trace;

/// System calls by which a program changes what others see, or waits for what others change.
const EFFECTS: &[libc::c_long] = &[
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_write,
    libc::SYS_connect,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_openat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_setns,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// What to do with a program that has come to its step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// `SIGKILL`.
    Kill,
    /// It goes on, and is not stopped again.
    GoOn,
}

/// How a program ended that was watched at its steps.
#[derive(Debug, Clone)]
pub struct Steps {
    /// The system calls that it came to, in their order.
    pub calls: Vec<libc::c_long>,
    /// Those of them that connect to a socket in the file system.
    pub requests: Vec<usize>,
    /// Whether it came to the step in question.
    pub reached: bool,
    /// How it ended.
    pub status: ExitStatus,
}

/// Runs a program, with all its threads and without its children, up to before step number `step`, and asks `at` there
/// what to do with it.
///
/// # Errors
/// When it cannot be started or watched.
pub fn run(command: &mut Command, step: usize, at: impl FnOnce() -> Then) -> io::Result<Steps> {
    // A process group of its own, so that only its threads are waited for.
    let child = trace::traced(command.process_group(0)).spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    trace::watch_calls(pid)?;
    trace::resume(pid, true, None)?;
    let mut at = Some(at);
    let (mut calls, mut requests) = (Vec::new(), Vec::new());
    loop {
        match waitpid(Pid::from_raw(-pid.as_raw()), Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(ended, code)) if ended == pid => {
                return Ok(Steps { calls, requests, reached: at.is_none(), status: ExitStatus::from_raw(code << 8) });
            }
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => {
                return Ok(Steps {
                    calls,
                    requests,
                    reached: at.is_none(),
                    status: ExitStatus::from_raw(signal as i32),
                });
            }
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                let call = trace::entered(thread)?.filter(|call| EFFECTS.contains(&call.number) && at.is_some());
                if let Some(call) = call {
                    if call.connects_to_path(thread) {
                        requests.push(calls.len());
                    }
                    if calls.len() == step
                        && let Some(at) = at.take()
                        && at() == Then::Kill
                    {
                        kill(pid, Signal::SIGKILL)?;
                    }
                    calls.push(call.number);
                }
                ignore_gone(trace::resume(thread, at.is_some(), None))?;
            }
            Ok(WaitStatus::PtraceEvent(thread, ..)) => ignore_gone(trace::resume(thread, at.is_some(), None))?,
            Ok(WaitStatus::Stopped(thread, signal)) => {
                // A new thread begins with a stop of its own; everything else is passed on.
                let signal = Some(signal).filter(|signal| *signal != Signal::SIGSTOP);
                ignore_gone(trace::resume(thread, at.is_some(), signal))?;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A thread may be killed at any time.
fn ignore_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        done => done,
    }
}
