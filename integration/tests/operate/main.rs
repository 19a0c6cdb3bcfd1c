//! What an operator does with a mesh: looks where packets end, has faults named, gives rights in etcd.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod command_line;
mod doctor;
mod events;
mod hostile;
mod ping;
mod refused;
mod removal;
mod roles;
mod status;

use std::time::Duration;

use integration::{
    MeshdNode,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::Value;

/// How long a mesh may take to do what it is asked, on a machine that is busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(90);

/// Two sites with this many hosts each, whose pods reach each other.
#[track_caller]
pub(crate) fn mesh(title: &str, hosts: u8) -> Mesh {
    let mesh = Mesh::start_on(TwoSites::with_hosts(title, hosts), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    mesh
}

/// What `meshctl -o json` answers, and its exit code.
#[track_caller]
pub(crate) fn json(node: &MeshdNode, args: &[&str]) -> (Value, i32) {
    let output = node.meshctl(&[&["-o", "json"], args].concat());
    let value = serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.describe()));
    (value, output.code().unwrap())
}
