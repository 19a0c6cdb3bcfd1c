//! The engine against a naive reading of the specification, on generated worlds that keep changing.

#![expect(clippy::unwrap_used, reason = "a world that cannot be read is a broken test")]

mod generate;
mod kernel;
mod model;

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use generate::{Both, Dice, PORTS, address, source};
use policy::{
    engine::{Classifier, Flow, Side},
    flow::Rules,
    nft::{self, LocalPod},
};
use proptest::prelude::*;

/// Classifiers that were made, in order.
#[derive(Default)]
struct Made {
    classifiers: Vec<Arc<Classifier>>,
    /// Verdicts found to be those of an earlier one without being made again.
    unchanged: usize,
}

impl Made {
    /// What a verdict is said not to have changed since, it was then.
    fn check_unchanged(&mut self, side: Side, flow: &Flow) {
        let (newest, earlier) = self.classifiers.split_last().unwrap();
        let since = newest.unchanged_since(side, flow);
        for before in earlier.iter().filter(|before| before.generation() >= since) {
            if Rules::owners(&**before, flow) == Rules::owners(&**newest, flow) {
                self.unchanged += 1;
                let (then, now) = (before.verdict(side, flow).allowed, newest.verdict(side, flow).allowed);
                assert_eq!(then, now, "{side:?} {flow:?}: changed since {}", before.generation());
            }
        }
    }
}

impl Both {
    fn compare(&mut self, dice: &mut Dice, flows: usize, made: &mut Made) {
        let classifier = self.engine.commit(self.age);
        let addresses: BTreeSet<IpAddr> = self.world.pods.iter().flat_map(|pod| pod.ips.iter().copied()).collect();
        let owned = addresses.into_iter().filter(|address| self.world.owner(*address).is_some());
        let local: Vec<LocalPod> = owned.map(|address| LocalPod { addresses: vec![address] }).collect();
        let rules = self.engine.ruleset(&local);
        let mut again = self.engine.ruleset(&local);
        assert!(again == rules && nft::transactions("inet t", &rules, &mut again).is_empty());
        self.rules = rules;
        made.classifiers.push(Arc::clone(&classifier));
        for _ in 0..flows {
            let source = source(dice);
            let mut destination = address(dice);
            while destination.is_ipv4() != source.is_ipv4() {
                destination = address(dice);
            }
            let protocol = dice.pick(&[6, 6, 6, 17, 132, 1, 47]);
            let port = matches!(protocol, 6 | 17 | 132).then(|| dice.pick(&PORTS));
            let flow = Flow { source, destination, protocol, port };
            for side in [Side::Ingress, Side::Egress] {
                made.check_unchanged(side, &flow);
                let expected = self.world.allowed(side, &flow);
                // A pod's packets to itself never reach the kernel's rules of its node.
                let itself = self.world.owner(source).is_some_and(|pod| pod.ips.contains(&destination));
                if !itself {
                    let kernel = kernel::passes(&self.rules, side, &flow);
                    assert_eq!(kernel, expected, "{side:?} {flow:?}: nftables\n{:#?}\n{:#?}", self.rules, self.world);
                }
                let said = classifier.verdict(side, &flow);
                assert_eq!(
                    said.allowed,
                    expected,
                    "{side:?} {flow:?}: {:?}\n{:#?}",
                    classifier.explain(side, &flow),
                    self.world
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("POLICY_REFERENCE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400),
    ))]

    #[test]
    fn engine_and_reference_agree(seed in any::<u64>()) {
        // Every fourth world has one cluster only.
        live(if seed % 4 == 0 { Dice::of_one_cluster(seed) } else { Dice::new(seed) });
    }
}

/// Worlds on which they once differed.
#[test]
fn they_agree_where_they_differed() {
    for seed in [6_480_118_530_180_648_113, 6_481_700_988_825_498_941, 1_755_314_527_974_905_348] {
        assert!(live(Dice::of_one_cluster(seed)) > 0, "nothing was ever left as it was");
    }
}

/// Returns how many verdicts were found to be what they were before, without being made again.
fn live(mut dice: Dice) -> usize {
    let (mut both, mut made) = (Both::new(), Made::default());
    for _ in 0..20 {
        both.change(&mut dice);
    }
    for _ in 0..12 {
        for _ in 0..=dice.roll(3) {
            both.change(&mut dice);
        }
        both.compare(&mut dice, 30, &mut made);
    }
    made.unchanged
}
