//! Conflicts of one record with others: pure functions over values that are valid on their own.
//!
//! A config or an external peer that covered an underlay address would route the mesh's own outer packets, or etcd's,
//! into the mesh. Check for conflicts before any route changes.

use ipnet::IpNet;

use crate::{
    Cluster, ClusterNetworks, NetworkConfig, NodeRecord, OutsidePeer, PeerName, Pool, SubnetKey, Violations,
    kinds::{NETWORKS, named},
    violation::Report,
};

/// The effect of a changed field of `config`, by its JSON path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigChange {
    /// Fields that take effect while the daemon runs.
    pub live: Vec<&'static str>,
    /// Fields that take effect on a node with its next subnet: the one it has stays as it is.
    pub with_next_subnet: Vec<&'static str>,
}

impl ConfigChange {
    /// Whether nothing changes that is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.live.is_empty() && self.with_next_subnet.is_empty()
    }
}

/// Judges an external peer against the network configuration: neither its `allowedIPs` nor its endpoint may lie in the
/// cluster networks, nor its endpoint in its own `allowedIPs`.
///
/// # Errors
/// Each such prefix and address.
pub fn peer_conflicts(peer: &OutsidePeer, config: &NetworkConfig) -> Result<(), Violations> {
    let mut report = Report::default();
    for Named { network, text, .. } in networks(config) {
        for (i, prefix) in peer.allowed_ips.iter().enumerate() {
            if overlap(prefix, &network) {
                report.add(
                    format!("allowedIPs[{i}]"),
                    format!("\"{prefix}\""),
                    format!("must not overlap {text} of config"),
                );
            }
        }
        if let Some(endpoint) = peer.endpoint
            && network.contains(&endpoint.ip())
        {
            report.add(
                "endpoint",
                format!("\"{endpoint}\""),
                format!("must not be inside {text} of config: write an address outside the mesh"),
            );
        }
    }
    if let Some(endpoint) = peer.endpoint
        && let Some(prefix) = peer.allowed_ips.iter().find(|p| p.contains(&endpoint.ip()))
    {
        report.add(
            "endpoint",
            format!("\"{endpoint}\""),
            format!("must not be inside {prefix} of its own allowedIPs: the tunnel would carry its own packets"),
        );
    }
    report.finish(Some(()))
}

/// Judges a node's record against the network configuration: an endpoint or interface address in the cluster networks
/// would have the tunnel run through itself.
///
/// # Errors
/// Each such address.
pub fn node_conflicts(node: &NodeRecord, config: &NetworkConfig) -> Result<(), Violations> {
    let mut report = Report::default();
    for Named { network, text, .. } in networks(config) {
        let expected = || format!("must not be inside {text} of config");
        for (i, endpoint) in node.endpoints.iter().enumerate() {
            if network.contains(&endpoint.ip()) {
                report.add(format!("endpoints[{i}]"), format!("\"{endpoint}\""), expected());
            }
        }
        for (i, vtep) in node.vteps.iter().enumerate() {
            if network.contains(&vtep.address) {
                report.add(format!("vteps[{i}].address"), format!("\"{}\"", vtep.address), expected());
            }
        }
        for (i, address) in node.addresses.iter().enumerate() {
            if network.contains(&address.addr()) {
                report.add(format!("addresses[{i}]"), format!("\"{address}\""), expected());
            }
        }
    }
    report.finish(Some(()))
}

/// Finds conflicts of a configuration with other records: its networks may cover no prefix or endpoint of an accepted
/// external peer.
///
/// # Errors
/// Each thing that a network covers.
pub fn config_conflicts<'a>(
    config: &NetworkConfig,
    peers: impl IntoIterator<Item = (&'a PeerName, &'a OutsidePeer)>,
) -> Result<(), Violations> {
    let mut report = Report::default();
    let networks: Vec<Named> = networks(config).collect();
    let mut note = |Named { field, network, .. }: &Named, what: String| {
        report.add(field, format!("\"{network}\""), format!("must not cover {what}"));
    };
    for (peer_name, peer) in peers {
        for network in &networks {
            for prefix in &peer.allowed_ips {
                if overlap(prefix, &network.network) {
                    note(network, format!("{prefix} of external peer {peer_name}"));
                }
            }
            if let Some(endpoint) = peer.endpoint
                && network.network.contains(&endpoint.ip())
            {
                note(network, format!("the endpoint {endpoint} of external peer {peer_name}"));
            }
        }
    }
    report.finish(Some(()))
}

/// The changes from `old` to `new` while the subnets in `leased` are in use.
///
/// # Errors
/// When `new` would leave a subnet outside that `old` has inside: not in the family's network any more, or not of its
/// subnet length. Then all of `old` stays.
pub fn config_change(
    old: &NetworkConfig,
    new: &NetworkConfig,
    leased: &[SubnetKey],
) -> Result<ConfigChange, Violations> {
    let mut report = Report::default();
    let mut change = ConfigChange::default();
    left_outside(old, new, leased, &mut report);
    if old.is_flat() && new.is_flat() {
        let none = ClusterNetworks::default();
        let of = |config: &NetworkConfig| *config.of_cluster(&Cluster::default()).unwrap_or(&none);
        let (old, new) = (of(old), of(new));
        family_change(&V4_FIELDS, (old.ipv4, new.ipv4), &mut change);
        family_change(&V6_FIELDS, (old.ipv6, new.ipv6), &mut change);
        if old.allocate != new.allocate {
            change.live.push("Allocate");
        }
    } else if old.clusters != new.clusters {
        change.live.push(NETWORKS);
    }
    for (field, differs) in [
        // Whether a backend is supported is for the daemon to judge.
        ("Backend.Type", old.backend.kind != new.backend.kind),
        ("Backend.DirectRouting", old.backend.direct_routing != new.backend.direct_routing),
        ("Backend.MTU", old.backend.mtu != new.backend.mtu),
        ("Backend.PersistentKeepalive", old.backend.persistent_keepalive != new.backend.persistent_keepalive),
        ("LeaseTTL", old.lease_ttl != new.lease_ttl),
        ("policyMode", old.policy_mode != new.policy_mode),
    ] {
        if differs {
            change.live.push(field);
        }
    }
    report.finish(Some(change))
}

/// How one family's fields are called.
struct FamilyFields {
    ipv4: bool,
    enable: &'static str,
    network: &'static str,
    subnet_len: &'static str,
    min: &'static str,
    max: &'static str,
}

const V4_FIELDS: FamilyFields = FamilyFields {
    ipv4: true,
    enable: "EnableIPv4",
    network: "Network",
    subnet_len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
};

const V6_FIELDS: FamilyFields = FamilyFields {
    ipv4: false,
    enable: "EnableIPv6",
    network: "IPv6Network",
    subnet_len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
};

/// Subnets that `old` has inside and `new` has not.
fn left_outside(old: &NetworkConfig, new: &NetworkConfig, leased: &[SubnetKey], report: &mut Report) {
    for names in [&V4_FIELDS, &V6_FIELDS] {
        let of_family = |config| networks(config).filter(|named| named.is_of(names));
        let here: Vec<Named> = of_family(new).collect();
        let prefixes = leased.iter().filter_map(|key| match names.ipv4 {
            true => key.v4.map(IpNet::V4),
            false => key.v6.map(IpNet::V6),
        });
        let around = |nets: &[Named], subnet: &IpNet| nets.iter().find(|net| net.network.contains(subnet)).cloned();
        let before: Vec<Named> = of_family(old).collect();
        for subnet in prefixes {
            // Subnets that the old configuration does not have inside are no reason against the new one.
            let Some(_) = around(&before, &subnet).filter(|was| was.deals(&subnet)) else {
                continue;
            };
            match around(&here, &subnet) {
                Some(is) if is.deals(&subnet) => {}
                Some(is) => report.add(
                    if new.is_flat() { names.subnet_len } else { NETWORKS },
                    is.subnet_len.map_or_else(String::new, |len| len.to_string()),
                    format!("must stay {} while the subnet {subnet} is leased", subnet.prefix_len()),
                ),
                None if here.is_empty() => {
                    report.add(
                        if new.is_flat() { names.enable } else { NETWORKS },
                        if new.is_flat() { "false" } else { "without a network of this family" },
                        format!("the subnet {subnet} is leased: wait until no subnet of this family is leased"),
                    );
                    break;
                }
                None => {
                    let all: Vec<String> = here.iter().map(|named| named.network.to_string()).collect();
                    report.add(
                        here[0].field,
                        format!("\"{}\"", all.join(", ")),
                        format!("must cover the leased subnet {subnet}; to move the network, remove its nodes first"),
                    );
                }
            }
        }
    }
}

fn family_change<N: Copy + PartialEq>(
    names: &FamilyFields,
    (old, new): (Option<Pool<N>>, Option<Pool<N>>),
    change: &mut ConfigChange,
) {
    match (old, new) {
        (None, None) => {}
        // A lease of both families has a key of its own: no node exchanges the one that it has for it.
        (None, Some(_)) => change.with_next_subnet.push(names.enable),
        (Some(_), None) => change.live.push(names.enable),
        (Some(old), Some(new)) => {
            for (field, differs) in [
                (names.network, old.network != new.network),
                (names.subnet_len, old.subnet_len != new.subnet_len),
                (names.min, old.min != new.min),
                (names.max, old.max != new.max),
            ] {
                if differs {
                    change.live.push(field);
                }
            }
        }
    }
}

/// A network with its field.
#[derive(Clone)]
struct Named {
    field: &'static str,
    network: IpNet,
    /// Length of its subnets; `None`: any, if Kubernetes allocates.
    subnet_len: Option<u8>,
    /// The network as `config` has it, for people.
    text: String,
}

impl Named {
    /// Whether a node may have this prefix, which lies in the network.
    fn deals(&self, subnet: &IpNet) -> bool {
        self.subnet_len.is_none_or(|len| len == subnet.prefix_len())
    }

    const fn is_of(&self, family: &FamilyFields) -> bool {
        matches!(self.network, IpNet::V4(_)) == family.ipv4
    }
}

/// The networks with their fields, IPv4 first.
fn networks(config: &NetworkConfig) -> impl Iterator<Item = Named> {
    let mut all = Vec::new();
    for (cluster, networks) in &config.clusters {
        let any = networks.is_allocated_by_kubernetes();
        let v4 = networks.ipv4.map(|pool| (V4_FIELDS.network, IpNet::V4(pool.network), pool.subnet_len));
        let v6 = networks.ipv6.map(|pool| (V6_FIELDS.network, IpNet::V6(pool.network), pool.subnet_len));
        all.extend(v4.into_iter().chain(v6).map(|(field, network, len)| {
            let subnet_len = (!any).then_some(len);
            if config.is_flat() {
                Named { field, network, subnet_len, text: format!("{field} {network}") }
            } else {
                let text = format!("the network {network} of {}", named(cluster));
                Named { field: NETWORKS, network, subnet_len, text }
            }
        }));
    }
    all.sort_by_key(|named| named.network.addr().is_ipv6());
    all.into_iter()
}

/// Whether one of two prefixes holds the other; never across families.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests;
