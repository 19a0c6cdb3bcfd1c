//! Chains at the input hook that drop what no rule takes, where no rule speaks of the tunnel's port.

use std::process::Command;

use serde_json::Value;

use crate::{
    api::{Finding, Severity},
    kernel::{Owner, has_filter_table, nft::takes_all, owner},
};

/// What keeps out, or may, what comes to the UDP port `port` and the one after; in the network namespace of this thread.
/// Whether another rule lets it in for a reason of its own, as for all of a neighbour's packets, is not followed.
#[must_use]
pub fn findings(port: u16) -> Vec<Finding> {
    let listed = Command::new("nft").args(["-j", "list", "ruleset"]).output();
    let document = listed.ok().and_then(|output| serde_json::from_slice(&output.stdout).ok()).unwrap_or_default();
    let mut closed = closed_chains(&document, port);
    for (tool, file) in [("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")] {
        // Never without a table: asking would load it.
        let listed = has_filter_table(file).then(|| Command::new(tool).args(["-w", "5", "-S"]).output());
        if let Some(Ok(output)) = listed
            && closes(&String::from_utf8_lossy(&output.stdout), port)
        {
            let remedy = format!("{tool} -I INPUT -p udp --dport {port}:{} -j ACCEPT", port + 1);
            closed.push(Closed { table: format!("{tool} filter"), chain: "INPUT".to_owned(), remedy });
        }
    }
    let cause = |closed: &Closed| {
        format!(
            "chain {} of table {} drops what comes in, and no rule there speaks of UDP port {port}",
            closed.chain, closed.table
        )
    };
    let finding =
        |closed: Closed| Finding::new(Severity::Warning, "udp_port_may_be_closed", cause(&closed), closed.remedy);
    closed.into_iter().map(finding).collect()
}

/// A chain that may keep the port closed.
#[derive(Debug, PartialEq, Eq)]
struct Closed {
    /// Family and name.
    table: String,
    chain: String,
    remedy: String,
}

/// Of `nft -j list ruleset`: those at the input hook that drop at their end, where no rule of the table has the port.
fn closed_chains(document: &Value, port: u16) -> Vec<Closed> {
    let items = || document["nftables"].as_array().into_iter().flatten();
    let text = |item: &Value, key: &str| item[key].as_str().unwrap_or_default().to_owned();
    let table = |item: &Value| format!("{} {}", text(item, "family"), text(item, "table"));
    let mut closed = Vec::new();
    for chain in items().filter_map(|item| item.get("chain")).filter(|chain| chain["hook"] == "input") {
        let (of, name) = (table(chain), text(chain, "name"));
        let rules: Vec<&Value> = items().filter_map(|item| item.get("rule")).filter(|rule| table(rule) == of).collect();
        let own = || rules.iter().filter(|rule| rule["chain"] == name.as_str());
        let expressions = |rule: &Value| rule["expr"].as_array().cloned().unwrap_or_default();
        let drops = chain["policy"] == "drop" || own().next_back().is_some_and(|rule| takes_all(&expressions(rule)));
        let speaks = rules.iter().any(|rule| expressions(rule).iter().any(|expression| has_port(expression, port)));
        if !drops || speaks {
            continue;
        }
        let jumps: Vec<String> = own()
            .flat_map(|rule| expressions(rule))
            .filter_map(|expression| Some(expression.get("jump")?["target"].as_str()?.to_owned()))
            .collect();
        let last = port + 1;
        let remedy = match owner(&text(chain, "table"), &jumps) {
            Some(Owner::Firewalld) => {
                format!("firewall-cmd --permanent --add-port={port}-{last}/udp && firewall-cmd --reload")
            }
            Some(Owner::Ufw) => format!("ufw allow {port}:{last}/udp"),
            Some(Owner::Docker) | None => format!("nft insert rule {of} {name} udp dport {port}-{last} accept"),
        };
        closed.push(Closed { table: of, chain: name, remedy });
    }
    closed
}

/// Whether an expression compares the destination port with something that holds `port`. What nft cannot show, as
/// iptables' multiport, may.
fn has_port(expression: &Value, port: u16) -> bool {
    fn holds(value: &Value, port: u64) -> bool {
        match value {
            Value::Number(number) => number.as_u64() == Some(port),
            Value::Array(all) => all.iter().any(|value| holds(value, port)),
            Value::Object(map) => match map.get("range").and_then(Value::as_array).map(Vec::as_slice) {
                Some([from, to]) => {
                    from.as_u64().is_some_and(|from| from <= port) && to.as_u64().is_some_and(|to| port <= to)
                }
                _ => map.values().any(|value| holds(value, port)),
            },
            _ => false,
        }
    }
    if expression.pointer("/xt/type").is_some_and(|kind| kind == "match") {
        return true;
    }
    let compared = |key: &str| expression.get(key).filter(|found| found.to_string().contains("\"dport\""));
    [compared("match"), compared("vmap")].into_iter().flatten().any(|found| holds(found, port.into()))
}

/// Whether what `iptables -S` printed drops at the end of INPUT and has no rule with the port.
fn closes(listing: &str, port: u16) -> bool {
    let input: Vec<&str> = listing.lines().filter(|line| line.starts_with("-A INPUT")).collect();
    let drops = listing.lines().any(|line| line.trim() == "-P INPUT DROP")
        || input
            .last()
            .is_some_and(|line| ["-A INPUT -j DROP", "-A INPUT -j REJECT"].iter().any(|rule| line.starts_with(rule)));
    let holds = |ports: &str| {
        ports.split(',').any(|part| {
            let (from, to) = part.split_once(':').unwrap_or((part, part));
            matches!((from.parse::<u16>(), to.parse::<u16>()), (Ok(from), Ok(to)) if (from..=to).contains(&port))
        })
    };
    let words: Vec<&str> = listing.split_whitespace().collect();
    drops && !words.windows(2).any(|pair| matches!(pair, ["--dport" | "--dports", ports] if holds(ports)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chain(table: &str, hook: &str, policy: &str) -> Value {
        json!({"chain": {"family": "inet", "table": table, "name": "in", "hook": hook, "policy": policy}})
    }

    fn rule(table: &str, expressions: Value) -> Value {
        json!({"rule": {"family": "inet", "table": table, "chain": "in", "expr": expressions}})
    }

    fn dport(right: Value) -> Value {
        json!({"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": right}})
    }

    #[test]
    fn a_chain_that_drops_all_but_other_ports_is_named() {
        let accept = json!({"accept": null});
        let document = json!({"nftables": [
            chain("other-port", "input", "drop"), rule("other-port", json!([dport(json!({"set": [5182, 22]})), accept])),
            chain("port", "input", "drop"), rule("port", json!([dport(json!({"set": [22, 51820]})), accept])),
            chain("range", "input", "drop"), rule("range", json!([dport(json!({"range": [51000, 52000]})), accept])),
            chain("open", "input", "accept"),
            chain("forward", "forward", "drop"),
            chain("firewalld", "input", "accept"),
            rule("firewalld", json!([{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}])),
            chain("hidden", "input", "drop"), rule("hidden", json!([{"xt": {"type": "match", "name": "multiport"}}, accept])),
        ]});
        let closed = closed_chains(&document, 51820);
        let remedies: Vec<&str> = closed.iter().map(|closed| closed.remedy.as_str()).collect();
        assert_eq!(
            remedies,
            [
                "nft insert rule inet other-port in udp dport 51820-51821 accept",
                "firewall-cmd --permanent --add-port=51820-51821/udp && firewall-cmd --reload",
            ]
        );
    }

    #[test]
    fn the_old_tables_are_read() {
        let closed = "-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n";
        assert!(closes(closed, 51820));
        assert!(closes(
            "-P INPUT ACCEPT\n-A INPUT -i lo -j ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n",
            51820
        ));
        assert!(!closes(&format!("{closed}-A INPUT -p udp -m udp --dport 51820:51821 -j ACCEPT\n"), 51820));
        assert!(!closes(&format!("{closed}-A INPUT -p udp -m multiport --dports 53,51820 -j ACCEPT\n"), 51820));
        assert!(!closes("-P INPUT ACCEPT\n", 51820));
    }
}
