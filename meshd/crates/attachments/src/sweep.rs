//! Attachments that ended without a DEL: a killed runtime or plugin, a container removed by hand.

use std::{collections::BTreeSet, fs, io, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Duration};

use cni::{
    bridge,
    daemon::{Attached, Begin},
    environment::AttachmentName,
    host_local,
    interface::host_name,
};
use netlink::Netlink;
use nix::net::if_::if_nametoindex;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Attachments;

/// The interval of checks. An attachment that is gone in two checks in a row is removed.
const INTERVAL: Duration = Duration::from_secs(10);

/// Forgets attachments that were withdrawn while the daemon did not answer, and those whose container is gone, until
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

/// Frees attachments that were gone `before` and still are; returns the others that are gone now.
pub(super) fn look(attachments: &Attachments, before: &BTreeSet<AttachmentName>) -> BTreeSet<AttachmentName> {
    attachments.read_again();
    attachments.honour_tombstones();
    let table = attachments.table.borrow().clone();
    let of_host_local = reserved_by_host_local(attachments.run_dir());
    let orphans = of_host_local.iter().map(|(_, holder)| holder).filter(|holder| {
        !table.attachments.contains_key(holder) && if_nametoindex(host_name(holder).as_str()).is_err()
    });
    let attached = table.attachments.iter().filter(|(_, one)| is_gone(one)).map(|(name, _)| name);
    let gone: BTreeSet<AttachmentName> = attached.chain(orphans).cloned().collect();
    let (over, suspected): (BTreeSet<_>, BTreeSet<_>) = gone.into_iter().partition(|name| before.contains(name));
    for name in over.iter().filter(|name| table.attachments.contains_key(name)) {
        match attachments.detach(name) {
            Ok(_) => tracing::info!(container = name.container_id, interface = name.ifname, "container gone; detached"),
            Err(error) => tracing::warn!(container = name.container_id, %error, "cannot detach container"),
        }
    }
    remove_host_locals_files(attachments.run_dir(), &of_host_local, &over);
    let holders: BTreeSet<AttachmentName> = of_host_local.into_iter().map(|(_, holder)| holder).collect();
    attachments.lock().gone = over.intersection(&holders).cloned().collect();
    remove_idle_bridges(attachments.run_dir());
    // A holder whose file stays is looked at again, and is gone until it is found there.
    suspected.into_iter().chain(over.into_iter().filter(|name| holders.contains(name))).collect()
}

/// The network and the holder of each address that host-local has given out.
fn reserved_by_host_local(run_dir: &Path) -> Vec<(String, AttachmentName)> {
    let reserved = host_local::reserved(run_dir).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the addresses reserved by host-local");
        Vec::new()
    });
    reserved.into_iter().filter_map(|one| Some((one.network, one.holder?))).collect()
}

/// Files of host-local reserve nothing once their container is gone. A daemon that is not root leaves them to the
/// plugin.
fn remove_host_locals_files(run_dir: &Path, reserved: &[(String, AttachmentName)], gone: &BTreeSet<AttachmentName>) {
    let with_gone = reserved.iter().filter(|(_, holder)| gone.contains(holder)).map(|(network, _)| network);
    for network in with_gone.collect::<BTreeSet<_>>() {
        match host_local::give_back(run_dir, network, |holder| gone.contains(holder)) {
            Ok(addresses) => tracing::info!(network, addresses, "addresses of removed containers freed"),
            Err(error) => tracing::debug!(network, %error, "cannot remove files of removed containers"),
        }
    }
}

/// A DEL that broke off may have left a bridge without containers.
fn remove_idle_bridges(run_dir: &Path) {
    let removed = Netlink::open().map_err(Into::into);
    match removed.and_then(|mut netlink| bridge::remove_idle(&mut netlink, run_dir, None)) {
        Ok(removed) => removed.iter().for_each(|bridge| tracing::info!(bridge, "idle bridge removed")),
        Err(error) => tracing::warn!(%error, "cannot remove idle bridges"),
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
