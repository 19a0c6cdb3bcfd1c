//! Publishes the store: the records, the configuration in force, the problems.

use std::{collections::BTreeSet, sync::Arc};

use etcd_schema::{Key, NetworkConfig, RecordClass, SubnetKey, Value};
use ipnet::{Ipv4Net, Ipv6Net};
use mesh::{
    problem::{Problem, ProblemCode},
    records::{MAX_PROBLEMS, Record, Records, Retained},
};
use prefix_trie::PrefixSet;
use text::quote;

use super::{
    Store,
    reading::{bad_key, bad_value},
};
use crate::{
    config_rule::ConfigReview,
    guard::{HOLD, HeldRecord, HoldReason, Sign, WINDOW},
};

/// The remedy that ends a hold.
const ACCEPT: &str = "run `meshctl etcd accept`";

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

impl Store {
    /// Brings the records up to date for these keys.
    pub(super) fn publish(&mut self, touched: BTreeSet<Key>) -> Option<Arc<Records>> {
        let mut records = Records::clone(&self.records);
        let mut subnets_touched = false;
        let mut config_touched = false;
        for key in touched {
            let record = self.in_force(&key);
            match &key {
                Key::Config => config_touched = true,
                Key::Subnet(subnet) => {
                    subnets_touched = true;
                    if record.as_ref().is_some_and(|record| record.retained.is_some()) {
                        self.retained_subnets.insert(*subnet);
                    } else {
                        self.retained_subnets.remove(subnet);
                    }
                }
                // A configuration may be refused for the sake of a peer.
                Key::Peer(_) => config_touched |= self.config_problem.is_some(),
                _ => {}
            }
            records.set(key, record);
        }
        if subnets_touched && !self.retained_subnets.is_empty() {
            self.yield_retained(&mut records);
        }
        if config_touched || subnets_touched {
            self.judge_config(&mut records);
        }
        let problems = self.all_problems();
        if *records.problems != problems {
            records.problems = Arc::new(problems);
        }
        records.synced = self.lists > 0;
        if self.records.is_same(&records) {
            return None;
        }
        records.revision = self.revision;
        self.records = Arc::new(records);
        Some(Arc::clone(&self.records))
    }

    /// The record of `key` in force, of those that the mesh reads.
    pub(super) fn in_force(&self, key: &Key) -> Option<Record<Value>> {
        let text = key.to_string();
        let kept = self.standing(&text)?;
        let retained = match self.guard.held(&text) {
            Some(_) => Some(Retained::Withheld),
            None => kept.unreadable.then_some(Retained::Unreadable),
        };
        kept.record(retained)
    }

    /// Takes retained subnets out of the records while a valid record claims an address of theirs.
    fn yield_retained(&self, records: &mut Records) {
        let valid = || records.subnets.iter().filter(|(_, record)| record.retained.is_none()).map(|(key, _)| key);
        let v4: PrefixSet<Ipv4Net> = valid().filter_map(|key| key.v4).collect();
        let v6: PrefixSet<Ipv6Net> = valid().filter_map(|key| key.v6).collect();
        let claimed = |key: &SubnetKey| {
            key.v4.is_some_and(|net| v4.get_lpm(&net).is_some() || v4.children(&net).next().is_some())
                || key.v6.is_some_and(|net| v6.get_lpm(&net).is_some() || v6.children(&net).next().is_some())
        };
        for key in &self.retained_subnets {
            let claimed = claimed(key);
            let key = Key::Subnet(*key);
            let record = if claimed { None } else { self.in_force(&key) };
            records.set(key, record);
        }
    }

    /// Decides which configuration is in force, see [`config_rule`](crate::config_rule).
    fn judge_config(&mut self, records: &mut Records) {
        let candidate = self.candidate();
        // The configuration in force excludes no further subnets, so they need no check.
        if candidate.is_some() && records.config == candidate {
            self.config_problem = None;
            return;
        }
        let judge = ConfigReview {
            before: records.config.as_ref(),
            present: self.keys.contains_key(&Key::Config.to_string()),
            subnets: &records.subnets,
            peers: &records.peers,
            nodes: &records.nodes,
        };
        self.config_problem = judge.refusal(candidate.as_ref());
        if self.config_problem.is_none() && records.config != candidate {
            records.config = candidate;
        }
    }

    /// The configuration in etcd, if readable.
    fn candidate(&self) -> Option<Record<NetworkConfig>> {
        self.in_force(&Key::Config).and_then(Record::of)
    }

    /// The problem of an etcd in doubt, with the held records.
    fn doubt_problem(&self) -> Option<Problem> {
        let (doubt, known) = (self.guard.doubt()?, self.guard.lineage()?);
        let held = self.guard.all_held().filter(|(_, held)| held.reason == HoldReason::Doubt);
        let policies = held.clone().filter(|(_, held)| held.class == RecordClass::Policy).count();
        let others = held.count() - policies;
        let replaced = match (doubt.sign, known.cluster, doubt.seen.cluster) {
            (Sign::Cluster, Some(known), Some(seen)) => {
                Some(format!("etcd's cluster ID changed from {known} to {seen}"))
            }
            _ => None,
        };
        let code = if replaced.is_some() { ProblemCode::EtcdReplaced } else { ProblemCode::RevisionWentBack };
        let found = replaced.unwrap_or_else(|| match doubt.sign {
            Sign::Key => "etcd returns an older version of a key than before".to_owned(),
            _ => format!("etcd's revision went back from {} to {}", known.revision, doubt.seen.revision),
        });
        Some(Problem {
            code,
            key: None,
            cause: format!(
                "{found}; {} and {} that are missing or unconfirmed in etcd stay in force",
                counted(policies, "policy", "policies"),
                counted(others, "other record", "other records"),
            ),
            remedy: format!(
                "if this is the wrong etcd, correct --etcd-endpoints; if it was restored or rebuilt, put the missing \
                 keys back, or {ACCEPT} on each node to accept its content"
            ),
        })
    }

    /// Records that went at once and wait.
    fn mass_problems(&self) -> Vec<Problem> {
        let held = |class: RecordClass| {
            let mass = |held: &HeldRecord<_>| held.class == class && matches!(held.reason, HoldReason::Mass { .. });
            self.guard.all_held().filter(|(_, held)| mass(held)).count()
        };
        let (nodes, policies) = (held(RecordClass::Node), held(RecordClass::Policy));
        let problem = |code, cause, remedy: &str| Problem { code, key: None, cause, remedy: remedy.to_owned() };
        let nodes = (nodes > 0).then(|| {
            problem(
                ProblemCode::WithdrawalsHeld,
                format!(
                    "{} disappeared at once; kept in force for {HOLD:?}",
                    counted(nodes, "node record", "node records")
                ),
                "none needed: live nodes restore their records; to remove a node, use `meshctl node remove`",
            )
        });
        let policies = (policies > 0).then(|| {
            problem(
                ProblemCode::PolicyWithdrawalsHeld,
                format!(
                    "{} deleted within {WINDOW:?}; kept in force for {HOLD:?}",
                    counted(policies, "policy was", "policies were")
                ),
                &format!("put them back if this was a mistake; {ACCEPT} to withdraw them now"),
            )
        });
        nodes.into_iter().chain(policies).collect()
    }

    /// One problem per unknown directory, regardless of its number of keys: another version of the mesh may have many
    /// there.
    fn unknown_directories(&self) -> impl Iterator<Item = Problem> {
        self.unknown.keys().filter_map(|directory| {
            let (first, _) = self.keys_below(directory).next()?;
            let cause = format!(
                "{directory:?} is no directory of this version ({}); its keys are ignored",
                Key::directories().collect::<Vec<_>>().join(", ")
            );
            let place = quote(&format!("{}/{directory}", self.prefix)).into_owned();
            let remedy = format!("none needed if a newer meshd reads it; else etcdctl del --prefix {place}");
            Some(bad_key(first, cause, remedy))
        })
    }

    fn all_problems(&self) -> Vec<Problem> {
        let general = self.config_problem.iter().cloned().chain(self.doubt_problem()).chain(self.mass_problems());
        let general = general.chain(self.duplicates.problem(&self.prefix));
        let of_keys = self.unknown_directories().chain(self.problems.values().cloned());
        let mut all: Vec<_> = general.chain(of_keys.take(MAX_PROBLEMS)).collect();
        let found = self.unknown.len() + self.problems.len();
        if let Some(more) = found.checked_sub(MAX_PROBLEMS).filter(|&more| more > 0) {
            let cause = format!("{more} more keys have invalid values");
            all.push(bad_value(None, cause, "correct the keys shown; further ones appear then".into()));
        }
        all
    }
}
