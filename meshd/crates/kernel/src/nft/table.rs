//! One nftables table as data, in a canonical form, and the difference between two of them.
//!
//! Rules are compared by a tag in their comment, a hash of their text: `nft` output differs between versions and from
//! its input, but the comment does not.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use ipnet::IpNet;
use mesh::{
    interface::InterfaceName,
    kernel_state::{PrefixOn, PrefixVia, VxlanPeer},
};
use netfilter::{Counter, ListedChain, is_identifier};

/// A table that is to be: sets, chains and named counters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NftTable {
    /// Named sets.
    pub sets: BTreeMap<Cow<'static, str>, NftSet>,
    /// Chains, base chains and others.
    pub chains: BTreeMap<Cow<'static, str>, Chain>,
    /// Named counters. They outlive a rewrite of the chains that count into them.
    pub counters: BTreeSet<Cow<'static, str>>,
}

/// A named set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftSet {
    /// The kind of its elements.
    pub kind: SetKind,
    /// Its elements: of that kind, none inside another.
    pub elements: BTreeSet<Element>,
}

/// The type of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// IPv4 prefixes.
    Ipv4,
    /// IPv6 prefixes.
    Ipv6,
    /// IPv4 prefixes, each with an interface.
    Ipv4On,
    /// IPv6 prefixes, each with an interface.
    Ipv6On,
    /// IPv4 prefixes, each with an interface and a next hop.
    Ipv4Via,
    /// IPv6 prefixes, each with an interface and a next hop.
    Ipv6Via,
    /// IPv4 prefixes of inner sources, each behind an outer source.
    Ipv4Vtep,
    /// IPv6 prefixes of inner sources, each behind an outer source.
    Ipv6Vtep,
    /// Interface names.
    Interface,
}

/// An element of a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// A prefix.
    Prefix(IpNet),
    /// A prefix with an interface.
    On(PrefixOn),
    /// A prefix with an interface and a next hop.
    Via(PrefixVia),
    /// A prefix of inner sources behind an outer source.
    Vtep {
        /// The outer source.
        outer: IpAddr,
        /// The inner sources.
        inner: IpNet,
    },
    /// An interface.
    Interface(InterfaceName),
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Where packets enter it; `None` for a chain that others jump to.
    pub base: Option<BaseChain>,
    /// Its rules in order.
    pub rules: Vec<NftRule>,
}

/// Hook and priority of a base chain. Its policy is always `accept`: packets are dropped by rules with counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// `filter`, `nat` or `route`.
    pub kind: &'static str,
    /// `prerouting`, `forward`, …
    pub hook: &'static str,
    /// Lower runs earlier.
    pub priority: i32,
}

impl BaseChain {
    /// As [`ListedChain::base`] has it.
    fn observed(&self) -> (String, String, i32) {
        (self.kind.to_owned(), self.hook.to_owned(), self.priority)
    }
}

/// A rule: its nft text and its purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftRule {
    text: String,
    purpose: &'static str,
}

impl NftRule {
    /// A rule with `text`, which the caller renders from typed values only, and a `purpose` that operators read in
    /// `nft list`: plain ASCII without quotes, at most 100 bytes.
    pub fn new(text: String, purpose: &'static str) -> Self {
        Self { text, purpose }
    }

    /// The comment that the rule carries in the kernel.
    pub fn comment(&self) -> String {
        format!("{} #{:016x}", self.purpose, fnv1a(self.text.as_bytes()))
    }
}

/// The parts of a table in the kernel that the comparison needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedTable {
    /// Sets by name.
    pub sets: BTreeMap<String, ObservedSet>,
    /// Chains by name.
    pub chains: BTreeMap<String, ListedChain>,
    /// Named counters with packets and bytes.
    pub counters: BTreeMap<String, Counter>,
}

/// A set as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedSet {
    /// `None`: of a type that we never make.
    pub kind: Option<SetKind>,
    /// The elements; `None` if one could not be read: then the set is rewritten.
    pub elements: Option<BTreeSet<Element>>,
}

/// Commands that `nft -f -` applies as one: all or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NftTransaction(Vec<String>);

impl NftTransaction {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The commands, one a line.
    pub fn text(&self) -> String {
        let mut text = self.0.join("\n");
        text.push('\n');
        text
    }

    /// How many commands.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends a command rendered from typed values.
    pub fn push(&mut self, command: String) {
        self.0.push(command);
    }
}

/// The difference between a table and the kernel's, in two steps: additions that this pass's routes need come first,
/// removals once the old routes are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableDiff {
    /// Before any route changes.
    pub before: NftTransaction,
    /// After the routes have changed.
    pub after: NftTransaction,
}

impl NftTable {
    /// The changes that turn `observed` (`None` without such a table) into this table, named `name`.
    ///
    /// Base chains stay where they are. If a chain or a set has another shape (made by another version), the whole
    /// table is replaced in one transaction.
    pub(crate) fn diff(&self, name: &str, observed: Option<&ObservedTable>) -> TableDiff {
        let mut diff = TableDiff::default();
        let empty = ObservedTable::default();
        let rebuild = observed.is_some_and(|observed| self.shape_differs(observed));
        if observed.is_none() || rebuild {
            diff.before.push(format!("add table inet {name}"));
        }
        if rebuild {
            diff.before.push(format!("delete table inet {name}"));
            diff.before.push(format!("add table inet {name}"));
        }
        let observed = match observed {
            Some(observed) if !rebuild => observed,
            _ => &empty,
        };
        for counter in &self.counters {
            if !observed.counters.contains_key(counter.as_ref()) {
                diff.before.push(format!("add counter inet {name} {counter}"));
            }
        }
        for (set_name, set) in &self.sets {
            set.diff(name, set_name, observed.sets.get(set_name.as_ref()), &mut diff);
        }
        // All chains first: a rule may jump to any of them.
        for (chain_name, chain) in &self.chains {
            if !observed.chains.contains_key(chain_name.as_ref()) {
                diff.before.push(chain.add(name, chain_name));
            }
        }
        for (chain_name, chain) in &self.chains {
            chain.diff(name, chain_name, observed.chains.get(chain_name.as_ref()), &mut diff);
        }
        self.remove_strangers(name, observed, &mut diff);
        diff
    }

    /// This table as the kernel reports it once created; its difference from it is empty.
    pub(crate) fn as_observed(&self) -> ObservedTable {
        let set = |set: &NftSet| ObservedSet { kind: Some(set.kind), elements: Some(set.elements.clone()) };
        let chain = |chain: &Chain| ListedChain {
            base: chain.base.as_ref().map(BaseChain::observed),
            policy_drop: false,
            comments: chain.rules.iter().map(|rule| Some(rule.comment())).collect(),
        };
        ObservedTable {
            sets: self.sets.iter().map(|(name, this)| (name.to_string(), set(this))).collect(),
            chains: self.chains.iter().map(|(name, this)| (name.to_string(), chain(this))).collect(),
            counters: self.counters.iter().map(|name| (name.to_string(), Counter::default())).collect(),
        }
    }

    fn shape_differs(&self, observed: &ObservedTable) -> bool {
        let set_differs = |(name, set): (&Cow<'static, str>, &NftSet)| {
            observed.sets.get(name.as_ref()).is_some_and(|seen| seen.kind != Some(set.kind))
        };
        let chain_differs = |(name, chain): (&Cow<'static, str>, &Chain)| {
            observed
                .chains
                .get(name.as_ref())
                .is_some_and(|seen| seen.base != chain.base.as_ref().map(BaseChain::observed))
        };
        self.sets.iter().any(set_differs) || self.chains.iter().any(chain_differs)
    }

    /// The table is ours alone: any other content is from another version, or a mistake.
    fn remove_strangers(&self, name: &str, observed: &ObservedTable, diff: &mut TableDiff) {
        let chains: Vec<_> = observed
            .chains
            .keys()
            .filter(|chain| !self.chains.contains_key(chain.as_str()) && is_identifier(chain))
            .collect();
        for chain in &chains {
            diff.after.push(format!("flush chain inet {name} {chain}"));
        }
        for chain in &chains {
            diff.after.push(format!("delete chain inet {name} {chain}"));
        }
        for set in observed.sets.keys() {
            if !self.sets.contains_key(set.as_str()) && is_identifier(set) {
                diff.after.push(format!("delete set inet {name} {set}"));
            }
        }
        for counter in observed.counters.keys() {
            if !self.counters.contains(counter.as_str()) && is_identifier(counter) {
                diff.after.push(format!("delete counter inet {name} {counter}"));
            }
        }
    }
}

impl NftSet {
    /// A set of the prefixes of one family, none inside another.
    pub fn prefixes<'a>(ipv4: bool, prefixes: impl IntoIterator<Item = &'a IpNet>) -> Self {
        let elements = outermost(prefixes.into_iter().filter(|p| matches!(p, IpNet::V4(_)) == ipv4).map(IpNet::trunc));
        Self {
            kind: if ipv4 { SetKind::Ipv4 } else { SetKind::Ipv6 },
            elements: elements.into_iter().map(Element::Prefix).collect(),
        }
    }

    /// A set of the prefixes of one family with their interfaces, none inside another on the same interface.
    pub(crate) fn prefixes_on<'a>(ipv4: bool, entries: impl IntoIterator<Item = &'a PrefixOn>) -> Self {
        let mut by_dev: BTreeMap<&InterfaceName, Vec<IpNet>> = BTreeMap::new();
        for entry in entries {
            if matches!(entry.prefix, IpNet::V4(_)) == ipv4 {
                by_dev.entry(&entry.dev).or_default().push(entry.prefix.trunc());
            }
        }
        let elements = by_dev
            .into_iter()
            .flat_map(|(dev, prefixes)| {
                outermost(prefixes).into_iter().map(|prefix| Element::On(PrefixOn { prefix, dev: dev.clone() }))
            })
            .collect();
        Self { kind: if ipv4 { SetKind::Ipv4On } else { SetKind::Ipv6On }, elements }
    }

    /// A set of the prefixes of one family with their next hops, none inside another to the same next hop.
    pub(crate) fn prefixes_via<'a>(ipv4: bool, entries: impl IntoIterator<Item = &'a PrefixVia>) -> Self {
        let mut by_hop: BTreeMap<(&InterfaceName, IpAddr), Vec<IpNet>> = BTreeMap::new();
        for entry in entries {
            if matches!(entry.prefix, IpNet::V4(_)) == ipv4 && entry.via.is_ipv4() == ipv4 {
                by_hop.entry((&entry.dev, entry.via)).or_default().push(entry.prefix.trunc());
            }
        }
        let elements = by_hop
            .into_iter()
            .flat_map(|((dev, via), prefixes)| {
                let element = move |prefix| Element::Via(PrefixVia { prefix, dev: dev.clone(), via });
                outermost(prefixes).into_iter().map(element)
            })
            .collect();
        Self { kind: if ipv4 { SetKind::Ipv4Via } else { SetKind::Ipv6Via }, elements }
    }

    /// A set of the prefixes of peers' ends, none inside another of the same end.
    pub(crate) fn vteps<'a>(ipv4: bool, peers: impl IntoIterator<Item = &'a VxlanPeer>) -> Self {
        let mut by_end: BTreeMap<IpAddr, Vec<IpNet>> = BTreeMap::new();
        for peer in peers {
            let prefixes = peer.prefixes.iter().filter(|prefix| matches!(prefix, IpNet::V4(_)) == ipv4);
            by_end.entry(peer.vtep.address).or_default().extend(prefixes.map(IpNet::trunc));
        }
        let elements = by_end.into_iter().flat_map(|(outer, prefixes)| {
            outermost(prefixes).into_iter().map(move |inner| Element::Vtep { outer, inner })
        });
        Self { kind: if ipv4 { SetKind::Ipv4Vtep } else { SetKind::Ipv6Vtep }, elements: elements.collect() }
    }

    /// A set of interfaces.
    pub fn interfaces<'a>(names: impl IntoIterator<Item = &'a InterfaceName>) -> Self {
        Self { kind: SetKind::Interface, elements: names.into_iter().cloned().map(Element::Interface).collect() }
    }

    fn diff(&self, table: &str, name: &str, observed: Option<&ObservedSet>, diff: &mut TableDiff) {
        let Some(observed) = observed else {
            diff.before.push(format!("add set inet {table} {name} {{ {} }}", self.kind.declaration()));
            add_elements(table, name, &self.elements, &mut diff.before);
            return;
        };
        let Some(seen) = &observed.elements else {
            self.replace(table, name, &mut diff.before);
            return;
        };
        let added: BTreeSet<Element> = self.elements.difference(seen).cloned().collect();
        let removed: BTreeSet<Element> = seen.difference(&self.elements).cloned().collect();
        let (in_the_way, idle): (BTreeSet<_>, BTreeSet<_>) =
            removed.into_iter().partition(|old| added.iter().any(|new| new.overlaps(old)));
        if !in_the_way.is_empty() && matches!(self.kind, SetKind::Ipv4 | SetKind::Ipv6) {
            // nft refuses to add an interval next to one that the same transaction deletes under it.
            self.replace(table, name, &mut diff.before);
            return;
        }
        delete_elements(table, name, &in_the_way, &mut diff.before);
        add_elements(table, name, &added, &mut diff.before);
        delete_elements(table, name, &idle, &mut diff.after);
    }

    fn replace(&self, table: &str, name: &str, transaction: &mut NftTransaction) {
        transaction.push(format!("flush set inet {table} {name}"));
        add_elements(table, name, &self.elements, transaction);
    }
}

impl SetKind {
    fn declaration(self) -> &'static str {
        match self {
            Self::Ipv4 => "type ipv4_addr; flags interval;",
            Self::Ipv6 => "type ipv6_addr; flags interval;",
            Self::Ipv4On => "type ipv4_addr . ifname; flags interval;",
            Self::Ipv6On => "type ipv6_addr . ifname; flags interval;",
            Self::Ipv4Via => "type ipv4_addr . ifname . ipv4_addr; flags interval;",
            Self::Ipv6Via => "type ipv6_addr . ifname . ipv6_addr; flags interval;",
            // The inner source is read from the payload, so nft has it as a number.
            Self::Ipv4Vtep => "typeof ip saddr . @th,336,32; flags interval;",
            Self::Ipv6Vtep => "typeof ip6 saddr . @th,304,128; flags interval;",
            Self::Interface => "type ifname;",
        }
    }
}

impl Element {
    fn overlaps(&self, other: &Self) -> bool {
        let nested = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
        match (self, other) {
            (Self::Prefix(a), Self::Prefix(b)) => nested(a, b),
            (Self::On(a), Self::On(b)) => a.dev == b.dev && nested(&a.prefix, &b.prefix),
            (Self::Via(a), Self::Via(b)) => (&a.dev, a.via) == (&b.dev, b.via) && nested(&a.prefix, &b.prefix),
            (Self::Vtep { outer: a, inner: x }, Self::Vtep { outer: b, inner: y }) => a == b && nested(x, y),
            (a, b) => a == b,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Prefix(prefix) => prefix.to_string(),
            Self::On(PrefixOn { prefix, dev }) => format!("{prefix} . \"{dev}\""),
            Self::Via(PrefixVia { prefix, dev, via }) => format!("{prefix} . \"{dev}\" . {via}"),
            Self::Vtep { outer, inner } => format!("{outer} . {}", number_range(inner)),
            Self::Interface(name) => format!("\"{name}\""),
        }
    }
}

impl Chain {
    fn add(&self, table: &str, name: &str) -> String {
        let mut text = format!("add chain inet {table} {name}");
        if let Some(base) = &self.base {
            // Writing to a String cannot fail.
            let _ =
                write!(text, " {{ type {} hook {} priority {}; policy accept; }}", base.kind, base.hook, base.priority);
        }
        text
    }

    fn diff(&self, table: &str, name: &str, observed: Option<&ListedChain>, diff: &mut TableDiff) {
        let wanted: Vec<String> = self.rules.iter().map(NftRule::comment).collect();
        if let Some(observed) = observed {
            if observed.policy_drop {
                diff.before.push(self.add(table, name));
            }
            let same = observed.comments.len() == wanted.len()
                && observed.comments.iter().zip(&wanted).all(|(seen, wanted)| seen.as_ref() == Some(wanted));
            if same {
                return;
            }
            diff.before.push(format!("flush chain inet {table} {name}"));
        }
        for (rule, comment) in self.rules.iter().zip(&wanted) {
            diff.before.push(format!("add rule inet {table} {name} {} comment \"{comment}\"", rule.text));
        }
    }
}

/// Elements per command: keeps lines readable in an error and within nft's buffers.
const ELEMENTS_PER_COMMAND: usize = 256;

fn add_elements(table: &str, set: &str, elements: &BTreeSet<Element>, to: &mut NftTransaction) {
    element_commands("add", table, set, elements, to);
}

fn delete_elements(table: &str, set: &str, elements: &BTreeSet<Element>, to: &mut NftTransaction) {
    element_commands("delete", table, set, elements, to);
}

fn element_commands(verb: &str, table: &str, set: &str, elements: &BTreeSet<Element>, to: &mut NftTransaction) {
    let texts: Vec<String> = elements.iter().map(Element::text).collect();
    for chunk in texts.chunks(ELEMENTS_PER_COMMAND) {
        to.push(format!("{verb} element inet {table} {set} {{ {} }}", chunk.join(", ")));
    }
}

/// The prefixes without those contained in others. Adjacent ones are not merged: each element is one that an operator
/// knows, and changes independently.
fn outermost(prefixes: impl IntoIterator<Item = IpNet>) -> Vec<IpNet> {
    let mut sorted: Vec<IpNet> = prefixes.into_iter().collect();
    sorted.sort_by_key(|p| (p.network(), p.prefix_len()));
    let mut out: Vec<IpNet> = Vec::with_capacity(sorted.len());
    for prefix in sorted {
        if !out.last().is_some_and(|last| last.contains(&prefix)) {
            out.push(prefix);
        }
    }
    out
}

/// The addresses of a prefix as nft has them in a payload: one number, or the first and the last.
fn number_range(prefix: &IpNet) -> String {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => format!("0x{:08x}", u32::from(address)),
        IpAddr::V6(address) => format!("0x{:032x}", u128::from(address)),
    };
    let (first, last) = (number(prefix.network()), number(prefix.broadcast()));
    if first == last { first } else { format!("{first}-{last}") }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests;
