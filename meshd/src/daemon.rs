//! The daemon, read top to bottom: settings → state directory → floor, kernel, tunnel, prober, control → loop → stop.

mod answers;
mod attachment_sync;
mod change_log;
mod cleanup;
mod diagnose;
mod etcd_names;
mod floor;
mod forwarding;
mod handshakes;
mod nftables;
mod node;
mod peer_config;
mod peer_memory;
mod peers;
mod privilege;
mod proven;
mod published;
mod reach;
mod readiness;
mod roamed;
mod underlay;
mod watchdog;

use std::{fs, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc, time::Instant};

use anyhow::Context as _;
use attachments::Attachments;
use control::{
    cache::{CacheError, CachedRecords},
    state_dir::StateDir,
};
use enforcement::{self, Enforcement};
use ipnet::IpNet;
use kernel::{self, Kernel};
use keys::PrivateKey;
use mesh::{address::prefixes, backend::judged_by_tunnel};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tunnel::{self, Tunnel};

use self::handshakes::Handshakes;
use crate::settings::{FloorSettings, Settings};
pub use cleanup::cleanup;
pub use floor::floor;

/// How a run ended, when it did not fail.
#[derive(Debug)]
pub enum RunOutcome {
    /// As it was told to.
    Done,
    /// The daemon must not run here, and why.
    Refused(String),
}

/// Runs the daemon until SIGTERM or SIGINT. What it put into the kernel stays there.
///
/// # Errors
/// When it cannot start: the state directory, the key, the TUN device or the sockets cannot be had.
pub async fn run(settings: Settings) -> anyhow::Result<RunOutcome> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot install the handler for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot install the handler for SIGINT")?;

    privilege::demand("run", &[privilege::NET_ADMIN, privilege::NET_RAW])?;
    make_dir(&settings.run_dir, 0o755)?;
    let state = StateDir::open(&settings.state_dir)?;
    let id = state.identity().id.clone();
    let private_key = PrivateKey::load_or_create(&settings.state_dir.join("key"))?;
    for warning in &settings.obsolete {
        tracing::warn!(%warning, "obsolete setting");
    }
    tracing::info!(node = %settings.node, %id, public_key = %private_key.public(), "starting");

    let kernel = Kernel::new(kernel::Options::new(settings.interface.clone(), settings.state_dir.clone()))?;
    if let Err(error) = floor::install_fallback_routes(&kernel, &FloorSettings::of(&settings)).await {
        // The loop lays it too, and goes on trying.
        tracing::error!("{error:#}");
    }
    let attachments = Attachments::open(&settings.run_dir, &state.identity().boot_id).context("attachments")?;
    let attachments = Arc::new(attachments);
    let enforcement = Enforcement::start(enforcement::Options {
        node: id.clone(),
        judged_by_tunnel: judged_by_tunnel(settings.interface.as_str()),
        table: kernel::policy_table(&kernel.options().table_name),
        last_subnets: last_pods(cached_subnets(&state), &attachments),
        log_group: settings.policy_log_group,
    })
    .context("cannot start the policy thread")?;
    let mut options = tunnel::Options::new(settings.interface.as_str(), settings.listen_port, private_key.clone());
    options.offloads = settings.offloads;
    options.track = enforcement.track();
    options.judge = enforcement.judge();
    let handshakes = Handshakes::load(&settings.state_dir, Instant::now());
    options.seen = handshakes.seen();
    let tunnel = Tunnel::start(options)?;
    let stop = CancellationToken::new();
    let parts = node::NodeParts {
        settings,
        state,
        id,
        private_key,
        kernel,
        tunnel: tunnel.clone(),
        handshakes,
        enforcement: Arc::clone(&enforcement),
        attachments,
    };
    let node = node::NodeLoop::start(parts, &stop).await?;
    let asked_to_stop = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        asked_to_stop.cancel();
    });
    let outcome = node.run(stop.clone()).await;
    stop.cancel();
    tunnel.shutdown();
    enforcement.stop();
    if matches!(outcome, Ok(RunOutcome::Done)) {
        tracing::info!("stopped; TUN device, addresses, routes and rules stay in place (`meshd cleanup` removes them)");
    }
    outcome
}

/// Where this node's pods were in the last run: its subnets then, and the addresses of those that are attached, which
/// outlive the cache.
fn last_pods(subnets: Vec<IpNet>, attachments: &Attachments) -> Vec<IpNet> {
    let table = attachments.table();
    let table = table.borrow();
    let attached = table.attachments.values().filter_map(|one| one.attach.as_ref());
    let addresses = attached.flat_map(|attach| &attach.addresses).map(|address| IpNet::from(*address));
    let outside: Vec<IpNet> = addresses.filter(|pod| !subnets.iter().any(|subnet| subnet.contains(pod))).collect();
    subnets.into_iter().chain(outside).collect()
}

/// The subnets that this node had when it last wrote its cache.
fn cached_subnets(state: &StateDir) -> Vec<IpNet> {
    // A cache that cannot be read is reported by the control plane, which does without it.
    subnets_in_cache(state.path()).unwrap_or_default()
}

fn subnets_in_cache(state_dir: &Path) -> Result<Vec<IpNet>, CacheError> {
    let cached = CachedRecords::load(state_dir)?;
    Ok(cached.and_then(|cached| cached.subnet).iter().flat_map(prefixes).collect())
}

fn make_dir(path: &Path, mode: u32) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot create directory {}", path.display()))
}

/// A handle that the API and the loop share.
type SharedState = Arc<published::ApiState>;
