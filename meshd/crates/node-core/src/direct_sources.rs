//! Sources accepted in clear text, and their grace period after they leave the plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use cow_map::CowMap;
use ipnet::IpNet;
use mesh::{kernel_state::PrefixOn, topology::PeerId};

/// How long sources that were accepted direct are accepted still: the other end may not know yet.
pub(super) const LINGER: Duration = Duration::from_secs(10);

/// The sources that the firewall accepts direct.
#[derive(Debug, Default)]
pub(super) struct DirectSources(BTreeMap<PrefixOn, Lingering>);

#[derive(Debug)]
struct Lingering {
    /// The owner of the prefix; unknown for prefixes of an earlier run.
    owner: Option<PeerId>,
    /// Where the plan accepts it no longer: until then.
    until: Option<Instant>,
}

impl DirectSources {
    /// The sources of an earlier run, whose peers may keep sending direct until they learn of this run.
    pub(super) fn at_start(sources: impl IntoIterator<Item = PrefixOn>, now: Instant) -> Self {
        let held = || Lingering { owner: None, until: Some(now + LINGER) };
        Self(sources.into_iter().map(|source| (source, held())).collect())
    }

    /// When a source is next to be dropped.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(|held| held.until).min()
    }

    /// Adds recently accepted sources to `accepted`, those of the plan. A prefix without its former owner is excluded:
    /// it would have two senders. `owners` returns the owner of a prefix.
    pub(super) fn linger(&mut self, accepted: &mut Vec<PrefixOn>, owners: &CowMap<IpNet, PeerId>, now: Instant) {
        if accepted.is_empty() && self.0.is_empty() {
            return;
        }
        let planned: BTreeSet<PrefixOn> = accepted.iter().cloned().collect();
        self.0.retain(|source, held| {
            let until = *held.until.get_or_insert(now + LINGER);
            let same = owners.get(&source.prefix).is_some_and(|now| held.owner.as_ref().is_none_or(|was| was == now));
            until > now && same && !planned.contains(source)
        });
        accepted.extend(self.0.keys().cloned());
        self.0.extend(planned.into_iter().map(|source| {
            let owner = owners.get(&source.prefix).cloned();
            (source, Lingering { owner, until: None })
        }));
    }
}
