//! nftables rules as the kernel would walk them, over their description.

use std::net::IpAddr;

use policy::{
    engine::{Flow, Side},
    nft::{Match, Ruleset, SetElement, Then},
    object::Protocol,
};

/// Whether a new flow of a local pod passes its chain on this side.
pub(crate) fn passes(rules: &Ruleset, side: Side, flow: &Flow) -> bool {
    let (own, other) = match side {
        Side::Ingress => (flow.destination, flow.source),
        Side::Egress => (flow.source, flow.destination),
    };
    let map = match (side, own.is_ipv4()) {
        (Side::Egress, true) => "egress4",
        (Side::Egress, false) => "egress6",
        (Side::Ingress, true) => "ingress4",
        (Side::Ingress, false) => "ingress6",
    };
    let Some(chain) = rules.maps[map].get(&own) else { return true };
    walk(rules, chain, other, flow)
}

fn walk(rules: &Ruleset, chain: &str, other: IpAddr, flow: &Flow) -> bool {
    for rule in &rules.chains[chain].rules {
        if rule.matches.iter().all(|condition| holds(rules, condition, other, flow)) {
            return match &rule.then {
                Then::Allow => true,
                Then::Drop => false,
                Then::Goto(next) => walk(rules, next, other, flow),
            };
        }
    }
    true
}

fn holds(rules: &Ruleset, condition: &Match, other: IpAddr, flow: &Flow) -> bool {
    let protocol = Protocol::from_number(flow.protocol);
    match condition {
        Match::Peer { set, v4, not } => {
            let inside = rules.sets[set]
                .elements
                .iter()
                .any(|element| matches!(element, SetElement::Range(first, last) if (*first..=*last).contains(&other)));
            other.is_ipv4() == *v4 && inside != *not
        }
        Match::Own(addresses) => addresses.contains(&other),
        Match::PeerPort { set, v4 } => {
            let elements = &rules.sets[set].elements;
            other.is_ipv4() == *v4
                && elements.iter().any(|element| {
                    matches!(element, SetElement::Port(address, of, port)
                        if *address == other && Some(*of) == protocol && Some(*port) == flow.port)
                })
        }
        Match::Protocol(wanted) => protocol == Some(*wanted),
        Match::Ports(wanted, ranges) => {
            let inside = |port| ranges.iter().any(|(first, last)| (*first..=*last).contains(&port));
            protocol == Some(*wanted) && flow.port.is_some_and(inside)
        }
        // A whole packet that begins a flow.
        Match::Unclear => false,
    }
}
