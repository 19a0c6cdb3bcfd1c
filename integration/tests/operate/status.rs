//! What is printed for people: tables, colours on a terminal, a remedy for each line that is not well.
//!
//! ```text
//!   east1 (pod) ── switch ── router ── switch ── west1 (pod)
//! ```

use integration::{
    Meshd, MeshdNode, Output, await_ok,
    topology::{CONFIG, TwoSites},
};

use crate::{SOON, mesh};

/// As on a terminal.
fn on_a_terminal(node: &MeshdNode, env: &str, command: &str) -> Output {
    let (program, run) = (integration::binary("meshctl"), node.run_dir());
    let line = format!("{env} {} --run-dir {} {command}", program.display(), run.display());
    node.host().try_run(&["script", "-qec", &line, "/dev/null"])
}

/// Waits until the node is in the mesh and has nothing to say.
#[track_caller]
fn await_well(node: &MeshdNode) {
    node.await_status("to be well", SOON, |status| {
        status["state"] == "running" && status["problems"].as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn tables_are_coloured_on_a_terminal_alone() {
    let mesh = mesh("tables", 1);
    let east1 = mesh.node("east1");
    await_well(east1);
    let columns = |text: &str| text.lines().next().unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let peers = east1.meshctl(&["peers"]).stdout;
    assert_eq!(
        columns(&peers),
        ["NAME", "SITE", "SUBNETS", "PATH", "ENDPOINT", "HANDSHAKE", "RX", "TX", "MTU", "REASON"]
    );
    let west1 = peers.lines().find(|line| line.starts_with("west1 ")).unwrap();
    assert!(
        west1.contains(" west ") && west1.contains("wireguard") && west1.contains("198.51.100.11:51820"),
        "{peers}"
    );
    let routes = east1.meshctl(&["routes"]).stdout;
    assert_eq!(columns(&routes), ["DESTINATION", "PATH", "PEER", "VIA", "DEV", "MTU", "SRC"]);
    assert!(routes.lines().any(|line| line.starts_with("10.244.0.0/16") && line.contains("(floor)")), "{routes}");
    let status = east1.meshctl(&["status"]).stdout;
    for line in [
        "node      east1",
        "version   ",
        "peers     0 direct, 1 by WireGuard",
        "policy    enforce, 0 policies, ",
        "drops     ",
        "state     running",
    ] {
        assert!(status.lines().any(|found| found.starts_with(line)), "{line}: {status}");
    }

    let line = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap();
    assert!(line("version ").contains(", up "), "{status}");
    assert!(line("etcd ").contains(", revision ") && line("etcd ").contains(" (newest "), "{status}");

    for command in ["status", "peers", "routes"] {
        let plain = east1.meshctl(&[command]).stdout;
        assert!(!plain.contains('\x1b'), "{plain:?}");
        let coloured = on_a_terminal(east1, "", command).stdout;
        assert!(coloured.contains("\x1b[32m"), "{coloured:?}");
        let refused = on_a_terminal(east1, "NO_COLOR=1", command).stdout;
        assert!(!refused.contains('\x1b'), "{refused:?}");
    }
}

#[test]
fn what_is_not_well_has_cause_and_remedy_and_an_exit_code() {
    let mesh = mesh("check", 1);
    let east1 = mesh.node("east1");
    await_ok("nothing to be wrong", SOON, || {
        let checked = east1.meshctl(&["status", "--check"]);
        if checked.code() == Some(0) { Ok(()) } else { Err(checked.describe()) }
    });
    mesh.etcd.stop();
    east1.await_status("etcd to be missed", SOON, |status| status["state"] == "degraded");
    let checked = east1.meshctl(&["status", "--check"]);
    assert_eq!(checked.code(), Some(4), "{}", checked.describe());
    assert_eq!(east1.meshctl(&["status"]).code(), Some(0));
    let lines: Vec<&str> = checked.stdout.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("problem   etcd_unreachable: ")).unwrap();
    assert!(lines[at + 1].starts_with("  remedy  "), "{}", checked.stdout);
    assert_eq!(checked.stdout.matches("problem ").count(), 1, "one cause is one problem: {}", checked.stdout);
    assert!(on_a_terminal(east1, "", "status").stdout.contains("\x1b[31mdegraded"));
    east1.term();
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(3));
}

#[test]
fn a_mesh_that_only_audits_says_so_and_the_remedy_ends_it() {
    let mesh = mesh("audit", 1);
    let east1 = mesh.node("east1");
    let mut config: serde_json::Value = serde_json::from_str(CONFIG).unwrap();
    config["policyMode"] = "audit".into();
    mesh.etcd.put("/meshd/config", &config.to_string());
    let audit = |status: &serde_json::Value| {
        let mut problems = status["problems"].as_array().unwrap().iter();
        problems.find(|problem| problem["code"] == "policy_audit").cloned()
    };
    let status = east1.await_status("the mode to be a problem", SOON, |status| {
        audit(status).is_some() && status["state"] == "running"
    });
    assert_eq!(status["policy"]["mode"], "audit", "{status}");
    assert_eq!(east1.meshctl(&["status", "--check"]).code(), Some(4));
    let remedy = audit(&status).unwrap()["remedy"].as_str().unwrap().to_owned();
    mesh.sites.store.run_args(&["sh", "-ec", &format!("export ETCDCTL_API=3 ETCDCTL_COMMAND_TIMEOUT=60s; {remedy}")]);
    east1.await_status("the mode to be no problem", SOON, |status| audit(status).is_none());
}

/// Each a mistake that is made, with what its one remedy must say.
#[test]
fn a_remedy_fits_the_mistake() {
    let sites = TwoSites::with_hosts("mistakes", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let host = &sites.east.hosts[0];
    let plain = etcd.endpoints();
    let https = plain.replace("http://", "https://");
    for (code, start, words) in [
        ("waiting_for_etcd", Meshd::on(host, &etcd).endpoints(https), ["http://", "--etcd-endpoints"]),
        ("no_config", Meshd::on(host, &etcd).args("--etcd-prefix /mesh"), ["/mesh/config", "--etcd-prefix"]),
    ] {
        let node = start.site("east").start();
        node.await_status(&format!("to name {code} alone"), SOON, |status| {
            let problems = status["problems"].as_array().unwrap();
            let named = problems.iter().any(|problem| {
                let remedy = problem["remedy"].as_str().unwrap();
                problem["code"] == code && words.iter().all(|word| remedy.contains(word))
            });
            named && problems.len() == 1
        });
        node.term();
    }

    let node = Meshd::on(host, &etcd).site("east").start();
    node.await_ready(SOON);
    let mut config: serde_json::Value = serde_json::from_str(CONFIG).unwrap();
    config["EnableIPv6"] = false.into();
    etcd.put("/meshd/config", &config.to_string());
    let status = node.await_status("config to be refused, and nothing else", SOON, |status| {
        let problems = status["problems"].as_array().unwrap();
        problems.len() == 1 && problems[0]["code"] == "config_refused"
    });
    let refused = &status["problems"][0];
    assert!(refused["remedy"].as_str().unwrap().contains("EnableIPv6"), "{refused}");

    let own = node.subnets().iter().any(|subnet| subnet.to_string().starts_with("10.244.250."));
    let free = node.meshctl(&["ping", if own { "10.244.251.9" } else { "10.244.250.9" }]);
    assert_eq!(free.code(), Some(5));
    assert!(free.stderr.contains("10.244.0.0/16") && free.stderr.contains("no leased subnet"), "{}", free.describe());
}

#[test]
fn pods_of_kubernetes_whose_policies_nothing_copies_are_named() {
    let mesh = mesh("not-copied", 1);
    let east1 = mesh.node("east1");
    let named = |status: &serde_json::Value| {
        let problems = status["problems"].as_array().unwrap();
        problems.iter().any(|problem| problem["code"] == "kubernetes_not_copied")
    };
    let _plain = east1.cni("1.0.0", &serde_json::json!({})).pod("plain");
    assert!(!named(&east1.status()), "a container of no Kubernetes needs no copies");
    let network = east1.cni("1.0.0", &serde_json::json!({}));
    let _pod = network.args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1").pod("web-0");
    east1.await_status("that nothing copies to be named", SOON, named);
    let namespace = r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}"#;
    mesh.etcd.put("/meshd/namespaces/shop", namespace);
    east1.await_status("what was copied to be seen", SOON, |status| !named(status));
}
