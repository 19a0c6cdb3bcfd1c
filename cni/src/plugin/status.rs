//! STATUS: whether an ADD would succeed.

use super::Invocation;
use crate::{
    daemon::{DaemonClient, DaemonError},
    delegate::Delegate,
    error::{CniError, Code},
    ipam::{self, AddressSource},
    version::CniVersion,
};

/// Fails with [`Code::LimitedConnectivity`] while the daemon is away, and with [`Code::NotAvailable`] while it knows no
/// subnet, has not programmed policy, or has no free address, or while the IPAM plugin is not there.
pub(super) fn status(call: &Invocation<'_>) -> Result<(), CniError> {
    // The runtime asks again in a moment.
    let daemon = DaemonClient::new(call.run_dir()).impatient();
    let ready = match ipam::source(call.config) {
        AddressSource::Daemon => daemon.ready_with(&ipam::request(call.environment, call.config)?),
        AddressSource::Plugin(_) => daemon.ready(),
    };
    ready.map_err(|error| {
        let code = match &error {
            // The tunnel is the daemon's: without it, containers reach those of other sites no more.
            DaemonError::Unreachable { .. } | DaemonError::Broken { .. } => Code::LimitedConnectivity,
            _ => Code::NotAvailable,
        };
        CniError { code, ..error.into() }
    })?;
    let delegate = call.delegate().map_err(|error| CniError { code: Code::NotAvailable, ..error })?;
    delegate.map_or(Ok(()), |delegate| of_delegate(call, &delegate))
}

/// A plugin that knows STATUS is asked itself.
fn of_delegate(call: &Invocation<'_>, delegate: &Delegate) -> Result<(), CniError> {
    if delegate.version() < CniVersion::V1_1_0 {
        return Ok(());
    }
    let configuration = ipam::configuration(call.config, None)?;
    let asked = delegate.call("STATUS", call.environment, configuration);
    asked.map(drop).map_err(|error| CniError { code: Code::NotAvailable, ..error })
}
