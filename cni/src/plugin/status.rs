//! STATUS: whether an ADD would succeed.

use super::Call;
use crate::{
    daemon::{Client, ClientError},
    delegate::Delegate,
    error::{CniError, Code},
    ipam::{self, Source},
    version::CniVersion,
};

/// Fails with [`Code::LimitedConnectivity`] while the daemon is away, and with [`Code::NotAvailable`] while it knows no
/// subnet, has not programmed policy, or has no free address, or while the IPAM plugin is not there.
pub(super) fn status(call: &Call<'_>) -> Result<(), CniError> {
    // The runtime asks again in a moment.
    let daemon = Client::new(call.run_dir()).impatient();
    let ready = match ipam::source(call.config) {
        Source::Daemon => daemon.ready_with(&ipam::request(call.environment, call.config)?),
        Source::Plugin(_) => daemon.ready(),
    };
    ready.map_err(|error| {
        let code = match &error {
            // The tunnel is the daemon's: without it, containers reach those of other sites no more.
            ClientError::Unreachable { .. } | ClientError::Broken { .. } => Code::LimitedConnectivity,
            _ => Code::NotAvailable,
        };
        CniError { code, ..error.into() }
    })?;
    let delegate = call.delegate().map_err(|error| CniError { code: Code::NotAvailable, ..error })?;
    delegate.map_or(Ok(()), |delegate| of_delegate(call, &delegate))
}

/// A plugin that knows STATUS is asked itself.
fn of_delegate(call: &Call<'_>, delegate: &Delegate) -> Result<(), CniError> {
    if delegate.version() < CniVersion::V1_1_0 {
        return Ok(());
    }
    let configuration = ipam::configuration(call.config, None)?;
    let asked = delegate.call("STATUS", call.environment, configuration);
    asked.map(drop).map_err(|error| CniError { code: Code::NotAvailable, ..error })
}
