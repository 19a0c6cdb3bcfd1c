//! Proven source addresses of other nodes: by the tunnel's authenticated packets, and by the echoes of direct paths.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use enforcement::ProvenAddresses;
use mesh::{address::Family, path::PathId, topology::PeerId};

/// How long an endpoint is believed of a node that goes direct: what it sends then says nothing of its endpoint. As long as
/// a session of WireGuard lives.
const FRESH: Duration = Duration::from_secs(180);

/// Keeps it; a change costs the nodes that it concerns.
#[derive(Debug, Default)]
pub(super) struct Proven {
    /// The address that the last authentic packet in the tunnel came from, and when one last came, as far as is known here.
    heard: BTreeMap<PeerId, (IpAddr, Instant)>,
    /// The addresses of direct paths in use.
    direct: BTreeMap<PathId, IpAddr>,
    addresses: ProvenAddresses,
}

impl Proven {
    /// The addresses of each node.
    pub(super) fn addresses(&self) -> &ProvenAddresses {
        &self.addresses
    }

    /// A packet of the tunnel's peer `name` came from a new address.
    pub(super) fn heard(&mut self, now: Instant, name: &str, from: SocketAddr) {
        if let Some(owner) = owner(name) {
            self.heard.insert(owner.clone(), (from.ip().to_canonical(), now));
            self.settle(now, [owner].into());
        }
    }

    /// All peers that the tunnel knows to have been heard, from where, and when last.
    pub(super) fn resync(&mut self, now: Instant, heard: Vec<(String, SocketAddr, Instant)>) {
        let before: BTreeSet<PeerId> = self.heard.keys().cloned().collect();
        let heard =
            heard.into_iter().filter_map(|(name, from, at)| Some((owner(&name)?, (from.ip().to_canonical(), at))));
        self.heard = heard.collect();
        let all = before.into_iter().chain(self.heard.keys().cloned()).collect();
        self.settle(now, all);
    }

    /// The next hops of the direct paths in use.
    pub(super) fn follow(&mut self, now: Instant, direct: BTreeMap<PathId, IpAddr>) {
        if direct == self.direct {
            return;
        }
        let ids = direct.keys().chain(self.direct.keys());
        let changed = ids.filter(|id| direct.get(*id) != self.direct.get(*id));
        let owners = changed.map(|(id, _)| PeerId::Node(id.clone())).collect();
        self.direct = direct;
        self.settle(now, owners);
    }

    fn settle(&mut self, now: Instant, owners: BTreeSet<PeerId>) {
        for owner in owners {
            let direct: Vec<IpAddr> = match &owner {
                PeerId::Node(id) => {
                    Family::BOTH.iter().filter_map(|family| self.direct.get(&(id.clone(), *family)).copied()).collect()
                }
                PeerId::Lease(_) | PeerId::Outside(_) => Vec::new(),
            };
            let believed = |at: Instant| direct.is_empty() || now.saturating_duration_since(at) < FRESH;
            let heard = self.heard.get(&owner).filter(|(_, at)| believed(*at)).map(|(from, _)| *from);
            let mut all: Vec<IpAddr> = direct.iter().copied().chain(heard).collect();
            all.sort_unstable();
            all.dedup();
            self.addresses.set(owner, (!all.is_empty()).then(|| Arc::from(all)));
        }
    }
}

/// The node that is the tunnel's peer `name`.
fn owner(name: &str) -> Option<PeerId> {
    PeerId::named(name).filter(|owner| !matches!(owner, PeerId::Outside(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(proven: &Proven) -> Vec<String> {
        let owner = PeerId::named("nodes/a").unwrap();
        proven.addresses().get(&owner).into_iter().flat_map(|all| all.iter().map(ToString::to_string)).collect()
    }

    #[test]
    fn a_node_is_where_it_was_heard_last_and_where_its_echoes_come_from() {
        let now = Instant::now();
        let mut proven = Proven::default();
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        proven.heard(now, "peers/laptop", at("203.0.113.1:1"));
        assert!(proven.addresses().is_empty(), "an outside peer is no node");
        proven.heard(now, "nodes/a", at("203.0.113.1:1"));
        assert_eq!(of(&proven), ["203.0.113.1"]);
        proven.heard(now, "nodes/a", at("[::ffff:203.0.113.2]:1"));
        assert_eq!(of(&proven), ["203.0.113.2"], "it roamed");
        let direct = || BTreeMap::from([(("a".parse().unwrap(), Family::V4), "192.0.2.7".parse().unwrap())]);
        proven.follow(now, BTreeMap::new());
        assert_eq!(of(&proven), ["203.0.113.2"]);
        proven.follow(now, direct());
        assert_eq!(of(&proven), ["192.0.2.7", "203.0.113.2"]);
        // In direct use the tunnel is silent: where the node was heard long ago says nothing of where it is.
        let later = now + FRESH;
        proven.resync(later, vec![("nodes/a".to_owned(), at("203.0.113.2:1"), now)]);
        assert_eq!(of(&proven), ["192.0.2.7"]);
        proven.follow(later, BTreeMap::new());
        assert_eq!(of(&proven), ["203.0.113.2"]);
        proven.resync(later, Vec::new());
        assert!(of(&proven).is_empty(), "the tunnel has no such peer any more");
    }
}
