//! The `nft` binary: JSON listings out, commands in.

use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::listing::ListingError;
use super::table::is_identifier;
use super::{ObservedTable, Ruleset, Transaction, parse_table};

/// A ruleset of many thousand rules is listed within this.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why a ruleset could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RulesetError {
    /// The binary cannot be started.
    #[error("cannot run nft ({0}): install the package nftables")]
    Start(#[source] io::Error),
    /// It gave no answer.
    #[error("nft gave no answer within {} s", DEADLINE.as_secs())]
    Deadline,
    /// Talking to it failed.
    #[error("cannot talk to nft: {0}")]
    Pipe(#[source] io::Error),
    /// It refused.
    #[error("nft refused: {message}")]
    Refused {
        /// The beginning of what it said.
        message: String,
    },
    /// Its listing has a form that we do not know.
    #[error("cannot read nft's listing: {0}")]
    Listing(#[from] ListingError),
}

impl RulesetError {
    /// What an operator can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Start(_) => "install the package nftables",
            Self::Deadline | Self::Pipe(_) => "look for a hanging nft process or an exhausted host",
            Self::Refused { .. } => {
                "check that the kernel has nf_tables with fib, nat and set support, and who else edits the table"
            }
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

    /// `nft -j ARGS`, its standard output. `None` where what was asked for does not exist.
    pub(crate) async fn list(&self, args: &[&str]) -> Result<Option<Vec<u8>>, RulesetError> {
        let mut all = vec!["-j"];
        all.extend_from_slice(args);
        let output = run(self.program, &all, "").await?;
        if output.status.success() {
            return Ok(Some(output.stdout));
        }
        let message = String::from_utf8_lossy(&output.stderr);
        if message.contains("No such file or directory") {
            return Ok(None);
        }
        Err(refused(&message))
    }
}

impl Ruleset for Nft {
    async fn table(&self, name: &str) -> Result<Option<ObservedTable>, RulesetError> {
        debug_assert!(is_identifier(name), "table names come from validated options");
        match self.list(&["list", "table", "inet", name]).await? {
            Some(json) => Ok(Some(parse_table(&json)?)),
            None => Ok(None),
        }
    }

    async fn apply(&self, transaction: &Transaction) -> Result<(), RulesetError> {
        if transaction.is_empty() {
            return Ok(());
        }
        let output = run(self.program, &["-f", "-"], &transaction.text()).await?;
        if output.status.success() { Ok(()) } else { Err(refused(&String::from_utf8_lossy(&output.stderr))) }
    }
}

fn refused(message: &str) -> RulesetError {
    RulesetError::Refused { message: message.trim().chars().take(400).collect() }
}

/// Runs a program to its end, or to the deadline, with `input` on its standard input.
pub(crate) async fn run(program: &str, args: &[&str], input: &str) -> Result<Output, RulesetError> {
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(RulesetError::Start)?;
    let stdin = child.stdin.take();
    let talk = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // A broken pipe means that nft has ended already: its status says why.
                match stdin.write_all(input.as_bytes()).await {
                    Err(e) if e.kind() != io::ErrorKind::BrokenPipe => return Err(e),
                    _ => {}
                }
            }
            Ok(())
        };
        let (written, output) = tokio::join!(write, child.wait_with_output());
        written?;
        output
    };
    tokio::time::timeout(DEADLINE, talk).await.map_err(|_| RulesetError::Deadline)?.map_err(RulesetError::Pipe)
}
