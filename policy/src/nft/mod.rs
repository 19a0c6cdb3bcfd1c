//! The same policies as rules for nftables: a description, the difference between two, and its text.
//!
//! Each local pod has one chain for each direction; maps lead from its addresses to them. Whom rules speak of stands in
//! sets that rules with the same peers share. What policies refuse goes to the chain [`REFUSED`] of that direction, what
//! they allow to [`ALLOWED`], which whoever owns the table fills: the one drops, the other returns, so that a packet from
//! one local pod to another one passes through both. Where a chain refuses anything, it refuses packets of no flow, too.
//!
//! Chains judge flows, not packets: by their source before any rewriting and their destination behind it, as conntrack
//! has them. A packet of either direction is judged alike, and a flow that is cut is cut both ways.
//!
//! A chain marks the connections that it allowed with its *generation*, in its direction's field of the connection mark,
//! and returns at once for what bears it. The generation changes whenever what the chain would say might, also by the
//! elements of a set: a connection is then judged again. It is never 0, and comes round after
//! [`Field::values`] changes: marks must be swept before a value is used again.
//!
//! ```text
//! ct original ip saddr vmap @egress4     jump out_10_244_1_10: generation? return; rules …; goto refused_out
//! ct reply ip saddr vmap @ingress4       jump in_10_244_1_10
//! ```

mod ranges;
mod render;
mod text;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::{engine::Side, object::Protocol};

pub(crate) use render::SetCache;
pub use text::{ALLOWED, REFUSED, transaction};

/// A pod of this node whose traffic the kernel judges.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalPod {
    /// Its addresses, at least one.
    pub addresses: Vec<IpAddr>,
}

/// A field of the connection mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// The lowest of its bits.
    pub shift: u8,
    /// How many bits it has, 1 to 31.
    pub bits: u8,
}

impl Field {
    /// The field of exactly these bits; `None` unless there are any, they are neighbours, and one bit is left out.
    #[must_use]
    pub const fn of_mask(mask: u32) -> Option<Self> {
        let (shift, bits) = (mask.trailing_zeros(), mask.count_ones());
        if mask == 0 || bits > 31 || (mask >> shift).trailing_ones() != bits {
            return None;
        }
        Some(Self { shift: shift as u8, bits: bits as u8 })
    }

    /// The field's bits.
    #[must_use]
    pub const fn mask(self) -> u32 {
        self.values() << self.shift
    }

    /// Its largest value; how many values other than 0 it has.
    #[must_use]
    pub const fn values(self) -> u32 {
        (1 << self.bits) - 1
    }
}

/// Where generations stand in the connection mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Of the source's chain.
    pub egress: Field,
    /// Of the destination's chain.
    pub ingress: Field,
}

impl Marks {
    /// The field of one side.
    #[must_use]
    pub const fn of(&self, side: Side) -> Field {
        match side {
            Side::Egress => self.egress,
            Side::Ingress => self.ingress,
        }
    }
}

/// All that is to be in the table on behalf of policies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ruleset {
    /// Sets by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
    /// From addresses of local pods to their chains: `egress4`, `egress6`, `ingress4`, `ingress6`.
    pub maps: BTreeMap<&'static str, BTreeMap<IpAddr, String>>,
    /// The generation of each pod's chain.
    pub generations: BTreeMap<String, Generation>,
    /// The last generation that each address was given, by side: the highest that its connections can bear. An address
    /// keeps it when its chain goes, so that the chain of whoever has it next takes no earlier judgement for its own.
    pub given: [BTreeMap<IpAddr, u32>; 2],
}

/// Addresses without a chain whose last generation is remembered. More than this many are forgotten together.
const REMEMBERED: usize = 4096;

impl Ruleset {
    /// Whether connections that were judged under `before` may bear what a chain of this one marks, although it never
    /// judged them. They have to lose their marks, before this comes into force and behind it.
    #[must_use]
    pub fn repeats(&self, before: &Self) -> bool {
        let mut sides = before.given.iter().zip(&self.given);
        sides.any(|(old, new)| old.iter().any(|(address, old)| new.get(address).is_none_or(|new| new < old)))
    }

    /// Takes over what addresses without a chain were given before.
    fn remember(&mut self, before: &Self) {
        for (new, old) in self.given.iter_mut().zip(&before.given) {
            let gone: Vec<_> = old.iter().filter(|(address, _)| !new.contains_key(address)).collect();
            if gone.len() <= REMEMBERED {
                new.extend(gone);
            }
        }
    }
}

/// A pod's chain and what it marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Whose chain it is.
    pub addresses: Vec<IpAddr>,
    /// In which direction.
    pub side: Side,
    /// What it marks: never 0.
    pub value: u32,
    /// Of all that it says; the generation changes with it.
    pub content: u64,
}

/// A named set.
#[derive(Debug, Clone)]
pub struct Set {
    /// Of what.
    pub kind: SetKind,
    /// Its elements, in order, none inside another.
    pub elements: Arc<[Element]>,
    /// Hash of the elements.
    pub(crate) content: u64,
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
pub enum SetKind {
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
pub enum Element {
    /// From the first to the last, both included.
    Range(IpAddr, IpAddr),
    /// An address, with a protocol and a port.
    Port(IpAddr, Protocol, u16),
}

/// A chain's rules in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Chain {
    /// They are asked from the first on until one decides.
    pub rules: Vec<Rule>,
}

/// One rule: all matches must hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What must hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub then: Then,
    /// The policy behind it, for logs; empty where there is none.
    pub because: Arc<str>,
}

impl Rule {
    /// Number of nftables rules that it takes: what names ports is one for each direction.
    #[must_use]
    pub fn count(&self) -> usize {
        let ports = |condition: &Match| matches!(condition, Match::Ports(..) | Match::PeerPort { .. });
        if self.matches.iter().any(ports) { 2 } else { 1 }
    }
}

/// A condition of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Match {
    /// The other end's address is in the set, or is not.
    Peer {
        /// Name of the set.
        set: String,
        /// IPv4, else IPv6.
        v4: bool,
        /// Whether it must not be.
        not: bool,
    },
    /// The other end's address is one of these, which are the pod's own and of one family.
    Own(Vec<IpAddr>),
    /// The other end's address, with protocol and destination port, is in the set. For egress only.
    PeerPort {
        /// Name of the set.
        set: String,
        /// IPv4, else IPv6.
        v4: bool,
    },
    /// The destination port of this protocol is in one of the ranges.
    Ports(Protocol, Vec<(u16, u16)>),
    /// The protocol.
    Protocol(Protocol),
    /// The connection bears this generation in this side's field.
    Judged(u32),
    /// An ICMP error about a flow that no chain on this side has judged: it was where it came from, at the tunnel's end.
    Error,
    /// Conntrack knows no flow that the packet is of, and can begin none with it.
    NoFlow,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Then {
    /// Returns without more ado.
    Return,
    /// Marks the connection with the generation, and returns.
    Allow(u32),
    /// Drops the packet.
    Drop,
    /// Goes on in another chain and does not come back.
    Goto(String),
}
