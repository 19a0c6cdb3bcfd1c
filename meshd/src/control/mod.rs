//! etcd: one connection, one watch stream; records, leases, the allocator.
//!
//! ```text
//!   etcd ──list, watch──▶ watcher ──▶ Store ──▶ View ─────────────▶ mesh
//!     ▲                                 ├────▶ WorldChanges ─────▶ enforcement
//!     ▲                                 │
//!     └── grant, keepalive, txn ◀── Membership ──▶ ControlStatus ──▶ status, daemon
//! ```
//!
//! [`start`] returns a [`Control`]: it reads views and status, and takes facts about this node, whether anything is
//! attached, and this node's `endpoints/` records. The parts in between are values without I/O or clock: [`store`]
//! (etcd's records and those in force), [`membership`] (this node's own records), [`allocator`] (subnet selection).
//! `daemon` is the thin shell that owns them in one task.

pub mod allocator;
pub mod backoff;
pub mod cache;
pub mod config_rule;
mod daemon;
mod endpoints;
pub mod etcd_options;
pub mod guard;
pub mod membership;
pub mod node_removal;
mod predecessor;
mod problem_log;
pub mod session;
pub mod state_dir;
pub mod store;
pub mod types;
mod unreachable;
mod watcher;
pub mod world;

#[cfg(test)]
mod tests;

pub use daemon::{CacheInfo, Control, ControlStatus, EtcdAcceptor, Options, start};
pub use endpoints::EndpointRecords;
pub(crate) use unreachable::{KEPT_WHILE_AWAY, remedy_of_etcd_error};
