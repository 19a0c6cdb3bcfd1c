//! What becomes of a packet in the chains of nftables, by their listing: rule after rule, as the kernel does it, for one
//! packet that begins a flow. Where a condition cannot be read, nothing is claimed.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// Chains that jump deeper than this the kernel does not take.
const DEEPEST: usize = 16;

/// The first packet of a flow.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// As nft calls it: `udp`.
    pub(super) protocol: &'static str,
    /// `None`: any.
    pub(super) port: Option<u16>,
    /// `None`: it may come in by any.
    pub(super) comes_by: Option<String>,
    /// `None`: it may leave by any.
    pub(super) leaves_by: Option<String>,
}

/// A chain that does not let a packet through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dropped {
    /// Family and name.
    pub(super) table: String,
    /// The base chain at the hook.
    pub(super) chain: String,
    /// The chain whose rule or policy drops it.
    pub(super) at: String,
    /// Chains that the base chain jumps to: whose it is can be told by them.
    pub(super) jumps: Vec<String>,
}

/// `nft -j list ruleset`.
pub(super) struct Ruleset(Value);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Unknown,
    Yes,
}

enum Fate {
    Accepted,
    Dropped(String),
    /// The end of the chain, or a rule that returns.
    Goes,
    /// A rule that cannot be read may have let it through.
    Unknown,
}

impl Ruleset {
    pub(super) const fn new(listing: Value) -> Self {
        Self(listing)
    }

    /// The chains at `hook` that drop `packet`, but for those of the tables that are `ours`.
    pub(super) fn dropping(&self, hook: &str, packet: &Packet, ours: &[&str]) -> Vec<Dropped> {
        let family = if packet.source.is_ipv4() { "ip" } else { "ip6" };
        self.items("chain")
            .filter(|chain| chain["hook"] == hook && chain["type"] == "filter")
            .filter(|chain| chain["family"] == family || chain["family"] == "inet")
            .filter(|chain| !ours.iter().any(|table| chain["table"] == *table))
            .filter_map(|chain| {
                let (table, name) = (table(chain), chain["name"].as_str()?);
                let at = match self.walk(&table, name, packet, 0) {
                    Fate::Dropped(at) => at,
                    Fate::Goes if chain["policy"] == "drop" => name.to_owned(),
                    Fate::Goes | Fate::Accepted | Fate::Unknown => return None,
                };
                let jumps = self.rules(&table, name).flat_map(expressions);
                let jumps = jumps.filter_map(|expression| target(expression).map(str::to_owned)).collect();
                Some(Dropped { table, chain: name.to_owned(), at, jumps })
            })
            .collect()
    }

    fn items(&self, kind: &'static str) -> impl Iterator<Item = &Value> {
        self.0["nftables"].as_array().into_iter().flatten().filter_map(move |item| item.get(kind))
    }

    fn rules<'r>(&'r self, of: &'r str, chain: &'r str) -> impl Iterator<Item = &'r Value> {
        self.items("rule").filter(move |rule| rule["chain"] == chain && table(rule) == of)
    }

    fn walk(&self, table: &str, chain: &str, packet: &Packet, depth: usize) -> Fate {
        if depth > DEEPEST {
            return Fate::Unknown;
        }
        let mut unknown = false;
        for rule in self.rules(table, chain) {
            let truth = expressions(rule).map(|expression| packet.meets(expression)).min().unwrap_or(Truth::Yes);
            if truth == Truth::No {
                continue;
            }
            for expression in expressions(rule) {
                let fate = match target(expression) {
                    Some(next) => self.walk(table, next, packet, depth + 1),
                    None if expression.get("accept").is_some() => Fate::Accepted,
                    None if drops(expression) => Fate::Dropped(chain.to_owned()),
                    None if expression.get("return").is_some() && truth == Truth::Yes && !unknown => return Fate::Goes,
                    None => Fate::Goes,
                };
                match (fate, truth) {
                    (Fate::Goes, Truth::Yes) if expression.get("goto").is_some() => {
                        return if unknown { Fate::Unknown } else { Fate::Goes };
                    }
                    (Fate::Goes, _) => {}
                    (fate, Truth::Yes) if !unknown => return fate,
                    // Either way it ends here, or ended before.
                    (Fate::Accepted, Truth::Yes) => return Fate::Accepted,
                    (Fate::Dropped(_), Truth::Unknown) => {}
                    _ => unknown = true,
                }
            }
        }
        if unknown { Fate::Unknown } else { Fate::Goes }
    }
}

/// Family and name of an item's table.
fn table(item: &Value) -> String {
    format!("{} {}", item["family"].as_str().unwrap_or_default(), item["table"].as_str().unwrap_or_default())
}

fn expressions(rule: &Value) -> impl Iterator<Item = &Value> {
    rule["expr"].as_array().into_iter().flatten()
}

/// Where a rule jumps or goes to.
fn target(expression: &Value) -> Option<&str> {
    expression.get("jump").or_else(|| expression.get("goto"))?["target"].as_str()
}

fn drops(expression: &Value) -> bool {
    let xt = expression.get("xt").is_some_and(|xt| xt["type"] == "target" && xt["name"] == "REJECT");
    xt || expression.get("drop").is_some() || expression.get("reject").is_some()
}

impl Packet {
    /// Whether it meets a rule's condition; what is no condition is met.
    fn meets(&self, expression: &Value) -> Truth {
        if let Some(xt) = expression.get("xt").filter(|xt| xt["type"] == "match") {
            return match xt["name"].as_str() {
                Some("comment") => Truth::Yes,
                // nft does not show which states; hardly a firewall asks for new flows so but beside another condition.
                Some("conntrack" | "state") => Truth::No,
                _ => Truth::Unknown,
            };
        }
        if expression.get("vmap").is_some() {
            return Truth::Unknown;
        }
        let Some(condition) = expression.get("match") else { return Truth::Yes };
        let equal = self.compare(&condition["left"], &condition["right"]);
        match (condition["op"].as_str(), equal) {
            (Some("==" | "in"), equal) => equal,
            (Some("!="), Truth::Yes) => Truth::No,
            (Some("!="), Truth::No) => Truth::Yes,
            _ => Truth::Unknown,
        }
    }

    fn compare(&self, left: &Value, right: &Value) -> Truth {
        if left.pointer("/ct/key").is_some_and(|key| key == "state") {
            return any(right, &|value| truth(value == "new"));
        }
        if let Some(key) = left.pointer("/meta/key").and_then(Value::as_str) {
            let interface = |own: &Option<String>| {
                let Some(own) = own else { return Truth::Unknown };
                any(right, &|value| match value.as_str() {
                    Some(name) => truth(name.strip_suffix('*').map_or(name == own, |start| own.starts_with(start))),
                    None => Truth::Unknown,
                })
            };
            return match key {
                "iif" | "iifname" => interface(&self.comes_by),
                "oif" | "oifname" => interface(&self.leaves_by),
                "l4proto" => any(right, &|value| truth(value == self.protocol)),
                "nfproto" => any(right, &|value| truth(value == if self.source.is_ipv4() { "ipv4" } else { "ipv6" })),
                _ => Truth::Unknown,
            };
        }
        let part = |name: &str| left.pointer(&format!("/payload/{name}")).and_then(Value::as_str);
        let family = if self.source.is_ipv4() { "ip" } else { "ip6" };
        match (part("protocol"), part("field")) {
            (Some("ip" | "ip6"), Some("saddr" | "daddr" | "protocol" | "nexthdr"))
                if part("protocol") != Some(family) =>
            {
                Truth::No
            }
            (Some("ip" | "ip6"), Some("saddr")) => any(right, &|value| holds(value, self.source)),
            (Some("ip" | "ip6"), Some("daddr")) => any(right, &|value| holds(value, self.destination)),
            (Some("ip" | "ip6"), Some("protocol" | "nexthdr")) => any(right, &|value| truth(value == self.protocol)),
            (Some(of), Some(_)) if matches!(of, "tcp" | "udp" | "icmp" | "icmpv6" | "sctp") && of != self.protocol => {
                Truth::No
            }
            (Some("udp" | "tcp" | "th"), Some("dport")) => match self.port {
                Some(port) => any(right, &|value| truth(value.as_u64() == Some(port.into()) || in_range(value, port))),
                None => Truth::Unknown,
            },
            _ => Truth::Unknown,
        }
    }
}

const fn truth(holds: bool) -> Truth {
    if holds { Truth::Yes } else { Truth::No }
}

/// Whether one of the values of a set, a list or a value alone is met.
fn any(right: &Value, met: &dyn Fn(&Value) -> Truth) -> Truth {
    let named = right.as_str().is_some_and(|name| name.starts_with('@'));
    let many = right.get("set").unwrap_or(right).as_array();
    match many {
        _ if named => Truth::Unknown,
        Some(many) => many.iter().map(met).max().unwrap_or(Truth::No),
        None => met(right),
    }
}

fn in_range(value: &Value, port: u16) -> bool {
    let ends = value["range"].as_array().map(|ends| ends.iter().map(Value::as_u64).collect::<Vec<_>>());
    matches!(ends.as_deref(), Some([Some(from), Some(to)]) if (*from..=*to).contains(&port.into()))
}

fn holds(value: &Value, address: IpAddr) -> Truth {
    let parse = |value: &Value| value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
    if let Some(prefix) = value.get("prefix") {
        let length = prefix["len"].as_u64().and_then(|length| u8::try_from(length).ok());
        let net = parse(&prefix["addr"]).zip(length).and_then(|(addr, length)| IpNet::new(addr, length).ok());
        return net.map_or(Truth::Unknown, |net| truth(net.contains(&address)));
    }
    if let Some([from, to]) = value["range"].as_array().map(Vec::as_slice) {
        return match (parse(from), parse(to)) {
            (Some(from), Some(to)) => truth((from..=to).contains(&address)),
            _ => Truth::Unknown,
        };
    }
    parse(value).map_or(Truth::Unknown, |one| truth(one == address))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn packet() -> Packet {
        Packet {
            source: "198.51.100.7".parse().unwrap(),
            destination: "192.0.2.1".parse().unwrap(),
            protocol: "udp",
            port: Some(51820),
            comes_by: Some("eth0".to_owned()),
            leaves_by: None,
        }
    }

    /// What `nft` itself lists of a table with these rules, in a namespace of its own.
    fn listed(rules: &str) -> Ruleset {
        let script = format!("nft -f - <<'.' && nft -j list ruleset\n{rules}\n.");
        let output = Command::new("unshare").args(["-n", "sh", "-c", &script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ruleset::new(serde_json::from_slice(&output.stdout).unwrap())
    }

    fn input(rules: &str) -> Vec<String> {
        let ruleset = listed(&format!(
            "table inet t {{\nchain sub {{ }}\nchain in {{ type filter hook input priority 0; {rules}\n}}\n}}"
        ));
        ruleset.dropping("input", &packet(), &[]).into_iter().map(|dropped| dropped.at).collect()
    }

    #[test]
    fn a_new_flow_is_followed_through_the_rules() {
        let dropped = ["in"].map(str::to_owned).to_vec();
        for rules in [
            "policy drop;",
            "policy drop; ct state established,related accept; tcp dport 22 accept;",
            "udp dport 51820 drop;",
            "iifname \"eth0\" ip saddr 198.51.100.0/24 reject;",
            "iifname \"eth*\" udp dport { 53, 50000-52000 } counter log prefix \"no \" drop;",
            "iifname != \"lo\" drop;",
            "meta l4proto { tcp, udp } drop;",
            "jump sub; drop;",
            "ip6 saddr ::/0 accept; drop;",
        ] {
            assert_eq!(input(rules), dropped, "{rules}");
        }
        for rules in [
            "",
            "policy drop; udp dport 51820-51821 accept;",
            "policy drop; ip saddr 198.51.100.0/24 accept;",
            "iifname \"eth1\" drop;",
            "ct state invalid drop;",
            "udp dport 51820 accept; drop;",
            "tcp dport 51820 drop;",
            // It cannot be read: nothing is claimed.
            "policy drop; meta mark 7 accept;",
        ] {
            assert_eq!(input(rules), Vec::<String>::new(), "{rules}");
        }
    }

    #[test]
    fn chains_that_are_jumped_to_count_and_the_other_family_does_not() {
        let ruleset = listed(
            "table ip t {
                 chain deep { udp dport 51820 drop; }
                 chain ok { return; }
                 chain in { type filter hook input priority 0; jump ok; jump deep; accept; }
             }
             table ip6 u {
                 chain in { type filter hook input priority 0; policy drop; }
             }
             table inet ours {
                 chain in { type filter hook input priority 0; policy drop; }
             }",
        );
        let dropped = ruleset.dropping("input", &packet(), &["ours"]);
        assert_eq!(dropped.len(), 1, "{dropped:?}");
        assert_eq!((dropped[0].table.as_str(), dropped[0].at.as_str()), ("ip t", "deep"));
        assert_eq!(dropped[0].jumps, ["ok", "deep"]);
    }
}
