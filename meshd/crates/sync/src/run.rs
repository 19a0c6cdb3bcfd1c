//! The program's life: connect, stand by, lead, again.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use control::{
    etcd_options::EtcdOptions,
    session::{Dialer, Session},
};
use control_core::backoff::Backoff;
use etcd_schema::Cluster;
use sync_core::{ClusterKeys, Resigned, Standoff};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    election::{self, LeaderCandidate},
    follow::pause,
    monitor::{self, SyncMetrics},
    term::{self, TermEnd},
};

/// How often a process that stays out looks for a reason to lead again.
const STANDOFF_LOOK: Duration = Duration::from_secs(5);

/// What to copy, from where, to where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's name in the mesh.
    pub cluster: Cluster,
    /// How the API server is reached; without it, as a pod of the cluster or as kubectl does.
    pub kubeconfig: Option<PathBuf>,
    /// How the mesh's etcd is reached.
    pub etcd: EtcdOptions,
    /// Where metrics and health are served.
    pub metrics: Option<SocketAddr>,
}

/// Copies until `stop`.
///
/// # Errors
/// When the options cannot be used. A server that does not answer is tried again.
pub async fn run(options: Options, stop: CancellationToken) -> anyhow::Result<()> {
    let (api, mut dialer) = connect(&options).await?;
    let keys = ClusterKeys::new(&options.cluster);
    let holder = format!("{}-{:08x}", host_name(), rand::random::<u32>());
    tracing::info!(cluster = %options.cluster, holder, "started");
    let (shown, to_show) = watch::channel(SyncMetrics::default());
    if let Some(address) = options.metrics {
        monitor::serve(address, options.cluster.clone(), to_show, stop.clone()).await?;
    }
    let mut candidate = LeaderCandidate { keys: &keys, holder: &holder, told: None };
    let mut backoff = backoff();
    let mut standoff = Standoff::default();
    let mut next = 0;
    let mut etcd_failing = false;
    while !stop.is_cancelled() {
        let led = tokio::select! {
            () = stop.cancelled() => break,
            led = async {
                let session = election::open(&mut dialer, &keys, &mut next).await?;
                shown.send_modify(|shown| shown.reaches_etcd = true);
                if std::mem::take(&mut etcd_failing) {
                    tracing::info!(member = %session.member(), "etcd answers again");
                }
                let leadership = candidate.campaign(&session).await.map_err(|error| error.to_string())?;
                Ok::<_, String>((session, leadership))
            } => led,
        };
        let (session, mut leadership) = match led {
            Ok(led) => led,
            Err(error) => {
                shown.send_replace(SyncMetrics::default());
                if !std::mem::replace(&mut etcd_failing, true) {
                    tracing::warn!(error, "etcd unreachable; trying again");
                }
                pause(&mut backoff).await;
                continue;
            }
        };
        tracing::info!(term = leadership.fence, "leading: copying the cluster");
        let began = tokio::time::Instant::now();
        shown.send_modify(|shown| shown.leads = true);
        let end = term::run(&api, &session, &keys, &holder, &mut leadership, &shown, &stop).await;
        shown.send_replace(SyncMetrics::default());
        match end {
            TermEnd::Stopped => election::give_up(&session, &keys, leadership.fence).await,
            TermEnd::Lost => tracing::warn!("leadership lost: the lease was not renewed in time"),
            TermEnd::Resigned(reason @ (Resigned::Refused | Resigned::Silent)) => {
                election::give_up(&session, &keys, leadership.fence).await;
                let period = standoff.next_period();
                tracing::warn!(%reason, seconds = period.as_secs(), "leadership given up for a time");
                drop(leadership);
                shown.send_modify(|shown| shown.reaches_etcd = true);
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = stay_out(&api, &session, &keys, &reason, period) => {}
                }
                continue;
            }
            TermEnd::Resigned(reason) => tracing::warn!(%reason, "leadership given up"),
            TermEnd::Etcd(error) => tracing::warn!(%error, "leadership given up: etcd does not answer"),
        }
        drop(leadership);
        standoff.reset();
        if began.elapsed() > Duration::from_secs(60) {
            backoff = self::backoff();
        }
        if !stop.is_cancelled() {
            pause(&mut backoff).await;
        }
    }
    tracing::info!("stopped");
    Ok(())
}

/// Leaves the leadership to others, at most for `period`: an operator's confirmation is worth an attempt, and so is an
/// API server that answers again.
async fn stay_out(api: &Api, session: &Session, keys: &ClusterKeys, reason: &Resigned, period: Duration) {
    let _ = timeout(period, async {
        loop {
            sleep(STANDOFF_LOOK).await;
            let confirmed = session.list_below(&keys.confirm()).await.is_ok_and(|listing| !listing.entries.is_empty());
            let answers = *reason == Resigned::Silent && api.cluster_uid().await.is_ok();
            if confirmed || answers {
                return;
            }
        }
    })
    .await;
}

/// Checks the options; asks nothing of either server.
pub(crate) async fn connect(options: &Options) -> anyhow::Result<(Arc<Api>, Dialer)> {
    if options.cluster.is_flat() {
        bail!("the cluster needs a name");
    }
    let api = Api::new(options.kubeconfig.as_deref()).await.context("cannot tell how to reach the API server")?;
    let dialer = Dialer::new(&options.etcd).map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow::anyhow!(errors.join("\n"))
    })?;
    Ok((Arc::new(api), dialer))
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(10))
}
