//! `meshctl node remove`, as an operator calls it on a node.
//!
//! ```text
//!   east1 ── switch ── router ── etcd
//! ```

use std::fs;

use integration::{
    Meshd, binary,
    topology::{CONFIG, TwoSites},
};
use serde_json::Value;

use crate::SOON;

#[test]
fn it_reads_the_settings_file_and_spares_a_node_that_is_online_with_pods() {
    let sites = TwoSites::with_hosts("removal", 1);
    let etcd = sites.start_etcd(1);
    etcd.put("/other/config", CONFIG);
    let (host, away) = (&sites.east.hosts[0], &sites.west.hosts[0]);
    let node = Meshd::on(host, &etcd).site("east").args("--etcd-prefix /other").start();
    let id = node.await_ready(SOON)["id"].as_str().unwrap().to_owned();

    let folder = tempfile::tempdir().unwrap();
    let settings = folder.path().join("meshd.toml");
    let file = |text: &str| fs::write(&settings, text).unwrap();
    let remove = |name: &str, more: &[&str]| {
        let program = binary("meshctl");
        let command = ["env", "-u", "MESHD_CONFIG", program.to_str().unwrap(), "-o", "json", "node", "remove", name];
        away.try_run(&[&command[..], &["--config", settings.to_str().unwrap()], more].concat())
    };
    file(&format!("etcd-endpoints = ['{}']\netcd-allow-plaintext = true\n", etcd.endpoints()));
    let other = remove("east1", &[]);
    assert!(other.code() == Some(5) && other.stderr.contains("no node has the name"), "{}", other.describe());
    file(&format!(
        "node = 'west1'\nlisten-port = 'wrong'\netcd-endpoints = ['{}']\netcd-allow-plaintext = true\netcd-prefix = '/other'\n",
        etcd.endpoints()
    ));

    // As its daemon would write it, at once when it is away: what it does not know of it takes back.
    node.stop();
    let pod = r#"{"pod":{"namespace":"shop","name":"web"},"addresses":["10.244.1.9"],"interface":"veth0"}"#;
    etcd.put(&format!("/other/endpoints/{id}/c1/eth0"), pod);
    let refused = remove("east1", &[]);
    assert_eq!(refused.code(), Some(1), "{}", refused.describe());
    for words in ["east1 was not removed", "is online with 1 pod attached", "shop/web", "--force"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.describe());
    }
    assert!(etcd.get(&format!("/other/nodes/{id}")).is_some() && etcd.get(&format!("/other/removed/{id}")).is_none());
    let removed = remove("east1", &["--force"]);
    let told: Value = serde_json::from_str(&removed.stdout).unwrap_or_else(|_| panic!("{}", removed.describe()));
    assert_eq!((&told["id"], &told["pods"]), (&id.as_str().into(), &serde_json::json!(["shop/web"])));
    assert!(etcd.get(&format!("/other/removed/{id}")).is_some());
    node.cont();
    node.await_status("to know that it was removed", SOON, |status| status["state"] == "removed");
}
