//! One node's topology of the mesh at one etcd revision, and the resulting plan.
//!
//! ```text
//! Records ─▶ Topology ─┬─▶ plan ─▶ kernel_state::Desired
//! underlay, paths ─────┘        └─▶ tunnel_table::TunnelTable
//! ```
//!
//! All code here is a function of its arguments: no I/O, no clock, no randomness. Two nodes with the same revision and
//! the same retained values compute the same owner for every prefix.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

pub mod address;
pub mod backend;
mod claims;
mod fold;
pub mod interface;
pub mod kernel_state;
pub mod path;
pub mod plan;
pub mod problem;
pub mod records;
pub mod resolver;
pub mod topology;
pub mod tunnel_table;
pub mod vxlan;
