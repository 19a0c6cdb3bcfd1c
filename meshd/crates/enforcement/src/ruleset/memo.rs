//! The verdict cache of nftables: most packets of a flow cost one lookup instead of a walk through the rules.
//!
//! ```text
//! forward, input   jump recall_*     a later packet of a flow whose key is in judged_*: passes
//!                  … rules …
//!                  jump remember_*   the rules accepted it: its key is added to judged_*
//! ```
//!
//! The key contains all inputs of a verdict besides the rules ([`flow_key`]), so an entry never applies to a flow that
//! the rules did not allow. Each rule change creates new sets: a packet that the old rules are just accepting is
//! entered into the old set, which new rules never read. Other programs cannot write an entry unnoticed: after a
//! foreign change of our table, it is rebuilt.
//!
//! A full set takes no more entries; the rules then judge each packet without one. The rules always judge and report
//! the first packet of a flow.

use std::fmt::Write as _;

use policy::nft::flow_key;

/// Most entries of a set, and how long one is kept.
const SIZE: u32 = 65_536;
const TIMEOUT: &str = "5m";

/// The base chains that remember.
pub(super) const HOOKS: [&str; 2] = ["forward", "input"];
const FAMILIES: [(bool, &str, u8); 2] = [(true, "ip", 4), (false, "ip6", 6)];

/// The chain that accepts cached flows.
pub(super) fn recall(hook: &str) -> String {
    format!("recall_{hook}")
}

/// The chain that caches flows that the rules accepted.
pub(super) fn remember(hook: &str) -> String {
    format!("remember_{hook}")
}

/// Names of the sets.
pub(super) fn sets() -> impl Iterator<Item = String> {
    HOOKS.into_iter().flat_map(|hook| FAMILIES.map(|(_, _, digit)| set(hook, digit)))
}

fn set(hook: &str, digit: u8) -> String {
    format!("judged_{hook}{digit}")
}

/// The chains with their rules. In audit mode nothing is cached: packets at the end may have been denied.
pub(super) fn rules(audit: bool) -> Vec<(String, Vec<String>)> {
    let mut chains = Vec::new();
    for hook in HOOKS {
        let (mut recalls, mut remembers) = (Vec::new(), Vec::new());
        for (v4, ip, digit) in FAMILIES {
            let ((condition, key), set) = (flow_key(v4), set(hook, digit));
            let later = format!("ct status confirmed {condition}");
            recalls.push(format!("{later} {key} @{set} accept"));
            // Packets without a pod at either end are not ours to judge.
            for end in ["original", "reply"] {
                remembers.push(format!("{later} ct {end} {ip} saddr @pods{digit} add @{set} {{ {key} }}"));
            }
        }
        chains.push((recall(hook), recalls));
        chains.push((remember(hook), if audit { Vec::new() } else { remembers }));
    }
    chains
}

/// Makes chains and sets; `renew`: they are there, and everything in them is forgotten.
pub(super) fn make(table: &str, audit: bool, renew: bool) -> String {
    let mut out = String::new();
    let chains = rules(audit);
    // Writing to a String cannot fail.
    for (chain, _) in &chains {
        let _ = writeln!(out, "{} chain {table} {chain}", if renew { "flush" } else { "add" });
    }
    for hook in HOOKS {
        for (_, ip, digit) in FAMILIES {
            let set = set(hook, digit);
            if renew {
                let _ = writeln!(out, "delete set {table} {set}");
            }
            let address = if ip == "ip" { "ipv4_addr" } else { "ipv6_addr" };
            let _ = writeln!(
                out,
                "add set {table} {set} {{ type {address} . {address} . inet_proto . inet_service; size {SIZE}; \
                 flags dynamic,timeout; timeout {TIMEOUT}; }}"
            );
        }
    }
    for (chain, rules) in chains {
        for rule in rules {
            let _ = writeln!(out, "add rule {table} {chain} {rule}");
        }
    }
    out
}
