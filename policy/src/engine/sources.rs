//! Underlay addresses of nodes, which their overlay addresses also count as, as the source of a flow.
//!
//! A process of a node reaches pods from the node's overlay address, which is chosen at random: an `ipBlock` of the
//! nodes' network could never match it. So an allowing block matches by addresses proven to be the node's, and an
//! excluding one also by addresses that it merely publishes:
//!
//! ```text
//! surely in the block   the overlay address or a proven one lies in `cidr`, and none of them in `except`
//! may be in the block   any of all lies in `cidr` and not in `except`
//! ```
//!
//! An accepting rule never matches a source that is only possibly in its block; a denying rule always does.

use std::net::IpAddr;

use crate::object::Block;

/// The addresses that a node's overlay address also counts as. Callers keep both lists short: every new flow of the
/// node searches them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceAliases {
    /// Addresses that are proven to be this node's alone.
    pub proven: Vec<IpAddr>,
    /// Addresses that the node publishes; proven ones need not be among them.
    pub published: Vec<IpAddr>,
}

impl SourceAliases {
    /// Whether there are none at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.proven.is_empty() && self.published.is_empty()
    }

    /// The addresses that count for an accepting rule.
    pub(crate) fn accepting(&self, own: IpAddr) -> impl Iterator<Item = IpAddr> {
        std::iter::once(own).chain(self.proven.iter().copied())
    }

    /// The addresses that count for a denying rule, and for `except`.
    pub(crate) fn all(&self, own: IpAddr) -> impl Iterator<Item = IpAddr> {
        self.accepting(own).chain(self.published.iter().copied())
    }

    /// Whether the node with the overlay address `own` is in `block`, and whether it only may be.
    pub(crate) fn in_block(&self, own: IpAddr, block: &Block) -> Option<bool> {
        let accepted = self.accepting(own).any(|address| block.cidr.contains(&address));
        if accepted && !self.all(own).any(|address| block.is_excepted(address)) {
            return Some(false);
        }
        self.all(own).any(|address| block.contains(address)).then_some(true)
    }

    /// Whether any of them is not of the family of the overlay address `own`.
    pub(crate) fn crosses_family(&self, own: IpAddr) -> bool {
        self.all(own).any(|address| address.is_ipv4() != own.is_ipv4())
    }
}
