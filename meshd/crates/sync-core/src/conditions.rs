//! Whether the mesh connects a cluster's nodes → conditions and the startup taint of their Node objects.
//!
//! A Node that is one of the mesh gets the conditions `NetworkUnavailable`, from which Kubernetes makes a taint, and
//! `meshd.io/NetworkReady`; once its node is ready, it loses the taint `meshd.io/agent-not-ready` that kubelet may have
//! registered it with. Others' changes of these are undone. A Node outside the mesh is left as it is; one that has left
//! it loses the conditions.
//!
//! What is not known changes nothing: an etcd that is away, a term that has just begun, a daemon that was restarted
//! just now. Nor do nodes become unavailable while more than a third of them are: then more likely what they have in
//! common is wrong, and a cluster whose nodes are all tainted schedules nothing.

mod object;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use etcd_schema::Readiness;

pub use self::object::NodeConditions;
use crate::mesh_nodes::MeshNode;

/// How long a node must be unready before its Node's conditions change: a daemon's restart takes a moment.
const UNREADY: Duration = Duration::from_secs(15);
/// The same without a sign of life: that of a daemon which was killed lasts 30 s.
const SILENT: Duration = Duration::from_secs(60);
/// Between two patches of one Node, also if another controller insists on something else.
const SPACING: Duration = Duration::from_secs(5);
/// The same while the object is not seen to change.
const UNHEARD: Duration = Duration::from_secs(30);
/// Most Nodes that are patched in one step.
const AT_ONCE: usize = 20;

/// A change of one Node object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Its name.
    pub node: String,
    /// The change of its conditions; `None`: they stay.
    pub conditions: Option<Conditioned>,
    /// Remove the taint `meshd.io/agent-not-ready` from the object of this resource version, which has these others.
    pub untaint: Option<Untaint>,
}

/// The taints to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untaint {
    /// The object that was seen.
    pub resource_version: String,
    /// Its other taints, as JSON.
    pub others: Vec<String>,
}

/// A change of conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conditioned {
    /// Set them, each with the given transition time if its status is unchanged.
    Say(NetworkHealth, [Option<String>; 2]),
    /// The node has left the mesh: they go.
    Clear,
}

/// Whether a node's network works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkHealth {
    /// The mesh connects the node.
    Available,
    /// The mesh does not connect the node.
    Unavailable {
        /// Why.
        reason: ConditionReason,
        /// The same for people.
        message: String,
    },
}

/// Why a node's network does not work, as `reason` of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConditionReason {
    /// Its daemon reports it.
    NotReady,
    /// Its daemon gives no sign of life.
    NotRunning,
}

impl ConditionReason {
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
    nodes: BTreeMap<String, WatchedNode>,
    /// Names in the list under way.
    listing: BTreeSet<String>,
    /// As etcd had them last.
    mesh: Option<Vec<MeshNode>>,
}

#[derive(Debug)]
struct WatchedNode {
    object: NodeConditions,
    /// Since when its node has not been ready, and why.
    unready: Option<(Duration, ConditionReason)>,
    /// Since when no mesh node matches this Node, although its object has our conditions.
    left: Option<Duration>,
    /// When it was patched last, and the object's resource version then.
    patched: Option<(Duration, String)>,
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
                self.nodes
                    .insert(object.name.clone(), WatchedNode { object, unready: None, left: None, patched: None });
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
            (node.unready, node.left) = (None, None);
        }
    }

    /// The patches at `now`, which never decreases. Each is returned once, and again if the object does not follow.
    pub fn step(&mut self, now: Duration) -> Vec<Patch> {
        let Some(mesh) = &self.mesh else { return Vec::new() };
        let mut wanted: Vec<(&mut WatchedNode, Option<NetworkHealth>)> = Vec::new();
        let (mut bound, mut unready) = (0_usize, 0_usize);
        for node in self.nodes.values_mut() {
            let found = match find(mesh, &node.object) {
                MatchedNode::One(found) => found,
                MatchedNode::Several => continue,
                MatchedNode::None => {
                    node.unready = None;
                    if node.object.has_ours() {
                        (bound, unready) = (bound + 1, unready + 1);
                        node.left.get_or_insert(now);
                        wanted.push((node, None));
                    }
                    continue;
                }
            };
            bound += 1;
            node.left = None;
            let network = of(found);
            match &network {
                None | Some(NetworkHealth::Available) => node.unready = None,
                Some(NetworkHealth::Unavailable { reason, .. }) => {
                    unready += 1;
                    let since = node.unready.map_or(now, |(since, _)| since);
                    node.unready = Some((since, *reason));
                }
            }
            wanted.extend(network.map(|network| (node, Some(network))));
        }
        let many = unready * 3 > bound;
        let mut patches = Vec::new();
        for (node, network) in wanted {
            let lasts = |since: Option<Duration>, wait: Duration| {
                !many && since.is_some_and(|since| now.saturating_sub(since) >= wait)
            };
            let due = match &network {
                Some(NetworkHealth::Available) => true,
                Some(NetworkHealth::Unavailable { reason, .. }) => {
                    let wait = if *reason == ConditionReason::NotRunning { SILENT } else { UNREADY };
                    lasts(node.unready.map(|(since, _)| since), wait)
                }
                None => lasts(node.left, SILENT),
            };
            // While the outcome of the last patch is unknown, another would repeat it.
            let rested = node.patched.as_ref().is_none_or(|(at, version)| {
                let unheard = node.object.resource_version() == version;
                now.saturating_sub(*at) >= if unheard { UNHEARD } else { SPACING }
            });
            if due
                && rested
                && patches.len() < AT_ONCE
                && let Some(patch) = node.object.patch(network.as_ref())
            {
                node.patched = Some((now, node.object.resource_version().to_owned()));
                patches.push(patch);
            }
        }
        patches
    }
}

/// Which node of the mesh a Node is.
enum MatchedNode<'a> {
    None,
    One(&'a MeshNode),
    /// Several nodes match.
    Several,
}

/// By name and an InternalIP, as the policy engine binds them. A node that was made again under its name and address
/// has an older record beside its own, until that is removed or expires: of several, the one that runs is it.
fn find<'a>(mesh: &'a [MeshNode], object: &NodeConditions) -> MatchedNode<'a> {
    let is_it = |node: &&MeshNode| {
        node.name == object.name && node.addresses.iter().any(|address| object.internal_ips.contains(address))
    };
    let matching: Vec<&MeshNode> = mesh.iter().filter(is_it).collect();
    let running: Vec<&MeshNode> = matching.iter().copied().filter(|node| node.runs).collect();
    match (matching.as_slice(), running.as_slice()) {
        ([], _) => MatchedNode::None,
        ([one], _) | (_, [one]) => MatchedNode::One(one),
        _ => MatchedNode::Several,
    }
}

/// Whether the node's network works, if that is known.
fn of(node: &MeshNode) -> Option<NetworkHealth> {
    match (&node.readiness, node.runs) {
        (Some(Readiness::Ready), _) => Some(NetworkHealth::Available),
        (Some(Readiness::NotReady { reason }), _) => {
            Some(NetworkHealth::Unavailable { reason: ConditionReason::NotReady, message: reason.clone() })
        }
        (None, false) => Some(NetworkHealth::Unavailable {
            reason: ConditionReason::NotRunning,
            message: "meshd gives no sign of life on this node".to_owned(),
        }),
        // It has just started, or is of an older version.
        (None, true) => None,
    }
}

#[cfg(test)]
mod tests;
