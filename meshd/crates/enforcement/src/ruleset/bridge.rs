//! Rules for pods on a bridge of the node.
//!
//! ```text
//! anti_spoof      prerouting   from the host's end of a pod's interface: only the pod's own hardware address, and its
//!                              own IPv4, IPv6 and ARP sender addresses; link-local and unspecified ones for
//!                              neighbour discovery, MLD and DHCP; multicasts and broadcasts bypass conntrack
//! bridge_forward  forward      a pod's port gets frames for its own hardware address and for groups; an isolated pod
//!                              gets packets for its own addresses, and ARP, neighbour discovery, MLD and DHCP. From
//!                              link-local addresses, only the latter reach another port. If br_netfilter hides
//!                              bridged packets from the forward chain, nothing passes to or from a pod
//! bridge_output   output       frames of the node: a pod's port gets those for its own hardware address and for groups
//! ```
//!
//! Policies judge a packet by its destination address, but a bridge forwards a frame by its hardware address. For an
//! isolated pod, both must be its own. Otherwise a packet to a group, an unused address or a neighbour would reach it
//! in a frame for it alone.
//!
//! All chains precede conntrack, which reassembles fragments of any port.
//!
//! The rules are stateless, because not every kernel has bridge conntrack. The `inet` table judges policies by address,
//! since it does not see ports. This is sound because no pod can use a neighbour's address. Packets of pods without a
//! bridge never reach these chains.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv6Addr},
};

use cni::link::mac_text;
use policy::{engine::Side, nft::Ruleset};

use super::{
    anti_spoof::{DETECTION, DHCP4, DHCP6, LINK_LOCAL, MLD, NEIGHBOURS, OTHERS_LINK_LOCAL, ROUTERS, report},
    frame::{Frame, PodPort},
};

/// Kernel settings that have bridged packets go through netfilter's hooks of IPv4 and IPv6.
const CALLS: [&str; 2] =
    ["/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"];

/// Whether bridged packets traverse nftables' `inet` chains, in the network namespace of this thread.
pub(crate) fn switched_judged() -> bool {
    CALLS.iter().all(|path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "1"))
}

/// A frame to all, or to a group.
const TO_GROUP: &str = "ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00";

/// A frame for another station, which a bridge sends to every port while it does not know where that is, or to this one
/// when it has learned wrong.
const OTHERS_STATION: &str = "oifname @with_mac ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 \
     oifname . ether daddr != @stations counter drop";

/// Packets that reach an isolated pod regardless of policies, and pass between link-local addresses. DHCP servers are
/// hosts on the bridge, never pods: a pod could configure its neighbours.
const INFRASTRUCTURE: [&str; 5] = [
    "ether type arp return",
    "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert, \
     nd-redirect } return",
    "ip6 hoplimit 1 icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } \
     return",
    "iifname != @attached ip6 nexthdr udp udp sport 547 udp dport 546 return",
    "iifname != @attached ip protocol udp udp sport 67 udp dport 68 return",
];

/// Ports of isolated pods: packets for other addresses are no flow that policies could judge.
pub(crate) fn isolated(frame: &Frame, ruleset: &Ruleset) -> BTreeSet<String> {
    let is_isolated = |address: &IpAddr| {
        frame.displaced.contains(address)
            || ruleset.may_refuse(Side::Ingress, *address).unwrap_or_else(|| {
                frame.unknown_closed[Side::Ingress as usize] && frame.own.iter().any(|net| net.contains(address))
            })
    };
    let isolated = frame.ports.iter().filter(|(_, port)| port.addresses.iter().any(is_isolated));
    isolated.map(|(name, _)| name.clone()).collect()
}

/// The commands that change the table `bridge NAME` from `old` to `new`; `None`: its content is unknown.
pub(super) fn change(name: &str, old: Option<&Frame>, new: &Frame) -> String {
    let table = format!("bridge {name}");
    let mut out = String::new();
    if old.is_none() {
        out.push_str(&made_anew(&table));
    }
    // Writing to a String cannot fail.
    if old.is_none_or(|old| closed(old) != closed(new) || report(old) != report(new)) {
        let _ = writeln!(out, "flush chain {table} bridge_forward");
        for rule in forward(new) {
            let _ = writeln!(out, "add rule {table} bridge_forward {rule}");
        }
    }
    let none = Frame::default();
    for ((name, before), (_, after)) in sets(old.unwrap_or(&none)).into_iter().zip(sets(new)) {
        for (verb, from, other) in [("delete", &before, &after), ("add", &after, &before)] {
            let differing: Vec<&str> = from.difference(other).map(String::as_str).collect();
            if !differing.is_empty() {
                let _ = writeln!(out, "{verb} element {table} {name} {{ {} }}", differing.join(", "));
            }
        }
    }
    let before = |port: &String| old.and_then(|old| old.ports.get(port));
    for port in old.iter().flat_map(|old| old.ports.keys()).filter(|port| !new.ports.contains_key(*port)) {
        let _ = writeln!(out, "delete element {table} ports {{ \"{port}\" }}");
        for chain in chains(port) {
            let _ = writeln!(out, "flush chain {table} {chain}");
        }
        for chain in chains(port) {
            let _ = writeln!(out, "delete chain {table} {chain}");
        }
    }
    let reported_anew = old.is_some_and(|old| report(old) != report(new));
    for (name, port) in new.ports.iter().filter(|(name, port)| before(name) != Some(*port) || reported_anew) {
        let [chain, discovery] = chains(name);
        for chain in [&chain, &discovery] {
            let _ = writeln!(out, "add chain {table} {chain}\nflush chain {table} {chain}");
        }
        for rule in own_discovery(port) {
            let _ = writeln!(out, "add rule {table} {discovery} {rule}");
        }
        for rule in own_sources(port, &discovery, report(new)) {
            let _ = writeln!(out, "add rule {table} {chain} {rule}");
        }
        if before(name).is_none() {
            let _ = writeln!(out, "add element {table} ports {{ \"{name}\" : jump {chain} }}");
        }
    }
    out
}

/// The sets that follow from a frame, with their elements.
fn sets(frame: &Frame) -> [(&'static str, BTreeSet<String>); 12] {
    let of = |v4: bool| {
        let addresses = frame.ports.values().flat_map(|port| &port.addresses).filter(|ip| ip.is_ipv4() == v4);
        addresses.map(ToString::to_string).collect::<BTreeSet<_>>()
    };
    let quoted = |name: &String| format!("\"{name}\"");
    let in_mesh = frame.ports.iter().filter(|(_, port)| port.in_mesh).map(|(name, _)| quoted(name)).collect();
    let isolated = if frame.audit { BTreeSet::new() } else { frame.isolated.iter().map(quoted).collect() };
    let attached = frame.ports.keys().map(quoted).collect();
    let macs = || frame.ports.iter().filter_map(|(name, port)| Some((quoted(name), port.mac?)));
    let behind = |v4: bool| {
        let of_port = |(name, port): (&String, &PodPort)| {
            let sources = port.sources().into_iter().filter(|net| net.addr().is_ipv4() == v4);
            sources.map(|net| format!("{} . {net}", quoted(name))).collect::<Vec<_>>()
        };
        frame.ports.iter().flat_map(of_port).collect()
    };
    [
        ("attached", attached),
        ("with_mac", macs().map(|(name, _)| name).collect()),
        ("stations", macs().map(|(name, mac)| format!("{name} . {}", mac_text(&mac))).collect()),
        ("link_locals", frame.link_locals().map(|address| address.to_string()).collect()),
        ("advertised", frame.link_locals().map(target).collect()),
        ("port_locals", frame.port_locals().collect()),
        ("behind4", behind(true)),
        ("behind6", behind(false)),
        ("pods", in_mesh),
        ("isolated", isolated),
        ("addresses4", of(true)),
        ("addresses6", of(false)),
    ]
}

const fn closed(frame: &Frame) -> bool {
    !frame.switched_judged && !frame.audit
}

/// Unlike the others, these chains are few and rebuilt: in between, which no packet sees, there are none.
fn made_anew(table: &str) -> String {
    let mut out = format!("add table {table}\ndelete table {table}\nadd table {table}\n");
    let sets = [
        ("map", "ports", "type ifname : verdict;"),
        ("set", "attached", "type ifname;"),
        ("set", "with_mac", "type ifname;"),
        ("set", "stations", "type ifname . ether_addr;"),
        ("set", "link_locals", "type ipv6_addr;"),
        ("set", "advertised", "typeof @th,64,128;"),
        ("set", "port_locals", "type ifname . ipv6_addr;"),
        ("set", "behind4", "type ifname . ipv4_addr; flags interval;"),
        ("set", "behind6", "type ifname . ipv6_addr; flags interval;"),
        ("set", "pods", "type ifname;"),
        ("set", "isolated", "type ifname;"),
        ("set", "addresses4", "type ipv4_addr;"),
        ("set", "addresses6", "type ipv6_addr;"),
    ];
    for (kind, name, declared) in sets {
        let _ = writeln!(out, "add {kind} {table} {name} {{ {declared} }}");
    }
    for (chain, hook) in [("anti_spoof", "prerouting"), ("bridge_forward", "forward"), ("bridge_output", "output")] {
        let _ = writeln!(out, "add chain {table} {chain} {{ type filter hook {hook} priority -350; policy accept; }}");
    }
    let _ = writeln!(out, "add chain {table} infrastructure");
    for rule in INFRASTRUCTURE.into_iter().chain(["counter drop"]) {
        let _ = writeln!(out, "add rule {table} infrastructure {rule}");
    }
    // A packet for one pod in a frame for all: the bridge's own end would have conntrack confirm a flow that the pod's
    // policies refuse, and errors about it would pass.
    for (ip, addresses) in [("ip", "addresses4"), ("ip6", "addresses6")] {
        let _ = writeln!(out, "add rule {table} anti_spoof {TO_GROUP} {ip} daddr @{addresses} counter drop");
    }
    // Bridges that a veth joins (LXD, libvirt) pass each other's router advertisements and neighbour discovery.
    let _ = writeln!(out, "add rule {table} anti_spoof iifname @attached {OTHERS_LINK_LOCAL}counter drop");
    let _ = writeln!(out, "add rule {table} anti_spoof iifname vmap @ports");
    let _ = writeln!(out, "add rule {table} bridge_output {OTHERS_STATION}");
    out
}

fn forward(frame: &Frame) -> Vec<String> {
    let mut rules = vec![OTHERS_STATION.to_owned()];
    if closed(frame) {
        rules.extend(["iifname", "oifname"].map(|end| format!("{end} @pods ether type {{ ip, ip6 }} counter drop")));
    }
    // A client's, which may be for any server but an isolated pod.
    for text in [DHCP4, DHCP6] {
        rules.push(format!("oifname != @isolated {text}"));
    }
    // No policy speaks of link-local addresses.
    rules.push("iifname @attached ip6 saddr fe80::/10 jump infrastructure".to_owned());
    // The rest is no flow that the pod's policies could judge.
    rules.push("oifname . ip daddr @behind4 return".to_owned());
    rules.push("oifname . ip6 daddr @behind6 return".to_owned());
    rules.push("oifname @isolated jump infrastructure".to_owned());
    rules
}

/// The chains of a port: for frames that it sends, and for its neighbour discovery.
fn chains(port: &str) -> [String; 2] {
    ["port", "discovery"].map(|of| chain(of, port))
}

/// Interface names may contain characters that chain names may not.
fn chain(of: &str, port: &str) -> String {
    let hex = |byte: u8| format!("{byte:02x}");
    let name: String = port
        .bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("_{}", hex(byte)) })
        .collect();
    format!("{of}_{name}")
}

/// Matches for frames that a pod may send.
fn own_sources(port: &PodPort, discovery: &str, report: Option<String>) -> Vec<String> {
    let list = |texts: Vec<String>| (!texts.is_empty()).then(|| texts.join(", "));
    let addresses = |v4: bool| port.addresses.iter().filter(move |address| address.is_ipv4() == v4);
    let sources = |v4: bool| {
        list(port.sources().into_iter().filter(|net| net.addr().is_ipv4() == v4).map(|net| net.to_string()).collect())
    };
    let mut rules = vec!["ether type { 8021q, 8021ad } counter drop".to_owned()];
    if let Some(mac) = &port.mac {
        rules.push(format!("ether saddr != {} counter drop", mac_text(mac)));
        rules.push(format!("arp saddr ether != {} counter drop", mac_text(mac)));
    }
    if let Some(v4) = list(addresses(true).map(ToString::to_string).collect()) {
        rules.push(format!("arp saddr ip {{ {v4} }} return"));
    }
    // Conntrack knows no replies of flows to groups, and must not know denied ones.
    rules.push(format!("{TO_GROUP} ether type {{ ip, ip6 }} notrack"));
    rules
        .extend(["ip daddr { 224.0.0.0/4, 255.255.255.255 } notrack", "ip6 daddr ff00::/8 notrack"].map(str::to_owned));
    if let Some(v4) = sources(true) {
        rules.push(format!("ip saddr {{ {v4} }} return"));
    }
    rules.push(DHCP4.to_owned());
    rules.push("icmpv6 type { nd-router-advert, nd-redirect } counter drop".to_owned());
    rules
        .push(format!("icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }} jump {discovery}"));
    if let Some(v6) = sources(false) {
        rules.push(format!("ip6 saddr {{ {v6} }} return"));
    }
    rules.extend([NEIGHBOURS, DETECTION, ROUTERS, MLD, DHCP6].map(str::to_owned));
    // To the node's own address there; only replies to its flows pass input. A pod without its own hardware address
    // could not be distinguished from its neighbours.
    rules.extend(port.mac.map(|_| LINK_LOCAL.to_owned()));
    rules.extend(report);
    rules.push("counter drop".to_owned());
    rules
}

/// An address as the target of neighbour discovery.
fn target(address: Ipv6Addr) -> String {
    format!("{:#034x}", u128::from(address))
}

/// Matches for neighbour discovery messages of a pod: about its own addresses, and link-local ones that derive from no
/// other hardware address.
fn own_discovery(port: &PodPort) -> Vec<String> {
    let targets: Vec<String> = port
        .addresses
        .iter()
        .filter_map(|address| match address {
            IpAddr::V6(v6) => Some(target(*v6)),
            IpAddr::V4(_) => None,
        })
        .collect();
    // The advertised address follows the ICMPv6 header: link-local ones, and the pod's own.
    let advertised = "icmpv6 type nd-neighbor-advert @th,64,16 & 0xffc0 != 0xfe80";
    let mut rules = vec![match &targets[..] {
        [] => format!("{advertised} counter drop"),
        targets => format!("{advertised} @th,64,128 != {{ {} }} counter drop", targets.join(", ")),
    }];
    let own = port.link_local().map(|address| format!("@th,64,128 != {} ", target(address))).unwrap_or_default();
    rules.push(format!("icmpv6 type nd-neighbor-advert {own}@th,64,128 @advertised counter drop"));
    let Some(mac) = port.mac else { return rules };
    // No option, or the sender's link-layer address; duplicate address detection has a nonce.
    let mac: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    rules.extend([
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 length 24 return".to_owned(),
        "icmpv6 type nd-router-solicit ip6 length 8 return".to_owned(),
        format!("icmpv6 type nd-neighbor-advert ip6 length 32 @th,192,64 0x0201{mac} return"),
        format!("icmpv6 type nd-neighbor-solicit ip6 length 32 @th,192,64 0x0101{mac} return"),
        format!("icmpv6 type nd-router-solicit ip6 length 16 @th,64,64 0x0101{mac} return"),
        "ip6 saddr :: icmpv6 type nd-neighbor-solicit ip6 length 32 @th,192,16 0x0e01 return".to_owned(),
        "counter drop".to_owned(),
    ]);
    rules
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[test]
    fn interfaces_with_other_names_have_other_chains() {
        let names = ["veth1", "veth.1", "veth_1", "veth_2e1", "veth-1", "veth+1"];
        let chains: std::collections::BTreeSet<String> = names.iter().map(|name| chain("port", name)).collect();
        assert_eq!(chains.len(), names.len(), "{chains:?}");
        assert!(chains.iter().all(|chain| netfilter::is_identifier(chain)));
    }
}
