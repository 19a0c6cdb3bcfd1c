//! CHECK: is the attachment still what ADD made of it?

use serde_json::Value;

use super::{Call, chained};
use crate::{
    config::Mode,
    daemon::Client,
    error::{CniError, Code},
    interface, ipam,
    namespace::Namespace,
    netlink::Netlink,
    result::AddResult,
};

/// Looks at the interface, its addresses and routes, the daemon and the IPAM plugin. What later plugins have added is no
/// fault.
pub(super) fn check(call: &Call<'_>) -> Result<(), CniError> {
    let name = call.environment.attachment()?;
    let namespace = Namespace::open(&call.environment.netns()?)?;
    let previous = call
        .config
        .prev_result
        .clone()
        .ok_or_else(|| CniError::new(Code::InvalidConfig, "CHECK needs prevResult, which is what ADD returned"))?;
    let made: AddResult = serde_json::from_value(previous)
        .map_err(|error| CniError::new(Code::Decode, "prevResult cannot be read").details(error.to_string()))?;
    let known = Client::new(call.run_dir()).attachment(&name)?;
    let Some(attach) = known.attach else { return Err(differs("its ADD was not ended")) };
    namespace.enter(|netlink| inside(netlink, &name.ifname, &made))?;
    if known.begin.interface.is_none() {
        let interface = chained::host_end(&namespace, &name.ifname, &made)?;
        if interface != attach.interface {
            return Err(differs(format!("its end on the host is {interface}, not {}", attach.interface)));
        }
        return Ok(());
    }
    outside(call, &interface::host_name(&name), &made)?;
    call.ipam("CHECK", with_previous(call)?).map(drop)
}

/// The container's end.
fn inside(netlink: &mut Netlink, ifname: &str, made: &AddResult) -> Result<(), CniError> {
    let link = netlink.link(ifname)?.ok_or_else(|| differs(format!("the container has no interface {ifname}")))?;
    if !link.up {
        return Err(differs(format!("{ifname} is down")));
    }
    let index = made.interfaces.iter().position(|interface| interface.name == ifname && !interface.sandbox.is_empty());
    let is_its = |of: Option<usize>| of.is_none() || of == index;
    let addresses = netlink.addresses(link.index)?;
    if let Some(missing) = made.ips.iter().find(|ip| is_its(ip.interface) && !addresses.contains(&ip.address)) {
        return Err(differs(format!("{ifname} lacks its address {}", missing.address)));
    }
    let routes = netlink.routes(link.index)?;
    // A route by another interface is that plugin's business.
    let missing = made.routes.iter().find(|wanted| {
        let elsewhere = made.interfaces.iter().filter(|interface| !interface.sandbox.is_empty()).count() > 1;
        !elsewhere && routes.iter().all(|route| route.dst != wanted.dst)
    });
    missing.map_or(Ok(()), |route| Err(differs(format!("the container lacks its route to {}", route.dst))))
}

/// The host's end.
fn outside(call: &Call<'_>, host_name: &str, made: &AddResult) -> Result<(), CniError> {
    let mut netlink = Netlink::open()?;
    let host = netlink.link(host_name)?.ok_or_else(|| differs(format!("the host has no interface {host_name}")))?;
    if !host.up {
        return Err(differs(format!("{host_name} is down")));
    }
    match &call.config.mode {
        Mode::Bridge(bridge) => {
            let bridge_index = netlink.link(bridge)?.map(|link| link.index);
            if bridge_index.is_none() || host.master != bridge_index {
                return Err(differs(format!("{host_name} is no port of {bridge}")));
            }
        }
        Mode::Routed => {
            let routes = netlink.routes(host.index)?;
            let led = |ip: std::net::IpAddr| routes.iter().any(|route| route.dst == ipnet::IpNet::from(ip));
            if let Some(missing) = made.ips.iter().find(|ip| !led(ip.address.addr())) {
                return Err(differs(format!("no route leads to {}", missing.address.addr())));
            }
        }
    }
    Ok(())
}

/// IPAM plugins look for their addresses in `prevResult`.
fn with_previous(call: &Call<'_>) -> Result<serde_json::Map<String, Value>, CniError> {
    let mut configuration = ipam::configuration(call.config, None)?;
    if let Some(previous) = &call.config.prev_result {
        configuration.insert("prevResult".to_owned(), previous.clone());
    }
    Ok(configuration)
}

fn differs(what: impl Into<String>) -> CniError {
    CniError::new(Code::NotAsMade, what)
}
