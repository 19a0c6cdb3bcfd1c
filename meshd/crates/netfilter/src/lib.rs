//! Netfilter as the daemon uses it: one runner of `nft` with one deadline, the ruleset's generation, a monitor of tables,
//! and nfnetlink messages. Everything here blocks and needs no runtime.

mod generation;
mod monitor;
pub mod nfnetlink;
mod process;

pub use generation::Generation;
pub use monitor::{NftMonitor, TableChanges, is_of_rules};
pub use process::{LOAD_DEADLINE, NftError, READ_DEADLINE, nft, run};
