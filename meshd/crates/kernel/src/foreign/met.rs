//! Effects of other programs' rules on mesh packets: masqueraded packets of pods, probes that are dropped or lose their
//! mark. Each is found by following a typical mesh packet through the rules.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh::kernel_state::{Desired, RouteVia};
use netfilter::{ListedRuleset, ProbePacket, Taken};
use text::quote;

use super::super::{Options, firewall, policy_table};

/// The effect of another program's rule on mesh packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleEffect {
    /// Gives pods' packets another source.
    Translates,
    /// Drops probes.
    Drops,
    /// Gives probes another mark, so that neither their route nor the guard knows them.
    Remarks,
}

/// The suffix of the names of legacy iptables tables.
pub(super) const LEGACY: &str = " (iptables-legacy)";

/// A foreign chain that takes packets of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Met {
    /// The effect.
    pub effect: RuleEffect,
    /// Family and name of the table.
    pub table: String,
    /// The chain whose rule does it.
    pub chain: String,
    /// A packet that it takes: source and destination.
    pub packet: (IpAddr, IpAddr),
    /// The remedy.
    pub remedy: String,
}

/// Follows the packets of `desired` through the rules.
pub(crate) fn met(options: &Options, desired: &Desired, rules: &ListedRuleset) -> Vec<Met> {
    let policies = policy_table(&options.table_name);
    let ours = [options.table_name.as_str(), policies.as_str()];
    let mut found: Vec<Met> = Vec::new();
    let mut add = |effect: RuleEffect, taken: Vec<Taken>, packet: &ProbePacket| {
        for taken in taken {
            if found
                .iter()
                .any(|known| known.effect == effect && (&known.table, &known.chain) == (&taken.table, &taken.at))
            {
                continue;
            }
            let remedy = if effect == RuleEffect::Translates {
                keep_source(desired, &taken, packet.source.is_ipv4())
            } else {
                let port = desired.firewall.probe_port.unwrap_or_default();
                insert(&taken, &format!("-p udp --dport {port}"), &format!("udp dport {port}"))
            };
            let ends = (packet.source, packet.destination);
            found.push(Met { effect, table: taken.table, chain: taken.at, packet: ends, remedy });
        }
    };
    for packet in pods(options, desired) {
        add(RuleEffect::Translates, rules.translating(&packet, &ours), &packet);
    }
    for (probe, hooks) in probes(options, desired) {
        for hook in hooks {
            add(RuleEffect::Drops, rules.dropping(hook, &probe, &ours), &probe);
            if probe.mark != 0 {
                add(RuleEffect::Remarks, rules.remarking(hook, firewall::GUARD_PRIORITY.into(), &probe, &ours), &probe);
            }
        }
    }
    found
}

/// The first packet of a flow from a pod of this node to a pod by each kind of path, for each family.
fn pods(options: &Options, desired: &Desired) -> Vec<ProbePacket> {
    let pod = |net: &IpNet, nth: usize| net.hosts().nth(nth).unwrap_or_else(|| net.addr());
    let mut packets = Vec::new();
    for ipv4 in [true, false] {
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == ipv4;
        let Some(own) =
            desired.firewall.own.iter().filter(of_family).find(|net| net.prefix_len() < net.max_prefix_len())
        else {
            continue;
        };
        let routes = || desired.routes.values().filter(move |route| route.dst.addr().is_ipv4() == ipv4);
        let tunnel = routes().find(|route| route.via == RouteVia::Tunnel).map(|route| (route, options.tun.to_string()));
        let direct = routes().find_map(|route| match &route.via {
            RouteVia::Neighbour { dev, .. } => Some((route, dev.to_string())),
            RouteVia::Vtep { .. } | RouteVia::Tunnel | RouteVia::Unreachable => None,
        });
        let vxlan = routes().find_map(|route| match &route.via {
            RouteVia::Vtep { dev, .. } => Some((route, dev.to_string())),
            RouteVia::Neighbour { .. } | RouteVia::Tunnel | RouteVia::Unreachable => None,
        });
        let ways = tunnel.into_iter().chain(direct).chain(vxlan).map(|(route, dev)| (pod(&route.dst, 1), Some(dev)));
        // And to another pod of this node, by whatever interface that has.
        for (destination, leaves_by) in ways.chain([(pod(own, 2), None)]) {
            packets.push(ProbePacket {
                source: pod(own, 1),
                destination,
                local: [false, false],
                protocol: "tcp",
                port: None,
                comes_by: None,
                leaves_by,
                mark: 0,
                tracked: true,
            });
        }
    }
    packets
}

/// A probe to a peer of each family, and one from it, each with the hooks that it passes.
fn probes(options: &Options, desired: &Desired) -> Vec<(ProbePacket, &'static [&'static str])> {
    let mut packets = Vec::new();
    for own in &desired.overlay {
        let peer = desired.probes.iter().find(|probe| probe.overlay.is_ipv4() == own.is_ipv4());
        let (Some(peer), Some(port)) = (peer, desired.firewall.probe_port) else { continue };
        let dev = peer.dev.to_string();
        let out = ProbePacket {
            source: *own,
            destination: peer.overlay,
            local: [true, false],
            protocol: "udp",
            port: Some(port),
            comes_by: None,
            leaves_by: Some(dev.clone()),
            mark: options.probe_mark,
            tracked: false,
        };
        let back = ProbePacket {
            source: peer.overlay,
            destination: *own,
            local: [false, true],
            comes_by: Some(dev),
            leaves_by: None,
            mark: 0,
            ..out.clone()
        };
        packets.push((out, &["output", "postrouting"][..]));
        packets.push((back, &["input"][..]));
    }
    packets
}

/// The commands that let packets between pods keep their source.
fn keep_source(desired: &Desired, taken: &Taken, ipv4: bool) -> String {
    let networks: Vec<&IpNet> = desired.floor.networks.iter().filter(|net| net.addr().is_ipv4() == ipv4).collect();
    let ip = if ipv4 { "ip" } else { "ip6" };
    let commands = networks
        .iter()
        .map(|net| insert(taken, &format!("-s {net} -d {net}"), &format!("{ip} saddr {net} {ip} daddr {net}")));
    format!("{} # established connections keep their translated source", commands.collect::<Vec<_>>().join(" && "))
}

/// The command that accepts packets at the top of the base chain, by the tool that owns its table.
fn insert(taken: &Taken, by_iptables: &str, by_nft: &str) -> String {
    let Taken { table: of, chain, .. } = taken;
    let chain = quote(chain);
    let Some((family, name)) = of.split_once(' ') else { return format!("nft list table {}", quote(of)) };
    let (table, legacy) = name.strip_suffix(LEGACY).map_or((name, ""), |table| (table, "-legacy"));
    let tool = match family {
        "ip" => "iptables",
        "ip6" => "ip6tables",
        _ => "",
    };
    if !tool.is_empty() && ["filter", "nat", "mangle", "raw"].contains(&table) {
        format!("{tool}{legacy} -t {table} -I {chain} {by_iptables} -j ACCEPT")
    } else {
        format!("nft insert rule {family} {} {chain} {by_nft} accept", quote(name))
    }
}
