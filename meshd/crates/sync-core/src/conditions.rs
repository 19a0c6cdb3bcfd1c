//! Whether the mesh connects a cluster's nodes → conditions and the startup taint of their Node objects.
//!
//! A Node that is one of the mesh gets the conditions `NetworkUnavailable`, from which Kubernetes makes a taint, and
//! `meshd.io/NetworkReady`; once its node is ready, it loses the taint `meshd.io/agent-not-ready` that kubelet may have
//! registered it with. Others' changes of these are undone. Any other Node, one without meshd, is left as it is.
//!
//! What is not known changes nothing: an etcd that is away, a term that has just begun, a daemon that was restarted just
//! now. Nor do nodes become unavailable while more than a third of them are: then more likely what they have in common is
//! wrong, and a cluster whose nodes are all tainted schedules nothing.

mod object;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use etcd_schema::Readiness;

pub use self::object::NodeConditions;
use crate::mesh_nodes::MeshNode;

/// How long a node must be unready before its Node says so: a daemon's restart takes a moment.
const UNREADY: Duration = Duration::from_secs(15);
/// The same without a sign of life: that of a daemon which was killed lasts 30 s.
const SILENT: Duration = Duration::from_secs(60);
/// Between two patches of one Node, also if another controller insists on something else.
const SPACING: Duration = Duration::from_secs(5);
/// Most Nodes that are patched in one step.
const AT_ONCE: usize = 20;

/// A change of one Node object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Its name.
    pub node: String,
    /// What its conditions are to say; `None`: they say that already.
    pub conditions: Option<Network>,
    /// Remove the taint `meshd.io/agent-not-ready` from the object of this resource version, which has these others.
    pub untaint: Option<Untaint>,
}

/// What is to be left of the taints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untaint {
    /// The object that was seen.
    pub resource_version: String,
    /// Its other taints, as JSON.
    pub others: Vec<String>,
}

/// Whether a node's network works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// It does.
    Available,
    /// It does not.
    Unavailable {
        /// Why.
        reason: Reason,
        /// The same for people.
        message: String,
    },
}

/// Why a node's network does not work, as `reason` of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its daemon says so.
    NotReady,
    /// Its daemon gives no sign of life.
    NotRunning,
}

impl Reason {
    /// As the API has it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotReady => "MeshdNotReady",
            Self::NotRunning => "MeshdNotRunning",
        }
    }
}

/// The Nodes of one cluster during one term.
#[derive(Debug, Default)]
pub struct Conditions {
    nodes: BTreeMap<String, Node>,
    /// Names in the list under way.
    listing: BTreeSet<String>,
    /// As etcd had them last.
    mesh: Option<Vec<MeshNode>>,
}

#[derive(Debug)]
struct Node {
    object: NodeConditions,
    /// Since when its node has not been ready, and why.
    unready: Option<(Duration, Reason)>,
    patched_at: Option<Duration>,
}

impl Conditions {
    /// A list of Nodes begins.
    pub fn list_begun(&mut self) {
        self.listing.clear();
    }

    /// A Node as the API server has it now, in the list or later.
    pub fn applied(&mut self, object: NodeConditions) {
        self.listing.insert(object.name.clone());
        match self.nodes.get_mut(&object.name) {
            Some(node) => node.object = object,
            None => {
                self.nodes.insert(object.name.clone(), Node { object, unready: None, patched_at: None });
            }
        }
    }

    /// The list is complete.
    pub fn list_ended(&mut self) {
        self.nodes.retain(|name, _| self.listing.contains(name));
    }

    /// A Node is gone.
    pub fn deleted(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// The nodes of the mesh, as etcd has them now.
    pub fn mesh(&mut self, mesh: Vec<MeshNode>) {
        self.mesh = Some(mesh);
    }

    /// etcd did not say. How long nodes have been unready counts from its next answer.
    pub fn mesh_unknown(&mut self) {
        self.mesh = None;
        for node in self.nodes.values_mut() {
            node.unready = None;
        }
    }

    /// What to patch at `now`, which grows; each of them is made once, or again if the object does not follow.
    pub fn step(&mut self, now: Duration) -> Vec<Patch> {
        let Some(mesh) = &self.mesh else { return Vec::new() };
        let mut wanted: Vec<(&mut Node, Network)> = Vec::new();
        let (mut bound, mut unready) = (0_usize, 0_usize);
        for node in self.nodes.values_mut() {
            let Some(found) = find(mesh, &node.object) else { continue };
            bound += 1;
            let network = of(found);
            match &network {
                None | Some(Network::Available) => node.unready = None,
                Some(Network::Unavailable { reason, .. }) => {
                    unready += 1;
                    let since = node.unready.map_or(now, |(since, _)| since);
                    node.unready = Some((since, *reason));
                }
            }
            wanted.extend(network.map(|network| (node, network)));
        }
        let many = unready * 3 > bound;
        let mut patches = Vec::new();
        for (node, network) in wanted {
            let due = match (&network, node.unready) {
                (Network::Available, _) => true,
                (Network::Unavailable { .. }, None) => false,
                (Network::Unavailable { .. }, Some((since, reason))) => {
                    let wait = if reason == Reason::NotRunning { SILENT } else { UNREADY };
                    !many && now.saturating_sub(since) >= wait
                }
            };
            let rested = node.patched_at.is_none_or(|at| now.saturating_sub(at) >= SPACING);
            if due
                && rested
                && patches.len() < AT_ONCE
                && let Some(patch) = node.object.patch(&network)
            {
                node.patched_at = Some(now);
                patches.push(patch);
            }
        }
        patches
    }
}

/// The one node of the mesh that a Node is, by name and an InternalIP, as the policy engine binds them.
fn find<'a>(mesh: &'a [MeshNode], object: &NodeConditions) -> Option<&'a MeshNode> {
    let is_it = |node: &&MeshNode| {
        node.name == object.name && node.addresses.iter().any(|address| object.internal_ips.contains(address))
    };
    let mut matching = mesh.iter().filter(is_it);
    matching.next().filter(|_| matching.next().is_none())
}

/// Whether the node's network works, if that is known.
fn of(node: &MeshNode) -> Option<Network> {
    match (&node.readiness, node.runs) {
        (Some(Readiness::Ready), _) => Some(Network::Available),
        (Some(Readiness::NotReady { reason }), _) => {
            Some(Network::Unavailable { reason: Reason::NotReady, message: reason.clone() })
        }
        (None, false) => Some(Network::Unavailable {
            reason: Reason::NotRunning,
            message: "meshd gives no sign of life on this node".to_owned(),
        }),
        // It has just started, or is of an older version.
        (None, true) => None,
    }
}
