//! What stands in etcd and cannot be read, or is not known.

use serde_json::json;

use crate::{
    SOON, await_in_force, mesh,
    objects::{put_namespace, put_pod, put_policy},
    probe::Server,
    reported::await_mode,
};

const KEY: &str = "/meshd/networkpolicies/shop/db";

fn policy(spec: &str) -> String {
    format!(
        r#"{{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {{"name": "db", "namespace": "shop"}}, "spec": {spec}}}"#
    )
}

#[test]
fn a_bad_value_keeps_the_last_good_one_from_memory_cache_and_history() {
    let mesh = mesh("policy-bad-value", 1);
    let (client, db, west) = (mesh.pod("east1"), mesh.pod("west1"), mesh.node("west1"));
    put_namespace(&mesh.etcd, "shop", &json!({}));
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    put_pod(&mesh.etcd, ("shop", "client"), &json!({"app": "client"}), "east1", client.addresses());
    let (allowed, refused) = (Server::start(db, db.v4(), 5432), Server::start(db, db.v4(), 5433));
    let good =
        policy(r#"{"podSelector": {}, "ingress": [{"ports": [{"port": 5432}, {"port": 5432, "protocol": "UDP"}]}]}"#);
    mesh.etcd.put(KEY, &good);
    mesh.etcd.put(KEY, &policy(r#"{"podSelector": {}, "ingress": [{"ports": [{"port": 99999}]}]}"#));
    await_in_force(&mesh);
    let check = |what: &str| {
        allowed.assert_reached(client);
        refused.assert_not_reached(client);
        let status = west.await_status(what, SOON, |status| {
            status["problems"]
                .as_array()
                .is_some_and(|problems| problems.iter().any(|problem| problem["code"] == "bad_value"))
        });
        status["problems"].to_string()
    };
    let told = check("the bad value to be told");
    assert!(told.contains("stays in force") && told.contains("port"), "{told}");
    // From the cache.
    west.restart();
    await_in_force(&mesh);
    check("the bad value to be told after a restart");
    // From etcd's history.
    west.kill9();
    std::fs::remove_dir_all(west.state_dir().join("cache")).unwrap();
    west.start();
    await_in_force(&mesh);
    let told = check("the bad value to be told without a cache");
    assert!(told.contains("its value of revision"), "{told}");
    // One that never was good isolates whom it selects, in its directions.
    mesh.etcd.del(KEY);
    mesh.etcd.put(KEY, &policy(r#"{"podSelector": {"matchLabels": {"app": "db"}}, "frob": 1}"#));
    await_in_force(&mesh);
    allowed.assert_not_reached(client);
    let open = Server::start(client, client.v4(), 80);
    open.assert_reached(db);
}

#[test]
fn a_pod_whose_labels_are_not_known_is_isolated_by_what_may_select_it() {
    let mesh = mesh("policy-unknown", 1);
    let (client, db) = (mesh.pod("east1"), mesh.pod("west1"));
    let server = Server::start(db, db.v4(), 5432);
    let select = json!({"podSelector": {"matchLabels": {"app": "other"}}});
    put_policy(&mesh.etcd, "shop", "other", &select);
    await_in_force(&mesh);
    server.assert_not_reached(client);
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    await_in_force(&mesh);
    server.assert_reached(client);
}

#[test]
fn audit_mode_refuses_nothing_and_says_what_it_would() {
    let mesh = mesh("policy-audit", 1);
    let (client, db, west) = (mesh.pod("east1"), mesh.pod("west1"), mesh.node("west1"));
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    let server = Server::start(db, db.v4(), 5432);
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {}}));
    await_in_force(&mesh);
    server.assert_not_reached(client);
    let mut config: serde_json::Value = serde_json::from_str(integration::topology::CONFIG).unwrap();
    config["policyMode"] = "audit".into();
    mesh.etcd.put("/meshd/config", &config.to_string());
    await_mode(west, "audit");
    server.assert_reached(client);
    west.await_status("what would have been refused to be counted", SOON, |status| {
        let verdicts = status["policy"]["verdicts"].as_array().cloned().unwrap_or_default();
        verdicts.iter().any(|count| count["reason"] == "audited")
    });
    config["policyMode"] = "enforce".into();
    mesh.etcd.put("/meshd/config", &config.to_string());
    await_mode(west, "enforce");
    server.assert_not_reached(client);
}

#[test]
fn a_start_without_etcd_enforces_what_the_cache_holds() {
    let mesh = mesh("policy-cache", 1);
    let (client, db, west) = (mesh.pod("east1"), mesh.pod("west1"), mesh.node("west1"));
    put_pod(&mesh.etcd, ("shop", "db"), &json!({"app": "db"}), "west1", db.addresses());
    let server = Server::start(db, db.v4(), 5432);
    put_pod(&mesh.etcd, ("other", "client"), &json!({}), "east1", client.addresses());
    let open = Server::start(client, client.v4(), 80);
    put_policy(&mesh.etcd, "shop", "closed", &json!({"podSelector": {}}));
    await_in_force(&mesh);
    server.assert_not_reached(client);
    west.restart();
    await_in_force(&mesh);
    assert!(west.term().success());
    mesh.etcd.stop();
    west.start();
    open.assert_reached(db);
    server.assert_not_reached(client);
}
