//! A named network namespace, and commands inside it.

use std::{
    fmt, fs,
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use super::{
    NETNS, Shared,
    process::{Output, Process},
};
use crate::Sniffer;

/// What a command may take; one that hangs must not hang the scenario.
const COMMAND: Duration = Duration::from_secs(120);
/// Between two looks whether a command has ended.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// A network namespace of a Lab, mounted so that `ip netns exec` finds it. Cloning gives another handle to the same
/// one.
///
/// Only the network is separate: files, `/sys` and processes are the machine's.
#[derive(Clone)]
pub struct Namespace {
    inner: Arc<Inner>,
}

struct Inner {
    lab: Arc<Shared>,
    name: String,
    path: PathBuf,
    handle: fs::File,
    interfaces: AtomicU32,
}

impl Namespace {
    pub(crate) fn create(lab: &Arc<Shared>, name: &str) -> Self {
        let full = format!("{}-{name}", lab.id());
        let path = Path::new(NETNS).join(&full);
        // A thread of its own is the one that moves; mounting its namespace keeps it when the thread is gone.
        let made = thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<fs::File> {
                    fs::File::create_new(&path)?;
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
                    fs::File::open(&path)
                })
                .join()
        });
        let handle = match made {
            Ok(Ok(handle)) => handle,
            Ok(Err(error)) => panic!("{full}: cannot make the namespace: {error}"),
            Err(_) => panic!("{full}: cannot make the namespace"),
        };
        lab.remember_namespace(&full);
        let namespace = Self {
            inner: Arc::new(Inner {
                lab: Arc::clone(lab),
                name: name.to_owned(),
                path,
                handle,
                interfaces: AtomicU32::new(0),
            }),
        };
        // No duplicate address detection: addresses are usable at once. Echo sockets without raw rights, for flows.
        namespace.sysctls(&[
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv4/ping_group_range", "0 2147483647"),
        ]);
        namespace.ip(&["link set lo up"]);
        namespace
    }

    /// Watches all that comes in here, by interfaces of now and later, for frames that show an address of `prefixes` in
    /// the clear.
    pub fn sniff(&self, prefixes: &[IpNet]) -> Sniffer {
        Sniffer::start(self, prefixes)
    }

    /// The name it was given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The file that it is mounted on; its last part is the name for `ip netns exec`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Calls `work` on a thread inside the namespace and returns what it returned. A panic in it goes on here.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.move_this_thread();
                    work()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts a thread inside the namespace.
    pub(crate) fn thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let namespace = self.clone();
        thread::Builder::new()
            .name(self.name().to_owned())
            .spawn(move || {
                namespace.move_this_thread();
                // The thread must not keep the Lab's state alive for longer than its work needs.
                drop(namespace);
                work()
            })
            .unwrap_or_else(|error| panic!("cannot start a thread: {error}"))
    }

    /// Runs a command to its end and returns its output, split at white space: `run("ip route show table all")`.
    ///
    /// # Panics
    /// When it fails: the message has the command, its exit status, and what it printed.
    #[track_caller]
    pub fn run(&self, command: &str) -> Output {
        let words: Vec<&str> = command.split_whitespace().collect();
        self.run_args(&words)
    }

    /// [`run`](Self::run) with the arguments given one by one.
    ///
    /// # Panics
    /// When the command fails.
    #[track_caller]
    pub fn run_args(&self, command: &[&str]) -> Output {
        let output = self.try_run(command);
        assert!(output.success(), "{}", output.describe());
        output
    }

    /// [`run_args`](Self::run_args) for a command that may fail.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn try_run(&self, command: &[&str]) -> Output {
        self.run_with_input(command, "")
    }

    /// Runs a command with `input` on its standard input. It may fail.
    ///
    /// # Panics
    /// When it cannot be started, or does not end within two minutes.
    #[track_caller]
    pub fn run_with_input(&self, command: &[&str], input: &str) -> Output {
        match self.enter(|| run_to_end(command, input)) {
            Ok(output) => Output::new(self.name(), command, output),
            Err(error) => panic!("{}: cannot run {}: {error}", self.name(), command.join(" ")),
        }
    }

    /// Runs `ip` commands in one go, in order: `ip(&["link set eth0 up", "route add default via fe80::1 dev eth0"])`.
    ///
    /// # Panics
    /// When one of them fails; those before it have been carried out.
    #[track_caller]
    pub fn ip(&self, commands: &[&str]) {
        let text = commands.join("\n") + "\n";
        let output = self.run_with_input(&["ip", "-batch", "-"], &text);
        assert!(output.success(), "{}\nwith input:\n{text}", output.describe());
    }

    /// Loads an nftables ruleset, as one transaction.
    ///
    /// # Panics
    /// When nft refuses it.
    #[track_caller]
    pub fn nft(&self, ruleset: &str) {
        let output = self.run_with_input(&["nft", "-f", "-"], ruleset);
        assert!(output.success(), "{}\nwith input:\n{ruleset}", output.describe());
    }

    /// Sets a sysctl of this namespace, named by its path below `/proc/sys`: `sysctl("net/ipv4/ip_forward", "1")`.
    ///
    /// # Panics
    /// When the kernel refuses it.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        self.sysctls(&[(name, value)]);
    }

    #[track_caller]
    pub(crate) fn sysctls(&self, settings: &[(&str, &str)]) {
        let failed = self.enter(|| {
            settings.iter().find_map(|(name, value)| {
                let result = fs::write(Path::new("/proc/sys").join(name), value);
                result.err().map(|error| format!("{name} = {value}: {error}"))
            })
        });
        if let Some(failed) = failed {
            panic!("{}: sysctl {failed}", self.name());
        }
    }

    /// Reads a sysctl of this namespace.
    ///
    /// # Panics
    /// When there is no such sysctl.
    #[must_use]
    #[track_caller]
    pub fn read_sysctl(&self, name: &str) -> String {
        match self.enter(|| fs::read_to_string(Path::new("/proc/sys").join(name))) {
            Ok(text) => text.trim().to_owned(),
            Err(error) => panic!("{}: sysctl {name}: {error}", self.name()),
        }
    }

    /// Starts a command that goes on running; its output goes to a log that a failed scenario prints.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn spawn(&self, program: impl AsRef<Path>, args: &[&str]) -> Process {
        self.spawn_with_env(program, args, &[])
    }

    /// [`spawn`](Self::spawn) with additional environment variables.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn spawn_with_env(&self, program: impl AsRef<Path>, args: &[&str], env: &[(&str, &str)]) -> Process {
        Process::start(self, program.as_ref(), args, env)
    }

    /// `ip monitor` of these objects, with what it has to say about namespaces of other Labs, which come and go, left
    /// out.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn monitor(&self, objects: &str) -> Process {
        self.spawn("sh", &["-c", &format!("exec ip monitor {objects} 2>/dev/null")])
    }

    /// Writes what matches `filter` (tcpdump's language; empty is all) on all interfaces, the first 2 KiB of each
    /// packet, to a file that is returned, from now until the process is dropped or ended.
    ///
    /// # Panics
    /// When tcpdump does not start.
    #[track_caller]
    pub fn capture(&self, filter: &str) -> (Process, PathBuf) {
        let file = self.lab().folder().join(format!("{}.pcap", self.next_interface(&format!("{}-", self.name()))));
        // In immediate mode each packet takes a slot of the snapshot length in the buffer: with tcpdump's own 256 KiB
        // in 2 MiB there are eight, which is a loss as soon as tcpdump has to wait for a processor.
        let options = "-i any -U --immediate-mode -s 2048 -B 8192 -Z root -w";
        let file_name = file.to_string_lossy();
        let words: Vec<&str> = options.split(' ').chain([&*file_name, filter]).collect();
        let process = self.spawn("tcpdump", &words);
        process.await_log("listening on", Duration::from_secs(30));
        (process, file)
    }

    /// Adds a route, any words that `ip route add` takes: `route("default", "via 192.0.2.1")`.
    ///
    /// # Panics
    /// When the kernel refuses it.
    #[track_caller]
    pub fn route(&self, destination: &str, how: &str) {
        self.ip(&[&format!("route add {destination} {how}")]);
    }

    pub(crate) fn lab(&self) -> &Arc<Shared> {
        &self.inner.lab
    }

    /// The next free interface name with this prefix: `eth0`, `eth1`, …
    pub(crate) fn next_interface(&self, prefix: &str) -> String {
        format!("{prefix}{}", self.inner.interfaces.fetch_add(1, Ordering::Relaxed))
    }

    /// Another namespace of the same Lab.
    pub(crate) fn sibling(&self, name: &str) -> Self {
        Self::create(&self.inner.lab, name)
    }

    /// The name that `ip netns` and `ip link … netns` know it by.
    pub(crate) fn netns(&self) -> String {
        format!("{}-{}", self.inner.lab.id(), self.inner.name)
    }

    fn move_this_thread(&self) {
        setns(&self.inner.handle, CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|error| panic!("{}: cannot enter the namespace: {error}", self.name()));
    }
}

/// Runs a command in the namespace of this thread. Its input and output are files: what it leaves running in the
/// background may hold on to them.
fn run_to_end(command: &[&str], input: &str) -> io::Result<std::process::Output> {
    let mut stdin = tempfile::tempfile()?;
    stdin.write_all(input.as_bytes())?;
    stdin.rewind()?;
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()?;
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > COMMAND {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("it has not ended within {COMMAND:?}")));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    let read = |file: &mut fs::File| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    Ok(std::process::Output { status, stdout: read(&mut stdout)?, stderr: read(&mut stderr)? })
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.netns())
    }
}
