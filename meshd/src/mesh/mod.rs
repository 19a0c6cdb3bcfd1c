//! The picture of the mesh at one etcd revision, and the plan that follows from it.
//!
//! ```text
//! View (control) ─▶ Snapshot ─┬─▶ plan ─▶ kernel::Desired
//! underlay, paths ────────────┘        └─▶ tunnel::Table
//! ```
//!
//! Everything here is a function of its arguments: no I/O, no clock. Two nodes that see the same revision and have
//! retained the same values see the same owner for every prefix.

pub mod address;
pub mod claims;
mod fold;
pub mod path;
pub mod picture;
pub mod plan;

pub mod probe;
pub mod snapshot;
