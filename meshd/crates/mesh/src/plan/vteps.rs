//! VXLAN devices, and the peers' ends.

use std::{collections::BTreeMap, net::IpAddr};

use etcd_schema::{BackendKind, MacAddress, Vtep};
use ipnet::IpNet;

use super::{
    Planner,
    inputs::{Inputs, prefixes_of},
};
use crate::{
    address::Family,
    backend::PathKind,
    kernel_state::{Firewall, PrefixOn, PrefixVia, VxlanDevice, VxlanPeer},
    path::{ChosenPath, Via},
    topology::{NodePeer, PeerId},
    vxlan::{device_name, mac, next_hop},
};

/// A member that speaks VXLAN in a family.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VtepPeer {
    next_hop: IpAddr,
    vtep: Vtep,
    prefixes: Vec<IpNet>,
}

impl Inputs<'_> {
    /// The member's end in `family`, if packets may go there.
    pub(super) fn vtep(&self, member: &NodePeer, family: Family) -> Option<Vtep> {
        let config = self.topology.network.as_ref()?;
        if config.backend.kind != BackendKind::Vxlan || member.unusable.is_some() {
            return None;
        }
        self.local.vteps.get(&family)?;
        member.vteps.iter().find(|vtep| Family::of(vtep.address) == family).copied()
    }

    pub(super) fn vtep_peer(&self, member: &NodePeer, family: Family) -> Option<VtepPeer> {
        let vtep = self.vtep(member, family)?;
        let overlay = member.overlay().find(|address| Family::of(*address) == family)?;
        Some(VtepPeer { next_hop: next_hop(overlay, vtep.mac), vtep, prefixes: prefixes_of(member, family) })
    }
}

impl Planner {
    /// The VXLAN devices with the peers' ends, and what they let pass.
    pub(super) fn vxlan(&self, inputs: &Inputs<'_>, mtu: u16, firewall: &mut Firewall) -> Vec<VxlanDevice> {
        let Some(config) = &inputs.topology.network else { return Vec::new() };
        if config.backend.kind != BackendKind::Vxlan {
            return Vec::new();
        }
        let options = config.backend.vxlan;
        let device = |family: Family| {
            let (local, link) = (*inputs.local.vteps.get(&family)?, inputs.local.underlay.get(&family)?);
            let has_network = inputs.topology.networks().any(|network| Family::of_net(&network) == family);
            has_network.then(|| VxlanDevice {
                name: device_name(options.vni, family),
                vni: options.vni,
                port: options.port,
                underlay: link.name.clone(),
                local,
                // The kernel takes no more than fits into the interface's packets.
                mtu: u32::from(mtu).min(link.mtu.saturating_sub(PathKind::Vxlan.overhead(family == Family::V6).into())),
                learning: options.learning,
                gbp: options.gbp,
                peers: self.holders(family, local.mac).map(|(_, peer)| peer.to_kernel()).collect(),
            })
        };
        let devices: Vec<VxlanDevice> = Family::BOTH.into_iter().filter_map(device).collect();
        for device in &devices {
            let family = Family::of(device.local.address);
            for (owner, peer) in self.holders(family, device.local.mac) {
                let on = |prefix: &IpNet| PrefixOn { prefix: *prefix, dev: device.name.clone() };
                firewall.accepted.extend(peer.prefixes.iter().map(on));
                let chosen = self.paths.get(&(owner.clone(), family));
                if let Some(ChosenPath { via: Via::Vtep(..), .. }) = chosen {
                    let via =
                        |prefix: &IpNet| PrefixVia { prefix: *prefix, dev: device.name.clone(), via: peer.next_hop };
                    firewall.direct.extend(peer.prefixes.iter().map(via));
                }
            }
        }
        devices
    }

    /// The peers of a family, without those whose hardware address is another's: frames to it would go to both.
    fn holders(&self, family: Family, own: MacAddress) -> impl Iterator<Item = (&PeerId, &VtepPeer)> {
        let peers = self.vtep_peers.iter().filter(move |((of, _), _)| *of == family);
        let mut holders: BTreeMap<MacAddress, (&PeerId, &VtepPeer)> = BTreeMap::new();
        for ((_, owner), peer) in peers.filter(|(_, peer)| peer.vtep.mac != own) {
            let follows = matches!(owner, PeerId::Node(id) if mac(id, family) == peer.vtep.mac);
            if follows || !holders.contains_key(&peer.vtep.mac) {
                holders.insert(peer.vtep.mac, (owner, peer));
            }
        }
        holders.into_values()
    }
}

impl VtepPeer {
    fn to_kernel(&self) -> VxlanPeer {
        VxlanPeer { next_hop: self.next_hop, vtep: self.vtep, prefixes: self.prefixes.clone() }
    }
}
