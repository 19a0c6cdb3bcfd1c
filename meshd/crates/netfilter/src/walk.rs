//! Follows a packet through nftables chains, by their listing: rule after rule, like the kernel, for one packet that
//! begins a flow. If a condition is unreadable, there is no result. iptables rules have the same form: see
//! `foreign/iptables.rs` of `kernel`.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

/// Chains that jump deeper than this the kernel does not take.
const DEEPEST: usize = 16;

/// The first packet of a flow.
#[derive(Debug, Clone)]
pub struct ProbePacket {
    /// From where.
    pub source: IpAddr,
    /// To where.
    pub destination: IpAddr,
    /// Whether source and destination are addresses of this machine.
    pub local: [bool; 2],
    /// As nft calls it: `udp`.
    pub protocol: &'static str,
    /// The destination port; `None`: any.
    pub port: Option<u16>,
    /// `None`: it may come in by any.
    pub comes_by: Option<String>,
    /// `None`: it may leave by any.
    pub leaves_by: Option<String>,
    /// The packet mark that it has before any rule.
    pub mark: u32,
    /// Whether conntrack sees it.
    pub tracked: bool,
}

/// A chain that does not let a packet through as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Family and name.
    pub table: String,
    /// The base chain at the hook.
    pub chain: String,
    /// The chain whose rule or policy drops or rewrites it.
    pub at: String,
    /// Chains that the base chain jumps to, which reveal its owner.
    pub jumps: Vec<String>,
}

/// Chains and rules, as the items of `nft -j list ruleset`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListedRuleset(Vec<Value>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Certainty {
    No,
    Unknown,
    Yes,
}

enum Fate {
    Accepted,
    Dropped(String),
    /// Its source or destination, or the mark where that is looked for, is another one behind this rule.
    Rewritten(String),
    /// The end of the chain, or a rule that returns.
    Goes,
    /// A rule that cannot be read may have let it through.
    Unknown,
}

/// The effect to look for on a packet's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seeks {
    /// Rules that drop it or give it another address.
    Ends,
    /// Rules that give it another mark, in base chains before this priority.
    Marks { before: i64 },
}

impl ListedRuleset {
    /// A ruleset from the items of `nft -j list ruleset`.
    pub const fn new(items: Vec<Value>) -> Self {
        Self(items)
    }

    /// The rules that packets meet from the base chains that are `wanted` on, and nothing else.
    pub fn reachable(self, wanted: impl Fn(&Value) -> bool) -> Self {
        let mut reached: BTreeSet<(String, String)> = BTreeSet::new();
        let place = |item: &Value, name: &str| (table(item), item[name].as_str().unwrap_or_default().to_owned());
        let mut queue: Vec<_> = self.items("chain").filter(|chain| wanted(chain)).map(|c| place(c, "name")).collect();
        while let Some((table, chain)) = queue.pop() {
            let next = self.rules(&table, &chain).flat_map(expressions).flat_map(targets);
            queue.extend(next.map(|to| (table.clone(), to.to_owned())).filter(|next| !reached.contains(next)));
            reached.insert((table, chain));
        }
        let keeps = |item: &Value| {
            item.get("chain").is_some_and(|chain| reached.contains(&place(chain, "name")))
                || item.get("rule").is_some_and(|rule| reached.contains(&place(rule, "chain")))
        };
        Self(self.0.into_iter().filter(|item| keeps(item)).collect())
    }

    /// The chains at `hook` that drop `packet`, but for those of the tables that are `ours`.
    pub fn dropping(&self, hook: &str, packet: &ProbePacket, ours: &[&str]) -> Vec<Taken> {
        self.taking(&["filter", "route"], hook, packet, ours, Seeks::Ends)
    }

    /// The chains at `hook`, before this priority, that give `packet` another mark.
    pub fn remarking(&self, hook: &str, before: i64, packet: &ProbePacket, ours: &[&str]) -> Vec<Taken> {
        self.taking(&["filter", "route"], hook, packet, ours, Seeks::Marks { before })
    }

    /// The chains behind routing that give `packet` another source, but for those of the tables that are `ours`.
    pub fn translating(&self, packet: &ProbePacket, ours: &[&str]) -> Vec<Taken> {
        self.taking(&["nat"], "postrouting", packet, ours, Seeks::Ends)
    }

    fn taking(&self, kinds: &[&str], hook: &str, packet: &ProbePacket, ours: &[&str], seeks: Seeks) -> Vec<Taken> {
        let family = if packet.source.is_ipv4() { "ip" } else { "ip6" };
        self.items("chain")
            .filter(|chain| chain["hook"] == hook && kinds.iter().any(|kind| chain["type"] == *kind))
            .filter(|chain| chain["family"] == family || chain["family"] == "inet")
            .filter(|chain| !ours.iter().any(|table| chain["table"] == *table))
            .filter(|chain| match seeks {
                Seeks::Ends => true,
                Seeks::Marks { before } => chain["prio"].as_i64().is_some_and(|priority| priority < before),
            })
            .filter_map(|chain| {
                let (table, name) = (table(chain), chain["name"].as_str()?);
                let at = match (self.walk(&table, name, packet, seeks, 0), seeks) {
                    (Fate::Rewritten(at), _) | (Fate::Dropped(at), Seeks::Ends) => at,
                    (Fate::Goes, Seeks::Ends) if chain["policy"] == "drop" => name.to_owned(),
                    (Fate::Dropped(_) | Fate::Goes | Fate::Accepted | Fate::Unknown, _) => return None,
                };
                let jumps = self.rules(&table, name).flat_map(expressions);
                let jumps = jumps.filter_map(|expression| target(expression).map(str::to_owned)).collect();
                Some(Taken { table, chain: name.to_owned(), at, jumps })
            })
            .collect()
    }

    /// The items of a kind: `chain`, `rule`.
    pub fn items(&self, kind: &'static str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter_map(move |item| item.get(kind))
    }

    /// The rules of a chain, in order; `of` is the table as [`table`] writes it.
    pub fn rules<'r>(&'r self, of: &'r str, chain: &'r str) -> impl Iterator<Item = &'r Value> {
        self.items("rule").filter(move |rule| rule["chain"] == chain && table(rule) == of)
    }

    fn walk(&self, table: &str, chain: &str, packet: &ProbePacket, seeks: Seeks, depth: usize) -> Fate {
        if depth > DEEPEST {
            return Fate::Unknown;
        }
        let mut unknown = false;
        for rule in self.rules(table, chain) {
            let truth = expressions(rule).map(|expression| packet.meets(expression)).min().unwrap_or(Certainty::Yes);
            if truth == Certainty::No {
                continue;
            }
            for expression in expressions(rule) {
                let fate = match target(expression) {
                    Some(next) => self.walk(table, next, packet, seeks, depth + 1),
                    None if expression.get("accept").is_some() => Fate::Accepted,
                    None if drops(expression) => Fate::Dropped(chain.to_owned()),
                    None if rewrites(expression) => Fate::Rewritten(chain.to_owned()),
                    None if seeks != Seeks::Ends && packet.is_remarked(expression) => Fate::Rewritten(chain.to_owned()),
                    None if expression.get("return").is_some() && truth == Certainty::Yes && !unknown => {
                        return Fate::Goes;
                    }
                    None => Fate::Goes,
                };
                match (fate, truth) {
                    (Fate::Goes, Certainty::Yes) if expression.get("goto").is_some() => {
                        return if unknown { Fate::Unknown } else { Fate::Goes };
                    }
                    (Fate::Goes, _) => {}
                    (fate, Certainty::Yes) if !unknown => return fate,
                    // Either way it ends here, or ended before.
                    (Fate::Accepted, Certainty::Yes) => return Fate::Accepted,
                    (Fate::Dropped(_) | Fate::Rewritten(_), Certainty::Unknown) => {}
                    _ => unknown = true,
                }
            }
        }
        if unknown { Fate::Unknown } else { Fate::Goes }
    }
}

/// Family and name of an item's table.
pub fn table(item: &Value) -> String {
    format!("{} {}", item["family"].as_str().unwrap_or_default(), item["table"].as_str().unwrap_or_default())
}

/// The expressions of a rule, in order.
pub fn expressions(rule: &Value) -> impl Iterator<Item = &Value> {
    rule["expr"].as_array().into_iter().flatten()
}

/// Where a rule jumps or goes to, by a verdict of its own or one of a map's.
fn targets(expression: &Value) -> Vec<&str> {
    let direct = target(expression).into_iter();
    let map = expression.pointer("/vmap/data/set").and_then(Value::as_array).into_iter().flatten();
    direct.chain(map.filter_map(|pair| target(pair.get(1)?))).collect()
}

/// Where a rule jumps or goes to.
fn target(expression: &Value) -> Option<&str> {
    expression.get("jump").or_else(|| expression.get("goto"))?["target"].as_str()
}

fn drops(expression: &Value) -> bool {
    let xt = expression.get("xt").is_some_and(|xt| xt["type"] == "target" && xt["name"] == "REJECT");
    xt || expression.get("drop").is_some() || expression.get("reject").is_some()
}

fn rewrites(expression: &Value) -> bool {
    let xt = expression.get("xt").filter(|xt| xt["type"] == "target");
    let xt = xt.and_then(|xt| xt["name"].as_str());
    xt.is_some_and(|name| matches!(name, "MASQUERADE" | "SNAT" | "NETMAP" | "DNAT" | "REDIRECT"))
        || ["masquerade", "snat", "dnat", "redirect"].iter().any(|kind| expression.get(*kind).is_some())
}

impl ProbePacket {
    /// Whether it has another mark behind this expression; a value that cannot be read claims nothing.
    fn is_remarked(&self, expression: &Value) -> bool {
        let Some(mangle) = expression.get("mangle") else { return false };
        let sets_mark = mangle.pointer("/key/meta/key").is_some_and(|key| key == "mark");
        sets_mark && self.mark_of(&mangle["value"]).is_some_and(|mark| mark != self.mark)
    }

    /// The new mark: a number, or an expression over the old mark.
    fn mark_of(&self, value: &Value) -> Option<u32> {
        if let Some(number) = value.as_u64() {
            return u32::try_from(number).ok();
        }
        if value.pointer("/meta/key").is_some_and(|key| key == "mark") {
            return Some(self.mark);
        }
        let (operator, operands) = value.as_object()?.iter().next()?;
        let mut operands = operands.as_array()?.iter();
        let first = self.mark_of(operands.next()?)?;
        operands.try_fold(first, |mark, operand| {
            let operand = self.mark_of(operand)?;
            match operator.as_str() {
                "&" => Some(mark & operand),
                "|" => Some(mark | operand),
                "^" => Some(mark ^ operand),
                _ => None,
            }
        })
    }

    /// Whether the packet meets a rule's condition; other statements count as met.
    fn meets(&self, expression: &Value) -> Certainty {
        if let Some(xt) = expression.get("xt").filter(|xt| xt["type"] == "match") {
            return match xt["name"].as_str() {
                Some("comment") => Certainty::Yes,
                // nft does not show which states; hardly a firewall asks for new flows so but beside another condition.
                Some("conntrack" | "state") => Certainty::No,
                _ => Certainty::Unknown,
            };
        }
        if expression.get("vmap").is_some() {
            return Certainty::Unknown;
        }
        let Some(condition) = expression.get("match") else { return Certainty::Yes };
        let equal = self.compare(&condition["left"], &condition["right"]);
        match (condition["op"].as_str(), equal) {
            (Some("==" | "in"), equal) => equal,
            (Some("!="), Certainty::Yes) => Certainty::No,
            (Some("!="), Certainty::No) => Certainty::Yes,
            _ => Certainty::Unknown,
        }
    }

    fn compare(&self, left: &Value, right: &Value) -> Certainty {
        if left.pointer("/ct/key").is_some_and(|key| key == "state") {
            return any(right, &|value| truth(value == if self.tracked { "new" } else { "untracked" }));
        }
        if left.pointer("/ct/key").is_some_and(|key| key == "status") {
            // Nothing has been rewritten yet, and nothing answered.
            return Certainty::No;
        }
        if let Some(fib) = left.get("fib").filter(|fib| fib["result"] == "type") {
            let of = |end: &str| fib["flags"].as_array().is_some_and(|flags| flags.len() == 1 && flags[0] == end);
            let local = match (of("saddr"), of("daddr")) {
                (true, _) => self.local[0],
                (_, true) => self.local[1],
                _ => return Certainty::Unknown,
            };
            return any(right, &|value| truth(value == if local { "local" } else { "unicast" }));
        }
        let masked = left["&"].as_array().map(Vec::as_slice);
        if let Some([meta, mask]) = masked
            && meta.pointer("/meta/key").is_some_and(|key| key == "mark")
        {
            let Some(mask) = mask.as_u64() else { return Certainty::Unknown };
            return any(right, &|value| {
                value.as_u64().map_or(Certainty::Unknown, |v| truth(u64::from(self.mark) & mask == v))
            });
        }
        if let Some(key) = left.pointer("/meta/key").and_then(Value::as_str) {
            let interface = |own: &Option<String>| {
                let Some(own) = own else { return Certainty::Unknown };
                any(right, &|value| match value.as_str() {
                    Some(name) => truth(name.strip_suffix('*').map_or(name == own, |start| own.starts_with(start))),
                    None => Certainty::Unknown,
                })
            };
            return match key {
                "iif" | "iifname" => interface(&self.comes_by),
                "oif" | "oifname" => interface(&self.leaves_by),
                "mark" => {
                    any(right, &|value| value.as_u64().map_or(Certainty::Unknown, |v| truth(u64::from(self.mark) == v)))
                }
                "l4proto" => any(right, &|value| truth(value == self.protocol)),
                "nfproto" => any(right, &|value| truth(value == if self.source.is_ipv4() { "ipv4" } else { "ipv6" })),
                _ => Certainty::Unknown,
            };
        }
        let part = |name: &str| left.pointer(&format!("/payload/{name}")).and_then(Value::as_str);
        let family = if self.source.is_ipv4() { "ip" } else { "ip6" };
        match (part("protocol"), part("field")) {
            (Some("ip" | "ip6"), Some("saddr" | "daddr" | "protocol" | "nexthdr"))
                if part("protocol") != Some(family) =>
            {
                Certainty::No
            }
            (Some("ip" | "ip6"), Some("saddr")) => any(right, &|value| holds(value, self.source)),
            (Some("ip" | "ip6"), Some("daddr")) => any(right, &|value| holds(value, self.destination)),
            (Some("ip" | "ip6"), Some("protocol" | "nexthdr")) => any(right, &|value| truth(value == self.protocol)),
            (Some(of), Some(_)) if matches!(of, "tcp" | "udp" | "icmp" | "icmpv6" | "sctp") && of != self.protocol => {
                Certainty::No
            }
            (Some("udp" | "tcp" | "th"), Some("dport")) => match self.port {
                Some(port) => any(right, &|value| truth(value.as_u64() == Some(port.into()) || in_range(value, port))),
                None => Certainty::Unknown,
            },
            _ => Certainty::Unknown,
        }
    }
}

const fn truth(holds: bool) -> Certainty {
    if holds { Certainty::Yes } else { Certainty::No }
}

/// Whether one of the values of a set, a list or a value alone is met.
fn any(right: &Value, met: &dyn Fn(&Value) -> Certainty) -> Certainty {
    let named = right.as_str().is_some_and(|name| name.starts_with('@'));
    let many = right.get("set").unwrap_or(right).as_array();
    match many {
        _ if named => Certainty::Unknown,
        Some(many) => many.iter().map(met).max().unwrap_or(Certainty::No),
        None => met(right),
    }
}

fn in_range(value: &Value, port: u16) -> bool {
    let ends = value["range"].as_array().map(|ends| ends.iter().map(Value::as_u64).collect::<Vec<_>>());
    matches!(ends.as_deref(), Some([Some(from), Some(to)]) if (*from..=*to).contains(&port.into()))
}

fn holds(value: &Value, address: IpAddr) -> Certainty {
    let parse = |value: &Value| value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
    if let Some(prefix) = value.get("prefix") {
        let length = prefix["len"].as_u64().and_then(|length| u8::try_from(length).ok());
        let net = parse(&prefix["addr"]).zip(length).and_then(|(addr, length)| IpNet::new(addr, length).ok());
        return net.map_or(Certainty::Unknown, |net| truth(net.contains(&address)));
    }
    if let Some([from, to]) = value["range"].as_array().map(Vec::as_slice) {
        return match (parse(from), parse(to)) {
            (Some(from), Some(to)) => truth((from..=to).contains(&address)),
            _ => Certainty::Unknown,
        };
    }
    parse(value).map_or(Certainty::Unknown, |one| truth(one == address))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn packet() -> ProbePacket {
        ProbePacket {
            source: "198.51.100.7".parse().unwrap(),
            destination: "192.0.2.1".parse().unwrap(),
            protocol: "udp",
            port: Some(51820),
            comes_by: Some("eth0".to_owned()),
            leaves_by: None,
            local: [false, true],
            mark: 0,
            tracked: true,
        }
    }

    /// The listing by `nft` of a table with these rules, in its own namespace.
    fn listed(rules: &str) -> ListedRuleset {
        let script = format!("nft -f - <<'.' && nft -j list ruleset\n{rules}\n.");
        let output = Command::new("unshare").args(["-n", "sh", "-c", &script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let listing: Value = serde_json::from_slice(&output.stdout).unwrap();
        ListedRuleset::new(listing["nftables"].as_array().unwrap().clone())
    }

    #[test]
    fn what_gives_a_packet_another_mark_is_found() {
        let probe = ProbePacket { mark: 0x1046, tracked: false, ..packet() };
        let remarked = |rules: &str| -> Vec<String> {
            let ruleset = listed(&format!(
                "table inet t {{\nchain sub {{ meta mark set 0x7; }}\n\
                 chain out {{ type route hook output priority mangle; {rules}\n}}\n\
                 chain late {{ type filter hook output priority 95; meta mark set 0x7; }}\n}}"
            ));
            ruleset.remarking("output", 90, &probe, &[]).into_iter().map(|taken| taken.at).collect()
        };
        for (rules, at) in [
            ("meta mark set 0x7;", "out"),
            ("udp dport 51820 counter meta mark set meta mark | 0x4000;", "out"),
            ("meta mark set meta mark & 0xffff0000 | 0x1;", "out"),
            ("meta mark set meta mark ^ 0x1000 accept;", "out"),
            ("tcp dport 22 accept; ip daddr 192.0.2.0/24 jump sub;", "sub"),
        ] {
            assert_eq!(remarked(rules), [at], "{rules}");
        }
        for rules in [
            "",
            "meta mark set 0x1046;",
            "meta mark set meta mark | 0x46;",
            "udp dport 51820 accept; meta mark set 0x7;",
            "tcp dport 22 meta mark set 0x7;",
            // A packet without a connection takes no part in it.
            "meta mark set ct mark;",
            "ct mark 0x7 meta mark set ct mark;",
            "ct mark set 0x7;",
            "drop;",
        ] {
            assert_eq!(remarked(rules), Vec::<String>::new(), "{rules}");
        }
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
            "policy drop; meta mark 7 accept;",
            "policy drop; ct status dnat accept; fib daddr type broadcast accept;",
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
            "policy drop; ct mark 7 accept;",
            "policy drop; meta mark 0 accept;",
            "policy drop; meta mark and 0x4000 == 0 accept;",
            "policy drop; fib daddr type local accept;",
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
