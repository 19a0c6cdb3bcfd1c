//! Where the API's answers come from.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use api_types::{
    Diagnosis, DropCount, Echoed, EtcdAccepted, Explained, FlowSample, Peer, Ping, Policy, Question, QuestionError,
    Route, ShownPolicy, Status,
};
use etcd_schema::{PresharedKey, PublicKey};
use ipnet::IpNet;
use keys::PrivateKey;

use super::health::Check;

/// Where answers come from. Each call is a look at the present state and does not wait.
pub trait Source: Send + Sync + 'static {
    /// `GET /v1/status`
    fn status(&self) -> Status;
    /// `GET /v1/peers`
    fn peers(&self) -> Vec<Peer>;
    /// `GET /v1/routes`
    fn routes(&self) -> Vec<Route>;
    /// `GET /v1/policies`. May wait for the policy thread.
    fn policies(&self) -> Vec<Policy>;
    /// `GET /v1/policies/NAME`: the policy `NAMESPACE/NAME`, or the ClusterNetworkPolicy `NAME`. May wait for the
    /// policy thread.
    fn policy(&self, name: &str) -> Option<ShownPolicy>;
    /// `GET /v1/policy/explain`. May wait for the policy thread.
    ///
    /// # Errors
    /// When the question makes no sense, or names a pod that is not known.
    fn explain(&self, question: &Question) -> Result<Explained, QuestionError>;
    /// `GET /v1/ping`: how far packets to `target` get. Waits for answers.
    ///
    /// # Errors
    /// When nothing is known by that name or address.
    fn reach(&self, target: &str) -> Result<Ping, QuestionError>;
    /// `GET /v1/echo`: one echo to an address of the mesh, in a packet of so many bytes. Waits for the answer.
    fn echo(&self, to: IpAddr, packet: u16) -> Echoed;
    /// `GET /v1/doctor`. Waits for answers, of etcd and of peers that are not reached.
    fn diagnose(&self) -> Diagnosis;
    /// `GET /v1/flows`
    fn flows(&self, after: u64) -> Vec<FlowSample>;
    /// `GET /livez`: whether the threads come round.
    fn liveness(&self) -> Vec<Check>;
    /// `GET /readyz`: whether pods' packets go as they should. That etcd is away does not count.
    fn readiness(&self) -> Vec<Check>;
    /// For `GET /metrics`, beside the answers above.
    fn figures(&self) -> Figures;
    /// The tunnel as WireGuard's own tools see it, without its private key.
    fn device(&self) -> Device;
    /// The network for a new container, or the reason why none can be attached.
    ///
    /// # Errors
    /// The reason, for people.
    fn network(&self) -> Result<cni::daemon::Network, String>;
    /// `POST /v1/etcd/accept`: nothing stays in force that etcd does not hold. Waits for the control plane.
    ///
    /// # Errors
    /// When that has ended.
    fn accept_etcd(&self) -> Result<EtcdAccepted, QuestionError>;
    /// Why a pod may not send from this prefix besides its own addresses, for people; `None`: it may.
    ///
    /// # Errors
    /// When that cannot be told yet.
    fn source_conflict(&self, prefix: &IpNet) -> Result<Option<String>, String>;
    /// A wg-quick file for the external peer `name`, if there is such a peer.
    fn outside_peer_config(&self, name: &str) -> Option<String>;
}

/// Numbers that no other answer has.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Name of the tunnel's device.
    pub interface: String,
    /// Lists of etcd read.
    pub lists: u64,
    /// Records that a list showed changed and the watch had not brought.
    pub audit_differences: u64,
    /// Attachments of containers on this node.
    pub attachments: usize,
    /// How long the last change of policies took from the policy thread's first look at it until it was in force.
    pub policy_apply: Duration,
    /// Outer payload received in authentic messages and sent, in bytes, also of peers that are gone.
    pub tunnel_bytes: (u64, u64),
    /// Dropped packets, for every reason that there is: a series that comes up with its first drop hides it from rates.
    pub drops: Vec<DropCount>,
    /// Packets at the tunnel's end, for every verdict that there is.
    pub verdicts: Vec<DropCount>,
    /// The kernel's offloads, each with whether it is in use.
    pub offloads: Vec<(&'static str, bool)>,
}

/// The tunnel as WireGuard's tools see it.
#[derive(Debug, Clone, Default)]
pub struct Device {
    /// This node's key; `None` for clients that may not see it.
    pub private_key: Option<PrivateKey>,
    /// UDP port.
    pub listen_port: u16,
    /// Firewall mark of outer packets; 0: none.
    pub mark: u32,
    /// Its peers; one with two keys, during a rotation, is two here, and the first one has the prefixes.
    pub peers: Vec<DevicePeer>,
}

/// A peer of a [`Device`].
#[derive(Debug, Clone)]
pub struct DevicePeer {
    /// Its key.
    pub public_key: PublicKey,
    /// The symmetric key, where there is one.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is, or may be.
    pub endpoint: Option<SocketAddr>,
    /// Of the newest session.
    pub latest_handshake: Option<SystemTime>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// The keepalive that it has.
    pub keepalive: Option<Duration>,
    /// Its prefixes.
    pub allowed: Vec<IpNet>,
}
