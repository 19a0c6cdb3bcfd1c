//! Conflicts of one record with others: pure functions over values that are valid on their own.
//!
//! A config or an external peer that covered an underlay address would route the mesh's own outer packets, or etcd's,
//! into the mesh. Check for conflicts before any route changes.

use ipnet::IpNet;

use crate::{NetworkConfig, NodeRecord, OutsidePeer, PeerName, Pool, SubnetKey, Violations, violation::Report};

/// What a new `config` changes, by the JSON path of the field.
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

/// Judges an outside peer against the network configuration: neither its `allowedIPs` nor its endpoint may lie in the
/// cluster networks, nor its endpoint in its own `allowedIPs`.
///
/// # Errors
/// Each such prefix and address.
pub fn peer_conflicts(peer: &OutsidePeer, config: &NetworkConfig) -> Result<(), Violations> {
    let mut report = Report::default();
    for (name, network) in networks(config) {
        for (i, prefix) in peer.allowed_ips.iter().enumerate() {
            if overlap(prefix, &network) {
                report.add(
                    format!("allowedIPs[{i}]"),
                    format!("\"{prefix}\""),
                    format!("must not overlap {name} {network} of config"),
                );
            }
        }
        if let Some(endpoint) = peer.endpoint
            && network.contains(&endpoint.ip())
        {
            report.add(
                "endpoint",
                format!("\"{endpoint}\""),
                format!("must not be inside {name} {network} of config: write an address outside the mesh"),
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
    for (name, network) in networks(config) {
        let expected = || format!("must not be inside {name} {network} of config");
        for (i, endpoint) in node.endpoints.iter().enumerate() {
            if network.contains(&endpoint.ip()) {
                report.add(format!("endpoints[{i}]"), format!("\"{endpoint}\""), expected());
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

/// Judges a configuration against what is there: its networks may cover no prefix or endpoint of an accepted outside
/// peer.
///
/// # Errors
/// Each thing that a network covers.
pub fn config_conflicts<'a>(
    config: &NetworkConfig,
    peers: impl IntoIterator<Item = (&'a PeerName, &'a OutsidePeer)>,
) -> Result<(), Violations> {
    let mut report = Report::default();
    let networks: Vec<(&str, IpNet)> = networks(config).collect();
    let mut note = |(name, network): &(&str, IpNet), what: String| {
        report.add(name, format!("\"{network}\""), format!("must not cover {what}"));
    };
    for (peer_name, peer) in peers {
        for network in &networks {
            for prefix in &peer.allowed_ips {
                if overlap(prefix, &network.1) {
                    note(network, format!("{prefix} of external peer {peer_name}"));
                }
            }
            if let Some(endpoint) = peer.endpoint
                && network.1.contains(&endpoint.ip())
            {
                note(network, format!("the endpoint {endpoint} of external peer {peer_name}"));
            }
        }
    }
    report.finish(Some(()))
}

/// What changes from `old` to `new` while the subnets in `leased` are in use.
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
    family_change(
        &V4_FIELDS,
        (old.ipv4.as_ref(), new.ipv4.as_ref()),
        leased.iter().filter_map(|key| key.v4),
        &mut change,
        &mut report,
    );
    family_change(
        &V6_FIELDS,
        (old.ipv6.as_ref(), new.ipv6.as_ref()),
        leased.iter().filter_map(|key| key.v6),
        &mut change,
        &mut report,
    );
    for (field, differs) in [
        // Whether a kind can be had at all is for whoever would run it to judge.
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
    enable: &'static str,
    network: &'static str,
    subnet_len: &'static str,
    min: &'static str,
    max: &'static str,
}

const V4_FIELDS: FamilyFields = FamilyFields {
    enable: "EnableIPv4",
    network: "Network",
    subnet_len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
};

const V6_FIELDS: FamilyFields = FamilyFields {
    enable: "EnableIPv6",
    network: "IPv6Network",
    subnet_len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
};

fn family_change<N: Copy + PartialEq + Into<IpNet>>(
    names: &FamilyFields,
    (old, new): (Option<&Pool<N>>, Option<&Pool<N>>),
    leased: impl Iterator<Item = N>,
    change: &mut ConfigChange,
    report: &mut Report,
) {
    let Some(old) = old else {
        if new.is_some() {
            // A lease of both families has a key of its own: no node exchanges the one that it has for it.
            change.with_next_subnet.push(names.enable);
        }
        return;
    };
    // Subnets that the old configuration does not have inside are no reason against the new one.
    let leased = leased
        .map(Into::into)
        .filter(|subnet: &IpNet| subnet.prefix_len() == old.subnet_len && old.network.into().contains(subnet));
    let Some(new) = new else {
        let mut used = leased.peekable();
        if let Some(subnet) = used.peek() {
            report.add(
                names.enable,
                "false",
                format!("the subnet {subnet} is leased: wait until no subnet of this family is leased"),
            );
        }
        change.live.push(names.enable);
        return;
    };
    let network: IpNet = new.network.into();
    for subnet in leased {
        if !network.contains(&subnet) {
            report.add(
                names.network,
                format!("\"{network}\""),
                format!("must cover the leased subnet {subnet}; to move the network, remove its nodes first"),
            );
        } else if subnet.prefix_len() != new.subnet_len {
            report.add(
                names.subnet_len,
                new.subnet_len.to_string(),
                format!("must stay {} while the subnet {subnet} is leased", old.subnet_len),
            );
        }
    }
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

/// The cluster networks with their fields' names.
fn networks(config: &NetworkConfig) -> impl Iterator<Item = (&'static str, IpNet)> + use<> {
    config.networks().map(|network| match network {
        IpNet::V4(_) => (V4_FIELDS.network, network),
        IpNet::V6(_) => (V6_FIELDS.network, network),
    })
}

/// Whether one of two prefixes holds the other; never across families.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests;
