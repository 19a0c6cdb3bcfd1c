//! Objects beside what `meshctl check` says of them, one case a file in `tests/golden`.
//!
//! A file is `key: KEY`, then `ok: SUMMARY` or one `error: VIOLATION` for each, an empty line, and the value to the end
//! of the file. `UPDATE_GOLDEN=1` rewrites the second part, to be read before it is committed.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its case has failed")]

use std::{fs, path::Path};

use etcd_schema::{Key, KubernetesKey};
use policy::objects;

fn kubernetes(key: &str) -> Result<KubernetesKey, String> {
    match Key::parse(key) {
        Ok(Key::Kubernetes(_, key)) => Ok(key),
        Ok(other) => panic!("{other}"),
        Err(error) => Err(format!("error: {error}")),
    }
}

/// What is said of `value`; the canonical form of one that holds says the same.
fn said(key: &str, value: &[u8]) -> String {
    let key = match kubernetes(key) {
        Ok(key) => key,
        Err(said) => return said,
    };
    match objects::read(&key, value, false) {
        Ok(reading) => {
            let again = objects::read(&key, &reading.canonical, false).unwrap();
            assert_eq!((&again.object, &again.canonical), (&reading.object, &reading.canonical));
            format!("ok: {}", objects::summary(&key, &reading.object))
        }
        Err(refusal) => {
            let errors: Vec<String> = refusal.violations.as_slice().iter().map(|v| format!("error: {v}")).collect();
            errors.join("\n")
        }
    }
}

#[test]
fn objects_say_what_their_files_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut wrong = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let content = fs::read(&path).unwrap();
        let split = content.windows(2).position(|w| w == b"\n\n").unwrap();
        let (head, value) = (std::str::from_utf8(&content[..split]).unwrap(), &content[split + 2..]);
        let (first, expected) = head.split_once('\n').unwrap();
        let said = said(first.strip_prefix("key: ").unwrap(), value);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, [first.as_bytes(), b"\n", said.as_bytes(), b"\n\n", value].concat()).unwrap();
        } else if said != expected {
            wrong.push(format!("{}:\n{said}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "these say something else now:\n{}", wrong.join("\n"));
}

#[test]
fn reasons_are_short_whatever_the_value() {
    let key = kubernetes("namespaces/a").unwrap();
    let refusal = |value: String| objects::read(&key, value.as_bytes(), false).unwrap_err().violations.to_string();
    assert!(refusal(format!("{{\"kind\":\"{}\",\"metadata\":{{}}}}", "z".repeat(100_000))).len() < 1000);
    let labels: String = (0..10_000).map(|n| format!("\"-{n}\":1,")).collect();
    let said = refusal(format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{{\"name\":\"a\",\"labels\":{{{labels}\"x\":\"y\"}}}}}}"
    ));
    assert!(said.contains("9968 more mistakes") && said.len() < 8000, "{said}");
    let fields: String = (0..100_000).map(|n| format!("\"f{n}\":1,")).collect();
    let said = refusal(format!("{{\"metadata\":{{{fields}"));
    assert!(said.starts_with("metadata is longer than 16384 fields"), "{said}");
}
