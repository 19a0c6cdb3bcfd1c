//! What the API server takes is taken: each field of the CRD of ClusterNetworkPolicy (network-policy-api v0.3.0), and
//! the blocks of NetworkPolicy's `ipBlock`.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use policy::object::{ClusterPeer, ClusterPolicy, NetworkPolicy, PolicyPeer};
use serde_json::{Value, json};

/// A policy with this subject and these rules for egress.
fn policy(subject: &Value, egress: &Value) -> Value {
    json!({"tier": "Admin", "priority": 0, "subject": subject, "egress": egress})
}

fn rule(change: impl FnOnce(&mut Value)) -> Value {
    let mut rule = json!({"action": "Deny", "to": [{"namespaces": {}}]});
    change(&mut rule);
    policy(&json!({"namespaces": {}}), &json!([rule]))
}

fn to(peer: &Value) -> Value {
    rule(|rule| rule["to"] = json!([peer]))
}

fn protocol(protocol: &Value) -> Value {
    rule(|rule| rule["protocols"] = json!([protocol]))
}

fn many<T: Clone + Into<Value>>(value: T, count: usize) -> Value {
    vec![value.into(); count].into()
}

fn networks(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("10.{number}.0.0/16")).collect()
}

#[test]
fn cluster_network_policies_hold_or_do_not_as_the_crd_says() {
    let deny = json!({"action": "Deny", "to": [{"namespaces": {}}]});
    let all = json!({"namespaces": {}});
    let port = |port: Value| protocol(&json!({"tcp": {"destinationPort": port}}));
    let long = |length: usize| "é".repeat(length);
    let set = |field: &'static str, value: Value| {
        let mut policy = policy(&json!({"namespaces": {}}), &json!([]));
        policy[field] = value;
        policy
    };
    let table: Vec<(&str, Value, bool)> = vec![
        ("both selectors", policy(&json!({"pods": {"namespaceSelector": {}, "podSelector": {}}}), &json!([])), true),
        ("a subject of all namespaces", policy(&json!({"pods": {"podSelector": {}}}), &json!([])), true),
        (
            "null is left out",
            policy(&json!({"pods": {"namespaceSelector": null, "podSelector": {}}}), &json!([])),
            true,
        ),
        ("no podSelector", policy(&json!({"pods": {"namespaceSelector": {}}}), &json!([])), false),
        ("a peer of all namespaces", to(&json!({"pods": {"podSelector": {}}})), true),
        ("a peer without podSelector", to(&json!({"pods": {}})), false),
        ("two subjects", policy(&json!({"namespaces": {}, "pods": {"podSelector": {}}}), &json!([])), false),
        ("no subject", policy(&json!({}), &json!([])), false),
        ("host bits", to(&json!({"networks": ["10.0.0.77/4"]})), true),
        ("host bits, IPv6", to(&json!({"networks": ["fd00::77/8"]})), true),
        ("zeros before a number", to(&json!({"networks": ["010.0.0.0/8"]})), false),
        ("zeros before a length", to(&json!({"networks": ["10.0.0.0/08"]})), false),
        ("IPv4 in IPv6", to(&json!({"networks": ["::ffff:10.0.0.0/104"]})), false),
        ("an address alone", to(&json!({"networks": ["10.0.0.1"]})), false),
        ("43 characters", to(&json!({"networks": ["1111:2222:3333:4444:5555:6666:7777:8888/128"]})), true),
        ("more characters", to(&json!({"networks": ["0001:0002:0003:0004:0005:0006:255.255.255.255/128"]})), false),
        ("a protocol without a port", protocol(&json!({"tcp": {}})), false),
        ("another one without a port", protocol(&json!({"sctp": {"destinationPort": null}})), false),
        ("every port", port(json!({"range": {"start": 1, "end": 65535}})), true),
        ("25 networks", to(&json!({"networks": networks(25)})), true),
        ("26 networks", to(&json!({"networks": networks(26)})), false),
        ("no networks", to(&json!({"networks": []})), false),
        ("one twice", to(&json!({"networks": ["10.0.0.0/8", "10.0.0.0/8"]})), false),
        ("the same written otherwise", to(&json!({"networks": ["10.0.0.0/8", "10.0.0.1/8"]})), true),
        ("25 peers", rule(|rule| rule["to"] = many(all.clone(), 25)), true),
        ("26 peers", rule(|rule| rule["to"] = many(all.clone(), 26)), false),
        ("25 rules", policy(&all, &many(deny.clone(), 25)), true),
        ("26 rules", policy(&all, &many(deny, 26)), false),
        ("25 protocols", rule(|rule| rule["protocols"] = many(json!({"destinationNamedPort": "web"}), 25)), true),
        ("26 protocols", rule(|rule| rule["protocols"] = many(json!({"destinationNamedPort": "web"}), 26)), false),
        ("no protocols", rule(|rule| rule["protocols"] = json!([])), false),
        ("two protocols in one", protocol(&json!({"destinationNamedPort": "web", "udp": {}})), false),
        (
            "any text as a port's name",
            protocol(&json!({"destinationNamedPort": "Not-a-port-name--of-any-container"})),
            true,
        ),
        ("a number as a port's name", protocol(&json!({"destinationNamedPort": 80})), false),
        ("port 1", port(json!({"number": 1})), true),
        ("port 65535", port(json!({"number": 65535})), true),
        ("port 0", port(json!({"number": 0})), false),
        ("port 65536", port(json!({"number": 65536})), false),
        ("a range", port(json!({"range": {"start": 1, "end": 65535}})), true),
        ("a range of one", port(json!({"range": {"start": 9, "end": 9}})), false),
        ("a range without end", port(json!({"range": {"start": 9}})), false),
        ("a number and a range", port(json!({"number": 1, "range": {"start": 1, "end": 2}})), false),
        ("no port", port(json!({})), false),
        ("a name of 100", rule(|rule| rule["name"] = long(100).into()), true),
        ("a name of 101", rule(|rule| rule["name"] = long(101).into()), false),
        ("an empty name", rule(|rule| rule["name"] = "".into()), true),
        ("another action", rule(|rule| rule["action"] = "Allow".into()), false),
        ("priority 1000", set("priority", json!(1000)), true),
        ("priority 1001", set("priority", json!(1001)), false),
        ("no priority", set("priority", json!(null)), false),
        ("another tier", set("tier", json!("admin")), false),
    ];
    let wrong: Vec<String> = table
        .iter()
        .filter_map(|(what, spec, holds)| match ClusterPolicy::parse(spec) {
            Ok(_) if !holds => Some(format!("{what}: taken")),
            Err(error) if *holds => Some(format!("{what}: {error}")),
            _ => None,
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_left_out_means_all_and_host_bits_are_cleared() {
    let left_out = ClusterPolicy::parse(&to(&json!({"pods": {"podSelector": {}}}))).unwrap();
    let written = ClusterPolicy::parse(&to(&json!({"pods": {"namespaceSelector": {}, "podSelector": {}}}))).unwrap();
    assert_eq!(left_out, written);
    let policy = ClusterPolicy::parse(&to(&json!({"networks": ["10.0.0.77/4"]}))).unwrap();
    match policy.egress[0].peers.as_deref() {
        Some([ClusterPeer::Network(block)]) => assert_eq!(block.to_string(), "0.0.0.0/4"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn blocks_of_network_policies_are_read_as_the_api_server_reads_them() {
    for (cidr, except, expected) in [
        ("10.0.0.77/4", None, Some("0.0.0.0/4")),
        ("010.000.0.08/08", None, Some("10.0.0.0/8")),
        ("fd00::77/08", None, Some("fd00::/8")),
        ("10.0.0.0/8", Some("010.001.2.3/016"), Some("10.0.0.0/8 except 10.1.0.0/16")),
        ("0.0.0.0/0", Some("0.0.0.0/00"), None),
        ("10.0.0.0/", None, None),
        ("10.0..0/8", None, None),
        ("10.0.0.0/33", None, None),
        ("10.0.0.256/8", None, None),
        ("10.0.0.0/8 ", None, None),
        ("0x0a.0.0.0/8", None, None),
        // Which family it means differs between readers.
        ("::ffff:10.0.0.0/104", None, None),
    ] {
        let except: Vec<&str> = except.into_iter().collect();
        let spec = json!({"ingress": [{"from": [{"ipBlock": {"cidr": cidr, "except": except}}]}]});
        let read = NetworkPolicy::parse(&spec).ok().and_then(|policy| {
            let peers = policy.ingress?.remove(0).peers?;
            match &peers[..] {
                [PolicyPeer::Block(block)] => Some(block.to_string()),
                _ => None,
            }
        });
        assert_eq!(read.as_deref(), expected, "{cidr}");
    }
}
