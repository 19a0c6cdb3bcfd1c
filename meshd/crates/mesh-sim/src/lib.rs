//! Seeded simulations of a whole mesh: the decisions of all its nodes, on one model of etcd, and on models of the
//! kernel, of networks and of operators that do what they like.
//!
//! ```text
//! Etcd ⇄ ControlCore ─▶ NodeCore ─▶ tunnel's table, kernel's routes and guard ─▶ packets traced from pod to pod
//!            │             ▲
//!          cache        PathAgents ⇄ probes over links that fail
//! ```
//!
//! [`MeshSim::run`] lets one seed's history happen, and panics with the seed at the first step after which an invariant
//! of docs/ARCHITECTURE.md is broken:
//!
//! 1. what the kernel holds lets no packet to a pod leave in the clear but by a proven link;
//! 2. no record is lost at a node that was not deleted or replaced in etcd;
//! 3. no two nodes lease one prefix, nor does a node's tunnel give one to two peers;
//! 4. a plan that follows changes equals one from nothing; a peer whose records are the same keeps its place.
//!
//! After the faults, everything comes to rest: each node has its subnet, no problem is left, every pod reaches every
//! other one, over a direct path where there is one.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a simulation's own steps may unwrap")]

mod check;
mod faults;
mod history;
mod machine;
mod process;
mod world;

pub use world::MeshSim;

#[cfg(test)]
mod tests;
