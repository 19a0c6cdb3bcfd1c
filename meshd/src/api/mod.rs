//! The local API on a unix socket: HTTP/1 and JSON, for `meshctl` and whoever has `curl --unix-socket`.
//!
//! ```text
//! GET /v1/status               Status
//! GET /v1/peers                [Peer]
//! GET /v1/peers/NAME/config    text: a wg-quick file for the outside peer NAME
//! GET /v1/routes               [Route]
//! GET /v1/policies             [Policy]
//! GET /v1/policies/NS/NAME     ShownPolicy; NAME alone of a ClusterNetworkPolicy
//! GET /v1/policy/explain?src=SRC&dst=DST&service=PROTO/PORT   Explained; SRC and DST are NS/POD or an address
//! GET /v1/ping?target=NAME|IP  Ping: how far packets get, layer by layer; takes as long as the answers do
//! GET /v1/echo?address=IP&size=BYTES   Echoed: one echo to an address of the mesh, the whole packet that long
//! GET /v1/doctor               Diagnosis: what keeps packets from getting through
//! GET /v1/flows?after=NUMBER   [FlowSample], those with a higher number
//! POST /v1/etcd/accept         EtcdAccepted: nothing stays in force any longer that etcd does not hold
//! …   /v1/attachments…         the CNI plugin's, see `cni::daemon`
//! ```
//!
//! Over TCP, on loopback unless set otherwise, for monitoring:
//!
//! ```text
//! GET /livez[?verbose]         200 while the daemon's threads come round
//! GET /readyz[?verbose]        200 while it has a subnet, and its data plane and policies are in force
//! GET /metrics                 OpenMetrics
//! ```
//!
//! A page for browsers on this machine (`ui`) is served over TCP as well where it is asked for.
//!
//! WireGuard's own way of asking, `wg show`, is answered as well (`uapi`).
//!
//! Who may open the socket may look. Only root, and the user that the daemon runs as, may change something.

mod attachments;
mod client;
mod connection;
mod diagnosis;
mod health;
mod metrics;
mod monitor;
mod server;
mod tcp;
mod types;
mod uapi;
mod ui;

pub use client::{Client, ClientError};
pub use diagnosis::{Diagnosis, Echoed, Families, Finding, Layer, LayerKind, Ping, Severity};
pub use health::Check;
pub use metrics::Figures;
pub use monitor::monitor;
pub use server::{Question, QuestionError, ServeError, Source, serve};
pub use types::{
    DropCount, Etcd, EtcdAccepted, Explained, ExplainedEnd, Path, Peer, PeerCounts, Policy, PolicyStatus, Problem,
    Route, ShownPolicy, State, Status,
};
pub use uapi::{Device, DevicePeer, wireguard};
pub use ui::page;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "meshd.sock";
