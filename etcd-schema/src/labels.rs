//! Labels and UIDs as the API server accepts them.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    KubernetesName,
    document::describe,
    fields::{Expected, Fields},
    violation::{Report, quoted},
};

/// Labels of an object, by key.
pub type Labels = BTreeMap<String, String>;

/// Longest `metadata.uid`, in bytes.
const MAX_UID: usize = 128;

/// A Kubernetes UID, opaque text.
///
/// # Errors
/// The violated rule.
pub fn uid(text: &str) -> Result<String, Expected> {
    let plain = (1..=MAX_UID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if plain { Ok(text.to_owned()) } else { Err(format!("must be 1 to {MAX_UID} printable characters").into()) }
}

impl Fields {
    /// Labels below `labels`; those that the API server would refuse are noted.
    pub fn labels(&mut self, report: &mut Report) -> Labels {
        let path = self.path("labels");
        let map = match self.take("labels") {
            None => return Labels::new(),
            Some(Value::Object(map)) => map,
            Some(other) => {
                report.add(path, describe(&other), "must be an object of label keys and their text");
                return Labels::new();
            }
        };
        let mut labels = Labels::new();
        for (key, value) in map {
            if !is_key(&key) {
                report.add(
                    format!("{path}[{key}]"),
                    "not a label key",
                    "write an optional DNS name and \"/\", then 1 to 63 of letters, digits, \"-\", \"_\" and \
                 \".\", beginning and ending with a letter or digit",
                );
                continue;
            }
            match value {
            Value::String(text) if is_value(&text) => {
                labels.insert(key, text);
            }
            Value::String(text) => report.add(
                format!("{path}[{key}]"),
                quoted(&text),
                "a label value is empty or 1 to 63 of letters, digits, \"-\", \"_\" and \".\", beginning and ending \
                 with a letter or digit",
            ),
            other => report.add(format!("{path}[{key}]"), describe(&other), "must be text; put it in quotes"),
        }
        }
        labels
    }
}

fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => KubernetesName::read(prefix).is_ok() && is_word(name),
        None => is_word(key),
    }
}

fn is_value(value: &str) -> bool {
    value.is_empty() || is_word(value)
}

fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}
