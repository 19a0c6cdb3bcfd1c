//! Effects and work of [`NodeCore`](node_core::NodeCore), carried out.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use mesh::{
    address::Family,
    kernel_state::{Desired, OthersRules},
    problem::{Problem, ProblemCode},
    tunnel_table::TunnelTable,
};
use node_core::{Done, Effect, PassOutcome, Reconciled, SubnetEnvChange, Work};
use tokio::time::timeout;

use super::{NodeLoop, found};
use crate::{
    daemon::{
        published::{Carrier, NodeState},
        underlay,
    },
    subnet_env::SubnetEnv,
};

impl NodeLoop {
    pub(super) async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Restarted(peer) => self.tunnel.restarted(&peer.to_string()),
            Effect::Call(peers) => self.tunnel.call(&peers),
            Effect::TellEnforcement => self.tell_enforcement(),
            Effect::ReadUnderlay => self.read_underlay().await,
            Effect::ReadAttached { subnet, earlier } => self.read_attached(subnet, earlier).await,
            Effect::Show(outcome) => self.show(*outcome),
        }
    }

    pub(super) async fn work(&mut self, work: Work) -> Done {
        match work {
            Work::ReopenTun => Done::TunReopened(self.reopen_tun()),
            Work::AwaitPolicies(at_most) => Done::Policies { guarded: self.await_policies(at_most).await },
            Work::ApplyTable(table) => Done::TableApplied(self.apply_table(table)),
            Work::Reconcile { desired, look, others } => Done::Reconciled(self.reconcile(&desired, look, others).await),
            Work::SubnetEnv(change) => Done::SubnetEnv(self.keep_subnet_env(change)),
        }
    }

    /// Tells enforcement what the mesh looks like, and where its nodes are proven to be.
    fn tell_enforcement(&mut self) {
        let mesh = self.core.mesh();
        self.memory.proven.follow(Instant::now(), self.prober.with_agents(|agents| agents.next_hops()));
        let addresses: Vec<IpAddr> = underlay::own_addresses(&self.underlay).collect();
        let (known, me) = ((mesh.resolver().records(), mesh.topology()), (&self.id, &self.settings.node));
        self.enforcement.mesh(self.facts_of_mesh.of(known, self.memory.proven.addresses(), me, &addresses));
    }

    fn show(&self, outcome: PassOutcome) {
        let PassOutcome { plan: Some(plan), mut problems } = outcome else {
            self.published.set(NodeState { problems: outcome.problems, ..NodeState::default() });
            return;
        };
        problems.extend(self.memory.clock_problems().iter().cloned());
        let mesh = self.core.mesh();
        self.published.set(NodeState {
            topology: mesh.topology().clone(),
            subnet_holds: !mesh.resolver().topology().own_subnets.is_empty(),
            alive: mesh.alive().clone(),
            plan: Some(plan),
            own_endpoints: self.endpoints.clone(),
            record_problems: std::sync::Arc::clone(&mesh.resolver().records().problems),
            problems,
            firewall_drops: self.firewall_drops.clone(),
            underlay: self.carriers(),
        });
    }

    /// The interfaces that carry the outer packets.
    pub(super) fn carriers(&self) -> Vec<Carrier> {
        let links = Family::BOTH.into_iter().filter_map(|family| underlay::of(&self.underlay, family));
        let carriers: BTreeSet<Carrier> =
            links.map(|link| Carrier { name: link.name.to_string(), mtu: link.mtu }).collect();
        carriers.into_iter().collect()
    }

    /// Makes the TUN device again. Returns whether it is there.
    fn reopen_tun(&self) -> bool {
        let interface = &self.settings.interface;
        match self.tunnel.reopen_tun() {
            Ok(()) => tracing::warn!(%interface, "TUN device was removed; recreated"),
            Err(error) => {
                tracing::error!(%error, %interface, "cannot create the TUN device; retrying");
                return false;
            }
        }
        true
    }

    /// Whether rules stand that no packet passes unjudged.
    async fn await_policies(&self, at_most: Duration) -> bool {
        let mut applied = self.enforcement.applied();
        if !at_most.is_zero() {
            let first = applied.wait_for(|applied| applied.generation > 0 || applied.refused);
            if timeout(at_most, first).await.is_err() {
                tracing::warn!("policies are not in force yet; this node's pods are unreachable until then");
            }
        }
        applied.borrow().guarded
    }

    /// Gives the tunnel its table. Returns what it refuses of it.
    fn apply_table(&self, table: TunnelTable) -> Vec<Problem> {
        let refused = self.tunnel.apply(table).into_iter();
        let problem = |refused: tunnel::RefusedClaim| {
            Problem::new(
                ProblemCode::TunnelRefused,
                format!("{}: {}", refused.peer, refused.reason),
                "a key or prefix may belong to one record only: remove it from the wrong record below nodes/ or peers/",
            )
        };
        refused.map(problem).collect()
    }

    async fn reconcile(&self, desired: &Desired, look: bool, others: OthersRules) -> Reconciled {
        let report = match look {
            true => self.kernel.reconcile(desired, others).await,
            false => self.kernel.apply_changes(desired, others).await,
        };
        if let Err(error) = &report {
            tracing::error!(%error, "cannot read kernel state; retrying");
        }
        found::reconciled(report)
    }

    /// Returns why `RUN/subnet.env` is not as it is to be.
    fn keep_subnet_env(&self, change: SubnetEnvChange) -> Option<Problem> {
        let path = self.settings.run_dir.join("subnet.env");
        match change {
            SubnetEnvChange::Write { networks, subnets, mtu } => {
                let env = SubnetEnv { networks, subnets, mtu, ip_masq: self.settings.ip_masq };
                let error = env.write(&path).err()?;
                Some(subnet_env(&path, "written", &error, "free disk space, or make the directory writable"))
            }
            SubnetEnvChange::Remove => {
                let error = std::fs::remove_file(&path).err()?;
                let remedy = "remove the file: its subnet no longer belongs to this node";
                (error.kind() != std::io::ErrorKind::NotFound).then(|| subnet_env(&path, "removed", &error, remedy))
            }
        }
    }
}

fn subnet_env(path: &Path, not: &str, error: &std::io::Error, remedy: &str) -> Problem {
    Problem::new(ProblemCode::SubnetEnv, format!("{} cannot be {not}: {error}", path.display()), remedy)
}
