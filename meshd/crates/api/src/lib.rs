//! The local API on a unix socket: HTTP/1 and JSON, for `meshctl` and `curl --unix-socket`.
//!
//! ```text
//! GET /v1/status               Status
//! GET /v1/peers                [Peer]
//! GET /v1/peers/NAME/config    text: a wg-quick file for the external peer NAME
//! GET /v1/routes               [Route]
//! GET /v1/policies             [Policy]
//! GET /v1/policies/NS/NAME     ShownPolicy; NAME alone of a ClusterNetworkPolicy
//! GET /v1/policy/explain?src=SRC&dst=DST&service=PROTO/PORT   Explained; SRC and DST are NS/POD or an address
//! GET /v1/ping?target=NAME|IP  Ping: reachability, layer by layer; blocks until replies or timeouts
//! GET /v1/echo?address=IP&size=BYTES   Echoed: one echo to a mesh address; BYTES is the size of the whole packet
//! GET /v1/doctor               Diagnosis: connectivity problems
//! GET /v1/flows?after=NUMBER   [FlowSample], those with a higher number
//! POST /v1/etcd/accept         EtcdAccepted: only keys that etcd holds stay in force
//! …   /v1/attachments…         the CNI plugin's, see `cni::daemon`
//! ```
//!
//! Over TCP, on loopback unless set otherwise, for monitoring:
//!
//! ```text
//! GET /livez[?verbose]         200 while the daemon's threads make progress
//! GET /readyz[?verbose]        200 while the node has a subnet, and data plane and policies are in force
//! GET /metrics                 OpenMetrics
//! ```
//!
//! A browser page (`ui`) is served over TCP if it is configured.
//!
//! `wg show` works too (`uapi`).
//!
//! Every user who may open the socket may read. Only root and the daemon's user may change state.

mod client;
mod connection;
mod containers;
mod health;
mod metrics;
mod monitor;
mod server;
mod source;
mod tcp;
mod uapi;
mod ui;

pub use client::{Client, ClientError};
pub use health::Check;
pub use monitor::monitor;
pub use server::{ServeError, serve};
pub use source::{Device, DevicePeer, Figures, Source};
pub use uapi::wireguard;
pub use ui::page;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "meshd.sock";
