//! `meshd-etcd`: an etcd for the mesh on nodes of a Kubernetes cluster, as the Helm chart brings it.
//!
//! `setup` (a Job) and `maintain` (a CronJob) decide by the Nodes, a record in a ConfigMap and etcd's own list what is to
//! be done next (`plan`), and do it. `member` runs on each node that they label, and becomes etcd.

mod certificates;
mod etcd;
mod kubernetes;
mod maintain;
mod member;
mod plan;
mod record;
mod setup;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};
use etcd_schema::Cluster;
use program::log::{self, Log, LogFormat};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    plan::Wanted,
    record::{Ports, SnapshotName},
};

const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// Run an etcd for the mesh on nodes of a Kubernetes cluster
///
/// The Helm chart calls this program. Exit codes: 0 success, 1 failed, 2 usage error.
#[derive(Parser)]
#[command(name = "meshd-etcd", version = program::VERSION)]
struct EtcdCli {
    #[command(subcommand)]
    command: Command,
    /// Minimum log level: error, warn, info, debug or trace [default: info]
    #[arg(long, env = "MESHD_LOG_LEVEL", value_name = "LEVEL", global = true)]
    log_level: Option<String>,
    /// Format of the log on standard error [default: text]
    #[arg(long, env = "MESHD_LOG_FORMAT", value_name = "FORMAT", global = true)]
    log_format: Option<LogFormat>,
}

#[derive(Subcommand)]
enum Command {
    /// Make certificates, members, users and the mesh's network, or what is missing of them
    Setup(SetupFlags),
    /// Do what setup does, then take a snapshot and defragment the members
    Maintain {
        #[command(flatten)]
        setup: SetupFlags,
        /// Folder of the snapshots
        #[arg(long, value_name = "DIR", default_value = "/var/lib/meshd-etcd/snapshots")]
        snapshots: PathBuf,
        /// Snapshots to keep in it
        #[arg(long, value_name = "N", default_value_t = 48)]
        keep: usize,
    },
    /// Check that a snapshot is whole
    Check {
        /// The snapshot
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Run the member of this node
    Member(MemberFlags),
}

#[derive(Args)]
struct SetupFlags {
    /// File that says how to reach the API server [default: the pod's service account, else as kubectl does]
    #[arg(long, env = "MESHD_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of the objects
    #[arg(long, default_value = "kube-system")]
    namespace: String,
    /// Name of the DaemonSet and the ConfigMap; the Secrets are NAME-ca, -server, -root, -node and -sync
    #[arg(long, default_value = "meshd-etcd")]
    name: String,
    /// How many members: an odd number
    #[arg(long, default_value_t = 1, value_parser = members)]
    members: usize,
    /// Label of the nodes that may run a member
    #[arg(long, value_name = "LABEL", default_value = "node-role.kubernetes.io/control-plane")]
    nodes: String,
    /// More names and addresses by which clients reach the members
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    san: Vec<String>,
    /// Begin all members again with this snapshot, once
    #[arg(long, value_name = "NODE/FILE")]
    restore: Option<SnapshotName>,
    /// Name of this cluster in the mesh, for the user of meshd-sync
    #[arg(long, env = "MESHD_CLUSTER", value_name = "NAME", value_parser = cluster)]
    cluster: Cluster,
    /// Names of other clusters of the mesh, for a user of meshd-sync each; their Secrets are NAME-sync-CLUSTER
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = cluster)]
    other_clusters: Vec<Cluster>,
    /// Prefix of all keys of the mesh
    #[arg(long, env = "MESHD_ETCD_PREFIX", value_name = "PREFIX", default_value = "/meshd")]
    etcd_prefix: String,
    /// Value of the key `config`, put where that key is absent
    #[arg(long, value_name = "JSON", value_parser = json)]
    config: Option<Value>,
    /// How long to wait for nodes and members
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    ports: PortFlags,
}

#[derive(Args)]
struct MemberFlags {
    /// Name of this node
    #[arg(long, env = "MESHD_NODE", value_name = "NAME")]
    node: String,
    /// The ConfigMap's key `members` as a file
    #[arg(long, value_name = "FILE", default_value = "/etc/meshd-etcd/record/members")]
    record: PathBuf,
    /// Folder of tls.crt, tls.key and ca.crt
    #[arg(long, value_name = "DIR", default_value = "/etc/meshd-etcd/server")]
    certificates: PathBuf,
    /// Folder of the data
    #[arg(long, value_name = "DIR", default_value = "/var/lib/meshd-etcd")]
    data_dir: PathBuf,
    /// TCP port of health and metrics on 127.0.0.1, without authentication
    #[arg(long, value_name = "PORT", default_value_t = 2393)]
    metrics_port: u16,
    #[command(flatten)]
    ports: PortFlags,
}

#[derive(Args)]
struct PortFlags {
    /// TCP port for clients
    #[arg(long, value_name = "PORT", default_value_t = 2391)]
    client_port: u16,
    /// TCP port between members
    #[arg(long, value_name = "PORT", default_value_t = 2392)]
    peer_port: u16,
}

fn members(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(members @ (1 | 3 | 5)) => Ok(members),
        _ => Err("must be 1, 3 or 5: an even number bears no more losses".to_owned()),
    }
}

fn cluster(text: &str) -> Result<Cluster, String> {
    let cluster: Cluster = text.parse().map_err(|error: etcd_schema::Violations| error.to_string())?;
    if cluster.is_flat() { Err("the name is empty".to_owned()) } else { Ok(cluster) }
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

impl SetupFlags {
    fn options(self, awaits_nodes: bool) -> setup::Options {
        setup::Options {
            kubeconfig: self.kubeconfig,
            namespace: self.namespace,
            name: self.name,
            candidates: self.nodes,
            wanted: Wanted { members: self.members, ports: self.ports.ports(), restore: self.restore },
            names: self.san,
            prefix: self.etcd_prefix.trim_end_matches('/').to_owned(),
            cluster: self.cluster,
            other_clusters: self.other_clusters,
            config: self.config,
            patience: self.timeout,
            awaits_nodes,
        }
    }
}

impl MemberFlags {
    fn options(self) -> member::Options {
        member::Options {
            node: self.node,
            record: self.record,
            certificates: self.certificates,
            data: self.data_dir,
            ports: self.ports.ports(),
            metrics_port: self.metrics_port,
        }
    }
}

impl PortFlags {
    const fn ports(&self) -> Ports {
        Ports { client: self.client_port, peer: self.peer_port }
    }
}

/// The program `meshd-etcd`.
#[must_use]
pub fn main() -> ExitCode {
    let cli = EtcdCli::parse();
    let mut mistakes = Vec::new();
    let log = Log::from_flags(cli.log_level, cli.log_format, &mut mistakes);
    if !mistakes.is_empty() {
        log::print_error(&format!("meshd-etcd: invalid configuration:\n{}", mistakes.join("\n")));
        return ExitCode::from(USAGE);
    }
    log::to_stderr(log);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// As the first process of a container, it would not be ended by SIGTERM.
async fn until_terminated(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        done = work => done,
        _ = terminate.recv() => anyhow::bail!("terminated"),
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match command {
        Command::Member(flags) => match member::start(&flags.options())? {},
        Command::Check { file } => maintain::check(&file),
        Command::Setup(flags) => {
            runtime()?.block_on(until_terminated(setup::reconcile(&flags.options(true))))?;
            tracing::info!("etcd is set up");
            Ok(())
        }
        Command::Maintain { setup, snapshots, keep } => {
            let options = setup.options(false);
            runtime()?.block_on(until_terminated(maintain::maintain(&options, &snapshots, keep)))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        EtcdCli::command().debug_assert();
        let setup = |more: &[&str]| {
            EtcdCli::try_parse_from([&["meshd-etcd", "setup", "--cluster", "east"], more].concat()).is_ok()
        };
        assert!(setup(&[]) && setup(&["--members", "3", "--restore", "n1/x.db", "--config", "{}"]));
        for wrong in
            [["--members", "2"], ["--restore", "x.db"], ["--config", "{"], ["--timeout", "soon"], ["--cluster", ""]]
        {
            assert!(!setup(&wrong), "{wrong:?}");
        }
    }
}
