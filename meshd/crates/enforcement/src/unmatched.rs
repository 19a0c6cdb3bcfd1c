//! Attachments whose Pod has no object, or an object of another node: policies have no labels for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use cni::environment::AttachmentName;
use mesh::problem::{Problem, ProblemCode};

/// How long the Pod object may take to reach etcd before its absence is a problem.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most attachments that are named.
const NAMED: usize = 3;

/// Names with the time since when each is one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Lasting(BTreeMap<String, Instant>);

impl Lasting {
    /// Takes those that there are now.
    fn update(&mut self, now: Instant, names: impl IntoIterator<Item = String>) {
        let before = std::mem::take(&mut self.0);
        self.0 = names.into_iter().map(|name| (name.clone(), before.get(&name).copied().unwrap_or(now))).collect();
    }

    /// The lasting ones, the first few by name; `None` without any.
    fn shown(&self, now: Instant) -> Option<String> {
        let lasting = |since: &Instant| now.saturating_duration_since(*since) >= PATIENCE;
        let names: Vec<&str> =
            self.0.iter().filter(|(_, since)| lasting(since)).map(|(name, _)| name.as_str()).collect();
        let (shown, more) = names.split_at(names.len().min(NAMED));
        let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
        (!shown.is_empty()).then(|| format!("{}{more}", shown.join(", ")))
    }
}

/// The attachments that no Pod object counts as its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Unmatched {
    /// Of this node, each as `NAMESPACE/NAME (UID …)`: no object has the UID.
    without_pod: Lasting,
    /// Of any node, each as `NAMESPACE/NAME on NODE (nodeName …)`: the object is another node's.
    misplaced: Lasting,
    /// Problems of the clusters' objects.
    pub(super) of_clusters: Vec<Problem>,
    /// Attachments of this node that should have a Pod object, because it belongs to a cluster whose objects are
    /// copied.
    pub(super) awaited: Arc<BTreeSet<AttachmentName>>,
}

impl Unmatched {
    /// Takes those that there are now.
    pub(super) fn update(
        &mut self,
        now: Instant,
        without_pod: impl IntoIterator<Item = String>,
        misplaced: impl IntoIterator<Item = String>,
    ) {
        self.without_pod.update(now, without_pod);
        self.misplaced.update(now, misplaced);
    }

    /// Their problems for status.
    pub(super) fn problems(&self, now: Instant) -> impl Iterator<Item = Problem> {
        let without_pod = self.without_pod.shown(now).map(|names| {
            Problem::new(
                ProblemCode::AttachmentWithoutPod,
                format!(
                    "no Pod in etcd has the UID of these attachments: {names}; their labels are unknown, so every \
                     policy that could select them isolates them"
                ),
                "copy their Pod objects from the API server to pods/NAMESPACE/NAME; for a static pod, the mirror pod \
                 with its annotations",
            )
        });
        let misplaced = self.misplaced.shown(now).map(|names| {
            Problem::new(
                ProblemCode::AttachmentOnOtherNode,
                format!(
                    "these attachments are not on the node of their Pod: {names}; they do not get its labels, named ports \
                     or policies"
                ),
                "if the attachments are right, correct nodeName in the Pod object, start meshd with --node set to the \
                 Kubernetes node name, or remove an older node of that name (meshctl node remove); if not, the node \
                 that published them is broken or compromised",
            )
        });
        without_pod.into_iter().chain(misplaced).chain(self.of_clusters.iter().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn causes(unmatched: &Unmatched, now: Instant) -> Vec<String> {
        unmatched.problems(now).map(|problem| problem.cause).collect()
    }

    #[test]
    fn what_lasts_is_named_with_the_number_of_the_rest() {
        let now = Instant::now();
        let mut unmatched = Unmatched::default();
        unmatched.update(now, ["a".to_owned()], []);
        assert!(causes(&unmatched, now + PATIENCE - Duration::from_millis(1)).is_empty());
        let later = now + PATIENCE;
        unmatched.update(later, ["a", "b", "c", "d", "e"].map(str::to_owned), ["f".to_owned()]);
        assert!(causes(&unmatched, later)[0].contains("these attachments: a; their"));
        let [without_pod, misplaced] = causes(&unmatched, later + PATIENCE).try_into().unwrap();
        assert!(without_pod.contains(": a, b, c and 2 more; their"));
        assert!(misplaced.contains("their Pod: f; they"));
        unmatched.update(later, [], []);
        assert!(causes(&unmatched, later + PATIENCE).is_empty());
    }
}
