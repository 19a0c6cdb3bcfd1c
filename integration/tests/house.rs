//! The crates know each other in one direction only.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Each crate of the workspace with those that it may name, the lowest first. A new edge is a decision: it must not
/// make a pure crate depend on a shell, nor one shell on another without need.
const ALLOWED: [(&str, &[&str]); 27] = [
    ("atomic-file", &[]),
    ("cow-map", &[]),
    ("etcd-schema", &[]),
    ("netfilter", &[]),
    ("netlink", &[]),
    ("packet", &[]),
    ("text", &[]),
    ("keys", &["atomic-file", "etcd-schema"]),
    ("mesh", &["cow-map", "etcd-schema"]),
    ("policy", &["etcd-schema", "packet"]),
    ("api-types", &["mesh", "policy"]),
    ("kernel", &["atomic-file", "cow-map", "mesh", "netfilter", "netlink", "text"]),
    ("prober", &["etcd-schema", "keys", "mesh"]),
    ("tunnel", &["cow-map", "etcd-schema", "keys", "mesh", "packet"]),
    ("control-core", &["cow-map", "etcd-schema", "mesh", "text"]),
    ("node-core", &["control-core", "cow-map", "etcd-schema", "mesh"]),
    ("mesh-sim", &["control-core", "etcd-schema", "mesh", "node-core"]),
    ("control", &["atomic-file", "control-core", "etcd-schema", "mesh", "text"]),
    ("program", &["control", "text"]),
    ("sync-core", &["control-core", "etcd-schema", "mesh", "policy"]),
    ("sync", &["control", "control-core", "etcd-schema", "mesh", "program", "sync-core", "text"]),
    ("cni", &["atomic-file", "netlink"]),
    ("attachments", &["atomic-file", "cni", "etcd-schema", "mesh", "netlink"]),
    (
        "enforcement",
        &[
            "api-types",
            "attachments",
            "cni",
            "control-core",
            "cow-map",
            "etcd-schema",
            "mesh",
            "netfilter",
            "netlink",
            "packet",
            "policy",
            "tunnel",
        ],
    ),
    ("api", &["api-types", "attachments", "cni", "etcd-schema", "keys", "text"]),
    (
        "meshd",
        &[
            "api",
            "api-types",
            "atomic-file",
            "attachments",
            "cni",
            "control",
            "control-core",
            "cow-map",
            "enforcement",
            "etcd-schema",
            "kernel",
            "keys",
            "mesh",
            "netfilter",
            "netlink",
            "node-core",
            "packet",
            "policy",
            "prober",
            "program",
            "sync-core",
            "text",
            "tunnel",
        ],
    ),
    ("integration", &["cni", "etcd-schema", "policy"]),
];

#[test]
fn crates_name_only_those_below_them() {
    let cargo =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).output();
    let metadata: Value = serde_json::from_slice(&cargo.unwrap().stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let found: BTreeMap<&str, Vec<&str>> = packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            let own = dependencies.filter(|dependency| dependency["kind"].is_null());
            let mut own: Vec<&str> = own
                .map(|dependency| dependency["name"].as_str().unwrap())
                .filter(|name| names.contains(name))
                .collect();
            own.sort_unstable();
            (package["name"].as_str().unwrap(), own)
        })
        .collect();
    let allowed: BTreeMap<&str, Vec<&str>> = ALLOWED.iter().map(|(name, below)| (*name, below.to_vec())).collect();
    assert_eq!(found, allowed);
    for (place, (_, below)) in ALLOWED.iter().enumerate() {
        for name in *below {
            assert!(
                ALLOWED[..place].iter().any(|(lower, _)| lower == name),
                "{name} is not below the crate that names it"
            );
        }
    }
}
