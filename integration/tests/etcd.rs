//! The real etcd that scenarios use, seen from the nodes of [`TwoSites`].

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::time::Duration;

use integration::topology::TwoSites;

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn one_member_keeps_its_data_over_a_kill_and_is_reached_from_the_nodes() {
    let sites = TwoSites::with_hosts("etcd", 1);
    let etcd = sites.start_etcd(1);
    let watch = etcd.watch("/a/");
    // Written until the watch, which starts on its own, has seen one.
    let value = "two\nlines, {\"json\": true} and -dashes";
    integration::await_until("the watch", DEADLINE, || {
        etcd.put("/a/x", value);
        watch.log().contains("lines").then_some(())
    });
    etcd.put("/a/y", "-1");
    assert_eq!(etcd.get("/a/x").as_deref(), Some(value));
    assert_eq!(etcd.get("/a/none"), None);
    etcd.stop();
    etcd.start_again();
    assert_eq!(etcd.get_prefix("/a/"), [("/a/x".into(), value.into()), ("/a/y".into(), "-1".into())]);
    for (host, address) in [(&sites.east.hosts[0], 0), (&sites.west.hosts[0], 1)] {
        let endpoints = format!("--endpoints={}", etcd.endpoints_at(address));
        let output = host.run_args(&["env", "ETCDCTL_API=3", "etcdctl", &endpoints, "get", "/a/y"]);
        assert_eq!(output.stdout, "/a/y\n-1\n");
    }
    etcd.del("/a/x");
    let before = etcd.revision();
    etcd.compact();
    etcd.defrag();
    assert_eq!(etcd.revision(), before);
    etcd.del_prefix("/a/");
    assert_eq!(etcd.get_prefix("/a/"), []);
}

#[test]
fn three_members_go_on_without_one() {
    let sites = TwoSites::with_hosts("etcd_cluster", 0);
    let etcd = sites.start_etcd(3);
    etcd.put("k", "1");
    etcd.kill_member(0);
    etcd.await_ready();
    etcd.put("k", "2");
    etcd.start_member(0);
    etcd.pause_member(1);
    etcd.await_ready();
    assert_eq!(etcd.get("k").as_deref(), Some("2"));
    etcd.resume_member(1);
}
