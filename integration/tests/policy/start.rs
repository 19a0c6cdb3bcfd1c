//! A daemon that starts: nothing reaches a pod unjudged before the first picture is in force, and what an earlier run
//! left in force is not cut.
//!
//! ```text
//!   east1 (pods db, neighbour) ─┬─ switch ─ router ─ switch ─ west1 (pod)
//!   east2 (pod) ────────────────┘
//! ```

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use serde_json::json;

use crate::{
    SOON, await_in_force,
    objects::{put_pod, put_policy},
    probe::{Server, round_trip},
};
use integration::{
    await_ok, await_until,
    topology::{CONFIG, Mesh, TwoSites},
};

/// An `nft` that refuses what a switch says: `pods` the rules of pods, `all` every change of policies, `everything`
/// every call.
pub(crate) struct Nft {
    folder: PathBuf,
}

impl Nft {
    pub(crate) fn new(sites: &TwoSites) -> Self {
        let folder = sites.lab.folder().join("nft");
        fs::create_dir_all(&folder).unwrap();
        let script = format!(
            "#!/bin/bash\nif [ \"$(cat {0}/refused)\" = everything ]; then echo 'refused by the scenario' >&2; exit 1; fi\n\
             if [ \"$1\" = -f ]; then\n  text=$(cat)\n  case $(cat {0}/refused) in\n    \
             pods) word='map inet meshd_policy ingress4' ;;\n    all) word=meshd_policy ;;\n    *) word=nothing-to-refuse ;;\n  \
             esac\n  if [[ $text == *$word* ]]; then echo 'refused by the scenario' >&2; exit 1; fi\n  \
             exec /usr/sbin/nft \"$@\" <<<\"$text\"\nfi\nexec /usr/sbin/nft \"$@\"\n",
            folder.display()
        );
        fs::write(folder.join("nft"), script).unwrap();
        fs::set_permissions(folder.join("nft"), fs::Permissions::from_mode(0o755)).unwrap();
        let nft = Self { folder };
        nft.refuse("none");
        nft
    }

    pub(crate) fn refuse(&self, what: &str) {
        // In place of the old one at once: a half written one would refuse nothing.
        let path = self.folder.join("refused.new");
        fs::write(&path, what).unwrap();
        fs::rename(path, self.folder.join("refused")).unwrap();
    }

    pub(crate) fn path(&self) -> String {
        format!("{}:{}", self.folder.display(), std::env::var("PATH").unwrap())
    }
}

pub(crate) fn has_problem(status: &serde_json::Value, code: &str) -> bool {
    status["problems"].as_array().is_some_and(|problems| problems.iter().any(|problem| problem["code"] == code))
}

#[test]
fn nothing_reaches_a_pod_before_policies_are_in_force_not_even_in_audit_mode() {
    let sites = TwoSites::with_hosts("policy-start", 2);
    let nft = Nft::new(&sites);
    let config = CONFIG.replacen('{', "{\"policyMode\": \"audit\", ", 1);
    let mesh = Mesh::start_on(sites, &config, |meshd| meshd.env("PATH", &nft.path()));
    mesh.await_all_reach_each_other();
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    east1.await_path("east2", "direct", SOON);
    let server = Server::start(db, db.v4(), 5432);
    let v6 = Server::start(db, db.v6(), 5432);
    let others = [&neighbour, mesh.pod("east2"), mesh.pod("west1")];
    let on_node = Server::start(east1.host(), *east1.overlay().iter().find(|ip| ip.is_ipv4()).unwrap(), 8080);
    for from in others {
        server.assert_reached(from);
    }
    // Once with the rules gone, as after a boot; once where they were never closed, for nftables takes nothing at all.
    for refused in ["pods", "all"] {
        east1.kill9();
        nft.refuse(refused);
        east1.host().nft("delete table inet meshd_policy");
        east1.start();
        let expected = if refused == "pods" { "policies_not_in_force" } else { "pods_not_guarded" };
        let why =
            |status: &serde_json::Value| has_problem(status, expected) && !has_problem(status, "policy_rules_refused");
        east1.await_status("to say why", SOON, why);
        if refused == "pods" {
            for from in others {
                server.assert_not_reached(from);
                v6.assert_not_reached(from);
            }
            // A pod that no rules judge reaches no other pod, either.
            on_node.assert_not_reached(db);
            server.assert_reached(east1.host());
            v6.assert_reached(east1.host());
        } else {
            server.assert_not_reached(mesh.pod("west1"));
        }
        nft.refuse("none");
        for from in others {
            server.assert_reached(from);
        }
        on_node.assert_reached(db);
        east1.await_status("to have no such problem", SOON, |status| !has_problem(status, expected));
    }
    mesh.sniffer.assert_clean();
}

#[test]
fn nftables_that_fails_on_a_running_node_is_one_problem() {
    let sites = TwoSites::with_hosts("nft-fails", 1);
    let nft = Nft::new(&sites);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.env("PATH", &nft.path()));
    mesh.await_all_reach_each_other();
    let east1 = mesh.node("east1");
    nft.refuse("everything");
    put_policy(&mesh.etcd, "shop", "deny-all", &json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    east1.await_status("to name the policies", SOON, |status| has_problem(status, "policy_rules_refused"));
    // Another program takes rules of the firewall, which are not put back either.
    east1.host().nft("flush chain inet meshd guard");
    let status = east1.await_status("to name nftables", SOON, |status| has_problem(status, "nftables_refused"));
    let problems = status["problems"].as_array().unwrap();
    let cause = problems[0]["cause"].as_str().unwrap();
    assert_eq!(problems.len(), 1, "{status}");
    assert!(cause.contains("nftables table inet meshd: nft refused: refused by the scenario"), "{status}");
    assert!(cause.contains("the kernel refuses the policy rules; the previous rules stay in force"), "{status}");
    let ready = east1.host().run("curl -s http://127.0.0.1:9473/readyz");
    assert!(ready.stdout.contains("nftables"), "{}", ready.describe());
    nft.refuse("none");
    east1.await_status("to be well", SOON, |status| status["problems"] == json!([]));
}

#[test]
fn rules_that_others_remove_are_put_back_also_while_nothing_is_known() {
    let mesh = Mesh::start_on(TwoSites::with_hosts("policy-start-flushed", 1), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    let neighbour = mesh.node("east1").pod("neighbour");
    let server = Server::start(mesh.pod("east1"), mesh.pod("east1").v4(), 5432);
    server.assert_reached(&neighbour);
    // Older than any lease: what it says of the mesh is not taken for true, but where this node's pods were is.
    let east1 = mesh.node("east1");
    let cache = east1.state_dir().join("cache/store.json");
    let cached = || serde_json::from_slice::<serde_json::Value>(&fs::read(&cache).ok()?).ok();
    await_until("the node's subnet to be on disk", SOON, || cached().filter(|cache| !cache["subnet"].is_null()));
    east1.kill9();
    mesh.etcd.stop();
    let mut document = cached().unwrap();
    document["writtenAt"] = json!(document["writtenAt"].as_u64().unwrap() - 8 * 86_400);
    fs::write(&cache, document.to_string()).unwrap();
    east1.start();
    east1.await_status("to wait for etcd", SOON, |status| has_problem(status, "waiting_for_etcd"));
    for _ in 0..2 {
        east1.host().nft("flush ruleset");
        await_ok("the way to pods to be closed", SOON, || {
            let listed = east1.host().try_run(&["nft", "list", "table", "inet", "meshd_policy"]);
            if listed.stdout.contains("chain closed") { Ok(()) } else { Err(listed.describe()) }
        });
        server.assert_not_reached(&neighbour);
        server.assert_reached(east1.host());
    }
}

#[test]
fn a_restart_cuts_no_connection_that_nftables_judges() {
    let sites = TwoSites::with_hosts("policy-restart-direct", 2);
    let nft = Nft::new(&sites);
    let mesh = Mesh::start_on(sites, CONFIG, |meshd| meshd.env("PATH", &nft.path()));
    mesh.await_all_reach_each_other();
    let (east1, db) = (mesh.node("east1"), mesh.pod("east1"));
    let neighbour = east1.pod("neighbour");
    let peer = mesh.pod("east2");
    east1.await_path("east2", "direct", SOON);
    for (pod, name, node) in [(db, "db", "east1"), (&neighbour, "neighbour", "east1"), (peer, "peer", "east2")] {
        put_pod(&mesh.etcd, ("shop", name), &json!({"app": name}), node, pod.addresses());
    }
    let spec = json!({"podSelector": {"matchLabels": {"app": "db"}},
                      "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "neighbour"}}}]}]});
    put_policy(&mesh.etcd, "shop", "db", &spec);
    await_in_force(&mesh);
    let server = Server::start(db, db.v4(), 5432);
    let mut connection = server.connect(&neighbour);
    assert!(round_trip(&mut connection, SOON));
    // No picture of its own comes in force, and that of the run before stays.
    nft.refuse("pods");
    east1.kill9();
    east1.start();
    east1.await_status("to say why", SOON, |status| has_problem(status, "policies_not_in_force"));
    assert!(round_trip(&mut connection, SOON), "the connection is cut");
    server.assert_reached(&neighbour);
    server.assert_not_reached(peer);
    nft.refuse("none");
    await_in_force(&mesh);
    assert!(round_trip(&mut connection, SOON));
    await_until("the connection to go on", SOON, || round_trip(&mut connection, Duration::from_secs(1)).then_some(()));
    server.assert_not_reached(peer);
}
