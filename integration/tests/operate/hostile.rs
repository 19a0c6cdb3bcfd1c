//! Keys that somebody wrote to harm who looks at them.
//!
//! ```text
//!   east1 ── switch ── router ── store: etcd
//! ```

use std::{fs, path::Path};

use integration::{
    Meshd, MeshdNode, Output, await_ok, await_until,
    topology::{CONFIG, TwoSites},
};
use serde_json::json;

use crate::SOON;

/// What a terminal acts on, beside the line breaks of our own.
fn acts_on_a_terminal(text: &str) -> bool {
    let is_bidi =
        |c| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.contains(|c: char| (c.is_control() && c != '\n') || is_bidi(c))
}

/// A line that a key or a value tries to add to what is printed.
const FORGED: &str = "problem   none: all is well";

#[track_caller]
fn assert_harmless(told: &Output) {
    for text in [&told.stdout, &told.stderr] {
        assert!(!acts_on_a_terminal(text), "{}", told.describe());
        assert!(!text.lines().any(|line| line.starts_with(FORGED)), "{}", told.describe());
    }
}

/// What `meshctl` says in each format, harmless.
#[track_caller]
fn said(node: &MeshdNode, command: &[&str]) -> Output {
    assert_harmless(&node.meshctl(&[&["-o", "json"], command].concat()));
    let table = node.meshctl(command);
    assert_harmless(&table);
    table
}

/// Keys, names and values as arguments, in files and in etcd, for the commands that print some of them.
fn commands_print_no_key_as_it_is(node: &MeshdNode, keys: &[String], folder: &Path) {
    let (file, worlds) = (folder.join("value"), folder.join("worlds"));
    fs::create_dir_all(&worlds).unwrap();
    let (path, worlds) = (file.to_str().unwrap(), worlds.to_str().unwrap());
    let name = format!("a\x1b[31m\r\n{FORGED}\u{202e}");
    let keys = keys.iter().map(String::as_str).chain(["/meshd/config", "/meshd/peers/laptop", "/meshd/pods/shop/web"]);
    for key in keys.chain(["/meshd/networkpolicies/shop/web", name.as_str()]) {
        let quoted = serde_json::to_string(&name).unwrap();
        for value in [format!("{{{quoted}: {quoted}, \"Network\": {quoted}, \"spec\": {quoted}}}"), name.clone()] {
            fs::write(&file, value).unwrap();
            let checked = said(node, &["check", key, path]);
            assert!(!checked.success(), "{}", checked.describe());
        }
    }
    // Valid values, with an unknown field and with a rule's name, which is free text.
    fs::write(&file, json!({"Network": "10.244.0.0/16", (&name): 1}).to_string()).unwrap();
    assert!(said(node, &["check", "config", path]).stderr.contains(r"\r\n"), "the unknown field is named");
    let deny = cluster_policy(&name);
    fs::write(&file, &deny).unwrap();
    let checked = said(node, &["check", "clusternetworkpolicies/deny", path]);
    assert!(checked.success() && checked.stdout.contains(r"\u{202e}"), "{}", checked.describe());
    assert!(checked.stdout.lines().count() > 3, "a policy is printed in lines: {}", checked.describe());
    fs::write(Path::new(worlds).join("deny.json"), deny).unwrap();

    // By the name that the pod has for its port, too.
    let explain = ["policy", "explain", "shop/a", "shop/b", "tcp/http"];
    await_ok("the rule to be named", SOON, || {
        let told = node.meshctl(&explain);
        if told.code() == Some(6) { Ok(()) } else { Err(told.describe()) }
    });
    let (explained, shown) = (said(node, &explain), said(node, &["policy", "show", "deny"]));
    for told in [&explained, &shown] {
        assert!(told.success() || told.code() == Some(6), "{}", told.describe());
        assert!(told.stdout.contains(r"\u{202e}"), "{}", told.describe());
    }
    said(node, &[&explain[..], &["--offline", worlds]].concat());
    fs::write(&file, format!("{{\"pods\": [{{\"name\": {}}}]}}", serde_json::to_string(&name).unwrap())).unwrap();
    for command in [
        &["policy", "show", &name][..],
        &["policy", "explain", &name, "shop/b", "tcp/80"],
        &["policy", "explain", "shop/a", "shop/b", &name],
        &["policy", "explain", &name, "shop/b", "tcp/80", "--offline", worlds],
        &["policy", "test", path],
        &["ping", &name],
        &["peers", "config", &name],
        &["peers", "config", "laptop"],
        &["check", "config", &name],
        &["node", "remove", &name],
    ] {
        let told = said(node, command);
        assert!(!told.success(), "{}", told.describe());
    }
}

/// Denies everything by a rule of this name.
fn cluster_policy(rule: &str) -> String {
    let spec = json!({
        "tier": "Admin", "priority": 7, "subject": {"namespaces": {}},
        "ingress": [{"name": rule, "action": "Deny", "from": [{"namespaces": {}}]}],
    });
    let api = "policy.networking.k8s.io/v1alpha2";
    json!({"apiVersion": api, "kind": "ClusterNetworkPolicy", "metadata": {"name": "deny"}, "spec": spec}).to_string()
}

#[test]
fn a_key_reaches_no_terminal_as_it_is_and_no_remedy_runs_it() {
    let sites = TwoSites::with_hosts("hostile", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let node = Meshd::on(&sites.east.hosts[0], &etcd).site("east").start();
    node.await_ready(SOON);
    let folder = sites.lab.folder().join("pasted");
    fs::create_dir_all(&folder).unwrap();
    let made = folder.join("x");
    let touch = format!("touch {}", made.display());
    let keys = [
        format!("/meshd/subnets/$({touch})"),
        format!("/meshd/nodes/`{touch}`"),
        format!("/meshd/peers/a'; {touch}; '"),
        "/meshd/nodes/\x1b[2J\x1b]0;owned\x07\u{202e}\u{9b}31m".to_owned(),
        format!("/meshd/pods/shop/a\n{FORGED}"),
        format!("/meshd/networkpolicies/shop/\r\x1b'$({touch})\\'"),
        // Without its line break it is a key that must stay.
        "/meshd/config\n".to_owned(),
    ];
    for key in &keys {
        etcd.put(key, r#"{"reason": "\u001b[31m\u202e"}"#);
    }
    // One whose key is good.
    etcd.put("/meshd/peers/laptop", "{\"publicKey\": \"\u{202e}\x1b[31m\", \"al\x1b[31mlowed\u{202e}\": 1}");
    let bad = |status: &serde_json::Value| -> Vec<serde_json::Value> {
        let problems = status["problems"].as_array().unwrap().iter();
        problems.filter(|problem| matches!(problem["code"].as_str(), Some("bad_key" | "bad_value"))).cloned().collect()
    };
    node.await_status("each key to be a problem", SOON, |status| bad(status).len() == keys.len() + 1);

    for command in [&["status"][..], &["peers"], &["routes"], &["doctor"], &["policy", "list"], &["flows"]] {
        for output in ["table", "json"] {
            assert_harmless(&node.meshctl(&[&["-o", output], command].concat()));
        }
    }
    // Both say the same, once no other problem comes or goes between the two questions.
    let told = await_ok("a line for each problem", SOON, || {
        let (status, told) = (node.status(), node.meshctl(&["status"]).stdout);
        let lines = told.matches("\nproblem ").count();
        if Some(lines) == status["problems"].as_array().map(Vec::len) { Ok(told) } else { Err(told) }
    });
    assert!(told.contains(r"\u{1b}[2J") && told.contains(r"\u{202e}"), "{told}");
    let error = node.meshctl(&["policy", "show", "shop/a\x1b[31m\u{202e}"]);
    assert!(!error.success() && !acts_on_a_terminal(&error.stderr), "{}", error.describe());
    assert!(!acts_on_a_terminal(&node.log()), "{}", node.log());
    let metrics = node.host().run("curl -s http://127.0.0.1:9473/metrics").stdout;
    assert!(metrics.contains("meshd_problems") && !acts_on_a_terminal(&metrics), "{metrics}");

    for (name, address) in [("a", "10.244.200.2"), ("b", "10.244.200.3")] {
        let meta = json!({"namespace": "shop", "name": name});
        let status = json!({"phase": "Running", "podIPs": [{"ip": address}]});
        let spec = json!({"containers": [{"ports": [{"name": "http", "containerPort": 80}]}]});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status});
        etcd.put(&format!("/meshd/pods/shop/{name}"), &pod.to_string());
    }
    etcd.put("/meshd/clusternetworkpolicies/deny", &cluster_policy(&format!("a\x1b[31m\r\n{FORGED}\u{202e}")));
    commands_print_no_key_as_it_is(&node, &keys, &folder);

    // Pasted as they are shown.
    let config = etcd.get("/meshd/config");
    for shell in ["sh", "bash"] {
        for problem in bad(&node.status()) {
            let remedy = problem["remedy"].as_str().unwrap();
            if remedy.starts_with("etcdctl del ") {
                let line = format!("export ETCDCTL_API=3; cd {}; {remedy}", folder.display());
                sites.store.run_args(&[shell, "-c", &line]);
            }
        }
        assert!(!made.exists(), "{shell}: a remedy ran what is in a key");
        assert_eq!(etcd.get("/meshd/config"), config, "{shell}");
    }
    assert!(keys.iter().all(|key| etcd.get(key).is_none()), "the remedies delete them");
    await_until("the keys to be no problem any more", SOON, || (bad(&node.status()).len() == 1).then_some(()));
}
