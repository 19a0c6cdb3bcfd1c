//! DEL, which succeeds even if its objects are already gone.

use netlink::Netlink;
use serde_json::Value;

use super::Invocation;
use crate::{
    bridge,
    config::Mode,
    daemon::{DaemonClient, DaemonError},
    environment::AttachmentName,
    error::{CniError, Code},
    interface,
    log::log,
};

/// Detaches a container.
pub(super) fn del(call: &Invocation<'_>) -> Result<(), CniError> {
    let name = call.environment.attachment()?;
    if made_here(call, &name) { remove(call, &name) } else { withdraw(call, &name) }
}

/// Whether this plugin has made the interface: ADD's result, which every DEL from 0.4.0 on brings along, lists the
/// host's end by its name then. Without a result it may have, and its ADD may have broken off.
fn made_here(call: &Invocation<'_>, name: &AttachmentName) -> bool {
    let Some(result) = &call.config.prev_result else { return true };
    let host_name = interface::host_name(name);
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    interfaces.into_iter().flatten().any(|interface| interface.get("name").is_some_and(|name| *name == host_name))
}

/// Removes the interface, and then withdraws the attachment with its addresses: the next container that gets them is
/// not judged as this one, and finds no interface that has them still.
pub(super) fn remove(call: &Invocation<'_>, name: &AttachmentName) -> Result<(), CniError> {
    let mut netlink = Netlink::open()?;
    netlink.delete(&interface::host_name(name))?;
    if let Mode::Bridge(name) = &call.config.mode
        && let Err(error) = bridge::remove_idle(&mut netlink, call.run_dir(), Some(name))
    {
        // The container is gone, so DEL has succeeded; the next DEL, or the daemon, removes the bridge.
        log(&format!("{error}"));
    }
    withdraw(call, name)?;
    call.free_addresses(name)
}

/// Withdraws it from the daemon, or by a tombstone when that is away.
pub(super) fn withdraw(call: &Invocation<'_>, name: &AttachmentName) -> Result<(), CniError> {
    let daemon = DaemonClient::new(call.run_dir()).impatient();
    match daemon.detach(name) {
        Ok(()) => Ok(()),
        Err(DaemonError::Refused(refusal)) => Err(DaemonError::Refused(refusal).into()),
        // It is away, or of a version that has no attachments.
        Err(error) => {
            log(&format!("{error}"));
            daemon.forget(name).map_err(|error| {
                CniError::new(Code::Io, format!("cannot detach while the daemon is unreachable: {error}"))
            })
        }
    }
}
