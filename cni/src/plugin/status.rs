//! STATUS: would an ADD be taken?

use std::net::IpAddr;

use super::Call;
use crate::{
    daemon::{Client, ClientError, Network, Reason},
    delegate::Delegate,
    error::{CniError, Code},
    ipam,
    version::CniVersion,
};

/// Fails with [`Code::LimitedConnectivity`] while the daemon is away, and with [`Code::NotAvailable`] while it knows no
/// subnet or has not programmed policy, while the IPAM plugin is not there, or while no address is left.
pub(super) fn status(call: &Call<'_>) -> Result<(), CniError> {
    // The runtime asks again in a moment.
    let network = Client::new(call.run_dir()).impatient().ready().map_err(|error| {
        let code = match &error {
            // The tunnel is the daemon's: without it, containers reach those of other sites no more.
            ClientError::Unreachable { .. } | ClientError::Broken { .. } => Code::LimitedConnectivity,
            ClientError::Refused(refusal) if refusal.code == Reason::NoSubnet => Code::NotAvailable,
            _ => Code::NotAvailable,
        };
        CniError { code, ..error.into() }
    })?;
    let delegate = Delegate::find(ipam::kind(call.config), call.environment, call.run_dir())
        .map_err(|error| CniError { code: Code::NotAvailable, ..error })?;
    // Where the operator has named ranges or a folder, only the plugin knows how much is left.
    let named = ["ranges", "subnet"].iter().any(|field| call.config.ipam.contains_key(*field));
    if named || !call.config.uses_own_addresses() {
        return of_delegate(call, &delegate);
    }
    exhausted(call, &network)
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

fn exhausted(call: &Call<'_>, network: &Network) -> Result<(), CniError> {
    let dir = call.config.address_dir();
    let reserved = ipam::reserved(&dir, &call.config.name)
        .map_err(|error| CniError::new(Code::NotAvailable, format!("{}: {error}", dir.display())))?;
    for subnet in &network.subnets {
        let Some((first, last)) = ipam::range(subnet, &network.overlay) else {
            return Err(CniError::new(Code::NotAvailable, format!("{subnet} has no address for a container")));
        };
        let given = reserved.iter().filter(|(ip, _)| (first..=last).contains(ip)).count();
        if given as u128 >= count(first, last) {
            let message = format!("all {given} addresses of {subnet} are given out");
            return Err(CniError::new(Code::NotAvailable, message).details("DEL containers, or GC what is gone"));
        }
    }
    Ok(())
}

fn count(first: IpAddr, last: IpAddr) -> u128 {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => u128::from(u32::from(last) - u32::from(first)) + 1,
        (IpAddr::V6(first), IpAddr::V6(last)) => (u128::from(last) - u128::from(first)).saturating_add(1),
        _ => 0,
    }
}
