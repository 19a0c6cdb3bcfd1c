//! Flannel's daemon, as a neighbour of a mesh's nodes.

use std::{fs, path::PathBuf, time::Duration};

use ipnet::Ipv4Net;

use crate::{Etcd, Host, Process, await_until, programs::tool};

const READY: Duration = Duration::from_secs(60);

/// A running `flannel` on a host, with its keys in the mesh's etcd and without Kubernetes.
pub struct Flannel {
    process: Process,
    env_file: PathBuf,
}

impl Flannel {
    /// Starts it at this IPv4 address of `host`, with its keys below `prefix`.
    ///
    /// # Panics
    /// When it has not been built.
    #[must_use]
    #[track_caller]
    pub fn start(host: &Host, etcd: &Etcd, prefix: &str, address: &str) -> Self {
        let program =
            tool("bin", "flannel").unwrap_or_else(|| panic!("flannel is not built; run: scripts/install-peers"));
        let folder = host.lab().folder().join(format!("flannel-{}", host.name()));
        fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let env_file = folder.join("subnet.env");
        let flags = [
            format!("--etcd-endpoints={}", etcd.endpoints()),
            format!("--etcd-prefix={prefix}"),
            format!("--iface={address}"),
            format!("--subnet-file={}", env_file.display()),
            "--ip-masq=false".to_owned(),
            "--iptables-forward-rules=false".to_owned(),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Self { process: host.spawn(program, &flags), env_file }
    }

    /// The subnet that it has leased, once it has one and its routes are there.
    #[must_use]
    #[track_caller]
    pub fn await_subnet(&self) -> Ipv4Net {
        await_until("flannel's subnet.env", READY, || {
            let text = fs::read_to_string(&self.env_file).ok()?;
            let subnet = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
            subnet.parse::<Ipv4Net>().ok().map(|net| net.trunc())
        })
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }
}
