//! Netfilter access for the daemon: one runner of `nft` with one deadline, the ruleset's generation, a monitor of
//! tables, and nfnetlink messages. All calls block and need no runtime.

mod generation;
mod monitor;
pub mod nfnetlink;
mod process;

pub use generation::Generation;
pub use monitor::{NftMonitor, TableChanges, is_of_rules};
pub use process::{LOAD_DEADLINE, NftError, READ_DEADLINE, is_identifier, nft, run};
