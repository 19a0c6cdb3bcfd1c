//! The CNI plugin `meshd-cni`, versions 0.3.1 to 1.1.0 of the specification. It creates containers' interfaces in the
//! mesh, or chains behind plugins that did. It lives for one command, blocks, and runs on one thread, plus a second one
//! inside a container's namespace.
//!
//! ```text
//! stdin, CNI_* ─▶ Config, Environment ─▶ plugin ─┬─▶ daemon     announces the attachment, gets addresses; awaits policy
//!                                                ├─▶ delegate   the IPAM plugin, where the configuration names one
//!                                                └─▶ interface  veth, addresses, routes by netlink
//! ```
//!
//! An ADD first announces itself to the daemon and last opens the path to the new addresses. If it dies in between, the
//! daemon knows the attachment, and frees it once its namespace is gone.

#![forbid(unsafe_code)]

pub mod bridge;
pub mod config;
pub mod daemon;
pub mod delegate;
pub mod environment;
pub mod error;
pub mod host_local;
pub mod http;
pub mod identity;
pub mod interface;
pub mod ipam;
pub mod link;
mod log;
pub mod namespace;
pub mod plugin;
pub mod result;
pub mod version;
