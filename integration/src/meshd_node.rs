//! A `meshd` daemon on a host.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use crate::{
    Etcd, Host, Output, Pod, Process, await_until, binary,
    measure::{process_cpu, resident_bytes},
};

/// Where pods' addresses begin in a subnet; the ones before are the node's and a bridge's.
const FIRST_POD: u32 = 16;

/// How to start a node daemon: `Meshd::on(&host, &etcd).site("east").args("--endpoint none").start()`.
pub struct Meshd {
    host: Host,
    endpoints: String,
    name: String,
    site: Option<String>,
    args: Vec<String>,
    env: Vec<(String, String)>,
    copied_state: Option<PathBuf>,
    program: Option<PathBuf>,
}

/// A node: a host with a daemon that can be killed and started again on its state.
pub struct MeshdNode {
    host: Host,
    name: String,
    interface: String,
    state: PathBuf,
    run: PathBuf,
    program: Mutex<Option<PathBuf>>,
    command: Vec<String>,
    site: Mutex<Option<String>>,
    env: Vec<(String, String)>,
    process: Mutex<Option<Process>>,
    pods: AtomicU32,
    /// Whether the scenario ended the present daemon, or expects it to end.
    ended: AtomicBool,
}

impl Meshd {
    /// A node named like its host, without a site.
    #[must_use]
    pub fn on(host: &Host, etcd: &Etcd) -> Self {
        Self {
            host: host.clone(),
            endpoints: etcd.endpoints(),
            name: host.name().to_owned(),
            site: None,
            args: Vec::new(),
            env: Vec::new(),
            copied_state: None,
            program: None,
        }
    }

    /// Another name.
    #[must_use]
    pub fn name(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The node's site.
    #[must_use]
    pub fn site(self, site: &str) -> Self {
        Self { site: Some(site.to_owned()), ..self }
    }

    /// Whether this is its site.
    #[must_use]
    pub fn is_at(&self, site: &str) -> bool {
        self.site.as_deref() == Some(site)
    }

    /// Other etcd endpoints than those at etcd's first address.
    #[must_use]
    pub fn endpoints(self, endpoints: String) -> Self {
        Self { endpoints, ..self }
    }

    /// More words for the command line of `meshd run`, split at white space.
    #[must_use]
    pub fn args(mut self, words: &str) -> Self {
        self.args.extend(words.split_whitespace().map(str::to_owned));
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Its state directory begins as a copy of this one, as when a machine is cloned.
    #[must_use]
    pub fn copy_state(self, from: &Path) -> Self {
        Self { copied_state: Some(from.to_owned()), ..self }
    }

    /// Another build of the daemon than this workspace's.
    #[must_use]
    pub fn program(self, program: &Path) -> Self {
        Self { program: Some(program.to_owned()), ..self }
    }

    /// Starts it without waiting for anything. State and run directories are new ones, in the Lab's folder.
    ///
    /// # Panics
    /// When the state to begin with cannot be copied, or the daemon cannot be started.
    #[must_use]
    pub fn start(self) -> MeshdNode {
        let lab = self.host.lab();
        let interface = lab.unique_interface("m");
        // Named after the interface, which is unique: a host may carry two nodes, or a second one after a first.
        let folder = lab.folder().join(&interface);
        let (state, run) = (folder.join("state"), folder.join("run"));
        if let Some(from) = &self.copied_state {
            fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
            self.host.run_args(&["cp", "-a", "--", &from.to_string_lossy(), &state.to_string_lossy()]);
        }
        let mut command: Vec<String> = ["run", "--node", &self.name, "--etcd-endpoints", &self.endpoints]
            .into_iter()
            .chain(["--etcd-allow-plaintext", "--interface", &interface])
            .map(str::to_owned)
            .collect();
        for (flag, path) in [("--state-dir", &state), ("--run-dir", &run)] {
            command.extend([flag.to_owned(), path.to_string_lossy().into_owned()]);
        }
        command.extend(self.args);
        let node = MeshdNode {
            host: self.host,
            name: self.name,
            interface,
            state,
            run,
            program: Mutex::new(self.program),
            command,
            site: Mutex::new(self.site),
            env: self.env,
            process: Mutex::default(),
            pods: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        };
        node.start();
        node
    }
}

impl MeshdNode {
    /// Starts the daemon (again), on the state that is there.
    ///
    /// # Panics
    /// When it runs already.
    pub fn start(&self) {
        let mut slot = self.slot();
        assert!(!slot.as_ref().is_some_and(Process::running), "{} runs already", self.name);
        let site = self.site.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let site = site.into_iter().flat_map(|site| ["--site".to_owned(), site]);
        let command: Vec<String> = self.command.iter().cloned().chain(site).collect();
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.ended.store(false, Ordering::Relaxed);
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let program = program.unwrap_or_else(|| binary("meshd"));
        *slot = Some(self.host.spawn_with_env(program, &command, &env));
    }

    /// `SIGKILL`: the daemon has no chance to tidy up. A child that it was just forking holds its lock a moment longer;
    /// when this returns, another daemon can take it.
    pub fn kill9(&self) {
        self.expect_end();
        self.with_process(Process::kill9);
        if let Ok(lock) = File::options().write(true).open(self.state_dir().join("lock")) {
            drop(Flock::lock(lock, FlockArg::LockExclusive));
        }
    }

    /// `SIGTERM`, and waits for the end.
    #[track_caller]
    pub fn term(&self) -> ExitStatus {
        self.expect_end();
        self.with_process(|process| process.term(Duration::from_secs(90)))
    }

    /// Says that the present daemon may end by itself; without this, one that has fails the scenario.
    pub fn expect_end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// `SIGTERM` and start.
    pub fn restart(&self) {
        self.term();
        self.start();
    }

    /// The build that the next start runs; `None`: this workspace's.
    pub fn set_program(&self, program: Option<&Path>) {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = program.map(Path::to_owned);
    }

    /// The site that the next start is given.
    pub fn set_site(&self, site: Option<&str>) {
        *self.site.lock().unwrap_or_else(PoisonError::into_inner) = site.map(str::to_owned);
    }

    /// `SIGSTOP`: the daemon stands still until [`cont`](Self::cont).
    pub fn stop(&self) {
        self.with_process(Process::stop);
    }

    /// `SIGCONT`.
    pub fn cont(&self) {
        self.with_process(Process::cont);
    }

    /// Whether the daemon runs.
    #[must_use]
    pub fn running(&self) -> bool {
        self.slot().as_ref().is_some_and(Process::running)
    }

    /// Gives the present daemon's process to `work`: its pid, its log, how it ended.
    ///
    /// # Panics
    /// When it was never started.
    pub fn with_process<T>(&self, work: impl FnOnce(&Process) -> T) -> T {
        match self.slot().as_ref() {
            Some(process) => work(process),
            None => panic!("{} was never started", self.name),
        }
    }

    /// The log of the present daemon, from its start.
    #[must_use]
    pub fn log(&self) -> String {
        self.with_process(Process::log)
    }

    /// `meshd cleanup` of what this node has left, with these arguments. It may fail.
    #[must_use]
    pub fn cleanup(&self, args: &[&str]) -> Output {
        self.beside_daemon("cleanup", args)
    }

    /// `meshd floor`, from this node's cache. It may fail.
    #[must_use]
    pub fn floor(&self) -> Output {
        self.beside_daemon("floor", &[])
    }

    /// A command of `meshd` on this node's directories.
    fn beside_daemon(&self, command: &str, args: &[&str]) -> Output {
        let program = binary("meshd");
        let (program, state, run) =
            (program.to_string_lossy(), self.state.to_string_lossy(), self.run.to_string_lossy());
        let mut line = vec![&*program, command, "--interface", &self.interface];
        line.extend(["--state-dir", &*state, "--run-dir", &*run]);
        line.extend(args);
        self.host.try_run(&line)
    }

    /// `meshctl` with this node's run directory.
    #[must_use]
    pub fn meshctl(&self, args: &[&str]) -> Output {
        let (program, run) = (binary("meshctl"), self.run.to_string_lossy());
        let program = program.to_string_lossy();
        let mut command = vec![&*program, "--run-dir", &run];
        command.extend(args);
        self.host.try_run(&command)
    }

    /// `meshctl -o json` with these arguments; none when it fails or prints something else.
    #[must_use]
    pub fn try_json(&self, args: &[&str]) -> Option<Value> {
        let output = self.meshctl(&[&["-o", "json"], args].concat());
        serde_json::from_str(&output.stdout).ok().filter(|_| output.success())
    }

    /// `meshctl -o json status`.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// The revision up to which policies are in force, asked without a process for each question.
    #[must_use]
    pub fn policy_revision(&self) -> Option<u64> {
        let mut stream = UnixStream::connect(self.run_dir().join("meshd.sock")).ok()?;
        stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: meshd\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let status: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        status["policy"]["revision"].as_u64()
    }

    /// `meshctl -o json peers`.
    #[must_use]
    #[track_caller]
    pub fn peers(&self) -> Value {
        self.json(&["peers"])
    }

    /// `meshctl -o json routes`.
    #[must_use]
    #[track_caller]
    pub fn routes(&self) -> Value {
        self.json(&["routes"])
    }

    /// What `peers` says of the peer with this name.
    #[must_use]
    pub fn peer(&self, name: &str) -> Option<Value> {
        let peers = self.try_json(&["peers"])?;
        peers.as_array()?.iter().find(|peer| peer["name"] == name).cloned()
    }

    /// Waits until the daemon answers and has its subnets, and returns its status.
    ///
    /// # Panics
    /// When it does not in time, or ends.
    #[track_caller]
    pub fn await_ready(&self, deadline: Duration) -> Value {
        self.await_status("to have its subnets", deadline, |status| {
            status["subnets"].as_array().is_some_and(|subnets| !subnets.is_empty())
        })
    }

    /// Waits until its status is as wanted, and returns that.
    ///
    /// # Panics
    /// When it is not in time, or the daemon ends.
    #[track_caller]
    pub fn await_status(&self, what: &str, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        await_until(&format!("{} {what}", self.name), deadline, || {
            self.assert_running();
            self.try_json(&["status"]).filter(&wanted)
        })
    }

    /// Waits until this node reaches `peer` by this path: `direct`, `wireguard` or `unreachable`.
    ///
    /// # Panics
    /// When it does not in time, or the daemon ends.
    #[track_caller]
    pub fn await_path(&self, peer: &str, path: &str, deadline: Duration) -> Value {
        await_until(&format!("{} to reach {peer} by {path}", self.name), deadline, || {
            self.assert_running();
            self.peer(peer).filter(|peer| peer["path"] == path)
        })
    }

    /// The subnets that status names, IPv4 first.
    #[must_use]
    pub fn subnets(&self) -> Vec<IpNet> {
        self.addresses("subnets")
    }

    /// The overlay addresses that status names, IPv4 first.
    #[must_use]
    pub fn overlay(&self) -> Vec<IpAddr> {
        self.addresses("overlay")
    }

    /// A pod on this node, with the next free address of each of its subnets and the MTU of `subnet.env`.
    ///
    /// # Panics
    /// When the node has no subnets yet, or has not written the file.
    #[must_use]
    #[track_caller]
    pub fn pod(&self, name: &str) -> Pod {
        let number = FIRST_POD + self.pods.fetch_add(1, Ordering::Relaxed);
        let subnets = self.subnets();
        assert!(!subnets.is_empty(), "{} has no subnet for a pod", self.name);
        let addresses: Vec<IpAddr> = subnets.iter().map(|subnet| nth_address(subnet, number)).collect();
        let mtu = self.subnet_env("FLANNEL_MTU").and_then(|mtu| mtu.parse().ok());
        let Some(mtu) = mtu else {
            panic!("{}: no FLANNEL_MTU in {}", self.name, self.run.join("subnet.env").display())
        };
        let pod = self.host.pod(name, &addresses);
        pod.set_mtu(mtu);
        pod
    }

    /// A variable of `subnet.env`.
    #[must_use]
    pub fn subnet_env(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.run.join("subnet.env")).ok()?;
        text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    }

    /// Memory of the daemon that is resident now, in megabytes.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn resident_megabytes(&self) -> f64 {
        resident_bytes(self.with_process(Process::pid)) as f64 / 1e6
    }

    /// The daemon's share of a core, in percent, while `work` goes on.
    ///
    /// # Panics
    /// When it does not run.
    pub fn share_of_a_core(&self, work: impl FnOnce()) -> f64 {
        let pid = self.with_process(Process::pid);
        let (start, before) = (Instant::now(), process_cpu(pid));
        work();
        (process_cpu(pid) - before).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0
    }

    /// The node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host that it is on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The TUN device; unique on this machine.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let output = self.meshctl(&[&["-o", "json"], args].concat());
        assert!(output.success(), "{}", output.describe());
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {}", output.describe()))
    }

    fn addresses<T: std::str::FromStr>(&self, field: &str) -> Vec<T> {
        let status = self.status();
        let mut texts: Vec<&str> = status[field].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        texts.sort_by_key(|text| text.contains(':'));
        texts.into_iter().filter_map(|text| text.parse().ok()).collect()
    }

    #[track_caller]
    fn assert_running(&self) {
        self.with_process(|process| {
            if let Some(status) = process.exit_status() {
                panic!("{} ended with {status}:\n{}", process.name(), process.log());
            }
        });
    }

    fn slot(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MeshdNode {
    /// A daemon that has ended by itself fails the scenario, even if nothing else noticed.
    fn drop(&mut self) {
        let expected = self.ended.load(Ordering::Relaxed) || self.host.lab().ending() || std::thread::panicking();
        let slot = self.process.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let (false, Some(process)) = (expected, slot)
            && let Some(status) = process.exit_status()
        {
            panic!("{} ended by itself with {status}:\n{}", process.name(), process.log());
        }
    }
}

/// The address with this number in a subnet, counted from its network address.
fn nth_address(subnet: &IpNet, number: u32) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(network) => Ipv4Addr::from(u32::from(network) + number).into(),
        IpAddr::V6(network) => Ipv6Addr::from(u128::from(network) + u128::from(number)).into(),
    }
}
