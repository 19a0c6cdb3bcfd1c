//! The decisions of a node's main loop, as a state machine.
//!
//! ```text
//! Records ─▶ resolver ─────┐
//! ControlStatus ─▶ stance ─┼▶ mesh that it may act on ─▶ candidates, plan ─▶ kernel, tunnel
//! underlay, path agents ───┘
//! ```
//!
//! Values without I/O, clock or randomness; the daemon's main loop carries out what they say.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

mod core;
mod direct_sources;
mod interface;
mod mesh_state;
mod pace;
mod problems;
mod retired_vxlan;

pub use self::{
    core::NodeCore,
    interface::{Done, Effect, Effects, Input, NodeStart, PassOutcome, Reconciled, SubnetEnvChange, Work},
    mesh_state::{MeshState, Stance},
};
