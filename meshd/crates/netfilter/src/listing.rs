//! Reading `nft -j list …`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use serde_json::Value;
use thiserror::Error;

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

/// The content of a table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableListing {
    /// By name.
    pub chains: BTreeMap<String, ListedChain>,
    /// By name.
    pub sets: BTreeMap<String, ListedSet>,
    /// Their names.
    pub maps: BTreeSet<String>,
    /// By name.
    pub counters: BTreeMap<String, Counter>,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListedChain {
    /// Type, hook and priority of a base chain.
    pub base: Option<(String, String, i32)>,
    /// Its policy is to drop.
    pub policy_drop: bool,
    /// The comment of each rule, in order.
    pub comments: Vec<Option<String>>,
}

/// A set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListedSet {
    /// The types of an element's parts.
    pub types: Vec<String>,
    /// Elements may be ranges.
    pub interval: bool,
    /// Its elements, where the listing has them.
    pub elements: Vec<Value>,
}

/// A named counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counter {
    /// Packets counted.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl TableListing {
    /// Reads the output of `nft -j list table FAMILY NAME`.
    ///
    /// # Errors
    /// If it is no listing.
    pub fn parse(json: &[u8]) -> Result<Self, ListingError> {
        let mut table = Self::default();
        for item in items(json)? {
            if let Some(chain) = item.get("chain") {
                // Rules may have come first.
                let entry = table.chains.entry(text(chain, "name")).or_default();
                *entry = ListedChain { comments: std::mem::take(&mut entry.comments), ..listed_chain(chain) };
            } else if let Some(rule) = item.get("rule") {
                table.chains.entry(text(rule, "chain")).or_default().comments.push(comment(rule));
            } else if let Some(set) = item.get("set") {
                table.sets.insert(text(set, "name"), listed_set(set));
            } else if let Some(map) = item.get("map") {
                table.maps.insert(text(map, "name"));
            } else if let Some(counter) = item.get("counter") {
                let [packets, bytes] = ["packets", "bytes"].map(|field| number(counter, field));
                table.counters.insert(text(counter, "name"), Counter { packets, bytes });
            }
        }
        Ok(table)
    }
}

fn listed_chain(chain: &Value) -> ListedChain {
    let base = chain.get("hook").map(|_| {
        let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or(0);
        (text(chain, "type"), text(chain, "hook"), i32::try_from(priority).unwrap_or(0))
    });
    ListedChain { base, policy_drop: text(chain, "policy") == "drop", comments: Vec::new() }
}

fn listed_set(set: &Value) -> ListedSet {
    let list = |field: &str| set.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let types = match set.get("type") {
        Some(Value::String(one)) => vec![one.clone()],
        // nft from 1.1 on, for a set that was declared so.
        Some(Value::Object(map)) => map.get("typeof").map(types_of).unwrap_or_default(),
        _ => list("type").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
    };
    ListedSet { types, interval: list("flags").iter().any(|flag| flag == "interval"), elements: list("elem").to_vec() }
}

/// The types of an expression's parts, as far as we declare sets by expressions: an address field of IP, or bits of the
/// payload, which are a number.
fn types_of(expression: &Value) -> Vec<String> {
    let parts = expression.get("concat").and_then(Value::as_array);
    let parts = parts.map_or_else(|| std::slice::from_ref(expression), Vec::as_slice);
    let of = |part: &Value| {
        let payload = part.get("payload")?;
        Some(match payload.get("protocol").and_then(Value::as_str) {
            Some("ip") => "ipv4_addr",
            Some("ip6") => "ipv6_addr",
            Some(_) => return None,
            None => "integer",
        })
    };
    parts.iter().filter_map(of).map(str::to_owned).collect()
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

/// The rules of a chain that is not ours; those that jump to `accept_chain` are.
pub fn foreign_rules<'v>(listed: impl Iterator<Item = &'v Value>, accept_chain: &str) -> ForeignRules {
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

/// A prefix as nft prints it: a single address or `prefix`.
#[must_use]
pub fn prefix(value: &Value) -> Option<IpNet> {
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
///
/// # Errors
/// If `json` is not a listing.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_is_read_with_all_that_it_holds() {
        let json = json!({"nftables": [
            {"metainfo": {"json_schema_version": 1}},
            {"table": {"family": "inet", "name": "t"}},
            {"set": {"name": "s", "type": ["ipv4_addr", "ifname"], "flags": ["interval"], "elem": [1, 2]}},
            {"set": {"name": "i", "type": "ifname"}},
            {"map": {"name": "m", "type": "ipv4_addr", "map": "verdict"}},
            {"counter": {"name": "c", "packets": 3, "bytes": 90}},
            {"rule": {"chain": "forward", "comment": "one", "expr": []}},
            {"chain": {"name": "forward", "type": "filter", "hook": "forward", "prio": -5, "policy": "drop"}},
            {"rule": {"chain": "forward", "expr": []}},
            {"chain": {"name": "empty"}},
        ]});
        let table = TableListing::parse(json.to_string().as_bytes()).unwrap();
        let forward = &table.chains["forward"];
        assert_eq!(forward.base, Some(("filter".to_owned(), "forward".to_owned(), -5)));
        assert_eq!((forward.policy_drop, &forward.comments), (true, &vec![Some("one".to_owned()), None]));
        assert_eq!(table.chains["empty"], ListedChain::default());
        let (set, interfaces) = (&table.sets["s"], &table.sets["i"]);
        assert_eq!((set.types.len(), set.interval, set.elements.len()), (2, true, 2));
        assert_eq!((interfaces.types.as_slice(), interfaces.interval), (&["ifname".to_owned()][..], false));
        assert_eq!((table.maps.len(), table.counters["c"]), (1, Counter { packets: 3, bytes: 90 }));
        assert!(TableListing::parse(b"{}").is_err() && TableListing::parse(b"nothing").is_err());
    }

    #[test]
    fn only_addresses_and_prefixes_are_prefixes() {
        let of = |value: Value| prefix(&value).map(|net| net.to_string());
        assert_eq!(of(json!("10.0.0.1")).as_deref(), Some("10.0.0.1/32"));
        assert_eq!(of(json!({"prefix": {"addr": "fd00::", "len": 8}})).as_deref(), Some("fd00::/8"));
        assert_eq!((of(json!({"range": ["10.0.0.1", "10.0.0.9"]})), of(json!(7))), (None, None));
    }
}
