//! CHECK: compares the attachment with the result of ADD.

use ipnet::IpNet;
use netlink::{Mac, Netlink};
use serde_json::Value;

use super::{Invocation, chained};
use crate::{
    config::Mode,
    daemon::DaemonClient,
    error::{CniError, Code},
    interface, ipam,
    link::{forwards, mac_text},
    namespace::NetworkNamespace,
    result::{AddResult, Interface},
};

/// Checks the interface, its addresses and routes, the daemon and the IPAM plugin. Additions by later plugins are
/// ignored.
pub(super) fn check(call: &Invocation<'_>) -> Result<(), CniError> {
    let name = call.environment.attachment()?;
    let namespace = NetworkNamespace::open(&call.environment.netns()?)?;
    let previous = call
        .config
        .prev_result
        .clone()
        .ok_or_else(|| CniError::new(Code::InvalidConfig, "CHECK needs prevResult, the result of ADD"))?;
    let made: AddResult = serde_json::from_value(previous)
        .map_err(|error| CniError::new(Code::Decode, "prevResult cannot be read").details(error.to_string()))?;
    let known = DaemonClient::new(call.run_dir()).attachment(&name)?;
    let Some(attach) = known.attach else { return Err(differs("its ADD did not complete")) };
    let expected = Expected { ifname: &name.ifname, made: &made, mac: known.begin.interface.is_some() };
    let mac = namespace.enter(|netlink| inside(netlink, &expected))?;
    if let (Some(told), Some(mac)) = (attach.mac, mac)
        && told != mac
        && Netlink::open()?.link(&attach.interface)?.is_some_and(|host| host.master.is_some())
    {
        let [mac, told] = [mac, told].map(|mac| mac_text(&mac));
        return Err(differs(format!("the hardware address of {} is {mac}, not {told}", name.ifname))
            .details("put the plugin that changes it before meshd-cni, and recreate the container"));
    }
    if known.begin.interface.is_none() {
        let interface = chained::host_end(&namespace, &name.ifname, &made)?;
        if interface != attach.interface {
            return Err(differs(format!("its host interface is {interface}, not {}", attach.interface)));
        }
        return Ok(());
    }
    if let Some(unknown) = expected.addresses().find(|address| !attach.addresses.contains(&address.addr())) {
        return Err(differs(format!("the daemon has no record of its address {}", unknown.addr())));
    }
    outside(call, &interface::host_name(&name), &made)?;
    match call.delegate()? {
        Some(delegate) => delegate.call("CHECK", call.environment, with_previous(call)?).map(drop),
        None => Ok(()),
    }
}

/// The result of ADD for an interface.
struct Expected<'a> {
    ifname: &'a str,
    made: &'a AddResult,
    /// Whether its hardware address is this plugin's business.
    mac: bool,
}

impl Expected<'_> {
    /// The interface's index and entry in the result.
    fn interface(&self) -> Option<(usize, &Interface)> {
        let is_it = |interface: &Interface| interface.name == self.ifname && !interface.sandbox.is_empty();
        self.made.interfaces.iter().enumerate().find(|(_, interface)| is_it(interface))
    }

    fn addresses(&self) -> impl Iterator<Item = IpNet> {
        let index = self.interface().map(|(index, _)| index);
        let is_its = move |of: Option<usize>| of.is_none() || of == index;
        self.made.ips.iter().filter(move |ip| is_its(ip.interface)).map(|ip| ip.address)
    }
}

/// The container's end. Returns its hardware address.
fn inside(netlink: &mut Netlink, expected: &Expected<'_>) -> Result<Option<Mac>, CniError> {
    let Expected { ifname, made, mac } = *expected;
    let link = netlink.link(ifname)?.ok_or_else(|| differs(format!("the container has no interface {ifname}")))?;
    if !link.up {
        return Err(differs(format!("{ifname} is down")));
    }
    let bears = link.mac.map(|mac| mac_text(&mac)).unwrap_or_default();
    let made_with = expected.interface().map(|(_, interface)| interface.mac.as_str()).unwrap_or_default();
    if mac && !made_with.is_empty() && !made_with.eq_ignore_ascii_case(&bears) {
        return Err(differs(format!("{ifname} has the hardware address {bears}, not {made_with}")));
    }
    let addresses = netlink.addresses(link.index)?;
    if let Some(missing) = expected.addresses().find(|address| !addresses.contains(address)) {
        return Err(differs(format!("{ifname} lacks its address {missing}")));
    }
    let routes = netlink.routes(link.index)?;
    // A route by another interface is that plugin's business.
    let missing = made.routes.iter().find(|wanted| {
        let elsewhere = made.interfaces.iter().filter(|interface| !interface.sandbox.is_empty()).count() > 1;
        !elsewhere && routes.iter().all(|route| route.dst != wanted.dst)
    });
    missing.map_or(Ok(link.mac), |route| Err(differs(format!("the container lacks its route to {}", route.dst))))
}

/// The host's end.
fn outside(call: &Invocation<'_>, host_name: &str, made: &AddResult) -> Result<(), CniError> {
    let mut netlink = Netlink::open()?;
    let host = netlink.link(host_name)?.ok_or_else(|| differs(format!("the host has no interface {host_name}")))?;
    if !host.up {
        return Err(differs(format!("{host_name} is down")));
    }
    let receives = match &call.config.mode {
        Mode::Bridge(bridge) => bridge.as_str(),
        Mode::Routed => host_name,
    };
    if made.ips.iter().any(|ip| ip.address.addr().is_ipv4()) && !forwards(receives) {
        return Err(differs(format!(
            "net.ipv4.conf.{receives}.forwarding is 0: the host does not forward its packets"
        )));
    }
    match &call.config.mode {
        Mode::Bridge(bridge) => {
            let bridge_index = netlink.link(bridge)?.map(|link| link.index);
            if bridge_index.is_none() || host.master != bridge_index {
                return Err(differs(format!("{host_name} is not a port of {bridge}")));
            }
        }
        Mode::Routed => {
            let routes = netlink.routes(host.index)?;
            let led = |ip: std::net::IpAddr| routes.iter().any(|route| route.dst == IpNet::from(ip));
            if let Some(missing) = made.ips.iter().find(|ip| !led(ip.address.addr())) {
                return Err(differs(format!("no route to {}", missing.address.addr())));
            }
        }
    }
    Ok(())
}

/// IPAM plugins look for their addresses in `prevResult`.
fn with_previous(call: &Invocation<'_>) -> Result<serde_json::Map<String, Value>, CniError> {
    let mut configuration = ipam::configuration(call.config, None)?;
    if let Some(previous) = &call.config.prev_result {
        configuration.insert("prevResult".to_owned(), previous.clone());
    }
    Ok(configuration)
}

fn differs(what: impl Into<String>) -> CniError {
    CniError::new(Code::NotAsMade, what)
}
