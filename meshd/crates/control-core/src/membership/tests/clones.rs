//! Daemons with one identity.

use super::*;

#[test]
fn a_copy_of_a_node_yields_and_changes_nothing() {
    let mut sim = with_copy(Duration::from_secs(100));
    let before = sim.etcd.keys["nodes/n0"].clone();
    sim.run(Duration::from_secs(300));
    assert!(cloned(&sim, 1) && has_problem(&sim, 1, ProblemCode::Cloned), "{:?}", state_of(&sim, 1));
    assert!(joined(&sim, 0), "{:?}", state_of(&sim, 0));
    assert_eq!(sim.etcd.keys["nodes/n0"], before);
    assert!(!sim.nodes[1].acted, "it never acts as the node");
}

/// What a process may do before it has written anything: with what it finds under `alive/ID`, and the process that ran
/// here before it.
#[test]
fn a_restart_acts_as_the_node_at_once_and_a_possible_copy_waits_for_etcd() {
    let start = Instant::now();
    let listing = |found: Option<u64>| KeyListing {
        entries: found.into_iter().map(|incarnation| entry(ALIVE, &foreign(1, incarnation))).collect(),
        revision: 7,
        ..KeyListing::default()
    };
    for (predecessor, found, at_once) in [
        (Some(7), Some(7), true),
        (Some(7), None, true),
        (Some(7), Some(8), false),
        (None, Some(7), false),
        (None, None, false),
    ] {
        let identity =
            Identity { id: "n0".parse().unwrap(), boot_id: "b".into(), start_count: 2, incarnation: 1, predecessor };
        for reads_etcd in [true, false] {
            let mut membership = Membership::new(start, identity.clone(), facts(0), None, false, 1);
            let mut store = Store::default();
            let mut input = Input::Tick;
            if reads_etcd {
                store.on_list(start, listing(found));
                input = Input::Connected;
            }
            membership.step(start, input, &store);
            let case = (predecessor, found, reads_etcd);
            assert_eq!(membership.holds_identity(), at_once && reads_etcd, "{case:?}");
            assert!(!membership.may_write(start), "{case:?}");
            // Without a word from etcd it goes on all the same: sooner where only a restart is likely, and etcd names
            // no other.
            let names_another = reads_etcd && found.is_some_and(|found| Some(found) != predecessor);
            let limit = if predecessor.is_some() && !names_another { RESUMED } else { UNCONFIRMED };
            if !membership.holds_identity() {
                assert!(reads_etcd || membership.next_deadline() == Some(start + limit), "{case:?}");
                membership.step(start + limit - Duration::from_millis(1), Input::Tick, &store);
                assert!(!membership.holds_identity(), "{case:?}");
                membership.step(start + limit, Input::Tick, &store);
                assert!(membership.holds_identity(), "{case:?}");
            }
        }
    }
}

#[test]
fn of_two_copies_that_start_together_one_stays() {
    for millis in [0, 1, 5, 50, 200, 999, 1001] {
        let mut sim = with_copy(Duration::from_millis(millis));
        sim.run(Duration::from_secs(300));
        let yielded = [0, 1].map(|node| cloned(&sim, node));
        assert_ne!(yielded[0], yielded[1], "{millis}: {:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
        let stays = usize::from(yielded[0]);
        assert!(joined(&sim, stays), "{millis}: {:?}", state_of(&sim, stays));
    }
}

#[test]
fn a_copy_resumes_once_the_other_is_gone_and_not_while_that_restarts() {
    let mut sim = with_copy(Duration::from_secs(100));
    sim.run(Duration::from_secs(150));
    // An upgrade of the original is over long before its record expires.
    sim.crash(0);
    sim.run(Duration::from_secs(160));
    sim.start(0);
    sim.run(Duration::from_secs(300));
    assert!(joined(&sim, 0) && cloned(&sim, 1), "{:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
    sim.crash(0);
    sim.run(Duration::from_secs(340));
    assert!(joined(&sim, 1), "{:?}", state_of(&sim, 1));
    // The one that comes back started later now.
    sim.start(0);
    sim.run(Duration::from_secs(400));
    assert!(cloned(&sim, 0) && joined(&sim, 1), "{:?} {:?}", state_of(&sim, 0), state_of(&sim, 1));
}

#[test]
fn a_copy_that_took_the_place_of_a_node_that_was_away_yields_when_that_comes_back() {
    let mut sim = with_copy(Duration::from_secs(100));
    // Before the copy is heard of, the first is cut off for long.
    sim.nodes[0].reachable = false;
    sim.disconnect(0);
    sim.run(Duration::from_secs(200));
    assert!(joined(&sim, 1), "{:?}", state_of(&sim, 1));
    sim.nodes[0].reachable = true;
    sim.run(Duration::from_secs(300));
    assert!(joined(&sim, 0), "{:?}", state_of(&sim, 0));
    assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
}

#[test]
fn in_an_etcd_that_was_replaced_a_copy_leaves_the_first_word_to_the_original() {
    for original_comes in [true, false] {
        let mut sim = with_copy(Duration::from_secs(100));
        sim.run(Duration::from_secs(200));
        assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
        // The copy reaches the new one first.
        sim.nodes[0].reachable = false;
        sim.restore(&EtcdModel::new());
        sim.operator_puts("config", CONFIG);
        sim.run(sim.elapsed() + ALIVE_TTL - Duration::from_secs(5));
        assert!(cloned(&sim, 1), "{:?}", state_of(&sim, 1));
        sim.nodes[0].reachable = original_comes;
        sim.run(sim.elapsed() + Duration::from_secs(20));
        assert_eq!([joined(&sim, 0), cloned(&sim, 1)], [true, original_comes], "{:?}", state_of(&sim, 1));
        let alive = etcd_schema::Alive::parse(&sim.etcd.keys[ALIVE].value).unwrap();
        assert_eq!(alive.incarnation, sim.nodes[usize::from(!original_comes)].incarnation);
    }
}

/// Not by what it was before it yielded, and however long it has heard nothing.
#[test]
fn a_clone_acts_as_the_node_again_once_its_own_record_stands() {
    let mut sim = restarted();
    for _ in 0..2 {
        sim.operator_puts(ALIVE, &foreign(1, 7));
        sim.run(sim.elapsed() + UNCONFIRMED * 2);
    }
    assert!(cloned(&sim, 0));
    sim.operator_deletes(ALIVE);
    let holds = |sim: &Sim| sim.nodes[0].membership.as_ref().unwrap().holds_identity();
    while !sim.etcd.keys.contains_key(ALIVE) {
        assert!(!holds(&sim), "{:?}", state_of(&sim, 0));
        sim.run(sim.elapsed() + Duration::from_millis(1));
    }
    sim.run(sim.elapsed() + Duration::from_millis(100));
    assert!(holds(&sim) && is_own(&sim));
}

/// The record of the original may go while its process runs: by an operator's hand, or because that has lost etcd.
#[test]
fn a_clone_that_loses_etcd_before_its_own_record_stands_does_not_act() {
    let (mut stood, mut closed) = (0, 0);
    for seed in 0..histories(200) {
        let mut sim = with_copy_of(seed, Duration::from_secs(100));
        sim.run(Duration::from_secs(150));
        assert!(cloned(&sim, 1), "seed {seed}: {:?}", state_of(&sim, 1));
        let holds = |sim: &Sim| sim.nodes[1].membership.as_ref().unwrap().holds_identity();
        sim.nodes[0].reachable = false;
        sim.disconnect(0);
        sim.operator_deletes(ALIVE);
        let until = sim.millis(0..1_000);
        sim.run(sim.elapsed() + until);
        sim.nodes[1].reachable = false;
        sim.disconnect(1);
        sim.run(sim.elapsed() + UNCONFIRMED * 5);
        let is_there = sim.etcd.keys.contains_key(ALIVE);
        assert!(is_there || !holds(&sim), "seed {seed}: {:?}", state_of(&sim, 1));
        stood += usize::from(is_there);
        closed += usize::from(!is_there && !cloned(&sim, 1));
        sim.nodes[1].reachable = true;
        sim.run(sim.elapsed() + ALIVE_TTL * 2);
        assert!(holds(&sim) && joined(&sim, 1), "seed {seed}: {:?}", state_of(&sim, 1));
    }
    assert!(stood > 0 && closed > 0, "{stood} {closed}");
}
