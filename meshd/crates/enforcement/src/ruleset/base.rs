//! Rules outside the pods' chains.

use std::{collections::BTreeMap, fmt::Write as _};

use ipnet::IpNet;
use policy::nft::{ALLOWED, REFUSED};

use super::{
    anti_spoof::{self, ATTACHED, FROM_POD, PRE_DEFRAG},
    frame::{Frame, REPORTS},
    memo,
};

/// Base chains with their hooks, and fixed chains that they lead to.
pub(super) const BASE_CHAINS: [(&str, Option<&str>); 12] = [
    // Conntrack reassembles at -400.
    (PRE_DEFRAG, Some("type filter hook prerouting priority -460; policy accept;")),
    (ATTACHED, None),
    (FROM_POD, None),
    ("forward", Some("type filter hook forward priority -5; policy accept;")),
    ("input", Some("type filter hook input priority -5; policy accept;")),
    ("dnat_check", Some("type filter hook postrouting priority 110; policy accept;")),
    ("forward_packets", None),
    ("input_packets", None),
    (REFUSED[0], None),
    (REFUSED[1], None),
    (ALLOWED[0], None),
    (ALLOWED[1], None),
];

/// The chain that is there while no picture has ever been in force.
pub(super) const CLOSED: &str = "closed";

/// Rule for packets of this node to itself.
const LOCAL: &str = "iifname \"lo\" return";
/// Neighbour discovery, which conntrack does not track. Bridges pass it on; what a router has passed on has fewer hops left.
const NEIGHBOURS: &str =
    "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } return";
/// Listeners' reports to neighbours, for bridges that learn from them.
const LISTENERS: &str = "ip6 saddr fe80::/10 icmpv6 type mld2-listener-report return";
/// Answers to this node's own processes, and ICMP errors about what those sent.
const REPLY: &str = "ct direction reply ct state established,related return";
/// The same without ICMP errors: those of pods are judged by rules that are not there yet.
const REPLY_ALONE: &str = "ct direction reply ct state established return";
/// Packets of no flow.
const UNTRACKED: &str = "ct state invalid,untracked";
/// In words that nft knows by itself: other protocols' names it looks up in /etc/protocols, which an image has not.
const ERROR: &str = "ct state related meta l4proto { icmp, icmpv6 }";

/// The table and its fixed chains, without rules; base chains that are there stay where they are.
pub(super) fn base_chains(table: &str) -> String {
    let mut out = format!("add table {table}\n");
    for (chain, hook) in BASE_CHAINS {
        // Writing to a String cannot fail.
        let _ = match hook {
            Some(hook) => writeln!(out, "add chain {table} {chain} {{ {hook} }}"),
            None => writeln!(out, "add chain {table} {chain}"),
        };
        let _ = writeln!(out, "flush chain {table} {chain}");
    }
    out
}

/// The tables before the first complete set of inputs: an empty marker chain, and rules in the base chains.
pub(super) fn closed(table: &str, frame: &Frame) -> String {
    let mut out = format!("add chain {table} {CLOSED}\n");
    // Writing to a String cannot fail.
    anti_spoof::rules(frame, true, &mut |chain, rule| {
        let _ = writeln!(out, "add rule {table} {chain} {rule}");
    });
    for rule in [LOCAL, NEIGHBOURS, REPLY_ALONE].into_iter().chain(anti_spoof::INPUT) {
        let _ = writeln!(out, "add rule {table} input {rule}");
    }
    for rule in ["iifname @ports drop", "oifname @ports drop", "ether saddr @macs drop"] {
        let _ = writeln!(out, "add rule {table} forward {rule}");
    }
    for net in &frame.own {
        let ip = if net.network().is_ipv4() { "ip" } else { "ip6" };
        // What goes to an address of the node itself, which lies in its subnet, is for a process.
        let _ = writeln!(out, "add rule {table} input {ip} saddr {net} drop");
        let _ = writeln!(out, "add rule {table} forward {ip} saddr {net} drop");
        let _ = writeln!(out, "add rule {table} forward {ip} daddr {net} drop");
    }
    out
}

/// The rules of the fixed chains.
pub(super) fn base(table: &str, frame: &Frame, flush: bool) -> String {
    let mut rules: BTreeMap<&str, Vec<String>> = BASE_CHAINS.iter().map(|(name, _)| (*name, Vec::new())).collect();
    let mut rule = |chain: &'static str, text: String| {
        if let Some(list) = rules.get_mut(chain) {
            list.push(text);
        }
    };
    // The tunnel's end has judged these. What was rewritten, at either end, had this node's own address there; what
    // conntrack does not track cannot have been.
    for device in &frame.judged_by_tunnel {
        rule("forward", format!("iifname \"{device}\" ct status ! dnat ct status ! snat return"));
        rule("forward", format!("iifname \"{device}\" {UNTRACKED} return"));
    }
    for text in [NEIGHBOURS, LISTENERS] {
        rule("forward", text.to_owned());
    }
    for text in [LOCAL, NEIGHBOURS] {
        rule("input", text.to_owned());
    }
    anti_spoof::rules(frame, false, &mut rule);
    anti_spoof::forward(frame, &mut rule);
    // Nothing is known of who may talk to them: they can answer this node's own processes, and that is all.
    for address in &frame.displaced {
        let ip = if address.is_ipv4() { "ip" } else { "ip6" };
        rule("forward", format!("{ip} saddr {address} drop"));
        rule("forward", format!("{ip} daddr {address} drop"));
        rule("input_packets", format!("{ip} saddr {address} drop"));
    }
    // A pod's ICMP error about a flow that it has no part in is judged by its own header.
    for (hook, packets) in [("forward", "forward_packets"), ("input", "input_packets")] {
        for (ip, digit) in [("ip", 4), ("ip6", 6)] {
            let ends = |end: &str| format!("ct {end} {ip} saddr . {ip} saddr != @ends{digit}");
            let (original, reply) = (ends("original"), ends("reply"));
            rule(hook, format!("{ERROR} {ip} saddr @pods{digit} {original} {reply} goto {packets}"));
        }
        if hook == "input" {
            for text in [REPLY].into_iter().chain(anti_spoof::INPUT) {
                rule(hook, text.to_owned());
            }
        }
        rule(hook, format!("{UNTRACKED} goto {packets}"));
    }
    for address in &frame.displaced {
        let ip = if address.is_ipv4() { "ip" } else { "ip6" };
        rule("input", format!("ct original {ip} saddr {address} drop"));
    }
    for hook in memo::HOOKS {
        rule(hook, format!("jump {}", memo::recall(hook)));
    }
    for v4 in [true, false] {
        family(frame, v4, &mut rule);
    }
    for hook in memo::HOOKS {
        rule(hook, format!("jump {}", memo::remember(hook)));
    }
    ends(frame, &mut rule);
    let mut out = String::new();
    for (chain, rules) in rules {
        if flush {
            let _ = writeln!(out, "flush chain {table} {chain}");
        }
        for rule in rules {
            let _ = writeln!(out, "add rule {table} {chain} {rule}");
        }
    }
    out
}

/// The ends of the rules: reports and drops.
fn ends(frame: &Frame, rule: &mut impl FnMut(&'static str, String)) {
    for (side, name) in [(0, "ingress"), (1, "egress")] {
        let report = |which: &str, what: &str| {
            let group = frame.log_group;
            format!("{which} limit rate {REPORTS}/second log group {group} prefix \"meshd {what} {name}\"")
        };
        let (refused, allowed) = (REFUSED[side], ALLOWED[side]);
        let denied = if frame.audit { "audited" } else { "refused" };
        for which in ["ct direction original", "ct state untracked"] {
            rule(refused, report(which, denied));
        }
        if !frame.audit {
            rule(refused, "counter drop".to_owned());
        }
        // The first packet of a flow: conntrack confirms it behind these rules.
        for which in ["ct status ! confirmed", "ct state untracked"] {
            rule(allowed, report(which, "allowed"));
        }
    }
}

fn family(frame: &Frame, v4: bool, rule: &mut impl FnMut(&'static str, String)) {
    let (ip, digit) = if v4 { ("ip", 4) } else { ("ip6", 6) };
    let list = |texts: Vec<String>| texts.join(", ");
    let of = |nets: &[IpNet]| {
        list(nets.iter().filter(|net| net.network().is_ipv4() == v4).map(ToString::to_string).collect())
    };
    let (own, networks) = (of(&frame.own), of(&frame.networks));
    // A node's own address is in its subnet, and no pod.
    let overlay: Vec<String> = frame.overlay.iter().filter(|ip| ip.is_ipv4() == v4).map(ToString::to_string).collect();
    let overlay = list(overlay);
    let stranger = |end: &str| {
        let but = if overlay.is_empty() { String::new() } else { format!("{end} != {{ {overlay} }} ") };
        format!("{end} {{ {own} }} {but}{end} != @pods{digit}")
    };
    let [closed_in, closed_out] = frame.unknown_closed;
    // Of a flow its source before any rewriting and its destination behind it; of a packet of no flow its header.
    let flow = [format!("ct original {ip} saddr"), format!("ct reply {ip} saddr")];
    let packet = [format!("{ip} saddr"), format!("{ip} daddr")];
    for (chain, [source, destination], form, has_destination) in [
        ("forward", &flow, "", true),
        ("input", &flow, "", false),
        ("forward_packets", &packet, "packet_", true),
        ("input_packets", &packet, "packet_", false),
    ] {
        rule(chain, format!("{source} vmap @{form}egress{digit}"));
        if has_destination {
            rule(chain, format!("{destination} vmap @{form}ingress{digit}"));
        }
        if closed_out && !own.is_empty() {
            rule(chain, format!("{} jump {}", stranger(source), REFUSED[1]));
        }
        if closed_in && has_destination && !own.is_empty() {
            rule(chain, format!("{} jump {}", stranger(destination), REFUSED[0]));
        }
    }
    if !networks.is_empty() && !own.is_empty() {
        rule(
            "dnat_check",
            format!(
                "ct status dnat ct direction original {ip} daddr {{ {networks} }} {ip} daddr != {{ {own} }} \
                 {ip} saddr {{ {networks} }} {ip} saddr != {{ {own} }} drop"
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_that_the_tunnel_judges_bypass_the_rules() {
        let bypasses = |judged_by_tunnel: &[&str]| {
            let judged_by_tunnel = judged_by_tunnel.iter().map(|device| (*device).to_owned()).collect();
            let text = base("t", &Frame { judged_by_tunnel, ..Frame::default() }, false);
            text.lines().filter(|line| line.contains("iifname") && line.ends_with("return")).count()
        };
        let without = bypasses(&[]);
        assert_eq!((bypasses(&["meshd0"]), bypasses(&["meshd0", "vx0"])), (without + 2, without + 4));
        assert!(!base("t", &Frame::default(), false).contains("iifname \"meshd0\""));
    }
}
