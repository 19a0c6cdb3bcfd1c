//! Policies of a pod as rules: the union of its NetworkPolicies, and the tiers of ClusterNetworkPolicies in order.

use std::{collections::HashMap, sync::Arc};

use super::{
    super::{ChainRule, Match, RuleChain, Then},
    Draft, PodChain,
    ports::resolve,
};
use crate::{
    engine::{
        Compiled, CompiledRule, ObjectName, Side,
        rules::{PeerRef, PortSet},
        selection::ALL_PODS,
        set_cache::SetOf,
    },
    object::Action,
};

impl Draft<'_> {
    /// What NetworkPolicies allow, and the end of it; nothing where none selects the pod.
    pub(super) fn union(&mut self, chain: &PodChain, policies: &[(u32, bool)]) -> Vec<ChainRule> {
        let Some((first, _)) = policies.first() else { return Vec::new() };
        let engine = self.engine;
        // Rules with the same ports are one rule with all their peers.
        let mut groups: Vec<SamePorts<'_>> = Vec::new();
        let mut by_ports: HashMap<&PortSet, usize> = HashMap::new();
        for (id, _) in policies.iter().filter(|(_, unknown)| !unknown) {
            let policy = &engine.policies[*id];
            for rule in policy.sides[chain.side as usize].iter().flatten() {
                let at = *by_ports.entry(&rule.ports).or_insert_with(|| {
                    groups.push(SamePorts { ports: &rule.ports, peers: Vec::new(), policies: Vec::new() });
                    groups.len() - 1
                });
                groups[at].peers.extend(rule.peers.iter().cloned());
                if groups[at].policies.last() != Some(&&policy.name.name) {
                    groups[at].policies.push(&policy.name.name);
                }
            }
        }
        // No NetworkPolicy keeps a pod from itself, which it reaches here by a Service's address.
        let families = [true, false].map(|v4| chain.addresses.iter().copied().filter(move |ip| ip.is_ipv4() == v4));
        let mut rules: Vec<ChainRule> = families
            .map(|own| own.collect::<Vec<_>>())
            .into_iter()
            .filter(|own| !own.is_empty())
            .map(|own| ChainRule { matches: vec![Match::Own(own)], then: Then::Allow, because: "itself".into() })
            .collect();
        for SamePorts { ports, peers, mut policies } in groups {
            policies.sort_unstable();
            let names: Vec<String> = policies.into_iter().map(ToString::to_string).collect();
            let because = format!("NetworkPolicy {}", names.join(", "));
            self.rule(chain, &peers, ports, Match3::Sure, Then::Allow, &because, &mut rules);
        }
        let because = format!("isolated by {}", engine.policies[*first].name);
        rules.push(ChainRule { matches: Vec::new(), then: Then::Drop, because: because.into() });
        rules
    }

    pub(super) fn tier_rules(&self, policies: &[(u32, bool)], side: Side) -> Vec<TierRule> {
        let mut rules = Vec::new();
        for (id, unsure) in policies {
            let policy = &self.engine.policies[*id];
            let count = policy.sides[side as usize].as_ref().map_or(0, Vec::len);
            rules.extend((0..count).map(|rule| TierRule { policy: Arc::clone(policy), rule, unsure: *unsure }));
        }
        rules
    }

    /// Rules of a tier, in order. `passed`: behind a Pass that only may match, where Accept counts no more than Pass.
    #[expect(clippy::too_many_arguments, reason = "the recursion carries the whole state of one chain")]
    pub(super) fn tier(
        &mut self,
        chain: &PodChain,
        rules: &[TierRule],
        passed: bool,
        end: &Then,
        name: &str,
        out: &mut Vec<ChainRule>,
        made: &mut Vec<(String, RuleChain)>,
    ) {
        let baseline = !matches!(end, Then::Goto(_));
        for (position, tier_rule) in rules.iter().enumerate() {
            let Some(rule) = tier_rule.rule(chain.side) else { continue };
            let because = format!("{} rule {}", tier_rule.policy.name, tier_rule.rule);
            let (peers, ports) = (&rule.peers, &rule.ports);
            match rule.action {
                Action::Deny => {
                    self.rule(chain, peers, ports, Match3::Either, Then::Drop, &because, out);
                }
                Action::Accept if tier_rule.unsure => {}
                Action::Accept if passed => {
                    self.rule(chain, peers, ports, Match3::Sure, end.clone(), &because, out);
                }
                Action::Accept => {
                    self.rule(chain, peers, ports, Match3::Sure, Then::Allow, &because, out);
                }
                Action::Pass if baseline && tier_rule.unsure => {}
                Action::Pass if baseline => {
                    self.rule(chain, peers, ports, Match3::Sure, Then::Allow, &because, out);
                }
                Action::Pass => {
                    if !tier_rule.unsure {
                        self.rule(chain, peers, ports, Match3::Sure, end.clone(), &because, out);
                    }
                    if passed {
                        continue;
                    }
                    let sureness = if tier_rule.unsure { Match3::Either } else { Match3::Unsure };
                    let next = format!("{name}_p{position}");
                    let before = out.len();
                    self.rule(chain, peers, ports, sureness, Then::Goto(next.clone()), &because, out);
                    if out.len() > before {
                        let mut rest = Vec::new();
                        self.tier(chain, &rules[position + 1..], true, end, &next, &mut rest, made);
                        made.push((next, RuleChain { rules: rest }));
                    }
                }
            }
        }
        out.push(ChainRule { matches: Vec::new(), then: end.clone(), because: Arc::default() });
    }

    /// One rule of a policy, as the rules that it takes.
    #[expect(clippy::too_many_arguments, reason = "each of them is a part of the rule")]
    fn rule(
        &mut self,
        chain: &PodChain,
        peers: &[PeerRef],
        ports: &PortSet,
        sureness: Match3,
        then: Then,
        because: &str,
        out: &mut Vec<ChainRule>,
    ) {
        let because: Arc<str> = because.into();
        let mut push =
            |matches: Vec<Match>| out.push(ChainRule { matches, then: then.clone(), because: Arc::clone(&because) });
        let ends = self.ends(peers, sureness, chain.side);
        let Some(list) = ports.as_slice() else {
            ends.into_iter().for_each(push);
            return;
        };
        let (numeric, named) = resolve(list, chain);
        for end in &ends {
            for condition in &numeric {
                push([end.as_slice(), std::slice::from_ref(condition)].concat());
            }
        }
        for (protocol, name) in named {
            for (v4, sure) in [(true, true), (true, false), (false, true), (false, false)] {
                if !sureness.includes(sure) {
                    continue;
                }
                let of = SetOf::Named { v4, sure, protocol, name: Arc::clone(&name) };
                if let Some(set) = self.set(peers, of, sure) {
                    push(vec![Match::PeerPort { set, v4 }]);
                }
            }
        }
    }

    /// Conditions on the other end's address, one of which must hold; an empty one holds always.
    fn ends(&mut self, peers: &[PeerRef], sureness: Match3, side: Side) -> Vec<Vec<Match>> {
        if peers.contains(&PeerRef::Anyone) {
            return if sureness == Match3::Unsure { Vec::new() } else { vec![Vec::new()] };
        }
        let mut ends = Vec::new();
        let pods = peers.iter().any(|peer| matches!(peer, PeerRef::Set(_) | PeerRef::Nodes(_)));
        let source = side == Side::Ingress && peers.iter().any(|peer| matches!(peer, PeerRef::Block(_)));
        for v4 in [true, false] {
            let relevant = pods
                || (source && self.crossing[usize::from(v4)])
                || peers.iter().any(|peer| match peer {
                    PeerRef::Block(block) => block.cidr.network().is_ipv4() == v4,
                    PeerRef::Anyone | PeerRef::Set(_) | PeerRef::Nodes(_) => true,
                });
            if !relevant {
                continue;
            }
            if sureness != Match3::Unsure
                && let Some(set) = self.set(peers, SetOf::Sure { v4, source }, true)
            {
                ends.push(vec![Match::Peer { set, v4, not: false }]);
            }
            if sureness == Match3::Sure {
                continue;
            }
            if let Some(set) = self.set(peers, SetOf::Unsure { v4, source }, false) {
                ends.push(vec![Match::Peer { set, v4, not: false }]);
            }
            // Pods of which nothing is known: they are in the set of all pods, and may be in any other, or be nodes.
            let others = peers.iter().any(|peer| match peer {
                PeerRef::Set(set) => *set != ALL_PODS,
                PeerRef::Nodes(_) => true,
                PeerRef::Anyone | PeerRef::Block(_) => false,
            });
            if others
                && let Some(mesh) = self.set(&[PeerRef::Anyone], SetOf::Mesh { v4 }, false)
                && let Some(known) = self.set(&[PeerRef::Anyone], SetOf::Known { v4 }, true)
            {
                ends.push(vec![Match::Peer { set: mesh, v4, not: false }, Match::Peer { set: known, v4, not: true }]);
            }
        }
        ends
    }
}

/// Rules of NetworkPolicies with the same ports.
struct SamePorts<'e> {
    ports: &'e PortSet,
    peers: Vec<PeerRef>,
    /// Their policies, each once.
    policies: Vec<&'e ObjectName>,
}

pub(super) struct TierRule {
    policy: Arc<Compiled>,
    rule: usize,
    unsure: bool,
}

impl TierRule {
    fn rule(&self, side: Side) -> Option<&CompiledRule> {
        self.policy.sides[side as usize].as_ref()?.get(self.rule)
    }
}

/// Which peers a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match3 {
    Sure,
    Unsure,
    Either,
}

impl Match3 {
    /// Whether peers that surely match are meant, or those that only may.
    fn includes(self, sure: bool) -> bool {
        self == Self::Either || (self == Self::Sure) == sure
    }
}
