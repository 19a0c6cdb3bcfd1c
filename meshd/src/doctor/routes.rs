//! The kernel's main routing table.

use ipnet::IpNet;
use kernel::{Rtnetlink, RtnetlinkError};

/// A unicast route, to one of its next hops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRoute {
    /// The destination.
    pub net: IpNet,
    /// The interface.
    pub device: String,
    /// Its number of `/etc/iproute2/rt_protos`: which program made it.
    pub protocol: u8,
    /// A default route that came by router advertisement.
    pub advertised: bool,
}

/// All unicast routes of the main table, of both families, in the network namespace of this thread; none where the
/// kernel does not say. `/proc/net/ipv6_route` would show those of all tables. Blocks: not for a thread that runs
/// tasks.
#[must_use]
pub(crate) fn main_table() -> Vec<ListedRoute> {
    wait_for(read()).unwrap_or_default()
}

/// Waits for answers of netlink on a thread that runs no tasks, inside a runtime or not.
pub(crate) fn wait_for<T>(answers: impl Future<Output = Result<T, RtnetlinkError>>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.ok().and_then(|runtime| runtime.block_on(answers).ok())
}

async fn read() -> Result<Vec<ListedRoute>, RtnetlinkError> {
    let netlink = Rtnetlink::open()?;
    let links = netlink.links().await?;
    let name = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let (v4, v6) = (netlink.main_routes(true).await?, netlink.main_routes(false).await?);
    Ok(v4
        .into_iter()
        .chain(v6)
        .filter_map(|route| {
            Some(ListedRoute {
                net: route.dst,
                device: name(route.index)?,
                protocol: route.protocol,
                advertised: route.advertised,
            })
        })
        .collect())
}
