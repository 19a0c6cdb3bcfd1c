//! Descriptions in nft's language (1.0.6 and later).

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
};

use super::{Chain, Element, Marks, Match, Rule, Ruleset, Set, SetKind, Then};
use crate::engine::Side;

/// The chain that packets go to which policies refuse, by [`Side`].
pub const REFUSED: [&str; 2] = ["refused_in", "refused_out"];
/// The chain that the first packets of connections go to which policies allow, by [`Side`].
pub const ALLOWED: [&str; 2] = ["allowed_in", "allowed_out"];

/// Elements in one command.
const PER_COMMAND: usize = 512;

/// The commands that make a table that holds `old` into one that holds `new`: one transaction, in an order in which every
/// command refers only to what is there; [`REFUSED`] and [`ALLOWED`] are. Empty when nothing differs. `table` is family
/// and name: `inet meshd`.
#[must_use]
pub fn transaction(table: &str, marks: &Marks, old: &Ruleset, new: &Ruleset) -> String {
    let mut out = Writer { table, marks, text: String::new() };
    out.make_sets(old, new);
    for name in new.chains.keys().filter(|name| !old.chains.contains_key(*name)) {
        out.line(format_args!("add chain {table} {name}"));
    }
    out.fill_chains(old, new);
    out.change_maps(old, new);
    let gone: Vec<&String> = old.chains.keys().filter(|name| !new.chains.contains_key(*name)).collect();
    // Chains that are gone may lead to each other.
    for name in &gone {
        out.line(format_args!("flush chain {table} {name}"));
    }
    for name in &gone {
        out.line(format_args!("delete chain {table} {name}"));
    }
    for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)) {
        out.line(format_args!("delete set {table} {name}"));
    }
    for name in old.maps.keys().filter(|name| !new.maps.contains_key(*name)) {
        out.line(format_args!("delete map {table} {name}"));
    }
    out.text
}

struct Writer<'a> {
    table: &'a str,
    marks: &'a Marks,
    text: String,
}

impl Writer<'_> {
    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(line);
        self.text.push('\n');
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
            match old.chains.get(name) {
                Some(before) if before == chain => continue,
                Some(_) => self.line(format_args!("flush chain {table} {name}")),
                None => {}
            }
            self.chain(name, chain);
        }
    }

    fn chain(&mut self, name: &str, chain: &Chain) {
        let side = if name.starts_with("in_") { Side::Ingress } else { Side::Egress };
        for rule in &chain.rules {
            let table = self.table;
            // Each direction has the destination's port elsewhere.
            let directions: &[_] = if rule.count() > 1 { &[Some("original"), Some("reply")] } else { &[None] };
            for direction in directions {
                let rule = rule_text(rule, side, self.marks, *direction);
                self.line(format_args!("add rule {table} {name} {rule}"));
            }
        }
    }

    fn change_maps(&mut self, old: &Ruleset, new: &Ruleset) {
        let table = self.table;
        for (name, map) in &new.maps {
            let none = std::collections::BTreeMap::new();
            let before = old.maps.get(name).unwrap_or(&none);
            if !old.maps.contains_key(name) {
                let family = if name.ends_with('4') { "ipv4_addr" } else { "ipv6_addr" };
                self.line(format_args!("add map {table} {name} {{ type {family} : verdict; }}"));
            }
            for address in before.iter().filter(|(address, chain)| map.get(*address) != Some(*chain)).map(|(a, _)| a) {
                self.line(format_args!("delete element {table} {name} {{ {address} }}"));
            }
            for (address, chain) in map.iter().filter(|(address, chain)| before.get(*address) != Some(*chain)) {
                self.line(format_args!("add element {table} {name} {{ {address} : jump {chain} }}"));
            }
        }
        for (name, map) in old.maps.iter().filter(|(name, _)| !new.maps.contains_key(*name)) {
            if !map.is_empty() {
                self.line(format_args!("flush map {table} {name}"));
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

fn rule_text(rule: &Rule, side: Side, marks: &Marks, direction: Option<&str>) -> String {
    let field = marks.of(side);
    // The flow's source before any rewriting; its destination behind it.
    let end = if side == Side::Ingress { "ct original" } else { "ct reply" };
    let family = |v4: bool| if v4 { "ip" } else { "ip6" };
    let port = if direction == Some("reply") { "sport" } else { "dport" };
    let mut out = direction.map(|direction| format!("ct direction {direction} ")).unwrap_or_default();
    for condition in &rule.matches {
        let _ = match condition {
            Match::Peer { set, v4, not } => {
                write!(out, "{end} {} saddr {}@{set} ", family(*v4), if *not { "!= " } else { "" })
            }
            Match::Own(addresses) => {
                let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                let v4 = addresses.first().is_some_and(IpAddr::is_ipv4);
                write!(out, "{end} {} saddr {{ {} }} ", family(v4), list.join(", "))
            }
            Match::PeerPort { set, v4 } => {
                write!(out, "{end} {} saddr . meta l4proto . th {port} @{set} ", family(*v4))
            }
            Match::Protocol(protocol) => write!(out, "meta l4proto {} ", protocol.as_str().to_ascii_lowercase()),
            Match::Ports(protocol, ranges) => {
                let list: Vec<String> = ranges
                    .iter()
                    .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
                    .collect();
                write!(out, "{} {port} {{ {} }} ", protocol.as_str().to_ascii_lowercase(), list.join(", "))
            }
            Match::Judged(value) => {
                write!(out, "ct mark and {:#x} == {:#x} ", field.mask(), value << field.shift)
            }
            Match::Error => {
                let mask = field.mask();
                write!(out, "ct state related meta l4proto {{ icmp, icmpv6 }} ct mark and {mask:#x} == 0 ")
            }
            Match::NoFlow => write!(out, "ct state invalid,untracked "),
        };
    }
    let _ = match &rule.then {
        Then::Return => write!(out, "return"),
        Then::Allow(value) => {
            let (keep, mark) = (!field.mask(), value << field.shift);
            write!(out, "ct mark set ct mark and {keep:#x} or {mark:#x} goto {}", ALLOWED[side as usize])
        }
        Then::Drop => write!(out, "goto {}", REFUSED[side as usize]),
        Then::Goto(chain) => write!(out, "goto {chain}"),
    };
    out
}
