//! The floor under the mesh networks, from what the last run kept of the configuration: the first thing that a start
//! lays, and what `meshd floor` lays before containers start, whether the daemon comes up or not.

use std::{path::Path, time::Instant};

use etcd_schema::Key;
use ipnet::IpNet;

use super::{Outcome, privilege, underlay};
use crate::{
    control::{
        cache::{CacheError, Cached},
        store::Store,
    },
    kernel::{self, Kernel, Underlay, UnderlaySelection},
    mesh::{plan::covered, snapshot::networks},
    settings::FloorSettings,
};

/// Lays the floor and ends. Nothing else of this machine changes, and nothing is asked of etcd.
///
/// # Errors
/// When the kernel refuses a route of it.
pub async fn floor(settings: FloorSettings) -> anyhow::Result<Outcome> {
    privilege::demand("floor", &[privilege::NET_ADMIN])?;
    let kernel = Kernel::new(kernel::Options::new(settings.interface.clone(), settings.state_dir.clone()))?;
    lay(&kernel, &settings).await?;
    Ok(Outcome::Done)
}

/// Lays the floor under the networks of the last run. A cache that may no longer be forwarded by still tells what must
/// not leave in the clear.
pub(super) async fn lay(kernel: &Kernel, settings: &FloorSettings) -> anyhow::Result<()> {
    let networks = match last_networks(&settings.state_dir) {
        Ok(networks) => networks,
        Err(error) => {
            tracing::warn!(%error, "the cache tells no network: there is no floor until etcd tells one");
            return Ok(());
        }
    };
    // Before the network is up there are no addresses to protect: the floor then lies under whatever comes.
    let selection = settings.iface.clone().map_or(UnderlaySelection::Auto, UnderlaySelection::Named);
    let underlay = kernel.underlay(&selection).await.unwrap_or_else(|_| Underlay::default());
    let protected = underlay::protected(&settings.etcd_endpoints, &underlay, &[]);
    if let Some((network, address, what)) = covered(&networks, &protected) {
        tracing::warn!("no floor is laid under {network}: it covers {address}, {what}");
        return Ok(());
    }
    let report = kernel.lay_floor(&networks).await?;
    if let Some(failure) = report.failures.first() {
        anyhow::bail!("{}: {}; {}", failure.what, failure.problem, failure.remedy());
    }
    Ok(())
}

/// The networks of the configuration that was in force when the cache was written; none without a cache.
fn last_networks(state_dir: &Path) -> Result<Vec<IpNet>, CacheError> {
    let Some(cached) = Cached::load(state_dir)? else { return Ok(Vec::new()) };
    let config = cached.entries.into_iter().filter(|entry| entry.key == Key::Config.to_string()).collect();
    let view = Store::from_cache(cached.revision, config, Instant::now()).view();
    Ok(networks(view.config.as_ref().map(|config| config.value.as_ref())).collect())
}
