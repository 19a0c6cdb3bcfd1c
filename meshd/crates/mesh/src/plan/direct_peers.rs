//! Members that share a subnet with this node: sources accepted from them in clear text, and probe targets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use cow_map::CowMap;
use etcd_schema::NodeId;
use ipnet::IpNet;

use super::{PlanFrame, inputs::Inputs};
use crate::{
    address::Family,
    kernel_state,
    path::DirectLink,
    target::{Target, Targets},
    topology::{NodePeer, PeerId},
};

/// Kept up to date, at the cost of what has changed.
#[derive(Debug, Default)]
pub(super) struct DirectPeers {
    /// What it was made for.
    seen: Option<(PlanFrame, CowMap<PeerId, Arc<NodePeer>>)>,
    near: BTreeMap<(PeerId, Family), DirectPeer>,
}

/// A member that is eligible for direct in a family.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DirectPeer {
    /// The prefixes that it may send from.
    pub(super) prefixes: Vec<kernel_state::PrefixOn>,
    /// How it is probed.
    probe: Option<(NodeId, Target, kernel_state::ProbeRoute)>,
}

impl DirectPeers {
    /// Makes it what follows from these inputs.
    pub(super) fn update(&mut self, inputs: &Inputs<'_>) {
        let frame = inputs.frame();
        let seen = self.seen.take().filter(|(seen, _)| *seen == frame);
        if seen.is_none() {
            self.near.clear();
        }
        let members = &inputs.topology.members;
        let before = seen.map(|(_, before)| before).unwrap_or_default();
        let changed: BTreeSet<PeerId> = members.changes(&before).into_iter().cloned().collect();
        for owner in changed {
            let member = members.get(&owner).map(Arc::as_ref);
            for family in Family::BOTH {
                let near = member.and_then(|member| inputs.direct_peer(&owner, member, family));
                let at = (owner.clone(), family);
                match near {
                    Some(near) => drop(self.near.insert(at, near)),
                    None => drop(self.near.remove(&at)),
                }
            }
        }
        self.seen = Some((frame, members.clone()));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&(PeerId, Family), &DirectPeer)> {
        self.near.iter()
    }

    /// The paths to probe from these overlay addresses.
    pub(super) fn targets(&self, overlay: &BTreeMap<Family, IpAddr>) -> Targets {
        let probes = self.near.iter().filter_map(|((_, family), near)| Some((*family, near.probe.as_ref()?)));
        let peers = probes.map(|(family, (id, target, _))| ((id.clone(), family), target.clone())).collect();
        Targets { own: overlay.clone(), peers }
    }

    /// The routes that the probes take.
    pub(super) fn probe_routes(&self) -> Vec<kernel_state::ProbeRoute> {
        self.near.values().filter_map(|near| near.probe.as_ref()).map(|(_, _, route)| route.clone()).collect()
    }
}

impl Inputs<'_> {
    fn direct_peer(&self, owner: &PeerId, member: &NodePeer, family: Family) -> Option<DirectPeer> {
        let PeerId::Node(id) = owner else { return None };
        let prefixes: Vec<IpNet> = member.prefixes().filter(|net| Family::of_net(net) == family).collect();
        if prefixes.is_empty() {
            return None;
        }
        let link = self.link(member, family)?;
        let underlay = &self.local.underlay[&family];
        let on = |prefix| kernel_state::PrefixOn { prefix, dev: underlay.name.clone() };
        Some(DirectPeer {
            prefixes: prefixes.iter().copied().map(on).collect(),
            probe: self.probe(id, member, family, link, &prefixes),
        })
    }

    fn probe(
        &self,
        id: &NodeId,
        member: &NodePeer,
        family: Family,
        link: DirectLink,
        prefixes: &[IpNet],
    ) -> Option<(NodeId, Target, kernel_state::ProbeRoute)> {
        let overlay = member.overlay().find(|address| Family::of(*address) == family)?;
        let underlay = &self.local.underlay[&family];
        let port = member.listen_port.checked_add(1)?;
        let was_direct =
            self.observed.direct_at_start.iter().any(|(dst, via)| *via == link.next_hop && prefixes.contains(dst));
        let route = kernel_state::ProbeRoute { overlay, via: link.next_hop, dev: underlay.name.clone() };
        let target = Target {
            overlay,
            next_hop: link.next_hop,
            port,
            keys: member.keys.clone(),
            interface: (underlay.index, underlay.name.to_string()),
            was_direct,
        };
        Some((id.clone(), target, route))
    }
}
