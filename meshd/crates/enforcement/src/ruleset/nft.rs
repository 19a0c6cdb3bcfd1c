//! Policy tables through the `nft` binary, for a thread that may wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use netfilter::{LOAD_DEADLINE, NftError};
use serde_json::Value;

/// Why the tables of policies could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RulesetError {
    /// `nft` did not do it.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// Changes of the tables cannot be monitored.
    #[error("cannot monitor nftables: {0}")]
    Monitor(#[from] io::Error),
    /// Its listing has a form that we do not know.
    #[error("cannot read nft's listing: {0}")]
    Listing(#[from] serde_json::Error),
    /// The content of the tables is unknown.
    #[error("another program changes the policy tables at the same time")]
    Tampered,
}

/// The content of a table, without the elements of its sets and maps.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TableListing {
    /// Chains, each with its number of rules.
    pub(super) chains: BTreeMap<String, usize>,
    pub(super) sets: BTreeSet<String>,
    pub(super) maps: BTreeSet<String>,
}

/// Applies these commands as one.
pub(super) fn apply(text: &str) -> Result<(), RulesetError> {
    netfilter::nft("nft", &["-f", "-"], text, LOAD_DEADLINE)?;
    Ok(())
}

/// The table `family name`; `None`: it does not exist.
pub(super) fn list(family: &str, name: &str) -> Result<Option<TableListing>, RulesetError> {
    let json = match netfilter::nft("nft", &["-j", "-t", "list", "table", family, name], "", LOAD_DEADLINE) {
        Ok(json) => json,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let document: Value = serde_json::from_slice(&json)?;
    let mut listing = TableListing::default();
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
