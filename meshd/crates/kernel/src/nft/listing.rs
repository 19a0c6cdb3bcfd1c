//! Reading `nft -j list …`.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh::{
    interface::InterfaceName,
    kernel_state::{PrefixOn, PrefixVia},
};
use serde_json::Value;
use thiserror::Error;

use super::table::{Counter, Element, ObservedChain, ObservedSet, ObservedTable, SetKind};

/// Why a listing could not be read.
#[derive(Debug, Error)]
pub enum ListingError {
    /// Not JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// No `nftables` array.
    #[error("no \"nftables\" array")]
    Shape,
}

/// The parts of a foreign chain's rules that reveal its owner and its default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ForeignRules {
    /// Its last rule takes every packet and does not let it through.
    pub ends_in_drop: bool,
    /// Chains that its rules jump or go to.
    pub jumps: Vec<String>,
    /// Handles of rules that lead to our chain, in order. iptables may have put the tag where nft does not show it.
    pub tagged: Vec<u64>,
    /// The comments of all rules.
    pub comments: Vec<Option<String>>,
}

/// `nft -j list table …`.
pub(crate) fn parse_table(json: &[u8]) -> Result<ObservedTable, ListingError> {
    let mut table = ObservedTable::default();
    for item in items(json)? {
        if let Some(set) = item.get("set") {
            table.sets.insert(text(set, "name"), observed_set(set));
        } else if let Some(chain) = item.get("chain") {
            table.chains.entry(text(chain, "name")).or_default().clone_from(&observed_chain(chain));
        } else if let Some(counter) = item.get("counter") {
            table.counters.insert(
                text(counter, "name"),
                Counter { packets: number(counter, "packets"), bytes: number(counter, "bytes") },
            );
        } else if let Some(rule) = item.get("rule") {
            table.chains.entry(text(rule, "chain")).or_default().comments.push(comment(rule));
        }
    }
    Ok(table)
}

/// The rules of a chain that is not ours; those that jump to `accept_chain` are.
pub(crate) fn foreign_rules<'v>(listed: impl Iterator<Item = &'v Value>, accept_chain: &str) -> ForeignRules {
    let mut rules = ForeignRules::default();
    for rule in listed {
        rules.comments.push(comment(rule));
        let expressions = rule.get("expr").and_then(Value::as_array);
        let expressions = expressions.map_or(&[][..], Vec::as_slice);
        for verdict in ["jump", "goto"] {
            let targets = expressions.iter().filter_map(|e| e.get(verdict)?.get("target")?.as_str());
            for target in targets {
                if target == accept_chain {
                    rules.tagged.push(number(rule, "handle"));
                } else {
                    rules.jumps.push(target.to_owned());
                }
            }
        }
        rules.ends_in_drop = takes_all(expressions);
    }
    rules
}

/// Prefixes that rules of a table let through, whatever else a packet is: the rule has no other condition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AcceptedPrefixes {
    /// By the packet's source.
    pub sources: Vec<IpNet>,
    /// By its destination.
    pub destinations: Vec<IpNet>,
}

/// The prefixes that a foreign table accepts, without the rules of our `accept_chain`. A rule that only sends a prefix
/// to a chain, as firewalld does for a zone's sources, counts for both directions.
pub fn accepted<'v>(listed: impl Iterator<Item = &'v Value>, accept_chain: &str) -> AcceptedPrefixes {
    let mut accepted = AcceptedPrefixes::default();
    for rule in listed {
        let expressions = rule.get("expr").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let told: Vec<&Value> = expressions.iter().filter(|e| e.get("counter").is_none()).collect();
        let ([matched, verdict], false) = (&told[..], text(rule, "chain") == accept_chain) else { continue };
        let Some(matched) = matched.get("match").filter(|matched| text(matched, "op") == "==") else { continue };
        let field = matched.pointer("/left/payload/field").and_then(Value::as_str).unwrap_or_default();
        let right = matched.get("right");
        let set = right.and_then(|right| right.get("set")?.as_array());
        let all: Vec<IpNet> = set
            .map_or_else(|| right.into_iter().collect(), |set| set.iter().collect::<Vec<_>>())
            .into_iter()
            .filter_map(prefix)
            .collect();
        let goes = verdict.get("goto").is_some();
        if goes || verdict.get("accept").is_some() {
            if field == "saddr" {
                accepted.sources.extend(&all);
            }
            if field == "daddr" || (goes && field == "saddr") {
                accepted.destinations.extend(&all);
            }
        }
    }
    accepted
}

/// The rule has no condition and drops or rejects. iptables' REJECT is an `xt` target.
fn takes_all(expressions: &[Value]) -> bool {
    let Some((last, before)) = expressions.split_last() else {
        return false;
    };
    let ends = last.get("drop").is_some()
        || last.get("reject").is_some()
        || last.get("xt").is_some_and(|xt| text(xt, "type") == "target" && text(xt, "name") == "REJECT");
    ends && before.iter().all(|e| e.get("counter").is_some() || e.get("log").is_some() || is_log_target(e))
}

fn is_log_target(expression: &Value) -> bool {
    expression.get("xt").is_some_and(|xt| text(xt, "type") == "target" && text(xt, "name") == "LOG")
}

fn observed_chain(chain: &Value) -> ObservedChain {
    ObservedChain {
        base: chain.get("hook").map(|_| {
            let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or(0);
            (text(chain, "type"), text(chain, "hook"), i32::try_from(priority).unwrap_or(0))
        }),
        policy_drop: text(chain, "policy") == "drop",
        comments: Vec::new(),
    }
}

fn observed_set(set: &Value) -> ObservedSet {
    let parts: Vec<&str> = match set.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let interval =
        set.get("flags").and_then(Value::as_array).is_some_and(|flags| flags.iter().any(|f| f == "interval"));
    let kind = match (parts.as_slice(), interval) {
        (["ipv4_addr"], true) => Some(SetKind::Ipv4),
        (["ipv6_addr"], true) => Some(SetKind::Ipv6),
        (["ipv4_addr", "ifname"], true) => Some(SetKind::Ipv4On),
        (["ipv6_addr", "ifname"], true) => Some(SetKind::Ipv6On),
        (["ipv4_addr", "ifname", "ipv4_addr"], true) => Some(SetKind::Ipv4Via),
        (["ipv6_addr", "ifname", "ipv6_addr"], true) => Some(SetKind::Ipv6Via),
        (["ifname"], false) => Some(SetKind::Interface),
        _ => None,
    };
    let listed = set.get("elem").and_then(Value::as_array);
    let elements =
        kind.and_then(|kind| listed.map_or(&[][..], Vec::as_slice).iter().map(|value| element(kind, value)).collect());
    ObservedSet { kind, elements }
}

fn element(kind: SetKind, value: &Value) -> Option<Element> {
    match kind {
        SetKind::Ipv4 | SetKind::Ipv6 => prefix(value).map(Element::Prefix),
        SetKind::Interface => Some(Element::Interface(value.as_str()?.parse().ok()?)),
        SetKind::Ipv4On | SetKind::Ipv6On => {
            let [address, dev] = value.get("concat")?.as_array()?.as_slice() else {
                return None;
            };
            Some(Element::On(PrefixOn { prefix: prefix(address)?, dev: InterfaceName::new(dev.as_str()?).ok()? }))
        }
        SetKind::Ipv4Via | SetKind::Ipv6Via => {
            let [address, dev, via] = value.get("concat")?.as_array()?.as_slice() else {
                return None;
            };
            Some(Element::Via(PrefixVia {
                prefix: prefix(address)?,
                dev: InterfaceName::new(dev.as_str()?).ok()?,
                via: via.as_str()?.parse().ok()?,
            }))
        }
    }
}

/// A prefix as nft prints it: a single address, `prefix`, or `range`.
fn prefix(value: &Value) -> Option<IpNet> {
    if let Some(address) = value.as_str() {
        return Some(IpNet::from(address.parse::<IpAddr>().ok()?));
    }
    if let Some(prefix) = value.get("prefix") {
        let address: IpAddr = prefix.get("addr")?.as_str()?.parse().ok()?;
        let len = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
        return IpNet::new(address, len).ok();
    }
    None
}

/// The items of a listing.
pub fn items(json: &[u8]) -> Result<Vec<Value>, ListingError> {
    let mut root: Value = serde_json::from_slice(json)?;
    match root.get_mut("nftables").map(Value::take) {
        Some(Value::Array(items)) => Ok(items),
        _ => Err(ListingError::Shape),
    }
}

fn comment(rule: &Value) -> Option<String> {
    rule.get("comment").and_then(Value::as_str).map(str::to_owned)
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or_default()
}
