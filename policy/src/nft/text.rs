//! Descriptions as nft text (1.0.6 and later).

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

use super::{Chain, Element, Match, Rule, Ruleset, Set, SetKind, Then};
use crate::{engine::Side, object::Protocol};

/// The chain for packets that policies deny, by [`Side`].
pub const REFUSED: [&str; 2] = ["refused_in", "refused_out"];
/// The chain for packets that policies allow, by [`Side`].
pub const ALLOWED: [&str; 2] = ["allowed_in", "allowed_out"];

/// Elements in one command.
const PER_COMMAND: usize = 512;

/// What the verdict about a flow depends on besides the rules: an nft expression of the type
/// `ipv4_addr . ipv4_addr . inet_proto . inet_service` (or `ipv6_addr`), with the condition that it needs. Its ends as
/// conntrack has them, protocol, and the destination's port behind any rewriting. For protocols with ports.
#[must_use]
pub const fn flow_key(v4: bool) -> (&'static str, &'static str) {
    // Without the condition nft does not know that a port is one.
    let condition = "meta l4proto { tcp, udp, sctp }";
    if v4 {
        (condition, "ct original ip saddr . ct reply ip saddr . ct protocol . ct reply proto-src")
    } else {
        (condition, "ct original ip6 saddr . ct reply ip6 saddr . ct protocol . ct reply proto-src")
    }
}

/// The name in the kernel of the form of a chain, or a map, that judges packets of no flow.
#[must_use]
pub fn packet_form(name: &str) -> String {
    Form::Packet.name(name)
}

/// How a chain asks for what it judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// What conntrack knows of the packet's flow.
    Flow,
    /// The packet's own header.
    Packet,
}

impl Form {
    pub(super) const BOTH: [Self; 2] = [Self::Flow, Self::Packet];

    /// The name of a chain or a map in this form.
    pub(super) fn name(self, name: &str) -> String {
        match self {
            Self::Flow => name.to_owned(),
            Self::Packet => format!("packet_{name}"),
        }
    }

    /// How many nftables rules a rule becomes.
    pub(super) fn count(self, rule: &Rule) -> usize {
        self.variants(rule).len()
    }

    /// What the nftables rules that a rule becomes begin with, each.
    fn variants(self, rule: &Rule) -> Vec<&'static str> {
        let unclear = rule.matches.contains(&Match::Unclear);
        match self {
            Self::Packet if unclear => {
                return vec!["ct state invalid ", "ip frag-off & 0x1fff != 0 ", "frag frag-off != 0 "];
            }
            Self::Flow if unclear => return Vec::new(),
            Self::Packet => return vec![""],
            Self::Flow => {}
        }
        // Packets of the flow, and ICMP errors about it. nft wants to know what a port is one of; several protocols would be
        // an anonymous set, of which a kernel with many is slow.
        let mut variants: Vec<&str> = rule.matches.iter().flat_map(transports).copied().collect();
        if variants.is_empty() {
            return vec![""];
        }
        let v4 = rule.matches.iter().find_map(|condition| match condition {
            Match::Peer { v4, .. } | Match::PeerPort { v4, .. } => Some(*v4),
            Match::Own(addresses) => addresses.first().map(IpAddr::is_ipv4),
            Match::Ports(..) | Match::Protocol(_) | Match::Unclear => None,
        });
        if v4 != Some(false) {
            variants.push("meta l4proto icmp ");
        }
        if v4 != Some(true) {
            variants.push("meta l4proto icmpv6 ");
        }
        variants
    }
}

/// The protocols whose ports a condition asks for.
const fn transports(condition: &Match) -> &'static [&'static str] {
    match condition {
        Match::Ports(Protocol::Tcp, _) => &["meta l4proto tcp "],
        Match::Ports(Protocol::Udp, _) => &["meta l4proto udp "],
        Match::Ports(Protocol::Sctp, _) => &["meta l4proto sctp "],
        Match::PeerPort { .. } => &["meta l4proto tcp ", "meta l4proto udp ", "meta l4proto sctp "],
        Match::Peer { .. } | Match::Own(_) | Match::Protocol(_) | Match::Unclear => &[],
    }
}

/// The sets of ports that rules name. By what they hold: a rule that names a port of a flow directly cannot be listed,
/// since nft does not know then that it is one.
pub(super) fn port_sets(ruleset: &Ruleset) -> BTreeMap<String, &[(u16, u16)]> {
    let rules = ruleset.chains.values().flat_map(|chain| &chain.rules);
    let ports = rules.flat_map(|rule| &rule.matches).filter_map(|condition| match condition {
        Match::Ports(_, ranges) => Some((port_set(ranges), ranges.as_slice())),
        _ => None,
    });
    ports.collect()
}

fn port_set(ranges: &[(u16, u16)]) -> String {
    let mut hasher = DefaultHasher::new();
    ranges.hash(&mut hasher);
    format!("p_{:016x}", hasher.finish())
}

/// The commands that make a table that holds `old` into one that holds `new`: one transaction, in an order in which every
/// command refers only to what is there; [`REFUSED`] and [`ALLOWED`] are. Empty when nothing differs. `table` is family
/// and name: `inet meshd`.
#[must_use]
pub fn transaction(table: &str, old: &Ruleset, new: &Ruleset) -> String {
    let mut out = Writer { table, text: String::new() };
    let missing_in = |other: &'_ Ruleset, one: &'_ Ruleset| -> Vec<String> {
        let missing = one.chains.keys().filter(|name| !other.chains.contains_key(*name));
        missing.flat_map(|name| Form::BOTH.map(|form| form.name(name))).collect()
    };
    let (ports_before, ports_after) = (port_sets(old), port_sets(new));
    for (name, ranges) in ports_after.iter().filter(|(name, _)| !ports_before.contains_key(*name)) {
        out.make_port_set(name, ranges);
    }
    out.make_sets(old, new);
    for name in missing_in(old, new) {
        out.line(format_args!("add chain {table} {name}"));
    }
    out.fill_chains(old, new);
    for form in Form::BOTH {
        out.change_maps(form, old, new);
    }
    let gone = missing_in(new, old);
    // Chains that are gone may lead to each other.
    for name in &gone {
        out.line(format_args!("flush chain {table} {name}"));
    }
    for name in &gone {
        out.line(format_args!("delete chain {table} {name}"));
    }
    let ports_gone = ports_before.keys().filter(|name| !ports_after.contains_key(*name));
    for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)).chain(ports_gone) {
        out.line(format_args!("delete set {table} {name}"));
    }
    for name in old.maps.keys().filter(|name| !new.maps.contains_key(*name)) {
        for form in Form::BOTH {
            out.line(format_args!("delete map {table} {}", form.name(name)));
        }
    }
    out.text
}

struct Writer<'a> {
    table: &'a str,
    text: String,
}

impl Writer<'_> {
    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(line);
        self.text.push('\n');
    }

    fn make_port_set(&mut self, name: &str, ranges: &[(u16, u16)]) {
        let range =
            |(first, last): &(u16, u16)| if first == last { first.to_string() } else { format!("{first}-{last}") };
        let (table, list) = (self.table, ranges.iter().map(range).collect::<Vec<_>>().join(", "));
        self.line(format_args!(
            "add set {table} {name} {{ type inet_service; flags interval; elements = {{ {list} }}; }}"
        ));
    }

    fn make_sets(&mut self, old: &Ruleset, new: &Ruleset) {
        let table = self.table;
        for (name, set) in &new.sets {
            match old.sets.get(name) {
                None => {
                    self.line(format_args!("add set {table} {name} {{ {} }}", kind(set.kind)));
                    self.elements("add", name, &set.elements.iter().collect::<Vec<_>>());
                }
                Some(before) if before == set => {}
                Some(before) => self.change_set(name, before, set),
            }
        }
    }

    fn change_set(&mut self, name: &str, before: &Set, set: &Set) {
        let gone = missing(&before.elements, &set.elements);
        let come = missing(&set.elements, &before.elements);
        if gone.len() * 2 > before.elements.len() {
            let table = self.table;
            self.line(format_args!("flush set {table} {name}"));
            self.elements("add", name, &set.elements.iter().collect::<Vec<_>>());
            return;
        }
        self.elements("delete", name, &gone);
        self.elements("add", name, &come);
    }

    fn elements(&mut self, verb: &str, set: &str, elements: &[&Element]) {
        for part in elements.chunks(PER_COMMAND) {
            let mut list = String::new();
            for element in part {
                let _ = match element {
                    Element::Range(first, last) if first == last => write!(list, "{first}, "),
                    Element::Range(first, last) => write!(list, "{first}-{last}, "),
                    Element::Port(address, protocol, port) => {
                        write!(list, "{address} . {} . {port}, ", protocol.as_str().to_ascii_lowercase())
                    }
                };
            }
            let (table, list) = (self.table, list.trim_end_matches(", "));
            self.line(format_args!("{verb} element {table} {set} {{ {list} }}"));
        }
    }

    fn fill_chains(&mut self, old: &Ruleset, new: &Ruleset) {
        let table = self.table;
        for (name, chain) in &new.chains {
            let before = old.chains.get(name);
            if before == Some(chain) {
                continue;
            }
            for form in Form::BOTH {
                let in_kernel = form.name(name);
                if before.is_some() {
                    self.line(format_args!("flush chain {table} {in_kernel}"));
                }
                let side = if name.starts_with("in_") { Side::Ingress } else { Side::Egress };
                self.chain(&in_kernel, chain, form, side);
            }
        }
    }

    fn chain(&mut self, name: &str, chain: &Chain, form: Form, side: Side) {
        let table = self.table;
        for rule in &chain.rules {
            for variant in form.variants(rule) {
                let rule = rule_text(rule, form, side);
                self.line(format_args!("add rule {table} {name} {variant}{rule}"));
            }
        }
    }

    fn change_maps(&mut self, form: Form, old: &Ruleset, new: &Ruleset) {
        let table = self.table;
        for (base, map) in &new.maps {
            let name = form.name(base);
            let none = BTreeMap::new();
            let before = old.maps.get(base).unwrap_or(&none);
            if !old.maps.contains_key(base) {
                let family = if base.ends_with('4') { "ipv4_addr" } else { "ipv6_addr" };
                self.line(format_args!("add map {table} {name} {{ type {family} : verdict; }}"));
            }
            for address in before.iter().filter(|(address, chain)| map.get(*address) != Some(*chain)).map(|(a, _)| a) {
                self.line(format_args!("delete element {table} {name} {{ {address} }}"));
            }
            for (address, chain) in map.iter().filter(|(address, chain)| before.get(*address) != Some(*chain)) {
                let chain = form.name(chain);
                self.line(format_args!("add element {table} {name} {{ {address} : jump {chain} }}"));
            }
        }
        for (base, map) in old.maps.iter().filter(|(base, _)| !new.maps.contains_key(*base)) {
            if !map.is_empty() {
                self.line(format_args!("flush map {table} {}", form.name(base)));
            }
        }
    }
}

/// Elements of the first list that the second one does not have. Both are sorted.
fn missing<'e>(from: &'e [Element], other: &[Element]) -> Vec<&'e Element> {
    from.iter().filter(|element| other.binary_search(element).is_err()).collect()
}

const fn kind(kind: SetKind) -> &'static str {
    match kind {
        SetKind::V4 => "type ipv4_addr; flags interval;",
        SetKind::V6 => "type ipv6_addr; flags interval;",
        SetKind::V4Port => "type ipv4_addr . inet_proto . inet_service;",
        SetKind::V6Port => "type ipv6_addr . inet_proto . inet_service;",
    }
}

fn rule_text(rule: &Rule, form: Form, side: Side) -> String {
    let family = |v4: bool| if v4 { "ip" } else { "ip6" };
    // The other end: a flow's source before any rewriting, its destination behind it.
    let end = |v4: bool| {
        let ip = family(v4);
        match (form, side) {
            (Form::Flow, Side::Ingress) => format!("ct original {ip} saddr"),
            (Form::Flow, Side::Egress) => format!("ct reply {ip} saddr"),
            (Form::Packet, Side::Ingress) => format!("{ip} saddr"),
            (Form::Packet, Side::Egress) => format!("{ip} daddr"),
        }
    };
    let mut out = String::new();
    for condition in &rule.matches {
        let _ = match condition {
            Match::Peer { set, v4, not } => write!(out, "{} {}@{set} ", end(*v4), if *not { "!= " } else { "" }),
            Match::Own(addresses) => {
                let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                let v4 = addresses.first().is_some_and(IpAddr::is_ipv4);
                match list.as_slice() {
                    [one] => write!(out, "{} {one} ", end(v4)),
                    _ => write!(out, "{} {{ {} }} ", end(v4), list.join(", ")),
                }
            }
            Match::PeerPort { set, v4 } => match form {
                Form::Flow => write!(out, "{} . ct protocol . ct reply proto-src @{set} ", end(*v4)),
                Form::Packet => write!(out, "{} . meta l4proto . th dport @{set} ", end(*v4)),
            },
            Match::Protocol(protocol) => {
                let key = if form == Form::Flow { "ct protocol" } else { "meta l4proto" };
                write!(out, "{key} {} ", protocol.as_str().to_ascii_lowercase())
            }
            Match::Ports(protocol, ranges) => {
                let (protocol, set) = (protocol.as_str().to_ascii_lowercase(), port_set(ranges));
                match form {
                    Form::Flow => write!(out, "ct protocol {protocol} ct reply proto-src @{set} "),
                    Form::Packet => write!(out, "{protocol} dport @{set} "),
                }
            }
            // In the variants.
            Match::Unclear => Ok(()),
        };
    }
    out + &then_text(rule, form, side)
}

fn then_text(rule: &Rule, form: Form, side: Side) -> String {
    match &rule.then {
        Then::Allow => format!("goto {}", ALLOWED[side as usize]),
        Then::Drop => format!("goto {}", REFUSED[side as usize]),
        Then::Goto(chain) => format!("goto {}", form.name(chain)),
    }
}
