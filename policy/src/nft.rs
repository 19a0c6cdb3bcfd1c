//! The same policies as nftables rules: a description, the difference between two, and its text.
//!
//! Each local pod has one chain per direction; maps lead from its addresses to them. Peers are in sets that rules with
//! the same peers share. Denied packets go to the chain [`REFUSED`] of that direction, allowed ones to [`ALLOWED`]. The
//! owner of the table fills both: the first drops, the second returns, so that a packet between two local pods passes
//! through both pods' chains.
//!
//! In the kernel each chain has two forms:
//!
//! ```text
//! out_10_244_1_10         flows: by source before any rewriting, destination and its port after it, as in
//!                         conntrack. Packets of either direction, and ICMP errors about the flow, are judged alike.
//! packet_out_10_244_1_10  packets without a flow, untracked or invalid: by their own header, nothing reversed. If
//!                         policies deny any traffic, they deny invalid packets and later fragments.
//! ```
//!
//! ```text
//! ct original ip saddr vmap @egress4     ip saddr vmap @packet_egress4
//! ct reply ip saddr vmap @ingress4       ip daddr vmap @packet_ingress4
//! ```
//!
//! A verdict depends only on the rules and on [`flow_key`], so the owner of the table may cache it by that key.

mod ranges;
mod render;
mod text;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::{engine::Side, object::Protocol};
use text::{Form, port_sets};

pub use crate::set::{AddressSetKind, Set, SetElement};
pub use text::{ALLOWED, REFUSED, Transactions, flow_key, packet_form, transactions};

/// A pod of this node whose traffic the kernel judges.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalPod {
    /// Its addresses, at least one.
    pub addresses: Vec<IpAddr>,
}

/// All that is to be in the table on behalf of policies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ruleset {
    /// Sets by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains by name.
    pub chains: BTreeMap<String, RuleChain>,
    /// From addresses of local pods to their chains: `egress4`, `egress6`, `ingress4`, `ingress6`.
    pub maps: BTreeMap<&'static str, BTreeMap<IpAddr, String>>,
}

impl Ruleset {
    /// Whether every verdict of the two is the same: comments and names of policies aside, they are.
    fn decides_as(&self, other: &Self) -> bool {
        let alike = |(one, other): ((&String, &RuleChain), (&String, &RuleChain))| {
            one.0 == other.0 && one.1.decides_as(other.1)
        };
        self.sets == other.sets
            && self.maps == other.maps
            && self.chains.len() == other.chains.len()
            && self.chains.iter().zip(&other.chains).all(alike)
    }

    /// The chains in the kernel, both forms of each, with their numbers of rules.
    pub fn kernel_chains(&self) -> impl Iterator<Item = (String, usize)> + '_ {
        self.chains.iter().flat_map(|(name, chain)| {
            Form::BOTH.map(|form| (form.name(name), chain.rules.iter().map(|rule| form.count(rule)).sum()))
        })
    }

    /// Whether the chain of this address on this side may refuse anything; `None`: it has none.
    #[must_use]
    pub fn may_refuse(&self, side: Side, address: IpAddr) -> Option<bool> {
        let map = match (side, address.is_ipv4()) {
            (Side::Egress, true) => "egress4",
            (Side::Egress, false) => "egress6",
            (Side::Ingress, true) => "ingress4",
            (Side::Ingress, false) => "ingress6",
        };
        self.maps.get(map)?.get(&address).map(|chain| self.chain_refuses(chain))
    }

    /// Chains lead on to others, and never back.
    fn chain_refuses(&self, chain: &str) -> bool {
        let rules = self.chains.get(chain).map_or(&[][..], |chain| &chain.rules);
        rules.iter().any(|rule| match &rule.then {
            Then::Drop => true,
            Then::Goto(next) => self.chain_refuses(next),
            Then::Allow => false,
        })
    }

    /// The sets in the kernel, those of ports included.
    pub fn kernel_sets(&self) -> impl Iterator<Item = String> + '_ {
        self.sets.keys().map(|name| self.kernel_set(name)).chain(port_sets(self).into_keys())
    }

    /// The name in the kernel of a set.
    fn kernel_set(&self, name: &str) -> String {
        match self.sets.get(name).map_or(0, |set| set.copy) {
            0 => name.to_owned(),
            copy => format!("{name}_{copy}"),
        }
    }

    /// The maps in the kernel, both forms of each.
    pub fn kernel_maps(&self) -> impl Iterator<Item = String> + '_ {
        self.maps.keys().flat_map(|name| Form::BOTH.map(|form| form.name(name)))
    }
}

/// A chain's rules in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct RuleChain {
    /// They are asked from the first on until one decides.
    pub rules: Vec<ChainRule>,
}

/// A rule with conditions that must all match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChainRule {
    /// Its conditions.
    pub matches: Vec<Match>,
    /// Its action.
    pub then: Then,
    /// The policy behind it, which is its comment in nftables; empty without one.
    pub because: Arc<str>,
}

impl RuleChain {
    /// Whether the two decide alike: comments aside, they are the same.
    fn decides_as(&self, other: &Self) -> bool {
        let alike = |(one, other): (&ChainRule, &ChainRule)| one.matches == other.matches && one.then == other.then;
        self.rules.len() == other.rules.len() && self.rules.iter().zip(&other.rules).all(alike)
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
    /// A packet of no flow whose header cannot be judged: invalid, or a later fragment.
    Unclear,
}

/// The action of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Then {
    /// Lets the packet pass this direction.
    Allow,
    /// Drops the packet.
    Drop,
    /// Goes on in another chain and does not come back.
    Goto(String),
}
