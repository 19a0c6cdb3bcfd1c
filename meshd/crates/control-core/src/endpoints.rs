//! This node's `endpoints/ID/…` records: the difference between attachments and etcd, in bounded batches. No clock and
//! no I/O.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_schema::{Key, NodeId};
use mesh::records::Revision;

use super::{
    store::Store,
    types::{CallError, Committed, Compare, EtcdFailure, Transaction, Write},
};

/// The records that are to be there: keys below the prefix, and values.
pub type EndpointRecords = Arc<BTreeMap<String, Vec<u8>>>;

/// Most writes of one transaction; etcd takes 128.
const BATCH: usize = 100;
/// Until the next attempt after etcd did not take a transaction.
const RETRY: Duration = Duration::from_secs(1);
/// How long the store may take to show a write.
const CATCH_UP: Duration = Duration::from_secs(10);

/// The records of one node.
#[derive(Debug)]
pub struct Endpoints {
    prefix: String,
    removed: String,
    wanted: Option<EndpointRecords>,
    /// A transaction is under way, sent to the etcd of this history, see [`Store::lineage_changes`].
    under_way: Option<u64>,
    /// The history that the two below are of.
    lineage: u64,
    /// Nothing is written before then, unless the store has reached `until_revision`.
    wait_until: Option<Instant>,
    until_revision: Option<Revision>,
    /// Why etcd refused the last transaction.
    refusal: Option<EtcdFailure>,
}

impl Endpoints {
    /// The lane of a node that has written none of these keys yet.
    #[must_use]
    pub fn new(id: &NodeId) -> Self {
        Self {
            prefix: Key::endpoints_of(id),
            removed: Key::Removed(id.clone()).to_string(),
            wanted: None,
            under_way: None,
            lineage: 0,
            wait_until: None,
            until_revision: None,
            refusal: None,
        }
    }

    /// Sets the desired records; `None`: not known yet, and no key is changed.
    pub fn want(&mut self, wanted: Option<EndpointRecords>) {
        self.wanted = wanted;
    }

    /// The next transaction, if etcd differs from the desired records. It gets exactly one answer.
    pub fn next(&mut self, now: Instant, store: &Store) -> Option<Transaction> {
        if self.lineage != store.lineage_changes() {
            self.lineage = store.lineage_changes();
            (self.until_revision, self.wait_until) = (None, None);
        }
        if self.until_revision.is_some_and(|revision| store.revision() >= revision) {
            (self.until_revision, self.wait_until) = (None, None);
        }
        if self.under_way.is_some() || self.wait_until.is_some_and(|until| now < until) {
            return None;
        }
        (self.until_revision, self.wait_until) = (None, None);
        let wanted = self.wanted.as_ref()?;
        // An address may move from one attachment to another: no reader may see it with both.
        let withdrawn = store.keys_below(&self.prefix).filter(|(key, _)| !wanted.contains_key(*key));
        let withdrawn = withdrawn.map(|(key, _)| Write::Delete { key: key.to_owned() });
        let new = wanted.iter().filter(|(key, value)| !store.get(key).is_some_and(|kept| kept.holds(value)));
        let new = new.map(|(key, value)| Write::Put { key: key.clone(), value: value.clone(), lease: None });
        let writes: Vec<Write> = withdrawn.chain(new).take(BATCH).collect();
        if writes.is_empty() {
            return None;
        }
        self.under_way = Some(self.lineage);
        // A node that an operator has removed does not come back by its containers.
        let compares = vec![Compare::CreateRevision { key: self.removed.clone(), equals: 0 }];
        Some(Transaction { compares, writes })
    }

    /// Takes the answer to the transaction that [`next`](Self::next) returned.
    pub fn answered(&mut self, now: Instant, store: &Store, answer: &Result<Committed, CallError>) {
        if self.under_way.take() != Some(store.lineage_changes()) {
            // It is of another etcd.
            return;
        }
        match answer {
            Ok(_) => self.refusal = None,
            Err(CallError::Refused(reason)) => self.refusal = Some(reason.clone()),
            Err(_) => {}
        }
        match answer {
            Ok(Committed { succeeded: true, revision }) => {
                self.until_revision = Some(*revision);
                self.wait_until = Some(now + CATCH_UP);
            }
            Ok(_) | Err(_) => self.wait_until = Some(now + RETRY),
        }
    }

    /// Why etcd does not take the records, while it does not.
    pub fn refusal(&self) -> Option<&EtcdFailure> {
        self.refusal.as_ref()
    }

    /// When [`next`](Self::next) is to be called at the latest; that ends it.
    pub const fn next_deadline(&self) -> Option<Instant> {
        self.wait_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Entry, KeyListing};

    fn records(names: &[(&str, &str)]) -> EndpointRecords {
        let record = |(name, value): &(&str, &str)| (format!("endpoints/n1/{name}/eth0"), value.as_bytes().to_vec());
        Arc::new(names.iter().map(record).collect())
    }

    /// A store that holds these records at `revision`.
    fn store(now: Instant, revision: Revision, held: &EndpointRecords) -> Store {
        let entry = |(key, value): (&String, &Vec<u8>)| Entry {
            key: key.clone(),
            value: value.as_slice().into(),
            create_revision: 1,
            mod_revision: revision,
            lease: None,
        };
        let foreign = Entry {
            key: "endpoints/n10/c/eth0".to_owned(),
            value: b"{}".as_slice().into(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        };
        let mut store = Store::default();
        let entries = held.iter().map(entry).chain([foreign]).collect();
        store.on_list(now, KeyListing { cluster: None, revision, entries });
        store
    }

    fn keys(transaction: Option<Transaction>) -> Vec<String> {
        let writes = transaction.into_iter().flat_map(|transaction| transaction.writes);
        writes
            .map(|write| match write {
                Write::Put { key, lease, .. } => {
                    assert_eq!(lease, None);
                    format!("+{}", &key["endpoints/n1/".len()..])
                }
                Write::Delete { key } => format!("-{}", &key["endpoints/n1/".len()..]),
            })
            .collect()
    }

    #[test]
    fn only_the_difference_is_written_and_never_anothers() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(&"n1".parse().unwrap());
        let store = store(now, 5, &records(&[("a", "1"), ("b", "1"), ("c", "1")]));
        assert_eq!(keys(endpoints.next(now, &store)), [""; 0], "nothing is known yet");
        endpoints.want(Some(records(&[("a", "1"), ("b", "2"), ("d", "1")])));
        assert_eq!(keys(endpoints.next(now, &store)), ["-c/eth0", "+b/eth0", "+d/eth0"]);
        assert_eq!(endpoints.next(now, &store), None, "one at a time");
    }

    #[test]
    fn the_store_must_show_it_before_more_is_written() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(&"n1".parse().unwrap());
        endpoints.want(Some(records(&[("a", "1")])));
        let before = store(now, 5, &records(&[]));
        assert!(endpoints.next(now, &before).is_some());
        endpoints.answered(now, &before, &Ok(Committed { succeeded: true, revision: 6 }));
        assert_eq!(endpoints.next(now, &before), None);
        let after = store(now, 6, &records(&[("a", "1")]));
        assert_eq!(endpoints.next(now, &after), None);
        assert_eq!(endpoints.next_deadline(), None);
        endpoints.want(Some(records(&[])));
        assert_eq!(keys(endpoints.next(now, &after)), ["-a/eth0"]);
    }

    #[test]
    fn what_was_written_to_another_etcd_is_written_to_this_one_at_once() {
        let now = Instant::now();
        let empty = |revision| KeyListing { cluster: None, revision, entries: Vec::new() };
        for answered_before in [true, false] {
            let mut endpoints = Endpoints::new(&"n1".parse().unwrap());
            endpoints.want(Some(records(&[("a", "1")])));
            let mut store = store(now, 5, &records(&[]));
            assert!(endpoints.next(now, &store).is_some());
            let answer = Ok(Committed { succeeded: true, revision: 6 });
            if answered_before {
                endpoints.answered(now, &store, &answer);
            }
            store.on_list(now, empty(3));
            if !answered_before {
                assert_eq!(endpoints.next(now, &store), None);
                endpoints.answered(now, &store, &answer);
            }
            assert_eq!(keys(endpoints.next(now, &store)), ["+a/eth0"]);
        }
    }

    #[test]
    fn what_etcd_did_not_take_is_tried_again() {
        let store = |now| store(now, 5, &records(&[]));
        for answer in [
            Err(CallError::Indeterminate("gone".into())),
            Err(CallError::Refused("no".into())),
            Ok(Committed { succeeded: false, revision: 5 }),
        ] {
            let now = Instant::now();
            let mut endpoints = Endpoints::new(&"n1".parse().unwrap());
            endpoints.want(Some(records(&[("a", "1")])));
            assert!(endpoints.next(now, &store(now)).is_some());
            endpoints.answered(now, &store(now), &answer);
            assert_eq!(endpoints.next(now, &store(now)), None);
            assert_eq!(endpoints.next_deadline(), Some(now + RETRY), "also once that has passed");
            assert_eq!(endpoints.refusal().is_some(), matches!(answer, Err(CallError::Refused(_))), "{answer:?}");
            assert_eq!(keys(endpoints.next(now + RETRY, &store(now))), ["+a/eth0"]);
            assert_eq!(endpoints.next_deadline(), None);
            endpoints.answered(now, &store(now), &Ok(Committed { succeeded: true, revision: 6 }));
            assert_eq!(endpoints.refusal(), None);
        }
    }

    #[test]
    fn a_transaction_has_no_more_writes_than_etcd_takes() {
        let now = Instant::now();
        let mut endpoints = Endpoints::new(&"n1".parse().unwrap());
        let many: Vec<String> = (0..300).map(|i| format!("c{i}")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
        endpoints.want(Some(records(&many)));
        let transaction = endpoints.next(now, &store(now, 5, &records(&[]))).unwrap();
        assert_eq!(transaction.writes.len(), BATCH);
    }
}
