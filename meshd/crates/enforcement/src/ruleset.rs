//! Policies in the kernel: dedicated tables, changed in place.
//!
//! ```text
//! inet    forward         filter       from the tunnel and not rewritten: judged in user space
//!                                      cached verdict ▶ passes, see `memo`
//!                                      flow's source ∈ egress4/6 ▶ its chain · destination ∈ ingress4/6 ▶ its chain
//!                                      unknown pod: refused if any policy may select it
//!         input           filter       from a pod to this node: source ∈ egress4/6 ▶ its chain
//!         *_packets                    untracked, invalid: the same by the packet's own header
//!         dnat_check      postrouting  packets rewritten to a remote pod must have this node's source address
//!         refused_*                    reports a sample, and drops; in audit mode lets pass
//!         allowed_*                    reports a sample, and lets pass
//!         pre_defrag      prerouting   see `anti_spoof`
//! bridge  anti_spoof, bridge_forward, bridge_output   see `bridge`
//! ```
//!
//! The tables outlive the daemon. Their base chains are created once and stay; each change is one transaction. The
//! daemon keeps a copy of the kernel's content. The kernel reports foreign changes, down to a single element, and the
//! tables are then rebuilt.

mod anti_spoof;
mod base;
mod bridge;
mod frame;
mod memo;
mod nft;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use netfilter::{Generation, NftMonitor, TableChanges, TableListing};
use policy::nft::{Ruleset, transactions};

use self::{
    base::{BASE_CHAINS, CLOSED, base, base_chains, closed},
    nft::{apply, list},
};
pub(super) use self::{
    bridge::{isolated, switched_judged},
    frame::{Frame, PodPort},
    nft::RulesetError,
};

/// The tables `inet NAME` and `bridge NAME`, and their known state in the kernel.
#[derive(Debug)]
pub(super) struct RuleTable {
    name: String,
    /// The installed ruleset; `None` while unknown.
    held: Option<InstalledRuleset>,
    /// The rules of [`close`](RuleTable::close), while there are no others.
    closed: Option<Closed>,
}

#[derive(Debug)]
struct Closed {
    frame: Frame,
    /// Monitors foreign changes since before the tables were closed.
    monitor: NftMonitor,
}

#[derive(Debug)]
struct InstalledRuleset {
    frame: Frame,
    ruleset: Ruleset,
    /// Monitors foreign changes since before the tables were put.
    monitor: NftMonitor,
}

impl RuleTable {
    pub(super) const fn new(name: String) -> Self {
        Self { name, held: None, closed: None }
    }

    /// Makes the kernel hold this; nothing is done where it does. Rules change in one transaction, behind one that
    /// makes the sets that they refer to; only where the table has other sets of these names, at once with those.
    pub(super) fn put(&mut self, frame: &Frame, mut ruleset: Ruleset) -> Result<(), RulesetError> {
        let table = format!("inet {}", self.name);
        let (mut ahead, mut text) = (String::new(), String::new());
        self.is_whole()?;
        match &self.held {
            Some(held) => {
                // The base chains' rules refer to maps, which must be there first.
                let old = Some((&held.frame, &held.ruleset));
                let [stale, elements] = anti_spoof::change(&table, old, (frame, &ruleset));
                let change = transactions(&table, &held.ruleset, &mut ruleset);
                ahead = change.sets;
                text.push_str(&stale);
                text.push_str(&pods(&table, Some(&held.ruleset), &ruleset));
                text.push_str(&elements);
                if held.frame != *frame {
                    text.push_str(&base(&table, frame, true));
                    text.push_str(&bridge::change(&self.name, Some(&held.frame), frame));
                }
                // Verdicts of other rules are forgotten by the transaction that changes them.
                let forget = change.verdicts || !text.is_empty();
                text.insert_str(stale.len(), &change.rules);
                if ahead.is_empty() && text.is_empty() {
                    return Ok(());
                }
                if forget {
                    text.push_str(&memo::make(&table, frame.audit, true));
                }
            }
            None => {
                // Replaces the content of an earlier run at once. Base chains stay.
                text.push_str(&base_chains(&table));
                let listing = list("inet", &self.name)?;
                if let Some(listing) = &listing {
                    text.push_str(&emptied(&table, listing));
                }
                let change = transactions(&table, &Ruleset::default(), &mut ruleset);
                let is_taken = |name: &String| listing.as_ref().is_some_and(|listing| listing.sets.contains_key(name));
                if change.sets.is_empty() || ruleset.kernel_sets().any(|name| is_taken(&name)) {
                    text.push_str(&change.sets);
                } else {
                    ahead = format!("add table {table}\n{}", change.sets);
                }
                text.push_str(&change.rules);
                text.push_str(&pods(&table, None, &ruleset));
                text.push_str(&anti_spoof::change(&table, None, (frame, &ruleset)).concat());
                text.push_str(&memo::make(&table, frame.audit, false));
                text.push_str(&base(&table, frame, false));
                text.push_str(&bridge::change(&self.name, None, frame));
            }
        }
        let mut monitor = match self.held.take() {
            Some(held) => held.monitor,
            None => NftMonitor::open(&self.name)?,
        };
        // Any failure from here on leaves `held` empty: the kernel's content is uncertain.
        if monitor.changes()? != TableChanges::None {
            return Err(RulesetError::Tampered);
        }
        let mut seen = TableActivity::Ours;
        for text in [&ahead, &text].into_iter().filter(|text| !text.is_empty()) {
            seen = seen.max(apply_and_look(text, &mut monitor)?);
            // If the rest is refused, the closing rules remain.
            let is_ours = |closed: &mut Closed| matches!(closed.monitor.changes(), Ok(TableChanges::Transactions(1)));
            self.closed = self.closed.take().and_then(|mut closed| is_ours(&mut closed).then_some(closed));
        }
        let held = InstalledRuleset { frame: frame.clone(), ruleset, monitor };
        let intact = match seen {
            TableActivity::Ours => true,
            // Messages of other tables may have displaced those of ours: chains, sets and numbers of rules are
            // compared.
            TableActivity::Unclear => list("inet", &self.name)?.is_some_and(|listing| holds(&listing, &held)),
            TableActivity::Others => false,
        };
        if !intact {
            return Err(RulesetError::Tampered);
        }
        self.held = Some(held);
        self.closed = None;
        Ok(())
    }

    /// Closes this node's pods to all but its own processes, unless rules of an earlier run exist: those stay in force
    /// until this run has complete inputs. The table must not have been [`put`](Self::put). Does nothing if the same
    /// rules are in place: foreign changes are reported first.
    pub(super) fn close(&mut self, frame: &Frame) -> Result<(), RulesetError> {
        if self.held.is_some() {
            return Ok(());
        }
        if let Some(mut closed) = self.closed.take()
            && closed.frame == *frame
            && closed.monitor.changes()? == TableChanges::None
        {
            self.closed = Some(closed);
            return Ok(());
        }
        let mut monitor = NftMonitor::open(&self.name)?;
        let listing = list("inet", &self.name)?;
        if listing.as_ref().is_some_and(is_open) {
            return Ok(());
        }
        let table = format!("inet {}", self.name);
        let before = listing.as_ref().map(|listing| emptied(&table, listing)).unwrap_or_default();
        let elements = anti_spoof::change(&table, None, (frame, &Ruleset::default())).concat();
        let bridged = bridge::change(&self.name, None, frame);
        let text = base_chains(&table) + &before + &elements + &closed(&table, frame) + &bridged;
        if apply_and_look(&text, &mut monitor)? == TableActivity::Ours {
            self.closed = Some(Closed { frame: frame.clone(), monitor });
        }
        Ok(())
    }

    /// Whether the kernel still has our rules. Notes foreign changes.
    pub(super) fn is_whole(&mut self) -> Result<bool, RulesetError> {
        let Some(held) = &mut self.held else { return Ok(false) };
        let changes = held.monitor.changes();
        if !matches!(changes, Ok(TableChanges::None)) {
            self.held = None;
        }
        Ok(changes? == TableChanges::None)
    }
}

/// The sets of all pods with chains, and of address pairs of one pod. Other addresses in this node's subnets are
/// unknown pods.
fn pods(table: &str, old: Option<&Ruleset>, new: &Ruleset) -> String {
    let mut out = String::new();
    for (digit, map, kind) in [(4, "ingress4", "ipv4_addr"), (6, "ingress6", "ipv6_addr")] {
        let addresses = |ruleset: &Ruleset| -> BTreeSet<String> {
            ruleset.maps.get(map).into_iter().flat_map(|map| map.keys().map(ToString::to_string)).collect()
        };
        let ends = |ruleset: &Ruleset| -> BTreeSet<String> {
            let mut pods: BTreeMap<&str, Vec<&IpAddr>> = BTreeMap::new();
            for (address, chain) in ruleset.maps.get(map).into_iter().flatten() {
                pods.entry(chain).or_default().push(address);
            }
            let pairs = |own: &Vec<&IpAddr>| -> Vec<String> {
                own.iter().flat_map(|one| own.iter().map(move |other| format!("{one} . {other}"))).collect()
            };
            pods.values().flat_map(pairs).collect()
        };
        type Elements<'a> = &'a dyn Fn(&Ruleset) -> BTreeSet<String>;
        let sets: [(String, String, Elements<'_>); 2] = [
            (format!("pods{digit}"), kind.to_owned(), &addresses),
            (format!("ends{digit}"), format!("{kind} . {kind}"), &ends),
        ];
        for (set, kind, of) in sets {
            if old.is_none() {
                let _ = writeln!(out, "add set {table} {set} {{ type {kind}; }}");
            }
            let (before, after) = (old.map(of).unwrap_or_default(), of(new));
            for (verb, from, other) in [("delete", &before, &after), ("add", &after, &before)] {
                let differing: Vec<&str> = from.difference(other).map(String::as_str).collect();
                if !differing.is_empty() {
                    let _ = writeln!(out, "{verb} element {table} {set} {{ {} }}", differing.join(", "));
                }
            }
        }
    }
    out
}

/// Changes of the monitored tables while a transaction was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TableActivity {
    /// Only that transaction.
    Ours,
    /// Too much was done to all tables to tell.
    Unclear,
    /// Another program changed something too, be it a single element.
    Others,
}

/// Applies a transaction; returns the changes of the tables since the last read of the monitor.
fn apply_and_look(text: &str, monitor: &mut NftMonitor) -> Result<TableActivity, RulesetError> {
    let before = Generation::now().ok();
    apply(text)?;
    let undisturbed = before.is_some() && Generation::now().ok() == before.map(|before| before.after(1));
    Ok(match monitor.changes()? {
        TableChanges::None | TableChanges::Transactions(..=1) => TableActivity::Ours,
        TableChanges::Overrun if undisturbed => TableActivity::Ours,
        TableChanges::Overrun => TableActivity::Unclear,
        TableChanges::Transactions(_) => TableActivity::Others,
    })
}

/// Whether this has policy rules, not only the closing ones.
fn is_open(listing: &TableListing) -> bool {
    let filled = |chain: &str| listing.chains.get(chain).is_some_and(|chain| !chain.comments.is_empty());
    ["forward", "input", "refused_in", "refused_out"].into_iter().all(filled) && !listing.chains.contains_key(CLOSED)
}

/// Whether a table matches our rules by chains, numbers of rules, sets and maps.
fn holds(listing: &TableListing, held: &InstalledRuleset) -> bool {
    let rules = |chain: &str| listing.chains.get(chain).map(|chain| chain.comments.len());
    let base = base("x", &held.frame, false);
    BASE_CHAINS.iter().all(|(chain, _)| {
        let wanted = base.lines().filter(|line| line.starts_with(&format!("add rule x {chain} "))).count();
        rules(chain) == Some(wanted)
    }) && held.ruleset.kernel_chains().all(|(name, wanted)| rules(&name) == Some(wanted))
        && memo::rules(held.frame.audit).iter().all(|(name, wanted)| rules(name) == Some(wanted.len()))
        && ["pods4", "pods6", "ends4", "ends6"].iter().all(|name| listing.sets.contains_key(*name))
        && anti_spoof::set_names().all(|name| listing.sets.contains_key(name) || listing.maps.contains(name))
        && memo::sets().chain(held.ruleset.kernel_sets()).all(|name| listing.sets.contains_key(&name))
        && held.ruleset.kernel_maps().all(|name| listing.maps.contains(&name))
}

fn is_fixed(chain: &str) -> bool {
    BASE_CHAINS.iter().any(|(name, _)| *name == chain)
}

/// Commands that empty a table except its base chains.
fn emptied(table: &str, listing: &TableListing) -> String {
    let mut out = String::new();
    let chains = || listing.chains.keys().filter(|name| !is_fixed(name));
    // Writing to a String cannot fail.
    for map in &listing.maps {
        let _ = writeln!(out, "flush map {table} {map}");
    }
    for chain in chains() {
        let _ = writeln!(out, "flush chain {table} {chain}");
    }
    for map in &listing.maps {
        let _ = writeln!(out, "delete map {table} {map}");
    }
    for chain in chains() {
        let _ = writeln!(out, "delete chain {table} {chain}");
    }
    for set in listing.sets.keys() {
        let _ = writeln!(out, "delete set {table} {set}");
    }
    out
}

#[cfg(test)]
mod tests;
