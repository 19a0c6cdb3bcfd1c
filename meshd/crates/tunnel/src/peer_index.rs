//! The name of a peer within the process.

/// Names a peer for as long as it is in the table, across tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PeerIndex(pub(super) u32);
