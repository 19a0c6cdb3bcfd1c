//! Threads in their own network namespace.

use std::{
    future::Future,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread of its own, in a fresh network namespace, under a runtime of that one thread.
pub(super) fn isolated<F, Fut>(test: F)
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        run("ip link set lo up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command line without quoting, and returns what it printed. Panics if it fails.
pub(super) fn run(line: &str) -> String {
    let (out, ok) = try_run(line);
    assert!(ok, "{line}: {out}");
    out
}

/// Runs a command line without quoting; its output and whether it succeeded.
pub(super) fn try_run(line: &str) -> (String, bool) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        text.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    (text, output.status.success())
}

type Job = Box<dyn FnOnce() + Send>;

/// Another host: a thread that stays in a namespace of its own and does what it is given.
pub(super) struct Host {
    jobs: mpsc::Sender<Job>,
    tid: i32,
}

impl Host {
    pub(super) fn new() -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            run("ip link set lo up");
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            for job in inbox {
                job();
            }
        });
        Self { jobs, tid: told.recv().unwrap() }
    }

    /// Moves an interface of the caller's namespace here.
    pub(super) fn take(&self, dev: &str) {
        run(&format!("ip link set {dev} netns {}", self.tid));
    }

    /// Does `job` here and waits for its answer.
    pub(super) fn within<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        self.jobs
            .send(Box::new(move || {
                let _ = tell.send(job());
            }))
            .unwrap();
        told.recv().expect("the job panicked")
    }

    /// Runs a command line here.
    pub(super) fn run(&self, line: &str) -> String {
        let line = line.to_owned();
        self.within(move || run(&line))
    }
}
