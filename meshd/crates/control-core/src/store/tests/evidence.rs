//! Withdrawn and retained records, by the evidence.

use super::*;

/// A policy; each `port` another one.
fn policy(name: &str, port: u16) -> String {
    format!(
        r#"{{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {{"name": "{name}", "namespace": "ns"}},
            "spec": {{"podSelector": {{}}, "ingress": [{{"ports": [{{"port": {port}}}]}}]}}}}"#
    )
}

fn key(name: &str) -> String {
    format!("networkpolicies/ns/{name}")
}

fn pod(name: &str, uid: &str) -> String {
    format!(
        r#"{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"namespace": "ns", "name": "{name}", "uid": "{uid}"}}}}"#
    )
}

/// What policies are made of, as far as it was handed on.
#[derive(Default, Clone, PartialEq, Debug)]
struct Enforced(BTreeMap<String, (String, bool)>);

impl Enforced {
    fn of(store: &mut Store) -> Self {
        let mut enforced = Self::default();
        enforced.follow(store);
        enforced
    }

    fn follow(&mut self, store: &mut Store) {
        for (key, record) in store.take_objects() {
            match record {
                Some(record) => self.0.insert(key.to_string(), (record.item.into_read().unwrap(), record.held)),
                None => self.0.remove(&key.to_string()),
            };
        }
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn items(&self) -> BTreeMap<&str, &String> {
        self.0.iter().map(|(key, (item, _))| (key.as_str(), item)).collect()
    }
}

/// A mesh with a policy, a pod and its namespace.
fn shop() -> Source {
    let mut source = mesh(1);
    source.cluster = 1;
    source.put("namespaces/ns", r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}"#);
    source.put("pods/ns/db", &pod("db", "u1"));
    source.put(&key("deny"), &policy("deny", 1));
    source.put("removed/z", "{}");
    source.put("peers/p", &value("peers/p", 0));
    source
}

/// Another etcd of the same or another cluster, with nothing in it.
fn empty(cluster: u64) -> Source {
    Source { cluster, revision: 1, ..Source::default() }
}

#[test]
fn an_empty_etcd_withdraws_nothing_however_long_and_over_a_restart() {
    for (other, code) in [(2, ProblemCode::EtcdReplaced), (1, ProblemCode::RevisionWentBack)] {
        let now = Instant::now();
        let source = shop();
        let mut store = listed(&source, now);
        let mut enforced = Enforced::of(&mut store);
        let before = (enforced.clone(), store.records());
        let mut replaced = empty(other);
        for step in 0..6u32 {
            let now = now + HOLD * (step + 1);
            store.on_list(now, replaced.list());
            store.tick(now);
            enforced.follow(&mut store);
            assert_eq!(enforced.items(), before.0.items(), "step {step}");
            let records = store.records();
            assert_eq!(codes(&records), [code]);
            assert!(records.problems[0].cause.contains("1 policy and 7 other records"), "{:?}", records.problems[0]);
            assert!(records.problems[0].remedy.contains("meshctl etcd accept"), "{:?}", records.problems[0]);
            assert_eq!(
                (records.nodes.len(), records.subnets.len(), records.removed.len(), records.peers.len()),
                (1, 1, 1, 1)
            );
            assert_eq!(records.config.as_ref().unwrap().value, before.1.config.as_ref().unwrap().value);
            if step % 2 == 1 {
                store = restarted(&store, now);
                enforced = Enforced::of(&mut store);
                assert_eq!(enforced.items(), before.0.items(), "restart");
                assert!(enforced.0["pods/ns/db"].1, "known to be held before etcd is there");
            }
        }
        // Its records come back, one after the other; the last one ends it.
        for entry in source.keys.values() {
            assert_eq!(codes(&store.records()), [code]);
            store.changed(now, vec![replaced.put(&entry.key, std::str::from_utf8(&entry.value).unwrap())]);
        }
        assert_eq!(codes(&store.records()), []);
        enforced.follow(&mut store);
        assert!(enforced.0.values().all(|(_, held)| !held));
        // From here on it counts.
        store.changed(now, vec![replaced.delete(&key("deny"))]);
        enforced.follow(&mut store);
        assert!(!enforced.0.contains_key(&key("deny")));
    }
}

#[test]
fn the_operator_accepts_an_empty_etcd() {
    let now = Instant::now();
    let mut store = listed(&shop(), now);
    let mut enforced = Enforced::of(&mut store);
    let mut replaced = empty(2);
    replaced.put("pods/ns/new", &pod("new", "u2"));
    store.on_list(now, replaced.list());
    enforced.follow(&mut store);
    assert!(!enforced.0.contains_key("pods/ns/new"), "nothing shows that it is of the right etcd");
    assert_eq!(store.accept().0, Accepted { withdrawn: 8, changed: 1 });
    enforced.follow(&mut store);
    assert_eq!(enforced.keys(), ["pods/ns/new"]);
    assert!(store.records().problems.is_empty());
    assert_eq!(store.accept().0, Accepted::default());
    // It is the known one now, over a restart too, and the one from before is not.
    let mut again = restarted(&store, now);
    again.on_list(now, replaced.list());
    assert_eq!(codes(&again.records()), []);
    again.on_list(now, shop().list());
    assert_eq!(codes(&again.records()), [ProblemCode::EtcdReplaced]);
}

#[test]
fn an_older_value_is_no_evidence_and_one_that_is_written_now_is() {
    let now = Instant::now();
    let mut source = shop();
    source.put(&key("open"), &policy("open", 7));
    source.put(&key("deny"), &policy("deny", 2));
    let mut snapshot = Source { cluster: 2, revision: source.revision, keys: source.keys.clone() };
    source.delete(&key("open"));
    source.put(&key("deny"), &policy("deny", 3));
    source.put("config", &CONFIG.replace("60", "90"));
    let mut store = listed(&source, now);
    let mut enforced = Enforced::of(&mut store);
    let before = enforced.clone();
    let config = store.records().config.clone().unwrap().value;
    store.on_list(now, snapshot.list());
    enforced.follow(&mut store);
    assert_eq!(enforced.items(), before.items());
    assert_eq!(store.records().config.as_ref().unwrap().value, config);
    // Another connection to it, a restart, and a value that cannot be read change nothing of that.
    store.on_list(now, snapshot.list());
    store = restarted(&store, now);
    store.on_list(now, snapshot.list());
    store.changed(now, vec![snapshot.put(&key("deny"), "{")]);
    enforced = Enforced::of(&mut store);
    assert_eq!(enforced.items(), before.items());
    // What is written from now on counts, and only that.
    store.changed(
        now,
        vec![snapshot.put(&key("deny"), &policy("deny", 4)), snapshot.put(&key("open"), &policy("open", 8))],
    );
    enforced.follow(&mut store);
    assert_eq!(enforced.keys().len(), before.keys().len() + 1);
    assert_eq!(store.records().config.as_ref().unwrap().value, config);
    assert_eq!(codes(&store.records()), [ProblemCode::EtcdReplaced]);
    assert_eq!(store.accept().0, Accepted { withdrawn: 0, changed: 1 });
    assert_ne!(store.records().config.as_ref().unwrap().value, config);
}

#[test]
fn an_older_etcd_that_has_come_further_is_known_by_its_keys() {
    let now = Instant::now();
    let mut source = shop();
    let mut older = Source { cluster: 1, revision: source.revision, keys: source.keys.clone() };
    source.put(&key("deny"), &policy("deny", 2));
    let mut store = listed(&source, now);
    let mut enforced = Enforced::of(&mut store);
    let before = enforced.clone();
    // Others wrote a lot to it before this node comes back.
    for _ in 0..100 {
        older.put("pods/ns/db", &pod("db", "u1"));
    }
    store.on_list(now, older.list());
    enforced.follow(&mut store);
    assert_eq!(enforced.items(), before.items());
    assert_eq!(codes(&store.records()), [ProblemCode::RevisionWentBack]);
}

#[test]
fn what_one_list_lacks_is_held_until_the_next_lacks_it_too() {
    let now = Instant::now();
    let mut source = shop();
    let mut store = listed(&source, now);
    let mut enforced = Enforced::of(&mut store);
    let gone = source.keys.remove(&key("deny")).unwrap();
    source.delete("pods/ns/db");
    store.on_list(now, source.list());
    enforced.follow(&mut store);
    assert!(enforced.0[&key("deny")].1 && enforced.0["pods/ns/db"].1);
    assert!(store.awaits_list() && store.records().problems.is_empty());
    // A restart forgets no first list.
    let mut again = restarted(&store, now);
    again.on_list(now, source.list());
    assert!(!Enforced::of(&mut again).0.contains_key(&key("deny")));
    // The second one shows one of them again.
    source.keys.insert(key("deny"), gone);
    store.audited(now, source.list(), &BTreeSet::new());
    enforced.follow(&mut store);
    assert!(!store.awaits_list() && !enforced.0[&key("deny")].1 && !enforced.0.contains_key("pods/ns/db"));
    // A delete event needs no list.
    store.changed(now, vec![source.delete(&key("deny"))]);
    enforced.follow(&mut store);
    assert!(!enforced.0.contains_key(&key("deny")));
}

#[test]
fn many_policies_that_go_at_once_are_held_with_the_pods_they_select_and_accept_ends_it() {
    for accept in [false, true] {
        let now = Instant::now();
        let mut source = shop();
        for number in 0..9 {
            source.put(&key(&format!("p{number}")), &policy(&format!("p{number}"), 80));
        }
        let mut store = listed(&source, now);
        let mut enforced = Enforced::of(&mut store);
        let before = enforced.clone();
        // One by one; the first nine are gone until the tenth shows what this is.
        let policies: Vec<String> = source.keys.keys().filter(|key| key.starts_with("networkp")).cloned().collect();
        for policy in &policies {
            store.changed(now, vec![source.delete(policy)]);
        }
        store.changed(now, vec![source.delete("namespaces/ns")]);
        enforced.follow(&mut store);
        assert_eq!(enforced.items(), before.items());
        assert_eq!(codes(&store.records()), [ProblemCode::PolicyWithdrawalsHeld]);
        let problem = &store.records().problems[0];
        assert!(problem.cause.contains("10 policies") && problem.remedy.contains("meshctl etcd accept"), "{problem:?}");
        let just_before = now + HOLD - Duration::from_millis(1);
        store.tick(just_before);
        enforced.follow(&mut store);
        assert_eq!(enforced.items(), before.items());
        if accept {
            assert_eq!(store.accept().0, Accepted { withdrawn: 11, changed: 0 });
        } else {
            store.tick(now + HOLD);
        }
        enforced.follow(&mut store);
        assert_eq!(enforced.keys(), ["pods/ns/db"]);
        assert_eq!(codes(&store.records()), []);
    }
}

#[test]
fn copied_policies_that_go_at_once_are_not_held_again() {
    let now = Instant::now();
    let mut source = shop();
    let copied = |number: usize| format!("k8s/east/networkpolicies/ns/p{number}");
    for number in 0..20 {
        source.put(&copied(number), &policy(&format!("p{number}"), 80));
    }
    let mut store = listed(&source, now);
    let mut enforced = Enforced::of(&mut store);
    let flat = enforced.keys().len() - 20;
    for number in 0..20 {
        store.changed(now, vec![source.delete(&copied(number))]);
    }
    enforced.follow(&mut store);
    assert_eq!(enforced.keys().len(), flat, "meshd-sync holds such deletions itself");
    assert_eq!(codes(&store.records()), []);
}

#[test]
fn a_policy_that_never_could_be_read_denies_after_a_restart_too() {
    let now = Instant::now();
    let mut source = shop();
    source.put(
        &key("bad"),
        r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "bad", "namespace": "ns"}, "spec": {"podSelector": {}, "frob": 1}}"#,
    );
    let mut store = listed(&source, now);
    let before = Enforced::of(&mut store);
    let mut again = restarted(&store, now);
    assert_eq!(Enforced::of(&mut again), before);
    // And while etcd is another one.
    again.on_list(now, empty(2).list());
    again = restarted(&again, now);
    assert_eq!(Enforced::of(&mut again).items(), before.items());
}

#[test]
fn a_removal_that_cannot_be_read_is_one_after_a_restart_too() {
    let now = Instant::now();
    let mut source = mesh(1);
    source.put("removed/a", "[");
    let store = restarted(&listed(&source, now), now);
    assert!(store.records().removed.contains_key(&"a".parse().unwrap()));
}

#[derive(Debug, Clone)]
enum Step {
    Put(usize, u16),
    Delete(usize),
    /// The watch brings what happened.
    Watch,
    /// The connection broke: a list brings it.
    List,
    Audit,
    /// Another etcd, made from an earlier state.
    Replace {
        other_cluster: bool,
        earlier: usize,
    },
    Wait(u64),
    Restart,
    Accept,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..NAMES, 0..3u16).prop_map(|(name, port)| Step::Put(name, port)),
        4 => (0..NAMES).prop_map(Step::Delete),
        6 => Just(Step::Watch),
        3 => Just(Step::List),
        2 => Just(Step::Audit),
        1 => (any::<bool>(), 0..4usize).prop_map(|(other_cluster, earlier)| Step::Replace { other_cluster, earlier }),
        2 => (1..40u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
        1 => Just(Step::Accept),
    ];
    prop::collection::vec(step, 1..80)
}

const NAMES: usize = 6;

/// What may be concluded from what was seen, in the plainest words.
#[derive(Default)]
struct Witness {
    /// The known etcd: its cluster, and the highest revision seen.
    known: (u64, Revision),
    /// The etcd seen last.
    seen: (u64, Revision),
    /// Since which revision of that, if it is not the known one.
    doubted_since: Option<Revision>,
    /// Last writes seen.
    writes: BTreeMap<String, Revision>,
    /// In how many lists in a row each key was missing, without a delete event.
    missing: BTreeMap<String, usize>,
    /// Deleted before its eyes.
    deleted: BTreeSet<String>,
}

impl Witness {
    fn lists(&mut self, source: &Source, in_force: &Enforced) {
        let older =
            |(key, entry): (&String, &Entry)| self.writes.get(key).is_some_and(|seen| entry.mod_revision < *seen);
        let other = source.cluster != self.known.0 || source.revision < self.known.1;
        if self.doubted_since.is_none() {
            if self.known.0 != 0 && (other || source.keys.iter().any(older)) {
                self.doubted_since = Some(source.revision);
                self.missing.clear();
            } else {
                self.known = (source.cluster, source.revision);
            }
        }
        if self.doubted_since.is_some() && (source.cluster != self.seen.0 || source.revision < self.seen.1) {
            self.doubted_since = Some(source.revision);
        }
        self.seen = (source.cluster, source.revision);
        for key in in_force.keys() {
            if source.keys.contains_key(key) {
                self.missing.remove(key);
            } else if self.doubted_since.is_none() {
                *self.missing.entry(key.to_owned()).or_default() += 1;
            }
        }
        self.writes = source.keys.iter().map(|(key, entry)| (key.clone(), entry.mod_revision)).collect();
    }

    fn watches(&mut self, source: &Source, events: &[WatchEvent]) {
        for event in events {
            let key = event.key().to_owned();
            self.missing.remove(&key);
            match event {
                WatchEvent::Put(entry) => {
                    self.deleted.remove(&key);
                    self.writes.insert(key, entry.mod_revision);
                }
                WatchEvent::Delete { .. } => {
                    // What was not in force as etcd had it is not withdrawn with that.
                    self.writes.remove(&key);
                    self.deleted.insert(key);
                }
            }
        }
        self.seen.1 = source.revision;
        if self.doubted_since.is_none() {
            self.known.1 = source.revision;
        }
    }

    /// The doubt is over once what is in force is what etcd holds.
    fn settles(&mut self, source: &Source, is_same: bool) {
        if self.doubted_since.is_some() && is_same {
            self.doubted_since = None;
            self.known = (source.cluster, source.revision);
        }
    }
}

fn held_by(source: &Source) -> BTreeMap<String, String> {
    let text = |entry: &Entry| String::from_utf8(entry.value.to_vec()).unwrap();
    source.keys.iter().map(|(key, entry)| (key.clone(), text(entry))).collect()
}

proptest! {
    /// Nothing goes out of force without evidence, nothing comes into force from a doubted etcd that was not written to
    /// it since; and in the end all is as etcd has it.
    #[test]
    fn nothing_goes_without_evidence(steps in steps()) {
        let mut now = Instant::now();
        let mut source = Source { cluster: 1, ..Source::default() };
        let mut states = vec![source.keys.clone()];
        let mut store = reading();
        store.on_list(now, source.list());
        let mut witness = Witness { known: (1, 0), ..Witness::default() };
        let mut enforced = Enforced::default();
        let mut pending: Vec<WatchEvent> = Vec::new();
        // Whether the watch stands: what happened since the last list is pending.
        for step in steps {
            let before = enforced.clone();
            let mut accepted = false;
            match step {
                Step::Put(name, port) => {
                    let name = format!("p{name}");
                    pending.push(source.put(&key(&name), &policy(&name, 80 + port)));
                    states.push(source.keys.clone());
                }
                Step::Delete(name) => {
                    let key = key(&format!("p{name}"));
                    if source.keys.contains_key(&key) {
                        pending.push(source.delete(&key));
                        states.push(source.keys.clone());
                    }
                }
                Step::Watch => {
                    let events = std::mem::take(&mut pending);
                    witness.watches(&source, &events);
                    store.changed(now, events);
                }
                Step::List => {
                    pending.clear();
                    witness.lists(&source, &before);
                    store.on_list(now, source.list());
                }
                Step::Audit => {
                    let events = std::mem::take(&mut pending);
                    witness.watches(&source, &events);
                    store.changed(now, events);
                    enforced.follow(&mut store);
                    witness.lists(&source, &enforced);
                    store.audited(now, source.list(), &BTreeSet::new());
                }
                Step::Replace { other_cluster, earlier } => {
                    pending.clear();
                    let keys = states[states.len().saturating_sub(1 + 3 * earlier)].clone();
                    let revision = keys.values().map(|entry| entry.mod_revision).max().unwrap_or(1);
                    let cluster = source.cluster + u64::from(other_cluster);
                    source = Source { cluster, revision, keys };
                    witness.lists(&source, &before);
                    store.on_list(now, source.list());
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    store.tick(now);
                }
                Step::Restart => {
                    store = restarted(&store, now);
                    enforced = Enforced::default();
                    enforced.follow(&mut store);
                    prop_assert_eq!(enforced.items(), before.items());
                    pending.clear();
                    witness.lists(&source, &before);
                    store.on_list(now, source.list());
                }
                Step::Accept => {
                    store.accept();
                    accepted = true;
                }
            }
            enforced.follow(&mut store);
            let held = held_by(&source);
            if accepted {
                if pending.is_empty() {
                    let expected: BTreeMap<&str, &String> = held.iter().map(|(key, item)| (key.as_str(), item)).collect();
                    prop_assert_eq!(enforced.items(), expected);
                }
                witness.missing.clear();
                if witness.doubted_since.take().is_some() {
                    witness.known = (source.cluster, store.revision());
                }
                continue;
            }
            for (key, (item, _)) in &before.0 {
                match enforced.0.get(key) {
                    None => {
                        let twice = witness.missing.remove(key).is_some_and(|lists| lists >= 2);
                        prop_assert!(twice || witness.deleted.contains(key), "{} went without evidence", key);
                    }
                    Some((now, _)) if now != item => {
                        let since = witness.doubted_since.unwrap_or(-1);
                        let write = source.keys.get(key).map_or(Revision::MAX, |entry| entry.mod_revision);
                        prop_assert!(write > since, "{} changed without evidence", key);
                    }
                    Some(_) => {}
                }
            }
            for key in enforced.0.keys().filter(|key| !before.0.contains_key(*key)) {
                let since = witness.doubted_since.unwrap_or(-1);
                prop_assert!(source.keys[key].mod_revision > since, "{} came without evidence", key);
            }
            let same = pending.is_empty() && {
                let of_etcd: BTreeMap<&str, &String> = held.iter().map(|(key, item)| (key.as_str(), item)).collect();
                enforced.items() == of_etcd
            };
            witness.settles(&source, same);
        }
        // In the end all is as etcd has it, whatever happened before.
        store.on_list(now, source.list());
        store.accept();
        store.tick(now + HOLD);
        enforced.follow(&mut store);
        let held = held_by(&source);
        let of_etcd: BTreeMap<&str, &String> = held.iter().map(|(key, item)| (key.as_str(), item)).collect();
        prop_assert_eq!(enforced.items(), of_etcd);
        prop_assert!(store.evidence().doubt.is_none() && store.records().problems.is_empty());
    }
}

#[test]
fn an_etcd_in_doubt_deletes_only_what_was_written_to_it() {
    let now = Instant::now();
    let source = shop();
    let mut store = listed(&source, now);
    let mut enforced = Enforced::of(&mut store);
    // All is there but the pod: in doubt until that is back.
    let mut replaced = Source { cluster: 2, revision: source.revision, keys: source.keys };
    replaced.keys.remove("pods/ns/db");
    store.on_list(now, replaced.list());
    store.changed(now, vec![replaced.put(&key("new"), &policy("new", 8))]);
    enforced.follow(&mut store);
    assert!(enforced.0.contains_key(&key("new")));
    let gone = ["namespaces/ns", "removed/z", "peers/p"].map(str::to_owned);
    for text in gone.iter().cloned().chain([key("deny"), key("new")]) {
        store.changed(now, vec![replaced.delete(&text)]);
    }
    store.tick(now + HOLD * 2);
    enforced.follow(&mut store);
    assert_eq!(enforced.keys(), ["namespaces/ns", &key("deny"), "pods/ns/db"]);
    assert_eq!((store.records().removed.len(), store.records().peers.len()), (1, 1));
    store = restarted(&store, now);
    enforced = Enforced::of(&mut store);
    assert_eq!(enforced.keys(), ["namespaces/ns", &key("deny"), "pods/ns/db"]);
    store.accept();
    enforced.follow(&mut store);
    assert_eq!(enforced.keys(), [""; 0]);
}
