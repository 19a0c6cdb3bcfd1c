//! GC: frees attachments that the runtime does not list.

use std::collections::BTreeSet;

use netlink::Netlink;

use super::{Invocation, del};
use crate::{
    bridge,
    config::{Mode, ValidAttachment},
    daemon::{DaemonClient, DaemonError},
    delegate::Delegate,
    environment::AttachmentName,
    error::{CniError, Code},
    ipam,
    log::log,
    version::CniVersion,
};

/// Detaches everything of this network that is not in `cni.dev/valid-attachments`. The runtime runs no ADD and DEL
/// meanwhile. Continues after a failure, and returns the first one.
pub(super) fn gc(call: &Invocation<'_>) -> Result<(), CniError> {
    let Some(valid) = &call.config.valid_attachments else {
        return Err(CniError::new(Code::InvalidConfig, "GC needs cni.dev/valid-attachments"));
    };
    let valid: BTreeSet<&ValidAttachment> = valid.iter().collect();
    let is_valid = |name: &AttachmentName| {
        valid.contains(&ValidAttachment { container_id: name.container_id.clone(), ifname: name.ifname.clone() })
    };
    let mut failures = Vec::new();
    let known = match DaemonClient::new(call.run_dir()).impatient().attachments() {
        Ok(known) => known,
        Err(error @ DaemonError::Refused(_)) => return Err(error.into()),
        Err(error) => {
            // It drops the attachments itself once the containers are gone.
            failures.push(error.into());
            Vec::new()
        }
    };
    let stale = known.into_iter().filter(|known| known.begin.network == call.config.name && !is_valid(&known.name()));
    for attachment in stale {
        let name = attachment.name();
        let own = attachment.begin.interface.is_some();
        log(&format!("GC: detached stale container {} {}", name.container_id, name.ifname));
        let removed = if own { del::remove(call, &name) } else { del::withdraw(call, &name) };
        failures.extend(removed.err());
    }
    let addresses = match call.delegate() {
        Ok(None) => call.free_host_locals(|holder| !is_valid(holder)),
        Ok(Some(delegate)) => of_delegate(call, &delegate),
        Err(error) => Err(error),
    };
    failures.extend(addresses.err());
    failures.extend(remove_idle_bridge(call).err());
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// Removes a bridge that an interrupted DEL left.
fn remove_idle_bridge(call: &Invocation<'_>) -> Result<(), CniError> {
    if let Mode::Bridge(name) = &call.config.mode {
        bridge::remove_idle(&mut Netlink::open()?, call.run_dir(), Some(name))?;
    }
    Ok(())
}

/// A plugin that implements GC gets the command itself.
fn of_delegate(call: &Invocation<'_>, delegate: &Delegate) -> Result<(), CniError> {
    if delegate.version() < CniVersion::V1_1_0 {
        return Ok(());
    }
    delegate.call("GC", call.environment, ipam::configuration(call.config, None)?).map(drop)
}
