//! nftables: a table as data, its difference to the kernel's, and the `nft` binary that reads and writes it.

mod generation;
mod heard;
mod listing;
mod process;
mod table;

pub(crate) use generation::Generation;
pub(crate) use heard::{Heard, Watch};
pub use listing::ListingError;
pub(crate) use listing::{Accepted, parse_accepted, parse_chains, parse_foreign_chain, parse_table};
pub(crate) use process::run;
pub use process::{Nft, RulesetError};
pub(crate) use table::is_identifier;
pub use table::{
    BaseChain, Chain, Counter, Element, ObservedChain, ObservedSet, ObservedTable, Rule, Set, SetKind, Table,
    TableDiff, Transaction,
};

use std::future::Future;

/// Where rulesets are read from and written to. One transaction is applied whole or not at all.
pub trait Ruleset {
    /// The table `inet name`, or `None` if there is none.
    fn table(&self, name: &str) -> impl Future<Output = Result<Option<ObservedTable>, RulesetError>> + Send;

    /// Applies a transaction.
    fn apply(&self, transaction: &Transaction) -> impl Future<Output = Result<(), RulesetError>> + Send;
}
