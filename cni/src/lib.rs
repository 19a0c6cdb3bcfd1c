//! The CNI plugin `meshd-cni`, versions 0.3.1 to 1.1.0 of the specification: gives containers their interface in the
//! mesh, or chains behind plugins that did. It lives for one command, blocks, and runs on one thread (a second one for
//! what happens inside a container's namespace).
//!
//! ```text
//! stdin, CNI_* ─▶ Config, Environment ─▶ plugin ─┬─▶ daemon     announces the attachment, gets its addresses; waits for policy
//!                                                ├─▶ delegate   the IPAM plugin, where the configuration names one
//!                                                └─▶ interface  veth, addresses, routes by netlink
//! ```
//!
//! An ADD begins by telling the daemon and ends by opening the way to the new addresses: if it dies in between, the daemon
//! knows the attachment, and frees it once its namespace is gone.

#![forbid(unsafe_code)]

pub mod bridge;
pub mod config;
pub mod daemon;
pub mod delegate;
pub mod environment;
pub mod error;
pub mod host_local;
pub mod identity;
pub mod interface;
pub mod ipam;
pub mod namespace;
pub mod plugin;
pub mod result;
pub mod version;
