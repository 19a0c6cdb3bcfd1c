//! Keys and values beside what `check` says of them, one case a file in `tests/golden`.
//!
//! A file is `key: KEY`, then `ok: SUMMARY` or one `error: VIOLATION` for each, an empty line, and the value to the end
//! of the file. `UPDATE_GOLDEN=1` rewrites the second part, to be read before it is committed.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its case has failed")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use etcd_schema::{
    Alive, Attachment, CheckError, Key, KubernetesKey, NetworkConfig, NodeRecord, OutsidePeer, Removed, SubnetLease,
    check,
};

struct Case {
    name: String,
    key: String,
    says: Vec<String>,
    value: Vec<u8>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let content = fs::read(&path).unwrap();
        let split = content.windows(2).position(|w| w == b"\n\n").unwrap();
        let head = std::str::from_utf8(&content[..split]).unwrap();
        let mut lines = head.lines();
        let key = lines.next().unwrap().strip_prefix("key: ").unwrap().to_owned();
        cases.push(Case {
            name: path.file_name().unwrap().to_str().unwrap().to_owned(),
            key,
            says: lines.map(str::to_owned).collect(),
            value: content[split + 2..].to_vec(),
        });
    }
    cases
}

fn said(case: &Case) -> Vec<String> {
    match check(&case.key, &case.value) {
        Ok(checked) => vec![format!("ok: {}", checked.summary)],
        Err(CheckError::Key(e)) => vec![format!("error: {e}")],
        Err(CheckError::Value(violations)) => violations.as_slice().iter().map(|v| format!("error: {v}")).collect(),
    }
}

/// The value of `key` as this crate rewrites it, if it writes such values.
fn rewritten(key: &Key, value: &[u8]) -> Option<Vec<u8>> {
    Some(match key {
        Key::Config => NetworkConfig::parse(value).unwrap().to_json(),
        Key::Subnet(_) => SubnetLease::parse(value).unwrap().to_json(),
        Key::Node(_) => NodeRecord::parse(value).unwrap().to_json(),
        Key::Removed(_) => Removed::parse(value).unwrap().to_json(),
        Key::Alive(_) => Alive::parse(value).unwrap().to_json(),
        Key::Peer(_) => OutsidePeer::parse(value).unwrap().to_json(),
        Key::Endpoint(..) => Attachment::parse(value).unwrap().to_json(),
        _ => return None,
    })
}

#[test]
fn check_says_what_the_file_says() {
    let mut wrong = Vec::new();
    for case in cases() {
        let said = said(&case);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let head = format!("key: {}\n{}\n\n", case.key, said.join("\n"));
            fs::write(folder().join(&case.name), [head.as_bytes(), &case.value].concat()).unwrap();
        } else if said != case.says {
            wrong.push(format!("{}:\n  {}", case.name, said.join("\n  ")));
        }
    }
    assert!(wrong.is_empty(), "these say something else now:\n{}", wrong.join("\n"));
}

#[test]
fn what_holds_says_the_same_after_a_rewrite() {
    for case in cases() {
        let Ok(checked) = check(&case.key, &case.value) else { continue };
        assert_eq!(checked.key.to_string(), case.key, "{}", case.name);
        let Some(written) = rewritten(&checked.key, &case.value) else { continue };
        let again = check(&case.key, &written).unwrap();
        assert_eq!(again.summary, checked.summary, "{}", case.name);
        assert_eq!(rewritten(&checked.key, &written).unwrap(), written, "{}", case.name);
    }
}

#[test]
fn every_kind_of_key_has_a_case_that_holds_and_one_that_does_not() {
    let (mut held, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for case in cases() {
        let kind = case.key.split('/').next().unwrap().to_owned();
        if case.says[0].starts_with("ok: ") {
            held.insert(kind)
        } else {
            refused.insert(kind)
        };
    }
    // Objects of Kubernetes are read, and have their cases, in `policy`.
    let objects: Vec<&str> = KubernetesKey::directories().collect();
    for directory in Key::directories().filter(|directory| !objects.contains(directory)).chain([Key::CONFIG]) {
        let kind = directory.trim_end_matches('/');
        assert!(held.contains(kind), "{kind}: no valid case");
        assert!(refused.contains(kind), "{kind}: no invalid case");
    }
}

#[test]
fn no_message_repeats_a_secret() {
    for case in cases() {
        for line in said(&case) {
            assert!(!line.contains("c2VjcmV0"), "{}: {line}", case.name);
        }
    }
}
