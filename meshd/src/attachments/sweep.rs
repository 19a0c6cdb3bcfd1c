//! What went without a DEL: a runtime or a plugin that was killed, a container that was removed by hand.

use std::{collections::BTreeSet, fs, io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Duration};

use cni::{
    bridge,
    daemon::{Attached, Begin},
    environment::AttachmentName,
    interface::host_name,
    ipam,
    netlink::Netlink,
};
use nix::net::if_::if_nametoindex;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Attachments;

/// How often it is looked. What is gone at two looks in a row is gone.
const INTERVAL: Duration = Duration::from_secs(10);

/// Forgets attachments whose container is gone, and frees their addresses and those that belong to no attachment, until
/// `stop`.
pub async fn sweep(attachments: Arc<Attachments>, stop: CancellationToken) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut suspects = BTreeSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let (looking, before) = (Arc::clone(&attachments), std::mem::take(&mut suspects));
        // Files, and a lock that a plugin may hold for a moment.
        let looked = tokio::task::spawn_blocking(move || look(&looking, &before)).await;
        suspects = looked.unwrap_or_default();
    }
}

/// Frees what was gone `before` and still is; returns what else is gone now.
pub(super) fn look(attachments: &Attachments, before: &BTreeSet<AttachmentName>) -> BTreeSet<AttachmentName> {
    let table = attachments.table.borrow().clone();
    let mut gone: BTreeSet<AttachmentName> =
        table.attachments.iter().filter(|(_, one)| is_gone(one)).map(|(name, _)| name.clone()).collect();
    let networks = networks(attachments.address_dir());
    for network in &networks {
        let reserved = ipam::reserved(attachments.address_dir(), network).unwrap_or_default();
        let orphans = reserved.into_iter().map(|(_, holder)| holder).filter(|holder| {
            !table.attachments.contains_key(holder) && if_nametoindex(host_name(holder).as_str()).is_err()
        });
        gone.extend(orphans);
    }
    let (over, suspected): (BTreeSet<_>, BTreeSet<_>) = gone.into_iter().partition(|name| before.contains(name));
    for network in &networks {
        // Addresses first: one that is not freed now is found again as long as its attachment is known.
        match ipam::give_back(attachments.address_dir(), network, |holder| over.contains(holder)) {
            Ok(0) => {}
            Ok(addresses) => tracing::info!(network, addresses, "addresses of containers that are gone are free"),
            Err(error) => {
                tracing::warn!(network, %error, "addresses of containers that are gone cannot be freed");
                return suspected.into_iter().chain(over).collect();
            }
        }
    }
    for name in over.iter().filter(|name| table.attachments.contains_key(name)) {
        match attachments.detach(name) {
            Ok(_) => tracing::info!(container = name.container_id, interface = name.ifname, "the container is gone"),
            Err(error) => tracing::warn!(container = name.container_id, %error, "cannot be forgotten"),
        }
    }
    remove_idle_bridges(attachments.run_dir());
    suspected
}

/// A DEL that broke off may have left a bridge without containers.
fn remove_idle_bridges(run_dir: &Path) {
    let removed = Netlink::open().map_err(Into::into);
    match removed.and_then(|mut netlink| bridge::remove_idle(&mut netlink, run_dir, None)) {
        Ok(removed) => {
            removed.iter().for_each(|bridge| tracing::info!(bridge, "a bridge without containers is removed"))
        }
        Err(error) => tracing::warn!(%error, "bridges without containers cannot be removed"),
    }
}

/// Whether neither its namespace nor its interface on the host is there.
fn is_gone(attached: &Attached) -> bool {
    let made = attached.attach.as_ref().map(|attach| attach.interface.as_str());
    let interface = made.or(attached.begin.interface.as_deref());
    let there = interface.is_some_and(|interface| if_nametoindex(interface).is_ok());
    !there && namespace_is_gone(&attached.begin)
}

fn namespace_is_gone(begin: &Begin) -> bool {
    match fs::metadata(&begin.netns) {
        Ok(data) => begin.netns_inode.is_some_and(|inode| inode != (data.dev(), data.ino())),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn networks(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
