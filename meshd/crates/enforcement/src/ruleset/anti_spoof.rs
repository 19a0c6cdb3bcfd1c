//! Identifies a packet's sender by its interface, not by its source address.
//!
//! ```text
//! pre_defrag  prerouting        from an attached pod's interface: the attachment's own sources; link-local and
//!                               unspecified ones for neighbour discovery, MLD and DHCP
//! from_pod    input             link-local sources answer flows of this node and begin none; its pod's chain judges
//!                               forwarded packets
//! forward                       the same for forwarded packets
//! ```
//!
//! Sources are checked before conntrack's reassembly, which combines fragments of any interface: a later check would
//! see only the interface of the last fragment.
//!
//! To these chains, a pod on a bridge enters by the bridge. Only [`bridge`](super::bridge) sees its port and enforces
//! its hardware address, which then identifies it here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::Ipv6Addr,
};

use cni::link::mac_text;
use netlink::Mac;
use policy::nft::{REFUSED, Ruleset, packet_form};

use super::frame::{Frame, PodPort, REPORTS, link_local};

/// Base chain for incoming packets of all interfaces. The chain `anti_spoof` of an earlier version has another
/// priority, which a base chain cannot change.
pub(super) const PRE_DEFRAG: &str = "pre_defrag";
/// Chain for packets from attached pods' interfaces.
pub(super) const ATTACHED: &str = "attached";
/// Chain for packets from attached pods to this node.
pub(super) const FROM_POD: &str = "from_pod";

/// Of input: behind answers to this node's own flows.
pub(super) const INPUT: [&str; 2] = ["iifname @ports jump from_pod", "ether saddr @macs jump from_pod"];

/// Listeners' reports, which no router passes on.
pub(super) const MLD: &str = "ip6 saddr { ::, fe80::/10 } ip6 daddr ff02::/16 ip6 hoplimit 1 \
     icmpv6 type { mld-listener-report, mld-listener-done, mld2-listener-report } return";
/// A DHCPv6 client.
pub(super) const DHCP6: &str =
    "ip6 saddr fe80::/10 ip6 daddr { fe80::/10, ff02::1:2 } udp sport 546 udp dport 547 return";
/// A DHCP client without an address.
pub(super) const DHCP4: &str = "ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 return";
/// Neighbour discovery by link-local addresses.
pub(super) const NEIGHBOURS: &str = "ip6 saddr fe80::/10 ip6 hoplimit 255 \
     icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } return";
/// Whether anybody has an address that is to be taken.
pub(super) const DETECTION: &str =
    "ip6 saddr :: ip6 daddr ff02::1:ff00:0/104 ip6 hoplimit 255 icmpv6 type nd-neighbor-solicit return";
/// Where routers are.
pub(super) const ROUTERS: &str = "ip6 saddr :: ip6 daddr ff02::2 ip6 hoplimit 255 icmpv6 type nd-router-solicit return";
/// A link-local address that follows from the hardware address of a bridge or of another pod. Without this a pod could
/// answer in that one's place: conntrack does not care which interface an answer comes from.
pub(super) const OTHERS_LINK_LOCAL: &str = "ip6 saddr @link_locals iifname . ip6 saddr != @port_locals ";
/// Where it goes on, only answers to this node's flows pass.
pub(super) const LINK_LOCAL: &str = "ip6 saddr fe80::/10 ip6 daddr fe80::/10 return";

/// Named sets and maps with their declarations. Their elements come from the frame and the pods' rules.
const SETS: [(&str, &str, &str); 12] = [
    ("set", "ports", "type ifname;"),
    ("set", "macs", "type ether_addr;"),
    ("set", "link_locals", "type ipv6_addr;"),
    ("set", "port_locals", "type ifname . ipv6_addr;"),
    ("set", "senders4", "type ifname . ipv4_addr; flags interval;"),
    ("set", "senders6", "type ifname . ipv6_addr; flags interval;"),
    ("map", "port_egress", "type ifname : verdict;"),
    ("map", "port_ingress", "type ifname : verdict;"),
    ("map", "mac_egress", "type ether_addr : verdict;"),
    ("map", "packet_port_egress", "type ifname : verdict;"),
    ("map", "packet_port_ingress", "type ifname : verdict;"),
    ("map", "packet_mac_egress", "type ether_addr : verdict;"),
];

/// Elements by set, each with its verdict where it has one.
type Elements = BTreeMap<&'static str, BTreeMap<String, String>>;

/// Names of all sets and maps.
pub(super) fn set_names() -> impl Iterator<Item = &'static str> {
    SETS.iter().map(|(_, name, _)| *name)
}

/// A rule that reports a packet with a source that is not its sender's.
pub(super) fn report(frame: &Frame) -> Option<String> {
    // Before the first complete set of inputs nothing is reported: the group is unknown.
    (frame.log_group != 0)
        .then(|| format!("limit rate {REPORTS}/second log group {} prefix \"meshd spoofed egress\"", frame.log_group))
}

/// Commands that change the elements from `old` to `new`: those before chains change, and those after. `old` is `None`
/// without the sets.
pub(super) fn change(table: &str, old: Option<(&Frame, &Ruleset)>, new: (&Frame, &Ruleset)) -> [String; 2] {
    let [mut before, mut behind] = [String::new(), String::new()];
    // Writing to a String cannot fail.
    let is_plain = |frame: &Frame| !frame.judges_by_interface();
    if let Some((frame, _)) = old
        && frame.ports == new.0.ports
        && frame.bridges == new.0.bridges
        && is_plain(frame)
        && is_plain(new.0)
    {
        return [before, behind];
    }
    let (was, is) = (old.map(|(frame, rules)| elements(frame, rules)).unwrap_or_default(), elements(new.0, new.1));
    let none = BTreeMap::new();
    for (kind, name, declared) in SETS {
        if old.is_none() {
            let _ = writeln!(behind, "add {kind} {table} {name} {{ {declared} }}");
        }
        let (was, is) = (was.get(name).unwrap_or(&none), is.get(name).unwrap_or(&none));
        for (element, _) in was.iter().filter(|(element, verdict)| is.get(*element) != Some(*verdict)) {
            let _ = writeln!(before, "delete element {table} {name} {{ {element} }}");
        }
        for (element, verdict) in is.iter().filter(|(element, verdict)| was.get(*element) != Some(*verdict)) {
            let _ = writeln!(behind, "add element {table} {name} {{ {element}{verdict} }}");
        }
    }
    [before, behind]
}

fn elements(frame: &Frame, ruleset: &Ruleset) -> Elements {
    let mut out = Elements::new();
    let mut add = |set: &'static str, element: String, verdict: String| {
        out.entry(set).or_default().insert(element, verdict);
    };
    for address in frame.link_locals() {
        add("link_locals", address.to_string(), String::new());
    }
    for element in frame.port_locals() {
        add("port_locals", element, String::new());
    }
    let mut by_mac: BTreeMap<Mac, BTreeSet<String>> = BTreeMap::new();
    for (name, port) in &frame.ports {
        let quoted = format!("\"{name}\"");
        add("ports", quoted.clone(), String::new());
        if let Some(mac) = &port.mac {
            add("macs", mac_text(mac), String::new());
        }
        for source in port.sources() {
            let set = if source.addr().is_ipv4() { "senders4" } else { "senders6" };
            add(set, format!("{quoted} . {source}"), String::new());
        }
        if !port.judged_by_interface(frame) {
            continue;
        }
        for (side, maps, chains) in [
            (1, ["port_egress", "packet_port_egress"], ["egress4", "egress6"]),
            (0, ["port_ingress", "packet_port_ingress"], ["ingress4", "ingress6"]),
        ] {
            let chain = port.addresses.iter().find_map(|address| {
                chains.iter().find_map(|chains| ruleset.maps.get(chains).and_then(|map| map.get(address)))
            });
            let unknown = frame.unknown_closed[side].then_some(REFUSED[side]);
            let Some(chain) = chain.map(String::as_str).or(unknown) else { continue };
            for (map, chain) in maps.into_iter().zip([chain.to_owned(), of_packets(chain)]) {
                add(map, quoted.clone(), format!(" : jump {chain}"));
            }
            if let (1, Some(mac)) = (side, port.mac) {
                by_mac.entry(mac).or_default().insert(chain.to_owned());
            }
        }
    }
    for (mac, chains) in by_mac {
        // Several pods share the hardware address, so the sender is ambiguous.
        let chain = chains.first().filter(|_| chains.len() == 1).map_or(REFUSED[1], String::as_str);
        add("mac_egress", mac_text(&mac), format!(" : jump {chain}"));
        add("packet_mac_egress", mac_text(&mac), format!(" : jump {}", of_packets(chain)));
    }
    out
}

/// The chain for packets of no flow; denied ones go to the same.
fn of_packets(chain: &str) -> String {
    if REFUSED.contains(&chain) { chain.to_owned() } else { packet_form(chain) }
}

/// Packets that begin flows, and those of none, with the form of chains that judges them.
const BEGINNINGS: [(&str, &str); 2] = [("ct direction original", ""), ("ct state invalid,untracked", "packet_")];

impl Frame {
    /// Link-local addresses that follow from the hardware addresses of pods and their bridges.
    pub(super) fn link_locals(&self) -> impl Iterator<Item = Ipv6Addr> {
        self.ports.values().filter_map(PodPort::link_local).chain(self.bridges.iter().map(link_local))
    }

    /// The same of pods with their interfaces, as elements of a set.
    pub(super) fn port_locals(&self) -> impl Iterator<Item = String> {
        self.ports.iter().filter_map(|(name, port)| Some(format!("\"{name}\" . {}", port.link_local()?)))
    }

    /// Whether any pod has sources that no map of addresses leads to its chains.
    pub(super) fn judges_by_interface(&self) -> bool {
        self.ports.values().any(|port| port.judged_by_interface(self))
    }
}

/// The rules of these chains, while policies are in force or, `closed`, before.
pub(super) fn rules(frame: &Frame, closed: bool, rule: &mut impl FnMut(&'static str, String)) {
    rule(PRE_DEFRAG, format!("iifname @ports jump {ATTACHED}"));
    for text in ["iifname . ip saddr @senders4 return", "iifname . ip6 saddr @senders6 return"] {
        rule(ATTACHED, text.to_owned());
    }
    refuse(frame, ATTACHED, OTHERS_LINK_LOCAL, rule);
    for text in [LINK_LOCAL, NEIGHBOURS, DETECTION, ROUTERS, MLD, DHCP6, DHCP4] {
        rule(ATTACHED, text.to_owned());
    }
    refuse(frame, ATTACHED, "", rule);
    for text in [MLD, DHCP6, DHCP4] {
        rule(FROM_POD, text.to_owned());
    }
    if closed {
        rule(FROM_POD, "counter drop".to_owned());
        return;
    }
    refuse(frame, FROM_POD, "ip6 saddr fe80::/10 ", rule);
    if frame.judges_by_interface() {
        for (ip, pods) in [("ip", "pods4"), ("ip6", "pods6")] {
            for (begins, form) in BEGINNINGS {
                for sender in
                    [format!("iifname vmap @{form}port_egress"), format!("ether saddr vmap @{form}mac_egress")]
                {
                    rule(FROM_POD, format!("{begins} {ip} saddr != @{pods} {sender}"));
                }
            }
        }
    }
}

/// Rules for packets that a container routes, in both directions. Its own addresses are judged as any pod's.
pub(super) fn forward(frame: &Frame, rule: &mut impl FnMut(&'static str, String)) {
    if !frame.judges_by_interface() {
        return;
    }
    for (ip, pods) in [("ip", "pods4"), ("ip6", "pods6")] {
        for (begins, form) in BEGINNINGS {
            for judged in [
                format!("{ip} saddr != @{pods} iifname vmap @{form}port_egress"),
                format!("{ip} saddr != @{pods} ether saddr vmap @{form}mac_egress"),
                format!("{ip} daddr != @{pods} oifname vmap @{form}port_ingress"),
            ] {
                rule("forward", format!("{begins} {judged}"));
            }
        }
        for judged in [
            format!("{ip} daddr != @{pods} oifname vmap @port_egress"),
            format!("{ip} saddr != @{pods} iifname vmap @port_ingress"),
        ] {
            rule("forward", format!("ct direction reply {judged}"));
        }
    }
}

fn refuse(frame: &Frame, chain: &'static str, what: &str, rule: &mut impl FnMut(&'static str, String)) {
    if let Some(report) = report(frame) {
        rule(chain, format!("{what}{report}"));
    }
    rule(chain, format!("{what}counter drop"));
}
