//! Members that share a subnet with this node: sources accepted from them in clear text, and how they are probed.

use super::inputs::{Inputs, prefixes_of};
use crate::{
    address::Family,
    kernel_state,
    path::{DirectLink, Target},
    topology::{NodePeer, PeerId},
};

/// A member that is eligible for direct in a family.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DirectPeer {
    /// The prefixes that it may send from.
    pub(super) prefixes: Vec<kernel_state::PrefixOn>,
    /// The route that probes of it take.
    pub(super) probe: Option<kernel_state::ProbeRoute>,
}

impl Inputs<'_> {
    pub(super) fn direct_peer(&self, owner: &PeerId, member: &NodePeer, family: Family) -> Option<DirectPeer> {
        let prefixes = prefixes_of(member, family);
        if prefixes.is_empty() {
            return None;
        }
        let link = self.link(member, family)?;
        let dev = &self.local.underlay[&family].name;
        let on = |prefix| kernel_state::PrefixOn { prefix, dev: dev.clone() };
        let probe = self.target(owner, member, family, link).map(|target| kernel_state::ProbeRoute {
            overlay: target.overlay,
            via: target.next_hop,
            dev: dev.clone(),
        });
        Some(DirectPeer { prefixes: prefixes.into_iter().map(on).collect(), probe })
    }

    /// How a member is probed over `link`.
    pub(super) fn target(&self, owner: &PeerId, member: &NodePeer, family: Family, link: DirectLink) -> Option<Target> {
        let PeerId::Node(_) = owner else { return None };
        let underlay = &self.local.underlay[&family];
        Some(Target {
            overlay: member.overlay().find(|address| Family::of(*address) == family)?,
            next_hop: link.next_hop,
            port: member.listen_port.checked_add(1)?,
            keys: member.keys.clone(),
            interface: (underlay.index, underlay.name.to_string()),
        })
    }
}
