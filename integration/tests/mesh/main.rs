//! Scenarios of whole meshes: real etcd, real daemons, real packets.

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod addresses;
mod backends;
mod calls;
mod clusters;
mod crypto_routing;
mod docs;
mod etcd;
mod fallback;
mod families;
mod flannel;
mod joins;
mod kernel_repair;
mod monitoring;
mod mtu;
mod nat;
mod outside_peer;
mod outside_peers;
mod paths;
mod replayed;
mod restart;
mod traffic;
mod two_sites;
mod underlay;

use std::time::Duration;

use integration::{Host, MeshdNode, Process, await_ok, await_until};
use serde_json::Value;

/// How long a mesh may take to do what it is asked, on a machine that is busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(90);

/// The problems that a status names.
pub(crate) fn problems(status: &Value) -> impl Iterator<Item = &Value> {
    status["problems"].as_array().into_iter().flatten()
}

/// Waits until the node is in the mesh and names no problem.
#[track_caller]
pub(crate) fn await_well(node: &MeshdNode) {
    await_ok(&format!("{} to be well", node.name()), SOON, || {
        let status = node.try_json(&["status"]).ok_or("no status")?;
        if status["state"] == "running" { Ok(()) } else { Err(status.to_string()) }
    });
}

/// `ip monitor route` on a host: what it has said since the start.
pub(crate) struct RouteWatch {
    host: Host,
    monitor: Process,
}

impl RouteWatch {
    /// A route of no mesh; it shows where the watch begins and where it ends.
    const MARK: &str = "203.0.113.254";

    #[track_caller]
    pub(crate) fn start(host: &Host) -> Self {
        let watch = Self { host: host.clone(), monitor: host.monitor("route") };
        watch.mark();
        watch
    }

    /// The lines since the start: every route that changed.
    #[track_caller]
    pub(crate) fn finish(self) -> Vec<String> {
        // Earlier events are reported before the mark.
        self.mark();
        self.monitor.log().lines().filter(|line| !line.contains(Self::MARK)).map(str::to_owned).collect()
    }

    /// Adds the mark's route and takes it away until the monitor has shown it.
    #[track_caller]
    fn mark(&self) {
        let lines = |log: String| log.lines().filter(|line| line.contains(Self::MARK)).count();
        let before = lines(self.monitor.log());
        await_until("the monitor to speak", SOON, || {
            self.host.ip(&[
                &format!("route add unreachable {} metric 7", Self::MARK),
                &format!("route delete unreachable {} metric 7", Self::MARK),
            ]);
            (lines(self.monitor.log()) > before).then_some(())
        });
    }
}
