//! NetworkPolicy on whole meshes: real etcd, real daemons, and the packet that tries to pass unjudged.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod bridge_closed;
mod bridged;
mod churn;
mod clusters;
mod evidence;
mod forged;
mod fragments;
mod frames;
mod groups;
mod identity;
mod kernel;
mod masqueraded;
mod names;
mod node_peers;
mod nodes;
mod objects;
mod packets;
mod probe;
mod raw;
mod reported;
mod start;
mod tunnel;
mod untracked;
mod upgrade;
mod values;
mod worlds;

use std::time::Duration;

use integration::{
    await_ok,
    topology::{CONFIG, Mesh, TwoSites},
};

/// How long a mesh may take to do what it is asked, on a machine that is busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Two sites with this many hosts each, whose pods reach each other.
#[track_caller]
pub(crate) fn mesh(title: &str, hosts: u8) -> Mesh {
    let mesh = Mesh::start_on(TwoSites::with_hosts(title, hosts), CONFIG, |meshd| meshd);
    mesh.await_all_reach_each_other();
    mesh
}

/// Waits until every node enforces what etcd says now.
#[track_caller]
pub(crate) fn await_in_force(mesh: &Mesh) {
    let revision = i64::try_from(mesh.etcd.revision()).unwrap();
    for node in &mesh.nodes {
        await_ok(&format!("{} to enforce revision {revision}", node.name()), SOON, || {
            let status = node.try_json(&["status"]).ok_or("no status")?;
            // Renewals of the nodes' own leases raise the revision too, and change no policy.
            let applied = status["policy"]["revision"].as_i64().unwrap_or_default();
            if applied >= revision { Ok(()) } else { Err(status["policy"].to_string()) }
        });
    }
}
