//! What connections bear against a naive model: no chain may take another's judgement for its own.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use policy::{
    engine::{Engine, ObjectName, PolicyState, Side},
    nft::{Field, LocalPod, Marks, Ruleset},
    object::{NetworkPolicy, PodObject},
};
use proptest::{collection::vec, prelude::*};

/// Few generations, so that they begin again often.
const MARKS: Marks = Marks { egress: Field { shift: 16, bits: 3 }, ingress: Field { shift: 24, bits: 3 } };
const ADDRESSES: u8 = 4;

/// Which chain's judgement a mark stands for.
type Judgement = (Vec<IpAddr>, u64);

/// What connections of each address may bear: whose judgement each value is.
#[derive(Default)]
struct Borne(HashMap<(Side, IpAddr), BTreeMap<u32, Vec<Judgement>>>);

impl Borne {
    fn judge(&mut self, rules: &Ruleset) {
        for generation in rules.generations.values() {
            let judgement = (generation.addresses.clone(), generation.content);
            for address in &generation.addresses {
                let values = self.0.entry((generation.side, *address)).or_default();
                values.entry(generation.value).or_default().push(judgement.clone());
            }
        }
    }

    fn assert_none_is_mistaken(&self, rules: &Ruleset) {
        for generation in rules.generations.values() {
            let own = (generation.addresses.clone(), generation.content);
            for address in &generation.addresses {
                let borne = self.0.get(&(generation.side, *address)).and_then(|values| values.get(&generation.value));
                let strange = borne.into_iter().flatten().find(|judgement| **judgement != own);
                assert_eq!(strange, None, "{address}, {:?}: {generation:?}", generation.side);
            }
        }
    }
}

/// Pods by the addresses that they have, as bits, none in two; and the port that the policy lets pass.
fn step() -> impl Strategy<Value = (Vec<u8>, u16)> {
    (vec(1..(1_u8 << ADDRESSES), 0..3), 1..4_u16)
}

proptest! {
    #[test]
    fn no_chain_takes_anothers_judgement_for_its_own(steps in vec(step(), 1..40)) {
        let mut engine = Engine::new();
        let (mut rules, mut borne) = (Ruleset::default(), Borne::default());
        for (pods, port) in steps {
            let mut taken = 0;
            let mut local = Vec::new();
            for (number, bits) in pods.iter().enumerate() {
                let own = bits & !taken;
                taken |= own;
                let of = |bit: &u8| own & (1 << bit) != 0;
                let addresses: Vec<IpAddr> = (0..ADDRESSES).filter(of).map(|bit| IpAddr::from([10, 0, 0, bit])).collect();
                let pod = PodObject { addresses: addresses.clone(), ..PodObject::default() };
                engine.put_pod(ObjectName::new("shop", format!("p{number}")), pod, 1);
                if !addresses.is_empty() {
                    local.push(LocalPod { addresses });
                }
            }
            for number in pods.len()..3 {
                engine.delete_pod(&ObjectName::new("shop", format!("p{number}")));
            }
            let policy = serde_json::json!({"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]});
            engine.put_policy(ObjectName::new("shop", "p"), &PolicyState::Valid(NetworkPolicy::parse(&policy).unwrap()));
            engine.commit(1);
            let next = engine.ruleset(&local, &MARKS, &rules);
            let repeats = next.repeats(&rules);
            if repeats {
                borne = Borne::default();
            }
            // Until the change is made, the old chains judge.
            borne.judge(&rules);
            borne.assert_none_is_mistaken(&next);
            if repeats {
                borne = Borne::default();
            }
            borne.judge(&next);
            rules = next;
        }
    }
}

/// Addresses that are gone are not remembered without end, and what is forgotten is said.
#[test]
fn many_addresses_that_are_gone_are_forgotten() {
    let mut engine = Engine::new();
    let mut rules = Ruleset::default();
    let mut repeated = 0;
    for number in 0..4200_u32 {
        let addresses = vec![IpAddr::from(number.to_be_bytes())];
        let next = engine.ruleset(&[LocalPod { addresses }], &MARKS, &rules);
        repeated += u32::from(next.repeats(&rules));
        assert!(next.given.iter().all(|side| side.len() < 4100));
        rules = next;
    }
    assert_eq!(repeated, 1);
}
