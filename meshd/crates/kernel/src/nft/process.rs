//! The `nft` binary: JSON listings out, commands in.

use std::process::Output;

use netfilter::{ListingError, NftError, READ_DEADLINE, is_identifier};
use thiserror::Error;
use tokio::task::spawn_blocking;

use super::{NftBackend, NftTransaction, ObservedTable, parse_table};

/// Why a ruleset could not be read or written.
#[derive(Debug, Error)]
pub enum NftTableError {
    /// `nft` did not do it.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// Its listing has a form that we do not know.
    #[error("cannot read nft's listing: {0}")]
    Listing(#[from] ListingError),
}

impl NftTableError {
    /// The remedy.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Nft(error) => error.remedy(),
            Self::Listing(_) => "use nftables 1.0 or newer",
        }
    }
}

/// Runs `nft` in the network namespace of the calling thread.
#[derive(Debug, Clone, Copy)]
pub struct Nft {
    program: &'static str,
}

impl Default for Nft {
    fn default() -> Self {
        Self { program: "nft" }
    }
}

impl Nft {
    /// Another program in its place, that fails.
    #[cfg(test)]
    pub(crate) fn with_program(program: &'static str) -> Self {
        Self { program }
    }

    /// The standard output of `nft -j ARGS`; `None` if the object does not exist.
    pub async fn list(&self, args: &[&str]) -> Result<Option<Vec<u8>>, NftTableError> {
        match self.run([&["-j"], args].concat(), "".to_owned()).await {
            Ok(json) => Ok(Some(json)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn run(&self, args: Vec<&str>, input: String) -> Result<Vec<u8>, NftError> {
        let program = self.program;
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        wait(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            netfilter::nft(program, &args, &input, READ_DEADLINE)
        })
        .await
    }
}

/// Runs a program that shows rulesets as iptables has them.
pub async fn run(program: &'static str, args: &'static [&'static str]) -> Result<Output, NftError> {
    wait(move || netfilter::run(program, args, "", READ_DEADLINE)).await
}

/// Has another thread of the runtime wait. The runtime starts it in the network namespace of its own threads.
async fn wait<T: Send + 'static>(run: impl FnOnce() -> Result<T, NftError> + Send + 'static) -> Result<T, NftError> {
    // It fails where the runtime shuts down.
    spawn_blocking(run).await.unwrap_or_else(|error| Err(NftError::Pipe(error.into())))
}

impl NftBackend for Nft {
    async fn table(&self, name: &str) -> Result<Option<ObservedTable>, NftTableError> {
        debug_assert!(is_identifier(name), "table names come from validated options");
        match self.list(&["list", "table", "inet", name]).await? {
            Some(json) => Ok(Some(parse_table(&json)?)),
            None => Ok(None),
        }
    }

    async fn apply(&self, transaction: &NftTransaction) -> Result<(), NftTableError> {
        if transaction.is_empty() {
            return Ok(());
        }
        self.run(vec!["-f", "-"], transaction.text()).await?;
        Ok(())
    }
}
