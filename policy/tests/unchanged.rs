//! Verdicts that a change leaves as they are, and flows that need no second judgement.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]
#![expect(clippy::disallowed_methods, reason = "a test may begin at any instant")]

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use packet::Packet;
use policy::{
    engine::{Classifier, Engine, Flow, ObjectName, PolicyState, Side},
    flow::{FlowTable, Judgement, Limits},
    object::{NamedPort, NetworkPolicy, PodObject, Protocol},
};
use serde_json::json;

const PODS: [&str; 3] = ["10.244.1.1", "10.244.2.2", "10.244.2.3"];

struct World {
    engine: Engine,
    before: u64,
}

fn pod(at: usize, app: &str, http: u16) -> PodObject {
    PodObject {
        uid: Some(format!("u{at}").into()),
        labels: [("app", app)].into_iter().collect(),
        addresses: vec![PODS[at].parse().unwrap()],
        ports: vec![NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: http }],
        ..PodObject::default()
    }
}

fn lets(from: &str) -> serde_json::Value {
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": from}}}], "ports": [{"port": "http"}]}]})
}

impl World {
    /// Pod 0 is of app web, which only app shop reaches, as pod 1 is.
    fn new() -> Self {
        let mut world = Self { engine: Engine::new(), before: 0 };
        world.engine.set_networks(vec!["10.244.0.0/16".parse().unwrap()].into());
        for (at, app) in ["web", "shop", "other"].into_iter().enumerate() {
            world.pod(at, app, 80);
        }
        world.policy("p", &lets("shop"));
        world.before = world.engine.commit(1).generation();
        world
    }

    fn pod(&mut self, at: usize, app: &str, http: u16) {
        self.engine.put_pod(ObjectName::new("shop", format!("pod{at}")), pod(at, app, http), 1);
    }

    fn policy(&mut self, name: &str, spec: &serde_json::Value) {
        let policy = PolicyState::Valid(NetworkPolicy::parse(spec).unwrap());
        self.engine.put_policy(ObjectName::new("shop", name), &policy);
    }

    /// Whether the last changes may have changed the verdict of pod 1's flow to pod 0.
    fn judges_again(&mut self) -> bool {
        let classifier = self.engine.commit(1);
        let since = classifier.unchanged_since(Side::Ingress, &flow());
        let again = since > self.before;
        assert!(since <= classifier.generation());
        self.before = classifier.generation();
        again
    }
}

fn flow() -> Flow {
    let [destination, source, _] = PODS.map(|pod| pod.parse().unwrap());
    Flow { source, destination, protocol: 6, port: Some(80) }
}

#[test]
fn only_what_a_verdict_depends_on_has_it_made_again() {
    let mut world = World::new();
    assert!(!world.judges_again(), "nothing changed");
    let other = json!({"podSelector": {"matchLabels": {"app": "other"}}, "policyTypes": ["Ingress"]});
    world.policy("q", &other);
    assert!(!world.judges_again(), "a policy of other pods");
    world.pod(2, "third", 80);
    assert!(!world.judges_again(), "another pod");
    world.engine.delete_policy(&ObjectName::new("shop", "q"));
    assert!(!world.judges_again(), "the policy of other pods is gone");
    world.pod(1, "other", 80);
    assert!(world.judges_again(), "labels of the source");
    world.pod(1, "shop", 80);
    assert!(world.judges_again());
    world.pod(0, "web", 81);
    assert!(world.judges_again(), "ports of the destination");
    world.policy("p", &lets("absent"));
    assert!(world.judges_again(), "the policy");
    world.engine.delete_policy(&ObjectName::new("shop", "p"));
    assert!(world.judges_again(), "the last policy");
    world.engine.put_node("n9".into(), Arc::from(["192.0.2.9".parse().unwrap()]));
    assert!(world.judges_again(), "nodes");
    world.engine.set_networks(vec!["10.0.0.0/8".parse().unwrap()].into());
    assert!(world.judges_again(), "networks");
}

/// A TCP segment from pod 1 to pod 0.
fn segment(flags: u8) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    for address in [flow().source, flow().destination] {
        let IpAddr::V4(address) = address else { panic!() };
        bytes.extend(address.octets());
    }
    bytes.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes
}

#[test]
fn a_flow_is_judged_again_only_after_a_change_that_concerns_it_and_then_it_is() {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let mut world = World::new();
    let now = Instant::now();
    let mut table = FlowTable::new(Limits::default(), 0, now);
    let mut passes = |classifier: &Classifier, flags: u8| {
        let bytes = segment(flags);
        let packet = Packet::parse(&bytes).unwrap();
        let judgement = table.inbound(classifier, &packet, &bytes, 0, now + Duration::from_secs(1));
        (matches!(judgement, Judgement::Pass(_)), table.counters().rejudged)
    };
    assert_eq!(passes(&world.engine.commit(1), SYN), (true, 0));
    world.pod(2, "third", 80);
    assert_eq!(passes(&world.engine.commit(1), ACK), (true, 0));
    world.policy("p", &lets("third"));
    assert_eq!(passes(&world.engine.commit(1), ACK), (false, 1));
    world.pod(2, "other", 80);
    assert_eq!(passes(&world.engine.commit(1), ACK), (false, 1), "the refusal stands");
    world.policy("p", &lets("shop"));
    assert_eq!(passes(&world.engine.commit(1), ACK), (true, 2));
}
