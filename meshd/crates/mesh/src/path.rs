//! How packets get to a peer, per family, and why so: decided here and nowhere else.
//!
//! ```text
//! records, underlay ─▶ Candidates ─┐
//! probes, neighbours ──────────────┼▶ PathAgent ─▶ ChosenPath { via, reach, reason } ─▶ planner: routes
//! the tunnel's packets, its MTU ───┘                          ▲                       └▶ status, peers, alerts
//!                                       TunnelSession ────────┘
//! ```
//!
//! The prober executes what the agents ask for, kernel and tunnel what the plan says; the API shows the chosen path with
//! the state of its session at that moment.

mod agent;
mod direct;
mod session;
mod target;

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

pub use etcd_schema::{MacAddress, Vtep};

pub use agent::{Candidates, Carrier, Due, LinkCandidate, PathAgents};
pub use direct::{DirectState, NotDirect};
pub use session::TunnelSession;
pub use target::{PathId, Target, Targets};

use crate::{address::Family, backend::PathKind};

/// The two interface addresses between which a direct path runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectLink {
    /// This node's interface address, with its prefix length.
    pub own: IpNet,
    /// The peer's interface address: the next hop.
    pub next_hop: IpAddr,
}

/// The link by which a peer is eligible for direct in `family`, if it is.
///
/// Both records must name the same site; the own address must be one the own record states; each one's prefix must be
/// the same network, so that either end thinks of the other as on-link.
#[must_use]
pub fn eligible(
    family: Family,
    own_site: Option<&str>,
    own_addresses: &[IpNet],
    peer_site: Option<&str>,
    peer_addresses: &[IpNet],
) -> Option<DirectLink> {
    if own_site.is_none() || own_site != peer_site {
        return None;
    }
    let of_family = |net: &&IpNet| Family::of_net(net) == family && net.prefix_len() < net.max_prefix_len();
    own_addresses.iter().filter(of_family).find_map(|own| {
        let theirs = peer_addresses.iter().filter(of_family);
        let peer = theirs.clone().find(|peer| peer.trunc() == own.trunc() && peer.addr() != own.addr())?;
        Some(DirectLink { own: *own, next_hop: peer.addr() })
    })
}

/// The path to one peer in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenPath {
    /// Where packets go.
    pub via: Via,
    /// Whether they arrive.
    pub reach: Reach,
    /// Why this path and no better one.
    pub reason: Reason,
}

/// Where packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// To the next hop of this link.
    Link(PathKind, DirectLink),
    /// Into a VXLAN device, to this end.
    Vtep(PathKind, Vtep),
    /// Into the TUN device. A peer that does not answer is called there again and again.
    Tun(PathKind),
    /// Nowhere: senders get ICMP unreachable.
    Nowhere,
}

/// Whether packets arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// The peer has answered over this very path, and no later answer is missing.
    Confirmed,
    /// Nothing is known: the first packet calls the peer.
    Unconfirmed,
    /// The peer does not answer, or cannot be asked.
    Unreachable,
}

/// Why packets take this path and no better one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is the best of those that both ends have.
    Best,
    /// Both are on one subnet; the direct path has not proven itself yet.
    AwaitingEcho,
    /// Both are on one subnet; the direct path has failed.
    EchoLost,
    /// It answers neither probes nor handshakes, being a host of Flannel's: nothing shows whether packets arrive.
    Unproven,
    /// Neither the direct path nor the tunnel answers.
    NoAnswer,
    /// The tunnel does not answer.
    NoHandshake,
    /// Neither end has an endpoint.
    NoEndpoint,
    /// Only direct paths are permitted, and the two share no subnet.
    NotOnSubnet,
    /// One of the two has no VXLAN end of this family.
    NoVtep,
    /// The peer has no subnet.
    NoSubnet,
    /// This machine refuses the peer's prefixes.
    Refused,
    /// The peer's records do not permit any path.
    Unusable(Arc<str>),
}

impl Reason {
    /// The direct path is missing because its echoes are.
    #[must_use]
    pub fn is_missing_echo(&self) -> bool {
        matches!(self, Self::AwaitingEcho | Self::EchoLost)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Best => "",
            Self::AwaitingEcho => "on the same subnet; no echo reply over the direct path yet",
            Self::EchoLost => "on the same subnet, but no echo reply over the direct path",
            Self::Unproven => "a host of Flannel's: it answers no probes, so nothing shows whether packets arrive",
            Self::NoAnswer => "no answer on the direct path or through the tunnel",
            Self::NoHandshake => "no answer to handshakes",
            Self::NoEndpoint => "neither the peer nor this node has an endpoint for handshakes",
            Self::NotOnSubnet => "not on a subnet of this node's, and host-gw has direct paths only",
            Self::NoVtep => "the peer or this node has no VXLAN endpoint of this family",
            Self::NoSubnet => "it has no valid subnet",
            Self::Refused => "refused on this node",
            Self::Unusable(why) => why,
        })
    }
}

/// The path in `family` by these candidates, where a direct one is in `state`; what the tunnel knows is added by
/// [`ChosenPath::with_session`].
fn choose(candidates: &Candidates, family: Family, state: Option<DirectState>) -> ChosenPath {
    if let Some(why) = &candidates.unusable {
        return ChosenPath::nowhere(Reason::Unusable(Arc::clone(why)));
    }
    let link = candidates.links.get(&family).map(|candidate| candidate.link);
    // Flannel's hosts send direct where they would, and answer no probe.
    if let (Some(link), true) = (link, candidates.unproven) {
        return ChosenPath {
            via: Via::Link(PathKind::HostGw, link),
            reach: Reach::Unconfirmed,
            reason: Reason::Unproven,
        };
    }
    if let (Some(link), Some(DirectState::Direct)) = (link, state) {
        return ChosenPath { via: Via::Link(PathKind::HostGw, link), reach: Reach::Confirmed, reason: Reason::Best };
    }
    let reason = match (link, state) {
        (None, _) if candidates.unproven => Reason::Unproven,
        (None, _) => Reason::Best,
        (_, Some(DirectState::Silent)) => Reason::NoAnswer,
        (_, Some(DirectState::Tunnel(NotDirect::Failed))) => Reason::EchoLost,
        (_, _) => Reason::AwaitingEcho,
    };
    let carried = |via| ChosenPath { via, reach: Reach::Unconfirmed, reason: reason.clone() };
    match &candidates.carrier {
        // It keeps its route into the tunnel: there it is called on.
        Carrier::Tunnel { .. } if reason == Reason::NoAnswer => {
            ChosenPath { reach: Reach::Unreachable, ..carried(Via::Tun(PathKind::Wireguard)) }
        }
        Carrier::Tunnel { callable: true } => carried(Via::Tun(PathKind::Wireguard)),
        Carrier::Tunnel { callable: false } => ChosenPath::nowhere(Reason::NoEndpoint),
        Carrier::Vxlan(ends) => match ends.get(&family) {
            Some(end) => carried(Via::Vtep(PathKind::Vxlan, *end)),
            None => ChosenPath::nowhere(Reason::NoVtep),
        },
        Carrier::Nothing if link.is_none() => ChosenPath::nowhere(Reason::NotOnSubnet),
        Carrier::Nothing => ChosenPath::nowhere(reason),
    }
}

impl ChosenPath {
    /// A peer that no path leads to.
    #[must_use]
    pub fn nowhere(reason: Reason) -> Self {
        Self { via: Via::Nowhere, reach: Reach::Unreachable, reason }
    }

    /// The path of a peer that only the tunnel leads to, before anything is known of its session.
    pub(crate) fn tunnelled() -> Self {
        choose(&Candidates { carrier: Carrier::Tunnel { callable: true }, ..Candidates::default() }, Family::V4, None)
    }

    /// The path of a peer outside the mesh: `None` if the tunnel does not have it.
    #[must_use]
    pub fn external(session: Option<&TunnelSession>) -> Self {
        if session.is_none() {
            return Self::nowhere(Reason::Refused);
        }
        Self::tunnelled().with_session(session)
    }

    /// The same path with what the tunnel knows of the session that carries it.
    #[must_use]
    pub fn with_session(self, session: Option<&TunnelSession>) -> Self {
        match (self.via, self.reach, session) {
            (Via::Tun(_), Reach::Unconfirmed, Some(session)) if session.is_silent() => {
                Self { reach: Reach::Unreachable, reason: Reason::NoHandshake, ..self }
            }
            (Via::Tun(_), Reach::Unconfirmed, Some(session)) if session.alive => {
                Self { reach: Reach::Confirmed, ..self }
            }
            _ => self,
        }
    }

    /// The kind of path that packets arrive by, if they do.
    #[must_use]
    pub fn kind(&self) -> Option<PathKind> {
        match self.via {
            _ if self.reach == Reach::Unreachable => None,
            Via::Link(kind, _) | Via::Vtep(kind, _) | Via::Tun(kind) => Some(kind),
            Via::Nowhere => None,
        }
    }

    /// How it compares with another family's path: the greater one is worse.
    fn rank(&self) -> u8 {
        match (self.via, self.reach) {
            (Via::Nowhere, _) => 4,
            // Says more than what the tunnel alone does not answer.
            (_, Reach::Unreachable) if self.reason == Reason::NoAnswer => 3,
            (_, Reach::Unreachable) => 2,
            (Via::Tun(_) | Via::Vtep(..), _) => 1,
            (Via::Link(..), _) => 0,
        }
    }
}

/// The worse of a peer's two paths, with its family if the other one is better; a peer without a subnet has neither.
#[must_use]
pub fn worse(paths: impl IntoIterator<Item = (Family, ChosenPath)>) -> (Option<Family>, ChosenPath) {
    let mut paths: Vec<(Family, ChosenPath)> = paths.into_iter().collect();
    paths.sort_by_key(|(_, path)| path.rank());
    let differ = paths.first().map(|(_, path)| path.rank()) != paths.last().map(|(_, path)| path.rank());
    let Some((family, path)) = paths.pop() else { return (None, ChosenPath::nowhere(Reason::NoSubnet)) };
    (differ.then_some(family), path)
}

#[cfg(test)]
mod tests;
