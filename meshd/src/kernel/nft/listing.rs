//! Reading `nft -j list …`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use thiserror::Error;

use super::table::{Counter, Element, ObservedChain, ObservedSet, ObservedTable, SetKind};
use crate::kernel::desired::PrefixOn;
use crate::kernel::interface::InterfaceName;

/// Why a listing could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListingError {
    /// Not JSON.
    #[error("no JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// No `nftables` array.
    #[error("no \"nftables\" array")]
    Shape,
}

/// A base chain at the forward hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForwardChain {
    pub(crate) family: String,
    pub(crate) table: String,
    pub(crate) name: String,
    pub(crate) policy_drop: bool,
}

/// A foreign chain's rules, as far as they tell whose it is and what becomes of a packet at its end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ForeignRules {
    /// Its last rule takes every packet and does not let it through.
    pub(crate) ends_in_drop: bool,
    /// Chains that its rules jump or go to.
    pub(crate) jumps: Vec<String>,
    /// Handles of rules that lead to our chain, in order. iptables may have put the tag where nft does not show it.
    pub(crate) tagged: Vec<u64>,
    /// The comments of all rules.
    pub(crate) comments: Vec<Option<String>>,
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

/// `nft -j list chains`: base chains at the forward hook, and the names of all chains as (family, table, chain).
#[expect(clippy::type_complexity, reason = "one caller, which takes it apart")]
pub(crate) fn parse_chains(
    json: &[u8],
) -> Result<(Vec<ForwardChain>, BTreeSet<(String, String, String)>), ListingError> {
    let mut forward = Vec::new();
    let mut all = BTreeSet::new();
    for item in items(json)? {
        let Some(chain) = item.get("chain") else {
            continue;
        };
        let (family, table, name) = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
        if text(chain, "hook") == "forward" && text(chain, "type") == "filter" {
            forward.push(ForwardChain {
                family: family.clone(),
                table: table.clone(),
                name: name.clone(),
                policy_drop: text(chain, "policy") == "drop",
            });
        }
        all.insert((family, table, name));
    }
    Ok((forward, all))
}

/// `nft -j list chain …` of a chain that is not ours; its rules that jump to `accept_chain` are.
pub(crate) fn parse_foreign_chain(json: &[u8], accept_chain: &str) -> Result<ForeignRules, ListingError> {
    let mut rules = ForeignRules::default();
    for item in items(json)? {
        let Some(rule) = item.get("rule") else {
            continue;
        };
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
    Ok(rules)
}

/// Prefixes that rules of a table let through, whatever else a packet is: the rule has no other condition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Accepted {
    /// By the packet's source.
    pub(crate) sources: Vec<IpNet>,
    /// By its destination.
    pub(crate) destinations: Vec<IpNet>,
}

/// `nft -j list table …` of a table that is not ours, without the rules of `accept_chain`, which are. A rule that sends
/// a prefix to a chain and nowhere else, as firewalld does for a zone's sources, stands for both directions.
pub(crate) fn parse_accepted(json: &[u8], accept_chain: &str) -> Result<Accepted, ListingError> {
    let mut accepted = Accepted::default();
    for rule in items(json)?.iter().filter_map(|item| item.get("rule")) {
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
    Ok(accepted)
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
    }
}

/// A prefix as nft prints it: an address alone, `prefix`, or, for what is no prefix to it, a `range`.
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

fn items(json: &[u8]) -> Result<Vec<Value>, ListingError> {
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
