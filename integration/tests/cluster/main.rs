//! A whole Kubernetes cluster whose network is meshd, installed by the chart: a control plane, and three nodes at two
//! sites, each with containerd, kubelet and kube-proxy. `make kubernetes` runs it; `cargo test` alone does not. `make
//! conformance` runs the suites of others.
//!
//! ```text
//!   east1 ─┐ site east                  site west
//!          ├─── switch ──── router ──── switch ──── west1
//!   east2 ─┘                  │
//!                           store: API server, controllers, scheduler, their etcd; etcd of the mesh
//! ```

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod etcd;
mod failures;
mod fixture;
mod flannel;
mod lifecycle;
mod network;
mod policies;
mod services;
mod suites;
mod workload;

use std::time::Duration;

/// For what takes a moment on a busy machine.
const SOON: Duration = Duration::from_secs(120);
