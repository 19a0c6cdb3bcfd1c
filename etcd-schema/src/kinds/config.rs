//! `config`: Flannel's net-conf.json, with additional keys allowed.

mod backend;
mod networks;

use std::{collections::BTreeMap, fmt, time::Duration};

use serde_json::{Map, Value};

use self::{
    backend::read_backend,
    networks::{ALLOCATE, read_networks, write_networks},
};
pub use self::{
    backend::{BackendConfig, BackendKind, VxlanOptions},
    networks::ClusterNetworks,
};
pub(crate) use self::{
    backend::{KNOWN_BACKEND, WITHOUT_MEANING},
    networks::{NETWORKS, named},
};
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
    /// Fields we do not know, kept over a rewrite; Flannel's options without meaning are an object under `Backend`, and those of a
    /// family that is not enabled stay here as they were written.
    pub extra: Map<String, Value>,
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
        let mtu = self.backend.mtu.map_or_else(|| "MTU measured".to_owned(), |mtu| format!("MTU {mtu}"));
        format!(
            "{}; {}; {mtu}; lease TTL {} s",
            networks.collect::<Vec<_>>().join("; "),
            self.backend.summary(),
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

#[cfg(test)]
mod tests;
