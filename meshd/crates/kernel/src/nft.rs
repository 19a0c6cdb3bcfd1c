//! nftables: a table as data, its difference from the kernel's, and the `nft` binary that reads and writes it.

mod listing;
mod process;
mod table;

pub(crate) use listing::parse_table;
pub use process::{Nft, NftTableError, run};
pub use table::{
    BaseChain, Chain, Element, NftRule, NftSet, NftTable, NftTransaction, ObservedSet, ObservedTable, SetKind,
    TableDiff,
};

use std::future::Future;

/// Where rulesets are read from and written to. One transaction is applied whole or not at all.
pub trait NftBackend {
    /// The table `inet name`, or `None` if there is none.
    fn table(&self, name: &str) -> impl Future<Output = Result<Option<ObservedTable>, NftTableError>> + Send;

    /// Applies a transaction.
    fn apply(&self, transaction: &NftTransaction) -> impl Future<Output = Result<(), NftTableError>> + Send;
}
