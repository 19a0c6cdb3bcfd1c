//! Writes that etcd refuses.
//!
//! ```text
//!   east1 ── switch ── router ── store: etcd
//! ```

use std::fs;

use integration::{
    Meshd, MeshdNode, await_ok,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::SOON;

/// Waits for the one problem with this code.
#[track_caller]
fn await_problem(node: &MeshdNode, code: &str) -> Value {
    await_ok(&format!("{} to name {code}", node.name()), SOON, || {
        let status = node.try_json(&["status"]).ok_or("no status")?;
        let mut named = status["problems"].as_array().into_iter().flatten().filter(|problem| problem["code"] == code);
        match (named.next(), named.next()) {
            (Some(problem), None) => Ok(problem.clone()),
            _ => Err(status.to_string()),
        }
    })
}

#[test]
fn a_node_without_the_right_to_write_says_so_at_once() {
    let sites = TwoSites::with_hosts("rights", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let users = "export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s
         etcdctl user add root:secret && etcdctl user grant-role root root
         etcdctl role add reader && etcdctl role grant-permission --prefix=true reader read /meshd/
         etcdctl user add node:word && etcdctl user grant-role node reader
         etcdctl auth enable";
    sites.store.run_args(&["sh", "-ec", users]);
    let password = sites.lab.folder().join("password");
    fs::write(&password, "word\n").unwrap();
    let login = format!("--etcd-username node --etcd-password-file {}", password.display());
    let node = Meshd::on(&sites.east.hosts[0], &etcd).site("east").args(&login).start();
    let refused = await_problem(&node, "etcd_refuses");
    assert!(refused["cause"].as_str().unwrap().contains("permission denied"), "{refused}");
    let id = node.status()["id"].as_str().unwrap().to_owned();
    assert!(refused["remedy"].as_str().unwrap().starts_with(&format!("meshctl etcd-roles {id} ")), "{refused}");
}

#[test]
fn an_etcd_that_is_full_says_so_and_the_remedy_makes_room() {
    let sites = TwoSites::with_hosts("full", 1);
    let url = "http://203.0.113.10:3379";
    let data = sites.lab.folder().join("small-etcd");
    let _small = sites.store.spawn(
        "etcd",
        &[
            &format!("--data-dir={}", data.display()),
            &format!("--listen-client-urls={url}"),
            &format!("--advertise-client-urls={url}"),
            "--listen-peer-urls=http://127.0.0.1:3380",
            "--initial-advertise-peer-urls=http://127.0.0.1:3380",
            "--initial-cluster=default=http://127.0.0.1:3380",
            "--quota-backend-bytes=8388608",
            "--log-level=error",
            "--logger=zap",
        ],
    );
    let ctl = |script: &str| {
        let environment = format!("export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s ETCDCTL_ENDPOINTS={url}");
        sites.store.try_run(&["sh", "-c", &format!("{environment}\n{script}")])
    };
    await_ok("etcd to take the configuration", SOON, || {
        let put = ctl(&format!("etcdctl put /meshd/config '{CONFIG}'"));
        if put.success() { Ok(()) } else { Err(put.describe()) }
    });
    let filled = ctl(
        "head -c 500000 /dev/zero | tr '\\0' x > $0.x; for i in $(seq 40); do etcdctl put /filler < $0.x; done; rm $0.x",
    );
    assert!(filled.stderr.contains("database space exceeded"), "{}", filled.describe());
    let etcd = sites.start_etcd(1);
    let node = Meshd::on(&sites.east.hosts[0], &etcd).endpoints(url.to_owned()).site("east").start();
    let refused = await_problem(&node, "etcd_refuses");
    assert!(refused["cause"].as_str().unwrap().contains("database space exceeded"), "{refused}");
    let room = ctl(refused["remedy"].as_str().unwrap());
    assert!(room.success(), "{}", room.describe());
    node.await_ready(SOON);
}
