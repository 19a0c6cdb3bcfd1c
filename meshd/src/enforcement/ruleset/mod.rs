//! Policies in the kernel: tables of their own, changed in place.
//!
//! ```text
//! inet    forward     filter       from the tunnel and not rewritten: judged in user space
//!                                  the flow's source ∈ egress4/6 ▶ its chain · its destination ∈ ingress4/6 ▶ its chain
//!                                  a pod of which nothing is known: refused while policies have a say
//!         input       filter       from a pod to this node: source ∈ egress4/6 ▶ its chain
//!         rewritten   postrouting  what was rewritten to a remote pod must bear this node's address
//!         refused_*                reports a sample, and drops; in audit mode lets pass
//!         allowed_*                reports a sample, and lets pass
//! bridge  borrowed, switched       see `bridge`
//! ```
//!
//! The tables outlive the daemon. Their base chains are made once and stay; each change is one transaction. What the
//! kernel holds is remembered: whatever anybody else does to these tables is heard, down to a single element, and then
//! they are made anew.

mod bridge;
mod frame;
mod nft;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};

use policy::nft::{Field, Marks, Ruleset, transaction};

pub(super) use self::{bridge::switched_judged, frame::Frame, nft::NftError};
use self::{
    frame::{BASE_CHAINS, CLOSED, base, base_chains, closed},
    nft::{Listing, apply, list},
};
use super::conntrack::Conntrack;
use crate::kernel::nft::{Generation, Heard, Watch};

/// Bits of the connection mark that hold generations, unless others are chosen. Others use the lower half.
pub const DEFAULT_MARKS: Marks = Marks { egress: Field { shift: 16, bits: 7 }, ingress: Field { shift: 24, bits: 7 } };

/// The tables `inet NAME` and `bridge NAME`, and what of them is known to be in the kernel.
#[derive(Debug)]
pub(super) struct RuleTable {
    name: String,
    marks: Marks,
    /// What the kernel holds; `None` while that is not known.
    held: Option<Held>,
    /// The marks that connections bear may be of other rules that had the same generations.
    stale_marks: bool,
    nothing: Ruleset,
}

#[derive(Debug)]
struct Held {
    frame: Frame,
    ruleset: Ruleset,
    /// Hears what others do to the tables from before they were put on.
    watch: Watch,
}

impl RuleTable {
    pub(super) fn new(name: String, marks: Marks) -> Self {
        Self { name, marks, held: None, stale_marks: false, nothing: Ruleset::default() }
    }

    /// Where generations stand in the connection mark.
    pub(super) const fn marks(&self) -> &Marks {
        &self.marks
    }

    /// What the kernel holds for the pods; empty before the first time.
    pub(super) fn ruleset(&self) -> &Ruleset {
        self.held.as_ref().map_or(&self.nothing, |held| &held.ruleset)
    }

    /// Makes the kernel hold this, in one transaction; nothing is done where it does.
    pub(super) fn put(&mut self, frame: &Frame, ruleset: Ruleset) -> Result<(), NftError> {
        let table = format!("inet {}", self.name);
        let mut text = String::new();
        self.stale_marks |= !self.is_whole()?;
        match &self.held {
            Some(held) => {
                // The base chains' rules refer to maps, which must be there first.
                if ruleset.repeats(&held.ruleset) {
                    self.forget_judgements()?;
                    // And what the old chains judge until they are gone.
                    self.stale_marks = true;
                }
                text.push_str(&transaction(&table, &self.marks, &held.ruleset, &ruleset));
                text.push_str(&pods(&table, Some(&held.ruleset), &ruleset));
                if held.frame != *frame {
                    text.push_str(&base(&table, frame, true));
                    text.push_str(&bridge::change(&self.name, Some(&held.frame), frame));
                }
            }
            None => {
                // What an earlier run left goes, and this comes, at once. Base chains stay where they are.
                text.push_str(&base_chains(&table));
                if let Some(listing) = list("inet", &self.name)? {
                    text.push_str(&emptied(&table, &listing));
                }
                text.push_str(&transaction(&table, &self.marks, &Ruleset::default(), &ruleset));
                text.push_str(&pods(&table, None, &ruleset));
                text.push_str(&base(&table, frame, false));
                text.push_str(&bridge::change(&self.name, None, frame));
            }
        }
        if text.is_empty() {
            return self.settle_marks();
        }
        let mut watch = match self.held.take() {
            Some(held) => held.watch,
            None => Watch::open(&self.name)?,
        };
        // Whatever goes wrong from here on leaves `held` empty: what is there may not be what was thought.
        if watch.heard()? != Heard::Nothing {
            return Err(NftError::Tampered);
        }
        let before = Generation::now().ok();
        apply(&text)?;
        let undisturbed = before.is_some() && Generation::now().ok() == before.map(|before| before.after(1));
        let mut held = Held { frame: frame.clone(), ruleset, watch };
        match held.watch.heard()? {
            // Our own.
            Heard::Transactions(1) => {}
            _ if undisturbed => {}
            // More was done than can be told apart from what we did.
            _ if list("inet", &self.name)?.is_some_and(|listing| holds(&listing, &held)) => {}
            _ => return Err(NftError::Tampered),
        }
        self.held = Some(held);
        self.settle_marks()
    }

    /// Forgets the judgements that are not of these rules, where there may be any; until that is done it is to be done.
    fn settle_marks(&mut self) -> Result<(), NftError> {
        if self.stale_marks {
            self.forget_judgements()?;
            self.stale_marks = false;
        }
        Ok(())
    }

    /// Lays rules that let nothing pass to or from this node's pods but what its own processes send, where no rules of
    /// an earlier run stand: those stay in force until this run has a picture of its own. The table must not have been
    /// [`put`](Self::put).
    pub(super) fn close(&mut self, frame: &Frame) -> Result<(), NftError> {
        if self.held.is_some() {
            return Ok(());
        }
        let listing = list("inet", &self.name)?;
        if listing.as_ref().is_some_and(stands_open) {
            return Ok(());
        }
        let table = format!("inet {}", self.name);
        let before = listing.as_ref().map(|listing| emptied(&table, listing)).unwrap_or_default();
        apply(&(base_chains(&table) + &before + &closed(&table, frame)))
    }

    /// Whether the kernel still holds what was put. What others did to the tables is noted by this.
    pub(super) fn is_whole(&mut self) -> Result<bool, NftError> {
        let Some(held) = &mut self.held else { return Ok(false) };
        let heard = held.watch.heard();
        if !matches!(heard, Ok(Heard::Nothing)) {
            self.held = None;
        }
        Ok(heard? == Heard::Nothing)
    }

    /// Marks of an earlier run, or of generations that begin again, say nothing about these chains: every connection is
    /// judged again.
    fn forget_judgements(&self) -> Result<(), NftError> {
        let mask = self.marks.egress.mask() | self.marks.ingress.mask();
        Conntrack::open().and_then(|mut conntrack| conntrack.clear_marks(mask)).map_err(NftError::Marks)
    }
}

/// The sets of all pods that have chains: what is in this node's subnets besides is a pod of which nothing is known.
fn pods(table: &str, old: Option<&Ruleset>, new: &Ruleset) -> String {
    let mut out = String::new();
    for (set, map, kind) in [("pods4", "ingress4", "ipv4_addr"), ("pods6", "ingress6", "ipv6_addr")] {
        let of = |ruleset: &Ruleset| -> BTreeSet<IpAddr> {
            ruleset.maps.get(map).into_iter().flat_map(|map| map.keys().copied()).collect()
        };
        if old.is_none() {
            let _ = writeln!(out, "add set {table} {set} {{ type {kind}; }}");
        }
        let (before, after) = (old.map(of).unwrap_or_default(), of(new));
        for (verb, from, other) in [("delete", &before, &after), ("add", &after, &before)] {
            let differing: Vec<String> = from.difference(other).map(ToString::to_string).collect();
            if !differing.is_empty() {
                let _ = writeln!(out, "{verb} element {table} {set} {{ {} }}", differing.join(", "));
            }
        }
    }
    out
}

/// Whether this holds the rules of a picture that was in force, not only those that close.
fn stands_open(listing: &Listing) -> bool {
    let filled = |chain: &str| listing.chains.get(chain).is_some_and(|rules| *rules > 0);
    ["forward", "input", "refused_in", "refused_out"].into_iter().all(filled) && !listing.chains.contains_key(CLOSED)
}

/// Whether a table looks like what was put, as far as chains, numbers of rules, sets and maps go.
fn holds(listing: &Listing, held: &Held) -> bool {
    let rules = |chain: &str| listing.chains.get(chain).copied();
    let base = base("x", &held.frame, false);
    BASE_CHAINS.iter().all(|(chain, _)| {
        let wanted = base.lines().filter(|line| line.starts_with(&format!("add rule x {chain} "))).count();
        rules(chain) == Some(wanted)
    }) && held.ruleset.chains.iter().all(|(name, chain)| {
        let wanted = chain.rules.iter().map(policy::nft::Rule::count).sum();
        rules(name) == Some(wanted)
    }) && ["pods4", "pods6"].iter().all(|name| listing.sets.contains(*name))
        && held.ruleset.sets.keys().all(|name| listing.sets.contains(name))
        && held.ruleset.maps.keys().all(|name| listing.maps.contains(*name))
}

fn is_fixed(chain: &str) -> bool {
    BASE_CHAINS.iter().any(|(name, _)| *name == chain)
}

/// Takes away what is in a table besides its base chains.
fn emptied(table: &str, listing: &Listing) -> String {
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
    for set in &listing.sets {
        let _ = writeln!(out, "delete set {table} {set}");
    }
    out
}
