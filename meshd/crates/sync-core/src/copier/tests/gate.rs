//! The first policies wait for nodes that act on them.

use etcd_schema::Cluster;

use super::{model::Term, *};

const POLICY: &str = "k8s/east/networkpolicies/shop/web";

fn node(id: &str, reads_kubernetes: bool) -> MeshNode {
    MeshNode {
        cluster: Cluster::default(),
        id: id.parse().unwrap(),
        name: "e1".to_owned(),
        addresses: Vec::new(),
        runs: true,
        reads_kubernetes,
        readiness: None,
    }
}

/// A cluster with a policy, listed in a term whose nodes were not read yet.
fn waiting() -> (Api, Etcd, Term) {
    let mut api = Api::new("uid-1");
    api.put(ObjectKind::NetworkPolicy, "shop/web", "1");
    api.put(ObjectKind::Pod, "shop/p", "1");
    let mut etcd = Etcd::default();
    let mut term = Term::begin_without_nodes(&mut etcd, "a");
    term.list_all(&api, &mut etcd);
    assert!(etcd.get(POLICY).is_none() && etcd.get("k8s/east/pods/shop/p").is_some());
    (api, etcd, term)
}

#[test]
fn policies_wait_until_every_node_reads_them() {
    let (mut api, mut etcd, mut term) = waiting();
    let behind = [node("old", false), node("new", true), MeshNode { runs: false, ..node("off", false) }];
    let effects = term.write(Input::Nodes(behind.to_vec()), &mut etcd);
    let [Effect::Notice(notice @ Notice::PoliciesHeld { .. })] = &effects[..] else { panic!("{effects:?}") };
    assert!(
        notice.is_error() && notice.to_string().contains("1 policies wait") && notice.to_string().contains("e1 (old)")
    );
    assert_eq!(term.write(Input::Nodes(behind.to_vec()), &mut etcd).len(), 0, "said once");
    term.advance(2, &mut etcd);
    assert!(etcd.state().held[0].token.starts_with("policies-") && etcd.get(POLICY).is_none());
    term.write(Input::Nodes(vec![node("old", true), node("new", true)]), &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    term.advance(2, &mut etcd);
    assert!(etcd.state().held.is_empty());
    // A node without a daemon keeps none waiting, and an old node that comes later stops nothing, in this term or the
    // next.
    term.write(Input::Nodes(behind.to_vec()), &mut etcd);
    api.put(ObjectKind::NetworkPolicy, "shop/web", "2");
    term.deliver_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    etcd.expire_leader();
    let mut term = Term::begin_without_nodes(&mut etcd, "b");
    term.write(Input::Nodes(behind.to_vec()), &mut etcd);
    api.put(ObjectKind::NetworkPolicy, "shop/db", "1");
    term.list_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
}

#[test]
fn an_operator_may_copy_policies_all_the_same() {
    let (api, mut etcd, mut term) = waiting();
    term.advance(2, &mut etcd);
    assert!(etcd.state().held[0].reason.contains("has read the nodes"), "{:?}", etcd.state().held);
    term.write(Input::Nodes(vec![node("old", false)]), &mut etcd);
    term.advance(2, &mut etcd);
    assert!(etcd.get(POLICY).is_none());
    let token = etcd.state().held[0].token.clone();
    // It is for the nodes that were named, and no others.
    term.write(Input::Nodes(vec![node("old", false), node("older", false)]), &mut etcd);
    let effects = term.confirm(&token, &mut etcd);
    assert!(matches!(effects[..], [Effect::Notice(Notice::UnknownToken { .. })]), "{effects:?}");
    term.advance(2, &mut etcd);
    let token = etcd.state().held[0].token.clone();
    term.confirm(&token, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
    // Nor do policies wait again once there was none for a while.
    let mut api = api;
    api.delete(ObjectKind::NetworkPolicy, "shop/web");
    term.deliver_all(&api, &mut etcd);
    term.advance(12, &mut etcd);
    etcd.expire_leader();
    let mut term = Term::begin_without_nodes(&mut etcd, "b");
    term.write(Input::Nodes(vec![node("old", false)]), &mut etcd);
    api.put(ObjectKind::NetworkPolicy, "shop/db", "1");
    term.list_all(&api, &mut etcd);
    assert_eq!(etcd.objects(), api.canonical());
}
