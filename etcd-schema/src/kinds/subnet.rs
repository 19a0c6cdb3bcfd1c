//! `subnets/…`: Flannel's lease JSON with `"Node": "ID"`.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde_json::{Map, Value, json};

use super::{KindInfo, KindRules, RecordClass};
use crate::{
    BackendKind, Cluster, KubernetesName, MacAddress, NodeId, PublicKey, SubnetKey, Violations,
    address::{unicast_v4, unicast_v6},
    document::{DocumentLimits, read},
    fields::{Expected, Fields, NamesOf, Writer},
    summary::list,
    violation::Report,
};

/// A block that a node gave up: nodes draw it when no other is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freed {
    /// The cluster whose sync gave it up, and deletes the key after some time.
    pub cluster: Cluster,
    /// When, in seconds since 1970.
    pub at: u64,
}

/// Value of a key below `subnets/`.
///
/// With `node` it is that node's; without, that of the Flannel host at `public_ip` or `public_ipv6`; with neither, no
/// node can use it.
#[derive(Clone, PartialEq)]
pub struct SubnetLease {
    /// `PublicIP`
    pub public_ip: Option<Ipv4Addr>,
    /// `PublicIPv6`
    pub public_ipv6: Option<Ipv6Addr>,
    /// `BackendType`
    pub backend_type: Option<String>,
    /// `BackendData`, as flannel's readers expect it.
    pub backend_data: Option<Value>,
    /// `BackendV6Data`
    pub backend_v6_data: Option<Value>,
    /// `Node`: whose subnet it is; keys and endpoints then come from `nodes/ID` only.
    pub node: Option<NodeId>,
    /// `KubernetesNode`, `CLUSTER/NAME`: the block is a podCIDR of this Node, reserved by its cluster's sync.
    pub kubernetes_node: Option<(Cluster, KubernetesName)>,
    /// `Freed`: it is no one's.
    pub freed: Option<Freed>,
    /// Fields we do not know, kept over a rewrite.
    pub extra: Map<String, Value>,
}

/// A host's `BackendData` and `BackendV6Data` of Flannel's wireguard backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireguardData {
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `Port`: UDP port at `PublicIP` or `PublicIPv6`.
    pub port: u16,
}

/// A host's `BackendData` or `BackendV6Data` of Flannel's vxlan backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanData {
    /// `VNI`
    pub vni: u32,
    /// `VtepMAC`
    pub mac: MacAddress,
}

/// What a lease says to Flannel's readers: `BackendType`, `BackendData` and `BackendV6Data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseData {
    /// Key and port, of both families.
    Wireguard(WireguardData),
    /// The ends of VXLAN tunnels, IPv4 first.
    Vxlan([Option<VxlanData>; 2]),
    /// A type without data.
    Bare(BackendKind),
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "subnets/", is_flat: true, rules: KindRules::mesh(RecordClass::Node), fields: KNOWN };

const KNOWN: &[&str] =
    &["PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "Node", "KubernetesNode", "Freed"];

const KNOWN_FREED: &[&str] = &["cluster", "at"];

/// Longest `BackendType`, in bytes.
const MAX_BACKEND_TYPE: usize = 64;

impl SubnetLease {
    /// The lease of a mesh node, with the fields for Flannel's readers.
    ///
    /// `BackendData` is filled in for each family that has a public address.
    #[must_use]
    pub fn for_node(node: NodeId, public_ip: Option<Ipv4Addr>, public_ipv6: Option<Ipv6Addr>, data: LeaseData) -> Self {
        let (backend, [v4, v6]) = match data {
            LeaseData::Wireguard(data) => (BackendKind::Wireguard, [Some(data.to_value()), Some(data.to_value())]),
            LeaseData::Vxlan(data) => (BackendKind::Vxlan, data.map(|data| data.map(VxlanData::to_value))),
            LeaseData::Bare(kind) => (kind, [None, None]),
        };
        Self {
            public_ip,
            public_ipv6,
            backend_type: Some(backend.as_str().to_owned()),
            backend_data: v4.filter(|_| public_ip.is_some()),
            backend_v6_data: v6.filter(|_| public_ipv6.is_some()),
            node: Some(node),
            ..Self::none()
        }
    }

    fn none() -> Self {
        Self {
            public_ip: None,
            public_ipv6: None,
            backend_type: None,
            backend_data: None,
            backend_v6_data: None,
            node: None,
            kubernetes_node: None,
            freed: None,
            extra: Map::new(),
        }
    }

    /// The reservation of a podCIDR for the node that is the Node `name` of `cluster`.
    #[must_use]
    pub fn reserved(node: NodeId, cluster: &Cluster, name: &KubernetesName) -> Self {
        Self { node: Some(node), kubernetes_node: Some((cluster.clone(), name.clone())), ..Self::none() }
    }

    /// A block that was given up.
    #[must_use]
    pub fn freed(freed: Freed) -> Self {
        Self { freed: Some(freed), ..Self::none() }
    }

    /// The lease that `value` holds, in JSON or YAML. `0.0.0.0` and `::`, which flannel writes for a family that it
    /// does not have, count as absent.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        let public_ip = fields
            .parsed(
                &mut report,
                "PublicIP",
                |text| {
                    if text == "0.0.0.0" { Ok(None) } else { unicast_v4(text).map(Some) }
                },
            )
            .flatten();
        let public_ipv6 = fields
            .parsed(&mut report, "PublicIPv6", |text| if text == "::" { Ok(None) } else { unicast_v6(text).map(Some) })
            .flatten();
        let backend_type = fields.parsed(&mut report, "BackendType", backend_type);
        let backend_data = fields.take("BackendData");
        let backend_v6_data = fields.take("BackendV6Data");
        let node = fields.parsed(&mut report, "Node", NodeId::read);
        let kubernetes_node = fields.parsed(&mut report, "KubernetesNode", kubernetes_node);
        let freed = read_freed(&mut fields, &mut report);
        if freed.is_some() && node.is_some() {
            report.add("Freed", "beside Node", "must stand without Node: a block that is given up is no node's");
        }
        let extra = fields.rest(&mut report, KNOWN);
        let lease = Self {
            public_ip,
            public_ipv6,
            backend_type,
            backend_data,
            backend_v6_data,
            node,
            kubernetes_node,
            freed,
            extra,
        };
        // BackendData decides something only where no node record does.
        if lease.node.is_none() {
            for (name, data) in [("BackendData", &lease.backend_data), ("BackendV6Data", &lease.backend_v6_data)] {
                // `null` is Flannel's word for a family that the host does not have.
                let Some(data) = data else { continue };
                if lease.is_of(BackendKind::Wireguard) {
                    let _ = WireguardData::read(name, data, &mut report);
                } else if lease.is_of(BackendKind::Vxlan) {
                    let _ = VxlanData::read(name, data, &mut report);
                }
            }
        }
        report.finish(Some(lease))
    }

    /// The value as JSON, fields without a value left out, but for `PublicIPv6`, which flannel writes as null.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.maybe("PublicIP", self.public_ip.map(|a| a.to_string()))
            .put("PublicIPv6", self.public_ipv6.map(|a| a.to_string()))
            .maybe("BackendType", self.backend_type.as_deref())
            .maybe("BackendData", self.backend_data.clone())
            .maybe("BackendV6Data", self.backend_v6_data.clone())
            .maybe("Node", self.node.as_ref().map(NodeId::as_str))
            .maybe("KubernetesNode", self.kubernetes_node.as_ref().map(|(cluster, name)| format!("{cluster}/{name}")))
            .maybe(
                "Freed",
                self.freed.as_ref().map(|freed| json!({"cluster": freed.cluster.as_str(), "at": freed.at})),
            );
        out.json(&self.extra)
    }

    /// `BackendData` of a host of Flannel's wireguard backend: key and port at `PublicIP`.
    ///
    /// `None` where `Node` is set, since then `nodes/ID` decides, and for other backends.
    #[must_use]
    pub fn wireguard_v4(&self) -> Option<WireguardData> {
        self.wireguard(self.backend_data.as_ref())
    }

    /// `BackendV6Data` of such a host: key and port at `PublicIPv6`.
    #[must_use]
    pub fn wireguard_v6(&self) -> Option<WireguardData> {
        self.wireguard(self.backend_v6_data.as_ref())
    }

    fn wireguard(&self, data: Option<&Value>) -> Option<WireguardData> {
        if self.node.is_some() || !self.is_of(BackendKind::Wireguard) {
            return None;
        }
        WireguardData::read("", data?, &mut Report::default())
    }

    /// `BackendData` and `BackendV6Data` of a host of Flannel's vxlan backend, IPv4 first; `None` each where `Node` is set,
    /// and for other backends.
    #[must_use]
    pub fn vxlan(&self) -> [Option<VxlanData>; 2] {
        if self.node.is_some() || !self.is_of(BackendKind::Vxlan) {
            return [None, None];
        }
        [&self.backend_data, &self.backend_v6_data]
            .map(|data| VxlanData::read("", data.as_ref()?, &mut Report::default()))
    }

    fn is_of(&self, kind: BackendKind) -> bool {
        self.backend_type.as_deref() == Some(kind.as_str())
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, subnet: &SubnetKey) -> String {
        let owner = match (&self.node, self.public_ip, self.public_ipv6) {
            _ if self.freed.is_some() => "given up, drawn when no other is left".to_owned(),
            (Some(node), ..) => match &self.kubernetes_node {
                Some((cluster, name)) => format!("for node {node}, podCIDR of Node {cluster}/{name}"),
                None => format!("for node {node}"),
            },
            (None, Some(address), _) => format!("for the host at {address}"),
            (None, None, Some(address)) => format!("for the host at {address}"),
            (None, None, None) => "reserved".to_owned(),
        };
        format!("subnet {} {owner}", list(subnet.prefixes()))
    }
}

impl fmt::Debug for SubnetLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubnetLease")
            .field("public_ip", &self.public_ip)
            .field("public_ipv6", &self.public_ipv6)
            .field("backend_type", &self.backend_type)
            .field("backend_data", &self.backend_data)
            .field("backend_v6_data", &self.backend_v6_data)
            .field("node", &self.node)
            .field("kubernetes_node", &self.kubernetes_node)
            .field("freed", &self.freed)
            .field("extra", &NamesOf(&self.extra))
            .finish()
    }
}

impl WireguardData {
    /// Flannel's default `ListenPort`, for hosts whose version does not publish one.
    pub(crate) const DEFAULT_PORT: u16 = 51820;

    /// As flannel's readers expect it in `BackendData` and `BackendV6Data`.
    #[must_use]
    pub fn to_value(self) -> Value {
        json!({"PublicKey": self.public_key.to_string(), "Port": self.port})
    }

    fn read(path: &str, data: &Value, report: &mut Report) -> Option<Self> {
        let Value::Object(map) = data else {
            report.add(path, crate::document::describe(data), "must be an object with PublicKey and Port");
            return None;
        };
        let mut fields = Fields::at(path.to_owned(), map.clone());
        let public_key = fields.required(report, "PublicKey", "write the host's WireGuard public key", PublicKey::read);
        let port = if fields.has("Port") {
            fields.integer(report, "Port", 1..=u16::MAX, "")
        } else {
            Some(Self::DEFAULT_PORT)
        };
        Some(Self { public_key: public_key?, port: port? })
    }
}

impl VxlanData {
    fn to_value(self) -> Value {
        json!({"VNI": self.vni, "VtepMAC": self.mac.to_string()})
    }

    fn read(path: &str, data: &Value, report: &mut Report) -> Option<Self> {
        let Value::Object(map) = data else {
            report.add(path, crate::document::describe(data), "must be an object with VNI and VtepMAC");
            return None;
        };
        let mut fields = Fields::at(path.to_owned(), map.clone());
        let mac = fields.required(report, "VtepMAC", "write the host's VXLAN hardware address", MacAddress::read);
        // Versions of Flannel before 0.13 publish none.
        let vni = if fields.has("VNI") { fields.integer(report, "VNI", 1..=0xff_ffff, "") } else { Some(1) };
        Some(Self { vni: vni?, mac: mac? })
    }
}

fn backend_type(text: &str) -> Result<String, Expected> {
    let plain = !text.is_empty() && text.len() <= MAX_BACKEND_TYPE && text.bytes().all(|b| b.is_ascii_graphic());
    if plain {
        Ok(text.to_owned())
    } else {
        Err(format!("must be a backend's name, 1 to {MAX_BACKEND_TYPE} characters").into())
    }
}

fn kubernetes_node(text: &str) -> Result<(Cluster, KubernetesName), Expected> {
    let (cluster, name) = text.split_once('/').ok_or("must be CLUSTER/NAME")?;
    Ok((Cluster::read(cluster)?, KubernetesName::read(name)?))
}

fn read_freed(fields: &mut Fields, report: &mut Report) -> Option<Freed> {
    let mut fields = fields.object(report, "Freed")?;
    let cluster = fields.required(report, "cluster", "write whose sync gave it up", Cluster::read);
    let at = fields.integer(report, "at", 0..=u64::MAX, " seconds since 1970").unwrap_or_default();
    fields.rest(report, KNOWN_FREED);
    Some(Freed { cluster: cluster?, at })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

    fn parse(value: &str) -> SubnetLease {
        SubnetLease::parse(value.as_bytes()).unwrap()
    }

    #[test]
    fn a_flannel_host_is_a_peer_by_its_backend_data() {
        let lease = parse(&format!(
            r#"{{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard",
                "BackendData":{{"PublicKey":"{KEY}"}},"BackendV6Data":{{"PublicKey":"{KEY}","Port":51821}}}}"#
        ));
        assert_eq!(lease.wireguard_v4().map(|d| (d.public_key.to_string(), d.port)), Some((KEY.into(), 51820)));
        assert_eq!(lease.wireguard_v6().map(|d| d.port), Some(51821));
    }

    #[test]
    fn backend_data_says_nothing_of_a_node() {
        let lease = parse(&format!(
            r#"{{"Node":"a1","BackendType":"wireguard","BackendData":{{"PublicKey":"{KEY}","Port":1}}}}"#
        ));
        assert_eq!((lease.wireguard_v4(), lease.wireguard_v6()), (None, None));
        // It is for Flannel's readers, so a wrong one does not take the subnet from the node.
        assert!(parse(r#"{"Node":"a1","BackendType":"wireguard","BackendData":7}"#).node.is_some());
    }

    #[test]
    fn a_flannel_host_is_a_vtep_by_its_backend_data() {
        let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",
            "BackendData":{"VNI":7,"VtepMAC":"c6:00:00:00:00:01"},"BackendV6Data":null}"#;
        let mac = "c6:00:00:00:00:01".parse().unwrap();
        assert_eq!(parse(value).vxlan(), [Some(VxlanData { vni: 7, mac }), None]);
        assert!(SubnetLease::parse(value.replace("c6:", "c7:").as_bytes()).is_err(), "a group's address");
        let node: NodeId = "a1".parse().unwrap();
        let data = LeaseData::Vxlan([Some(VxlanData { vni: 7, mac }), None]);
        let lease = SubnetLease::for_node(node, Some(Ipv4Addr::new(192, 0, 2, 1)), None, data);
        assert_eq!(lease.backend_data, Some(json!({"VNI": 7, "VtepMAC": "c6:00:00:00:00:01"})));
        assert_eq!(lease.vxlan(), [None, None], "a node's record decides");
    }

    #[test]
    fn other_backends_have_no_key() {
        let lease = parse(&format!(
            r#"{{"PublicIP":"192.0.2.1","BackendType":"host-gw","BackendData":{{"PublicKey":"{KEY}"}}}}"#
        ));
        assert_eq!(lease.wireguard_v4(), None);
    }

    #[test]
    fn flannel_reads_what_a_node_writes() {
        let data = WireguardData { public_key: KEY.parse().unwrap(), port: 51820 };
        let node: NodeId = "a1".parse().unwrap();
        let lease =
            SubnetLease::for_node(node.clone(), Some(Ipv4Addr::new(192, 0, 2, 1)), None, LeaseData::Wireguard(data));
        let written: Value = serde_json::from_slice(&lease.to_json()).unwrap();
        assert_eq!(
            written,
            json!({"PublicIP": "192.0.2.1", "PublicIPv6": null, "BackendType": "wireguard",
                "BackendData": {"PublicKey": KEY, "Port": 51820}, "Node": "a1"})
        );
        let direct = SubnetLease::for_node(node, None, None, LeaseData::Bare(BackendKind::HostGw));
        assert_eq!((direct.backend_data, direct.backend_v6_data), (None, None));
    }
}
