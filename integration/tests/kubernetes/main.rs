//! meshd-sync between a real API server, a real etcd and a node.
//!
//! ```text
//!   host ── lo: API server with its etcd, etcd of the mesh, meshd-sync (one or two), meshd
//! ```

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod blocks;
mod cluster;
mod conditions;
mod copy;
mod definition;
mod enforced;
mod etcd;
mod leaders;

use std::time::Duration;

/// For what takes a moment; a term of leadership that is not given up takes 15 s to end.
const SOON: Duration = Duration::from_secs(90);
