//! etcd servers for one test, on free loopback ports; dropping the value stops them.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use control_core::types::{Transaction, Write};
use mesh::records::LeaseId;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    etcd_options::{EtcdOptions, TlsFiles},
    session::{Dialer, Session},
};

pub(super) const PREFIX: &str = "/meshd";

/// Longest that a condition may take to come true before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Etcd {
    members: Vec<Member>,
    /// The member that the test's own calls go to.
    through: AtomicUsize,
    tls: TlsFiles,
    _dir: tempfile::TempDir,
}

struct Member {
    url: String,
    child: Child,
}

impl Etcd {
    pub(super) async fn start() -> Self {
        Self::start_cluster(1).await
    }

    /// One member that speaks TLS with the certificates in `files`.
    pub(super) async fn start_tls(files: &str, ask_for_client: bool) -> Self {
        let mut args: Vec<String> = [("--cert-file", "server.pem"), ("--key-file", "server.key")]
            .into_iter()
            .flat_map(|(flag, name)| [flag.to_owned(), format!("{files}/{name}")])
            .collect();
        let file = |name: &str| Some(format!("{files}/{name}").into());
        let mut tls = TlsFiles { ca: file("ca.pem"), ..TlsFiles::default() };
        if ask_for_client {
            args.extend(["--client-cert-auth".into(), "--trusted-ca-file".into(), format!("{files}/ca.pem")]);
            tls.cert = file("client.pem");
            tls.key = file("client.key");
        }
        let mut etcd = Self::start_with(1, &args, &tls).await;
        // The tests add the certificate themselves.
        etcd.tls.cert = None;
        etcd.tls.key = None;
        etcd
    }

    /// One member whose tokens last this many seconds.
    pub(super) async fn start_with_tokens_of(seconds: u32) -> Self {
        Self::start_with(1, &["--auth-token-ttl".into(), seconds.to_string()], &TlsFiles::default()).await
    }

    /// The test's own calls show this certificate.
    pub(super) fn by(mut self, tls: TlsFiles) -> Self {
        self.tls = tls;
        self
    }

    /// A cluster of `size` members.
    pub(super) async fn start_cluster(size: usize) -> Self {
        Self::start_with(size, &[], &TlsFiles::default()).await
    }

    async fn start_with(size: usize, args: &[String], tls: &TlsFiles) -> Self {
        // Between finding a port free and etcd binding it another test may take it: then all over again.
        for _ in 0..10 {
            if let Some(etcd) = Self::try_start(size, args, tls).await {
                return etcd;
            }
        }
        panic!("etcd does not start");
    }

    async fn try_start(size: usize, args: &[String], tls: &TlsFiles) -> Option<Self> {
        let scheme = if tls.ca.is_some() { "https" } else { "http" };
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<(u16, u16)> = (0..size).map(|_| (free_port(), free_port())).collect();
        let cluster: Vec<_> =
            ports.iter().enumerate().map(|(i, (_, peer))| format!("m{i}=http://127.0.0.1:{peer}")).collect();
        let members = ports
            .iter()
            .enumerate()
            .map(|(i, (client, peer))| {
                let (client, peer) = (format!("{scheme}://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
                let child = Command::new("/usr/bin/etcd")
                    .arg("--name")
                    .arg(format!("m{i}"))
                    .arg("--data-dir")
                    .arg(dir.path().join(format!("m{i}")))
                    .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                    .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                    .args(["--initial-cluster", &cluster.join(","), "--unsafe-no-fsync"])
                    .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
                    .args(args)
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                Member { url: client, child }
            })
            .collect();
        let mut etcd = Self { members, through: AtomicUsize::new(0), tls: tls.clone(), _dir: dir };
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if etcd.members.iter_mut().any(|member| member.child.try_wait().unwrap().is_some()) {
                return None;
            }
            let mut ready = 0;
            for i in 0..size {
                if let Ok(session) = etcd.try_session(i).await
                    && session.list().await.is_ok()
                {
                    ready += 1;
                }
            }
            if ready == size {
                return Some(etcd);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    pub(super) fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints_file: None,
            endpoints: self.members.iter().map(|member| member.url.clone()).collect(),
            prefix: PREFIX.into(),
            tls: self.tls.clone(),
            user: None,
            allow_plaintext: false,
        }
    }

    pub(super) fn url(&self, member: usize) -> &str {
        &self.members[member].url
    }

    /// Which member has this URL.
    pub(super) fn member(&self, url: &str) -> usize {
        self.members.iter().position(|member| member.url == url).unwrap()
    }

    /// Sends the test's own calls to another member.
    pub(super) fn write_through(&self, member: usize) {
        self.through.store(member, Ordering::Relaxed);
    }

    pub(super) fn signal(&self, member: usize, signal: Signal) {
        kill(Pid::from_raw(self.members[member].child.id().try_into().unwrap()), signal).unwrap();
    }

    async fn try_session(&self, member: usize) -> Result<Session, String> {
        let options = EtcdOptions { endpoints: vec![self.members[member].url.clone()], ..self.options() };
        let dialer = Dialer::new(&options).unwrap();
        dialer.open(&dialer.members()[0], 0).await.map_err(|error| error.to_string())
    }

    pub(super) async fn session(&self) -> Session {
        self.try_session(self.through.load(Ordering::Relaxed)).await.unwrap()
    }

    pub(super) async fn put(&self, key: &str, value: &str) {
        self.put_leased(key, value, None).await;
    }

    pub(super) async fn try_put(&self, key: &str, value: &str) -> Result<(), String> {
        let write = Write::Put { key: key.into(), value: value.into(), lease: None };
        let session = self.try_session(self.through.load(Ordering::Relaxed)).await?;
        let transaction = Transaction { compares: Vec::new(), writes: vec![write] };
        session.transact(&transaction).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub(super) async fn put_all(&self, pairs: impl Iterator<Item = (String, String)>) {
        let put = |(key, value): (String, String)| Write::Put { key, value: value.into_bytes(), lease: None };
        self.write(pairs.map(put).collect()).await;
    }

    pub(super) async fn put_leased(&self, key: &str, value: &str, lease: Option<LeaseId>) {
        let write = Write::Put { key: key.into(), value: value.into(), lease };
        self.write(vec![write]).await;
    }

    pub(super) async fn delete(&self, keys: &[&str]) {
        self.write(keys.iter().map(|&key| Write::Delete { key: key.into() }).collect()).await;
    }

    /// Made again where a call has taken longer than its deadline: the same once more makes no difference.
    async fn write(&self, writes: Vec<Write>) {
        let transaction = Transaction { compares: Vec::new(), writes };
        eventually("a write", async || {
            let session = self.try_session(self.through.load(Ordering::Relaxed)).await.ok()?;
            session.transact(&transaction).await.ok()?.succeeded.then_some(())
        })
        .await;
    }

    /// Every key with its value and lease.
    pub(super) async fn dump(&self) -> BTreeMap<String, (String, Option<LeaseId>)> {
        let list = async || {
            let session = self.try_session(self.through.load(Ordering::Relaxed)).await.ok()?;
            session.list().await.ok()
        };
        let listing = eventually("a list", list).await;
        listing
            .entries
            .into_iter()
            .map(|entry| (entry.key, (String::from_utf8_lossy(&entry.value).into_owned(), entry.lease)))
            .collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _gone = member.child.kill();
            let _gone = member.child.wait();
        }
    }
}

/// Waits until `condition` gives something.
pub(super) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
