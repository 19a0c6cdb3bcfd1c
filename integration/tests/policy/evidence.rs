//! Policies, pods and namespaces that etcd lacks: it was replaced, restored from a backup, or they were deleted.
//!
//! ```text
//!   east1 (pod client) ── switch ── router ── switch ── west1 (pods db, neighbour)
//!                                     │
//!                                   etcd: emptied, put back to a snapshot, compacted
//! ```

use integration::{
    MeshdNode, Pod,
    topology::{CONFIG, Mesh},
};
use serde_json::{Value, json};

use crate::{
    SOON, await_in_force, mesh,
    objects::{delete_policy, put_namespace, put_pod, put_policy},
    probe::Server,
};

/// A mesh whose pod `db` at west1 takes nothing, which the packets of two clients try.
struct Closed {
    mesh: Mesh,
    neighbour: Pod,
    server: Server,
}

fn deny_all() -> Value {
    json!({"podSelector": {"matchLabels": {"app": "db"}}})
}

impl Closed {
    fn start(title: &str) -> Self {
        let mesh = mesh(title, 1);
        let neighbour = mesh.node("west1").pod("neighbour");
        let server = Server::start(mesh.pod("west1"), mesh.pod("west1").v4(), 5432);
        put_namespace(&mesh.etcd, "shop", &json!({}));
        put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", mesh.pod("west1").addresses());
        put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", mesh.pod("east1").addresses());
        let closed = Self { mesh, neighbour, server };
        put_policy(&closed.mesh.etcd, "shop", "db", &deny_all());
        await_in_force(&closed.mesh);
        closed.assert_closed();
        closed
    }

    fn node(&self) -> &MeshdNode {
        self.mesh.node("west1")
    }

    /// By the tunnel's verdict and by nftables'.
    #[track_caller]
    fn assert_closed(&self) {
        self.server.assert_not_reached(self.mesh.pod("east1"));
        self.server.assert_not_reached(&self.neighbour);
    }

    #[track_caller]
    fn assert_open(&self) {
        self.server.assert_reached(self.mesh.pod("east1"));
        self.server.assert_reached(&self.neighbour);
    }

    #[track_caller]
    fn await_problem(&self, code: &str) -> String {
        let named = |status: &Value| problem(status, code).is_some();
        let status = self.node().await_status(&format!("to name {code}"), SOON, named);
        problem(&status, code).map(Value::to_string).unwrap_or_default()
    }

    #[track_caller]
    fn await_no_problem(&self, code: &str) {
        self.node().await_status(&format!("to have no {code}"), SOON, |status| problem(status, code).is_none());
    }

    #[track_caller]
    fn accept(&self) -> String {
        let output = self.node().meshctl(&["etcd", "accept"]);
        assert!(output.success(), "{}", output.describe());
        output.stdout
    }
}

fn problem<'a>(status: &'a Value, code: &str) -> Option<&'a Value> {
    status["problems"].as_array()?.iter().find(|problem| problem["code"] == code)
}

#[test]
fn an_empty_etcd_withdraws_nothing_until_the_operator_accepts_it() {
    let closed = Closed::start("evidence-empty");
    let node = closed.node();
    closed.mesh.etcd.replace(Some("another"));
    let told = closed.await_problem("etcd_replaced");
    assert!(told.contains("cluster ID") && told.contains("meshctl etcd accept"), "{told}");
    closed.assert_closed();
    // Over a restart: with this etcd, and with none.
    node.restart();
    closed.await_problem("etcd_replaced");
    closed.assert_closed();
    closed.mesh.etcd.stop();
    node.restart();
    closed.await_problem("etcd_unreachable");
    closed.assert_closed();
    closed.mesh.etcd.start_again();
    closed.await_problem("etcd_replaced");
    closed.assert_closed();
    let said = closed.accept();
    assert!(said.starts_with("accepted: "), "{said}");
    closed.assert_open();
    closed.await_no_problem("etcd_replaced");
    assert_eq!(closed.accept(), "nothing to accept: no records were kept in force\n");
    // From here on this etcd counts. While it lacks `config`, all that goes is held for a while.
    closed.mesh.etcd.put("/meshd/config", CONFIG);
    put_pod(&closed.mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", closed.mesh.pod("west1").addresses());
    put_policy(&closed.mesh.etcd, "shop", "db", &deny_all());
    await_in_force(&closed.mesh);
    closed.assert_closed();
    delete_policy(&closed.mesh.etcd, "shop", "db");
    closed.assert_open();
    closed.mesh.sniffer.assert_clean();
}

#[test]
fn an_older_snapshot_brings_no_older_policy_back_until_the_keys_are_right_again() {
    let closed = Closed::start("evidence-snapshot");
    let etcd = &closed.mesh.etcd;
    // What it allows is not allowed any more after the snapshot.
    put_policy(etcd, "shop", "db", &json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{}]}));
    put_policy(etcd, "shop", "gone", &json!({"podSelector": {}, "ingress": [{}]}));
    closed.assert_open();
    let snapshot = etcd.snapshot();
    put_policy(etcd, "shop", "db", &deny_all());
    delete_policy(etcd, "shop", "gone");
    put_policy(etcd, "shop", "late", &json!({"podSelector": {"matchLabels": {"app": "late"}}}));
    await_in_force(&closed.mesh);
    closed.assert_closed();
    // As one of the same cluster id: only its revision shows it.
    etcd.restore(&snapshot, None);
    let told = closed.await_problem("etcd_revision_went_back");
    assert!(told.contains("3 policies"), "{told}");
    closed.assert_closed();
    closed.node().restart();
    closed.await_problem("etcd_revision_went_back");
    closed.assert_closed();
    put_policy(etcd, "shop", "db", &deny_all());
    put_policy(etcd, "shop", "late", &json!({"podSelector": {"matchLabels": {"app": "late"}}}));
    delete_policy(etcd, "shop", "gone");
    closed.await_no_problem("etcd_revision_went_back");
    closed.assert_closed();
    delete_policy(etcd, "shop", "db");
    closed.assert_open();
    closed.mesh.sniffer.assert_clean();
}

#[test]
fn what_was_deleted_and_compacted_away_goes_with_the_second_list() {
    let closed = Closed::start("evidence-compacted");
    let (node, etcd) = (closed.node(), &closed.mesh.etcd);
    node.stop();
    // The connection breaks, and the watch cannot go on where it was.
    etcd.stop();
    etcd.start_again();
    delete_policy(etcd, "shop", "db");
    etcd.compact();
    node.cont();
    closed.assert_open();
}

#[test]
fn many_policies_deleted_at_once_are_held_and_accept_ends_it() {
    let closed = Closed::start("evidence-mass");
    let etcd = &closed.mesh.etcd;
    for number in 0..10 {
        put_policy(etcd, "shop", &format!("p{number}"), &json!({"podSelector": {"matchLabels": {"app": "other"}}}));
    }
    await_in_force(&closed.mesh);
    // One at a time is in force at once.
    delete_policy(etcd, "shop", "p0");
    await_in_force(&closed.mesh);
    let listed = closed.node().meshctl(&["policy", "list"]).stdout;
    assert!(!listed.contains("shop/p0 ") && listed.contains("shop/p1 "), "{listed}");
    etcd.del_prefix("/meshd/networkpolicies/");
    let told = closed.await_problem("policy_withdrawals_held");
    assert!(told.contains("policies were deleted") && told.contains("meshctl etcd accept"), "{told}");
    closed.assert_closed();
    // Ten, and the one before if that was less than five seconds earlier.
    let said = closed.accept();
    assert!(["accepted: 10 keys", "accepted: 11 keys"].iter().any(|start| said.starts_with(start)), "{said}");
    closed.await_no_problem("policy_withdrawals_held");
    closed.assert_open();
}
