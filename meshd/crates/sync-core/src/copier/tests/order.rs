//! What is written before what.

use super::{
    model::{Api, Etcd, Term},
    *,
};

fn pods(etcd: &Etcd) -> usize {
    etcd.objects().keys().filter(|key| key.contains("/pods/")).count()
}

#[test]
fn no_pod_is_written_before_all_that_selects_it_was_listed() {
    let mut api = Api::new("uid-1");
    api.put(ObjectKind::Pod, "shop/p0", "1");
    api.put(ObjectKind::Node, "n0", "1");
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    for kind in [ObjectKind::Node, ObjectKind::Pod, ObjectKind::Namespace, ObjectKind::NetworkPolicy] {
        term.list(kind, &api, &mut etcd);
        assert_eq!(pods(&etcd), 0, "{kind:?}");
    }
    assert!(etcd.get("k8s/east/nodes/n0").is_none());
    term.list(ObjectKind::ClusterNetworkPolicy, &api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    // Deletions need no policy.
    let mut term = Term::begin_beside(&mut etcd, "b");
    api.delete(ObjectKind::Pod, "shop/p0");
    term.list(ObjectKind::Pod, &api, &mut etcd);
    assert_eq!(pods(&etcd), 0);
}

#[test]
fn no_node_is_written_before_its_pods() {
    let mut api = Api::new("uid-1");
    api.put(ObjectKind::Pod, "shop/p0", "1");
    api.put(ObjectKind::Node, "n0", "1");
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    for kind in [ObjectKind::Namespace, ObjectKind::NetworkPolicy, ObjectKind::ClusterNetworkPolicy, ObjectKind::Node] {
        term.list(kind, &api, &mut etcd);
        assert!(etcd.get("k8s/east/nodes/n0").is_none(), "{kind:?}");
    }
    term.list(ObjectKind::Pod, &api, &mut etcd);
    let revision = |key: &str| etcd.get(key).unwrap().mod_revision;
    assert!(revision("k8s/east/pods/shop/p0") <= revision("k8s/east/nodes/n0"));
}

#[test]
fn a_policy_is_deleted_after_everything_that_is_to_be_written() {
    let mut api = Api::new("uid-1");
    api.put(ObjectKind::NetworkPolicy, "shop/old", "1");
    let mut etcd = Etcd::default();
    let mut term = Term::begin(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    // While this is under way, everything else waits.
    api.put(ObjectKind::Namespace, "other", "1");
    api.delete(ObjectKind::NetworkPolicy, "shop/old");
    api.put(ObjectKind::ClusterNetworkPolicy, "new", "1");
    for pod in 0..150 {
        api.put(ObjectKind::Pod, &format!("shop/p{pod}"), "1");
    }
    let mut transactions = term.deliver_without_writing(&api);
    while let Some(transaction) = transactions.pop() {
        let effects = term.answer(etcd.commit(&transaction));
        if etcd.get("k8s/east/networkpolicies/shop/old").is_none() {
            break;
        }
        transactions.extend(effects.into_iter().filter_map(|effect| match effect {
            Effect::Write(transaction) => Some(transaction),
            _ => None,
        }));
    }
    assert_eq!(etcd.objects(), api.canonical());
}
