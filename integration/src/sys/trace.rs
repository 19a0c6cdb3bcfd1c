//! ptrace, limited to stops at system calls. One thread, the one that started a program, makes all calls about it.

use std::{io, mem, os::unix::process::CommandExt as _, process::Command, ptr};

use nix::{sys::signal::Signal, unistd::Pid};

/// `struct ptrace_syscall_info` of linux/ptrace.h, as far as it is read: `op` is 1 where a call is entered.
#[repr(C)]
struct CallInfo {
    op: u8,
    _padding: [u8; 3],
    _arch: u32,
    _instruction_pointer: u64,
    _stack_pointer: u64,
    number: u64,
    arguments: [u64; 8],
}

/// A system call that a thread has stopped before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entered {
    pub(crate) number: libc::c_long,
    arguments: [u64; 8],
}

const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
const ENTRY: u8 = 1;

/// The program is traced by the thread that starts it, and stops when it begins.
pub(crate) fn traced(command: &mut Command) -> &mut Command {
    let trace_me = || {
        // SAFETY: the request takes no pointers; it is a plain system call, which may be made between fork and exec.
        match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(trace_me) }
}

/// Has stops at system calls told from others, follows threads, and ends the program when its tracer ends.
pub(crate) fn watch_calls(program: Pid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    // SAFETY: the address is ignored, and the options are a number.
    check(unsafe {
        libc::ptrace(libc::PTRACE_SETOPTIONS, program.as_raw(), ptr::null_mut::<u8>(), options as usize as *mut u8)
    })
}

/// Lets a stopped thread go on, to its next stop at a system call when `to_call`, and gives it a signal.
pub(crate) fn resume(thread: Pid, to_call: bool, signal: Option<Signal>) -> io::Result<()> {
    let request = if to_call { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
    let signal = signal.map_or(0, |signal| signal as usize);
    // SAFETY: the address is ignored, and the signal is a number.
    check(unsafe { libc::ptrace(request, thread.as_raw(), ptr::null_mut::<u8>(), signal as *mut u8) })
}

/// The system call that a thread has stopped before; `None` when it has stopped behind one.
pub(crate) fn entered(thread: Pid) -> io::Result<Option<Entered>> {
    let mut info = mem::MaybeUninit::<CallInfo>::zeroed();
    let size = size_of::<CallInfo>();
    // SAFETY: the kernel writes at most `size` bytes to `info`, which has as many.
    let done = check(unsafe {
        libc::ptrace(GET_SYSCALL_INFO, thread.as_raw(), size as *mut u8, info.as_mut_ptr().cast::<u8>())
    });
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        done => done?,
    }
    // SAFETY: it is plain numbers, and all of it was zero before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    let entered = Entered { number: info.number as libc::c_long, arguments: info.arguments };
    Ok((info.op == ENTRY).then_some(entered))
}

impl Entered {
    /// Whether it connects to a socket in the file system.
    pub(crate) fn connects_to_path(&self, thread: Pid) -> bool {
        // SAFETY: the address is one of the traced program's; the kernel reads there, and fails where nothing is. The
        // word that it returns is -1 only where the call has failed: no address family is 65535.
        let word = || unsafe {
            libc::ptrace(libc::PTRACE_PEEKDATA, thread.as_raw(), self.arguments[1] as *mut u8, ptr::null_mut::<u8>())
        };
        self.number == libc::SYS_connect && word() as u16 == libc::AF_UNIX as u16
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
