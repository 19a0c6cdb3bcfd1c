//! Histories: drawn events, and an etcd that went back.

use super::*;

/// A backup is restored that is older than the last start of a node, and that many writes are missing from.
#[test]
fn a_node_that_started_since_the_backup_shows_life_in_a_restored_etcd() {
    for seed in 0..20 {
        let mut sim = Sim::new(seed, 2);
        sim.operator_puts("config", CONFIG);
        sim.start(0);
        sim.start(1);
        sim.run(Duration::from_secs(5));
        let backup = sim.etcd.clone();
        for _ in 0..50 {
            sim.operator_puts("config", CONFIG);
        }
        sim.crash(0);
        sim.start(0);
        sim.run(Duration::from_secs(10));
        sim.restore(&backup);
        sim.run(Duration::from_secs(15));
        for node in 0..2 {
            assert!(sim.shows_life(node), "seed {seed}: {node} is {:?}", state_of(&sim, node));
            assert!(joined(&sim, node), "seed {seed}: {node} is {:?}", state_of(&sim, node));
        }
    }
}

/// etcd loses the last writes that it answered, and comes back at the revision that the node has seen: it does not
/// count as another one.
#[test]
fn what_was_answered_and_is_lost_is_written_again() {
    let mut losses = 0;
    for seed in 0..4 {
        for millis in 0..500 {
            let mut sim = Sim::new(seed, 1);
            sim.operator_puts("config", CONFIG);
            sim.start(0);
            let mut states = BTreeMap::new();
            for _ in 0..millis {
                states.insert(sim.etcd.revision, sim.etcd.clone());
                sim.run(sim.elapsed() + Duration::from_millis(1));
            }
            let seen = sim.nodes[0].store.revision();
            let Some(state) = states.get(&seen).filter(|_| seen < sim.etcd.revision) else { continue };
            losses += 1;
            sim.go_back(state);
            sim.run(sim.elapsed() + Duration::from_secs(8));
            assert_eq!(sim.nodes[0].store.lineage_changes(), 0);
            assert!(sim.shows_life(0) && joined(&sim, 0), "seed {seed}, {millis} ms: {:?}", state_of(&sim, 0));
        }
    }
    assert!(losses > 0);
}

/// The transaction that takes a subnet, once it is under way; its key and lease.
fn take_under_way(sim: &Sim) -> Option<(Transaction, String, LeaseId)> {
    sim.queue.events().find_map(|event| {
        let What::Arrive { what: Call::Transact(transaction), .. } = event else { return None };
        transaction.writes.iter().find_map(|write| match write {
            Write::Put { key, lease: Some(lease), .. } if key.starts_with("subnets/") => {
                Some((transaction.clone(), key.clone(), *lease))
            }
            _ => None,
        })
    })
}

#[test]
fn in_an_etcd_that_went_back_unseen_no_subnet_is_overwritten() {
    let mut sim = Sim::new(5, 1);
    sim.operator_puts("config", CONFIG);
    let mut older = sim.etcd.clone();
    for _ in 0..5 {
        sim.operator_puts("peers/p", "{}");
    }
    sim.start(0);
    let (take, key, lease) = loop {
        sim.run(sim.elapsed() + Duration::from_millis(1));
        if let Some(found) = take_under_way(&sim) {
            break found;
        }
    };
    while !older.has_lease(lease) {
        older.grant(sim.now, ALIVE_TTL);
    }
    let theirs = Write::Put { key, value: r#"{"Node": "other"}"#.into(), lease: None };
    older.transact(&Transaction { compares: vec![], writes: vec![theirs] }).unwrap();
    let before = older.keys.clone();
    assert!(!older.transact(&take).unwrap().succeeded);
    assert_eq!(older.keys, before);
}

fn history(seed: u64) {
    let mut sim = Sim::new(seed, 5);
    let clusters = seed % 2 == 1;
    if clusters {
        sim.config = if seed % 4 == 1 { CLUSTERS } else { BY_KUBERNETES };
        sim.nodes[2].facts.cluster = "west".parse().unwrap();
        sim.nodes[4].facts.cluster = "west".parse().unwrap();
    }
    sim.operator_puts("config", sim.config);
    for (key, value) in [
        ("subnets/10.0.0.32-28", r#"{"PublicIP": "192.0.2.2"}"#),
        ("subnets/10.0.0.48-29&fd00:0:0:4::-63", "{}"),
        ("subnets/10.0.0.128-28&fd00:0:0:9::-64", r#"{"Node": "n3"}"#),
    ] {
        sim.reservations.insert(key.into());
        sim.operator_puts(key, value);
    }
    for node in 0..sim.nodes.len() {
        let delay = sim.millis(0..3000);
        sim.at(delay, What::Start { node });
    }
    sim.faults = true;
    while sim.elapsed() < Duration::from_secs(180) {
        let gap = sim.millis(10..8000);
        sim.run(sim.elapsed() + gap);
        sim.disturb();
    }
    // Now the faults stop, and what was given away is free again.
    let given: Vec<_> = sim
        .owners
        .iter()
        .filter(|(_, owner)| owner.as_ref().is_some_and(|owner| owner.as_str() == "other"))
        .map(|(key, _)| key.clone())
        .collect();
    for key in given {
        sim.operator_deletes(&key);
    }
    sim.faults = false;
    for node in 0..sim.nodes.len() {
        sim.nodes[node].reachable = true;
        sim.nodes[node].paused_until = sim.now;
        sim.nodes[node].attached = false;
        sim.step(node, Input::Attached(false));
        sim.at(Duration::ZERO, What::Start { node });
    }
    if sim.config == BY_KUBERNETES {
        sim.run(sim.elapsed() + Duration::from_secs(20));
        for node in [2, 4] {
            let drawn = sim.subnets_of(node).into_iter().find(|key| {
                let subnet: SubnetKey = key.strip_prefix("subnets/").unwrap().parse().unwrap();
                ![0, 1].map(|which| block(node, which)).contains(&subnet)
            });
            assert_eq!(drawn, None, "seed {seed}");
            sim.sync_reserves(node, 0);
            sim.step(node, Input::Idle(BTreeSet::from([0, 1].map(|which| block(node, which)))));
        }
    }
    sim.run(sim.elapsed() + Duration::from_secs(90));
    for node in 0..sim.nodes.len() {
        let n = &sim.nodes[node];
        let state = n.membership.as_ref().unwrap().state();
        let MembershipState::Joined { subnet } = state else {
            panic!("seed {seed}: {} is {state:?}", n.id);
        };
        let key = Key::Subnet(*subnet).to_string();
        let config = std::sync::Arc::clone(&n.store.records().config.as_ref().unwrap().value);
        assert_eq!(config.cluster_around(subnet), Some(&n.facts.cluster), "seed {seed}: {} has {key}", n.id);
        assert_eq!(sim.subnets_of(node), [key.as_str()], "seed {seed}: {} at {:?}", n.id, n.store.revision());
        let record = n.store.get(&Key::Node(n.id.clone()).to_string()).and_then(|kept| kept.get::<NodeRecord>());
        assert_eq!(record.unwrap().version, n.facts.version, "seed {seed}");
        assert!(sim.shows_life(node), "seed {seed}: {} counts as off", n.id);
    }
    for key in &sim.reservations {
        assert!(sim.etcd.keys[key].lease.is_none(), "seed {seed}: {key} has a lease");
    }
}

#[test]
fn no_history_gives_a_subnet_two_owners_and_all_come_to_rest() {
    for seed in 0..histories(300) {
        history(seed);
    }
}
