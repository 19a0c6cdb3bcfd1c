//! The Lab: hosts, switches, routers and NATs in network namespaces, and helpers for scenarios.
//!
//! All functions are synchronous. On failure they panic with the host, the command and its output, so a scenario reads
//! as a list of steps and ends at the first failed one. A scenario is a plain `#[test]` that runs as root:
//!
//! ```no_run
//! use integration::{Lab, ping};
//!
//! let lab = Lab::new("two-hosts");
//! let switch = lab.switch("lan");
//! let (a, b) = (lab.host("a"), lab.host("b"));
//! a.connect(&switch, &["192.0.2.1/24"]);
//! b.connect(&switch, &["192.0.2.2/24"]);
//! ping(&a, "192.0.2.2").assert_all_answered();
//! ```
//!
//! Labs can run in parallel threads and processes. At its end, a Lab removes all its namespaces, processes and files,
//! even after a panic or `kill -9`. `KEEP=1` in the environment leaves it running.

mod await_until;
mod cni_runtime;
mod etcd;
mod etcd_writer;
mod flannel;
mod flow;
mod iperf;
mod kubernetes;
mod lab;
mod machine;
pub mod measure;
mod meshd_node;
mod ping;
mod podman;
mod population;
mod programs;
mod relay;
mod sniffer;
pub mod stepped;
#[expect(unsafe_code, reason = "system calls")]
mod sys;
mod tcp_check;
pub mod topology;
mod wire;
mod wireguard_peer;

pub use await_until::{await_ok, await_until};
pub use cni_runtime::{CniFailure, CniPod, CniRuntime};
pub use etcd::Etcd;
pub use etcd_writer::EtcdWriter;
pub use flannel::Flannel;
pub use flow::{Flow, FlowReport, enlarge_receive_buffer};
pub use iperf::{Iperf, Throughput};
pub use kubernetes::{KubernetesApi, KubernetesNode, NodeOptions, ProxyMode, kubernetes_programs};
pub use lab::{
    Lab,
    host::{Host, Pod},
    interface::Interface,
    namespace::Namespace,
    process::{Output, Process},
    remove_kept,
    router::{Nat, Router},
    switch::Switch,
};
pub use machine::Machine;
pub use meshd_node::{Meshd, MeshdNode};
pub use ping::{Ping, PingReport, ping};
pub use podman::Podman;
pub use population::{LARGE_CONFIG, PaperNode};
pub use programs::{binary, previous};
pub use relay::{Fate, Impairment, Lane, Relay, RelayCount};
pub use sniffer::{Sniffer, Violation};
pub use tcp_check::{TcpCheck, TcpReport};
pub use wire::Wire;
pub use wireguard_peer::{Implementation, WireguardPeer, key_pair};
