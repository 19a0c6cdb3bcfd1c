//! Response types of the API. Fields may be added; they are never removed, and keep their meaning.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use mesh::backend::PathKind;
use policy::engine::{Cause, Classifier, Explanation, Flow};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// `GET /v1/status`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name of this node.
    pub node: String,
    /// Its stable identity.
    pub id: String,
    /// Its site.
    pub site: Option<String>,
    /// The cluster whose networks it draws its subnet from; empty: no cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// Its subnets.
    pub subnets: Vec<IpNet>,
    /// Its overlay addresses.
    pub overlay: Vec<IpAddr>,
    /// The etcd revision that is in force.
    pub revision: i64,
    /// etcd.
    pub etcd: Etcd,
    /// The other nodes and external peers, by how packets reach them.
    #[serde(default)]
    pub peers: PeerCounts,
    /// In one word.
    pub state: DaemonState,
    /// Current problems.
    pub problems: Vec<ReportedProblem>,
    /// How far policies are in force on this node.
    #[serde(default)]
    pub policy: PolicyStatus,
    /// Copies of Kubernetes clusters in etcd.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<CopyStatus>,
    /// Packets dropped since the start, by reason; only reasons that occurred.
    pub drops: Vec<DropCount>,
    /// Version of the daemon.
    pub version: String,
    /// Seconds since the daemon started.
    #[serde(default)]
    pub uptime: u64,
}

/// How far `meshd-sync` has copied a Kubernetes cluster. Nothing fails closed by its age.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CopyStatus {
    /// The cluster.
    pub cluster: String,
    /// Seconds since the copy was known to be complete, by the clocks of this node and of `meshd-sync`.
    pub age_seconds: u64,
    /// Objects of each kind, by its plural.
    pub objects: BTreeMap<String, u64>,
    /// Findings that wait for `meshctl sync confirm`.
    pub held: usize,
}

/// Numbers of other nodes and external peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeerCounts {
    /// By a plain route on a common subnet.
    pub direct: usize,
    /// By VXLAN, in clear text.
    #[serde(default)]
    pub vxlan: usize,
    /// Reached through the tunnel; idle peers count as reached.
    pub wireguard: usize,
    /// Nothing gets there.
    pub unreachable: usize,
    /// Unreachable peers that are down: nodes without a liveness record in etcd.
    #[serde(default)]
    pub offline: usize,
}

impl PeerCounts {
    /// Counts a peer on this path; `online`: whether it shows a sign of life, where that is known.
    pub fn count(&mut self, path: Path, online: Option<bool>) {
        *match path {
            Path::By(PathKind::HostGw) => &mut self.direct,
            Path::By(PathKind::Vxlan) => &mut self.vxlan,
            Path::By(PathKind::Wireguard) => &mut self.wireguard,
            Path::Unreachable => &mut self.unreachable,
        } += 1;
        self.offline += usize::from(path == Path::Unreachable && online == Some(false));
    }
}

/// Policies on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// The etcd revision whose policies are in force; 0: none yet, and nothing reaches a pod.
    pub revision: i64,
    /// `enforce` or `audit`.
    pub mode: String,
    /// Pods known.
    pub pods: usize,
    /// Policies in force.
    pub policies: usize,
    /// Packets at the tunnel's end by verdict, without zeros.
    pub verdicts: Vec<DropCount>,
}

/// `GET /v1/policy/explain?src=SRC&dst=DST&service=PROTO/PORT`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explained {
    /// Whether both ends allow it.
    pub allowed: bool,
    /// The source's end.
    pub egress: ExplainedEnd,
    /// The destination's end.
    pub ingress: ExplainedEnd,
    /// Invalid objects of `--offline`, and their effect.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// The verdict of one end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedEnd {
    /// The end: a pod, a node or an address.
    pub end: String,
    /// Whether it allows it.
    pub allowed: bool,
    /// The policy that decided.
    pub policy: Option<String>,
    /// Its rule that decided, counted from 0.
    pub rule: Option<u16>,
    /// The name of that rule.
    #[serde(default)]
    pub rule_name: Option<String>,
    /// Whether no rule matched and the pod is isolated.
    #[serde(default)]
    pub isolated: bool,
    /// The rule that came nearest to allowing it.
    pub nearest_miss: Option<String>,
    /// All policies that have a say here.
    pub selecting: Vec<String>,
    /// All of it in a sentence.
    pub text: String,
}

/// An element of `GET /v1/policies`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// Its key in etcd, without the prefix.
    pub key: String,
    /// The Kubernetes cluster that it is of; empty: a flat key's, for the pods of all clusters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// `valid`, or the effect of an unreadable value: `isolates`, `isolatesNamespace`.
    pub state: String,
    /// The directions that it speaks of: `ingress`, `egress`.
    pub directions: Vec<String>,
    /// Number of rules of both directions.
    pub rules: usize,
}

/// `GET /v1/policies/NAMESPACE/NAME`, or with the name of a ClusterNetworkPolicy
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownPolicy {
    /// As in the list of all.
    #[serde(flatten)]
    pub policy: Policy,
    /// The policy as parsed, in lines: with defaults, each rule with its number.
    pub understood: String,
}

impl Explained {
    /// Explains a flow at both ends by `classifier`.
    #[must_use]
    pub fn of(classifier: &Classifier, flow: &Flow, problems: Vec<String>) -> Self {
        Self::of_ends(classifier.explain_connection(flow), problems)
    }

    /// From the explanations at source and destination.
    #[must_use]
    pub fn of_ends(ends: [Explanation; 2], problems: Vec<String>) -> Self {
        let [egress, ingress] = ends.map(ExplainedEnd::from);
        Self { allowed: egress.allowed && ingress.allowed, egress, ingress, problems }
    }

    /// The answer in lines.
    #[must_use]
    pub fn text(&self) -> String {
        let mut lines = vec![if self.allowed { "allowed" } else { "denied" }.to_owned()];
        lines.extend([&self.egress, &self.ingress].map(|end| format!("  {}", end.text)));
        lines.extend(self.problems.iter().map(|problem| format!("problem: {problem}")));
        lines.join("\n") + "\n"
    }
}

impl From<Explanation> for ExplainedEnd {
    fn from(explanation: Explanation) -> Self {
        Self {
            text: explanation.to_string(),
            end: explanation.end,
            allowed: explanation.verdict.allowed,
            policy: explanation.policy.map(|name| name.to_string()),
            rule: explanation.rule,
            rule_name: explanation.rule_name,
            isolated: matches!(explanation.verdict.cause, Cause::Isolated { .. }),
            nearest_miss: explanation.nearest.map(|miss| miss.to_string()),
            selecting: explanation.selecting.iter().map(ToString::to_string).collect(),
        }
    }
}

/// `POST /v1/etcd/accept`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EtcdAccepted {
    /// Keys whose records are no longer in force.
    pub withdrawn: usize,
    /// Keys that have another value in force now, or one for the first time.
    pub changed: usize,
}

/// The connection to etcd.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Etcd {
    /// Whether a member answers now.
    pub connected: bool,
    /// The member spoken to, or last spoken to.
    pub endpoint: Option<String>,
    /// Seconds since etcd last answered; `None`: never since the start.
    pub age: Option<f64>,
    /// The newest revision that this node has seen. [`Status::revision`] is behind it while nothing of the mesh
    /// changes.
    #[serde(default)]
    pub revision: i64,
}

/// The daemon's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DaemonState {
    /// The mesh is not known yet.
    Starting,
    /// There is a valid config; this node has no subnet yet.
    Joining,
    /// The node has a subnet and forwards.
    Running,
    /// The node forwards, and reports problems.
    Degraded,
    /// `removed/ID` is in etcd.
    Removed,
    /// Another daemon runs with this node's identity: this one forwards nothing.
    Cloned,
}

/// A problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedProblem {
    /// Stable, in snake case.
    pub code: String,
    /// The key of etcd that it is about, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The cause.
    pub cause: String,
    /// The remedy.
    pub remedy: String,
}

impl From<&mesh::problem::Problem> for ReportedProblem {
    fn from(problem: &mesh::problem::Problem) -> Self {
        Self {
            code: problem.code.to_string(),
            key: problem.key.clone(),
            cause: problem.to_string(),
            remedy: problem.remedy.clone(),
        }
    }
}

/// Packets dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropCount {
    /// Stable, in snake case.
    pub reason: String,
    /// How many.
    pub packets: u64,
}

/// How packets reach a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// By a path of this kind; its word is the kind's.
    By(PathKind),
    /// Not at all: `unreachable`.
    Unreachable,
}

impl Path {
    /// Every path, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        PathKind::ALL.into_iter().map(Self::By).chain([Self::Unreachable])
    }

    /// Its stable word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::By(kind) => kind.backend().word,
            Self::Unreachable => "unreachable",
        }
    }
}

impl From<Option<PathKind>> for Path {
    fn from(kind: Option<PathKind>) -> Self {
        kind.map_or(Self::Unreachable, Self::By)
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

impl Serialize for Path {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

impl<'de> Deserialize<'de> for Path {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::all()
            .find(|path| path.word() == text)
            .ok_or_else(|| D::Error::custom(format!("no path is called {text}")))
    }
}

/// An element of `GET /v1/peers`: another node, or an external peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its identity; the name again for an external peer.
    pub id: String,
    /// Its site.
    pub site: Option<String>,
    /// Its prefixes.
    pub subnets: Vec<IpNet>,
    /// Its own addresses in the mesh; of an external peer those prefixes that are a single address.
    #[serde(default)]
    pub overlay: Vec<IpAddr>,
    /// Whether it is an external peer.
    #[serde(default)]
    pub outside: bool,
    /// Whether it shows a sign of life in etcd; `None` for peers that never do: outside ones, and Flannel's.
    #[serde(default)]
    pub online: Option<bool>,
    /// How packets reach it: by the family that fares worse, when the two differ.
    pub path: Path,
    /// Why that path and not a better one; empty when there is nothing to say.
    pub reason: String,
    /// The remedy if the peer is unreachable; else empty.
    #[serde(default)]
    pub remedy: String,
    /// The key that its tunnel goes by; `None` without a tunnel.
    #[serde(default)]
    pub public_key: Option<String>,
    /// Where its tunnel is.
    pub endpoint: Option<SocketAddr>,
    /// Unix time in seconds of the last handshake.
    pub latest_handshake: Option<u64>,
    /// Bytes received from it through the tunnel.
    pub rx: u64,
    /// Bytes sent to it through the tunnel.
    pub tx: u64,
    /// Largest inner packet that its tunnel carries now.
    pub mtu: Option<u16>,
}

impl Route {
    /// The fallback route of a network, for packets without a better route.
    #[must_use]
    pub const fn nowhere(dst: IpNet) -> Self {
        Self {
            dst,
            path: Path::Unreachable,
            peer: String::new(),
            reason: String::new(),
            remedy: String::new(),
            via: None,
            dev: None,
            mtu: None,
            src: None,
        }
    }
}

/// An element of `GET /v1/routes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// How packets to it leave.
    pub path: Path,
    /// The owner of the prefix; empty for a fallback route.
    pub peer: String,
    /// Why nothing gets to that peer; empty where packets do.
    #[serde(default)]
    pub reason: String,
    /// The remedy.
    #[serde(default)]
    pub remedy: String,
    /// Next hop of a direct path.
    pub via: Option<IpAddr>,
    /// Interface.
    pub dev: Option<String>,
    /// Largest packet.
    pub mtu: Option<u16>,
    /// Source address of this node's own packets.
    pub src: Option<IpAddr>,
}
