//! An operator's confirmation is for the finding that was read, at the time it was.

use super::{model::Term, *};

const CONFIRM: &str = "k8s/east/confirm";

#[test]
fn an_old_confirmation_adopts_no_cluster() {
    let (api, mut etcd) = copied(3);
    // Left by someone while nothing waited.
    etcd.put(CONFIRM, "cluster-uid-2");
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    assert!(etcd.get(CONFIRM).is_none(), "deleted at the term's begin");
    // Or in the middle of the term.
    etcd.put(CONFIRM, "cluster-uid-2");
    term.write(Input::Answers { uid: Some("uid-2".into()) }, &mut etcd);
    term.advance(2, &mut etcd);
    assert_eq!(etcd.state().held[0].token, "cluster-uid-2");
    let effects = term.read_confirm(&mut etcd);
    assert!(matches!(effects[..], [Effect::Notice(Notice::UnknownToken { .. })]), "{effects:?}");
    assert!(etcd.get(CONFIRM).is_none());
    // An operator who read the finding confirms it, even between two terms.
    etcd.put(CONFIRM, "cluster-uid-2");
    let mut term = Term::begin_beside(&mut etcd, "b");
    term.write(Input::Answers { uid: Some("uid-2".into()) }, &mut etcd);
    term.advance(2, &mut etcd);
    let effects = term.read_confirm(&mut etcd);
    assert!(matches!(effects.last(), Some(Effect::Resign(Resigned::Confirmed))), "{effects:?}");
}

#[test]
fn a_confirmation_that_was_replaced_since_it_was_read_is_not_deleted() {
    let (api, mut etcd) = copied(3);
    let mut term = Term::begin_beside(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    etcd.put(CONFIRM, "old");
    let effects = term.step(Input::Confirm(etcd.get(CONFIRM).cloned()));
    etcd.put(CONFIRM, "new");
    for effect in effects {
        if let Effect::Write(transaction) = effect {
            assert!(!etcd.commit(&transaction).unwrap().succeeded);
        }
    }
    assert!(etcd.get(CONFIRM).is_some());
}
