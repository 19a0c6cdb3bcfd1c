//! Descriptions as nft text (1.0.6 and later).

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

use super::{AddressSetKind, ChainRule, Match, RuleChain, Ruleset, Set, SetElement, Then};
use crate::{engine::Side, object::Protocol};

/// The chain for packets that policies deny, by [`Side`].
pub const REFUSED: [&str; 2] = ["refused_in", "refused_out"];
/// The chain for packets that policies allow, by [`Side`].
pub const ALLOWED: [&str; 2] = ["allowed_in", "allowed_out"];

/// The longest comment that nft takes, in bytes.
const COMMENT: usize = 127;

/// Elements in one command.
const PER_COMMAND: usize = 512;

/// The inputs of a verdict besides the rules, as an nft expression of the type `ipv4_addr . ipv4_addr . inet_proto .
/// inet_service` (or `ipv6_addr`), with its condition: both ends as in conntrack, protocol, and the destination's port
/// after NAT. For protocols with ports.
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

/// The form of a chain's matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The packet's flow, from conntrack.
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
    pub(super) fn count(self, rule: &ChainRule) -> usize {
        self.variants(rule).len()
    }

    /// The prefixes of the nftables rules for one rule.
    fn variants(self, rule: &ChainRule) -> Vec<&'static str> {
        let unclear = rule.matches.contains(&Match::Unclear);
        match self {
            Self::Packet if unclear => {
                return vec!["ct state invalid ", "ip frag-off & 0x1fff != 0 ", "frag frag-off != 0 "];
            }
            Self::Flow if unclear => return Vec::new(),
            Self::Packet => return vec![""],
            Self::Flow => {}
        }
        // Packets of the flow, and ICMP errors about it. nft needs the protocol of a port; several protocols would be
        // an anonymous set, and many of those slow the kernel down.
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

/// The port sets of rules, by content. A rule with a literal port of a flow could not be listed, since nft would not
/// recognize the port.
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

/// The commands that make a table that holds one ruleset into one that holds another: two transactions, the second one
/// once the first one is committed. Each is empty when there is nothing to do.
///
/// A kernel lets packets meet new rules a moment before it publishes the elements of interval sets; the moment lasts
/// until the process is scheduled again. So rules use only sets that were published before, and new rules no set that
/// is about to lose elements. Sets in use gain elements in place if nothing else changes; else the sets that differ are
/// replaced by copies, together with the rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transactions {
    /// Sets that no rule in force refers to yet, or elements that sets in use gain.
    pub sets: String,
    /// The rest.
    pub rules: String,
    /// The verdict about a packet may be another: more differs than comments.
    pub verdicts: bool,
}

impl Transactions {
    /// Whether the rulesets are the same.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.rules.is_empty()
    }
}

/// The [`Transactions`] from `old` to `new`, ordered so that each command refers to existing objects; the table,
/// [`REFUSED`] and [`ALLOWED`] exist. Sets the names of copied sets in `new`. `table` is family and name: `inet meshd`.
#[must_use]
pub fn transactions(table: &str, old: &Ruleset, new: &mut Ruleset) -> Transactions {
    name_copies(old, new);
    let new = &*new;
    let mut sets = NftWriter { table, text: String::new() };
    let mut out = NftWriter { table, text: String::new() };
    let missing_in = |other: &'_ Ruleset, one: &'_ Ruleset| -> Vec<String> {
        let missing = one.chains.keys().filter(|name| !other.chains.contains_key(*name));
        missing.flat_map(|name| Form::BOTH.map(|form| form.name(name))).collect()
    };
    let (ports_before, ports_after) = (port_sets(old), port_sets(new));
    for (name, ranges) in ports_after.iter().filter(|(name, _)| !ports_before.contains_key(*name)) {
        sets.make_port_set(name, ranges);
    }
    for (name, set) in &new.sets {
        let in_kernel = new.kernel_set(name);
        match old.sets.get(name) {
            Some(before) if before.copy == set.copy => {
                sets.elements("add", &in_kernel, &missing(&set.elements, &before.elements));
            }
            _ => sets.make_set(&in_kernel, set),
        }
    }
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
    let is_gone = |name: &&String| new.sets.get(*name).is_none_or(|set| Some(set.copy) != copy_of(old, name));
    let sets_gone = old.sets.keys().filter(is_gone).map(|name| old.kernel_set(name));
    let ports_gone = ports_before.into_keys().filter(|name| !ports_after.contains_key(name));
    for name in sets_gone.chain(ports_gone) {
        out.line(format_args!("delete set {table} {name}"));
    }
    for name in old.maps.keys().filter(|name| !new.maps.contains_key(*name)) {
        for form in Form::BOTH {
            out.line(format_args!("delete map {table} {}", form.name(name)));
        }
    }
    Transactions { sets: sets.text, rules: out.text, verdicts: !old.decides_as(new) }
}

fn copy_of(ruleset: &Ruleset, set: &str) -> Option<u32> {
    ruleset.sets.get(set).map(|set| set.copy)
}

/// Gives the sets that are in both their names: the one that they have, or that of another copy.
fn name_copies(old: &Ruleset, new: &mut Ruleset) {
    let rules_change =
        new.chains.iter().any(|(name, chain)| old.chains.get(name).is_some_and(|old| !old.decides_as(chain)))
            || new.maps.iter().any(|(name, map)| {
                let before = old.maps.get(name);
                map.iter().any(|(address, chain)| {
                    before.and_then(|before| before.get(address)).is_some_and(|before| before != chain)
                })
            });
    let loses = |(name, set): (&String, &Set)| {
        old.sets.get(name).is_some_and(|old| old != set && !missing(&old.elements, &set.elements).is_empty())
    };
    let at_once = rules_change || new.sets.iter().any(loses);
    for (name, set) in &mut new.sets {
        let Some(before) = old.sets.get(name) else { continue };
        set.copy = before.copy.wrapping_add(u32::from(at_once && before != set));
    }
}

struct NftWriter<'a> {
    table: &'a str,
    text: String,
}

impl NftWriter<'_> {
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

    fn make_set(&mut self, name: &str, set: &Set) {
        let table = self.table;
        self.line(format_args!("add set {table} {name} {{ {} }}", kind(set.kind)));
        self.elements("add", name, &set.elements.iter().collect::<Vec<_>>());
    }

    fn elements(&mut self, verb: &str, set: &str, elements: &[&SetElement]) {
        for part in elements.chunks(PER_COMMAND) {
            let mut list = String::new();
            for element in part {
                let _ = match element {
                    SetElement::Range(first, last) if first == last => write!(list, "{first}, "),
                    SetElement::Range(first, last) => write!(list, "{first}-{last}, "),
                    SetElement::Port(address, protocol, port) => {
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
            let is_copied = |set: &str| copy_of(old, set) != copy_of(new, set);
            if before == Some(chain) && !chain.rules.iter().flat_map(|rule| &rule.matches).any(|condition| {
                matches!(condition, Match::Peer { set, .. } | Match::PeerPort { set, .. } if is_copied(set))
            }) {
                continue;
            }
            for form in Form::BOTH {
                let in_kernel = form.name(name);
                if before.is_some() {
                    self.line(format_args!("flush chain {table} {in_kernel}"));
                }
                let side = if name.starts_with("in_") { Side::Ingress } else { Side::Egress };
                self.chain(&in_kernel, chain, (form, side), new);
            }
        }
    }

    fn chain(&mut self, name: &str, chain: &RuleChain, (form, side): (Form, Side), ruleset: &Ruleset) {
        let table = self.table;
        for rule in &chain.rules {
            for variant in form.variants(rule) {
                let (text, comment) = (rule_text(rule, form, side, ruleset), comment(&rule.because));
                self.line(format_args!("add rule {table} {name} {variant}{text}{comment}"));
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
fn missing<'e>(from: &'e [SetElement], other: &[SetElement]) -> Vec<&'e SetElement> {
    from.iter().filter(|element| other.binary_search(element).is_err()).collect()
}

const fn kind(kind: AddressSetKind) -> &'static str {
    match kind {
        AddressSetKind::V4 => "type ipv4_addr; flags interval;",
        AddressSetKind::V6 => "type ipv6_addr; flags interval;",
        AddressSetKind::V4Port => "type ipv4_addr . inet_proto . inet_service;",
        AddressSetKind::V6Port => "type ipv6_addr . inet_proto . inet_service;",
    }
}

fn rule_text(rule: &ChainRule, form: Form, side: Side, ruleset: &Ruleset) -> String {
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
            Match::Peer { set, v4, not } => {
                write!(out, "{} {}@{} ", end(*v4), if *not { "!= " } else { "" }, ruleset.kernel_set(set))
            }
            Match::Own(addresses) => {
                let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                let v4 = addresses.first().is_some_and(IpAddr::is_ipv4);
                match list.as_slice() {
                    [one] => write!(out, "{} {one} ", end(v4)),
                    _ => write!(out, "{} {{ {} }} ", end(v4), list.join(", ")),
                }
            }
            Match::PeerPort { set, v4 } => match form {
                Form::Flow => {
                    write!(out, "{} . ct protocol . ct reply proto-src @{} ", end(*v4), ruleset.kernel_set(set))
                }
                Form::Packet => write!(out, "{} . meta l4proto . th dport @{} ", end(*v4), ruleset.kernel_set(set)),
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

/// `because` as an nft comment: at most 127 bytes, without characters that could end the string.
fn comment(because: &str) -> String {
    if because.is_empty() {
        return String::new();
    }
    let plain = |letter: char| if matches!(letter, ' '..='~') && !matches!(letter, '"' | '\\') { letter } else { '?' };
    let mut text: String = because.chars().map(plain).take(COMMENT).collect();
    if because.chars().count() > COMMENT {
        text.replace_range(COMMENT - 3.., "...");
    }
    format!(" comment \"{text}\"")
}

fn then_text(rule: &ChainRule, form: Form, side: Side) -> String {
    match &rule.then {
        Then::Allow => format!("goto {}", ALLOWED[side as usize]),
        Then::Drop => format!("goto {}", REFUSED[side as usize]),
        Then::Goto(chain) => format!("goto {}", form.name(chain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pod that admits the set `s`, with `rules` more rules.
    fn ruleset(elements: &[(u8, u8)], rules: usize) -> Ruleset {
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let elements: Vec<SetElement> =
            elements.iter().map(|(first, last)| SetElement::Range(address(*first), address(*last))).collect();
        let mut hasher = DefaultHasher::new();
        elements.hash(&mut hasher);
        let set = Set { kind: AddressSetKind::V4, elements: elements.into(), content: hasher.finish(), copy: 0 };
        let peer = Match::Peer { set: "s".to_owned(), v4: true, not: false };
        let mut chain = vec![ChainRule { matches: vec![peer], then: Then::Allow, because: "".into() }];
        chain.extend((0..rules).map(|_| ChainRule { matches: Vec::new(), then: Then::Drop, because: "".into() }));
        Ruleset {
            sets: [("s".to_owned(), set)].into(),
            chains: [("in_1".to_owned(), RuleChain { rules: chain })].into(),
            maps: BTreeMap::new(),
        }
    }

    #[test]
    fn a_set_that_only_gains_stays_where_it_is() {
        let old = ruleset(&[(1, 1), (5, 6)], 0);
        let mut new = ruleset(&[(1, 1), (5, 6), (8, 8)], 0);
        let change = transactions("inet t", &old, &mut new);
        assert_eq!((&*change.sets, &*change.rules), ("add element inet t s { 10.0.0.8 }\n", ""));
        assert!(change.verdicts);
        assert!(transactions("inet t", &new, &mut ruleset(&[(1, 1), (5, 6), (8, 8)], 0)).is_empty());
    }

    #[test]
    fn a_rule_bears_its_policy_as_a_comment_and_another_name_changes_no_verdict() {
        let named = |name: &str| {
            let mut ruleset = ruleset(&[(1, 1)], 1);
            ruleset.chains.get_mut("in_1").unwrap().rules[1].because = name.into();
            ruleset
        };
        let (mut old, mut new) = (named("isolated by NetworkPolicy a/b"), named("isolated by NetworkPolicy a/c"));
        let first = transactions("inet t", &Ruleset::default(), &mut old);
        let refused = "add rule inet t in_1 goto refused_out comment \"isolated by NetworkPolicy a/b\"\n";
        assert!(first.rules.contains(&refused.replace("_out", "_in")), "{first:?}");
        assert!(first.rules.contains("saddr @s goto allowed_in\n"), "{first:?}");
        let change = transactions("inet t", &old, &mut new);
        assert!(!change.verdicts && change.sets.is_empty(), "{change:?}");
        assert!(change.rules.contains("NetworkPolicy a/c\"\n") && change.rules.contains("saddr @s goto"), "{change:?}");
    }

    #[test]
    fn no_name_leaves_its_comment() {
        assert_eq!(comment(""), "");
        assert_eq!(comment("a\"; flush ruleset \\\n\u{e9}"), " comment \"a?; flush ruleset ???\"");
        let long = comment(&"x".repeat(128));
        assert_eq!((long.len(), long.ends_with("x...\"")), (COMMENT + 11, true));
        assert_eq!(comment(&"x".repeat(127)).len(), COMMENT + 11);
    }

    #[test]
    fn what_rules_and_elements_say_together_changes_at_once() {
        let mut old = ruleset(&[(1, 1)], 0);
        for (elements, rules, copy) in [([(2, 2)], 1, "s_1"), ([(2, 2)], 2, "s_1"), ([(3, 3)], 1, "s_2")] {
            let before = old.kernel_set("s");
            let mut new = ruleset(&elements, rules);
            let change = transactions("inet t", &old, &mut new);
            let is_new = before != copy;
            assert_eq!(change.sets.starts_with(&format!("add set inet t {copy} ")), is_new, "{change:?}");
            assert_eq!(change.rules.contains(&format!("delete set inet t {before}\n")), is_new, "{change:?}");
            assert!(
                change.rules.contains(&format!("add rule inet t in_1 ct original ip saddr @{copy} ")),
                "{change:?}"
            );
            assert_eq!(new.kernel_sets().collect::<Vec<_>>(), [copy]);
            old = new;
        }
    }

    #[test]
    fn a_set_that_loses_an_element_or_has_a_range_grow_is_another_copy() {
        for (before, after) in [
            ([(5, 6)], vec![]),
            ([(5, 5)], vec![(7, 7)]),
            ([(5, 6)], vec![(5, 7)]),
            ([(5, 7)], vec![(5, 5), (7, 7)]),
            ([(5, 5)], vec![(4, 9)]),
        ] {
            let (old, mut new) = (ruleset(&before, 0), ruleset(&after, 0));
            let change = transactions("inet t", &old, &mut new);
            assert!(change.sets.starts_with("add set inet t s_1 "), "{change:?}");
            assert!(change.rules.contains("@s_1 ") && change.rules.ends_with("delete set inet t s\n"), "{change:?}");
            assert!(!change.sets.contains(" s {") && !change.rules.contains("element"), "{change:?}");
        }
    }
}
