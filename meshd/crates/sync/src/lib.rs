//! `meshd-sync`: copies the objects of one Kubernetes cluster into etcd, where the nodes of the mesh read them.
//!
//! ```text
//!   API server ──list, watch──▶ follow, one task a kind ──▶ term ──▶ etcd
//!                                                            ▲
//!                              election: the leased key ─────┘
//! ```
//!
//! Decisions are `sync_core`'s; this is the shell that makes the calls.

mod api;
mod election;
mod follow;
mod monitor;
mod run;
mod term;
mod trial;

pub use run::{Options, run};
pub use trial::try_out;
