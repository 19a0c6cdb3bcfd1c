//! One agent per peer: which path packets take to it in each family, and why. No I/O and no clock.
//!
//! ```text
//! planner ─▶ set_candidates, on_removed ─┐                   ┌─▶ path(family) ─▶ planner
//! prober  ─▶ poll, on_echo, on_neighbour ┼─▶ PathAgent ──────┤
//! tunnel  ─▶ on_authenticated, on_mtu   ─┘                   └─▶ probes to send, calls to make
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_schema::{MacAddress, Vtep};
use ipnet::IpNet;

use super::{
    ChosenPath, DirectLink, choose,
    direct::{DirectPath, DirectState, Surroundings},
    target::{PathId, Target, Targets},
};
use crate::{address::Family, topology::PeerId};

/// Deadlines that lie as close together are met together.
const COALESCE: Duration = Duration::from_millis(20);

/// What could carry packets to a peer, by the records of both and by this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Candidates {
    /// Why nothing may, although the peer has prefixes.
    pub unusable: Option<Arc<str>>,
    /// It answers neither probes nor handshakes: its paths are taken without proof.
    pub unproven: bool,
    /// What carries packets where no direct path does.
    pub carrier: Carrier,
    /// The subnets that both share.
    pub links: BTreeMap<Family, LinkCandidate>,
}

/// What carries packets to a peer where no direct path does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// The tunnel.
    Tunnel {
        /// At least one of both ends has an endpoint for handshakes.
        callable: bool,
    },
    /// VXLAN, to the peer's ends; those of families that this node has one of, too.
    Vxlan(BTreeMap<Family, Vtep>),
    /// Nothing: only direct paths are permitted.
    Nothing,
}

impl Default for Carrier {
    fn default() -> Self {
        Self::Tunnel { callable: false }
    }
}

impl Candidates {
    fn targets(&self) -> impl Iterator<Item = (&Family, &Target)> {
        self.links.iter().filter_map(|(family, link)| Some((family, link.target.as_ref()?)))
    }
}

/// A subnet that a peer shares with this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkCandidate {
    /// The addresses on it.
    pub link: DirectLink,
    /// The prefixes that are reached over it.
    pub prefixes: Vec<IpNet>,
    /// How it is probed. A link that cannot be probed cannot prove itself.
    pub target: Option<Target>,
}

/// What a path needs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Due {
    /// Send a probe with this nonce; its echo proves the path.
    pub probe: Option<u128>,
    /// Call the peer in the tunnel, to see whether it answers there.
    pub call: bool,
}

/// How packets get to one peer.
#[derive(Debug, Clone, Default)]
struct PathAgent {
    candidates: Candidates,
    /// The links that can be probed.
    direct: BTreeMap<Family, ProbedLink>,
    /// When something authentic of the peer's last came through the tunnel.
    heard: Option<Instant>,
    /// Largest inner packet, in bytes, where it is below the device's MTU.
    inner_mtu: Option<u16>,
}

#[derive(Debug, Clone)]
struct ProbedLink {
    path: DirectPath,
    /// The kernel has the route of its probes; before, none is sent.
    routed: bool,
    /// Link-layer address that the kernel has for the next hop, when it holds.
    neighbour: Option<MacAddress>,
}

impl PathAgent {
    /// The path in `family`, by what is known of it here. What the tunnel says of the session comes with
    /// [`ChosenPath::with_session`].
    fn path(&self, family: Family) -> ChosenPath {
        choose(&self.candidates, family, self.direct.get(&family).map(|link| link.path.state()))
    }

    fn target(&self, family: Family) -> Option<&Target> {
        self.candidates.links.get(&family)?.target.as_ref()
    }

    /// Replaces the candidates. A link whose next hop and interface stay keeps its state; a new one begins as `begin` says.
    /// Returns whether something else is to be probed.
    fn set_candidates(
        &mut self,
        candidates: Candidates,
        begin: impl Fn(&LinkCandidate, &Target) -> DirectPath,
    ) -> bool {
        let mut direct = BTreeMap::new();
        for (family, link) in &candidates.links {
            let Some(target) = &link.target else { continue };
            let same = self.target(*family).is_some_and(|old| old.is_same_link(target));
            let kept = self.direct.remove(family).filter(|_| same);
            let new = || ProbedLink { path: begin(link, target), routed: false, neighbour: None };
            direct.insert(*family, kept.unwrap_or_else(new));
        }
        self.direct = direct;
        let before = std::mem::replace(&mut self.candidates, candidates);
        !before.targets().eq(self.candidates.targets())
    }

    fn poll(&mut self, now: Instant, family: Family, nonce: u128) -> Due {
        let heard_in_tunnel = self.heard;
        let Some(link) = self.direct.get_mut(&family) else { return Due::default() };
        let around = Surroundings { heard_in_tunnel, neighbour: link.neighbour };
        let probe = link.path.poll(now, around, nonce).map(|probe| probe.nonce);
        Due { probe, call: link.path.wants_tunnel(now, heard_in_tunnel) }
    }
}

/// The agents of all peers.
#[derive(Debug, Clone, Default)]
pub struct PathAgents {
    agents: BTreeMap<PeerId, PathAgent>,
    /// This node's overlay address of each family.
    own: BTreeMap<Family, IpAddr>,
    /// Paths that were direct in the kernel when the daemon started, by prefix and next hop: they stay so while they prove
    /// themselves. Until the first candidates.
    earlier: Vec<(IpNet, IpAddr)>,
    /// Neighbours that decide on them, by interface index and address.
    neighbours: HashMap<(u32, IpAddr), MacAddress>,
    /// Counts the changes of [`Self::targets`].
    revision: u64,
    /// The earliest deadline, or an earlier time.
    next: Option<Instant>,
    /// Peers whose path or MTU differs from what [`Self::take_changed`] has seen.
    changed: BTreeSet<PeerId>,
}

impl PathAgents {
    /// Agents of a node whose kernel has these routes of an earlier run, by prefix and next hop.
    #[must_use]
    pub fn after(earlier: Vec<(IpNet, IpAddr)>) -> Self {
        Self { earlier, ..Self::default() }
    }

    /// Whether the neighbours that the kernel knows still decide on paths of an earlier run.
    #[must_use]
    pub fn resumes(&self) -> bool {
        !self.earlier.is_empty()
    }

    /// The neighbours that the kernel knows, by interface index and address.
    pub fn set_neighbours(&mut self, neighbours: HashMap<(u32, IpAddr), MacAddress>) {
        self.neighbours = neighbours;
    }

    /// Sets this node's overlay addresses, which probes come from.
    pub(crate) fn set_own(&mut self, own: BTreeMap<Family, IpAddr>) {
        if self.own != own {
            self.own = own;
            self.revision += 1;
        }
    }

    /// Replaces what could carry packets to a peer. Links whose next hop and interface stay keep their state; one that was
    /// in use before this daemon started stays so while it proves itself, if the kernel knows its neighbour. New links are
    /// probed from [`Self::routes_applied`] on.
    pub(crate) fn set_candidates(&mut self, now: Instant, peer: &PeerId, candidates: Candidates) {
        let agent = match self.agents.get_mut(peer) {
            Some(agent) if agent.candidates == candidates => return,
            Some(agent) => agent,
            None => self.agents.entry(peer.clone()).or_default(),
        };
        let begin = |link: &LinkCandidate, target: &Target| {
            let was_direct =
                self.earlier.iter().any(|(dst, via)| *via == target.next_hop && link.prefixes.contains(dst));
            let neighbour = self.neighbours.get(&(target.interface.0, target.next_hop)).copied();
            DirectPath::resumed(now, neighbour.filter(|_| was_direct))
        };
        self.revision += u64::from(agent.set_candidates(candidates, begin));
        self.changed.insert(peer.clone());
    }

    /// The first candidates of all peers are set: from here on the agents' own states count.
    pub(crate) fn forget_earlier(&mut self) {
        self.earlier.clear();
        self.neighbours.clear();
    }

    /// A peer is gone, and what was proven of it.
    pub(crate) fn on_removed(&mut self, peer: &PeerId) {
        if let Some(agent) = self.agents.remove(peer) {
            self.revision += u64::from(!agent.direct.is_empty());
            self.changed.insert(peer.clone());
        }
    }

    /// Removes the peers that `stays` does not want.
    pub(crate) fn retain(&mut self, stays: impl Fn(&PeerId) -> bool) {
        let gone: Vec<PeerId> = self.agents.keys().filter(|peer| !stays(peer)).cloned().collect();
        gone.iter().for_each(|peer| self.on_removed(peer));
    }

    /// The kernel has the route of every probe: new links are probed from now on. Before, a probe would take the route of
    /// an earlier next hop, whose echo would prove nothing about the new one.
    pub fn routes_applied(&mut self, now: Instant) {
        let new = self.agents.values_mut().flat_map(|agent| agent.direct.values_mut()).filter(|link| !link.routed);
        for link in new {
            link.routed = true;
            link.path.probe_at(now);
            self.next = Some(now);
        }
    }

    /// What is probed.
    #[must_use]
    pub fn targets(&self) -> Targets {
        let peers = self.agents.iter().flat_map(|(peer, agent)| {
            let node = if let PeerId::Node(id) = peer { Some(id) } else { None };
            let probed = move |family: &Family| Some(((node?.clone(), *family), agent.target(*family)?.clone()));
            agent.direct.keys().filter_map(probed)
        });
        Targets { own: self.own.clone(), peers: peers.collect() }
    }

    /// Changes with [`Self::targets`].
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// When [`Self::due`] has something to say.
    #[must_use]
    pub const fn next_timer(&self) -> Option<Instant> {
        self.next
    }

    /// The paths to poll now, each with the time to poll it at. To be called again at [`Self::next_timer`].
    #[must_use]
    pub fn due(&self, now: Instant) -> Vec<(PathId, Instant)> {
        let due = self.probed().filter(|(_, path)| path.deadline() <= now + COALESCE);
        due.map(|(id, path)| (id, now.max(path.deadline()))).collect()
    }

    /// All that was due has been polled.
    pub fn polled(&mut self, now: Instant) {
        self.next = self.earliest().map(|next| next.max(now + COALESCE));
    }

    /// Whether [`Self::poll`] makes use of [`Self::on_authenticated`] and [`Self::on_neighbour`]: they need not be called
    /// otherwise.
    #[must_use]
    pub fn is_in_doubt(&self, now: Instant, id: &PathId) -> bool {
        self.link(id).is_some_and(|link| link.path.needs_surroundings(now))
    }

    /// Something authentic of the peer's came through the tunnel, at this time.
    pub fn on_authenticated(&mut self, id: &PathId, at: Instant) {
        if let Some(agent) = self.agents.get_mut(&PeerId::Node(id.0.clone())) {
            agent.heard = agent.heard.max(Some(at));
        }
    }

    /// The link-layer address that the kernel has for the next hop of a path, if it holds.
    pub fn on_neighbour(&mut self, id: &PathId, neighbour: Option<MacAddress>) {
        self.with_link(id, |link| link.neighbour = neighbour);
    }

    /// The largest inner packet that the tunnel carries to each peer, in bytes; `None`: as large as the device's MTU allows.
    pub fn on_mtu(&mut self, inner_mtu: impl Fn(&PeerId) -> Option<u16>) {
        for (peer, agent) in &mut self.agents {
            let carried = inner_mtu(peer);
            if std::mem::replace(&mut agent.inner_mtu, carried) != carried {
                self.changed.insert(peer.clone());
            }
        }
    }

    /// Time has passed for one path. `nonce` must be fresh and random.
    pub fn poll(&mut self, now: Instant, id: &PathId, nonce: u128) -> Due {
        self.with_agent(id, |agent| agent.poll(now, id.1, nonce)).unwrap_or_default()
    }

    /// Whether an echo of `nonce` is awaited.
    #[must_use]
    pub fn awaits(&self, id: &PathId, nonce: u128) -> bool {
        self.link(id).is_some_and(|link| link.path.awaits(nonce))
    }

    /// An authenticated echo of `nonce` has come back over the path, whose next hop has this link-layer address. `false`
    /// if no such probe is under way.
    pub fn on_echo(&mut self, now: Instant, id: &PathId, nonce: u128, neighbour: Option<MacAddress>) -> bool {
        self.with_link(id, |link| link.path.echoed(now, nonce, neighbour)).unwrap_or_default()
    }

    /// The path to a peer in one family, and why that one; `None` for a peer without candidates.
    #[must_use]
    pub fn path(&self, peer: &PeerId, family: Family) -> Option<ChosenPath> {
        self.agents.get(peer).map(|agent| agent.path(family))
    }

    /// The largest inner packet to a peer, in bytes, where it is below the device's MTU.
    #[must_use]
    pub fn inner_mtu(&self, peer: &PeerId) -> Option<u16> {
        self.agents.get(peer)?.inner_mtu
    }

    /// The state of a path that is probed.
    #[must_use]
    pub fn state(&self, id: &PathId) -> Option<DirectState> {
        self.link(id).map(|link| link.path.state())
    }

    /// The next hops of the direct paths in use.
    #[must_use]
    pub fn next_hops(&self) -> BTreeMap<PathId, IpAddr> {
        let in_use = self.links().filter(|(_, link)| link.path.state() == DirectState::Direct);
        in_use
            .filter_map(|((node, family), _)| {
                let agent = self.agents.get(&PeerId::Node(node.clone()))?;
                Some(((node, family), agent.target(family)?.next_hop))
            })
            .collect()
    }

    /// Whether `take_changed` names peers.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether one of them is outside of the mesh.
    pub(crate) fn has_changed_outside(&self) -> bool {
        self.changed.iter().any(|peer| matches!(peer, PeerId::Outside(_)))
    }

    /// The peers whose path or MTU has changed since this was asked last.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<PeerId> {
        std::mem::take(&mut self.changed)
    }

    fn link(&self, (node, family): &PathId) -> Option<&ProbedLink> {
        self.agents.get(&PeerId::Node(node.clone()))?.direct.get(family)
    }

    fn links(&self) -> impl Iterator<Item = (PathId, &ProbedLink)> {
        self.agents.iter().flat_map(|(peer, agent)| {
            let node = if let PeerId::Node(id) = peer { Some(id) } else { None };
            agent.direct.iter().filter_map(move |(family, link)| Some(((node?.clone(), *family), link)))
        })
    }

    /// Does something with a peer's agent, and notes whether the path that it gives is another one then.
    fn with_agent<T>(&mut self, (node, family): &PathId, change: impl FnOnce(&mut PathAgent) -> T) -> Option<T> {
        let peer = PeerId::Node(node.clone());
        let agent = self.agents.get_mut(&peer)?;
        let before = agent.path(*family);
        let result = change(agent);
        if agent.path(*family) != before {
            self.changed.insert(peer);
        }
        Some(result)
    }

    fn with_link<T>(&mut self, id: &PathId, change: impl FnOnce(&mut ProbedLink) -> T) -> Option<T> {
        self.with_agent(id, |agent| agent.direct.get_mut(&id.1).map(change)).flatten()
    }

    fn earliest(&self) -> Option<Instant> {
        let links = self.agents.values().flat_map(|agent| agent.direct.values());
        links.filter(|link| link.routed).map(|link| link.path.deadline()).min()
    }

    fn probed(&self) -> impl Iterator<Item = (PathId, &DirectPath)> {
        self.links().filter(|(_, link)| link.routed).map(|(id, link)| (id, &link.path))
    }
}

#[cfg(any(test, feature = "testing"))]
mod testing;
#[cfg(test)]
mod tests;
