//! Every world in `tests/worlds/` and, where POLICY_WORLDS names more files, in those.

#![allow(clippy::disallowed_methods, reason = "a test may begin at any instant")]

use std::{fs, path::PathBuf, time::Instant};

#[test]
fn worlds_agree() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/worlds");
    let own = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let more = std::env::var("POLICY_WORLDS").unwrap_or_default();
    let more: Vec<PathBuf> = more.split_whitespace().map(PathBuf::from).collect();
    let (mut checked, mut wrong) = (0, Vec::new());
    for file in own.chain(more) {
        for line in fs::read_to_string(&file).unwrap().lines().filter(|line| !line.trim().is_empty()) {
            match policy::expect::run(&serde_json::from_str(line).unwrap(), Instant::now()) {
                Ok(outcome) => {
                    checked += outcome.checked;
                    wrong.extend(outcome.differences.iter().map(ToString::to_string));
                }
                Err(error) => wrong.push(error.to_string()),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {checked} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(checked > 0, "no world found");
}
