//! Whole machines: a host with its own files and systemd as its first process.

use std::{fs, path::Path, sync::OnceLock, thread, time::Duration};

use crate::{Host, Namespace, Output, Process, await_until};

/// Boots one; runs inside the host's network namespace.
const BOOT: &str = include_str!("machine.sh");
/// For systemd to come up on a busy machine.
const BOOTED: Duration = Duration::from_secs(120);

/// A machine on a host of the Lab: its network is the host's, its files are this machine's as they are now, and what is
/// written to them is kept in memory and is gone with it. systemd is its first process.
pub struct Machine {
    host: Host,
    name: String,
    /// The process whose only child is systemd.
    outer: Process,
    pid: OnceLock<String>,
}

impl Machine {
    /// Begins to boot. Several machines boot side by side; the first command waits for its machine.
    ///
    /// # Panics
    /// When the script that boots cannot be written or started.
    #[must_use]
    #[track_caller]
    pub fn boot(host: &Host, name: &str) -> Self {
        let lab = host.lab().folder();
        let (script, folder) = (lab.join(format!("machine-{name}.sh")), lab.join(format!("machine-{name}")));
        fs::write(&script, BOOT).unwrap_or_else(|error| panic!("{}: {error}", script.display()));
        fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let group = format!("meshd-lab-{}-{name}", lab.file_name().unwrap_or_default().to_string_lossy());
        let outer = host.spawn("bash", &[&script.to_string_lossy(), &folder.to_string_lossy(), name, &group]);
        Self { host: host.clone(), name: name.to_owned(), outer, pid: OnceLock::new() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host that it is on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Runs a script with a login shell as a careful operator would (`-euo pipefail`), as root in its home folder.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Output {
        let output = self.try_sh(script);
        assert!(output.success(), "{}", output.describe());
        output
    }

    /// [`sh`](Self::sh) for a script that may fail.
    ///
    /// # Panics
    /// When the machine does not come up.
    #[track_caller]
    pub fn try_sh(&self, script: &str) -> Output {
        self.pid.get_or_init(|| self.await_boot());
        self.run(script)
    }

    /// Copies a file of this machine into it.
    ///
    /// # Panics
    /// When it cannot be read or written.
    #[track_caller]
    pub fn put(&self, file: &Path, to: &str) {
        let pid = self.pid.get_or_init(|| self.await_boot());
        let target = format!("/proc/{pid}/root{to}");
        fs::copy(file, &target).unwrap_or_else(|error| panic!("{} to {target}: {error}", file.display()));
    }

    /// Makes a namespace of the Lab a container's here, below `/run/netns` by its name.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[track_caller]
    pub fn lend(&self, namespace: &Namespace) {
        let pid = self.pid.get_or_init(|| self.await_boot());
        let path = namespace.path().to_string_lossy();
        let here = format!("/run/netns/{}", path.rsplit('/').next().unwrap_or_default());
        // By a file that is open, since neither sees the other's mounts.
        let script = r#"exec 9<"$0"; nsenter -t "$1" -m -p bash -c 'mkdir -p /run/netns; touch "$0"; mount --no-canonicalize --bind /proc/self/fd/9 "$0"' "$2""#;
        self.host.run_args(&["bash", "-euc", script, &path, pid, &here]);
    }

    /// Copies a file of it to this machine.
    ///
    /// # Panics
    /// When it cannot be read or written.
    #[track_caller]
    pub fn get(&self, file: &str, to: &Path) {
        let pid = self.pid.get_or_init(|| self.await_boot());
        let source = format!("/proc/{pid}/root{file}");
        fs::copy(&source, to).unwrap_or_else(|error| panic!("{source} to {}: {error}", to.display()));
    }

    /// Its first process, as this machine counts, once systemd has brought up what it is to.
    #[track_caller]
    fn await_boot(&self) -> String {
        let outer = self.outer.pid();
        let pid = await_until(&format!("{} to begin to boot", self.name), BOOTED, || {
            assert!(self.outer.running(), "{} does not boot: {}", self.name, self.outer.log());
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
            let pid = children.split_whitespace().next()?.to_owned();
            let first = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (first.trim() == "systemd").then_some(pid)
        });
        let state = ["systemctl", "is-system-running"];
        await_until(&format!("{} to be up", self.name), BOOTED, || {
            let output = self.host.try_run(&[&enter(&pid)[..], &state].concat());
            matches!(output.stdout.trim(), "running" | "degraded").then_some(())
        });
        pid
    }

    fn run(&self, script: &str) -> Output {
        let pid = self.pid.get().map_or("", String::as_str);
        let bash = ["bash", "-leuo", "pipefail", "-c", script];
        self.host.try_run(&[&enter(pid)[..], &bash].concat())
    }
}

fn enter(pid: &str) -> [&str; 16] {
    let environment = ["env", "-i", "-C", "/root", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
    let [e0, e1, e2, e3, e4, e5] = environment;
    ["nsenter", "-t", pid, "-m", "-p", "-u", "-i", "-C", "-r", "-w", e0, e1, e2, e3, e4, e5]
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() && self.pid.get().is_some() {
            let journal = self.run("journalctl --no-pager -o short-precise | tail -n 60");
            eprintln!("──── {}: journal\n{}", self.name, journal.stdout);
        }
        self.outer.kill9();
    }
}
