//! Policy tables through the `nft` binary, for a thread that may wait.

use std::io;

use netfilter::{LOAD_DEADLINE, ListingError, NftError, TableListing};

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
    Listing(#[from] ListingError),
    /// The content of the tables is unknown.
    #[error("another program changes the policy tables at the same time")]
    Tampered,
}

/// Applies these commands as one.
pub(super) fn apply(text: &str) -> Result<(), RulesetError> {
    netfilter::nft("nft", &["-f", "-"], text, LOAD_DEADLINE)?;
    Ok(())
}

/// The table `family name`, without the elements of its sets and maps; `None`: it does not exist.
pub(super) fn list(family: &str, name: &str) -> Result<Option<TableListing>, RulesetError> {
    let json = match netfilter::nft("nft", &["-j", "-t", "list", "table", family, name], "", LOAD_DEADLINE) {
        Ok(json) => json,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(TableListing::parse(&json)?))
}
