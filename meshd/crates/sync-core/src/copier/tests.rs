//! Terms of leadership against a model of etcd and of the API server, in virtual time.

mod confirm;
mod gate;
mod model;
mod order;
mod property;
mod restored;
mod standoff;

use std::time::Duration;

use control_core::types::CallError;

use self::model::{Api, Etcd, Term};
use super::*;

const MINUTE: u64 = 60;

/// `count` pods, in a cluster whose copy is complete.
fn copied(count: usize) -> (Api, Etcd) {
    let mut api = Api::new("uid-1");
    for pod in 0..count {
        api.put(ObjectKind::Pod, &format!("shop/p{pod}"), "1");
    }
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "first");
    term.list_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    (api, etcd)
}

fn is_held(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Notice(Notice::DeletionsHeld { .. })))
}

#[test]
fn a_new_term_copies_what_changed_and_writes_nothing_else() {
    let (mut api, mut etcd) = copied(30);
    etcd.expire_leader();
    let before = etcd.clone();
    let mut term = Term::begin(&mut etcd, "second");
    term.list_all(&api, &mut etcd);
    assert_eq!(etcd.written_since(&before), ["k8s/east/leader", "k8s/east/state"]);
    api.put(ObjectKind::Namespace, "shop", "2");
    api.put(ObjectKind::Pod, "shop/p3", "2");
    api.delete(ObjectKind::Pod, "shop/p4");
    term.deliver_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    term.advance(10, &mut etcd);
    let state = etcd.state();
    assert_eq!((state.counts["pods"], state.holder.as_str(), state.uid.as_str()), (29, "second", "uid-1"));
    let before = etcd.clone();
    // The resource version alone is no change.
    api.put(ObjectKind::Pod, "shop/p3", "2");
    term.deliver_all(&api, &mut etcd);
    assert_eq!(etcd.written_since(&before), Vec::<String>::new());
}

#[test]
fn a_leader_that_was_paused_in_mid_write_changes_nothing_any_more() {
    let (mut api, mut etcd) = copied(3);
    let mut old = Term::begin_beside(&mut etcd, "old");
    old.list_all(&api, &mut etcd);
    api.put(ObjectKind::Pod, "shop/p1", "old");
    // It is stopped with the transaction in hand.
    let late = old.deliver_without_writing(&api).pop().unwrap();
    etcd.expire_leader();
    let mut new = Term::begin(&mut etcd, "new");
    api.put(ObjectKind::Pod, "shop/p1", "new");
    api.delete(ObjectKind::Pod, "shop/p2");
    new.list_all(&api, &mut etcd);
    let now = etcd.objects();
    assert_eq!(now, api.canonical());
    let effects = old.answer(etcd.commit(&late));
    assert!(matches!(effects[..], [Effect::Resign(Resigned::Fenced)]), "{effects:?}");
    assert_eq!(etcd.objects(), now);
    assert!(old.step(Input::Tick).is_empty(), "an ended term does nothing");
}

#[test]
fn a_lost_answer_ends_the_term_and_what_comes_late_is_fenced() {
    let (mut api, mut etcd) = copied(3);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    api.put(ObjectKind::Pod, "shop/new", "1");
    let lost = term.deliver_without_writing(&api).pop().unwrap();
    let effects = term.answer(Err(CallError::Indeterminate("gone".into())));
    assert!(matches!(effects[..], [Effect::Resign(Resigned::Doubt(_))]));
    etcd.expire_leader();
    let mut term = Term::begin(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    api.delete(ObjectKind::Pod, "shop/new");
    term.deliver_all(&api, &mut etcd);
    assert!(!etcd.commit(&lost).unwrap().succeeded, "it would bring a deleted object back");
    assert_eq!(etcd.objects(), api.canonical());
}

#[test]
fn a_list_that_lacks_many_is_taken_again_and_waits() {
    let (mut api, mut etcd) = copied(30);
    let mut term = Term::begin_beside(&mut etcd, "a");
    for pod in 0..20 {
        api.delete(ObjectKind::Pod, &format!("shop/p{pod}"));
    }
    let before = etcd.objects();
    let first = term.list(ObjectKind::Pod, &api, &mut etcd);
    assert!(first.iter().any(|effect| matches!(effect, Effect::List { kind: ObjectKind::Pod, after: Duration::ZERO })));
    assert!(!is_held(&first));
    let second = term.list(ObjectKind::Pod, &api, &mut etcd);
    assert!(is_held(&second));
    assert_eq!(etcd.objects(), before);
    // What comes back is not deleted, what the watch deletes is.
    api.put(ObjectKind::Pod, "shop/p0", "1");
    api.delete(ObjectKind::Pod, "shop/p25");
    term.deliver_all(&api, &mut etcd);
    term.advance(MINUTE - 2, &mut etcd);
    assert_eq!(etcd.objects().len(), before.len() - 1);
    let held = &etcd.state().held;
    assert!(held.len() == 1 && held[0].until.is_some() && held[0].reason.starts_with("19 of 30 pods"), "{held:?}");
    term.bookmark_all(&api, &mut etcd);
    term.advance(2, &mut etcd);
    assert_eq!(etcd.objects().len(), before.len() - 1, "what was heard before the end of the wait is no evidence");
    term.bookmark_all(&api, &mut etcd);
    assert_eq!(etcd.objects().len(), before.len() - 1);
    term.advance(1, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    term.advance(1, &mut etcd);
    assert!(etcd.state().held.is_empty());
}

#[test]
fn the_wait_is_not_over_while_the_api_server_is_away() {
    let (mut api, mut etcd) = copied(30);
    let mut term = Term::begin_beside(&mut etcd, "a");
    let all = api.clone();
    for pod in 0..30 {
        api.delete(ObjectKind::Pod, &format!("shop/p{pod}"));
    }
    for _ in 0..2 {
        term.list(ObjectKind::Pod, &api, &mut etcd);
    }
    term.write(Input::Interrupted { kind: ObjectKind::Pod }, &mut etcd);
    term.advance(5 * MINUTE, &mut etcd);
    assert_eq!(etcd.objects().len(), 32);
    // A watch that was only opened is no evidence that they are gone.
    term.write(Input::Watching { kind: ObjectKind::Pod, uid: api.uid() }, &mut etcd);
    term.advance(1, &mut etcd);
    assert_eq!(etcd.objects().len(), 32);
    // They were there all the time.
    let mut back = all;
    back.version = api.version + 1;
    term.list_all(&back, &mut etcd);
    term.advance(5 * MINUTE, &mut etcd);
    assert_eq!(etcd.objects(), back.canonical());
}

#[test]
fn an_operator_shortens_the_wait_by_the_token_of_this_finding_only() {
    let (mut api, mut etcd) = copied(30);
    let mut term = Term::begin_beside(&mut etcd, "a");
    for pod in 0..30 {
        api.delete(ObjectKind::Pod, &format!("shop/p{pod}"));
    }
    for _ in 0..2 {
        term.list(ObjectKind::Pod, &api, &mut etcd);
    }
    let asks = term.write(Input::Tick, &mut etcd);
    assert!(asks.iter().any(|effect| matches!(effect, Effect::ReadConfirm)));
    let token = etcd.state().held[0].token.clone();
    let effects = term.confirm("delete-pods-1", &mut etcd);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Notice(Notice::UnknownToken { .. }))));
    assert!(etcd.get("k8s/east/confirm").is_none() && etcd.objects().len() == 32);
    term.confirm(&(token + "\n"), &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
}

#[test]
fn few_or_a_small_part_go_at_once() {
    for (all, gone) in [(12, 9), (40, 13)] {
        let (mut api, mut etcd) = copied(all);
        let mut term = Term::begin_beside(&mut etcd, "a");
        for pod in 0..gone {
            api.delete(ObjectKind::Pod, &format!("shop/p{pod}"));
        }
        term.list(ObjectKind::Pod, &api, &mut etcd);
        assert_eq!(etcd.objects(), api.canonical());
    }
}

#[test]
fn a_list_that_is_not_complete_deletes_nothing() {
    let (mut api, mut etcd) = copied(5);
    let before = etcd.objects();
    api.delete(ObjectKind::Pod, "shop/p0");
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.write(Input::ListBegun { kind: ObjectKind::Pod, uid: api.uid() }, &mut etcd);
    term.write(api.page(ObjectKind::Pod, &[]), &mut etcd);
    term.write(Input::Interrupted { kind: ObjectKind::Pod }, &mut etcd);
    term.write(Input::ListEnded { kind: ObjectKind::Pod, uid: api.uid() }, &mut etcd);
    // Nor does an event without a list before it.
    let gone = api.object(ObjectKind::Pod, "shop/p1");
    term.write(Input::Deleted(gone), &mut etcd);
    assert_eq!(etcd.objects(), before);
}

#[test]
fn an_older_list_is_refused_until_an_operator_adopts_it() {
    let (mut api, mut etcd) = copied(30);
    let backup = api.clone();
    api.put(ObjectKind::Pod, "shop/late", "1");
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    etcd.expire_leader();
    let before = etcd.objects();
    let mut term = Term::begin(&mut etcd, "b");
    let effects = term.list(ObjectKind::Pod, &backup, &mut etcd);
    let token = effects.iter().find_map(|effect| match effect {
        Effect::Notice(Notice::Refused { token, .. }) => token.clone(),
        _ => None,
    });
    assert!(effects.iter().any(|effect| matches!(effect, Effect::List { kind: ObjectKind::Pod, after: RETRY })));
    term.advance(MINUTE, &mut etcd);
    assert_eq!(etcd.objects(), before);
    assert_eq!(Some(&etcd.state().held[0].token), token.as_ref());
    let effects = term.confirm(&token.unwrap(), &mut etcd);
    assert!(matches!(effects.last(), Some(Effect::Resign(Resigned::Confirmed))), "{effects:?}");
    etcd.expire_leader();
    let mut term = Term::begin(&mut etcd, "b");
    term.list_all(&backup, &mut etcd);
    assert_eq!(etcd.objects(), backup.canonical());
}

#[test]
fn another_cluster_of_the_same_name_stops_the_copy() {
    let (api, mut etcd) = copied(30);
    let before = etcd.objects();
    let mut other = Api::new("uid-2");
    other.version = api.version + 1000;
    other.put(ObjectKind::Pod, "shop/other", "1");
    let mut term = Term::begin_beside(&mut etcd, "a");
    for kind in ObjectKind::ALL {
        let effects = term.list(kind, &other, &mut etcd);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::List { after: RETRY, .. })));
    }
    term.advance(20, &mut etcd);
    assert_eq!(etcd.objects(), before);
    let held = etcd.state().held;
    assert!(held.len() == 1 && held[0].reason.contains("uid-2"), "{held:?}");
    // Before its first namespace is there, it is not even another one.
    let mut empty = Term::begin_beside(&mut etcd, "b");
    empty.write(Input::ListBegun { kind: ObjectKind::Pod, uid: None }, &mut etcd);
    empty.write(api.page(ObjectKind::Pod, &[]), &mut etcd);
    empty.write(Input::ListEnded { kind: ObjectKind::Pod, uid: None }, &mut etcd);
    assert_eq!(etcd.objects(), before);
    // Adopted, its deletions are doubted like any others.
    let mut term = Term::begin_beside(&mut etcd, "c");
    term.list(ObjectKind::Pod, &other, &mut etcd);
    term.confirm(&held[0].token, &mut etcd);
    let mut term = Term::begin_beside(&mut etcd, "d");
    term.list_all(&other, &mut etcd);
    assert!(etcd.objects().len() > 30);
    term.list_all(&other, &mut etcd);
    term.advance(MINUTE, &mut etcd);
    term.bookmark_all(&other, &mut etcd);
    term.advance(1, &mut etcd);
    assert_eq!((etcd.objects(), etcd.state().uid.as_str()), (other.canonical(), "uid-2"));
}

#[test]
fn a_list_during_which_the_cluster_becomes_another_counts_for_nothing() {
    let (api, mut etcd) = copied(5);
    let before = etcd.objects();
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.write(Input::ListBegun { kind: ObjectKind::Pod, uid: api.uid() }, &mut etcd);
    term.write(api.page(ObjectKind::Pod, &[]), &mut etcd);
    term.write(Input::ListEnded { kind: ObjectKind::Pod, uid: Some("uid-2".into()) }, &mut etcd);
    assert_eq!(etcd.objects(), before);
    // Nor does what is heard while it is another one.
    term.list_all(&api, &mut etcd);
    term.write(Input::Answers { uid: Some("uid-2".into()) }, &mut etcd);
    term.write(Input::Deleted(api.object(ObjectKind::Pod, "shop/p1")), &mut etcd);
    assert_eq!(etcd.objects(), before);
    // It was another server that answered; the next list is of the right one.
    term.list_all(&api, &mut etcd);
    term.advance(1, &mut etcd);
    assert!(etcd.state().held.is_empty());
}

#[test]
fn a_transaction_is_small_and_begins_with_what_selects() {
    let mut api = Api::new("uid-1");
    for pod in 0..250 {
        api.put(ObjectKind::Pod, &format!("shop/p{pod}"), "1");
    }
    api.put(ObjectKind::NetworkPolicy, "shop/web", "1");
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    let biggest = etcd.operations.iter().max().copied().unwrap();
    assert!((100..=128).contains(&biggest), "{biggest}");
    // Several values of a megabyte go one by one.
    for policy in 0..3 {
        api.put(ObjectKind::NetworkPolicy, &format!("shop/long{policy}"), &"x".repeat(900 << 10));
    }
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    assert!(etcd.longest < 1_400_000, "{}", etcd.longest);
    assert_eq!(etcd.objects(), api.canonical());
}

#[test]
fn the_state_says_how_old_the_copy_is() {
    let (mut api, mut etcd) = copied(2);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    term.advance(20, &mut etcd);
    let fresh = etcd.state();
    assert!(fresh.written_at - fresh.current_at <= 1, "{fresh:?}");
    term.write(Input::Interrupted { kind: ObjectKind::NetworkPolicy }, &mut etcd);
    term.advance(100, &mut etcd);
    let old = etcd.state();
    assert!((90..=100).contains(&(old.written_at - old.current_at)), "{old:?}");
    api.put(ObjectKind::NetworkPolicy, "shop/web", "1");
    term.list(ObjectKind::NetworkPolicy, &api, &mut etcd);
    // A server that stands still ends no connection.
    term.write(Input::Silent, &mut etcd);
    term.advance(11, &mut etcd);
    let stalled = etcd.state();
    assert!(stalled.current_at < stalled.written_at, "{stalled:?}");
    term.write(Input::Answers { uid: api.uid() }, &mut etcd);
    term.advance(11, &mut etcd);
    let fresh = etcd.state();
    assert!(fresh.written_at == fresh.current_at && fresh.resource_versions["networkpolicies"] == api.version);
}

#[test]
fn a_state_that_cannot_be_read_stops_the_copy_until_it_is_deleted() {
    let (mut api, mut etcd) = copied(2);
    etcd.put("k8s/east/state", "?");
    api.put(ObjectKind::Pod, "shop/new", "1");
    let before = etcd.objects();
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    let effects = term.write(Input::Tick, &mut etcd);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Notice(Notice::UnreadableState))));
    assert_eq!(etcd.objects(), before);
    term.confirm("state", &mut etcd);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
}

#[test]
fn a_trial_says_what_would_change_and_writes_nothing() {
    let (mut api, mut etcd) = copied(12);
    api.put(ObjectKind::Pod, "shop/p0", "2");
    api.put(ObjectKind::Pod, "shop/new", "1");
    for pod in 1..12 {
        api.delete(ObjectKind::Pod, &format!("shop/p{pod}"));
    }
    let before = etcd.clone();
    let mut term = Term::trial(&etcd);
    for _ in 0..2 {
        term.list_all(&api, &mut etcd);
    }
    assert_eq!(etcd.written_since(&before), Vec::<String>::new());
    assert!(term.will_hold(ObjectKind::Pod, "shop/new") && term.will_hold(ObjectKind::Pod, "shop/p0"));
    assert!(!term.will_hold(ObjectKind::Pod, "shop/other"));
    let mut planned: Vec<_> = term.planned();
    planned.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(planned[0], ("k8s/east/pods/shop/new".to_owned(), Planned::Create));
    assert_eq!(planned[1], ("k8s/east/pods/shop/p0".to_owned(), Planned::Change));
    assert_eq!(planned.iter().filter(|(_, planned)| *planned == Planned::Delete).count(), 11);
}

#[test]
fn a_trial_of_another_cluster_says_that_nothing_would_be_copied() {
    let (api, mut etcd) = copied(2);
    let mut term = Term::trial(&etcd);
    term.list_all(&api, &mut etcd);
    assert_eq!(term.refusal(), None);
    let mut other = Api::new("uid-2");
    other.version = api.version + 1;
    term.list(ObjectKind::Pod, &other, &mut etcd);
    assert!(term.refusal().is_some_and(|refusal| refusal.contains("uid-2")));
    etcd.put("k8s/east/state", "?");
    assert!(Term::trial(&etcd).refusal().is_some());
}

#[test]
fn what_another_writer_changed_ends_the_term_before_anything_is_written_over_it() {
    // A key that is to be deleted was written since it was listed.
    let (mut api, mut etcd) = copied(3);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    etcd.put("k8s/east/pods/shop/p0", "another's");
    api.delete(ObjectKind::Pod, "shop/p0");
    let delete = term.deliver_without_writing(&api).pop().unwrap();
    assert!(matches!(term.answer(etcd.commit(&delete))[..], [Effect::Resign(Resigned::Fenced)]));
    assert!(etcd.get("k8s/east/pods/shop/p0").is_some());
    // The state is that of another cluster by now.
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    etcd.delete("k8s/east/state");
    etcd.put("k8s/east/state", r#"{"uid": "uid-2"}"#);
    api.put(ObjectKind::Pod, "shop/p1", "2");
    let put = term.deliver_without_writing(&api).pop().unwrap();
    assert!(matches!(term.answer(etcd.commit(&put))[..], [Effect::Resign(Resigned::Fenced)]));
}
