//! Detects refused packets that most likely came from a pod: their source is an address of the pod's node, which
//! policies by label do not match. A NAT rule on that node changed the source, and only that node can name the rule;
//! this end names the node.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh::problem::{Problem, ProblemCode};
use policy::engine::{End, Flow, ObjectName, Side};

use super::ActivePolicy;

/// How long a refused packet is news.
const RECENT: Duration = Duration::from_secs(300);
/// Nodes that are remembered; the one seen longest ago yields.
const REMEMBERED: usize = 64;
/// Nodes that status names.
const NAMED: usize = 8;
/// Addresses of one prefix that are looked at for a pod.
const LOOKED_AT: usize = 4096;

/// A node that may masquerade its pods' packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suspect {
    /// The node's name.
    node: Arc<str>,
    /// Its address that the packet bore.
    address: IpAddr,
    /// A pod there that may begin the same flow.
    pod: ObjectName,
}

impl Suspect {
    /// The node that may have masqueraded the first packet of a flow that the destination's policies refuse: another
    /// one, whose address the source is, and of whose pods at least one may begin that flow. Without such a pod, the
    /// packet would have been refused with its own source too.
    pub(super) fn of(in_force: &ActivePolicy, flow: &Flow) -> Option<Self> {
        let ActivePolicy { classifier, mesh, .. } = in_force;
        let End::Node(name) = classifier.end(flow.source) else { return None };
        let node = mesh.nodes.values().find(|node| node.name == name && node.addresses.contains(&flow.source))?;
        if node.prefixes.iter().any(|prefix| mesh.own.contains(prefix)) {
            return None;
        }
        // Labels are of no family: a pod that is known by its address of the other one counts.
        let addresses = node.prefixes.iter().flat_map(|prefix| prefix.hosts().take(LOOKED_AT));
        let allowed = |source| classifier.verdict(Side::Ingress, &Flow { source, ..*flow }).allowed;
        let pod = addresses.into_iter().find_map(|address| match classifier.end(address) {
            End::Pod(pod) if allowed(address) => Some(pod.name.clone()),
            _ => None,
        })?;
        Some(Self { node: name, address: flow.source, pod })
    }
}

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, address, pod } = self;
        write!(
            f,
            "{address} is an address of node {node}, whose pod {pod} would be allowed: a NAT rule on {node} may have \
             rewritten the source (meshctl doctor on {node}: pods_masqueraded)"
        )
    }
}

/// The recent suspects, each with destination and time of its last refused packet.
#[derive(Debug, Default)]
pub(super) struct Suspects(BTreeMap<Arc<str>, (Suspect, String, Instant)>);

impl Suspects {
    /// Remembers that a packet to `destination`, in words, was refused.
    pub(super) fn note(&mut self, suspect: &Suspect, destination: String, now: Instant) {
        self.0.insert(Arc::clone(&suspect.node), (suspect.clone(), destination, now));
        if self.0.len() > REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, (.., at))| *at).map(|(node, _)| Arc::clone(node));
            oldest.and_then(|node| self.0.remove(&node));
        }
    }

    /// One hint per node for status, the most recent first.
    pub(super) fn hints(&self, now: Instant) -> Vec<Problem> {
        let mut recent: Vec<_> =
            self.0.values().filter(|(.., at)| now.saturating_duration_since(*at) < RECENT).collect();
        recent.sort_by_key(|(.., at)| std::cmp::Reverse(*at));
        let hint = |(suspect, destination, _): &(Suspect, String, Instant)| {
            let Suspect { node, address, pod } = suspect;
            Problem::new(
                ProblemCode::PeerMasquerades,
                format!(
                    "policies denied packets from {address}, an address of node {node}, to {destination}, although \
                     pods of {node} such as {pod} are allowed: a NAT rule on {node} may rewrite pods' addresses to \
                     the node's"
                ),
                format!("meshctl doctor # on {node}: pods_masqueraded names the rule"),
            )
        };
        recent.into_iter().take(NAMED).map(hint).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(node: &str) -> Suspect {
        let address = IpAddr::from([10, 244, 1, 0]);
        Suspect { node: node.into(), address, pod: ObjectName::new("shop", "web") }
    }

    #[test]
    fn a_node_is_hinted_at_once_and_only_for_a_while() {
        let now = Instant::now();
        let mut suspects = Suspects::default();
        for port in 1..4 {
            suspects.note(&suspect("east1"), format!("shop/db tcp/{port}"), now);
        }
        let hints = suspects.hints(now + RECENT - Duration::from_millis(1));
        assert_eq!(hints.len(), 1);
        assert!(hints[0].cause.contains("from 10.244.1.0, an address of node east1, to shop/db tcp/3"), "{hints:?}");
        assert_eq!(hints[0].remedy, "meshctl doctor # on east1: pods_masqueraded names the rule");
        assert_eq!(suspects.hints(now + RECENT), []);
    }

    #[test]
    fn however_many_nodes_there_are_few_are_remembered_and_named() {
        let start = Instant::now();
        let mut suspects = Suspects::default();
        for nth in 0..1000 {
            suspects.note(&suspect(&format!("node{nth}")), "shop/db".into(), start + Duration::from_millis(nth));
        }
        assert_eq!(suspects.0.len(), REMEMBERED);
        let hints = suspects.hints(start + Duration::from_secs(1));
        assert_eq!(hints.len(), NAMED);
        assert!(hints[0].cause.contains("node999"), "{hints:?}");
    }
}
