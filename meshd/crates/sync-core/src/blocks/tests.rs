mod property;

use control_core::types::Committed;
use mesh::records::LeaseId;
use serde_json::json;

use super::*;
use crate::mesh_nodes;

const CONFIG: &str = r#"{"Networks": [{"cidr": "10.244.0.0/16"},
    {"cidr": "10.42.0.0/16", "cluster": "east", "Allocate": "kubernetes"},
    {"cidr": "fd42:42::/48", "cluster": "east", "Allocate": "kubernetes"}]}"#;
/// For nodes that name no cluster.
const FLAT: &str = r#"{"Network": "10.42.0.0/16", "Allocate": "kubernetes"}"#;
const ALIVE: &str = r#"{"bootId": "b", "startCount": 1, "incarnation": 1}"#;

/// etcd, as far as blocks need it.
#[derive(Debug, Clone, Default)]
struct Etcd {
    revision: Revision,
    keys: BTreeMap<String, Entry>,
}

impl Etcd {
    fn put(&mut self, key: &str, value: &str) {
        self.revision += 1;
        self.store(key, value.as_bytes(), None);
    }

    /// The subnet of node `id`, as its daemon leases it.
    fn lease(&mut self, key: &str, id: &str) {
        self.revision += 1;
        self.store(key, json!({"Node": id}).to_string().as_bytes(), LeaseId::new(7));
    }

    fn store(&mut self, key: &str, value: &[u8], lease: Option<LeaseId>) {
        let create_revision = self.keys.get(key).map_or(self.revision, |entry| entry.create_revision);
        let (mod_revision, value) = (self.revision, value.into());
        self.keys.insert(key.to_owned(), Entry { key: key.to_owned(), value, create_revision, mod_revision, lease });
    }

    fn delete(&mut self, key: &str) {
        self.revision += 1;
        self.keys.remove(key);
    }

    fn commit(&mut self, transaction: &Transaction) -> Committed {
        assert!(transaction.compares.len() <= 128 && transaction.writes.len() <= 128);
        let of = |key: &String| self.keys.get(key);
        let succeeded = transaction.compares.iter().all(|compare| match compare {
            Compare::ModRevision { key, equals } => of(key).map_or(0, |entry| entry.mod_revision) == *equals,
            Compare::CreateRevision { key, equals } => of(key).map_or(0, |entry| entry.create_revision) == *equals,
            Compare::AllModifiedBefore { prefix, revision } => {
                let mut below = self.keys.values().filter(|entry| entry.key.starts_with(prefix));
                below.all(|entry| entry.mod_revision < *revision)
            }
        });
        if succeeded {
            self.revision += 1;
            let mut written = BTreeSet::new();
            for write in &transaction.writes {
                let (Write::Put { key, .. } | Write::Delete { key }) = write;
                assert!(written.insert(key.clone()), "etcd refuses two operations on {key}");
                match write {
                    Write::Put { key, value, lease } => self.store(key, value, *lease),
                    Write::Delete { key } => {
                        self.keys.remove(key);
                    }
                }
            }
        }
        Committed { succeeded, revision: self.revision }
    }

    fn lists(&self) -> [KeyListing; 1] {
        [KeyListing { cluster: None, revision: self.revision, entries: self.keys.values().cloned().collect() }]
    }

    /// Subnets with their nodes; `-`: given up.
    fn blocks(&self) -> Vec<(String, String)> {
        let blocks = self.keys.iter().filter_map(|(key, entry)| {
            let block = key.strip_prefix("subnets/")?;
            let lease = SubnetLease::parse(&entry.value).unwrap();
            let owner = if lease.freed.is_some() { "-".to_owned() } else { lease.node?.to_string() };
            Some((block.to_owned(), owner))
        });
        blocks.collect()
    }
}

fn at(seconds: u64) -> Now {
    Now { monotonic: Duration::from_secs(seconds), unix: 1_000_000 + seconds }
}

/// The leader key is there, and a term began long ago.
fn begin(etcd: &mut Etcd) -> NodeBlocks {
    etcd.put("k8s/east/leader", "{}");
    NodeBlocks::new("east".parse().unwrap(), etcd.keys["k8s/east/leader"].create_revision, at(0))
}

/// The node `id`, called `name`, of cluster east at 192.0.2.`number`.
fn put_node(etcd: &mut Etcd, id: &str, name: &str, number: u8) {
    let key = etcd_schema::PublicKey::from_bytes([number + 9; 32]);
    let record = json!({"name": name, "cluster": "east", "publicKey": key.to_string(), "listenPort": 51820,
        "addresses": [format!("192.0.2.{number}/24")]});
    etcd.put(&format!("nodes/{id}"), &record.to_string());
    etcd.put(&format!("alive/{id}"), ALIVE);
}

/// The node names no cluster.
fn put_flat_node(etcd: &mut Etcd, id: &str, name: &str, number: u8) {
    put_node(etcd, id, name, number);
    let record = String::from_utf8(etcd.keys[&format!("nodes/{id}")].value.to_vec()).unwrap();
    etcd.put(&format!("nodes/{id}"), &record.replace("east", ""));
}

fn step(blocks: &mut NodeBlocks, etcd: &Etcd, now: Now, complete: bool) -> BlockStep {
    let lists = etcd.lists();
    blocks.step(now, complete, &mesh_nodes(&lists), &lists)
}

fn put_object(etcd: &mut Etcd, name: &str, number: u8, cidrs: &[&str]) {
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{number}")}]}});
    etcd.put(&format!("k8s/east/nodes/{name}"), &object.to_string());
}

/// Steps until nothing is left to write.
fn settle(blocks: &mut NodeBlocks, etcd: &mut Etcd, now: Now) -> Vec<BlockNotice> {
    let mut notices = Vec::new();
    for _ in 0..20 {
        let step = step(blocks, etcd, now, true);
        notices.extend(step.notices);
        match step.transaction {
            Some(transaction) => assert!(etcd.commit(&transaction).succeeded),
            None => return notices,
        }
    }
    panic!("it never comes to rest: {:?}", etcd.blocks());
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(block, owner)| ((*block).to_owned(), (*owner).to_owned())).collect()
}

#[test]
fn blocks_of_one_and_two_families_and_of_any_length_are_reserved() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    for (id, name, number, cidrs) in [
        ("a", "one", 1, vec!["10.42.1.0/24"]),
        ("b", "two", 2, vec!["10.42.2.0/25", "fd42:42:0:2::/64"]),
        ("c", "three", 3, vec!["fd42:42:0:3::/80"]),
        ("d", "four", 4, vec![]),
    ] {
        put_node(&mut etcd, id, name, number);
        put_object(&mut etcd, name, number, &cidrs);
    }
    assert_eq!(settle(&mut blocks, &mut etcd, at(1)), []);
    let reserved = [("10.42.1.0-24", "a"), ("10.42.2.0-25&fd42:42:0:2::-64", "b"), ("fd42:42:0:3::-80", "c")];
    assert_eq!(etcd.blocks(), pairs(&reserved));
    let lease = SubnetLease::parse(&etcd.keys["subnets/10.42.1.0-24"].value).unwrap();
    assert_eq!(lease.kubernetes_node, Some(("east".parse().unwrap(), "one".parse().unwrap())));
    assert!(etcd.keys["subnets/10.42.1.0-24"].lease.is_none());
    // A podCIDR that comes later, and one of a Node that was made again while its node lives: the old one stays.
    put_object(&mut etcd, "four", 4, &["10.42.4.0/24"]);
    put_object(&mut etcd, "one", 1, &["10.42.9.0/24"]);
    settle(&mut blocks, &mut etcd, at(2));
    assert!(etcd.blocks().contains(&("10.42.4.0-24".into(), "d".into())));
    assert!(etcd.blocks().contains(&("10.42.9.0-24".into(), "a".into())));
    assert!(etcd.blocks().contains(&("10.42.1.0-24".into(), "a".into())));
    // With "mesh", nothing is reserved.
    etcd.put("config", &CONFIG.replace("kubernetes", "mesh"));
    put_node(&mut etcd, "e", "five", 5);
    put_object(&mut etcd, "five", 5, &["10.42.5.0/24"]);
    assert!(step(&mut blocks, &etcd, at(3), true).transaction.is_none());
}

#[test]
fn a_second_claimant_is_refused_loudly_and_once() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "a", "one", 1);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    settle(&mut blocks, &mut etcd, at(1));
    put_node(&mut etcd, "b", "two", 2);
    for claim in ["10.42.1.0/24", "10.42.0.0/23", "10.42.1.128/25"] {
        put_object(&mut etcd, "two", 2, &[claim]);
        let notices = settle(&mut blocks, &mut etcd, at(2));
        assert!(
            matches!(&notices[..], [BlockNotice::Claimed { by, owner, .. }] if by == "subnets/10.42.1.0-24" && owner == "node a"),
            "{notices:?}"
        );
        assert_eq!(settle(&mut blocks, &mut etcd, at(3)), [], "said once");
    }
    for (cidrs, says) in [
        (&["10.99.1.0/24"][..], "is outside 10.42.0.0/16 and fd42:42::/48"),
        (&["10.244.1.0/24"], "is outside 10.42.0.0/16 and fd42:42::/48"),
        (&["10.42.1.0/24", "10.42.2.0/24"], "two podCIDRs of one family"),
    ] {
        put_object(&mut etcd, "two", 2, cidrs);
        let notices = settle(&mut blocks, &mut etcd, at(4));
        assert!(notices[0].to_string().contains(says), "{notices:?}");
    }
    // An operator's reservation is not taken.
    etcd.put("subnets/10.42.7.0-24", r#"{"PublicIP": "192.0.2.99"}"#);
    put_object(&mut etcd, "two", 2, &["10.42.7.0/24"]);
    let notices = settle(&mut blocks, &mut etcd, at(5));
    assert!(notices[0].to_string().contains("a reservation of an operator"), "{notices:?}");
    assert_eq!(etcd.blocks(), pairs(&[("10.42.1.0-24", "a")]));
}

/// Another node of the mesh writes the victim's name and address into its record.
#[test]
fn a_node_that_claims_anothers_name_gets_nothing_and_takes_nothing() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "thief", "one", 1);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    put_node(&mut etcd, "victim", "one", 1);
    let notices = settle(&mut blocks, &mut etcd, at(1));
    assert!(matches!(&notices[..], [BlockNotice::Ambiguous { ids, .. }] if ids.len() == 2), "{notices:?}");
    assert_eq!(etcd.blocks(), []);
    etcd.delete("nodes/thief");
    settle(&mut blocks, &mut etcd, at(2));
    // Once the victim has it, the thief's record changes nothing.
    put_node(&mut etcd, "thief", "one", 1);
    settle(&mut blocks, &mut etcd, at(3));
    assert_eq!(etcd.blocks(), pairs(&[("10.42.1.0-24", "victim")]));
    // Nor does a node that says it is of another cluster.
    etcd.delete("nodes/victim");
    let other = String::from_utf8(etcd.keys["nodes/thief"].value.to_vec()).unwrap().replace("east", "west");
    etcd.put("nodes/thief", &other);
    put_object(&mut etcd, "one", 1, &["10.42.2.0/24"]);
    settle(&mut blocks, &mut etcd, at(4));
    assert_eq!(etcd.blocks(), pairs(&[("10.42.1.0-24", "victim")]));
}

#[test]
fn a_deleted_nodes_block_is_free_once_its_daemon_is_gone_and_not_before() {
    for allocate in ["kubernetes", "mesh"] {
        let mut etcd = Etcd::default();
        let mut blocks = begin(&mut etcd);
        etcd.put("config", &CONFIG.replace("kubernetes", allocate));
        for (id, name, number) in [("a", "one", 1), ("b", "two", 2), ("c", "three", 3)] {
            put_node(&mut etcd, id, name, number);
            put_object(&mut etcd, name, number, &[&format!("10.42.{number}.0/24")]);
            etcd.lease(&format!("subnets/10.42.{number}.0-24"), id);
        }
        settle(&mut blocks, &mut etcd, at(50));
        let owned = pairs(&[("10.42.1.0-24", "a"), ("10.42.2.0-24", "b"), ("10.42.3.0-24", "c")]);
        // The Node object is gone and the node lives on; or the daemon is gone and the object is there.
        etcd.delete("k8s/east/nodes/one");
        etcd.delete("alive/b");
        (100..200).for_each(|second| drop(settle(&mut blocks, &mut etcd, at(second))));
        assert_eq!(etcd.blocks(), owned, "{allocate}");
        etcd.put("alive/b", ALIVE);
        etcd.delete("alive/a");
        settle(&mut blocks, &mut etcd, at(200));
        settle(&mut blocks, &mut etcd, at(219));
        assert_eq!(etcd.blocks(), owned, "{allocate}");
        // It comes back in between: the time begins again.
        etcd.put("alive/a", ALIVE);
        settle(&mut blocks, &mut etcd, at(220));
        etcd.delete("alive/a");
        settle(&mut blocks, &mut etcd, at(221));
        settle(&mut blocks, &mut etcd, at(240));
        assert_eq!(etcd.blocks(), owned, "{allocate}");
        // While the copy may be incomplete, and while the others show no sign of life either, nothing is concluded.
        assert!(step(&mut blocks, &etcd, at(241), false).transaction.is_none());
        etcd.delete("alive/b");
        etcd.delete("alive/c");
        (242..300).for_each(|second| drop(settle(&mut blocks, &mut etcd, at(second))));
        assert_eq!(etcd.blocks(), owned, "{allocate}");
        etcd.put("alive/c", ALIVE);
        settle(&mut blocks, &mut etcd, at(300));
        settle(&mut blocks, &mut etcd, at(320));
        assert_eq!(etcd.blocks()[0], ("10.42.1.0-24".into(), "-".into()), "{allocate}");
        // A later Node may have it at once; and the mark goes with the time that a lease lasts.
        let mut later = etcd.clone();
        settle(&mut blocks, &mut later, at(320 + 604_800));
        assert_eq!(later.blocks().len(), 2, "{allocate}");
        put_node(&mut etcd, "d", "four", 4);
        put_object(&mut etcd, "four", 4, &["10.42.0.0/23"]);
        settle(&mut blocks, &mut etcd, at(321));
        let owner = etcd.blocks().into_iter().find(|(block, _)| block == "10.42.0.0-23");
        assert_eq!(owner.is_some(), allocate == "kubernetes");
        assert_eq!(etcd.blocks().iter().any(|(block, _)| block == "10.42.1.0-24"), allocate == "mesh");
    }
}

#[test]
fn what_is_an_operators_another_clusters_or_a_strangers_is_not_given_up() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    for (id, name, number) in [("a", "one", 1), ("b", "two", 2), ("c", "three", 3), ("s", "stranger", 4)] {
        put_node(&mut etcd, id, name, number);
        if id != "s" {
            put_object(&mut etcd, name, number, &[]);
        }
    }
    // A subnet that the node had before it joined its cluster, a reservation, and a machine that never had a Node
    // object.
    etcd.lease("subnets/10.244.1.0-24", "a");
    etcd.put("subnets/10.42.2.0-24", &json!({"Node": "b"}).to_string());
    etcd.lease("subnets/10.42.4.0-24", "s");
    settle(&mut blocks, &mut etcd, at(50));
    for (id, name) in [("a", "one"), ("b", "two"), ("s", "stranger")] {
        etcd.delete(&format!("k8s/east/nodes/{name}"));
        etcd.delete(&format!("alive/{id}"));
    }
    for number in 5..9 {
        let (id, name) = (format!("n{number}"), format!("node-{number}"));
        put_node(&mut etcd, &id, &name, number);
        put_object(&mut etcd, &name, number, &[]);
    }
    let before = etcd.blocks();
    (100..200).for_each(|second| drop(settle(&mut blocks, &mut etcd, at(second))));
    assert_eq!(etcd.blocks(), before);
}

#[test]
fn giving_up_is_no_part_of_a_reservation() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    for (id, name, number) in [("a", "one", 1), ("b", "two", 2), ("c", "three", 3)] {
        put_node(&mut etcd, id, name, number);
        put_object(&mut etcd, name, number, &[&format!("10.42.{number}.0/24")]);
    }
    settle(&mut blocks, &mut etcd, at(50));
    etcd.delete("k8s/east/nodes/one");
    etcd.delete("alive/a");
    settle(&mut blocks, &mut etcd, at(100));
    put_node(&mut etcd, "d", "four", 4);
    put_object(&mut etcd, "four", 4, &["10.42.4.0/24"]);
    // etcd may deny one of them for ever.
    let touched = |step: BlockStep| -> Vec<String> {
        let writes = step.transaction.map(|transaction| transaction.writes).unwrap_or_default();
        writes.into_iter().map(|(Write::Put { key, .. } | Write::Delete { key })| key).collect()
    };
    assert_eq!(touched(step(&mut blocks, &etcd, at(130), true)), ["subnets/10.42.4.0-24"]);
    assert!(etcd.commit(&step(&mut blocks, &etcd, at(130), true).transaction.unwrap()).succeeded);
    assert_eq!(touched(step(&mut blocks, &etcd, at(130), true)), ["subnets/10.42.1.0-24"]);
}

/// With `Network` alone, a node is of the cluster whose Node object it is bound to.
#[test]
fn nodes_that_name_no_cluster_get_blocks_and_give_them_up_too() {
    for (config, drawn) in [(FLAT.to_owned(), false), (FLAT.replace("kubernetes", "mesh"), true)] {
        let mut etcd = Etcd::default();
        let mut blocks = begin(&mut etcd);
        etcd.put("config", &config);
        for (id, name, number) in [("a", "one", 1), ("b", "two", 2), ("other", "elsewhere", 3)] {
            put_flat_node(&mut etcd, id, name, number);
            if drawn || id == "other" {
                etcd.lease(&format!("subnets/10.42.{number}.0-24"), id);
            }
        }
        put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
        put_object(&mut etcd, "two", 2, &["10.42.2.0/24"]);
        assert_eq!(settle(&mut blocks, &mut etcd, at(1)), []);
        let owned = pairs(&[("10.42.1.0-24", "a"), ("10.42.2.0-24", "b"), ("10.42.3.0-24", "other")]);
        assert_eq!(etcd.blocks(), owned);
        // A machine that never was a Node of this cluster keeps its subnet, however long it is off.
        etcd.delete("alive/other");
        etcd.delete("k8s/east/nodes/one");
        etcd.delete("alive/a");
        settle(&mut blocks, &mut etcd, at(100));
        settle(&mut blocks, &mut etcd, at(120));
        let freed = pairs(&[("10.42.1.0-24", "-"), ("10.42.2.0-24", "b"), ("10.42.3.0-24", "other")]);
        assert_eq!(etcd.blocks(), freed, "{config}");
    }
}

/// A machine made again under its name has another id, and the record of the old one lasts for days.
#[test]
fn a_node_made_again_gets_its_block_once_the_old_one_gave_it_up_or_was_removed() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "old", "one", 1);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    put_node(&mut etcd, "b", "two", 2);
    put_object(&mut etcd, "two", 2, &["10.42.2.0/24"]);
    settle(&mut blocks, &mut etcd, at(100));
    etcd.delete("alive/old");
    put_node(&mut etcd, "new", "one", 1);
    let notices = settle(&mut blocks, &mut etcd, at(101));
    assert!(matches!(&notices[..], [BlockNotice::Ambiguous { ids, .. }] if ids.len() == 2), "{notices:?}");
    let owned = pairs(&[("10.42.1.0-24", "old"), ("10.42.2.0-24", "b")]);
    assert_eq!(etcd.blocks(), owned, "the old one may be back at any time");
    let mut removed = etcd.clone();
    removed.put("removed/old", r#"{"name": "one"}"#);
    removed.delete("subnets/10.42.1.0-24");
    settle(&mut blocks, &mut removed, at(102));
    assert_eq!(removed.blocks(), pairs(&[("10.42.1.0-24", "new"), ("10.42.2.0-24", "b")]));
    // Or the Node object was deleted, and kubelet registers it again later.
    etcd.delete("nodes/new");
    etcd.delete("alive/new");
    etcd.delete("k8s/east/nodes/one");
    settle(&mut blocks, &mut etcd, at(103));
    settle(&mut blocks, &mut etcd, at(123));
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    put_node(&mut etcd, "new", "one", 1);
    assert_eq!(settle(&mut blocks, &mut etcd, at(124)), []);
    assert_eq!(etcd.blocks(), pairs(&[("10.42.1.0-24", "new"), ("10.42.2.0-24", "b")]));
}

#[test]
fn a_block_that_the_node_drew_or_put_back_becomes_its_reservation() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "a", "one", 1);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    etcd.put("subnets/10.42.1.0-24", r#"{"PublicIP": "192.0.2.1", "Node": "a"}"#);
    etcd.keys.get_mut("subnets/10.42.1.0-24").unwrap().lease = LeaseId::new(7);
    settle(&mut blocks, &mut etcd, at(1));
    let entry = &etcd.keys["subnets/10.42.1.0-24"];
    let lease = SubnetLease::parse(&entry.value).unwrap();
    assert_eq!((entry.lease, lease.public_ip), (None, Some("192.0.2.1".parse().unwrap())));
    assert_eq!(lease.kubernetes_node, Some(("east".parse().unwrap(), "one".parse().unwrap())));
}

/// The node takes the reserved block that was written last: so it goes back to an earlier one, too.
#[test]
fn a_podcidr_that_a_node_gets_again_is_written_last() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "a", "one", 1);
    for cidr in ["10.42.1.0/24", "10.42.2.0/24", "10.42.1.0/24", "10.42.2.0/24"] {
        put_object(&mut etcd, "one", 1, &[cidr]);
        settle(&mut blocks, &mut etcd, at(1));
        let reserved = etcd.keys.values().filter(|entry| entry.key.starts_with("subnets/"));
        let last = reserved.max_by_key(|entry| entry.mod_revision).unwrap();
        assert_eq!(last.key, format!("subnets/{}", cidr.replace('/', "-")));
        // The node writes its own fields into the earlier one.
        let other = etcd.keys.keys().find(|key| key.starts_with("subnets/") && **key != last.key).cloned();
        if let Some(other) = other {
            let value = String::from_utf8(etcd.keys[&other].value.to_vec()).unwrap();
            etcd.put(&other, &value);
            settle(&mut blocks, &mut etcd, at(2));
            let wanted = &etcd.keys[&format!("subnets/{}", cidr.replace('/', "-"))];
            assert!(wanted.mod_revision > etcd.keys[&other].mod_revision, "{cidr}");
        }
    }
}

/// The machine was installed again: a new id under the same name and address, while the Node object stays.
#[test]
fn a_node_that_stays_silent_gives_way_to_a_new_one_in_its_place() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    for (id, name, number) in [("old", "one", 1), ("b", "two", 2)] {
        put_node(&mut etcd, id, name, number);
        put_object(&mut etcd, name, number, &[&format!("10.42.{number}.0/24")]);
    }
    settle(&mut blocks, &mut etcd, at(100));
    put_node(&mut etcd, "new", "one", 1);
    let owned = pairs(&[("10.42.1.0-24", "old"), ("10.42.2.0-24", "b")]);
    // Never while it is alive.
    (101..900).step_by(10).for_each(|second| drop(settle(&mut blocks, &mut etcd, at(second))));
    assert_eq!(etcd.blocks(), owned);
    etcd.delete("alive/old");
    settle(&mut blocks, &mut etcd, at(900));
    // It was away for a moment.
    etcd.put("alive/old", ALIVE);
    settle(&mut blocks, &mut etcd, at(1100));
    etcd.delete("alive/old");
    settle(&mut blocks, &mut etcd, at(1101));
    settle(&mut blocks, &mut etcd, at(1400));
    assert_eq!(etcd.blocks(), owned);
    // Of two that run, and where subnets are drawn, which one is the Node is not known.
    let mut several = etcd.clone();
    put_node(&mut several, "thief", "one", 1);
    let mut drawn = etcd.clone();
    drawn.put("config", &CONFIG.replace("kubernetes", "mesh"));
    for mut other in [several, drawn] {
        settle(&mut blocks, &mut other, at(1402));
        assert_eq!(other.blocks(), owned);
    }
    settle(&mut blocks, &mut etcd, at(1403));
    let free = step(&mut blocks, &etcd, at(1704), true).transaction.unwrap();
    // It comes back in the last moment.
    let mut back = etcd.clone();
    back.put("alive/old", ALIVE);
    assert!(!back.commit(&free).succeeded);
    settle(&mut blocks, &mut etcd, at(1705));
    assert_eq!(etcd.blocks(), pairs(&[("10.42.1.0-24", "new"), ("10.42.2.0-24", "b")]));
}

/// A node of the mesh says that it is the one that is down.
#[test]
fn a_node_that_has_a_subnet_or_was_another_node_replaces_none() {
    for gives_up in [false, true] {
        let mut etcd = Etcd::default();
        let mut blocks = begin(&mut etcd);
        etcd.put("config", CONFIG);
        for (id, name, number) in [("victim", "one", 1), ("thief", "two", 2), ("b", "three", 3)] {
            put_node(&mut etcd, id, name, number);
            put_object(&mut etcd, name, number, &[&format!("10.42.{number}.0/24")]);
        }
        settle(&mut blocks, &mut etcd, at(100));
        etcd.delete("alive/victim");
        put_node(&mut etcd, "thief", "one", 1);
        if gives_up {
            etcd.delete("subnets/10.42.2.0-24");
        }
        (101..1000).step_by(10).for_each(|second| drop(settle(&mut blocks, &mut etcd, at(second))));
        assert_eq!(etcd.blocks()[0], ("10.42.1.0-24".into(), "victim".into()), "{gives_up}");
    }
}

/// Two clusters have a Node of this name and address, which one machine cannot be.
#[test]
fn a_node_of_another_cluster_gets_no_second_block() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", FLAT);
    put_flat_node(&mut etcd, "a", "one", 1);
    etcd.put("subnets/10.42.9.0-24", r#"{"Node": "a", "KubernetesNode": "west/one"}"#);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    let notices = settle(&mut blocks, &mut etcd, at(1));
    assert!(notices[0].to_string().contains("its node is Node one of cluster west"), "{notices:?}");
    assert_eq!(etcd.blocks(), pairs(&[("10.42.9.0-24", "a")]));
}

#[test]
fn an_event_on_the_node_says_why_it_has_no_block() {
    let notice = BlockNotice::Unusable { node: "one".parse().unwrap(), reason: "10.99.1.0/24 is outside".to_owned() };
    let event = notice.refused().event("meshd-sync-1", "2026-11-30T12:00:00Z");
    let object = &event["involvedObject"];
    assert_eq!((&object["kind"], &object["name"], &object["uid"]), (&json!("Node"), &json!("one"), &json!("one")));
    assert!(event["message"].as_str().unwrap().contains("10.99.1.0/24 is outside"));
}

#[test]
fn nothing_is_written_after_the_term_or_on_a_stale_view() {
    let mut etcd = Etcd::default();
    let mut blocks = begin(&mut etcd);
    etcd.put("config", CONFIG);
    put_node(&mut etcd, "a", "one", 1);
    put_object(&mut etcd, "one", 1, &["10.42.1.0/24"]);
    let transaction = step(&mut blocks, &etcd, at(1), true).transaction.unwrap();
    let changes: [fn(&mut Etcd); 8] = [
        |etcd| etcd.delete("k8s/east/leader"),
        |etcd| etcd.put("config", CONFIG),
        |etcd| put_node(etcd, "a", "one", 2),
        |etcd| etcd.delete("nodes/a"),
        |etcd| etcd.put("removed/a", "{}"),
        |etcd| etcd.delete("k8s/east/nodes/one"),
        |etcd| etcd.put("subnets/10.42.0.0-20", r#"{"Node": "b"}"#),
        |etcd| etcd.put("subnets/10.42.1.0-24", r#"{"Node": "b"}"#),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut changed = etcd.clone();
        change(&mut changed);
        assert!(!changed.commit(&transaction).succeeded, "change {number}");
    }
    assert!(etcd.commit(&transaction).succeeded);
}
