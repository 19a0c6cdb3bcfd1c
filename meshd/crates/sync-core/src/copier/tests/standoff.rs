//! A leader that cannot copy makes room for one that can.

use super::{model::Term, *};

fn resigned(effects: &[Effect]) -> Option<&Resigned> {
    effects.iter().find_map(|effect| match effect {
        Effect::Resign(reason) => Some(reason),
        _ => None,
    })
}

#[test]
fn a_leader_of_the_wrong_cluster_or_of_none_resigns() {
    let (api, mut etcd) = copied(3);
    for uid in [Some("uid-2".to_owned()), None] {
        let mut term = Term::begin_beside(&mut etcd, "wrong");
        term.write(Input::ListBegun { kind: ObjectKind::Pod, uid }, &mut etcd);
        assert_eq!(resigned(&term.advance(29, &mut etcd)), None);
        assert_eq!(resigned(&term.advance(3, &mut etcd)), Some(&Resigned::Refused));
    }
    // The finding stays where an operator reads it.
    assert_eq!(etcd.state().held.len(), 1);
    let mut term = Term::begin_beside(&mut etcd, "right");
    term.list_all(&api, &mut etcd);
    assert_eq!(resigned(&term.advance(MINUTE, &mut etcd)), None);
}

#[test]
fn a_leader_whose_api_server_is_silent_for_long_resigns() {
    let (api, mut etcd) = copied(3);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    term.write(Input::Silent, &mut etcd);
    assert_eq!(resigned(&term.advance(20, &mut etcd)), None);
    term.write(Input::Answers { uid: api.uid() }, &mut etcd);
    assert_eq!(resigned(&term.advance(20, &mut etcd)), None);
    term.write(Input::Silent, &mut etcd);
    assert_eq!(resigned(&term.advance(29, &mut etcd)), None);
    term.write(Input::Silent, &mut etcd);
    assert_eq!(resigned(&term.advance(3, &mut etcd)), Some(&Resigned::Silent));
}

#[test]
fn a_restored_cluster_is_no_reason_to_resign() {
    // Each replica would find the same.
    let (mut api, mut etcd) = copied(3);
    let backup = api.clone();
    api.put(ObjectKind::Pod, "shop/late", "1");
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list(ObjectKind::Pod, &backup, &mut etcd);
    assert_eq!(resigned(&term.advance(5 * MINUTE, &mut etcd)), None);
}

#[test]
fn a_standoff_doubles_until_a_term_was_of_use() {
    let mut standoff = Standoff::default();
    let seconds: Vec<_> = (0..6).map(|_| standoff.next_period().as_secs()).collect();
    assert_eq!(seconds, [30, 60, 120, 240, 300, 300]);
    standoff.reset();
    assert_eq!(standoff.next_period().as_secs(), 30);
}
