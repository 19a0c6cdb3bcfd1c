//! Nodes that join, stop, restart, are removed, cloned or cut off.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use control_core::{
    core::ControlStatus,
    membership::{LocalFacts, MembershipState},
    types::Entry,
};
use etcd_schema::{Cluster, Key, PublicKey, SubnetKey};
use mesh::problem::ProblemCode;
use nix::sys::signal::Signal;

use super::etcd::{Etcd, eventually};
use crate::{
    Control, Options,
    daemon::start_at_pace,
    etcd_options::{EtcdOptions, endpoints_in},
    node_removal::{Live, remove_node},
    state_dir::StateDir,
    watcher::WatchIntervals,
};

pub(super) const CONFIG: &str = r#"{"Network": "10.244.0.0/16", "LeaseTTL": 60}"#;

pub(super) fn facts(name: &str) -> LocalFacts {
    let mut key = [9; 32];
    key[..name.len().min(32)].copy_from_slice(name.as_bytes());
    LocalFacts {
        name: name.parse().unwrap(),
        site: None,
        cluster: Cluster::default(),
        public_key: PublicKey::from_bytes(key),
        next_public_key: None,
        listen_port: 51820,
        endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
        addresses: vec!["192.0.2.1/24".parse().unwrap()],
        vteps: Vec::new(),
        public_ipv4: Some("192.0.2.1".parse().unwrap()),
        public_ipv6: None,
        version: "0.1.0".into(),
        readiness: None,
    }
}

/// A node with a state directory of its own.
pub(super) struct Node {
    pub(super) dir: tempfile::TempDir,
    pub(super) run_dir: tempfile::TempDir,
    pub(super) facts: LocalFacts,
}

impl Node {
    pub(super) fn new(name: &str) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), run_dir: tempfile::tempdir().unwrap(), facts: facts(name) }
    }

    pub(super) fn start(&self, etcd: &Etcd) -> Control {
        self.start_attached(etcd, false)
    }

    pub(super) fn start_attached(&self, etcd: &Etcd, attached: bool) -> Control {
        self.start_with(etcd.options(), attached)
    }

    /// Reaches `etcd` at another URL.
    pub(super) fn start_through(&self, etcd: &Etcd, url: &str, attached: bool) -> Control {
        self.start_with(EtcdOptions { endpoints: vec![url.into()], ..etcd.options() }, attached)
    }

    /// Reaches `etcd` by the members in a file.
    pub(super) fn start_by_file(&self, etcd: &Etcd, file: &Path) -> Control {
        let endpoints = endpoints_in(file).unwrap();
        self.start_with(EtcdOptions { endpoints, endpoints_file: Some(file.into()), ..etcd.options() }, false)
    }

    pub(super) fn start_with(&self, etcd: EtcdOptions, attached: bool) -> Control {
        let options = Options {
            etcd,
            state: StateDir::open(self.dir.path()).unwrap(),
            run_dir: self.run_dir.path().to_owned(),
            facts: self.facts.clone(),
            attached,
            objects: None,
            audit_interval: Duration::from_secs(600),
        };
        let pace = WatchIntervals {
            idle: Duration::from_secs(1),
            audit: Duration::from_millis(300),
            audit_grace: Duration::from_millis(200),
            confirm: Duration::from_millis(200),
        };
        start_at_pace(options, Some(pace)).unwrap()
    }

    /// Another machine with a copy of this one's state directory.
    fn copy(&self) -> Self {
        let copy = Self { facts: self.facts.clone(), ..Self::new("copy") };
        for file in ["node-id", "starts"] {
            std::fs::copy(self.dir.path().join(file), copy.dir.path().join(file)).unwrap();
        }
        copy
    }

    pub(super) fn id(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("node-id")).unwrap().trim().to_owned()
    }
}

pub(super) async fn state(
    control: &mut Control,
    what: &str,
    wanted: impl Fn(&MembershipState) -> bool,
) -> MembershipState {
    let mut status = control.status.clone();
    let waited = tokio::time::timeout(Duration::from_secs(60), status.wait_for(|status| wanted(&status.state)));
    match waited.await {
        Ok(status) => status.unwrap().state.clone(),
        Err(_) => panic!("never {what}: {:?}", *control.status.borrow()),
    }
}

pub(super) async fn joined(control: &mut Control) -> SubnetKey {
    match state(control, "joined", |state| matches!(state, MembershipState::Joined { .. })).await {
        MembershipState::Joined { subnet } => subnet,
        _ => unreachable!(),
    }
}

#[tokio::test]
async fn two_nodes_behind_one_address_join_and_see_each_other() {
    let etcd = Etcd::start().await;
    let (a, b) = (Node::new("a"), Node::new("b"));
    let (mut control_a, mut control_b) = (a.start(&etcd), b.start(&etcd));
    state(&mut control_a, "without config", |state| *state == MembershipState::NoConfig).await;
    etcd.put("config", CONFIG).await;
    let (subnet_a, subnet_b) = (joined(&mut control_a).await, joined(&mut control_b).await);
    assert!(!subnet_a.overlaps(&subnet_b));
    let records = control_a
        .records
        .wait_for(|records| records.nodes.len() == 2 && records.subnets.len() == 2)
        .await
        .unwrap()
        .clone();
    for (node, subnet) in [(&a, subnet_a), (&b, subnet_b)] {
        let record = &records.subnets[&subnet];
        assert_eq!(record.value.node.as_ref().unwrap().as_str(), node.id());
        assert_eq!(record.lease, records.nodes[&node.id().parse().unwrap()].lease);
        assert!(record.lease.is_some());
    }
    let keys = etcd.dump().await;
    assert!(keys.contains_key(&Key::Subnet(subnet_a).to_string()));
    assert!(keys.contains_key(&format!("alive/{}", a.id())));
}

#[tokio::test]
async fn a_bad_config_is_one_problem() {
    let etcd = Etcd::start().await;
    etcd.put("config", "{").await;
    let mut control = Node::new("a").start(&etcd);
    state(&mut control, "without config", |state| *state == MembershipState::NoConfig).await;
    let all = |control: &Control| {
        let records = Arc::clone(&control.records.borrow().problems);
        let own = control.status.borrow().problems.clone();
        records.iter().chain(&own).map(|problem| problem.code.as_str()).collect::<Vec<_>>()
    };
    assert_eq!(all(&control), ["bad_value"]);
    etcd.delete(&["config"]).await;
    let gone = |status: &ControlStatus| status.problems.iter().any(|problem| problem.code == ProblemCode::NoConfig);
    control.status.wait_for(gone).await.unwrap();
    assert_eq!(all(&control), ["no_config"]);
}

#[tokio::test]
async fn ten_nodes_that_join_at_once_get_ten_subnets() {
    let etcd = Etcd::start().await;
    // Room for twelve: the choices are bound to collide.
    etcd.put("config", r#"{"Network": "10.244.0.0/24", "SubnetLen": 28, "SubnetMin": "10.244.0.16", "SubnetMax": "10.244.0.192", "LeaseTTL": 60}"#)
        .await;
    let nodes: Vec<_> = (0..10).map(|i| Node::new(&format!("n{i}"))).collect();
    let mut controls: Vec<_> = nodes.iter().map(|node| node.start(&etcd)).collect();
    let mut subnets = Vec::new();
    for control in &mut controls {
        subnets.push(joined(control).await);
    }
    for (i, a) in subnets.iter().enumerate() {
        assert!(!subnets[i + 1..].iter().any(|b| a.overlaps(b)), "{subnets:?}");
    }
    let keys = etcd.dump().await;
    assert_eq!(keys.keys().filter(|key| key.starts_with("subnets/")).count(), 10, "{keys:?}");
}

#[tokio::test]
async fn a_full_pool_is_said_and_heals() {
    let etcd = Etcd::start().await;
    let config = r#"{"Network": "10.244.0.0/28", "SubnetLen": 30, "SubnetMin": "10.244.0.4", "SubnetMax": "10.244.0.4", "LeaseTTL": 60}"#;
    etcd.put("config", config).await;
    etcd.put("subnets/10.244.0.4-30", "not readable, and taken all the same").await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let full = |state: &MembershipState| matches!(state, MembershipState::PoolExhausted { total: 1, .. });
    state(&mut control, "exhausted", full).await;
    assert!(control.status.borrow().problems.iter().any(|problem| problem.code.as_str() == "pool_exhausted"));
    etcd.delete(&["subnets/10.244.0.4-30"]).await;
    joined(&mut control).await;
}

#[tokio::test]
async fn a_restart_takes_the_same_subnet_and_lease_at_once() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let before = joined(&mut control).await;
    let lease = etcd.dump().await[&Key::Subnet(before).to_string()].1;
    control.stop().await;
    // Its `alive` still stands, as after a kill; the cache is lost besides.
    std::fs::remove_dir_all(node.dir.path().join("cache")).unwrap();
    let mut control = node.start(&etcd);
    assert_eq!(joined(&mut control).await, before);
    let keys = etcd.dump().await;
    assert_eq!(keys[&Key::Subnet(before).to_string()].1, lease);
    assert_eq!(keys.keys().filter(|key| key.starts_with("subnets/")).count(), 1);
    assert!(lease.is_some());
}

#[tokio::test]
async fn a_copy_of_a_node_changes_nothing_in_etcd_and_does_not_act_as_it() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let subnet = joined(&mut control).await;
    let id = node.id();
    let records = |name: &str| {
        let pod = format!(
            r#"{{"pod": {{"namespace": "ns", "name": "{name}"}}, "addresses": ["{}"], "interface": "eth0"}}"#,
            subnet.v4.unwrap().addr()
        );
        Some(Arc::new(BTreeMap::from([(format!("endpoints/{id}/{name}/eth0"), pod.into_bytes())])))
    };
    control.endpoints.send_replace(records("c1"));
    // With their revisions: a record that the original puts back was withdrawn.
    let of_node = async || -> Vec<Entry> {
        let entries = etcd.session().await.list().await.unwrap().entries;
        entries.into_iter().filter(|entry| !entry.key.starts_with("alive/")).collect()
    };
    eventually("the container to be in etcd", async || {
        etcd.dump().await.contains_key(&format!("endpoints/{id}/c1/eth0")).then_some(())
    })
    .await;
    let before = of_node().await;
    for copied_at in ["once", "again"] {
        // Its own restarts prove nothing either.
        let copy = node.copy();
        for start in 0..2 {
            let mut second = copy.start(&etcd);
            second.endpoints.send_replace(records("c2"));
            let statuses = second.status.clone();
            let watched = tokio::spawn(async move {
                let mut statuses = statuses;
                let held = statuses.wait_for(|status| status.holds_identity).await;
                held.is_ok()
            });
            state(&mut second, "cloned", |state| matches!(state, MembershipState::Cloned { .. })).await;
            assert_eq!(of_node().await, before, "{copied_at}, start {start}");
            second.stop().await;
            assert!(!watched.await.unwrap(), "{copied_at}, start {start}: it acted as the node");
        }
    }
    // The original restarts, and goes on at once: its own record in etcd is no sign of another.
    control.stop().await;
    let mut control = node.start(&etcd);
    control.status.wait_for(|status| status.holds_identity).await.unwrap();
    joined(&mut control).await;
}

#[tokio::test]
async fn a_start_without_etcd_shows_what_was_known_and_catches_up() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let subnet = joined(&mut control).await;
    // What etcd has taken of a node comes back to it by the watch.
    control.records.wait_for(|records| records.subnets.contains_key(&subnet)).await.unwrap();
    control.stop().await;
    etcd.signal(0, Signal::SIGSTOP);
    let mut control = node.start(&etcd);
    assert!(control.cached.unwrap().usable);
    // A process before this one ran here: it acts as the node.
    control.status.wait_for(|status| status.holds_identity).await.unwrap();
    let records = control.records.borrow().clone();
    assert!(!records.synced && records.config.is_some() && records.subnets.contains_key(&subnet));
    assert_eq!(control.status.borrow().subnet, Some(subnet));
    assert_eq!(control.status.borrow().state, MembershipState::Connecting);
    etcd.signal(0, Signal::SIGCONT);
    assert_eq!(joined(&mut control).await, subnet);
    assert!(control.records.borrow().synced);
}

#[tokio::test]
async fn deleted_own_keys_are_put_back() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let own = joined(&mut control).await;
    let subnet = Key::Subnet(own).to_string();
    let record = format!("nodes/{}", node.id());
    let alive = format!("alive/{}", node.id());
    for keys in [&[subnet.as_str()][..], &[&record], &[&subnet, &record, &alive]] {
        eventually("all there", async || {
            let dump = etcd.dump().await;
            [&subnet, &record, &alive].iter().all(|key| dump.contains_key(*key)).then_some(())
        })
        .await;
        etcd.delete(keys).await;
        eventually("back again", async || {
            let dump = etcd.dump().await;
            [&subnet, &record, &alive].iter().all(|key| dump.contains_key(*key)).then_some(())
        })
        .await;
    }
    // The node hears of it later than etcd has it.
    assert_eq!(joined(&mut control).await, own);
}

#[tokio::test]
async fn own_records_are_kept_right_and_foreign_fields_stay() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let subnet = Key::Subnet(joined(&mut control).await).to_string();
    let record = format!("nodes/{}", node.id());
    let found = async |key: &str, what: &str| {
        eventually(what, async || etcd.dump().await.get(key).filter(|(value, _)| value.contains(what)).cloned()).await
    };
    let (value, lease) = found(&record, "51820").await;
    etcd.put_leased(&record, &value.replacen('{', r#"{"rack": "r7", "#, 1), lease).await;
    control.facts.send_modify(|facts| facts.endpoints = vec!["198.51.100.7:4500".parse().unwrap()]);
    let (value, _) = found(&record, "198.51.100.7:4500").await;
    assert!(value.contains("r7"), "{value}");
    etcd.put_leased(&subnet, "no lease at all", lease).await;
    let (value, kept) = found(&subnet, &node.id()).await;
    assert!(value.contains("PublicKey") && kept == lease, "{value}");
}

#[tokio::test]
async fn a_subnet_that_became_anothers_is_left_to_it() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start_attached(&etcd, true);
    let first = joined(&mut control).await;
    let key = Key::Subnet(first).to_string();
    etcd.put(&key, r#"{"PublicIP": "203.0.113.9", "Node": "other"}"#).await;
    state(&mut control, "lost", |state| matches!(state, MembershipState::SubnetLost { .. })).await;
    assert_eq!(control.status.borrow().subnet, None);
    control.attached.send_replace(false);
    let second = joined(&mut control).await;
    assert!(!second.overlaps(&first));
    assert!(etcd.dump().await[&key].0.contains("other"));
}

#[tokio::test]
async fn a_removed_node_stays_out_until_it_is_let_in_again() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let (a, b) = (Node::new("a"), Node::new("b"));
    let (mut control_a, mut control_b) = (a.start(&etcd), b.start(&etcd));
    joined(&mut control_a).await;
    joined(&mut control_b).await;
    let session = etcd.session().await;
    let removal = remove_node(&session, "a", Live::Refused, "2026-01-31T12:00:00Z").await.unwrap();
    assert_eq!((removal.id.as_str(), removal.subnets.len()), (a.id().as_str(), 1));
    assert_eq!(removal.public_keys, [a.facts.public_key]);
    state(&mut control_a, "removed", |state| *state == MembershipState::Removed).await;
    control_b.records.wait_for(|records| records.nodes.len() == 1 && records.removed.len() == 1).await.unwrap();
    assert!(remove_node(&session, "a", Live::Refused, "2026-01-31T12:00:00Z").await.unwrap().repeated);
    // With the same keys under a new id it stays out as well.
    control_a.stop().await;
    std::fs::remove_file(a.dir.path().join("node-id")).unwrap();
    let mut control_a = a.start(&etcd);
    state(&mut control_a, "removed", |state| *state == MembershipState::Removed).await;
    let keys = etcd.dump().await;
    assert_eq!(keys.keys().filter(|key| key.starts_with("nodes/") || key.starts_with("subnets/")).count(), 2);
    etcd.delete(&[&format!("removed/{}", removal.id)]).await;
    joined(&mut control_a).await;
}

#[tokio::test]
async fn the_copy_of_a_running_node_refuses_to_run() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let first = Node::new("a");
    let mut control = first.start(&etcd);
    let subnet = joined(&mut control).await;
    let copy = Node::new("a");
    std::fs::copy(first.dir.path().join("node-id"), copy.dir.path().join("node-id")).unwrap();
    let mut second = copy.start(&etcd);
    let yields = |state: &MembershipState| matches!(state, MembershipState::Cloned { .. });
    state(&mut second, "cloned", yields).await;
    assert_eq!(joined(&mut control).await, subnet);
}

#[tokio::test]
async fn a_reservation_is_taken_first_and_stays_one() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.244.77.0-24", r#"{"PublicIP": "192.0.2.1", "note": "rack 7"}"#).await;
    etcd.put("subnets/10.244.78.0-24", "{}").await;
    let (a, b) = (Node::new("a"), Node::new("b"));
    std::fs::create_dir_all(b.dir.path()).unwrap();
    std::fs::write(b.dir.path().join("node-id"), "node-b\n").unwrap();
    etcd.put("subnets/10.244.79.0-24", r#"{"Node": "node-b"}"#).await;
    let (mut control_a, mut control_b) = (a.start(&etcd), b.start(&etcd));
    assert_eq!(Key::Subnet(joined(&mut control_b).await).to_string(), "subnets/10.244.79.0-24");
    assert_eq!(Key::Subnet(joined(&mut control_a).await).to_string(), "subnets/10.244.77.0-24");
    let (value, lease) = eventually("filled in", async || {
        etcd.dump().await.get("subnets/10.244.77.0-24").filter(|(value, _)| value.contains("PublicKey")).cloned()
    })
    .await;
    assert!(lease.is_none() && value.contains(&a.id()) && value.contains("rack 7"), "{value}");
    assert_eq!(etcd.dump().await["subnets/10.244.78.0-24"].0, "{}");
}

#[tokio::test]
async fn flannels_leases_are_respected() {
    let etcd = Etcd::start().await;
    etcd.put("config", r#"{"Network": "10.244.0.0/22", "SubnetLen": 24, "LeaseTTL": 60}"#).await;
    let flannel = r#"{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:00:00:00:00:01"}}"#;
    let session = etcd.session().await;
    for key in ["subnets/10.244.1.0-24", "subnets/10.244.2.0-25&fc00:0:0:1::-64"] {
        let lease = session.grant(Duration::from_secs(86400)).await.unwrap().lease;
        etcd.put_leased(key, flannel, Some(lease)).await;
    }
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    assert_eq!(Key::Subnet(joined(&mut control).await).to_string(), "subnets/10.244.3.0-24");
    assert_eq!(etcd.dump().await["subnets/10.244.1.0-24"].0, flannel);
}

#[tokio::test]
async fn dual_stack_and_ipv6_only() {
    let etcd = Etcd::start().await;
    let v6 = r#""EnableIPv6": true, "IPv6Network": "fd42:244::/48", "LeaseTTL": 60"#;
    etcd.put("config", &format!(r#"{{"Network": "10.244.0.0/16", {v6}}}"#)).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let subnet = joined(&mut control).await;
    assert!(subnet.v4.is_some() && subnet.v6.is_some());
    control.stop().await;

    let etcd = Etcd::start().await;
    etcd.put("config", &format!(r#"{{"EnableIPv4": false, {v6}}}"#)).await;
    let node = Node::new("b");
    let mut control = node.start(&etcd);
    let subnet = joined(&mut control).await;
    assert!(subnet.v4.is_none() && subnet.v6.is_some());
}

#[tokio::test]
async fn when_all_records_are_deleted_at_once_no_node_loses_sight_of_another() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let nodes: Vec<_> = (0..3).map(|i| Node::new(&format!("n{i}"))).collect();
    let mut controls: Vec<_> = nodes.iter().map(|node| node.start(&etcd)).collect();
    let mut subnets = Vec::new();
    for control in &mut controls {
        subnets.push(joined(control).await);
    }
    for control in &mut controls {
        control.records.wait_for(|records| records.nodes.len() == 3 && records.subnets.len() == 3).await.unwrap();
    }
    // All records from now on are looked at.
    let mut views = controls[0].records.clone();
    let watching = tokio::spawn(async move {
        let mut fewest = 3;
        while views.changed().await.is_ok() {
            let records = views.borrow_and_update();
            fewest = fewest.min(records.nodes.len()).min(records.subnets.len());
        }
        fewest
    });
    let keys: Vec<_> = etcd.dump().await.into_keys().filter(|key| key != "config").collect();
    // With the configuration and without.
    for config in [None, Some("config")] {
        etcd.delete(&keys.iter().map(String::as_str).chain(config).collect::<Vec<_>>()).await;
        eventually("all back", async || {
            let dump = etcd.dump().await;
            keys.iter().all(|key| dump.contains_key(key)).then_some(())
        })
        .await;
    }
    assert!(controls[0].records.borrow().config.is_some() && !etcd.dump().await.contains_key("config"));
    let mut records = controls[0].records.clone();
    records.wait_for(|records| records.subnets.values().all(|record| record.retained.is_none())).await.unwrap();
    for (control, before) in controls.iter_mut().zip(subnets) {
        assert_eq!(joined(control).await, before);
    }
    drop(controls);
    assert_eq!(watching.await.unwrap(), 3);
}

#[tokio::test]
async fn a_second_family_comes_with_the_next_subnet() {
    let etcd = Etcd::start().await;
    etcd.put("config", CONFIG).await;
    let node = Node::new("a");
    let mut control = node.start(&etcd);
    let first = joined(&mut control).await;
    let dual = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42:244::/48", "LeaseTTL": 60}"#;
    etcd.put("config", dual).await;
    let outdated = |status: &ControlStatus| status.problems.iter().any(|p| p.code == ProblemCode::SubnetOutdated);
    control.status.wait_for(outdated).await.unwrap();
    assert_eq!(joined(&mut control).await, first);
    control.stop().await;
    etcd.delete(&[&Key::Subnet(first).to_string()]).await;
    let mut control = node.start(&etcd);
    let second = joined(&mut control).await;
    assert!(second.v4.is_some() && second.v6.is_some());
}
