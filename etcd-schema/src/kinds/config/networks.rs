//! The networks of `config`: Flannel's fields for one network of each family, or `Networks` for those of several
//! clusters.
//!
//! `Networks` replaces Flannel's fields, so that a daemon that does not know it misses `Network` and refuses the whole
//! value. If it took `Network` alone, it would route packets to the other networks outside the mesh. For the same
//! reason an entry may have no unknown field.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use crate::{
    Allocate, Cluster, NetworkConfig, Pool, SubnetKey,
    document::describe,
    fields::{Fields, Writer},
    pool::{V4, V4_ENTRY, V6, V6_ENTRY, read_pool, write_pool},
    violation::Report,
};

/// Field of `config` with the networks of several clusters.
pub(crate) const NETWORKS: &str = "Networks";

/// Field of `config`, and of an entry of `Networks`: the allocator of subnets.
pub(super) const ALLOCATE: &str = "Allocate";

/// Fields of an entry.
const ENTRY: &[&str] = &["cidr", "cluster", "SubnetLen", "SubnetMin", "SubnetMax", ALLOCATE];

/// Most entries.
const MAX_NETWORKS: usize = 64;

/// Networks, at most one of each family and at least one, that nodes of one cluster draw subnets from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClusterNetworks {
    /// IPv4
    pub ipv4: Option<Pool<Ipv4Net>>,
    /// IPv6
    pub ipv6: Option<Pool<Ipv6Net>>,
    /// The allocator of nodes' subnets.
    pub allocate: Allocate,
}

impl ClusterNetworks {
    /// The networks, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> + use<> {
        let v4 = self.ipv4.map(|pool| IpNet::V4(pool.network));
        let v6 = self.ipv6.map(|pool| IpNet::V6(pool.network));
        v4.into_iter().chain(v6)
    }

    /// Whether each prefix of `subnet` lies in the network of its family.
    #[must_use]
    pub fn contain(&self, subnet: &SubnetKey) -> bool {
        let v4 = subnet.v4.is_none_or(|net| self.ipv4.is_some_and(|pool| pool.network.contains(&net)));
        let v6 = subnet.v6.is_none_or(|net| self.ipv6.is_some_and(|pool| pool.network.contains(&net)));
        v4 && v6
    }

    /// Whether a node may have `subnet`: each of its prefixes lies in the network of its family and has the length that
    /// is dealt out there; a podCIDR may have any.
    #[must_use]
    pub fn cover(&self, subnet: &SubnetKey) -> bool {
        if self.allocate == Allocate::Kubernetes {
            return self.contain(subnet);
        }
        let v4 = subnet.v4.is_none_or(|net| self.ipv4.is_some_and(|pool| pool.subnet_len == net.prefix_len()));
        let v6 = subnet.v6.is_none_or(|net| self.ipv6.is_some_and(|pool| pool.subnet_len == net.prefix_len()));
        v4 && v6 && self.contain(subnet)
    }

    /// Whether nodes wait for the podCIDRs of their Nodes.
    #[must_use]
    pub fn is_allocated_by_kubernetes(&self) -> bool {
        self.allocate == Allocate::Kubernetes
    }

    /// Whether `subnet` has the families of these networks.
    #[must_use]
    pub const fn has_families_of(&self, subnet: &SubnetKey) -> bool {
        self.ipv4.is_some() == subnet.v4.is_some() && self.ipv6.is_some() == subnet.v6.is_some()
    }

    /// For people.
    pub(super) fn summary(&self) -> String {
        if self.is_allocated_by_kubernetes() {
            let networks: Vec<String> = self.networks().map(|network| network.to_string()).collect();
            return format!("network {}, allocated by Kubernetes", networks.join(" and "));
        }
        let v4 = self.ipv4.map(|p| format!("{} with {} subnets of /{}", p.network, p.subnet_count(), p.subnet_len));
        let v6 = self.ipv6.map(|p| format!("{} with {} subnets of /{}", p.network, p.subnet_count(), p.subnet_len));
        format!("network {}", v4.into_iter().chain(v6).collect::<Vec<_>>().join(" and "))
    }
}

impl NetworkConfig {
    /// The networks of `cluster`, if it has any.
    #[must_use]
    pub fn of_cluster(&self, cluster: &Cluster) -> Option<&ClusterNetworks> {
        self.clusters.get(cluster)
    }

    /// Every network of the mesh, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> + '_ {
        let of_family = |v4: bool| {
            let all = self.clusters.values().flat_map(ClusterNetworks::networks);
            all.filter(move |network| network.addr().is_ipv4() == v4)
        };
        of_family(true).chain(of_family(false))
    }

    /// The cluster in whose networks all prefixes of `subnet` lie.
    #[must_use]
    pub fn cluster_around(&self, subnet: &SubnetKey) -> Option<&Cluster> {
        self.clusters.iter().find(|(_, networks)| networks.contain(subnet)).map(|(cluster, _)| cluster)
    }

    /// Whether some cluster's networks [cover](ClusterNetworks::cover) `subnet`.
    #[must_use]
    pub fn covers(&self, subnet: &SubnetKey) -> bool {
        self.clusters.values().any(|networks| networks.cover(subnet))
    }

    /// Whether Flannel's fields say it all: there are no networks but those of no cluster.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.clusters.keys().all(Cluster::is_flat)
    }
}

/// The networks that `fields` describe; `None` when something was noted.
pub(super) fn read_networks(fields: &mut Fields, report: &mut Report) -> Option<BTreeMap<Cluster, ClusterNetworks>> {
    if fields.has(NETWORKS) {
        return read_entries(fields, report);
    }
    let enabled4 = fields.boolean(report, "EnableIPv4").unwrap_or(true);
    let enabled6 = fields.boolean(report, "EnableIPv6").unwrap_or(false);
    if !enabled4 && !enabled6 {
        report.add("EnableIPv4", "false, and EnableIPv6 is not true", "enable at least one address family");
    }
    let allocate = read_allocate(fields, report);
    let ipv4 = enabled4.then(|| read_pool(&V4, fields, report));
    let ipv6 = enabled6.then(|| read_pool(&V6, fields, report));
    // A family is missing here only when its fields were noted as wrong.
    if matches!(ipv4, Some(None)) || matches!(ipv6, Some(None)) {
        return None;
    }
    let networks =
        ClusterNetworks { ipv4: ipv4.flatten(), ipv6: ipv6.flatten(), allocate: allocate.unwrap_or_default() };
    Some([(Cluster::default(), networks)].into())
}

fn read_allocate(fields: &mut Fields, report: &mut Report) -> Option<Allocate> {
    fields.parsed(report, ALLOCATE, |text| Allocate::named(text).ok_or_else(|| "must be mesh or kubernetes".into()))
}

fn read_entries(fields: &mut Fields, report: &mut Report) -> Option<BTreeMap<Cluster, ClusterNetworks>> {
    // Flannel's fields, which stand for an entry of no cluster for each family.
    for name in super::KNOWN.iter().take_while(|name| **name != NETWORKS) {
        if let Some(value) = fields.take(name) {
            report.add(
                name,
                describe(&value),
                "must not stand beside Networks: make that network an entry of Networks, {\"cidr\": \
                 \"10.244.0.0/16\", \"SubnetLen\": 24} (daemons that do not know Networks then refuse the whole value)",
            );
        }
    }
    let mut clusters = BTreeMap::<Cluster, ClusterNetworks>::new();
    // Each network with its entry and whose it is.
    let mut known: Vec<(IpNet, String, Cluster)> = Vec::new();
    let entries = fields.objects(report, NETWORKS, MAX_NETWORKS);
    if entries.is_empty() {
        report.add(NETWORKS, "without a network", "write at least one, such as [{\"cidr\": \"10.244.0.0/16\"}]");
    }
    for mut entry in entries {
        let path = entry.path("");
        let cluster = entry.parsed_unless_empty(report, "cluster", Cluster::read).unwrap_or_default();
        let v6 = entry.peek("cidr").is_some_and(|text| text.contains(':'));
        let allocate = read_allocate(&mut entry, report).unwrap_or_default();
        let mut read = ClusterNetworks { allocate, ..ClusterNetworks::default() };
        if v6 {
            read.ipv6 = read_pool(&V6_ENTRY, &mut entry, report);
        } else {
            read.ipv4 = read_pool(&V4_ENTRY, &mut entry, report);
        }
        for name in entry.rest(report, ENTRY).keys() {
            report.add(format!("{path}.{name}"), "an unknown field", format!("write only {}", ENTRY.join(", ")));
        }
        let Some(network) = read.networks().next() else { continue };
        let overlaps = |known: &&(IpNet, String, Cluster)| known.0.contains(&network) || network.contains(&known.0);
        if let Some((other, at, whose)) = known.iter().find(overlaps) {
            report.add(
                format!("{path}.cidr"),
                format!("\"{network}\""),
                format!("must not overlap {other} of {} ({at}): give each cluster addresses of its own", named(whose)),
            );
            continue;
        }
        let entry = clusters
            .entry(cluster.clone())
            .or_insert_with(|| ClusterNetworks { allocate, ..ClusterNetworks::default() });
        if entry.allocate != allocate {
            report.add(
                format!("{path}.{ALLOCATE}"),
                format!("\"{}\"", allocate.as_str()),
                format!("must be \"{}\", as in the other entry of {}", entry.allocate.as_str(), named(&cluster)),
            );
        }
        let twice = if v6 { entry.ipv6.is_some() } else { entry.ipv4.is_some() };
        if twice {
            report.add(
                format!("{path}.cidr"),
                format!("\"{network}\""),
                format!("must be the only IPv{} network of {}", if v6 { 6 } else { 4 }, named(&cluster)),
            );
        }
        entry.ipv4 = entry.ipv4.or(read.ipv4);
        entry.ipv6 = entry.ipv6.or(read.ipv6);
        known.push((network, path, cluster));
    }
    (!clusters.is_empty()).then_some(clusters)
}

/// The networks' cluster in messages.
pub(crate) fn named(cluster: &Cluster) -> String {
    if cluster.is_flat() { "no cluster".to_owned() } else { format!("cluster {cluster}") }
}

/// Writes the networks as `config` has them.
pub(super) fn write_networks(config: &NetworkConfig, out: &mut Writer) {
    if !config.is_flat() {
        out.put(NETWORKS, entries(&config.clusters));
        return;
    }
    let networks = config.clusters.values().next().copied().unwrap_or_default();
    out.put(ALLOCATE, networks.allocate.as_str());
    out.put("EnableIPv4", networks.ipv4.is_some());
    if let Some(pool) = &networks.ipv4 {
        write_pool(pool, &V4, out);
    }
    out.put("EnableIPv6", networks.ipv6.is_some());
    if let Some(pool) = &networks.ipv6 {
        write_pool(pool, &V6, out);
    }
}

fn entries(clusters: &BTreeMap<Cluster, ClusterNetworks>) -> Vec<Value> {
    let mut entries = Vec::new();
    for (cluster, networks) in clusters {
        let name = (!cluster.is_flat()).then(|| cluster.as_str());
        let mut add = |write: &dyn Fn(&mut Writer)| {
            let mut out = Writer::default();
            write(&mut out);
            out.maybe("cluster", name)
                .maybe(ALLOCATE, networks.is_allocated_by_kubernetes().then_some(networks.allocate.as_str()));
            entries.push(Value::Object(out.finish(&serde_json::Map::new())));
        };
        if let Some(pool) = &networks.ipv4 {
            add(&|out| write_pool(pool, &V4_ENTRY, out));
        }
        if let Some(pool) = &networks.ipv6 {
            add(&|out| write_pool(pool, &V6_ENTRY, out));
        }
    }
    entries
}

#[cfg(test)]
mod tests;
