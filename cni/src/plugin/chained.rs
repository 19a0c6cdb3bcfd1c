//! ADD behind plugins that created the interface.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink::{Netlink, UnicastRoute};
use serde_json::Value;

use super::Invocation;
use crate::{
    daemon::{Attach, Begin, BeginAdd, DaemonClient, Network},
    error::{CniError, Code},
    identity,
    log::log,
    namespace::NetworkNamespace,
    result::AddResult,
    version::CniVersion,
};

/// Registers the attachment, lowers the MTU of routes into the mesh, and changes nothing else. The result is that of
/// the previous plugins.
pub(super) fn add(call: &Invocation<'_>) -> Result<Value, CniError> {
    let name = call.environment.attachment()?;
    let namespace = NetworkNamespace::open(&call.environment.netns()?)?;
    let previous = call.config.prev_result.clone().unwrap_or_default();
    let made: AddResult = serde_json::from_value(previous.clone())
        .map_err(|error| CniError::new(Code::Decode, "prevResult cannot be read").details(error.to_string()))?;
    let addresses = addresses(&made, &name.ifname);
    if addresses.is_empty() {
        return Err(CniError::new(
            Code::InvalidConfig,
            "prevResult has no address: put meshd-cni after the plugin that assigns one",
        ));
    }
    let daemon = DaemonClient::new(call.run_dir());
    let begin = Begin {
        network: call.config.name.clone(),
        netns: call.environment.netns.clone(),
        netns_inode: Some(namespace.inode()),
        interface: None,
    };
    let network = daemon.begin(&name, &BeginAdd { begin, addresses: None })?.network;
    let attached = (|| {
        let interface = host_end(&namespace, &name.ifname, &made)?;
        let attach = Attach {
            pod: identity::pod(call.environment, call.config),
            addresses: addresses.clone(),
            interface,
            mac: namespace.enter(|netlink| netlink.link(&name.ifname))?.and_then(|link| link.mac),
            allowed_sources: call.config.allowed_sources.clone(),
        };
        let attaching = daemon.attach(&name, &attach)?;
        let mtu = u32::from(network.mtu);
        let lowered = namespace.enter(|netlink| lower_mtu(netlink, &name.ifname, &network, mtu))?;
        attaching.in_force()?;
        Ok(lowered)
    })();
    match attached {
        Ok(lowered) => Ok(passed_on(previous, call.config.version, network.mtu, lowered)),
        Err(error) => {
            if let Err(error) = daemon.impatient().detach(&name) {
                log(&format!("after a failed ADD: {error}"));
            }
            Err(error)
        }
    }
}

/// The addresses of the interface that the runtime asked for. Results of IPAM-like plugins do not say whose they are.
fn addresses(made: &AddResult, ifname: &str) -> Vec<IpAddr> {
    let is_it = |index: Option<usize>| {
        let interface = index.and_then(|index| made.interfaces.get(index));
        interface.is_none_or(|interface| interface.name == ifname && !interface.sandbox.is_empty())
    };
    made.ips.iter().filter(|ip| is_it(ip.interface)).map(|ip| ip.address.addr()).collect()
}

/// Name of the host's end of the container's interface.
pub(super) fn host_end(namespace: &NetworkNamespace, ifname: &str, made: &AddResult) -> Result<String, CniError> {
    let inside = namespace.enter(|netlink| netlink.link(ifname))?;
    let inside = inside.ok_or_else(|| {
        CniError::new(
            Code::UnknownContainer,
            format!("the container has no interface {ifname}, which prevResult lists"),
        )
    })?;
    let mut netlink = Netlink::open()?;
    if let (true, Some(peer)) = (inside.is_veth, inside.peer)
        && let Some(host) = netlink.link_at(peer)?
        && host.is_veth
    {
        return Ok(host.name);
    }
    // Its other end may be of another kind; the plugin that created it then states its name.
    for interface in made.interfaces.iter().filter(|interface| interface.sandbox.is_empty()) {
        if netlink.link(&interface.name)?.is_some_and(|link| !link.is_bridge) {
            return Ok(interface.name.clone());
        }
    }
    Err(CniError::new(
        Code::InvalidConfig,
        format!(
            "{ifname} has no peer interface on the host, so policies cannot be \
             enforced"
        ),
    )
    .details("put meshd-cni after a plugin that creates a veth pair: bridge, ptp"))
}

/// Lowers the MTU of every route that leads further than to this node's own containers.
fn lower_mtu(netlink: &mut Netlink, ifname: &str, network: &Network, mtu: u32) -> Result<bool, CniError> {
    let Some(link) = netlink.link(ifname)?.filter(|link| link.mtu > mtu) else { return Ok(false) };
    let further = |route: &UnicastRoute| {
        !network.subnets.iter().any(|subnet| subnet.contains(&route.dst))
            && !matches!(route.dst, IpNet::V6(net) if net.network().is_unicast_link_local() || net.network().is_multicast())
    };
    Ok(netlink.set_route_mtu(link.index, mtu, further)? > 0)
}

/// `prevResult`, with the MTU of routes where that was lowered and the version has a field for it.
fn passed_on(mut previous: Value, version: CniVersion, mtu: u16, lowered: bool) -> Value {
    if lowered && version >= CniVersion::V1_1_0 {
        let routes = previous.get_mut("routes").and_then(Value::as_array_mut);
        for route in routes.into_iter().flatten().filter_map(Value::as_object_mut) {
            let higher = route.get("mtu").and_then(Value::as_u64).is_none_or(|now| now == 0 || now > u64::from(mtu));
            if higher {
                route.insert("mtu".to_owned(), mtu.into());
            }
        }
    }
    previous
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_addresses_of_the_interface_in_question_count() {
        let made: AddResult = serde_json::from_value(json!({
            "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/x"}, {"name": "net1", "sandbox": "/x"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.2/24", "interface": 1},
                    {"address": "10.0.1.2/24", "interface": 2}, {"address": "fd00::2/64"}]
        }))
        .unwrap();
        let found = addresses(&made, "eth0");
        assert_eq!(found, ["10.0.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
    }

    #[test]
    fn the_result_is_passed_on_as_it_is_but_for_the_mtu() {
        let previous = json!({"cniVersion": "1.1.0", "x": {"unknown": 1}, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.0.0.0/8", "mtu": 1300}]});
        assert_eq!(passed_on(previous.clone(), CniVersion::V1_1_0, 1420, false), previous);
        assert_eq!(passed_on(previous.clone(), CniVersion::V1_0_0, 1420, true), previous);
        let lowered = passed_on(previous, CniVersion::V1_1_0, 1420, true);
        assert_eq!(lowered["routes"], json!([{"dst": "0.0.0.0/0", "mtu": 1420}, {"dst": "10.0.0.0/8", "mtu": 1300}]));
    }
}
