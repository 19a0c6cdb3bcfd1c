//! Fallback routes for all prefixes of the last run, from the cache: the first step of a start, and of `meshd floor`,
//! which runs before containers start, whether or not the daemon comes up.

use std::{net::IpAddr, path::Path, time::Instant};

use control::cache::{CacheError, CachedRecords};
use control_core::store::Store;
use etcd_schema::{Key, NodeId, Reader};
use ipnet::IpNet;
use kernel::{self, Kernel, Underlay, UnderlaySelection};
use mesh::{
    kernel_state::Floor,
    plan::covered,
    resolver::TopologyResolver,
    topology::{PeerId, Topology},
};

use super::{RunOutcome, privilege, underlay};
use crate::settings::FloorSettings;

/// Adds the fallback routes and ends. Nothing else of this machine changes, and etcd is not asked.
///
/// # Errors
/// When the kernel refuses one of the routes.
pub async fn floor(settings: FloorSettings) -> anyhow::Result<RunOutcome> {
    privilege::demand("floor", &[privilege::NET_ADMIN])?;
    let kernel = Kernel::new(kernel::Options::new(settings.interface.clone(), settings.state_dir.clone()))?;
    install_fallback_routes(&kernel, &settings).await?;
    Ok(RunOutcome::Done)
}

/// Makes all prefixes of the last run unreachable, except those that cover an address that this machine needs to reach
/// etcd. Even a cache that is too old for forwarding protects its prefixes.
pub(super) async fn install_fallback_routes(kernel: &Kernel, settings: &FloorSettings) -> anyhow::Result<()> {
    let claims = match last_claims(&settings.state_dir) {
        Ok(claims) => claims,
        Err(error) => {
            tracing::warn!(%error, "cache unreadable; no fallback routes until etcd has been read");
            return Ok(());
        }
    };
    // Before the network is up there are no addresses to protect; a start with the network up removes routes that cover
    // them.
    let selection = settings.iface.clone().map_or(UnderlaySelection::Auto, UnderlaySelection::Named);
    let underlay = kernel.underlay(&selection).await.unwrap_or_else(|_| Underlay::default());
    let protected = underlay::protected(&settings.etcd_endpoints, &underlay, &[]);
    let floor = floor_of(claims, &protected);
    let addresses: Vec<IpAddr> = protected.into_iter().map(|(address, _)| address).collect();
    let report = kernel.lay_floor(&floor, &addresses).await?;
    if let Some(failure) = report.failures.first() {
        anyhow::bail!("{}: {}; {}", failure.what, failure.problem, failure.remedy());
    }
    Ok(())
}

/// Prefixes that are refused together where one of them covers a protected address: a network of the configuration
/// (`None`), or those of an external peer.
type Claim = (Option<PeerId>, Vec<IpNet>);

fn floor_of(claims: Vec<Claim>, protected: &[(IpAddr, String)]) -> Floor {
    let mut floor = Floor::default();
    for (owner, prefixes) in claims {
        if let Some((prefix, address, what)) = covered(&prefixes, protected) {
            tracing::warn!(%prefix, %address, what, "no fallback route: the prefix covers an address that must stay reachable");
            continue;
        }
        let of = if owner.is_none() { &mut floor.networks } else { &mut floor.outside };
        of.extend(prefixes);
    }
    floor
}

/// The claims in the cache; none without a cache.
fn last_claims(state_dir: &Path) -> Result<Vec<Claim>, CacheError> {
    let Some(cached) = CachedRecords::load(state_dir)? else { return Ok(Vec::new()) };
    let concerns = |key: &str| Key::parse(key).is_ok_and(|key| key.rules().reader == Reader::Mesh);
    let entries = cached.entries.into_iter().filter(|entry| concerns(&entry.key)).collect();
    let records = Store::from_cache(cached.revision, entries, Instant::now()).records();
    // The claims are the same on every node: any id will do.
    let topology = "any".parse().map_or_else(
        |_| Topology::default(),
        |id: NodeId| {
            let mut resolver = TopologyResolver::new(id);
            resolver.apply(&records);
            resolver.topology().clone()
        },
    );
    let outside = topology.outside.iter();
    let outside = outside.map(|(name, peer)| (Some(PeerId::Outside(name.clone())), peer.allowed_ips.clone()));
    Ok(topology.networks().map(|network| (None, vec![network])).chain(outside).collect())
}
