//! A cluster that was restored from a backup goes on: its resource versions grow while an operator reads the token.

use super::{
    model::{Api, Etcd, Term},
    *,
};

#[test]
fn a_restored_cluster_is_one_finding_and_its_token_stays() {
    let mut api = Api::new("uid-1");
    let mut backup = api.clone();
    for pod in 0..30 {
        api.put(ObjectKind::Pod, &format!("shop/p{pod}"), "1");
    }
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    let mut term = Term::begin_beside(&mut etcd, "b");
    let mut notices = 0;
    let mut tokens = BTreeSet::new();
    for _ in 0..3 {
        for kind in ObjectKind::ALL {
            backup.put(ObjectKind::Pod, "shop/new", &backup.version.to_string());
            let effects = term.list(kind, &backup, &mut etcd);
            notices += effects.iter().filter(|of| matches!(of, Effect::Notice(Notice::Refused { .. }))).count();
        }
        term.advance(2, &mut etcd);
        tokens.extend(etcd.state().held.into_iter().map(|held| held.token));
    }
    assert_eq!((notices, tokens.len()), (1, 1), "{tokens:?}");
    // The next term has the same finding.
    let mut term = Term::begin_beside(&mut etcd, "c");
    term.list(ObjectKind::Pod, &backup, &mut etcd);
    term.advance(2, &mut etcd);
    assert_eq!(tokens.first(), Some(&etcd.state().held[0].token));
}
