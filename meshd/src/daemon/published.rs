//! Data behind the local API: the last plan, and live counters of the tunnel.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use api_types::DropCount;
use attachments::Attachments;
use control::{EtcdAcceptor, etcd_options::EtcdOptions};
use control_core::core::ControlStatus;
use cow_map::CowMap;
use enforcement::Enforcement;
use etcd_schema::{Alive, Cluster, NodeId};
use keys::PrivateKey;
use mesh::{
    plan::Plan,
    problem::{Problem, ProblemCode},
    records::Record,
    topology::Topology,
};
use tunnel::Tunnel;

use super::watchdog::Watchdog;

/// This node's identity, constant while it runs.
#[derive(Debug, Clone)]
pub(super) struct NodeIdentity {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) site: Option<String>,
    pub(super) cluster: Cluster,
    pub(super) public_key: etcd_schema::PublicKey,
    /// The TUN device.
    pub(super) interface: String,
}

/// The state in force.
#[derive(Debug, Default)]
pub(super) struct NodeState {
    pub(super) topology: Topology,
    /// The records give this node a subnet. While its key is being restored, the node uses it without that.
    pub(super) subnet_holds: bool,
    /// Nodes with a liveness record in etcd.
    pub(super) alive: CowMap<NodeId, Record<Alive>>,
    pub(super) plan: Option<Plan>,
    pub(super) own_endpoints: Vec<std::net::SocketAddr>,
    /// Problems of records.
    pub(super) record_problems: Arc<Vec<Problem>>,
    /// Problems of this machine: the kernel's, the tunnel's.
    pub(super) problems: Vec<Problem>,
    pub(super) firewall_drops: Vec<DropCount>,
    /// Interfaces that carry the outer packets.
    pub(super) underlay: Vec<Carrier>,
}

/// An interface that carries the outer packets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Carrier {
    pub(super) name: String,
    /// In bytes.
    pub(super) mtu: u32,
}

/// The shared state behind the API.
pub(super) struct ApiState {
    pub(super) identity: NodeIdentity,
    pub(super) started: Instant,
    pub(super) tunnel: Tunnel,
    pub(super) enforcement: Arc<Enforcement>,
    pub(super) control: tokio::sync::watch::Receiver<ControlStatus>,
    pub(super) etcd_acceptor: EtcdAcceptor,
    pub(super) in_force: Mutex<NodeState>,
    pub(super) attachments: Arc<Attachments>,
    pub(super) watchdog: Arc<Watchdog>,
    /// For queries to single etcd members.
    pub(super) etcd: EtcdOptions,
    pub(super) state_dir: PathBuf,
    /// For `wg`, if root runs it.
    pub(super) private_key: PrivateKey,
    /// Problems of API addresses and sockets that cannot be served, by code. No packet depends on them.
    pub(super) warnings: Mutex<BTreeMap<ProblemCode, Problem>>,
}

impl ApiState {
    pub(super) fn set(&self, in_force: NodeState) {
        *self.lock() = in_force;
    }

    /// Sets or clears the problem that an interface of the daemon cannot be served.
    pub(super) fn set_warning(&self, code: ProblemCode, warning: Option<Problem>) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        match warning {
            Some(warning) => warnings.insert(code, warning),
            None => warnings.remove(&code),
        };
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, NodeState> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
