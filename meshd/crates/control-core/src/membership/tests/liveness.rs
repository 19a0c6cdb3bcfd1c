//! The liveness record, and foreign writes to it.

use super::*;

#[test]
fn readiness_is_published_as_it_changes() {
    let mut sim = restarted();
    for readiness in [
        Some(Readiness::Ready),
        Some(Readiness::NotReady { reason: "policy: late".to_owned() }),
        Some(Readiness::Ready),
    ] {
        sim.nodes[0].facts.readiness.clone_from(&readiness);
        let facts = sim.nodes[0].facts.clone();
        sim.step(0, Input::Facts(Box::new(facts)));
        sim.run(sim.elapsed() + Duration::from_secs(1));
        let alive = etcd_schema::Alive::parse(&sim.etcd.keys[ALIVE].value).unwrap();
        assert_eq!((alive.readiness, &alive.reads[..]), (readiness, &["k8s".to_owned()][..]));
        assert!(joined(&sim, 0) && is_own(&sim) && !has_problem(&sim, 0, ProblemCode::AliveOverwritten));
    }
    // Once: what is there already is not written again.
    let written = sim.etcd.keys[ALIVE].mod_revision;
    sim.run(sim.elapsed() + Duration::from_secs(100));
    assert_eq!(sim.etcd.keys[ALIVE].mod_revision, written);
}

/// What a process wrote just before its end may arrive when the next one has listed already.
#[test]
fn a_late_write_of_the_process_before_is_no_clone() {
    let start = Instant::now();
    for (found, is_clone) in [(7, false), (8, true)] {
        let identity = Identity {
            id: "n0".parse().unwrap(),
            boot_id: "b".into(),
            start_count: 2,
            incarnation: 1,
            predecessor: Some(7),
        };
        let mut membership = Membership::new(start, identity, facts(0), None, false, 1);
        let mut store = Store::default();
        let listing =
            KeyListing { entries: vec![entry(ALIVE, &foreign(1, found))], revision: 7, ..KeyListing::default() };
        store.on_list(start, listing);
        membership.step(start, Input::Connected, &store);
        let late = Entry { mod_revision: 8, ..entry(ALIVE, &foreign(1, found)) };
        store.changed(start, vec![WatchEvent::Put(late)]);
        membership.step(start, Input::Store, &store);
        assert_eq!(matches!(membership.state(), MembershipState::Cloned { .. }), is_clone, "{found}");
    }
}

#[test]
fn one_foreign_write_soon_after_a_restart_is_put_back_and_reported() {
    for value in [foreign(1, 7), foreign(9, 7), "nonsense".to_owned(), String::new()] {
        let mut sim = restarted();
        sim.operator_puts(ALIVE, &value);
        sim.run(sim.elapsed() + Duration::from_secs(5));
        assert!(joined(&sim, 0) && is_own(&sim), "{value}: {:?}", state_of(&sim, 0));
        assert!(has_problem(&sim, 0, ProblemCode::AliveOverwritten), "{value}");
        sim.run(sim.elapsed() + ALIVE_TTL);
        assert!(!has_problem(&sim, 0, ProblemCode::AliveOverwritten), "{value}: over after a while");
    }
}

#[test]
fn a_deleted_record_and_a_copy_of_it_without_lease_are_put_back() {
    let mut sim = restarted();
    sim.operator_deletes(ALIVE);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim));
    let value = String::from_utf8(sim.etcd.keys[ALIVE].value.to_vec()).unwrap();
    sim.operator_puts(ALIVE, &value);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim), "it has its lease again");
}

#[test]
fn foreign_writes_of_different_incarnations_prove_no_clone() {
    let mut sim = restarted();
    for incarnation in 0..20 {
        sim.operator_puts(ALIVE, &foreign(1, incarnation));
        sim.run(sim.elapsed() + Duration::from_secs(2));
        assert!(joined(&sim, 0), "{incarnation}: {:?}", state_of(&sim, 0));
    }
    sim.run(sim.elapsed() + Duration::from_secs(10));
    assert!(is_own(&sim));
}

#[test]
fn a_second_write_of_one_incarnation_decides_by_the_records_and_is_forgotten_after_a_while() {
    for (start, gap, yields) in [(1, 10, true), (9, 10, false), (1, 40, false)] {
        let mut sim = restarted();
        for _ in 0..2 {
            sim.operator_puts(ALIVE, &foreign(start, 7));
            sim.run(sim.elapsed() + Duration::from_secs(gap));
        }
        assert_eq!(cloned(&sim, 0), yields, "start {start}, {gap} s: {:?}", state_of(&sim, 0));
        assert_eq!(joined(&sim, 0), !yields, "start {start}, {gap} s: {:?}", state_of(&sim, 0));
        // No daemon is behind it: a daemon's record has a lease.
        sim.run(sim.elapsed() + ALIVE_TTL * 2);
        assert!(joined(&sim, 0) && is_own(&sim), "start {start}, {gap} s: {:?}", state_of(&sim, 0));
    }
}

#[test]
fn a_clone_waits_without_a_call_until_the_record_is_deleted() {
    let mut sim = restarted();
    for _ in 0..2 {
        sim.operator_puts(ALIVE, &foreign(1, 7));
        sim.run(sim.elapsed() + Duration::from_secs(5));
    }
    assert!(cloned(&sim, 0));
    sim.operator_deletes(ALIVE);
    sim.run(sim.elapsed() + Duration::from_secs(5));
    assert!(joined(&sim, 0) && is_own(&sim), "{:?}", state_of(&sim, 0));
}

/// The shell asks for the deadline some time after a step.
#[test]
fn what_falls_due_after_a_step_stays_due_until_the_next_one() {
    let mut sim = restarted();
    let Node { membership: Some(membership), store, .. } = &mut sim.nodes[0] else { panic!("it runs") };
    let due = membership.next_deadline().unwrap();
    assert_eq!(membership.step(due - Duration::from_millis(1), Input::Store, store), []);
    assert_eq!(membership.next_deadline(), Some(due));
    let effects = membership.step(due, Input::Tick, store);
    assert!(matches!(effects[..], [Effect::Call(_, Call::KeepAlive { .. })]), "{effects:?}");
    assert!(membership.next_deadline() > Some(due));
}

/// A node and two copies of it that crash, restart and lose their connection, while etcd is replaced now and then: once
/// all is quiet, one of them goes on.
#[test]
fn of_clones_exactly_one_goes_on_whatever_happened() {
    for seed in 0..histories(200) {
        let mut sim = Sim::new(seed, 3);
        sim.operator_puts("config", CONFIG);
        for node in 1..3 {
            sim.nodes[node].id = sim.nodes[0].id.clone();
            sim.nodes[node].facts = sim.nodes[0].facts.clone();
        }
        for node in 0..3 {
            let delay = sim.millis(0..40_000);
            sim.at(delay, What::Start { node });
        }
        sim.faults = true;
        for _ in 0..20 {
            let gap = sim.millis(10..15_000);
            sim.run(sim.elapsed() + gap);
            let node = sim.rng.random_range(0..3);
            match sim.rng.random_range(0..7) {
                0 | 1 => {
                    sim.crash(node);
                    let away = sim.millis(1..50_000);
                    sim.at(away, What::Start { node });
                }
                2 => {
                    sim.restore(&EtcdModel::new());
                    sim.operator_puts("config", CONFIG);
                }
                3 | 4 => {
                    sim.nodes[node].reachable = !sim.nodes[node].reachable;
                    sim.disconnect(node);
                }
                _ => sim.operator_puts(ALIVE, &foreign(seed % 4, seed)),
            }
        }
        sim.faults = false;
        for node in 0..3 {
            sim.nodes[node].reachable = true;
            sim.at(Duration::ZERO, What::Start { node });
        }
        sim.run(sim.elapsed() + Duration::from_secs(200));
        let states: Vec<_> = (0..3).map(|node| state_of(&sim, node)).collect();
        let going_on = (0..3).filter(|node| joined(&sim, *node)).count();
        let waiting = (0..3).filter(|node| cloned(&sim, *node)).count();
        assert_eq!((going_on, waiting), (1, 2), "seed {seed}: {states:?}");
    }
}
