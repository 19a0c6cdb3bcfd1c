//! VXLAN devices, with the peers' ends as neighbours and forwarding entries.
//!
//! ```text
//! route to a peer's prefix ─▶ next hop ─▶ neighbour: its hardware address ─▶ forwarding entry: where outer packets go
//! ```
//!
//! All entries that are put are permanent. What a device learns, where `Learning` is on, stays. Addresses on a device stay, such as Flannel's: with
//! the last one, the kernel takes away its routes and neighbours. What cannot be changed in a device that is there
//! is its [`VxlanShape`]: a device of another shape is made again before a pass, down, so that the pass knows its index.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use mesh::{
    interface::InterfaceName,
    kernel_state::{Desired, VxlanDevice},
    path::MacAddress,
};

use super::{
    Options,
    failure::{Failure, FailureCause},
    netlink::{KernelLink, Rtnetlink, RtnetlinkError, VxlanShape},
    observed::ObservedVxlan,
};

/// A step that concerns a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanChange {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// The step.
    pub step: VxlanStep,
}

/// What is done to a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VxlanStep {
    /// Made, down.
    Added,
    /// Deleted.
    Removed,
    /// Marked as this program's, by its alias.
    Marked,
    /// Its MTU, in bytes.
    Mtu(u32),
    /// Its hardware address.
    Mac(MacAddress),
    /// Set up.
    Up,
    /// A peer's hardware address, put or replaced.
    NeighbourSet(IpAddr, MacAddress),
    /// A neighbour that is wanted no more.
    NeighbourRemove(IpAddr, MacAddress),
    /// Where frames to a hardware address go, put or replaced.
    ForwardingSet(MacAddress, IpAddr),
    /// A forwarding entry that is wanted no more.
    ForwardingRemove(MacAddress, IpAddr),
}

impl VxlanChange {
    /// Packets can come in by an interface that is up, and leave by an entry.
    pub(crate) fn needs_firewall(&self) -> bool {
        matches!(self.step, VxlanStep::Up | VxlanStep::NeighbourSet(..) | VxlanStep::ForwardingSet(..))
    }
}

impl fmt::Display for VxlanChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        match &self.step {
            VxlanStep::Added => write!(f, "VXLAN device added"),
            VxlanStep::Removed => write!(f, "VXLAN device removed"),
            VxlanStep::Marked => write!(f, "marked as the mesh's"),
            VxlanStep::Mtu(mtu) => write!(f, "mtu {mtu}"),
            VxlanStep::Mac(mac) => write!(f, "hardware address {mac}"),
            VxlanStep::Up => write!(f, "up"),
            VxlanStep::NeighbourSet(address, mac) => write!(f, "neighbour {address} at {mac}"),
            VxlanStep::NeighbourRemove(address, mac) => write!(f, "neighbour {address} at {mac} removed"),
            VxlanStep::ForwardingSet(mac, to) => write!(f, "frames to {mac} go to {to}"),
            VxlanStep::ForwardingRemove(mac, to) => write!(f, "frames to {mac} go to {to} no more"),
        }
    }
}

/// Whether a link is a VXLAN device that this program made or took over.
pub(super) fn is_ours(options: &Options, link: &KernelLink) -> bool {
    link.vxlan.is_some() && link.alias.as_deref() == Some(&options.table_name)
}

/// Makes the missing devices and those of another shape, down. Returns whether it did anything.
pub(super) async fn make_devices(
    options: &Options,
    netlink: &Rtnetlink,
    desired: &Desired,
    links: &[KernelLink],
    changes: &mut Vec<VxlanChange>,
    failures: &mut Vec<Failure>,
) -> bool {
    let mut made = false;
    for device in &desired.vxlan {
        let refuse = |problem| Failure::new(format!("VXLAN device {}", device.name), problem);
        let named = |name: &InterfaceName| links.iter().find(|link| link.name == name.as_str());
        let Some(underlay) = named(&device.underlay) else {
            failures.push(refuse(FailureCause::NoDevice { dev: device.underlay.clone() }));
            continue;
        };
        let wanted = shape(device, underlay.index);
        let step = |step| VxlanChange { name: device.name.to_string(), index: 0, step };
        match named(&device.name) {
            Some(link) if link.vxlan == Some(wanted) => continue,
            Some(link) if link.vxlan.is_none() => {
                failures.push(refuse(FailureCause::NotVxlan));
                continue;
            }
            Some(link) if !is_ours(options, link) => {
                failures.push(refuse(FailureCause::OtherVxlan));
                continue;
            }
            Some(link) => match netlink.delete_link(link.index).await {
                Ok(()) => changes.push(step(VxlanStep::Removed)),
                Err(problem) => {
                    failures.push(refuse(problem));
                    continue;
                }
            },
            None => {}
        }
        match netlink.add_vxlan(device, wanted).await {
            Ok(()) => changes.push(step(VxlanStep::Added)),
            Err(FailureCause::Kernel { errno: libc::EEXIST }) => {
                failures.push(refuse(FailureCause::VniTaken { vni: device.vni, port: device.port }));
            }
            Err(problem) => failures.push(refuse(problem)),
        }
        made = true;
    }
    made
}

fn shape(device: &VxlanDevice, underlay: u32) -> VxlanShape {
    VxlanShape {
        vni: device.vni,
        underlay,
        local: Some(device.local.address),
        port: device.port,
        learning: device.learning,
        gbp: device.gbp,
        other: false,
    }
}

/// The steps that bring devices and entries to what they are to be, and those that withdraw, which wait for the routes.
pub(super) fn plan(
    desired: &Desired,
    observed: &BTreeMap<String, ObservedVxlan>,
) -> (Vec<VxlanChange>, Vec<VxlanChange>) {
    let (mut changes, mut withdrawn) = (Vec::new(), Vec::new());
    for (name, seen) in observed {
        let step = |step| VxlanChange { name: name.clone(), index: seen.index, step };
        let Some(device) = desired.vxlan.iter().find(|device| device.name.as_str() == name) else {
            withdrawn.push(step(VxlanStep::Removed));
            continue;
        };
        if !seen.is_ours {
            changes.push(step(VxlanStep::Marked));
        }
        if seen.mtu != device.mtu {
            changes.push(step(VxlanStep::Mtu(device.mtu)));
        }
        if seen.mac != Some(device.local.mac) {
            changes.push(step(VxlanStep::Mac(device.local.mac)));
        }
        if !seen.up {
            changes.push(step(VxlanStep::Up));
        }
        let (neighbours, forwarding) = entries(device);
        // The kernel forgets all neighbours of a device that gets another hardware address.
        let none = BTreeSet::new();
        let known = if seen.mac == Some(device.local.mac) { &seen.neighbours } else { &none };
        let added = forwarding.difference(&seen.forwarding);
        changes.extend(added.map(|(mac, to)| step(VxlanStep::ForwardingSet(*mac, *to))));
        changes.extend(neighbours.difference(known).map(|(at, mac)| step(VxlanStep::NeighbourSet(*at, *mac))));
        // What was put in the place of another is not taken away behind it.
        let replaced: BTreeSet<&IpAddr> = neighbours.iter().map(|(at, _)| at).collect();
        let gone = seen.neighbours.difference(&neighbours).filter(|(at, _)| !replaced.contains(at));
        withdrawn.extend(gone.map(|(at, mac)| step(VxlanStep::NeighbourRemove(*at, *mac))));
        let moved: BTreeSet<&MacAddress> = forwarding.iter().map(|(mac, _)| mac).collect();
        let gone = seen.forwarding.difference(&forwarding).filter(|(mac, _)| !moved.contains(mac));
        withdrawn.extend(gone.map(|(mac, to)| step(VxlanStep::ForwardingRemove(*mac, *to))));
    }
    (changes, withdrawn)
}

type Neighbours = BTreeSet<(IpAddr, MacAddress)>;
type Forwarding = BTreeSet<(MacAddress, IpAddr)>;

fn entries(device: &VxlanDevice) -> (Neighbours, Forwarding) {
    let neighbours = device.peers.iter().map(|peer| (peer.next_hop, peer.vtep.mac));
    let forwarding = device.peers.iter().map(|peer| (peer.vtep.mac, peer.vtep.address));
    (neighbours.collect(), forwarding.collect())
}

/// Reads the devices of ours, and those of a name that one is to have.
pub(super) async fn observe(
    options: &Options,
    netlink: &Rtnetlink,
    desired: &Desired,
    links: &[KernelLink],
) -> Result<BTreeMap<String, ObservedVxlan>, RtnetlinkError> {
    let mut observed = BTreeMap::new();
    for link in links {
        let wanted = desired.vxlan.iter().find(|device| device.name.as_str() == link.name);
        let (Some(shape), true) = (link.vxlan, wanted.is_some() || is_ours(options, link)) else { continue };
        let ipv4 = shape.local.is_none_or(|local| local.is_ipv4());
        let seen = ObservedVxlan {
            index: link.index,
            mtu: link.mtu,
            up: link.up,
            is_ours: is_ours(options, link),
            mac: link.mac,
            neighbours: netlink.permanent_neighbours(link.index, ipv4).await?,
            forwarding: netlink.forwarding_entries(link.index).await?,
        };
        observed.insert(link.name.clone(), seen);
    }
    Ok(observed)
}

pub(super) async fn apply(options: &Options, netlink: &Rtnetlink, change: &VxlanChange) -> Result<(), FailureCause> {
    let index = change.index;
    match &change.step {
        // Made before the plan.
        VxlanStep::Added => Ok(()),
        VxlanStep::Removed => netlink.delete_link(index).await,
        VxlanStep::Marked => netlink.set_alias(index, &options.table_name).await,
        VxlanStep::Mtu(mtu) => netlink.set_mtu(index, *mtu).await,
        VxlanStep::Mac(mac) => netlink.set_mac(index, *mac).await,
        VxlanStep::Up => netlink.set_up(index, true).await,
        VxlanStep::NeighbourSet(address, mac) => netlink.set_neighbour(index, *address, *mac).await,
        VxlanStep::NeighbourRemove(address, _) => netlink.remove_neighbour(index, *address).await,
        VxlanStep::ForwardingSet(mac, to) => netlink.set_forwarding(index, *mac, *to).await,
        VxlanStep::ForwardingRemove(mac, to) => netlink.remove_forwarding(index, *mac, *to).await,
    }
}
