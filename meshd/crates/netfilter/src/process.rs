//! Runs `nft`, and other programs that list rulesets, within a deadline.

use std::{
    io::{self, Read, Write as _},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// A ruleset of many thousand rules is listed, and changed, within this.
pub const READ_DEADLINE: Duration = Duration::from_secs(20);
/// A first load of policies for many pods is done within this.
pub const LOAD_DEADLINE: Duration = Duration::from_secs(60);

/// How often a program is looked at that has closed its output and has not exited.
const LOOK: Duration = Duration::from_millis(1);

/// A failed run of `nft`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// The program cannot be started.
    #[error("cannot run nft ({0}): install the package nftables")]
    Start(#[source] io::Error),
    /// The program missed the deadline and was killed.
    #[error("nft did not exit within {} s", .0.as_secs())]
    Deadline(Duration),
    /// Its input or output failed.
    #[error("cannot talk to nft: {0}")]
    Pipe(#[source] io::Error),
    /// The program exited with an error.
    #[error("nft refused: {message}")]
    Refused {
        /// The beginning of its standard error.
        message: String,
    },
}

impl NftError {
    /// The remedy.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Start(_) => "install the package nftables",
            Self::Deadline(_) | Self::Pipe(_) => "check for a hanging nft process or an overloaded host",
            Self::Refused { .. } => {
                "check that the kernel supports nf_tables with fib, nat and sets, and that no other program edits the \
                 table"
            }
        }
    }

    /// Whether `nft` reports that the object does not exist.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { message } if message.contains("No such file or directory"))
    }
}

/// Whether a name from a listing can go back into a command: it means nothing else there.
#[must_use]
pub fn is_identifier(name: &str) -> bool {
    name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

/// Runs `program`, an `nft`, in the network namespace of the calling thread, and returns its standard output.
///
/// # Errors
/// [`NftError`]; it is `Refused` where the exit status is not 0.
pub fn nft(program: &str, args: &[&str], input: &str, deadline: Duration) -> Result<Vec<u8>, NftError> {
    let output = run(program, args, input, deadline)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().chars().take(400).collect();
    Err(NftError::Refused { message })
}

/// Runs a program to its end with `input` on its standard input. At the deadline it is killed.
///
/// # Errors
/// [`NftError`], but never `Refused`: the caller judges the exit status.
pub fn run(program: &str, args: &[&str], input: &str, deadline: Duration) -> Result<Output, NftError> {
    let end = Instant::now() + deadline;
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NftError::Start)?;
    let output = communicate(&mut child, input, end, deadline);
    if output.is_err() {
        // It may have exited; then there is nothing to kill, and `wait` reaps it.
        let _ = child.kill();
        let _ = child.wait();
    }
    output
}

fn communicate(child: &mut Child, input: &str, end: Instant, deadline: Duration) -> Result<Output, NftError> {
    let late = |_| NftError::Deadline(deadline);
    let left = || end.saturating_duration_since(Instant::now());
    // The threads are not joined: a child of the program may keep the pipes open when the program is killed.
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        // A broken pipe means that the program has already exited: its status has the reason.
        thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    }
    let stdout = read(child.stdout.take());
    let stderr = read(child.stderr.take());
    let stdout = stdout.recv_timeout(left()).map_err(late)?.map_err(NftError::Pipe)?;
    let stderr = stderr.recv_timeout(left()).map_err(late)?.map_err(NftError::Pipe)?;
    loop {
        if let Some(status) = child.try_wait().map_err(NftError::Pipe)? {
            return Ok(Output { status, stdout, stderr });
        }
        if left().is_zero() {
            return Err(NftError::Deadline(deadline));
        }
        thread::sleep(LOOK);
    }
}

/// Reads a pipe to its end in a thread of its own.
fn read(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut bytes));
        // After the deadline there is no receiver.
        let _ = send.send(read.map(|_| bytes));
    });
    receive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_the_programs() {
        let output = run("sh", &["-c", "cat; echo bad >&2; exit 3"], "in", READ_DEADLINE).unwrap();
        assert_eq!(
            (&output.stdout[..], &output.stderr[..], output.status.code()),
            (&b"in"[..], &b"bad\n"[..], Some(3))
        );
        let refused =
            nft("sh", &["-c", "echo 'No such file or directory' >&2; exit 1"], "", READ_DEADLINE).unwrap_err();
        assert!(refused.is_missing(), "{refused}");
        assert!(matches!(nft("/nonexistent", &[], "", READ_DEADLINE), Err(NftError::Start(_))));
    }

    /// More than a pipe holds, each way at once.
    #[test]
    fn long_input_and_output_do_not_block_each_other() {
        let input = "x".repeat(1 << 20);
        let output = run("cat", &[], &input, READ_DEADLINE).unwrap();
        assert_eq!(output.stdout.len(), input.len());
        assert!(run("true", &[], &input, READ_DEADLINE).unwrap().status.success(), "input that is not read");
    }

    /// Also where a child of it keeps its output open, and where it closes its output and stays.
    #[test]
    fn a_program_that_does_not_exit_is_killed() {
        for script in ["exec sleep 5", "sleep 5; true", "exec >&- 2>&-; exec sleep 5"] {
            let hung = run("sh", &["-c", script], "", Duration::from_millis(100));
            assert!(matches!(hung, Err(NftError::Deadline(_))), "{script}: {hung:?}");
        }
    }
}
