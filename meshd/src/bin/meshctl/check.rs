//! `meshctl check`: validates a value before `etcdctl put`.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use anyhow::{Context as _, bail};
use meshd::policy_tool;
use serde::{Deserialize, Serialize};
use text::{printable, with_causes};

use crate::{
    exit::{FAILED, UsageError},
    output::{Output, print, print_error, print_lines},
};

/// The output of `check`.
#[derive(Serialize, Deserialize)]
struct CheckOutput {
    /// Without the prefix.
    key: String,
    holds: bool,
    /// The summary of the value; of a policy, in lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<String>,
    /// Fields that are kept and not read.
    unknown: Vec<Unknown>,
    /// Why it does not hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Unknown {
    path: String,
    /// The field that may be meant.
    meant: Option<String>,
    /// For people.
    #[serde(skip)]
    text: String,
}

/// Prints the summary of the value, or its violations.
pub(crate) fn run(output: Output, key: &str, file: &Path, prefix: &str) -> anyhow::Result<u8> {
    let checked = check(key, file, prefix)?;
    if let (Some(error), Output::Table) = (&checked.error, output) {
        bail!("{error}");
    }
    for Unknown { text, .. } in checked.unknown.iter().filter(|_| output == Output::Table) {
        print_error(&[format!("warning: {text}")]);
    }
    match output {
        Output::Json => print(output, &checked, |_| String::new())?,
        // The summary of a policy consists of lines.
        Output::Table => {
            let summary = checked.summary.as_deref().unwrap_or_default();
            print_lines(&format!("{} is valid: {summary}\n", printable(&checked.key)))?;
        }
    }
    Ok(if checked.holds { 0 } else { FAILED })
}

fn check(key: &str, file: &Path, prefix: &str) -> anyhow::Result<CheckOutput> {
    let prefix = prefix.trim_end_matches('/');
    let relative = key.strip_prefix(prefix).map_or(key, |rest| rest.trim_start_matches('/'));
    let mut value = Vec::new();
    // One byte more than etcd takes, so that a value that is too long is seen to be.
    let limit = etcd_schema::MAX_VALUE_BYTES as u64 + 1;
    if file.as_os_str() == "-" {
        io::stdin().take(limit).read_to_end(&mut value).context("standard input")?;
    } else {
        let opened = File::open(file).map_err(|error| UsageError(format!("{}: {error}", file.display())))?;
        opened.take(limit).read_to_end(&mut value).with_context(|| file.display().to_string())?;
    }
    let key = relative.to_owned();
    Ok(match policy_tool::check(relative, &value) {
        Ok(checked) => {
            let unknown = checked.unknown.into_iter();
            let unknown = unknown
                .map(|field| Unknown {
                    text: field.to_string(),
                    path: field.path,
                    meant: field.meant.map(str::to_owned),
                })
                .collect();
            CheckOutput { key, holds: true, summary: Some(checked.summary), unknown, error: None }
        }
        Err(error) => {
            CheckOutput { key, holds: false, summary: None, unknown: Vec::new(), error: Some(with_causes(&error)) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_holds_is_told_as_json() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"Network": "10.244.0.0/16"}"#).unwrap();
        let checked = check("/meshd/config", file.path(), "/meshd").unwrap();
        let json = serde_json::to_value(&checked).unwrap();
        assert_eq!((&json["key"], &json["holds"]), (&"config".into(), &true.into()));
        assert!(json["summary"].as_str().is_some_and(|summary| summary.contains("10.244.0.0/16")), "{json}");
        assert_eq!(json["unknown"], serde_json::json!([]));
    }

    #[test]
    fn a_value_that_does_not_hold_is_told_as_json_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"Network": "nonsense"}"#).unwrap();
        let json = serde_json::to_value(check("config", file.path(), "/meshd").unwrap()).unwrap();
        assert_eq!(json["holds"], false);
        assert!(json["error"].as_str().is_some_and(|error| error.contains("Network")), "{json}");
        assert!(run(Output::Table, "config", file.path(), "/meshd").is_err());
    }

    #[test]
    fn a_misspelt_field_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"Network": "10.244.0.0/16", "LeesTTL": 60}"#).unwrap();
        let json = serde_json::to_value(check("config", file.path(), "/meshd").unwrap()).unwrap();
        let unknown = serde_json::json!([{"path": "LeesTTL", "meant": "LeaseTTL"}]);
        assert_eq!((&json["holds"], &json["unknown"]), (&true.into(), &unknown));
    }
}
