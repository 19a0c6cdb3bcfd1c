//! ClusterNetworkPolicy as its definition has it (network-policy-api v0.3.0) and as the daemon reads it: each property is
//! read or refused by name, and at each bound the daemon takes what the API server takes.

use std::{fmt::Write as _, fs, path::PathBuf};

use integration::{KubernetesApi, await_until, kubernetes_programs};
use policy::object::ClusterPolicy;
use serde_json::{Map, Value, json};

use crate::{SOON, cluster::Cluster};

const API: &str = "policy.networking.k8s.io";
/// Properties outside the `spec`, which no policy is read from, each with the reason.
const UNREAD: [(&str, &str); 4] = [
    ("apiVersion", "compared with the versions that are read, before the spec is"),
    ("kind", "compared with the key, before the spec is"),
    ("metadata", "its name is compared with the key; labels and annotations say nothing to a policy"),
    ("status", "what implementations say of the policy"),
];

/// What the experimental channel has and no policy is read from.
const UNSUPPORTED: &str = "domainNames is not supported";

/// The definition leaves selectors to who reads them. The API server refuses such a one in objects of its own.
const OF_SELECTORS: &str = "In and NotIn need at least one value";

/// The file of the definition.
pub(crate) fn file(channel: &str) -> PathBuf {
    kubernetes_programs("definitions").join(channel).join(format!("{API}_clusternetworkpolicies.yaml"))
}

/// Waits until the API server serves the definition.
#[track_caller]
pub(crate) fn serve(api: &KubernetesApi) {
    serve_channel(api, "standard");
}

#[track_caller]
fn serve_channel(api: &KubernetesApi, channel: &str) {
    // Too long for the annotation of a plain `apply`.
    api.kubectl(&["apply", "--server-side", "-f", file(channel).to_str().unwrap()], "");
    await_until("the definition to be served", SOON, || {
        let served = api.try_kubectl(&["get", "--raw", &format!("/openapi/v3/apis/{API}/v1beta1")], "").stdout;
        (served.contains(API) && served.contains("domainNames") == (channel == "experimental")).then_some(())
    });
}

/// The schemas of all versions, by name.
fn schemas(channel: &str) -> Vec<(String, Value)> {
    let definition: Value = serde_saphyr::from_str(&fs::read_to_string(file(channel)).unwrap()).unwrap();
    let versions = definition["spec"]["versions"].as_array().unwrap().iter();
    versions
        .map(|version| {
            let name = version["name"].as_str().unwrap();
            (format!("{channel} {name}"), version["schema"]["openAPIV3Schema"].clone())
        })
        .collect()
}

/// From an object to a property, or from a list to its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step<'s> {
    Property(&'s str),
    Entry,
}

/// Every place in `schema` and below, with its own schema.
fn places<'s>(schema: &'s Value, at: &[Step<'s>], found: &mut Vec<(Vec<Step<'s>>, &'s Value)>) {
    found.push((at.to_vec(), schema));
    for (name, property) in properties(schema) {
        places(property, &[at, &[Step::Property(name)]].concat(), found);
    }
    if let Some(entry) = schema.get("items") {
        places(entry, &[at, &[Step::Entry]].concat(), found);
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    schema["properties"].as_object().into_iter().flatten().map(|(name, property)| (name.as_str(), property))
}

/// As the reader names the place, with the first entry of each list.
fn path(steps: &[Step<'_>]) -> String {
    steps.iter().fold("spec".to_owned(), |mut path, step| {
        let _ = match step {
            Step::Property(name) => write!(path, ".{name}"),
            Step::Entry => write!(path, "[0]"),
        };
        path
    })
}

fn is_block(schema: &Value) -> bool {
    schema["x-kubernetes-validations"].to_string().contains("isCIDR")
}

/// A value that holds, and is another one for another `number` wherever there are two.
fn sample(name: &str, schema: &Value, number: u64) -> Value {
    let last = schema["enum"].as_array().map(|words| words[usize::try_from(number).unwrap() % words.len()].clone());
    match (schema["type"].as_str(), name) {
        _ if last.is_some() => last.unwrap(),
        // A range ends behind its start.
        (Some("integer"), "end") => json!(schema["maximum"].as_u64().unwrap() - number),
        (Some("integer"), _) => json!(schema["minimum"].as_u64().unwrap() + number),
        // The definition leaves operators to who reads them.
        (Some("string"), "operator") => json!(["In", "NotIn"][usize::try_from(number).unwrap() % 2]),
        (Some("string"), _) if is_block(schema) => json!(format!("10.{number}.0.0/16")),
        (Some("string"), _) => json!(format!("a{number}")),
        (Some("array"), _) => json!([sample(name, &schema["items"], number)]),
        _ if schema.get("additionalProperties").is_some() => json!({"a": format!("a{number}")}),
        _ => {
            let mut object = Map::new();
            let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            // Every version reads this one, where it is.
            let known = properties(schema).find(|(name, _)| *name == "namespaces");
            let first = known.or_else(|| properties(schema).next()).map(|(name, _)| name);
            let least = first.filter(|_| schema["minProperties"] == 1);
            // Most operators need values.
            let values = schema["properties"].get("operator").map(|_| "values");
            for name in required.chain(least).chain(values) {
                object.insert(name.to_owned(), sample(name, &schema["properties"][name], number));
            }
            if schema["maxProperties"] == 1 {
                object = object.into_iter().take(1).collect();
            }
            object.into()
        }
    }
}

/// An object of this schema with `value` at a place in it, and no more than it must have beside that.
fn with(schema: &Value, steps: &[Step<'_>], value: Value) -> Value {
    match steps {
        [] => value,
        [Step::Entry, rest @ ..] => json!([with(&schema["items"], rest, value)]),
        [Step::Property(name), rest @ ..] => {
            let inner = with(&schema["properties"][*name], rest, value);
            let mut object = sample("", schema, 0);
            if schema["maxProperties"] == 1 {
                object = json!({});
            }
            object[*name] = inner;
            object
        }
    }
}

/// Whether the reading depends on what stands at this place, or names it as nothing that it knows.
fn is_read(spec: &Value, steps: &[Step<'_>], schema: &Value) -> Result<(), String> {
    let name = match steps.last() {
        Some(Step::Property(name)) => name,
        _ => "",
    };
    let read = |number: u64| ClusterPolicy::parse(&with(spec, steps, sample(name, schema, number)));
    match (read(0), read(1)) {
        (Ok(one), Ok(other)) if one != other => Ok(()),
        (Ok(_), Ok(_)) => Err(format!("{}: it makes no difference", path(steps))),
        (Err(error), _) | (_, Err(error)) => {
            let text = error.to_string();
            // What holds it may be unknown already, or known and refused.
            let refusals = ["is an unknown field", "is not supported: "];
            let is_named = (1..=steps.len()).any(|length| {
                refusals.iter().any(|refusal| text.contains(&format!("{} {refusal}", path(&steps[..length]))))
            });
            if is_named { Ok(()) } else { Err(format!("{}: {text}", path(steps))) }
        }
    }
}

#[test]
fn every_property_of_the_definition_is_read_or_refused_by_name() {
    for (version, schema) in ["standard", "experimental"].into_iter().flat_map(schemas) {
        let outside: Vec<&str> = properties(&schema).map(|(name, _)| name).filter(|name| *name != "spec").collect();
        assert_eq!(outside, UNREAD.map(|(name, _)| name), "{version}");
        let spec = &schema["properties"]["spec"];
        let mut found = Vec::new();
        places(spec, &[], &mut found);
        let leaves: Vec<_> = found
            .iter()
            .filter(|(_, schema)| properties(schema).next().is_none() && schema.get("items").is_none())
            .collect();
        assert!(leaves.len() > 50, "{version}: {leaves:?}");
        let wrong: Vec<String> =
            leaves.iter().filter_map(|(steps, schema)| is_read(spec, steps, schema).err()).collect();
        assert!(wrong.is_empty(), "{version}:\n{}", wrong.join("\n"));
    }
}

/// Values within the bounds of a place and just beyond them.
fn bounds(steps: &[Step<'_>], schema: &Value) -> Vec<Value> {
    let name = match steps.last() {
        Some(Step::Property(name)) => name,
        _ => "",
    };
    let mut values = vec![sample(name, schema, 0), sample(name, schema, 1), json!(null), json!(true)];
    let bound = |key: &str| schema[key].as_u64();
    if let Some(words) = schema["enum"].as_array() {
        values.extend(words.iter().cloned().chain([json!("Else"), json!("")]));
    }
    values.extend(bound("minimum").into_iter().flat_map(|least| [json!(least), json!(least as i64 - 1)]));
    values
        .extend(bound("maximum").into_iter().flat_map(|most| [json!(most), json!(most + 1), json!(most.to_string())]));
    if let Some(most) = bound("maxLength").filter(|_| !is_block(schema)) {
        values.extend([most, most + 1].map(|length| json!("é".repeat(usize::try_from(length).unwrap()))));
    }
    if schema["type"] == "array" {
        let entries = |count: u64| (0..count).map(|number| sample("", &schema["items"], number % 3 + number / 3 * 3));
        values.push(json!([]));
        values.extend(
            bound("maxItems").into_iter().flat_map(|most| [most, most + 1]).map(|count| entries(count).collect()),
        );
    }
    let all: Vec<(&str, Value)> =
        properties(schema).map(|(name, property)| (name, sample(name, property, 0))).collect();
    if !all.is_empty() {
        values.push(json!({}));
        let pairs = |pairs: &[(&str, Value)]| -> Value {
            pairs.iter().cloned().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
        };
        values.extend(all.windows(2).map(pairs));
        values.extend((0..all.len()).map(|at| pairs(&[&all[..at], &all[at + 1..]].concat())));
    }
    values
}

#[test]
fn at_each_bound_of_the_definition_the_daemon_takes_what_the_api_server_takes() {
    let cluster = Cluster::start("kubernetes_definition");
    for channel in ["standard", "experimental"] {
        compare_bounds(&cluster, channel);
    }
}

fn compare_bounds(cluster: &Cluster, channel: &str) {
    serve_channel(&cluster.api, channel);
    let versions = schemas(channel);
    let (_, schema) = versions.iter().find(|(name, _)| name.ends_with("v1beta1")).unwrap();
    let spec = &schema["properties"]["spec"];
    let mut found = Vec::new();
    places(spec, &[], &mut found);
    let mut probes: Vec<(String, Value)> = Vec::new();
    for (steps, schema) in found.iter().filter(|(steps, _)| !steps.is_empty()) {
        let values = bounds(steps, schema).into_iter();
        probes.extend(values.map(|value| (format!("{} = {value}", path(steps)), with(spec, steps, value))));
    }
    let objects: Vec<Value> = probes
        .iter()
        .enumerate()
        .map(|(number, (_, spec))| {
            json!({"apiVersion": format!("{API}/v1beta1"), "kind": "ClusterNetworkPolicy",
                "metadata": {"name": format!("probe-{number}")}, "spec": spec})
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
    let tried = await_until("the API server to take any", SOON, || {
        let tried = cluster
            .api
            .try_kubectl(&["create", "--dry-run=server", "--validate=ignore", "-o", "name", "-f", "-"], &list);
        (!tried.stdout.is_empty()).then_some(tried)
    });
    let taken: Vec<&str> = tried.stdout.lines().filter_map(|line| line.split_once('/')).map(|(_, name)| name).collect();
    let mut wrong = Vec::new();
    for (number, (what, spec)) in probes.iter().enumerate() {
        let by_server = taken.contains(&format!("probe-{number}").as_str());
        match ClusterPolicy::parse(spec) {
            Ok(_) if !by_server => wrong.push(format!("{what:.200}: the API server refuses it")),
            Err(error) if by_server => {
                let text = error.to_string();
                if ![OF_SELECTORS, UNSUPPORTED].iter().any(|known| text.contains(known)) {
                    wrong.push(format!("{what:.200}: {text:.300}"));
                }
            }
            _ => {}
        }
    }
    println!("{channel}: {} of {} probes are taken", taken.len(), probes.len());
    assert!(taken.len() > 100 && probes.len() > taken.len() + 100, "{} of {}", taken.len(), probes.len());
    assert!(wrong.is_empty(), "{channel}: {} of {}:\n{}", wrong.len(), probes.len(), wrong.join("\n"));
}
