//! Commands that run to completion, and background processes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Shared, namespace::Namespace};
use crate::await_until;

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Output {
    host: String,
    command: String,
    status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    pub(crate) fn new(host: &str, command: &[&str], output: std::process::Output) -> Self {
        Self {
            host: host.to_owned(),
            command: command.join(" "),
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Whether it exited with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// The exit code; none after a signal.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Everything about it, for a message.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{}: {} ended with {}\nstdout: {}\nstderr: {}",
            self.host, self.command, self.status, self.stdout, self.stderr
        )
    }
}

/// A running process of a Lab; killed when dropped, unless the Lab is kept.
pub struct Process {
    name: String,
    child: Mutex<Child>,
    pid: Pid,
    log: PathBuf,
    lab: Arc<Shared>,
}

impl Process {
    #[track_caller]
    pub(crate) fn start(namespace: &Namespace, program: &Path, args: &[&str], env: &[(&str, &str)]) -> Self {
        let file_name = program.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{}-{file_name}", namespace.name());
        let log = namespace.lab().log_file(&name);
        // The child is born in the namespace of the thread that makes it.
        let child = namespace.enter(|| {
            let out = fs::File::create(&log)?;
            let error = out.try_clone()?;
            Command::new(program)
                .args(args)
                .envs(env.iter().copied())
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(error)
                .spawn()
        });
        let child =
            child.unwrap_or_else(|error| panic!("{}: cannot start {}: {error}", namespace.name(), program.display()));
        Self {
            pid: Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)),
            name,
            child: Mutex::new(child),
            log,
            lab: Arc::clone(namespace.lab()),
        }
    }

    /// Host and program, as messages name it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Whether it still runs.
    #[must_use]
    pub fn running(&self) -> bool {
        self.exit_status().is_none()
    }

    /// How it ended, once it has.
    #[must_use]
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.child().try_wait().unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Sends a signal, unless it has ended.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // Not reaped means that the pid is still ours.
        if matches!(child.try_wait(), Ok(None)) {
            kill(self.pid, signal).unwrap_or_else(|error| panic!("{}: {signal}: {error}", self.name));
        }
    }

    /// `SIGKILL`, and waits for the end.
    pub fn kill9(&self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child().wait();
    }

    /// `SIGTERM`, and waits for the end.
    ///
    /// # Panics
    /// When it has not ended by `deadline`.
    #[track_caller]
    pub fn term(&self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.await_exit(deadline)
    }

    /// `SIGSTOP`: it stands still until [`cont`](Self::cont). Each thread stops only when it next has a processor,
    /// which on a busy machine takes a while: until then it would still answer.
    ///
    /// # Panics
    /// When one does not stop.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let threads = PathBuf::from(format!("/proc/{}/task", self.pid));
        await_until("every thread to stop", Duration::from_secs(30), || {
            let stopped = |thread: fs::DirEntry| {
                // `PID (NAME) STATE …`; a thread that has just ended is gone.
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
            };
            fs::read_dir(&threads).ok()?.flatten().all(stopped).then_some(())
        });
    }

    /// `SIGCONT`.
    pub fn cont(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Waits for it to end by itself.
    ///
    /// # Panics
    /// When it has not by `deadline`.
    #[track_caller]
    pub fn await_exit(&self, deadline: Duration) -> ExitStatus {
        await_until(&format!("the end of {}", self.name), deadline, || self.exit_status())
    }

    /// All that it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Where it prints to.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Waits until a line of the log contains `text`, and returns that line.
    ///
    /// # Panics
    /// When none does by `deadline`, or when the process ends first.
    #[track_caller]
    pub fn await_log(&self, text: &str, deadline: Duration) -> String {
        await_until(&format!("{text:?} in the log of {}", self.name), deadline, || {
            // Looked at before the log: what it printed last counts.
            let ended = self.exit_status();
            let log = self.log();
            let line = log.lines().find(|line| line.contains(text)).map(str::to_owned);
            if let (None, Some(status)) = (&line, ended) {
                panic!("{} ended with {status} and without {text:?}:\n{log}", self.name);
            }
            line
        })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.lab.keep() {
            let mut child = self.child();
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
