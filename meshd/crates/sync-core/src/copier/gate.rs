//! Policies wait until every node of the mesh acts on what lies below `k8s/`: else they look as if they were in force, and
//! are not on some nodes.
//!
//! Only the first ones wait. A node of an older version that comes later stops no copy, since what is copied would grow
//! stale on all nodes.

use super::{Change, Copier, Effect, Notice};
use crate::{mesh_nodes::MeshNode, state::Held};

/// The token that lets policies be copied all the same.
const TOKEN: &str = "policies";
/// Most nodes that are named.
const NAMED: usize = 5;

/// Whether policies may be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// They may.
    Open,
    /// They wait for these nodes, by name and id; `None`: the mesh has not been read yet.
    Closed { behind: Option<Vec<String>> },
}

impl Copier {
    /// Takes the nodes of the mesh.
    pub(super) fn nodes(&mut self, nodes: &[MeshNode], effects: &mut Vec<Effect>) {
        let Gate::Closed { behind: before } = &self.gate else { return };
        let behind: Vec<String> = nodes
            .iter()
            .filter(|node| !node.reads_kubernetes)
            .map(|node| format!("{} ({})", node.name, node.id))
            .collect();
        if behind.is_empty() {
            self.gate = Gate::Open;
        } else if before.as_ref() != Some(&behind) {
            self.gate = Gate::Closed { behind: Some(behind) };
            effects
                .extend(self.held_policies().map(|held| Effect::Notice(Notice::PoliciesHeld { reason: held.reason })));
        }
    }

    /// What waits for nodes, as the state tells it.
    pub(super) fn held_policies(&self) -> Option<Held> {
        let Gate::Closed { behind } = &self.gate else { return None };
        let waiting = self
            .pending
            .iter()
            .filter(|((kind, _), pending)| kind.is_policy() && matches!(pending.change, Change::Put(_)))
            .count();
        let reason = match behind {
            None => format!("{waiting} policies wait until meshd-sync has read the nodes of the mesh from etcd"),
            Some(behind) => {
                let more = behind.len().saturating_sub(NAMED);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                format!(
                    "{waiting} policies wait for nodes whose meshd does not run, or is too old to read k8s/: {}{more}; \
                     start or upgrade meshd there, or remove them with `meshctl node remove`",
                    behind[..behind.len().min(NAMED)].join(", ")
                )
            }
        };
        (waiting > 0).then(|| Held { reason, token: TOKEN.to_owned(), until: None })
    }

    /// Opens the gate for an operator; returns whether the token is for that.
    pub(super) fn confirm_policies(&mut self, token: &str) -> bool {
        let released = token == TOKEN && self.held_policies().is_some();
        if released {
            self.gate = Gate::Open;
        }
        released
    }
}
