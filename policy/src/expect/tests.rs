//! Tests of the runner itself: it must detect differences.

mod doubled;

use std::time::Instant;

use serde_json::json;

use super::run;

#[test]
fn a_wrong_expectation_is_a_difference_with_its_reason() {
    let world = json!({
        "name": "closed", "why": "nothing gets in",
        "pods": [{"ns": "shop", "name": "db", "ip": "10.0.0.1"}],
        "policies": [{"metadata": {"namespace": "shop", "name": "closed"}, "spec": {}}],
        "probes": [
            {"from": {"ip": "203.0.113.7"}, "to": {"pod": "shop/db"}, "port": 80, "expect": "allow"},
            {"from": {"pod": "shop/db"}, "to": {"ip": "203.0.113.7"}, "port": 80, "expect": "allow"},
        ],
    });
    let outcome = run(&world, Instant::now()).unwrap();
    assert_eq!((outcome.checked, outcome.differences.len()), (2, 1));
    let text = outcome.differences[0].to_string();
    for part in ["closed: probes[0]", "expected allow, got deny", "NetworkPolicy shop/closed", "nothing gets in"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn what_cannot_be_read_is_no_agreement() {
    for world in [
        json!({"probes": []}),
        json!({"name": "x", "probes": [{"from": {"pod": "a/b"}, "to": {"ip": "10.0.0.1"}, "expect": "deny"}]}),
        json!({"name": "x", "probes": [{"from": {"ip": "::1"}, "to": {"ip": "10.0.0.1"}, "expect": "deny"}]}),
        json!({"name": "x", "probes": [{"from": {"ip": "10.0.0.2"}, "to": {"ip": "10.0.0.1"}, "expect": "perhaps"}]}),
        json!({"name": "x", "steps": [{"apply": [{"op": "paint_pod"}]}]}),
    ] {
        assert!(run(&world, Instant::now()).is_err(), "{world}");
    }
}

#[test]
fn chunks_go_by_the_names_of_their_specifications() {
    let packet =
        |chunk: &str| json!({"src": "10.0.0.2", "dst": "10.0.0.1", "proto": "SCTP", "chunk": chunk, "expect": "drop"});
    let world = |chunk: &str| {
        json!({"name": "sctp", "pods": [{"ns": "a", "name": "b", "ip": "10.0.0.1"}],
        "policies": [{"metadata": {"namespace": "a", "name": "closed"}, "spec": {}}], "packets": [packet(chunk)]})
    };
    for chunk in ["INIT", "INIT ACK", "COOKIE-ECHO", "AUTH", "ASCONF-ACK", "FORWARD-TSN", "I-DATA", "RE-CONFIG"] {
        assert!(run(&world(chunk), Instant::now()).unwrap().differences.is_empty(), "{chunk}");
    }
    assert!(run(&world("COOKIE-JAR"), Instant::now()).is_err());
}
