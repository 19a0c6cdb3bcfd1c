//! The values in docs/etcd.md are values that a real etcd takes and the daemon's own code accepts.
//!
//! ```text
//!   store: etcd ◀── etcdctl put, one value of docs/etcd.md after the other
//!          meshctl check
//! ```

use std::{collections::BTreeSet, fs, path::Path};

use integration::{Etcd, Lab, binary};

/// Key and value of every block that begins with "```json KEY".
fn examples(text: &str) -> Vec<(String, String)> {
    let mut examples = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(key) = line.strip_prefix("```json ") {
            let value: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            examples.push((key.trim().to_owned(), value.join("\n")));
        }
    }
    examples
}

#[test]
fn every_example_is_taken_by_etcd_and_accepted() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/etcd.md");
    let examples = examples(&fs::read_to_string(file).unwrap());
    let kinds: BTreeSet<&str> = examples.iter().map(|(key, _)| key.split('/').next().unwrap()).collect();
    for kind in [
        "config",
        "subnets",
        "nodes",
        "peers",
        "removed",
        "alive",
        "endpoints",
        "namespaces",
        "pods",
        "networkpolicies",
        "clusternetworkpolicies",
    ] {
        assert!(kinds.contains(kind), "docs/etcd.md has an example of {kind}");
    }
    let lab = Lab::new("docs");
    let store = lab.host("store");
    let etcd = Etcd::start(&store, &["127.0.0.1"], 1);
    let meshctl = binary("meshctl");
    for (key, value) in &examples {
        let whole = format!("/meshd/{key}");
        etcd.put(&whole, value);
        let read = etcd.get(&whole).unwrap();
        assert_eq!(&read, value);
        let checked = store.run_with_input(&[&meshctl.to_string_lossy(), "check", key, "-"], &read);
        assert!(checked.success(), "{key}: {}", checked.describe());
    }
    // `config` has two forms.
    let keys: BTreeSet<&String> = examples.iter().map(|(key, _)| key).collect();
    assert_eq!(etcd.get_prefix("/meshd/").len(), keys.len());
}
