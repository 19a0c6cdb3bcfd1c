//! The decisions of `meshd-sync`: values without I/O, clock or randomness of their own.
//!
//! [`canonical`] reduces an object of the API server to its key and value in etcd. [`Copier`] is one term of leadership:
//! it is given what the API server and etcd say and returns the calls to make. `sync` makes them.
//!
//! ```text
//!   list, watch ──▶ canonical ──▶ Copier ──▶ one transaction at a time, each fenced by the leader key
//!                                   ▲ └────▶ list again, read the confirmation, resign
//!   etcd at the term's begin ───────┘
//! ```
//!
//! [`blocks`] reserves podCIDRs and gives up what deleted Nodes leave, from what etcd holds.

#![forbid(unsafe_code)]

pub mod blocks;
pub mod canonical;
pub mod conditions;
mod copier;
mod digest;
mod kind;
pub mod mesh_nodes;
mod refused;
mod role;
pub mod state;

pub use copier::{Copier, Effect, Input, Notice, Now, Planned, Resigned, Standoff};
pub use kind::{ClusterKeys, ObjectKind};
pub use mesh_nodes::{MeshNode, mesh_nodes};
pub use refused::{Refused, refused};
pub use role::sync_role;
