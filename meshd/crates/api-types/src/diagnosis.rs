//! Responses for `meshctl ping` and `meshctl doctor`.

use std::net::IpAddr;

use mesh::problem::{Problem, ProblemCode};
use serde::{Deserialize, Serialize};

use crate::status::Path;

/// `GET /v1/ping?target=NAME|ADDRESS`: how far packets get.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ping {
    /// The requested target.
    pub target: String,
    /// The node or external peer that it belongs to.
    pub peer: String,
    /// How packets reach that.
    pub path: Path,
    /// The MTU of this layer in bytes, as configured or learned.
    pub mtu: Option<u16>,
    /// From the outermost to the innermost.
    pub layers: Vec<Layer>,
}

/// One layer of the path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Layer {
    /// Which one.
    pub layer: LayerKind,
    /// The tested address.
    pub address: String,
    /// Whether packets pass; `None` if unknown.
    pub passes: Option<bool>,
    /// Seconds until the answer, where something was asked and answered.
    pub round_trip: Option<f64>,
    /// The finding.
    pub text: String,
    /// The remedy; empty if none is needed.
    pub remedy: String,
}

/// Layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Forwarding of pods' packets by this node's kernel; listed only where it fails.
    Forwarding,
    /// The host below, and the tunnel's UDP port.
    Udp,
    /// The tunnel's session.
    Wireguard,
    /// The plain route on a common subnet.
    Direct,
    /// The node's overlay address.
    Overlay,
    /// A pod, or a host behind an external peer.
    Pod,
}

impl LayerKind {
    /// As `-o json` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forwarding => "forwarding",
            Self::Udp => "udp",
            Self::Wireguard => "wireguard",
            Self::Direct => "direct",
            Self::Overlay => "overlay",
            Self::Pod => "pod",
        }
    }
}

impl Ping {
    /// Whether the innermost layer was reached, and pods' packets get there, too.
    #[must_use]
    pub fn reached(&self) -> bool {
        let inner = |layer: &&Layer| matches!(layer.layer, LayerKind::Overlay | LayerKind::Pod);
        let mut inner = self.layers.iter().filter(inner).peekable();
        let forwarded = self.layers.iter().all(|layer| layer.layer != LayerKind::Forwarding);
        forwarded && inner.peek().is_some() && inner.all(|layer| layer.passes == Some(true))
    }

    /// The innermost address that was asked, for asking it again.
    #[must_use]
    pub fn innermost(&self) -> Option<IpAddr> {
        self.layers.last().and_then(|layer| layer.address.parse().ok())
    }
}

/// `GET /v1/echo?address=ADDRESS&size=BYTES`: one echo inside the mesh.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Echoed {
    /// Seconds until the answer; `None`: there was none.
    pub round_trip: Option<f64>,
    /// Why not; empty when there was.
    pub text: String,
}

/// `GET /v1/doctor`: the daemon's findings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Diagnosis {
    /// The tunnel's device.
    pub interface: String,
    /// Interfaces that carry the outer packets.
    pub underlay: Vec<String>,
    /// The address families of the mesh.
    pub families: Families,
    /// The tunnel's UDP port.
    pub listen_port: u16,
    /// Versions of the etcd members that answer.
    pub etcd: Vec<String>,
    /// The findings.
    pub findings: Vec<Finding>,
}

/// Address families of the mesh's networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Families {
    /// There is an IPv4 network.
    pub ipv4: bool,
    /// There is an IPv6 network.
    pub ipv6: bool,
}

/// A finding that affects, or may affect, connectivity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Stable, in snake case.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// The cause, with the value.
    pub cause: String,
    /// The remedy: a command if there is one.
    pub remedy: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Packets do not get through, or would not after a restart.
    Error,
    /// They do, but not as they should.
    Warning,
    /// Good to know.
    Note,
}

impl Finding {
    /// A finding; its code is one of those of problems.
    #[must_use]
    pub fn new(severity: Severity, code: ProblemCode, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: code.to_string(), severity, cause: cause.into(), remedy: remedy.into() }
    }

    /// The same as a problem of the daemon.
    #[must_use]
    pub fn of(severity: Severity, problem: Problem) -> Self {
        Self::new(severity, problem.code, problem.cause, problem.remedy)
    }

    /// Whether it has this code.
    #[must_use]
    pub fn is(&self, code: ProblemCode) -> bool {
        self.code == code.as_str()
    }
}
