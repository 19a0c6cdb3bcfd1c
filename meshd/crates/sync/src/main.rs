//! `meshd-sync`: copies the objects of one Kubernetes cluster into the etcd of the mesh.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{ArgAction, Parser};
use etcd_schema::Cluster;
use program::{
    etcd_flags::EtcdFlags,
    log::{self, Log, LogFormat},
};
use sync::Options;
use text::with_causes;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// Copy the namespaces, pods, policies and nodes of a Kubernetes cluster into the mesh's etcd.
///
/// Run one or more per cluster: one leads, the others stand by. Each flag can also be an environment variable.
///
/// Exit codes: 0 success, 1 failed, 2 usage error or invalid configuration.
///
/// Example: meshd-sync --cluster east --etcd-endpoints https://etcd-1:2379 --etcd-cafile /etc/meshd/ca.pem
#[derive(Parser)]
#[command(name = "meshd-sync", version = program::VERSION)]
struct SyncCli {
    /// Name of the cluster in the mesh: its keys lie below k8s/NAME/. It never changes
    #[arg(long, env = "MESHD_CLUSTER", value_name = "NAME", value_parser = cluster)]
    cluster: Cluster,
    /// File that says how to reach the API server [default: the pod's service account, else as kubectl does]
    #[arg(long, env = "MESHD_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Print what would change in etcd, and exit
    #[arg(long, action = ArgAction::SetTrue)]
    dry_run: bool,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// Address and TCP port of metrics (/metrics) and health checks (/livez, /readyz), without authentication [default:
    /// none]
    #[arg(long, env = "MESHD_METRICS_ADDR", value_name = "IP:PORT")]
    metrics_addr: Option<SocketAddr>,
    /// Minimum log level: error, warn, info, debug or trace [default: info]
    #[arg(long, env = "MESHD_LOG_LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Format of the log on standard error [default: text]
    #[arg(long, env = "MESHD_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

fn cluster(text: &str) -> Result<Cluster, String> {
    let cluster: Cluster = text.parse().map_err(|error: etcd_schema::Violations| error.to_string())?;
    if cluster.is_flat() { Err("the name is empty".to_owned()) } else { Ok(cluster) }
}

fn main() -> ExitCode {
    let cli = SyncCli::parse();
    let mut mistakes = Vec::new();
    let log = Log::from_flags(cli.log_level, cli.log_format, &mut mistakes);
    let etcd = cli.etcd.check(&mut mistakes);
    if !mistakes.is_empty() {
        log::print_error(&format!("meshd-sync: invalid configuration:\n{}", mistakes.join("\n")));
        return ExitCode::from(USAGE);
    }
    log::to_stderr(log);
    let options = Options { cluster: cli.cluster, kubeconfig: cli.kubeconfig, etcd, metrics: cli.metrics_addr };
    match run_to_end(options, cli.dry_run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", with_causes(error.as_ref()));
            ExitCode::from(FAILED)
        }
    }
}

fn run_to_end(options: Options, dry_run: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start the async runtime")?.block_on(async {
        if dry_run {
            for line in sync::try_out(&options).await? {
                println!("{line}");
            }
            return Ok(());
        }
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.cancel();
        });
        sync::run(options, stop).await
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        SyncCli::command().debug_assert();
        assert!(SyncCli::try_parse_from(["meshd-sync", "--cluster", ""]).is_err());
        assert!(SyncCli::try_parse_from(["meshd-sync", "--cluster", "East"]).is_err());
        assert!(SyncCli::try_parse_from(["meshd-sync", "--cluster", "east", "--dry-run"]).is_ok());
    }
}
