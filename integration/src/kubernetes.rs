//! Kubernetes: an API server with its etcd alone, and whole clusters with nodes.

mod api;
mod node;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

pub use api::KubernetesApi;
pub use node::{KubernetesNode, NodeOptions, ProxyMode};

/// Where `scripts/install-kubernetes` keeps this set of programs.
///
/// # Panics
/// When they are not built.
#[must_use]
#[track_caller]
pub fn kubernetes_programs(set: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install-kubernetes");
    let output = Command::new(&script).args([set, "--path"]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    assert!(folder.join("complete").exists(), "programs are not built; run: scripts/install-kubernetes {set}");
    folder
}
