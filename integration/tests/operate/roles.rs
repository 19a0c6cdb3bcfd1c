//! Least roles in etcd: what `meshctl etcd-roles` prints is what a node needs, and no more.
//!
//! ```text
//!   east1 ── switch ── router ── etcd, with users
//!                        │
//!   west1 ── switch ─────┘
//! ```

use std::fs;

use integration::{
    Meshd, Output,
    topology::{CONFIG, TwoSites},
};

use crate::SOON;

/// A node that gets no more of subnets/ than its reservation.
const CLOSED: &str = "n0000000000000002";
const RESERVED: &str = "10.244.7.0-24&fd42:244:0:7::-64";

#[test]
fn a_node_joins_with_its_role_and_cannot_write_what_is_others() {
    let sites = TwoSites::with_hosts("roles", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    // The node's identity is its own: it is there before its user is.
    let node = Meshd::on(&sites.east.hosts[0], &etcd).site("east").start();
    let id = node.await_ready(SOON)["id"].as_str().unwrap().to_owned();
    node.term();
    etcd.del_prefix("/meshd/nodes/");
    etcd.del_prefix("/meshd/subnets/");

    // As an operator would: what is printed goes to a shell.
    let roles = |args: &[&str]| node.meshctl(&[&["etcd-roles"], args].concat()).stdout;
    let printed = roles(&["--operator", "--reader"]) + &roles(&[&id]) + &roles(&[CLOSED, "--subnet", RESERVED]);
    assert_eq!(node.meshctl(&["etcd-roles"]).code(), Some(2), "whose?");
    etcd.put(&format!("/meshd/subnets/{RESERVED}"), &format!(r#"{{"Node": "{CLOSED}"}}"#));
    let users = format!(
        "etcdctl user add root:secret && etcdctl user grant-role root root
         etcdctl user add node:word && etcdctl user grant-role node meshd-node-{id}
         etcdctl user add closed:word && etcdctl user grant-role closed meshd-node-{CLOSED}
         etcdctl user add reader:word && etcdctl user grant-role reader meshd-reader
         etcdctl user add operator:word && etcdctl user grant-role operator meshd-operator
         etcdctl auth enable"
    );
    sites.store.run_args(&[
        "sh",
        "-ec",
        &format!("export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s\n{printed}{users}"),
    ]);

    let password = node.state_dir().join("../password");
    fs::write(&password, "word\n").unwrap();
    let login = format!("--etcd-username node --etcd-password-file {}", password.display());
    let with_role =
        Meshd::on(&sites.east.hosts[0], &etcd).copy_state(node.state_dir()).site("east").args(&login).start();
    let status = with_role.await_ready(SOON);
    assert_eq!(status["id"].as_str(), Some(id.as_str()), "{status}");

    // One that may write one subnet alone joins with that.
    let state = node.state_dir().join("../closed-state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("node-id"), format!("{CLOSED}\n")).unwrap();
    let login = format!("--etcd-username closed --etcd-password-file {}", password.display());
    let closed = Meshd::on(&sites.west.hosts[0], &etcd).copy_state(&state).site("west").args(&login).start();
    let status = closed.await_ready(SOON);
    assert_eq!((&status["id"], &status["subnets"][0]), (&CLOSED.into(), &"10.244.7.0/24".into()), "{status}");
    closed.await_path("east1", "wireguard", SOON);

    let put = |user: &str, key: &str| -> Output {
        let user = format!("{user}:word");
        let key = format!("/meshd/{key}");
        sites.store.try_run(&[
            "env",
            "ETCDCTL_API=3",
            "etcdctl",
            "--command-timeout=60s",
            "--user",
            &user,
            "put",
            &key,
            "{}",
        ])
    };
    for key in [
        "nodes/n0000000000000001",
        "alive/n0000000000000001",
        "endpoints/n0000000000000001/c/eth0",
        "removed/n0000000000000001",
        "config",
        "peers/laptop",
        "namespaces/shop",
        "pods/shop/web",
        "networkpolicies/shop/web",
        "clusternetworkpolicies/all",
    ] {
        for user in ["node", "closed", "reader"] {
            let refused = put(user, key);
            assert!(
                !refused.success() && refused.stderr.contains("permission denied"),
                "{key}: {}",
                refused.describe()
            );
        }
    }
    assert!(put("node", &format!("nodes/{id}")).success(), "its own it may");
    // Which subnet a node draws is not known beforehand, so that all of them are open to it; unless it has a
    // reservation.
    assert!(!put("closed", "subnets/10.244.8.0-24").success());
    with_role.await_status("its record to be its own again", SOON, |status| status["state"] == "running");
    // What it wrote is no peer: every status names it from here on.
    assert!(put("operator", "peers/laptop").success());
}
