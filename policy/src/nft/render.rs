//! Renders the engine's state as a description, one pod's chains after the other.

mod ports;
mod sets;
mod tiers;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{ChainRule, LocalPod, Match, RuleChain, Ruleset, Then};
use crate::{
    engine::{
        Engine, PodInfo, Side,
        rules::PeerRef,
        set_cache::{Made, SetOf},
        storage::Owner,
    },
    object::Tier,
};

impl Engine {
    /// The ruleset for these pods as of the last [`commit`](Self::commit).
    pub fn ruleset(&mut self, pods: &[LocalPod]) -> Ruleset {
        self.forget_changed_sets();
        let crossing = [false, true].map(|v4| {
            let mut nodes = self.sources.iter().filter(|(overlay, _)| overlay.is_ipv4() == v4);
            nodes.any(|(overlay, aliases)| aliases.crosses_family(*overlay))
        });
        let mut draft = Draft { engine: self, out: Ruleset::default(), used: BTreeMap::new(), crossing };
        draft.out.maps = ["egress4", "egress6", "ingress4", "ingress6"].map(|name| (name, BTreeMap::new())).into();
        for pod in pods {
            for side in [Side::Egress, Side::Ingress] {
                draft.pod(pod, side);
            }
        }
        let Draft { mut out, used, .. } = draft;
        out.sets = used.values().map(|made| (made.name.clone(), made.set.clone())).collect();
        self.set_cache.made = used.into_iter().collect();
        out
    }
}

struct Draft<'e> {
    engine: &'e Engine,
    out: Ruleset,
    used: BTreeMap<(Vec<PeerRef>, SetOf), Arc<Made>>,
    /// Whether nodes with overlay addresses of IPv6, and of IPv4, may be in blocks of the other family.
    crossing: [bool; 2],
}

/// A pod's chain under construction.
struct PodChain {
    name: String,
    /// The pod's own.
    addresses: Vec<IpAddr>,
    side: Side,
    info: Option<Arc<PodInfo>>,
}

impl Draft<'_> {
    fn pod(&mut self, pod: &LocalPod, side: Side) {
        let Some(first) = pod.addresses.first() else { return };
        let owner = pod.addresses.iter().find_map(|address| self.engine.owner(*address));
        let direction = if side == Side::Ingress { "in" } else { "out" };
        let name = format!("{direction}_{}", first.to_string().replace(['.', ':'], "_"));
        let info = owner.and_then(|owner| self.engine.pods.infos.get(owner.pod)?.clone());
        let chain = PodChain { name: name.clone(), addresses: pod.addresses.clone(), side, info };
        let chains = self.chains(&chain, owner);
        self.out.chains.extend(chains);
        for address in &pod.addresses {
            let map = match (side, address.is_ipv4()) {
                (Side::Egress, true) => "egress4",
                (Side::Egress, false) => "egress6",
                (Side::Ingress, true) => "ingress4",
                (Side::Ingress, false) => "ingress6",
            };
            if let Some(map) = self.out.maps.get_mut(map) {
                map.insert(*address, name.clone());
            }
        }
    }

    /// The pod's chain and those it leads to.
    fn chains(&mut self, chain: &PodChain, owner: Option<Owner>) -> Vec<(String, RuleChain)> {
        let mut made = Vec::new();
        let side = chain.side as usize;
        let mut main = Vec::new();
        let Some(owner) = owner else {
            // A pod of which nothing is known is in every policy's hand.
            let then = if self.engine.policies_per_direction[side] > 0 { Then::Drop } else { Then::Allow };
            main.push(ChainRule { matches: Vec::new(), then, because: "unknown pod".into() });
            made.push((chain.name.clone(), RuleChain { rules: main }));
            deny_unclear(&mut made, &chain.name);
            return made;
        };
        let engine = self.engine;
        let class = &engine.selection.classes[owner.class];
        let namespace = &engine.selection.namespaces[class.namespace];
        let own = engine.selected(&class.sets, false);
        let mut unions = engine.selected(&namespace.sets, false);
        unions.extend(own);
        let mut cluster = engine.selected(&class.sets, true);
        cluster.extend(engine.selected(&namespace.sets, true));
        engine.sort(&mut cluster);
        unions.retain(|(id, _)| engine.policies[*id].sides[side].is_some());
        cluster.retain(|(id, _)| engine.policies[*id].sides[side].is_some());
        let (admin, baseline): (Vec<_>, Vec<_>) =
            cluster.into_iter().partition(|(id, _)| engine.policies[*id].tier() == Some(Tier::Admin));

        let mut behind = self.union(chain, &unions);
        if unions.is_empty() {
            let rules = self.tier_rules(&baseline, chain.side);
            let end = Then::Allow;
            self.tier(chain, &rules, false, &end, &chain.name, &mut behind, &mut made);
        }
        if admin.is_empty() {
            main.extend(behind);
        } else {
            let next = format!("{}_np", chain.name);
            let rules = self.tier_rules(&admin, chain.side);
            self.tier(chain, &rules, false, &Then::Goto(next.clone()), &chain.name, &mut main, &mut made);
            made.push((next, RuleChain { rules: behind }));
        }
        made.push((chain.name.clone(), RuleChain { rules: main }));
        deny_unclear(&mut made, &chain.name);
        made.sort_by(|(a, _), (b, _)| a.cmp(b));
        made
    }
}

/// If a pod's chains deny anything, they also deny packets that cannot be judged: the header may be forged, or lacks
/// ports.
fn deny_unclear(made: &mut [(String, RuleChain)], first: &str) {
    let denies = made.iter().flat_map(|(_, chain)| &chain.rules).any(|rule| rule.then == Then::Drop);
    let first = made.iter_mut().find(|(name, _)| name == first);
    if let (true, Some((_, chain))) = (denies, first) {
        chain
            .rules
            .insert(0, ChainRule { matches: vec![Match::Unclear], then: Then::Drop, because: "of no flow".into() });
    }
}
