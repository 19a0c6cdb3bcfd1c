//! Every world of `tests/worlds/`, as it is and in two clusters at once, by the classifier and by the rules of
//! nftables.
//!
//! The second cluster has the first one's objects with the same names; one bit of each address differs, in the objects
//! and in what is asked, so that a block of addresses holds the second one's as it holds the first one's.

#[path = "../../../tests/reference/kernel.rs"]
mod kernel;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::Instant,
};

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::super::{Expectation, list, run, store::WorldObjects};
use crate::engine::{Cause, Side};

const CLUSTERS: [&str; 2] = ["east", "west"];
const OBJECTS: [&str; 5] = ["namespaces", "nodes", "pods", "policies", "clusterPolicies"];

fn worlds() -> Vec<Value> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/worlds");
    let files = fs::read_dir(folder).unwrap().map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    files.flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>()).collect()
}

/// The same text with one bit of an address changed, if it is one; a block of addresses likewise.
fn mirrored_text(text: &str) -> String {
    let mirrored = |address: IpAddr| match address {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4) ^ 1 << 22)),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) ^ 1 << 110)),
    };
    match (text.parse::<IpAddr>(), text.parse::<IpNet>()) {
        (Ok(address), _) => mirrored(address).to_string(),
        (_, Ok(net)) => format!("{}/{}", mirrored(net.addr()), net.prefix_len()),
        _ => text.to_owned(),
    }
}

fn mirrored(value: &Value) -> Value {
    match value {
        Value::String(text) => mirrored_text(text).into(),
        Value::Array(list) => list.iter().map(mirrored).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), mirrored(value))).collect(),
        other => other.clone(),
    }
}

/// What is asked, or changed, of one cluster's pods.
fn of_cluster(value: &Value, cluster: &str) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| {
                let value = match (key.as_str(), value) {
                    ("pod" | "src" | "dst", Value::String(name)) if name.parse::<IpAddr>().is_err() => {
                        format!("{cluster}:{name}").into()
                    }
                    ("policy" | "pod", _) => value.clone(),
                    _ => of_cluster(value, cluster),
                };
                (key.clone(), value)
            })
            .chain(map.contains_key("op").then(|| ("cluster".to_owned(), cluster.into())))
            .collect(),
        Value::Array(list) => list.iter().map(|value| of_cluster(value, cluster)).collect(),
        other => other.clone(),
    }
}

/// For each element one of each cluster.
fn both(list: &[Value]) -> Vec<Value> {
    list.iter().flat_map(|value| [of_cluster(value, CLUSTERS[0]), mirrored(&of_cluster(value, CLUSTERS[1]))]).collect()
}

/// `None`: the world is of no pods, or has clusters of its own.
fn doubled(world: &Value) -> Option<Value> {
    if world.get("policy").is_some() || world.get("clusters").is_some() {
        return None;
    }
    let objects: Map<String, Value> =
        OBJECTS.iter().filter_map(|name| Some(((*name).to_owned(), world.get(name)?.clone()))).collect();
    let objects = Value::from(objects);
    let steps = list(world, "steps").unwrap().iter().map(|step| {
        let part = |name| both(list(step, name).unwrap());
        json!({"apply": part("apply"), "probes": part("probes")})
    });
    Some(json!({
        "name": world["name"],
        "clusters": {CLUSTERS[1]: mirrored(&objects), CLUSTERS[0]: objects},
        "probes": both(list(world, "probes").unwrap()),
        "steps": steps.collect::<Vec<_>>(),
        "packets": both(list(world, "packets").unwrap()),
    }))
}

#[test]
fn two_clusters_of_equal_names_are_judged_as_one() {
    let (mut checked, mut wrong) = (0, Vec::new());
    for world in worlds() {
        let Some(doubled) = doubled(&world) else { continue };
        let once = run(&world, Instant::now()).unwrap();
        let twice = run(&doubled, Instant::now()).unwrap();
        assert_eq!(twice.checked, 2 * once.checked, "{}", world["name"]);
        checked += twice.checked;
        wrong.extend(twice.differences.iter().map(ToString::to_string));
    }
    assert!(wrong.is_empty(), "{} of {checked} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(checked > 100, "{checked} checked");
}

#[test]
fn the_rules_of_nftables_judge_the_worlds_alike() {
    let mut checked = 0;
    for world in worlds() {
        for world in doubled(&world).into_iter().chain([world]) {
            let mut store = WorldObjects::new(&world).unwrap();
            checked += compared(&world, &mut store, &world);
            for step in list(&world, "steps").unwrap() {
                list(step, "apply").unwrap().iter().for_each(|change| store.apply(change).unwrap());
                checked += compared(&world, &mut store, step);
            }
        }
    }
    assert!(checked > 300, "{checked} checked");
}

/// Compares what nftables and the classifier say of the probes of a world or a step.
fn compared(world: &Value, store: &mut WorldObjects, of: &Value) -> usize {
    let (classifier, rules) = (store.classifier(), store.ruleset());
    let probes = list(of, "probes").unwrap();
    for value in probes {
        let flow = Expectation::read(value, store).unwrap().flow;
        let connection = classifier.connection(&flow);
        for (side, verdict) in [(Side::Egress, connection.egress), (Side::Ingress, connection.ingress)] {
            // No packet of these meets the rules of pods.
            if matches!(verdict.cause, Cause::Itself | Cause::OwnNode) {
                continue;
            }
            assert_eq!(kernel::passes(&rules, side, &flow), verdict.allowed, "{}: {side:?} {value}", world["name"]);
        }
    }
    probes.len()
}
