//! Overlaps with the mesh: this machine's addresses, and routes and rules that lead the mesh's packets elsewhere.

use std::{collections::BTreeSet, net::IpAddr};

use api_types::{Finding, Peer, Severity};
use ipnet::IpNet;
use kernel::{self, Rtnetlink, RtnetlinkError};
use mesh::{address::overlap, problem::ProblemCode};
use text::quote;
use tokio::runtime::Handle;

use super::ApiState;
use crate::doctor::routes;

/// Peers whose addresses are looked up.
const LOOKED_UP: usize = 1024;

/// The mesh's prefixes, as this node has them.
pub(super) struct Prefixes<'a> {
    pub(super) networks: &'a [IpNet],
    pub(super) own: &'a [IpNet],
    /// Destinations of the daemon's own routes.
    pub(super) routed: &'a [IpNet],
    /// The tunnel's device and those of the underlay.
    pub(super) devices: &'a BTreeSet<String>,
}

impl ApiState {
    pub(super) fn overlaps(&self, peers: &[(String, Peer)], mesh: &Prefixes<'_>, findings: &mut Vec<Finding>) {
        let mut named = foreign_routes(mesh, &self.identity.interface, findings);
        let asked: Vec<(&str, IpAddr)> = peers
            .iter()
            .take(LOOKED_UP)
            .flat_map(|(_, peer)| peer.overlay.iter().map(move |address| (peer.name.as_str(), *address)))
            .collect();
        let Ok(LocalAddresses { addresses, ways }) = Handle::current().block_on(look(&asked)) else { return };
        for (device, address) in addresses {
            overlapping(&device, address, mesh, &self.identity.interface, findings);
        }
        for ((peer, address), device) in asked.iter().zip(ways) {
            let Some(device) = device.filter(|device| !mesh.devices.contains(device)) else { continue };
            if !named.insert(device.clone()) {
                continue;
            }
            let remedy = match leading(*address, &device) {
                Some(net) => format!("ip route delete {net} dev {}", quote(&device)),
                None => {
                    format!("ip route get {address}; ip rule show # find the rule, then delete it: ip rule delete …")
                }
            };
            findings.push(foreign_route(&format!("{address} of peer {peer}"), &device, remedy));
        }
    }
}

/// The finding that packets for the mesh leave by a foreign device.
fn foreign_route(packets: &str, device: &str, remedy: String) -> Finding {
    let cause = format!("a foreign route or rule sends {packets} to {device}");
    Finding::new(Severity::Error, ProblemCode::ForeignRoute, cause, remedy)
}

/// Addresses of this machine with their interfaces, and by which interface each address that was asked for is reached.
struct LocalAddresses {
    addresses: Vec<(String, IpNet)>,
    ways: Vec<Option<String>>,
}

async fn look(asked: &[(&str, IpAddr)]) -> Result<LocalAddresses, RtnetlinkError> {
    let netlink = Rtnetlink::open()?;
    let links = netlink.links().await?;
    let name = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let addresses = netlink.addresses(None).await?;
    let addresses = addresses.iter().filter_map(|found| Some((name(found.index)?, found.address))).collect();
    let mut ways = Vec::with_capacity(asked.len());
    for (_, address) in asked {
        ways.push(netlink.way_to(*address).await?.and_then(name));
    }
    Ok(LocalAddresses { addresses, ways })
}

/// The route of the main table that leads there by this device, the longest one.
fn leading(address: IpAddr, device: &str) -> Option<IpNet> {
    let routes =
        routes::main_table().into_iter().filter(|route| route.device == device && route.net.contains(&address));
    routes.map(|route| route.net).max_by_key(IpNet::prefix_len)
}

/// Addresses inside of the mesh's networks that are none of the mesh's, and networks of this machine around them.
fn overlapping(device: &str, address: IpNet, mesh: &Prefixes<'_>, tun: &str, findings: &mut Vec<Finding>) {
    // Addresses in this node's own subnet belong to its containers, such as their bridge.
    let own = mesh.own.iter().any(|own| own.contains(&address.addr()));
    let Some(network) = mesh.networks.iter().find(|net| overlap(net, &address)).filter(|_| device != tun && !own)
    else {
        return;
    };
    findings.push(Finding::new(
        Severity::Error,
        ProblemCode::NetworksOverlap,
        format!("{address} on {device} overlaps the mesh network {network}: one of the two is unreachable"),
        format!(
            "ip addr delete {address} dev {} # or move the mesh to networks that no site uses: docs/operations.md, \
             \"Change the network\"",
            quote(device)
        ),
    ));
}

/// Routes of others that take packets for the mesh elsewhere. Returns the devices that they lead to.
fn foreign_routes(mesh: &Prefixes<'_>, tun: &str, findings: &mut Vec<Finding>) -> BTreeSet<String> {
    let mut devices = BTreeSet::new();
    for route in routes::main_table() {
        let inside = mesh.networks.iter().any(|net| net.contains(&route.net));
        let known = route.device == tun
            || route.protocol == kernel::ROUTE_PROTOCOL
            || mesh.routed.contains(&route.net)
            || mesh.own.iter().any(|own| overlap(own, &route.net));
        if inside && !known && route.device != "lo" {
            let remedy = format!("ip route delete {} dev {}", route.net, quote(&route.device));
            let packets = format!("{}, inside the mesh network,", route.net);
            findings.push(foreign_route(&packets, &route.device, remedy));
            devices.insert(route.device);
        }
    }
    devices
}
