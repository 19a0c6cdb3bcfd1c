//! A real etcd, operated with `etcdctl`.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::{Host, Output, Process, await_until, measure::process_cpu};

const READY: Duration = Duration::from_secs(120);
/// For a command that must succeed; etcdctl's own 5 s are soon over on a busy machine.
const COMMAND_TIMEOUT: &str = "--command-timeout=60s";
const CLIENT_PORT: usize = 2379;
const PEER_PORT: usize = 2380;
/// Between the ports of one member and the next.
const STEP: usize = 10;

/// An etcd cluster on one host, plaintext, with its data in the Lab's folder. Members count from 0.
pub struct Etcd {
    host: Host,
    addresses: Vec<String>,
    members: Vec<Mutex<Option<Process>>>,
    /// Cluster ids follow from it.
    token: Mutex<String>,
}

impl Etcd {
    /// Starts `members` members on `host`, which clients reach at these addresses, and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(host: &Host, addresses: &[&str], members: usize) -> Self {
        let etcd = Self {
            host: host.clone(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            members: (0..members).map(|_| Mutex::default()).collect(),
            token: Mutex::new(host.lab().id().to_owned()),
        };
        for member in 0..members {
            etcd.start_member(member);
        }
        etcd.await_ready();
        etcd
    }

    /// Processor time that all members have used since they were started.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        let of = |member: &Mutex<Option<Process>>| {
            let process = member.lock().unwrap_or_else(PoisonError::into_inner);
            process.as_ref().map_or(Duration::ZERO, |process| process_cpu(process.pid()))
        };
        self.members.iter().map(of).sum()
    }

    /// The client URLs at the host's first address, separated by commas, as `--etcd-endpoints` takes them.
    #[must_use]
    pub fn endpoints(&self) -> String {
        self.endpoints_at(0)
    }

    /// The client URLs at one of the addresses it was started with.
    #[must_use]
    pub fn endpoints_at(&self, address: usize) -> String {
        self.urls(&self.addresses[address])
    }

    /// Writes a key. The value may be of any size and shape that etcd takes.
    pub fn put(&self, key: &str, value: &str) {
        self.ctl_with_input(&["put", "--", key], value);
    }

    /// Reads a key, with a quorum.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<String> {
        self.read(&["get", "-w", "json", "--", key]).pop().map(|(_, value)| value)
    }

    /// All keys that begin with `prefix`, and their values.
    #[must_use]
    pub fn get_prefix(&self, prefix: &str) -> Vec<(String, String)> {
        self.read(&["get", "-w", "json", "--prefix", "--", prefix])
    }

    /// Deletes a key.
    pub fn del(&self, key: &str) {
        self.ctl(&["del", "--", key]);
    }

    /// Deletes all keys that begin with `prefix`.
    pub fn del_prefix(&self, prefix: &str) {
        self.ctl(&["del", "--prefix", "--", prefix]);
    }

    /// The store's revision.
    ///
    /// # Panics
    /// When etcd does not say.
    #[must_use]
    pub fn revision(&self) -> u64 {
        let output = self.ctl(&["get", "-w", "json", "--", "no such key"]);
        let answer: Value = parse(&output);
        answer["header"]["revision"].as_u64().unwrap_or_else(|| panic!("no revision in {answer}"))
    }

    /// Forgets all that was before the present revision.
    pub fn compact(&self) {
        self.ctl(&["compact", "--physical", &self.revision().to_string()]);
    }

    /// Defragments every member, one after the other; each stands still meanwhile.
    pub fn defrag(&self) {
        self.ctl(&["--command-timeout=30s", "defrag"]);
    }

    /// Watches everything below `prefix` into a log: `etcdctl watch`.
    #[must_use]
    pub fn watch(&self, prefix: &str) -> Process {
        let endpoints = format!("--endpoints={}", self.urls("127.0.0.1"));
        let args = [&endpoints, "watch", "--prefix", prefix];
        self.host.spawn_with_env("etcdctl", &args, &[("ETCDCTL_API", "3")])
    }

    /// Runs `etcdctl` with these arguments against all members.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ctl(&self, args: &[&str]) -> Output {
        self.ctl_with_input(args, "")
    }

    /// Starts a member that is stopped, on the data it had, without waiting for it.
    ///
    /// # Panics
    /// When it runs already.
    pub fn start_member(&self, member: usize) {
        let mut slot = self.members[member].lock().unwrap_or_else(PoisonError::into_inner);
        assert!(slot.is_none(), "etcd member {member} runs already");
        let client = CLIENT_PORT + STEP * member;
        let advertised: Vec<String> = self.addresses.iter().map(|address| url(address, client)).collect();
        let advertised = advertised.join(",");
        let cluster: Vec<String> =
            (0..self.members.len()).map(|member| format!("m{member}={}", self.peer_url(member))).collect();
        let process = self.host.spawn(
            "etcd",
            &[
                "--name",
                &format!("m{member}"),
                "--data-dir",
                &self.data(member).to_string_lossy(),
                "--listen-client-urls",
                &format!("{advertised},{}", url("127.0.0.1", client)),
                "--advertise-client-urls",
                &advertised,
                "--listen-peer-urls",
                &self.peer_url(member),
                "--initial-advertise-peer-urls",
                &self.peer_url(member),
                "--initial-cluster",
                &cluster.join(","),
                "--initial-cluster-token",
                &self.token(),
                "--logger",
                "zap",
                "--log-level",
                "warn",
            ],
        );
        *slot = Some(process);
    }

    /// Kills a member (`SIGKILL`); its data stays.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill_member(&self, member: usize) {
        self.with_member(member, Process::kill9);
        self.members[member].lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Lets a member stand still: its connections stay, nothing answers.
    pub fn pause_member(&self, member: usize) {
        self.with_member(member, Process::stop);
    }

    /// Lets a paused member go on.
    pub fn resume_member(&self, member: usize) {
        self.with_member(member, Process::cont);
    }

    /// Kills all members; their data stays.
    pub fn stop(&self) {
        for member in 0..self.members.len() {
            self.kill_member(member);
        }
    }

    /// Starts all members again and waits until etcd answers.
    pub fn start_again(&self) {
        for member in 0..self.members.len() {
            self.start_member(member);
        }
        self.await_ready();
    }

    /// Replaces the only member by an empty one: with `token` as another cluster, without as one of the same id.
    pub fn replace(&self, token: Option<&str>) {
        self.stop();
        self.remove_data();
        self.set_token(token);
        self.start_again();
    }

    /// Saves a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        let file = self.host.lab().folder().join(format!("etcd-{}.snapshot", self.host.name()));
        self.ctl(&["snapshot", "save", &file.to_string_lossy()]);
        file
    }

    /// Replaces the only member by one made from a snapshot: with `token` as another cluster, without as one of the
    /// same id.
    pub fn restore(&self, snapshot: &Path, token: Option<&str>) {
        self.stop();
        self.remove_data();
        self.set_token(token);
        let peer = self.peer_url(0);
        let args = [
            "snapshot",
            "restore",
            &snapshot.to_string_lossy(),
            "--name=m0",
            &format!("--data-dir={}", self.data(0).display()),
            &format!("--initial-cluster=m0={peer}"),
            &format!("--initial-cluster-token={}", self.token()),
            &format!("--initial-advertise-peer-urls={peer}"),
        ];
        self.ctl(&args);
        self.start_again();
    }

    fn remove_data(&self) {
        assert_eq!(self.members.len(), 1, "only for an etcd of one member");
        std::fs::remove_dir_all(self.data(0)).unwrap_or_else(|error| panic!("etcd's data: {error}"));
    }

    fn data(&self, member: usize) -> PathBuf {
        self.host.lab().folder().join(format!("etcd-{}-{member}", self.host.name()))
    }

    fn set_token(&self, token: Option<&str>) {
        if let Some(token) = token {
            token.clone_into(&mut self.token.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn token(&self) -> String {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn peer_url(&self, member: usize) -> String {
        url("127.0.0.1", PEER_PORT + STEP * member)
    }

    /// Waits until a quorum answers.
    ///
    /// # Panics
    /// When none does in time, or a member has ended by itself.
    #[track_caller]
    pub fn await_ready(&self) {
        await_until("etcd to answer", READY, || {
            for member in &self.members {
                let member = member.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(process) = member.as_ref()
                    && let Some(status) = process.exit_status()
                {
                    panic!("{} ended with {status}:\n{}", process.name(), process.log());
                }
            }
            let command = self.command(&["get", "--", "no such key"]);
            self.run(&command, "").success().then_some(())
        });
    }

    #[track_caller]
    fn ctl_with_input(&self, args: &[&str], input: &str) -> Output {
        let output = self.run(&self.command(&[&[COMMAND_TIMEOUT], args].concat()), input);
        assert!(output.success(), "{}", output.describe());
        output
    }

    fn command(&self, args: &[&str]) -> Vec<String> {
        let mut command = vec!["env".to_owned(), "ETCDCTL_API=3".to_owned(), "etcdctl".to_owned()];
        command.push(format!("--endpoints={}", self.urls("127.0.0.1")));
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        command
    }

    fn run(&self, command: &[String], input: &str) -> Output {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        self.host.run_with_input(&command, input)
    }

    fn read(&self, args: &[&str]) -> Vec<(String, String)> {
        let answer: Value = parse(&self.ctl(args));
        let text = |value: &Value| {
            let bytes = STANDARD.decode(value.as_str().unwrap_or_default()).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let pairs = answer["kvs"].as_array().map(Vec::as_slice).unwrap_or_default();
        pairs.iter().map(|pair| (text(&pair["key"]), text(&pair["value"]))).collect()
    }

    fn urls(&self, address: &str) -> String {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let urls: Vec<String> =
            (0..self.members.len()).map(|member| format!("http://{host}:{}", CLIENT_PORT + STEP * member)).collect();
        urls.join(",")
    }

    fn with_member(&self, member: usize, work: impl FnOnce(&Process)) {
        let slot = self.members[member].lock().unwrap_or_else(PoisonError::into_inner);
        match slot.as_ref() {
            Some(process) => work(process),
            None => panic!("etcd member {member} does not run"),
        }
    }
}

fn url(address: &str, port: usize) -> String {
    if address.contains(':') { format!("http://[{address}]:{port}") } else { format!("http://{address}:{port}") }
}

#[track_caller]
fn parse(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {}", output.describe()))
}
