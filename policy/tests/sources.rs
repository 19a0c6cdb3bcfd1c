//! What nodes' overlay addresses count as: what is said of it, and what a change of it costs.

#![allow(clippy::unwrap_used, reason = "a world that cannot be read is a broken test")]

use std::sync::Arc;

use policy::{
    engine::{Engine, Flow, ObjectName, PolicyState, Side, SourceAliases},
    nft::{LocalPod, Match, Ruleset, SetElement, Then, transactions},
    object::{NetworkPolicy, PodObject},
};
use serde_json::{Value, json};

const NODE: &str = "10.244.1.0";
const POD: &str = "10.244.2.9";

fn engine(blocks: &Value) -> Engine {
    let mut engine = Engine::new();
    let pod = PodObject { addresses: vec![POD.parse().unwrap()], ..PodObject::default() };
    engine.put_pod(ObjectName::new("shop", "db"), pod, 1);
    engine.put_node("east1".into(), [NODE.parse().unwrap()].into());
    let spec = json!({"podSelector": {}, "ingress": [{"from": blocks, "ports": [{"port": 80}]}]});
    engine.put_policy(ObjectName::new("shop", "p"), &PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap()));
    engine
}

fn heard_from(engine: &mut Engine, proven: &[&str], published: &[&str]) {
    let list = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let aliases = SourceAliases { proven: list(proven), published: list(published) };
    engine.set_source(NODE.parse().unwrap(), Arc::new(aliases));
}

/// Whether the node reaches the pod, and what is said of it.
fn explained(engine: &mut Engine) -> (bool, String) {
    let flow = Flow { source: NODE.parse().unwrap(), destination: POD.parse().unwrap(), protocol: 6, port: Some(80) };
    let explanation = engine.commit(1).explain(Side::Ingress, &flow);
    (explanation.verdict.allowed, explanation.to_string())
}

#[test]
fn the_node_and_the_address_that_matched_are_named() {
    let mut engine = engine(&json!([{"ipBlock": {"cidr": "192.0.0.0/16", "except": ["192.0.3.0/24"]}}]));
    for (proven, published, allowed, said) in [
        (&["192.0.2.11"][..], &[][..], true, "the source is node east1, matched by its address 192.0.2.11"),
        (
            &["198.51.100.7", "2001:db8::7"],
            &[],
            false,
            "node east1, also matched by its addresses 198.51.100.7 and 2001:db8::7",
        ),
        (&[], &["192.0.2.11"], false, "node east1, none of whose underlay addresses is accepted as a source"),
        (
            &["192.0.3.1"],
            &[],
            false,
            "east1: its address 192.0.3.1 is excepted by ipBlock 192.0.0.0/16 except 192.0.3.0/24",
        ),
        (&["192.0.2.11"], &["192.0.3.1"], false, "east1: its address 192.0.3.1 is excepted by ipBlock"),
    ] {
        heard_from(&mut engine, proven, published);
        let (is_allowed, text) = explained(&mut engine);
        assert!(is_allowed == allowed && text.contains(said), "{said} in {text}");
        assert!(!text.contains("labels"), "{text}");
    }
    heard_from(&mut engine, &[], &[]);
    let (allowed, text) = explained(&mut engine);
    assert!(!allowed && !text.contains("the source is"), "{text}");
}

/// A node that roams costs an element of a set, or a copy of the set, whatever else there is.
#[test]
fn a_node_that_roams_changes_a_set_and_no_policy() {
    let blocks = json!([{"ipBlock": {"cidr": "192.0.2.0/24"}}, {"ipBlock": {"cidr": "203.0.113.0/24"}}]);
    let mut engine = engine(&blocks);
    let local = [LocalPod { addresses: vec![POD.parse().unwrap()] }];
    let rules = |engine: &mut Engine| -> Ruleset {
        engine.commit(1);
        engine.ruleset(&local)
    };
    heard_from(&mut engine, &["198.51.100.1"], &["198.51.100.1", "2001:db8::1"]);
    let before = rules(&mut engine);
    for (address, verb) in [
        ("192.0.2.11", "add element"),
        ("198.51.100.2", "add set"),
        ("2001:db8::1", ""),
        ("203.0.113.5", "add element"),
    ] {
        let was = rules(&mut engine);
        heard_from(&mut engine, &[address], &["198.51.100.1", "2001:db8::1"]);
        let mut is = rules(&mut engine);
        let change = transactions("inet t", &was, &mut is);
        let text = change.sets + &change.rules;
        assert!(text.starts_with(verb) && text.is_empty() == verb.is_empty(), "{address}: {text}");
        assert!(text.lines().count() <= 1 || text.contains("delete set "), "{address}: {text}");
    }
    assert!(before != rules(&mut engine));
}

/// A node's IPv6 traffic, while the node is heard from over IPv4.
#[test]
fn nftables_knows_a_node_by_an_address_of_the_other_family() {
    let overlay = "fd42:244:0:1::ffff".parse().unwrap();
    let (mut engine, pod) = (Engine::new(), "fd42:244:0:2::9".parse().unwrap());
    let object = PodObject { addresses: vec![pod], ..PodObject::default() };
    engine.put_pod(ObjectName::new("shop", "db"), object, 1);
    let spec = json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}]});
    engine.put_policy(ObjectName::new("shop", "p"), &PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap()));
    let mut lets_in = |proven: &str| {
        let proven = vec![proven.parse().unwrap()];
        engine.set_source(overlay, Arc::new(SourceAliases { proven, published: Vec::new() }));
        engine.commit(1);
        let rules = engine.ruleset(&[LocalPod { addresses: vec![pod] }]);
        let holds = |set: &String| rules.sets[set].elements.contains(&SetElement::Range(overlay, overlay));
        let chain = &rules.chains["in_fd42_244_0_2__9"].rules;
        chain.iter().any(|rule| {
            let from =
                |condition: &Match| matches!(condition, Match::Peer { set, v4: false, not: false } if holds(set));
            rule.then == Then::Allow && rule.matches.len() == 1 && from(&rule.matches[0])
        })
    };
    assert!(lets_in("192.0.2.11"));
    assert!(!lets_in("203.0.113.5"));
    assert!(lets_in("192.0.2.11"));
}
