//! Policies wait until every daemon of the mesh acts on what lies below `k8s/`: else they look as if they were in
//! force, and are not on some nodes.
//!
//! Only the first ones wait. A node of an older version that comes later stops no copy, since what is copied would grow
//! stale on all nodes. A node without a running daemon passes no packets, and keeps no policy waiting.

use super::{Copier, Effect, Notice, PendingWrite};
use crate::{digest::Digest, mesh_nodes::MeshNode, state::Held};

/// Most nodes that are named.
const NAMED: usize = 5;

/// Whether policies may be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PolicyHold {
    /// They may.
    Open,
    /// They wait.
    Closed {
        /// The nodes that they wait for, by name and id; or why the nodes are not known, empty before the first answer.
        behind: Result<Vec<String>, String>,
        /// The notice that policies wait was given.
        told: bool,
    },
}

impl Copier {
    /// Takes the nodes of the mesh.
    pub(super) fn nodes(&mut self, nodes: &[MeshNode], effects: &mut Vec<Effect>) {
        let behind: Vec<String> = nodes
            .iter()
            .filter(|node| node.runs && !node.reads_kubernetes)
            .map(|node| format!("{} ({})", node.name, node.id))
            .collect();
        if behind.is_empty() {
            self.gate = PolicyHold::Open;
        } else {
            self.close(Ok(behind), effects);
        }
    }

    /// The nodes of the mesh cannot be read.
    pub(super) fn nodes_unknown(&mut self, error: String, effects: &mut Vec<Effect>) {
        self.close(Err(error), effects);
    }

    fn close(&mut self, behind: Result<Vec<String>, String>, effects: &mut Vec<Effect>) {
        let PolicyHold::Closed { behind: before, told } = &mut self.gate else { return };
        if *before != behind {
            (*before, *told) = (behind, false);
        }
        if let Some(held) = self.held_policies()
            && let PolicyHold::Closed { told, .. } = &mut self.gate
            && !std::mem::replace(told, true)
        {
            effects.push(Effect::Notice(Notice::PoliciesHeld { reason: held.reason }));
        }
    }

    /// The policies that wait for nodes, for the state.
    pub(super) fn held_policies(&self) -> Option<Held> {
        let PolicyHold::Closed { behind, .. } = &self.gate else { return None };
        let waits = |kind: &crate::ObjectKind, change: &PendingWrite| {
            kind.is_policy() && matches!(change, PendingWrite::Put(_))
        };
        let waiting = self.pending.iter().filter(|((kind, _), pending)| waits(kind, &pending.change)).count();
        let reason = match behind {
            Err(error) => {
                let why = if error.is_empty() { String::new() } else { format!(": {error}") };
                format!("{waiting} policies wait until meshd-sync has read the nodes of the mesh from etcd{why}")
            }
            Ok(behind) => {
                let more = behind.len().saturating_sub(NAMED);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                let named = behind[..behind.len().min(NAMED)].join(", ");
                format!(
                    "{waiting} policies wait for nodes whose meshd is too old to read k8s/: {named}{more}; upgrade meshd \
                     there"
                )
            }
        };
        // A confirmation is for these nodes.
        let of = Digest::of(format!("{behind:?}").as_bytes()).to_string();
        (waiting > 0).then(|| Held { reason, token: format!("policies-{}", &of[..8]), until: None })
    }

    /// Opens the gate for an operator; returns whether the token is for that.
    pub(super) fn confirm_policies(&mut self, token: &str) -> bool {
        let released = self.held_policies().is_some_and(|held| held.token == token);
        if released {
            self.gate = PolicyHold::Open;
        }
        released
    }
}
