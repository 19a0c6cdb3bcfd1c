//! `nodes/ID`: a node's identity and its endpoints.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{KindInfo, KindRules, RecordClass};
use crate::{
    Cluster, MacAddress, NodeId, NodeName, PublicKey, SiteName, Violations,
    address::{endpoint, interface_address, unicast},
    document::{DocumentLimits, read},
    fields::{Expected, Fields, NamesOf, Writer},
    summary::list,
    violation::Report,
};

/// Value of `nodes/ID`:
/// `{"name","site","cluster","publicKey","nextPublicKey","listenPort","endpoints":["IP:PORT"],"addresses":["IP/LEN"],
/// "vteps":[{"address","mac"}],"version"}`.
#[derive(Clone, PartialEq)]
pub struct NodeRecord {
    /// Unique in the mesh.
    pub name: NodeName,
    /// Nodes of one site may be direct to each other; without one, never.
    pub site: Option<SiteName>,
    /// The cluster whose networks it draws its subnet from. For policies, Node objects decide which cluster it is in.
    pub cluster: Cluster,
    /// The WireGuard key in use.
    pub public_key: PublicKey,
    /// The key that follows it while a rotation is under way.
    pub next_public_key: Option<PublicKey>,
    /// UDP port of the tunnel; probes use the next one.
    pub listen_port: u16,
    /// Where the tunnel may be reached, best first; empty: this node only calls out.
    pub endpoints: Vec<SocketAddr>,
    /// Addresses of the underlay interface with their prefix length (host bits kept).
    pub addresses: Vec<IpNet>,
    /// Its ends of VXLAN tunnels, at most one of each family; without any it speaks no VXLAN.
    pub vteps: Vec<Vtep>,
    /// Version of the daemon.
    pub version: String,
    /// Fields of other versions, kept over a rewrite.
    pub extra: Map<String, Value>,
}

/// A VXLAN tunnel endpoint (RFC 7348): what carries the inner packets of its address's family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vtep {
    /// `address`: where outer packets go to, and come from.
    pub address: IpAddr,
    /// `mac`: the destination of inner frames.
    pub mac: MacAddress,
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "nodes/", is_flat: true, rules: KindRules::mesh(RecordClass::Node), fields: KNOWN };

const KNOWN: &[&str] = &[
    "name",
    "site",
    "cluster",
    "publicKey",
    "nextPublicKey",
    "listenPort",
    "endpoints",
    "addresses",
    "vteps",
    "version",
];

/// Longest `version`, in bytes.
const MAX_VERSION: usize = 64;

impl NodeRecord {
    /// Most entries of `endpoints`.
    pub const MAX_ENDPOINTS: usize = 16;
    /// Most entries of `addresses`.
    pub const MAX_ADDRESSES: usize = 16;
    /// Most entries of `vteps`: one a family.
    const MAX_VTEPS: usize = 2;

    /// The record that `value` holds, in JSON or YAML.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();
        let name = fields.required(&mut report, "name", "write the node's name", NodeName::read);
        let site = fields.parsed(&mut report, "site", SiteName::read);
        let cluster = fields.parsed_unless_empty(&mut report, "cluster", Cluster::read).unwrap_or_default();
        let public_key =
            fields.required(&mut report, "publicKey", "write the node's WireGuard public key", PublicKey::read);
        let next_public_key = fields.parsed(&mut report, "nextPublicKey", PublicKey::read);
        if let (Some(key), Some(next)) = (public_key, next_public_key)
            && key == next
        {
            report.add(
                "nextPublicKey",
                format!("\"{next}\""),
                "must differ from publicKey; leave it out while no key rotation is in progress",
            );
        }
        if !fields.has("listenPort") {
            report.add("listenPort", "missing", "write the UDP port of the node's tunnel");
        }
        let listen_port = fields.integer(&mut report, "listenPort", 1..=u16::MAX - 1, " (probes use the next port)");
        let endpoints = fields.texts(&mut report, "endpoints", Self::MAX_ENDPOINTS, endpoint).unwrap_or_default();
        let addresses =
            fields.texts(&mut report, "addresses", Self::MAX_ADDRESSES, interface_address).unwrap_or_default();
        let vteps = read_vteps(&mut fields, &mut report);
        let version = fields.parsed(&mut report, "version", version).unwrap_or_default();
        let extra = fields.rest(&mut report, KNOWN);
        let record = (|| {
            Some(Self {
                name: name?,
                site,
                cluster,
                public_key: public_key?,
                next_public_key,
                listen_port: listen_port?,
                endpoints,
                addresses,
                vteps,
                version,
                extra,
            })
        })();
        report.finish(record)
    }

    /// The value as JSON, fields without a value left out.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.put("name", self.name.as_str())
            .maybe("site", self.site.as_ref().map(SiteName::as_str))
            .maybe("cluster", Some(self.cluster.as_str()).filter(|name| !name.is_empty()))
            .put("publicKey", self.public_key.to_string())
            .maybe("nextPublicKey", self.next_public_key.map(|k| k.to_string()))
            .put("listenPort", self.listen_port)
            .texts("endpoints", &self.endpoints)
            .texts("addresses", &self.addresses)
            .maybe(
                "vteps",
                Some(self.vteps.iter().copied().map(Vtep::to_value).collect::<Vec<_>>()).filter(|all| !all.is_empty()),
            )
            .put("version", self.version.as_str());
        out.json(&self.extra)
    }

    /// The keys that may speak for this node: the one in use and the one to come.
    pub fn public_keys(&self) -> impl Iterator<Item = PublicKey> + use<> {
        std::iter::once(self.public_key).chain(self.next_public_key)
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self, id: &NodeId) -> String {
        let site = self.site.as_ref().map_or_else(String::new, |site| format!(", site {site}"));
        let reached = if self.endpoints.is_empty() {
            "initiates handshakes only".to_owned()
        } else {
            format!("endpoints {}", list(&self.endpoints))
        };
        let rotation = if self.next_public_key.is_some() { ", key rotation in progress" } else { "" };
        let cluster = match self.cluster.is_flat() {
            true => String::new(),
            false => format!(", cluster {}", self.cluster),
        };
        format!("node {id}, name {}{site}{cluster}, key {}{rotation}, {reached}", self.name, self.public_key)
    }
}

impl fmt::Debug for NodeRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeRecord")
            .field("name", &self.name)
            .field("site", &self.site)
            .field("cluster", &self.cluster)
            .field("public_key", &self.public_key)
            .field("next_public_key", &self.next_public_key)
            .field("listen_port", &self.listen_port)
            .field("endpoints", &self.endpoints)
            .field("addresses", &self.addresses)
            .field("vteps", &self.vteps)
            .field("version", &self.version)
            .field("extra", &NamesOf(&self.extra))
            .finish()
    }
}

impl Vtep {
    fn to_value(self) -> Value {
        json!({"address": self.address.to_string(), "mac": self.mac.to_string()})
    }
}

fn read_vteps(fields: &mut Fields, report: &mut Report) -> Vec<Vtep> {
    let mut vteps: Vec<Vtep> = Vec::new();
    for mut fields in fields.objects(report, "vteps", NodeRecord::MAX_VTEPS) {
        let address = fields.required(report, "address", "write where its VXLAN packets go to", unicast);
        let mac = fields.required(report, "mac", "write its VXLAN device's hardware address", MacAddress::read);
        let (Some(address), Some(mac)) = (address, mac) else { continue };
        if vteps.iter().any(|other| other.address.is_ipv4() == address.is_ipv4()) {
            let rule = "must be of another family than the one before: a node has one of each";
            report.add(fields.path("address"), address.to_string(), rule);
        }
        vteps.push(Vtep { address, mac });
    }
    vteps
}

fn version(text: &str) -> Result<String, Expected> {
    if text.len() <= MAX_VERSION && text.chars().all(|c| !c.is_control()) {
        Ok(text.to_owned())
    } else {
        Err(format!("must be at most {MAX_VERSION} printable characters").into())
    }
}
