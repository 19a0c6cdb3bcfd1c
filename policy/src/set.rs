//! Sets of addresses that rules refer to.

use std::{net::IpAddr, sync::Arc};

use crate::object::Protocol;

/// A named set.
#[derive(Debug, Clone)]
pub struct Set {
    /// The kind of its addresses.
    pub kind: AddressSetKind,
    /// Its elements, in order, none inside another.
    pub elements: Arc<[SetElement]>,
    /// Hash of the elements.
    pub(crate) content: u64,
    /// Tells its name in the kernel from those of earlier copies, see [`transactions`](crate::nft::transactions).
    pub(crate) copy: u32,
}

impl PartialEq for Set {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
            && (Arc::ptr_eq(&self.elements, &other.elements)
                || (self.content == other.content && self.elements == other.elements))
    }
}

impl Eq for Set {}

/// Kinds of sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressSetKind {
    /// Ranges of IPv4 addresses.
    V4,
    /// Ranges of IPv6 addresses.
    V6,
    /// IPv4 addresses, each with a protocol and a port.
    V4Port,
    /// IPv6 addresses, each with a protocol and a port.
    V6Port,
}

/// An element of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetElement {
    /// From the first to the last, both included.
    Range(IpAddr, IpAddr),
    /// An address, with a protocol and a port.
    Port(IpAddr, Protocol, u16),
}
