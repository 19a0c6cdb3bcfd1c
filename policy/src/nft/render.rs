//! From the engine's state to a description: one pod's chains after the other.

mod ports;
mod sets;
mod tiers;

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use super::{Chain, Generation, LocalPod, Marks, Match, Rule, Ruleset, Then};
use crate::{
    engine::{Engine, PodInfo, Side, rules::PeerRef, storage::Owner},
    object::Tier,
};
pub(crate) use sets::SetCache;
use sets::{Made, SetOf};

impl Engine {
    /// What the kernel is to do for these pods, as of the last [`commit`](Self::commit). `before` is what it does now,
    /// so that chains whose meaning stays keep their generation.
    pub fn ruleset(&mut self, pods: &[LocalPod], marks: &Marks, before: &Ruleset) -> Ruleset {
        self.forget_changed_sets();
        let mut draft = Draft { engine: self, out: Ruleset::default(), used: BTreeMap::new() };
        draft.out.maps = ["egress4", "egress6", "ingress4", "ingress6"].map(|name| (name, BTreeMap::new())).into();
        for pod in pods {
            for side in [Side::Egress, Side::Ingress] {
                draft.pod(pod, side, marks, before);
            }
        }
        let Draft { mut out, used, .. } = draft;
        out.remember(before);
        out.sets = used.values().map(|made| (made.name.clone(), made.set.clone())).collect();
        self.set_cache.made = used.into_iter().collect();
        out
    }
}

/// The generation after these, of at most `values`. Where it has to begin again it is none of these, since connections
/// are still given them until the change is made.
fn next_generation<'g>(last: impl Iterator<Item = &'g u32> + Clone, values: u32) -> u32 {
    match last.clone().max() {
        None => 1,
        Some(newest) if *newest < values => newest + 1,
        Some(_) => (1..=values).find(|value| last.clone().all(|of| of != value)).unwrap_or(1),
    }
}

struct Draft<'e> {
    engine: &'e Engine,
    out: Ruleset,
    used: BTreeMap<(Vec<PeerRef>, SetOf), Arc<Made>>,
}

/// One pod's chain in the making.
struct PodChain {
    name: String,
    /// The pod's own.
    addresses: Vec<IpAddr>,
    side: Side,
    info: Option<Arc<PodInfo>>,
    value: u32,
}

impl Draft<'_> {
    fn pod(&mut self, pod: &LocalPod, side: Side, marks: &Marks, before: &Ruleset) {
        let Some(first) = pod.addresses.first() else { return };
        let owner = pod.addresses.iter().find_map(|address| self.engine.owner(*address));
        let direction = if side == Side::Ingress { "in" } else { "out" };
        let name = format!("{direction}_{}", first.to_string().replace(['.', ':'], "_"));
        let info = owner.and_then(|owner| self.engine.pods.infos.get(owner.pod)?.clone());
        // Generation 1 first, to see what the chain says; the right one once that is known.
        let mut chain = PodChain { name: name.clone(), addresses: pod.addresses.clone(), side, info, value: 1 };
        let drafted = self.chains(&chain, owner);
        let content = self.content(&drafted);
        let values = marks.of(side).values();
        chain.value = match before.generations.get(&name) {
            Some(old) if old.content == content && old.addresses == pod.addresses => old.value,
            _ => next_generation(pod.addresses.iter().filter_map(|of| before.given[side as usize].get(of)), values),
        };
        let chains = if chain.value == 1 { drafted } else { self.chains(&chain, owner) };
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
            self.out.given[side as usize].insert(*address, chain.value);
        }
        let generation = Generation { addresses: pod.addresses.clone(), side, value: chain.value, content };
        self.out.generations.insert(name, generation);
    }

    fn content(&self, chains: &[(String, Chain)]) -> u64 {
        let mut hasher = DefaultHasher::new();
        chains.hash(&mut hasher);
        let sets: HashMap<&str, u64> = self.used.values().map(|made| (made.name.as_str(), made.set.content)).collect();
        for rule in chains.iter().flat_map(|(_, chain)| &chain.rules) {
            for condition in &rule.matches {
                if let Match::Peer { set, .. } | Match::PeerPort { set, .. } = condition {
                    sets.get(set.as_str()).hash(&mut hasher);
                }
            }
        }
        hasher.finish()
    }

    /// The pod's chain and those it leads to.
    fn chains(&mut self, chain: &PodChain, owner: Option<Owner>) -> Vec<(String, Chain)> {
        let mut made = Vec::new();
        let side = chain.side as usize;
        let judged = Rule { matches: vec![Match::Judged(chain.value)], then: Then::Return, because: Arc::default() };
        let error = Rule { matches: vec![Match::Error], then: Then::Return, because: Arc::default() };
        let mut main = vec![judged, error];
        let Some(owner) = owner else {
            // A pod of which nothing is known is in every policy's hand.
            let then = if self.engine.voices[side] > 0 { Then::Drop } else { Then::Allow(chain.value) };
            main.push(Rule { matches: Vec::new(), then, because: "unknown pod".into() });
            made.push((chain.name.clone(), Chain { rules: main }));
            refuse_no_flow(&mut made, &chain.name);
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
            let end = Then::Allow(chain.value);
            self.tier(chain, &rules, false, &end, &chain.name, &mut behind, &mut made);
        }
        if admin.is_empty() {
            main.extend(behind);
        } else {
            let next = format!("{}_np", chain.name);
            let rules = self.tier_rules(&admin, chain.side);
            self.tier(chain, &rules, false, &Then::Goto(next.clone()), &chain.name, &mut main, &mut made);
            made.push((next, Chain { rules: behind }));
        }
        made.push((chain.name.clone(), Chain { rules: main }));
        refuse_no_flow(&mut made, &chain.name);
        made.sort_by(|(a, _), (b, _)| a.cmp(b));
        made
    }
}

/// Where a pod's chains refuse anything, what has no addresses in conntrack that rules could be asked by is refused, too.
fn refuse_no_flow(made: &mut [(String, Chain)], first: &str) {
    let refuses = made.iter().flat_map(|(_, chain)| &chain.rules).any(|rule| rule.then == Then::Drop);
    let first = made.iter_mut().find(|(name, _)| name == first);
    if let (true, Some((_, chain))) = (refuses, first) {
        chain.rules.insert(0, Rule { matches: vec![Match::NoFlow], then: Then::Drop, because: "of no flow".into() });
    }
}
