//! Netfilter access for the daemon: one runner of `nft` with one deadline, the ruleset's generation, a monitor of
//! tables, listings and the path of a packet through them, and nfnetlink messages. All calls block and need no runtime.

mod generation;
mod listing;
mod monitor;
pub mod nfnetlink;
mod process;
mod walk;

pub use generation::Generation;
pub use listing::{
    AcceptedPrefixes, Counter, ForeignRules, ListedChain, ListedSet, ListingError, TableListing, accepted,
    foreign_rules, items, prefix,
};
pub use monitor::{NftMonitor, TableChanges, is_of_rules};
pub use process::{LOAD_DEADLINE, NftError, READ_DEADLINE, is_identifier, nft, run};
pub use walk::{ListedRuleset, ProbePacket, Taken, expressions, table as table_of};
