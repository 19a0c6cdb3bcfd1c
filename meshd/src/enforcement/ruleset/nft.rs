//! The `nft` binary, for a thread that may wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _, Write as _},
    process::{Command, Stdio},
};

use serde_json::Value;

/// Why the table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(in crate::enforcement) enum NftError {
    /// The binary cannot be run.
    #[error("cannot run nft, or hear of its changes ({0}): install the package nftables")]
    Run(#[from] io::Error),
    /// It refused.
    #[error("nft refused: {0}")]
    Refused(String),
    /// Its listing has a form that we do not know.
    #[error("cannot read nft's listing: {0}")]
    Listing(#[from] serde_json::Error),
    /// Marks of judgements that no longer hold are still there.
    #[error("connections of before cannot be marked for judging anew: {0}")]
    Marks(io::Error),
    /// What is there now is not known.
    #[error("somebody else changes the tables of policies at the same time")]
    Tampered,
}

/// What is in a table, without the elements of its sets and maps.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// Chains, each with its number of rules.
    pub(super) chains: BTreeMap<String, usize>,
    pub(super) sets: BTreeSet<String>,
    pub(super) maps: BTreeSet<String>,
}

/// Applies these commands as one.
pub(super) fn apply(text: &str) -> Result<(), NftError> {
    run(&["-f", "-"], text).map(drop)
}

/// The table `family name`; `None`: there is none.
pub(super) fn list(family: &str, name: &str) -> Result<Option<Listing>, NftError> {
    let json = match run(&["-j", "-t", "list", "table", family, name], "") {
        Ok(json) => json,
        Err(NftError::Refused(message)) if message.contains("No such file or directory") => return Ok(None),
        Err(error) => return Err(error),
    };
    let document: Value = serde_json::from_slice(&json)?;
    let mut listing = Listing::default();
    let text = |item: &Value, field: &str| item[field].as_str().unwrap_or_default().to_owned();
    for item in document["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = item.get("chain") {
            listing.chains.entry(text(chain, "name")).or_default();
        } else if let Some(rule) = item.get("rule") {
            *listing.chains.entry(text(rule, "chain")).or_default() += 1;
        } else if let Some(set) = item.get("set") {
            listing.sets.insert(text(set, "name"));
        } else if let Some(map) = item.get("map") {
            listing.maps.insert(text(map, "name"));
        }
    }
    Ok(Some(listing))
}

fn run(args: &[&str], input: &str) -> Result<Vec<u8>, NftError> {
    let mut child = Command::new("nft")
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let mut output = Vec::new();
    let mut errors = Vec::new();
    std::thread::scope(|scope| -> io::Result<()> {
        // A broken pipe means that nft has ended already: its status says why.
        scope.spawn(|| stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        scope.spawn(|| stderr.map(|mut stderr| stderr.read_to_end(&mut errors)));
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_end(&mut output)?;
        }
        Ok(())
    })?;
    if child.wait()?.success() {
        return Ok(output);
    }
    Err(NftError::Refused(String::from_utf8_lossy(&errors).trim().chars().take(400).collect()))
}
