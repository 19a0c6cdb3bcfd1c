//! What the rules outside the pods' chains depend on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink::Mac;

use super::super::MeshFacts;

/// Reports in one second by each of the chains that verdicts end in.
pub(super) const REPORTS: u32 = 50;

/// Inputs of the rules outside the pods' chains.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Frame {
    /// Devices whose packets the tunnel has judged.
    pub(crate) judged_by_tunnel: Vec<String>,
    /// The mesh's networks.
    pub(crate) networks: Vec<IpNet>,
    /// This node's own subnets.
    pub(crate) own: Vec<IpNet>,
    /// This node's overlay addresses.
    pub(crate) overlay: Vec<IpAddr>,
    /// Whether a pod of which nothing is known may receive, and may send.
    pub(crate) unknown_closed: [bool; 2],
    /// Audit mode: denied packets pass and are reported.
    pub(crate) audit: bool,
    /// The group of nfnetlink_log that verdicts are reported to.
    pub(crate) log_group: u16,
    /// The interfaces of this node's pods, by their ends on the host.
    pub(crate) ports: BTreeMap<String, PodPort>,
    /// Hardware addresses of the bridges that those are ports of.
    pub(crate) bridges: BTreeSet<Mac>,
    /// Interfaces of isolated pods.
    pub(crate) isolated: BTreeSet<String>,
    /// Addresses of this node's pods that are no longer in its subnets.
    pub(crate) displaced: BTreeSet<IpAddr>,
    /// Bridged packets traverse the forward chain, too.
    pub(crate) switched_judged: bool,
}

impl Frame {
    pub(crate) fn of(mesh: &MeshFacts, judged_by_tunnel: &[String], unknown_closed: [bool; 2]) -> Self {
        Self {
            judged_by_tunnel: judged_by_tunnel.to_vec(),
            networks: mesh.networks.clone(),
            own: mesh.own.clone(),
            overlay: mesh.overlay.clone(),
            unknown_closed,
            audit: mesh.audit,
            ..Self::default()
        }
    }
}

/// The interface of a local pod, from its attachment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct PodPort {
    /// The pod's addresses, sorted.
    pub(crate) addresses: Vec<IpAddr>,
    /// Its additional source prefixes, sorted.
    pub(crate) allowed_sources: Vec<IpNet>,
    /// The hardware address inside; `None`: the plugin did not report one.
    pub(crate) mac: Option<Mac>,
    /// Any of the addresses lies in the mesh.
    pub(crate) in_mesh: bool,
}

impl PodPort {
    /// All that it may send from: prefixes of which none touches another.
    pub(super) fn sources(&self) -> Vec<IpNet> {
        let own = self.addresses.iter().copied().map(IpNet::from);
        IpNet::aggregate(&own.chain(self.allowed_sources.iter().copied()).collect())
    }

    /// The link-local address that follows from its hardware address.
    pub(super) fn link_local(&self) -> Option<Ipv6Addr> {
        self.mac.as_ref().map(link_local)
    }

    /// Whether it has sources that no map of addresses leads to its pod's chains.
    pub(super) fn judged_by_interface(&self, frame: &Frame) -> bool {
        let has_chain = |address: &IpAddr| frame.own.iter().any(|net| net.contains(address));
        self.in_mesh && !(self.allowed_sources.is_empty() && self.addresses.iter().all(has_chain))
    }
}

/// The link-local address that follows from a hardware address (RFC 4291, appendix A).
pub(super) const fn link_local(&[a, b, c, d, e, f]: &Mac) -> Ipv6Addr {
    let pair = u16::from_be_bytes;
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair([a ^ 2, b]), pair([c, 0xff]), pair([0xfe, d]), pair([e, f]))
}
