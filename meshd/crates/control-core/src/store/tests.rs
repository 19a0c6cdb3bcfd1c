mod config;
mod evidence;

use std::time::Duration;

use etcd_schema::Violations;
use mesh::{
    problem::ProblemCode,
    records::{LeaseId, MAX_PROBLEMS, Retained},
};
use proptest::prelude::*;
use serde_json::{Map, Value};

use super::*;
use crate::{
    guard::HOLD,
    objects::{Item, ReadObject, RefusedObject},
    types::ClusterId,
};

const CONFIG: &str = r#"{"Network": "10.0.0.0/16", "LeaseTTL": 60}"#;

/// etcd as far as a store needs it: applies writes and keeps the events.
#[derive(Default)]
struct Source {
    /// 0: it does not say.
    cluster: u64,
    revision: Revision,
    keys: BTreeMap<String, Entry>,
}

impl Source {
    fn put(&mut self, key: &str, value: &str) -> WatchEvent {
        self.put_leased(key, value, 0)
    }

    fn put_leased(&mut self, key: &str, value: &str, lease: i64) -> WatchEvent {
        self.revision += 1;
        let entry = Entry {
            key: key.into(),
            value: value.as_bytes().into(),
            create_revision: self.keys.get(key).map_or(self.revision, |entry| entry.create_revision),
            mod_revision: self.revision,
            lease: LeaseId::new(lease),
        };
        self.keys.insert(key.into(), entry.clone());
        WatchEvent::Put(entry)
    }

    fn delete(&mut self, key: &str) -> WatchEvent {
        self.keys.remove(key);
        self.revision += 1;
        WatchEvent::Delete { key: key.into(), revision: self.revision }
    }

    fn list(&self) -> KeyListing {
        let entries = self.keys.values().cloned().collect();
        KeyListing { cluster: ClusterId::new(self.cluster), revision: self.revision, entries }
    }
}

/// Reads JSON objects as their text; one with `"stands"` in it stands for itself when it cannot be read.
struct TextReader;

impl ObjectReader for TextReader {
    fn read(&self, key: &Key, bytes: &[u8], _rewritten: bool) -> Result<ReadObject, RefusedObject> {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        match serde_json::from_str::<Map<String, Value>>(&text) {
            Ok(_) => Ok(ReadObject { item: Item::new(text), canonical: bytes.into() }),
            Err(error) => Err(RefusedObject {
                violations: Violations::one("", key.to_string(), error.to_string()),
                stand_in: text.contains("stands").then(|| Item::new(text)),
                effect: "it has no effect".to_owned(),
            }),
        }
    }
}

fn reading() -> Store {
    Store::default().with_reader(Arc::new(TextReader))
}

fn from_cache(revision: Revision, entries: Vec<Entry>, now: Instant) -> Store {
    reading().with_cache(revision, entries, now)
}

/// A store that has listed the source.
fn listed(source: &Source, now: Instant) -> Store {
    let mut store = reading();
    store.on_list(now, source.list());
    store
}

/// The store after a restart.
fn restarted(store: &Store, now: Instant) -> Store {
    from_cache(store.revision(), store.cached().collect(), now).recall(store.evidence())
}

fn subnet(text: &str) -> SubnetKey {
    match Key::parse(&format!("subnets/{text}")) {
        Ok(Key::Subnet(key)) => key,
        other => panic!("{other:?}"),
    }
}

fn node(id: &str) -> String {
    let key = etcd_schema::PublicKey::from_bytes([id.as_bytes()[0]; 32]);
    format!(
        r#"{{"name": "{id}", "publicKey": "{key}", "listenPort": 51820, "endpoints": [], "addresses": [], "version": "1"}}"#
    )
}

fn lease(id: &str) -> String {
    format!(r#"{{"PublicIP": "192.0.2.1", "Node": "{id}"}}"#)
}

/// `count` nodes with a subnet each.
fn mesh(count: u8) -> Source {
    let mut source = Source::default();
    source.put("config", CONFIG);
    for i in 0..count {
        let id = char::from(b'a' + i).to_string();
        source.put_leased(&format!("nodes/{id}"), &node(&id), 7 + i64::from(i));
        source.put_leased(&format!("subnets/10.0.{i}.0-24"), &lease(&id), 7 + i64::from(i));
    }
    source
}

/// The IPv4 network of no cluster.
fn ipv4(records: &Records) -> Option<ipnet::Ipv4Net> {
    let networks = records.config.as_ref()?.value.of_cluster(&Cluster::default())?.ipv4;
    networks.map(|pool| pool.network)
}

fn codes(records: &Records) -> Vec<ProblemCode> {
    records.problems.iter().map(|problem| problem.code).collect()
}

#[test]
fn what_is_known_of_a_cluster_and_not_read_is_neither_a_problem_nor_kept() {
    let now = Instant::now();
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let before = store.cached().count();
    let keys = ["leader", "state"].map(|key| source.put(&format!("k8s/east/{key}"), "{}"));
    assert!(store.changed(now, keys.to_vec()).is_none());
    assert!(store.take_objects().is_empty() && store.take_wanted().is_empty());
    assert_eq!(store.cached().count(), before);
    assert!(store.changed(now, vec![source.delete("k8s/east/leader")]).is_none(), "nor is one held");
}

#[test]
fn an_object_that_is_stored_flat_and_of_a_cluster_is_a_problem_with_the_command_that_deletes_it() {
    let now = Instant::now();
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let namespace = r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}"#;
    let told = |store: &mut Store, source: &mut Source, changes: &[(&str, bool)]| {
        let change = |(key, put): &(&str, bool)| if *put { source.put(key, namespace) } else { source.delete(key) };
        let events = changes.iter().map(change).collect();
        let records = store.changed(now, events).unwrap_or_else(|| store.records());
        let problem = records.problems.iter().find(|problem| problem.code == ProblemCode::ObjectStoredTwice);
        problem.map(|problem| (problem.cause.clone(), problem.remedy.clone()))
    };
    let both = [("k8s/east/namespaces/shop", true), ("k8s/west/namespaces/shop", true)];
    assert_eq!(told(&mut store, &mut source, &both), None, "two clusters may have equal names");
    let (cause, remedy) = told(&mut store, &mut source, &[("namespaces/shop", true)]).unwrap();
    assert!(cause.contains("namespaces/shop (east, west)"), "{cause}");
    assert!(remedy.starts_with("etcdctl del /namespaces/shop #"), "{remedy}");
    let (cause, _) = told(&mut store, &mut source, &[("k8s/east/namespaces/shop", false)]).unwrap();
    assert!(cause.contains("namespaces/shop (west)"), "{cause}");
    assert_eq!(told(&mut store, &mut source, &[("namespaces/shop", false)]), None);
    assert_eq!(told(&mut store, &mut source, &[("namespaces/shop", true)]).map(|_| ()), Some(()));
    assert_eq!(told(&mut store, &mut source, &[("k8s/west/namespaces/shop", false)]), None);
    assert!(told(&mut store, &mut source, &[("k8s/north/namespaces/shop", true)]).is_some());
}

#[test]
fn objects_of_a_cluster_are_read_cached_and_held_as_flat_ones_are() {
    let now = Instant::now();
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let before = store.cached().count();
    let node = r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}"#;
    let namespace = r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}"#;
    let events = vec![source.put("k8s/east/nodes/n1", node), source.put("k8s/east/namespaces/shop", namespace)];
    store.changed(now, events);
    let objects = store.take_objects();
    for (key, value) in [("k8s/east/namespaces/shop", namespace), ("k8s/east/nodes/n1", node)] {
        let record = objects[&Key::parse(key).unwrap()].clone().unwrap();
        assert_eq!(record.item.into_read::<String>().as_deref(), Some(value));
    }
    assert_eq!(store.cached().count(), before + 2);
    // A value that cannot be read leaves the last good one in force.
    let records = store.changed(now, vec![source.put("k8s/east/nodes/n1", "{")]).unwrap();
    assert_eq!(codes(&records), [ProblemCode::BadValue]);
    assert!(store.take_objects().is_empty());
}

#[test]
fn a_directory_of_another_version_is_one_problem() {
    let now = Instant::now();
    let mut source = mesh(1);
    let mut store = listed(&source, now);
    let told = |store: &mut Store, events| {
        let records = store.changed(now, events);
        let records = records.unwrap_or_else(|| store.records());
        records.problems.iter().map(|problem| (problem.code, problem.key.clone().unwrap())).collect::<Vec<_>>()
    };
    let new = ["sites/a", "sites/b", "k8s/east/services/a/b", "k8s/east/services/a/c"];
    let one = |key: &str| (ProblemCode::BadKey, key.to_owned());
    let events = new.iter().map(|key| source.put(key, "{}")).collect();
    assert_eq!(told(&mut store, events), [one("k8s/east/services/a/b"), one("sites/a")]);
    assert_eq!(told(&mut store, vec![source.delete("sites/a")]), [one("k8s/east/services/a/b"), one("sites/b")]);
    let malformed = source.put("k8s/NO/pods/a/b", "{}");
    assert_eq!(told(&mut store, vec![malformed]).len(), 3);
    let events = ["sites/b", "k8s/NO/pods/a/b", new[2], new[3]].map(|key| source.delete(key));
    assert_eq!(told(&mut store, events.to_vec()), []);
}

#[test]
fn an_unreadable_value_keeps_the_last_good_one_and_says_so() {
    let now = Instant::now();
    let mut source = mesh(2);
    let mut store = listed(&source, now);
    let before = store.records();
    let records = store.changed(now, vec![source.put_leased("nodes/a", "{", 7)]).unwrap();
    let id = "a".parse().unwrap();
    let record = &records.nodes[&id];
    assert!(Arc::ptr_eq(&record.value, &before.nodes[&id].value));
    assert_eq!(record.retained, Some(Retained::Unreadable));
    assert_eq!(record.mod_revision, before.nodes[&id].mod_revision);
    assert_eq!(codes(&records), [ProblemCode::BadValue]);
    assert!(before.subnets.ptr_eq(&records.subnets));
    let records = store.changed(now, vec![source.put_leased("nodes/a", &node("a"), 7)]).unwrap();
    assert!(records.nodes[&id].retained.is_none() && records.problems.is_empty());
    // A key that was created again has no earlier value.
    store.changed(now, vec![source.delete("nodes/a")]);
    let records = store.changed(now, vec![source.put("nodes/a", "{")]).unwrap();
    assert!(!records.nodes.contains_key(&id));
}

#[test]
fn a_retained_subnet_yields_to_a_valid_one_and_comes_back_after_it() {
    let now = Instant::now();
    let mut source = mesh(2);
    let mut store = listed(&source, now);
    store.changed(now, vec![source.put_leased("subnets/10.0.0.0-24", "", 7)]);
    let records = store.changed(now, vec![source.put("subnets/10.0.0.128-25", &lease("b"))]).unwrap();
    assert!(!records.subnets.contains_key(&subnet("10.0.0.0-24")));
    assert!(records.subnets.contains_key(&subnet("10.0.0.128-25")));
    assert!(store.taken().any(|key| *key == subnet("10.0.0.0-24")), "the key stands in etcd all the same");
    let records = store.changed(now, vec![source.delete("subnets/10.0.0.128-25")]).unwrap();
    assert_eq!(records.subnets[&subnet("10.0.0.0-24")].retained, Some(Retained::Unreadable));
}

#[test]
fn many_withdrawals_at_once_wait_and_the_owners_return_meanwhile() {
    let now = Instant::now();
    let mut source = mesh(4);
    let mut store = listed(&source, now);
    let before = store.records();
    let gone: Vec<_> = ["nodes/a", "subnets/10.0.0.0-24", "subnets/10.0.1.0-24"].map(|key| source.delete(key)).into();
    let records = store.changed(now, gone).unwrap();
    assert_eq!(records.nodes.len(), 4);
    assert_eq!(records.subnets.len(), 4);
    assert_eq!(records.subnets[&subnet("10.0.0.0-24")].retained, Some(Retained::Withheld));
    assert_eq!(codes(&records), [ProblemCode::WithdrawalsHeld]);
    assert!(store.taken().any(|key| *key == subnet("10.0.0.0-24")));
    assert!(!store.present_subnets().any(|key| *key == subnet("10.0.0.0-24")));

    let records = store.changed(now, vec![source.put_leased("subnets/10.0.0.0-24", &lease("a"), 9)]).unwrap();
    assert!(records.subnets[&subnet("10.0.0.0-24")].retained.is_none());
    // Another took the prefix of a held one: it yields.
    let records = store.changed(now, vec![source.put("subnets/10.0.1.0-25", &lease("c"))]).unwrap();
    assert!(!records.subnets.contains_key(&subnet("10.0.1.0-24")));

    assert_eq!(store.next_deadline(), Some(now + HOLD));
    assert!(store.tick(now + HOLD - Duration::from_millis(1)).is_none());
    let records = store.tick(now + HOLD).unwrap();
    assert_eq!((records.nodes.len(), before.nodes.len()), (3, 4));
    assert!(records.problems.is_empty());
}

#[test]
fn what_an_operator_removes_is_never_held() {
    let now = Instant::now();
    let mut source = mesh(2);
    let mut store = listed(&source, now);
    let removal = vec![
        source.delete("nodes/a"),
        source.delete("subnets/10.0.0.0-24"),
        source.delete("nodes/b"),
        source.delete("subnets/10.0.1.0-24"),
        source.put("removed/a", "not readable, and a removal all the same"),
    ];
    let records = store.changed(now, removal).unwrap();
    assert!(!records.nodes.contains_key(&"a".parse().unwrap()));
    assert!(records.removed.contains_key(&"a".parse().unwrap()));

    let mut source = mesh(2);
    let mut store = listed(&source, now);
    let gone = ["nodes/a", "subnets/10.0.0.0-24", "nodes/b", "subnets/10.0.1.0-24"].map(|key| source.delete(key));
    assert_eq!(store.changed(now, gone.into()).unwrap().nodes.len(), 2);
    let records = store.changed(now, vec![source.put("removed/b", "{}")]).unwrap();
    assert_eq!(records.nodes.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["a"]);
    assert!(!records.subnets.contains_key(&subnet("10.0.1.0-24")));
}

#[test]
fn everything_deleted_in_one_revision_stays_in_force_until_the_owners_return() {
    // A mesh of one node is as safe as one of many, and so is one that restarts from the cache meanwhile.
    for nodes in [1, 4] {
        for restart in [false, true] {
            let now = Instant::now();
            let mut source = mesh(nodes);
            let mut store = listed(&source, now);
            let before = store.records();
            let keys: Vec<String> = source.keys.keys().cloned().collect();
            store.changed(now, keys.iter().map(|key| source.delete(key)).collect());
            if restart {
                store = restarted(&store, now);
                store.on_list(now, source.list());
                store.on_list(now, source.list());
            }
            let records = store.records();
            assert_eq!(records.config.as_ref().unwrap().value, before.config.as_ref().unwrap().value);
            assert_eq!((records.subnets.len(), records.nodes.len()), (before.subnets.len(), before.nodes.len()));
            assert_eq!(codes(&records), [ProblemCode::ConfigRefused, ProblemCode::WithdrawalsHeld]);
            assert!(records.problems[0].cause.contains("config was deleted while"), "{:?}", records.problems[0]);
            assert!(records.problems[0].remedy.contains("10.0.0.0/16"), "{:?}", records.problems[0]);
            assert_eq!(store.mod_revision("config"), 0, "what is written now is compared with its absence");

            // One node comes back: the configuration outlives the hold, and the rest goes.
            store.changed(now, vec![source.put_leased("subnets/10.0.0.0-24", &lease("a"), 99)]);
            let records = store.tick(now + HOLD).unwrap();
            assert_eq!((records.subnets.len(), records.nodes.len()), (1, 0));
            assert!(records.config.is_some());
            assert_eq!(codes(&records), [ProblemCode::ConfigRefused]);
            let records = store.changed(now + HOLD, vec![source.put("config", CONFIG)]).unwrap();
            assert!(records.problems.is_empty());
        }
    }
}

#[test]
fn everything_deleted_goes_in_the_end_when_nobody_returns() {
    let now = Instant::now();
    let mut source = mesh(3);
    let mut store = listed(&source, now);
    let keys: Vec<String> = source.keys.keys().cloned().collect();
    // The configuration first, alone: then each of the others is held too.
    for key in keys {
        store.changed(now, vec![source.delete(&key)]);
        assert!(store.records().config.is_some(), "{key}");
    }
    assert_eq!(store.records().subnets.len(), 3);
    let records = store.tick(now + HOLD).unwrap();
    assert!(
        records.config.is_none()
            && records.subnets.is_empty()
            && records.nodes.is_empty()
            && records.problems.is_empty()
    );
}

#[test]
fn the_state_of_a_copy_is_known_as_long_as_it_is_there() {
    let (mut source, now) = (mesh(1), Instant::now());
    let mut store = listed(&source, now);
    assert!(store.copies().is_empty());
    let state = |current_at: u64| {
        format!(r#"{{"uid": "u", "currentAt": {current_at}, "counts": {{"pods": 7}}, "held": [{{"token": "t"}}]}}"#)
    };
    store.changed(now, vec![source.put("k8s/east/state", &state(12)), source.put("k8s/west/state", "{}")]);
    let east = "east".parse().unwrap();
    let expected = CopyState { current_at: 12, objects: [("pods".to_owned(), 7)].into(), held: 1 };
    assert_eq!(store.copies(), &[(east, expected)].into());
    assert!(store.records().problems.is_empty(), "{:?}", store.records().problems);
    store.changed(now, vec![source.put("k8s/east/state", &state(22))]);
    assert_eq!(store.copies().values().next().unwrap().current_at, 22);
    store.changed(now, vec![source.delete("k8s/east/state")]);
    assert!(store.copies().is_empty());
}

/// What policies are made of changes no records; a value that cannot be read is reported all the same.
#[test]
fn what_policies_are_made_of_goes_another_way() {
    let now = Instant::now();
    let mut source = mesh(1);
    let pod = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "ns", "name": "p", "uid": "u"}}"#;
    source.put("pods/ns/p", pod);
    let mut store = listed(&source, now);
    assert!(store.records().problems.is_empty(), "{:?}", store.records().problems);
    assert_eq!(store.take_objects().len(), 1);
    assert!(store.changed(now, vec![source.put("pods/ns/p", &pod.replace("uid", "UID"))]).is_none());
    store.take_objects();
    let records = store.changed(now, vec![source.put("pods/ns/p", "{")]).unwrap();
    assert_eq!(codes(&records), [ProblemCode::BadValue]);
    assert!(records.problems[0].cause.contains("stays in force"), "{:?}", records.problems[0]);
    assert!(store.take_objects().is_empty());
    assert!(store.changed(now, vec![source.delete("pods/ns/p")]).unwrap().problems.is_empty());
    assert_eq!(store.take_objects().len(), 1);
}

#[test]
fn the_same_content_again_is_no_news() {
    let now = Instant::now();
    let source = mesh(3);
    let mut store = listed(&source, now);
    let before = store.records();
    let listing = source.list();
    let revision = listing.revision;
    assert!(store.on_list(now, KeyListing { revision: revision + 5, ..listing.clone() }).is_none());
    assert_eq!(store.revision(), revision + 5);

    let mut cached = from_cache(revision, store.cached().collect(), now);
    let old = cached.records();
    assert!(!old.synced && old.nodes == before.nodes && old.subnets == before.subnets && old.config == before.config);
    let records = cached.on_list(now, listing).unwrap();
    assert!(records.synced && old.nodes.ptr_eq(&records.nodes) && old.subnets.ptr_eq(&records.subnets));
}

#[test]
fn an_audit_finds_what_was_lost_and_nothing_else() {
    let now = Instant::now();
    let mut source = mesh(3);
    let mut store = listed(&source, now);
    // Lost on the way: a new key, a changed one, a deleted one.
    source.put("peers/new", "{}");
    source.put("nodes/a", &node("b"));
    source.delete("nodes/b");
    let listing = source.list();
    // After the list, seen by the watch: a delete, a put, a new key.
    let after =
        vec![source.delete("subnets/10.0.0.0-24"), source.put("nodes/c", &node("z")), source.put("peers/later", "{}")];
    store.changed(now, after);
    let deleted_since = BTreeSet::from(["subnets/10.0.0.0-24".to_owned()]);
    let (records, mut lost) = store.audited(now, listing.clone(), &deleted_since);
    lost.sort();
    assert_eq!(lost, ["nodes/a", "nodes/b", "peers/new"]);
    assert_eq!(store.audit_differences(), 3);
    let records = records.unwrap();
    assert_eq!(records.nodes[&"c".parse().unwrap()].value.name.as_str(), "z");
    assert!(!records.subnets.contains_key(&subnet("10.0.0.0-24")));
    assert!(records.nodes.contains_key(&"b".parse().unwrap()), "one list is not enough");
    assert!(store.awaits_list());
    let (records, lost) = store.audited(now, listing, &deleted_since);
    assert!(!records.unwrap().nodes.contains_key(&"b".parse().unwrap()));
    assert!(lost.is_empty() && !store.awaits_list());
}

#[test]
fn keys_that_are_none_of_ours_are_named_and_bounded() {
    let now = Instant::now();
    let mut source = mesh(1);
    for i in 0..MAX_PROBLEMS + 50 {
        source.put(&format!("subnets/nonsense-{i}"), "{}");
    }
    let records = listed(&source, now).records();
    assert_eq!(records.problems.len(), MAX_PROBLEMS + 1);
    assert!(records.problems[MAX_PROBLEMS].cause.contains("50 more"));
    assert_eq!(records.nodes.len(), 1);
}

const KEYS: [&str; 7] =
    ["config", "nodes/a", "nodes/b", "subnets/10.0.1.0-24", "subnets/10.0.2.0-24", "peers/p", "pods/x/y"];

fn value(key: &str, which: u8) -> String {
    let key = match (key.split('/').next().unwrap_or_default(), which) {
        ("pods", _) | (_, 2) => return "{ broken".into(),
        ("config", _) => return format!(r#"{{"Network": "10.0.0.0/16", "LeaseTTL": {}}}"#, 60 + which),
        ("nodes", 0) => return node("a"),
        ("nodes", _) => return node("b"),
        ("subnets", 0) => return lease("a"),
        ("subnets", _) => return lease("b"),
        _ => etcd_schema::PublicKey::from_bytes([which + 9; 32]),
    };
    format!(r#"{{"publicKey": "{key}", "allowedIPs": ["198.18.0.0/24"]}}"#)
}

proptest! {
    /// However the changes are cut into messages, and wherever a list stands in for them, the end is the same.
    #[test]
    fn events_and_lists_come_to_the_same(
        writes in prop::collection::vec((0..KEYS.len(), 0..4u8, 0..4u8), 1..60),
    ) {
        let mut now = Instant::now();
        let mut source = Source::default();
        let mut store = reading();
        store.on_list(now, KeyListing::default());
        let mut pending = Vec::new();
        for (key, which, then) in writes {
            let key = KEYS[key];
            now += Duration::from_secs(1);
            if which == 3 {
                if source.keys.contains_key(key) {
                    pending.push(source.delete(key));
                }
            } else {
                pending.push(source.put(key, &value(key, which)));
            }
            match then {
                0 => {}
                1 => {
                    pending.clear();
                    store.on_list(now, source.list());
                    // What the list lacked goes with the next.
                    store.on_list(now, source.list());
                }
                _ => {
                    store.changed(now, std::mem::take(&mut pending));
                }
            }
        }
        store.changed(now, pending);
        prop_assert_eq!(store.revision(), source.revision);
        now += HOLD;
        store.tick(now);
        let (records, fresh) = (store.records(), listed(&source, now).records());
        let good = |key: &str| source.keys.get(key).is_none_or(|entry| entry.value[..] != *b"{ broken");
        if good("config") && source.keys.contains_key("config") {
            prop_assert_eq!(&records.config, &fresh.config);
        }
        for id in ["a", "b"].map(|id| id.parse::<NodeId>().unwrap()) {
            if good(&Key::Node(id.clone()).to_string()) {
                prop_assert_eq!(records.nodes.get(&id), fresh.nodes.get(&id));
            }
        }
        for key in ["10.0.1.0-24", "10.0.2.0-24"].map(subnet) {
            if good(&Key::Subnet(key).to_string()) {
                prop_assert_eq!(records.subnets.get(&key), fresh.subnets.get(&key));
            }
        }
        prop_assert!(store.cached().all(|entry| !entry.key.starts_with("pods/")));
    }
}
