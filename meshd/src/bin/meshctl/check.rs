//! `meshctl check`: a value before `etcdctl put`.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use anyhow::Context as _;
use meshd::policy_tool;
use serde::Serialize;

use crate::{
    exit::Usage,
    output::{Output, print},
};

/// What `check` prints of a value that holds; one that does not is an error.
#[derive(Serialize)]
struct Checked {
    /// Without the prefix.
    key: String,
    holds: bool,
    summary: String,
}

/// Prints what the value says, or fails with why it does not hold.
pub(crate) fn run(output: Output, key: &str, file: &Path, prefix: &str) -> anyhow::Result<u8> {
    let checked = check(key, file, prefix)?;
    print(output, &checked, |checked| format!("{} holds: {}\n", checked.key, checked.summary))?;
    Ok(0)
}

fn check(key: &str, file: &Path, prefix: &str) -> anyhow::Result<Checked> {
    let prefix = prefix.trim_end_matches('/');
    let relative = key.strip_prefix(prefix).map_or(key, |rest| rest.trim_start_matches('/'));
    let mut value = Vec::new();
    // One byte more than etcd takes, so that a value that is too long is seen to be.
    let limit = etcd_schema::MAX_VALUE_BYTES as u64 + 1;
    if file.as_os_str() == "-" {
        io::stdin().take(limit).read_to_end(&mut value).context("standard input")?;
    } else {
        let opened = File::open(file).map_err(|error| Usage(format!("{}: {error}", file.display())))?;
        opened.take(limit).read_to_end(&mut value).with_context(|| file.display().to_string())?;
    }
    let checked = policy_tool::check(relative, &value)?;
    Ok(Checked { key: relative.to_owned(), holds: true, summary: checked.summary })
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
        std::fs::write(file.path(), r#"{"Network": "nonsense"}"#).unwrap();
        assert!(check("config", file.path(), "/meshd").is_err());
    }
}
