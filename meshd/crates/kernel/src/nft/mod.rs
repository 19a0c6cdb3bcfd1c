//! nftables: a table as data, its difference from the kernel's, and the `nft` binary that reads and writes it.

mod listing;
mod process;
mod table;
mod walk;

pub use listing::{AcceptedPrefixes, ForeignRules, ListingError, accepted, items};
pub(crate) use listing::{foreign_rules, parse_table};
pub use process::run;
pub use process::{Nft, NftTableError};
pub use table::{
    BaseChain, Chain, Counter, Element, NftRule, NftSet, NftTable, NftTransaction, ObservedChain, ObservedSet,
    ObservedTable, SetKind, TableDiff,
};
pub use walk::{ListedRuleset, ProbePacket, Taken, expressions, table as table_of};

use std::future::Future;

/// Where rulesets are read from and written to. One transaction is applied whole or not at all.
pub trait NftBackend {
    /// The table `inet name`, or `None` if there is none.
    fn table(&self, name: &str) -> impl Future<Output = Result<Option<ObservedTable>, NftTableError>> + Send;

    /// Applies a transaction.
    fn apply(&self, transaction: &NftTransaction) -> impl Future<Output = Result<(), NftTableError>> + Send;
}
