//! ADD as the plugin that creates the interface.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink::{Mac, Netlink};
use serde_json::Value;

use super::{Invocation, del};
use crate::{
    config::{self, Mode},
    daemon::{Attach, Begin, BeginAdd, Begun, DaemonClient, Network},
    environment::AttachmentName,
    error::{CniError, Code},
    identity,
    interface::{self, InterfacePlan},
    ipam::{self, AddressSource},
    log::log,
    namespace::NetworkNamespace,
    result::AddResult,
};

/// Attaches a container. A failure reverts all steps.
pub(super) fn add(call: &Invocation<'_>) -> Result<Value, CniError> {
    let name = call.environment.attachment()?;
    let namespace = NetworkNamespace::open(&call.environment.netns()?)?;
    let begin = Begin {
        network: call.config.name.clone(),
        netns: call.environment.netns.clone(),
        netns_inode: Some(namespace.inode()),
        interface: Some(interface::host_name(&name)),
    };
    let addresses = match ipam::source(call.config) {
        AddressSource::Daemon => Some(ipam::request(call.environment, call.config)?),
        AddressSource::Plugin(_) => None,
    };
    let mac = call.config.hardware_address(call.environment)?;
    let mut netlink = Netlink::open()?;
    refuse_existing(&mut netlink, &name, &namespace)?;
    let daemon = DaemonClient::new(call.run_dir());
    let begun = daemon.begin(&name, &BeginAdd { begin, addresses })?;
    let added = with_addresses(call, &name, &namespace, &begun, mac, &daemon, &mut netlink);
    if added.is_err() {
        take_back(call, &name);
    }
    Ok(added?.to_json(call.config.version))
}

/// Refuses an ADD for an existing interface: its failure must not revert another ADD.
fn refuse_existing(netlink: &mut Netlink, name: &AttachmentName, namespace: &NetworkNamespace) -> Result<(), CniError> {
    let host_name = interface::host_name(name);
    let inside = namespace.enter(|netlink| netlink.link(&name.ifname))?;
    if inside.is_some() || netlink.link(&host_name)?.is_some() {
        let message = format!("container {} already has an interface {}", name.container_id, name.ifname);
        return Err(CniError::new(Code::InvalidEnvironment, message).details("run DEL for it first"));
    }
    Ok(())
}

fn with_addresses(
    call: &Invocation<'_>,
    name: &AttachmentName,
    namespace: &NetworkNamespace,
    begun: &Begun,
    mac: Option<Mac>,
    daemon: &DaemonClient,
    netlink: &mut Netlink,
) -> Result<AddResult, CniError> {
    let network = &begun.network;
    let given = given(call, begun)?;
    let addresses = given.ips.iter().map(|ip| ip.address).collect();
    let plan = InterfacePlan {
        name,
        namespace,
        routes: given.routes,
        mac,
        mtu: u32::from(network.mtu),
        bridge: match &call.config.mode {
            Mode::Routed => None,
            Mode::Bridge(bridge) => Some(bridge),
        },
        addresses,
        run_dir: call.run_dir(),
    };
    let attaching = daemon.attach(
        name,
        &Attach {
            pod: identity::pod(call.environment, call.config),
            addresses: plan.addresses.iter().map(IpNet::addr).collect(),
            interface: interface::host_name(name),
            mac: Some(plan.inside_mac()),
            allowed_sources: call.config.allowed_sources.clone(),
        },
    )?;
    // The interface is made while the daemon puts policy in force.
    let prepared = interface::prepare(netlink, &plan)?;
    // Until here nothing reaches the container: there is no route to its addresses.
    attaching.in_force()?;
    interface::open(netlink, &plan, network, &prepared)?;
    Ok(AddResult { dns: given.dns, ..prepared.result(&plan) })
}

/// The addresses from the daemon, or from the IPAM plugin, which is called here.
fn given(call: &Invocation<'_>, begun: &Begun) -> Result<AddResult, CniError> {
    let Some(delegate) = call.delegate()? else {
        let addresses = begun.addresses.as_deref().ok_or_else(|| {
            CniError::new(Code::DaemonDiffers, "the daemon is older than this plugin and does not allocate addresses")
                .details("restart meshd so that daemon and plugin have the same version")
        })?;
        return ipam::allocated(call.config, addresses);
    };
    let answer = delegate.call("ADD", call.environment, ipam::configuration(call.config, Some(&begun.network))?)?;
    let given: AddResult = serde_json::from_slice(&answer)
        .map_err(|error| CniError::new(Code::NoAddress, format!("the IPAM plugin's answer cannot be read: {error}")))?;
    check(call, &given, &begun.network)?;
    Ok(given)
}

/// Refuses addresses of an IPAM plugin that cannot belong to this node's containers.
fn check(call: &Invocation<'_>, given: &AddResult, network: &Network) -> Result<(), CniError> {
    let refuse =
        |message: String| Err(CniError::new(Code::InvalidConfig, message).details("check ipam in the configuration"));
    let addresses: Vec<IpNet> = given.ips.iter().map(|ip| ip.address).collect();
    if addresses.is_empty() {
        return refuse("the IPAM plugin returned no address".to_owned());
    }
    for address in &addresses {
        let ip = address.addr();
        if !network.subnets.iter().any(|subnet| subnet.contains(&ip)) {
            return refuse(format!("the IPAM plugin returned {ip}, which is outside this node's subnets"));
        }
        if network.overlay.contains(&ip) {
            return refuse(format!("the IPAM plugin returned {ip}, which is this node's own address"));
        }
    }
    let wanted: Vec<IpAddr> = config::wanted_addresses(&call.config.raw)?;
    if let Some(missing) = wanted.iter().find(|ip| !addresses.iter().any(|given| given.addr() == **ip)) {
        return refuse(format!("the IPAM plugin did not return {missing}, which the runtime requested"));
    }
    Ok(())
}

/// In reverse order. Leftovers of a failure here are freed by DEL, by GC, or by the daemon once the container is gone;
/// the first error counts.
fn take_back(call: &Invocation<'_>, name: &AttachmentName) {
    if let Err(error) = del::remove(call, name) {
        log(&format!("after a failed ADD: {error}"));
    }
}
