//! Kubernetes objects that have a flat key and one below `k8s/CLUSTER/`, too: most likely the flat one is left over
//! from before the copy of the cluster, and policies of both apply.

use std::collections::{BTreeMap, BTreeSet};

use etcd_schema::{Cluster, Key, KubernetesKey};
use mesh::problem::{Problem, ProblemCode};
use text::quote;

/// Most objects that are named.
const NAMED: usize = 3;

/// Which keys etcd holds twice.
#[derive(Debug, Clone, Default)]
pub(super) struct Duplicates {
    /// Each with the number of its keys.
    clusters: BTreeMap<Cluster, usize>,
    /// Flat keys, each with the clusters that have the same object.
    stored: BTreeMap<KubernetesKey, BTreeSet<Cluster>>,
}

impl Duplicates {
    /// Notes that etcd holds `key` now; `holds` tests other keys.
    pub(super) fn put(&mut self, key: Option<&Key>, holds: impl Fn(&Key) -> bool) {
        let Some(Key::Kubernetes(cluster, object)) = key else { return };
        if cluster.is_flat() {
            let of = |cluster: &Cluster| Key::Kubernetes(cluster.clone(), object.clone());
            let clusters: BTreeSet<Cluster> =
                self.clusters.keys().filter(|cluster| holds(&of(cluster))).cloned().collect();
            if !clusters.is_empty() {
                self.stored.insert(object.clone(), clusters);
            }
            return;
        }
        *self.clusters.entry(cluster.clone()).or_default() += 1;
        if holds(&Key::Kubernetes(Cluster::default(), object.clone())) {
            self.stored.entry(object.clone()).or_default().insert(cluster.clone());
        }
    }

    /// Notes that etcd no longer holds `key`.
    pub(super) fn remove(&mut self, key: Option<&Key>) {
        let Some(Key::Kubernetes(cluster, object)) = key else { return };
        if cluster.is_flat() {
            self.stored.remove(object);
            return;
        }
        if let Some(count) = self.clusters.get_mut(cluster) {
            *count -= 1;
            if *count == 0 {
                self.clusters.remove(cluster);
            }
        }
        if let Some(clusters) = self.stored.get_mut(object) {
            clusters.remove(cluster);
            if clusters.is_empty() {
                self.stored.remove(object);
            }
        }
    }

    /// Their problem for status.
    pub(super) fn problem(&self, prefix: &str) -> Option<Problem> {
        let first = self.stored.iter().take(NAMED);
        let named: Vec<String> = first
            .clone()
            .map(|(object, clusters)| {
                let clusters: Vec<&str> = clusters.iter().map(Cluster::as_str).collect();
                format!("{object} ({})", clusters.join(", "))
            })
            .collect();
        let delete: Vec<String> =
            first.map(|(object, _)| format!("etcdctl del {}", quote(&format!("{prefix}/{object}")))).collect();
        let more = if self.stored.len() > named.len() { " and more" } else { "" };
        (!named.is_empty()).then(|| Problem {
            code: ProblemCode::ObjectStoredTwice,
            key: None,
            cause: format!(
                "these objects are stored flat and below k8s/ (of clusters): {}{more}; flat policies apply to the pods \
                 of every cluster, beside those of the clusters",
                named.join(", ")
            ),
            remedy: format!("{} # if the flat ones are left over", delete.join(" && ")),
        })
    }
}
