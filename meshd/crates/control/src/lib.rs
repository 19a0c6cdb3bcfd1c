//! etcd: one connection, one watch stream; records, leases, the allocator.
//!
//! ```text
//!   etcd ──list, watch──▶ watcher ──▶ Store ──▶ Records ──────────▶ mesh
//!     ▲                                 ├────▶ ObjectChanges ────▶ enforcement
//!     ▲                                 │
//!     └── grant, keepalive, txn ◀── Membership ──▶ ControlStatus ──▶ status, daemon
//! ```
//!
//! [`start`] returns a [`Control`]: records and status to read; facts about this node, whether containers are attached,
//! and its `endpoints/` records to write. Decisions are `control_core`'s; `shell` runs them in one task.

pub mod cache;
mod daemon;
pub mod etcd_options;
pub mod node_removal;
mod predecessor;
pub mod session;
mod shell;
pub mod state_dir;
mod watcher;

pub use daemon::{Control, EtcdAcceptor, Options, start};

#[cfg(test)]
mod tests;
