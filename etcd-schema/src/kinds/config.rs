//! `config`: Flannel's net-conf.json, with additional keys allowed.

mod networks;

use std::{collections::BTreeMap, fmt, num::NonZeroU16, time::Duration};

use serde_json::{Map, Value};

pub use self::networks::ClusterNetworks;
use self::networks::{ALLOCATE, read_networks, write_networks};
pub(crate) use self::networks::{NETWORKS, named};
use super::{KindInfo, KindRules, RecordClass};
use crate::{
    Cluster, Violations,
    document::{DocumentLimits, read},
    fields::{Fields, NamesOf, Writer},
    violation::Report,
};

/// Value of `config`.
#[derive(Clone, PartialEq)]
pub struct NetworkConfig {
    /// `Networks`, by cluster; or `Network`, `IPv6Network` and their fields, which belong to no cluster. At least one
    /// network, without overlaps.
    pub clusters: BTreeMap<Cluster, ClusterNetworks>,
    /// `Backend`
    pub backend: BackendConfig,
    /// `LeaseTTL` in seconds: how long a node that is away keeps its subnet (default 7 days).
    pub lease_ttl: Duration,
    /// `policyMode`: whether denied packets are dropped.
    pub policy_mode: PolicyMode,
    /// Fields we do not know, kept over a rewrite; those of `Backend` are an object under `Backend`, and those of a
    /// family that is not enabled stay here as they were written.
    pub extra: Map<String, Value>,
}

/// How packets reach other nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    /// `Type`
    pub kind: BackendKind,
    /// `DirectRouting` (default true with wireguard): plain routes to nodes on the own subnet.
    pub direct_routing: bool,
    /// `MTU` of pods and of the TUN device; `None`: min(interface, 1500) - 80.
    pub mtu: Option<NonZeroU16>,
    /// `PersistentKeepalive` in seconds; `None`: 0, none is sent.
    pub persistent_keepalive: Option<NonZeroU16>,
}

/// `Backend.Type`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    /// WireGuard between sites (the default).
    Wireguard,
    /// Plain routes only.
    HostGw,
    /// Kernel VXLAN.
    Vxlan,
    /// Plain UDP.
    Udp,
}

/// `Allocate`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Allocate {
    /// A node draws a free one (the default).
    #[default]
    Mesh,
    /// Subnets are the podCIDRs of the Node, which its `meshd-sync` reserves.
    Kubernetes,
}

/// `policyMode`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PolicyMode {
    /// Denied packets are dropped (the default).
    #[default]
    Enforce,
    /// Denied packets pass and are reported.
    Audit,
}

pub(super) const KIND: KindInfo =
    KindInfo { place: "config", is_flat: true, rules: KindRules::mesh(RecordClass::Setting), fields: KNOWN };

const KNOWN: &[&str] = &[
    "EnableIPv4",
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "EnableIPv6",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    ALLOCATE,
    NETWORKS,
    "Backend",
    "LeaseTTL",
    "policyMode",
];

pub(crate) const KNOWN_BACKEND: &[&str] = &["Type", "DirectRouting", "MTU", "PersistentKeepalive", FLANNEL_KEEPALIVE];

/// Flannel's name for `PersistentKeepalive`; read, not written.
const FLANNEL_KEEPALIVE: &str = "PersistentKeepaliveInterval";

impl NetworkConfig {
    /// `LeaseTTL` where none is given: 7 days.
    pub(crate) const DEFAULT_LEASE_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
    /// Shortest `LeaseTTL`.
    pub(crate) const MIN_LEASE_TTL: Duration = Duration::from_secs(5);
    /// Longest `LeaseTTL`: a year.
    pub(crate) const MAX_LEASE_TTL: Duration = Duration::from_secs(365 * 24 * 3600);

    /// The configuration that `value` holds, in JSON or YAML. (Flannel itself reads JSON only.)
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(value: &[u8]) -> Result<Self, Violations> {
        let mut fields = Fields::root(read(value, DocumentLimits::RECORD)?);
        let mut report = Report::default();

        let clusters = read_networks(&mut fields, &mut report);
        let ipv6 = clusters.iter().flatten().any(|(_, networks)| networks.ipv6.is_some());
        let (backend, backend_extra) = read_backend(&mut fields, &mut report, ipv6);
        let lease_ttl = fields
            .integer(&mut report, "LeaseTTL", Self::MIN_LEASE_TTL.as_secs()..=Self::MAX_LEASE_TTL.as_secs(), " seconds")
            .map_or(Self::DEFAULT_LEASE_TTL, Duration::from_secs);
        let policy_mode = fields
            .parsed(&mut report, "policyMode", |text| {
                PolicyMode::named(text).ok_or_else(|| "must be enforce or audit".into())
            })
            .unwrap_or_default();
        let mut extra = fields.rest(&mut report, KNOWN);
        if !backend_extra.is_empty() {
            extra.insert("Backend".into(), Value::Object(backend_extra));
        }

        report.finish(clusters.map(|clusters| Self { clusters, backend, lease_ttl, policy_mode, extra }))
    }

    /// The value as JSON, every default written out.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = Writer::default();
        write_networks(self, &mut out);
        let unknown = Map::new();
        let backend_extra = match self.extra.get("Backend") {
            Some(Value::Object(map)) => map,
            _ => &unknown,
        };
        out.put("Backend", self.backend.to_object(backend_extra));
        out.put("LeaseTTL", self.lease_ttl.as_secs());
        out.put("policyMode", self.policy_mode.as_str());
        out.json(&self.extra)
    }

    /// A one-line summary for operators.
    pub(super) fn summary(&self) -> String {
        let networks = self.clusters.iter().map(|(cluster, networks)| match cluster.is_flat() {
            true => networks.summary(),
            false => format!("cluster {cluster}: {}", networks.summary()),
        });
        let direct = if self.backend.direct_routing { ", direct routing within a site" } else { "" };
        let mtu = self.backend.mtu.map_or_else(|| "MTU measured".to_owned(), |mtu| format!("MTU {mtu}"));
        format!(
            "{}; {}{direct}; {mtu}; lease TTL {} s",
            networks.collect::<Vec<_>>().join("; "),
            self.backend.kind,
            self.lease_ttl.as_secs()
        )
    }
}

impl fmt::Debug for NetworkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkConfig")
            .field("clusters", &self.clusters)
            .field("backend", &self.backend)
            .field("lease_ttl", &self.lease_ttl)
            .field("policy_mode", &self.policy_mode)
            .field("extra", &NamesOf(&self.extra))
            .finish()
    }
}

impl Allocate {
    fn named(text: &str) -> Option<Self> {
        [Self::Mesh, Self::Kubernetes].into_iter().find(|allocate| allocate.as_str() == text)
    }

    /// As it is written in `Allocate`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Kubernetes => "kubernetes",
        }
    }
}

impl PolicyMode {
    fn named(text: &str) -> Option<Self> {
        [Self::Enforce, Self::Audit].into_iter().find(|mode| mode.as_str() == text)
    }

    /// As it is written in `policyMode`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Audit => "audit",
        }
    }
}

impl Default for BackendConfig {
    /// The default if `Backend` is absent: wireguard with direct routing.
    fn default() -> Self {
        Self { kind: BackendKind::Wireguard, direct_routing: true, mtu: None, persistent_keepalive: None }
    }
}

impl BackendConfig {
    /// Smallest `MTU`: IPv6 needs links of 1280 (RFC 8200); IPv4 alone only 576, which every host must reassemble.
    #[must_use]
    pub const fn least_mtu(ipv6: bool) -> u16 {
        if ipv6 { 1280 } else { 576 }
    }

    fn to_object(&self, extra: &Map<String, Value>) -> Map<String, Value> {
        let mut out = Writer::default();
        out.put("Type", self.kind.as_str())
            .put("DirectRouting", self.direct_routing)
            .put("MTU", self.mtu.map_or(0, NonZeroU16::get))
            .put("PersistentKeepalive", self.persistent_keepalive.map_or(0, NonZeroU16::get));
        out.finish(extra)
    }
}

impl BackendKind {
    /// The name as in `Backend.Type` and in flannel's `BackendType`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
        }
    }

    fn named(text: &str) -> Option<Self> {
        [Self::Wireguard, Self::HostGw, Self::Vxlan, Self::Udp].into_iter().find(|kind| kind.as_str() == text)
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn read_backend(fields: &mut Fields, report: &mut Report, ipv6: bool) -> (BackendConfig, Map<String, Value>) {
    let Some(mut fields) = fields.object(report, "Backend") else {
        return (BackendConfig::default(), Map::new());
    };
    let kind = fields
        .parsed(report, "Type", |text| {
            BackendKind::named(text).ok_or_else(|| "must be wireguard, host-gw, vxlan or udp".into())
        })
        .unwrap_or(BackendKind::Wireguard);
    let direct_routing = fields.boolean(report, "DirectRouting").unwrap_or(kind == BackendKind::Wireguard);
    let mtu = read_mtu(&mut fields, report, ipv6);
    let range = 0..=u16::MAX;
    let own = fields.integer(report, "PersistentKeepalive", range.clone(), " seconds; 0 sends none");
    let flannel = fields.integer(report, FLANNEL_KEEPALIVE, range, " seconds; 0 sends none");
    if let (Some(own), Some(flannel)) = (own, flannel)
        && own != flannel
    {
        report.add(
            fields.path(FLANNEL_KEEPALIVE),
            flannel.to_string(),
            format!("PersistentKeepalive is {own}: keep one of the two"),
        );
    }
    let backend =
        BackendConfig { kind, direct_routing, mtu, persistent_keepalive: own.or(flannel).and_then(NonZeroU16::new) };
    (backend, fields.rest(report, KNOWN_BACKEND))
}

fn read_mtu(fields: &mut Fields, report: &mut Report, ipv6: bool) -> Option<NonZeroU16> {
    let least = BackendConfig::least_mtu(ipv6);
    let mtu = fields.integer(report, "MTU", 0..=u16::MAX, &format!(": 0 (measured), or {least} and more"))?;
    if (1..least).contains(&mtu) {
        let why = if ipv6 { " (IPv6 needs it)" } else { "" };
        report.add(fields.path("MTU"), mtu.to_string(), format!("must be 0 (measured) or {least} to 65535{why}"));
    }
    NonZeroU16::new(mtu)
}

#[cfg(test)]
mod tests;
