//! Keys that somebody wrote to harm who looks at them.
//!
//! ```text
//!   east1 ── switch ── router ── store: etcd
//! ```

use std::fs;

use integration::{
    Meshd, await_ok, await_until,
    topology::{CONFIG, TwoSites},
};

use crate::SOON;

/// What a terminal acts on, beside the line breaks of our own.
fn acts_on_a_terminal(text: &str) -> bool {
    let is_bidi =
        |c| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.contains(|c: char| (c.is_control() && c != '\n') || is_bidi(c))
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
        "/meshd/pods/shop/a\nproblem   none: all is well".to_owned(),
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
            let told = node.meshctl(&[&["-o", output], command].concat());
            assert!(!acts_on_a_terminal(&told.stdout) && !acts_on_a_terminal(&told.stderr), "{}", told.describe());
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
