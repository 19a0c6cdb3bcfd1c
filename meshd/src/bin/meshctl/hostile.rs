//! Untrusted text from etcd neither controls the terminal nor adds a line to a table.

use api_types::{Diagnosis, Explained, FlowSample, Peer, Ping, Policy, Route, Status};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{doctor, output::text_of, ping, policy, show};

/// Words of the tables themselves; any other string in these answers may be untrusted.
const OURS: [&str; 14] = [
    "degraded",
    "unreachable",
    "wireguard",
    "enforce",
    "denied",
    "error",
    "overlay",
    "192.0.2.1:51820",
    "10.244.2.0/24",
    "10.244.2.1",
    "10.244.1.2",
    "tunnel",
    "udp",
    "nftables",
];

/// The answer with `text` for each string that is not a table's own.
fn with<T: DeserializeOwned>(answer: &Value, text: &str) -> T {
    fn fill(answer: &mut Value, text: &str) {
        match answer {
            Value::String(word) if !OURS.contains(&word.as_str()) => *word = text.to_owned(),
            Value::Array(items) => items.iter_mut().for_each(|item| fill(item, text)),
            Value::Object(fields) => fields.values_mut().for_each(|value| fill(value, text)),
            _ => {}
        }
    }
    let mut answer = answer.clone();
    fill(&mut answer, text);
    serde_json::from_value(answer).unwrap()
}

fn shown<T: Serialize + DeserializeOwned>(answer: &Value, text: &str, render: impl Fn(&T) -> String) -> String {
    text_of(&with::<T>(answer, text), render).unwrap()
}

/// Every table, with `text` wherever others may have written.
fn tables(text: &str) -> Vec<String> {
    let problem = json!({"code": "x", "cause": "x", "remedy": "x"});
    let status = json!({
        "node": "x", "id": "x", "site": "x", "subnets": ["10.244.2.0/24"], "overlay": ["10.244.2.1"], "revision": 7,
        "etcd": {"connected": false, "endpoint": "x", "age": 1.0}, "state": "degraded", "problems": [problem],
        "policy": {"mode": "enforce"}, "drops": [{"reason": "x", "packets": 1}], "version": "x"
    });
    let peer = json!([{
        "name": "x", "id": "x", "site": "x", "subnets": ["10.244.2.0/24"], "path": "unreachable", "reason": "x",
        "remedy": "x", "endpoint": "192.0.2.1:51820", "latestHandshake": 1, "rx": 1, "tx": 1, "mtu": 1420
    }]);
    let route = json!([{
        "dst": "10.244.2.0/24", "path": "unreachable", "peer": "x", "reason": "x", "remedy": "x", "via": null,
        "dev": "x", "mtu": null, "src": null
    }]);
    let ping = json!({
        "target": "x", "peer": "x", "path": "wireguard", "mtu": 1420,
        "layers": [{"layer": "overlay", "address": "x", "passes": false, "roundTrip": null, "text": "x", "remedy": "x"}]
    });
    let diagnosis = json!({
        "interface": "x", "underlay": ["x"], "families": {"ipv4": true, "ipv6": true}, "listenPort": 51820,
        "etcd": ["x"], "findings": [{"code": "x", "severity": "error", "cause": "x", "remedy": "x"}]
    });
    let end = json!({
        "end": "x", "allowed": false, "policy": "x", "rule": 1, "ruleName": "x", "isolated": true, "nearestMiss": "x",
        "selecting": ["x"], "text": "x"
    });
    let explained = json!({"allowed": false, "egress": end, "ingress": end, "problems": ["x"]});
    let policies = json!([{"key": "x", "state": "x", "directions": ["x"], "rules": 1}]);
    let flow = json!({
        "number": 1, "time": 1, "verdict": "denied", "at": "x", "direction": "x", "source": "10.244.2.1",
        "sourcePod": "x", "destination": "10.244.1.2", "destinationPod": "x", "protocol": 6, "port": 80, "why": "x",
        "hint": "x"
    });
    vec![
        shown::<Status>(&status, text, show::status_text),
        shown::<Vec<Peer>>(&peer, text, |peers| show::peers_text(peers)),
        shown::<Vec<Route>>(&route, text, |routes| show::routes_text(routes)),
        shown::<Ping>(&ping, text, ping::layers_text),
        shown::<Diagnosis>(&diagnosis, text, |diagnosis| doctor::text(&doctor::Examined::of(diagnosis))),
        shown::<Explained>(&explained, text, Explained::text),
        shown::<Vec<Policy>>(&policies, text, |policies| policy::policies_text(policies)),
        shown::<FlowSample>(&flow, text, FlowSample::to_string),
    ]
}

/// Without the colours, which are there where the tests run on a terminal.
fn without_tones(table: &str) -> String {
    ["32", "33", "31", "02", "00"]
        .iter()
        .fold(table.to_owned(), |table, tone| table.replace(&format!("\x1b[{tone}m"), ""))
        .replace("\x1b[0m", "")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_table_acts_on_a_terminal(
        text in prop_oneof![any::<String>(), "[\\PC\u{1b}\r\n\u{202e}\u{2066}\u{9b}\u{7f}\u{0}\t]{1,12}"]
    ) {
        // Where there is nothing to say a line is left out.
        let text = format!("x{text}");
        let counted = |tables: &[String]| tables.iter().map(|table| table.lines().count()).collect::<Vec<_>>();
        let (hostile, harmless) = (tables(&text), tables("x"));
        prop_assert_eq!(counted(&hostile), counted(&harmless));
        for table in hostile {
            let table = without_tones(&table);
            prop_assert_eq!(text::printable_lines(&table), table.as_str());
            prop_assert!(!table.contains(|c: char| c != '\n' && c.is_control()));
        }
    }
}
