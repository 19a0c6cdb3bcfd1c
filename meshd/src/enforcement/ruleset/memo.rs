//! Verdicts that nftables remembers, so that most packets of a flow cost one look-up and not a walk through the rules.
//!
//! ```text
//! forward, input   jump recall_*     a later packet of a flow whose key is in judged_*: passes
//!                  … rules …
//!                  jump remember_*   the rules have let it pass: its key goes into judged_*
//! ```
//!
//! The key holds all that a verdict depends on besides the rules ([`flow_key`]), so that an entry never speaks for another
//! flow than the rules allowed. With every change of the rules the sets are new ones: a packet that the old rules are just
//! letting pass is entered in the old set, which new rules never ask. Other programs cannot write an entry unnoticed: a
//! change of our table by anybody else has it made again.
//!
//! A set that is full takes no more, and rules judge each packet of what is not in it. The first packet of a flow is always
//! judged by the rules, which report it.

use std::fmt::Write as _;

use policy::nft::flow_key;

/// Most entries of a set, and how long one is kept.
const SIZE: u32 = 65_536;
const TIMEOUT: &str = "5m";

/// The base chains that remember.
pub(super) const HOOKS: [&str; 2] = ["forward", "input"];
const FAMILIES: [(bool, &str, u8); 2] = [(true, "ip", 4), (false, "ip6", 6)];

/// The chain that lets pass what is remembered.
pub(super) fn recall(hook: &str) -> String {
    format!("recall_{hook}")
}

/// The chain that remembers what comes to the end of the rules.
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

/// The chains with their rules. In audit mode nothing is remembered: what comes to the end may have been denied.
pub(super) fn rules(audit: bool) -> Vec<(String, Vec<String>)> {
    let mut chains = Vec::new();
    for hook in HOOKS {
        let (mut recalls, mut remembers) = (Vec::new(), Vec::new());
        for (v4, ip, digit) in FAMILIES {
            let ((condition, key), set) = (flow_key(v4), set(hook, digit));
            let later = format!("ct status confirmed {condition}");
            recalls.push(format!("{later} {key} @{set} accept"));
            // What concerns no pod is others'.
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
