//! The node and its kernel: passes over its state, what they find, and what is read of it.

use std::time::Instant;

use control_core::membership::{LocalFacts, MembershipState};
use ipnet::IpNet;
use kernel::{self, KernelEvents, Report, SeenOthers};
use mesh::{
    address::prefixes,
    interface::InterfaceName,
    kernel_state,
    plan::Plan,
    problem::{Problem, ProblemCode},
};

use super::{Node, SETTINGS_SETTLE, facts, selection};
use crate::{
    daemon::{nftables, underlay, wake::RETRY},
    doctor::host::not_forwarding,
    subnet_env::SubnetEnv,
};

impl Node {
    /// Makes the kernel's state what is desired; `look`: something may have changed there that was not told.
    pub(super) async fn reconcile(&mut self, desired: &kernel_state::Desired, look: bool, now: Instant) {
        let problems = &mut self.kernel_problems;
        problems.clear();
        let others = self.others.others(now);
        let report = match look {
            true => self.kernel.reconcile(desired, others).await,
            false => self.kernel.follow(desired, others).await,
        };
        match report.as_ref().map(|report| report.others) {
            Ok(SeenOthers::Read) => self.others.read(now, Instant::now()),
            Ok(SeenOthers::Kept) => self.others.left_out(),
            Ok(SeenOthers::Unchanged) if look => self.others.nothing_new(),
            Ok(SeenOthers::Unchanged) | Err(_) => {}
        }
        let report = match report {
            Ok(report) => report,
            Err(error) => {
                tracing::error!(%error, "cannot read kernel state; retrying");
                problems.push(Problem::new(
                    ProblemCode::KernelUnreadable,
                    error.to_string(),
                    "see the log; the daemon retries",
                ));
                self.retry_at = Some(now + RETRY);
                return;
            }
        };
        if !report.failures.iter().any(kernel::Failure::may_concern_routes) {
            self.prober.routes_applied();
        }
        for failure in &report.failures {
            self.tun_missing |= failure.problem == kernel::Problem::NoTun;
            self.retry_at = Some(now + RETRY);
            if !nftables::is_of(failure) {
                let cause = format!("{}: {}", failure.what, failure.problem);
                problems.push(Problem::new(ProblemCode::KernelRefused, cause, failure.remedy()));
            }
        }
        problems.extend(nftables::refused(&report.failures));
        problems.extend(found(&report));
    }

    /// The host's ends of the interfaces of attached pods.
    pub(super) fn pod_interfaces(&self) -> Vec<InterfaceName> {
        let table = self.published.attachments.table();
        let table = table.borrow();
        let attached = table.attachments.values().filter_map(|one| one.attach.as_ref());
        attached.filter_map(|attach| attach.interface.parse().ok()).collect()
    }

    /// Writes RUN/subnet.env, or removes it when its subnet is another node's.
    pub(super) fn write_subnet_env(&self, planned: &Plan, problems: &mut Vec<Problem>) {
        let subnets: Vec<IpNet> = self.core.snapshot().own_prefixes().collect();
        let path = self.settings.run_dir.join("subnet.env");
        if subnets.is_empty() {
            let gone = matches!(
                self.control.status.borrow().state,
                MembershipState::SubnetLost { .. }
                    | MembershipState::NoNetwork { .. }
                    | MembershipState::Removed
                    | MembershipState::Cloned { .. }
            );
            // Plugins that read it would go on giving out addresses that are another node's.
            if gone
                && let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                let cause = format!("{} cannot be removed: {error}", path.display());
                problems.push(Problem::new(
                    ProblemCode::SubnetEnv,
                    cause,
                    "remove the file: its subnet no longer belongs to \
                     this node",
                ));
            }
            return;
        }
        let env = SubnetEnv {
            networks: self.core.snapshot().networks().collect(),
            subnets,
            mtu: planned.mtu,
            ip_masq: self.settings.ip_masq,
        };
        if let Err(error) = env.write(&path) {
            let cause = format!("{} cannot be written: {error}", path.display());
            problems.push(Problem::new(
                ProblemCode::SubnetEnv,
                cause,
                "free disk space, or make the directory writable",
            ));
        }
    }

    /// Takes in what the kernel reported.
    pub(super) async fn kernel_events(&mut self, events: KernelEvents) {
        if events.can_wait() {
            let now = Instant::now();
            self.others.changed(if events.settings { now + SETTINGS_SETTLE } else { now });
            return;
        }
        self.look_at_kernel = true;
        if events.links || events.addresses || events.routes || events.resync {
            self.read_underlay().await;
            self.read_attached().await;
        }
    }

    /// Tells the control plane whether containers hold addresses of this node's subnet: while they do, it draws no
    /// other one.
    pub(super) async fn read_attached(&self) {
        let subnet = {
            let status = self.control.status.borrow();
            match &status.state {
                MembershipState::SubnetLost { subnet, .. } => Some(*subnet),
                _ => status.subnet,
            }
        };
        let subnets: Vec<IpNet> = subnet.iter().flat_map(prefixes).collect();
        match self.kernel.foreign_routes_within(&subnets).await {
            Ok(routes) => {
                let attached = !routes.is_empty();
                self.control.attached.send_if_modified(|held| std::mem::replace(held, attached) != attached);
            }
            Err(error) => tracing::warn!(%error, "cannot read routes"),
        }
    }

    /// Looks at the underlay; publishes what has changed.
    pub(super) async fn read_underlay(&mut self) {
        match self.kernel.underlay(&selection(&self.settings)).await {
            Ok(underlay) if underlay != self.underlay => {
                self.underlay = underlay;
                self.endpoints = underlay::endpoints(&self.settings, &self.underlay);
                let list = |words: Vec<String>| words.join(", ");
                let interfaces = list(self.carriers().into_iter().map(|carrier| carrier.name).collect());
                let endpoints = list(self.endpoints.iter().map(ToString::to_string).collect());
                tracing::info!(interfaces, endpoints, "underlay changed");
                let facts = facts(&self.settings, self.public_key, &self.underlay, &self.endpoints);
                self.control.facts.send_modify(|held| {
                    let readiness = held.readiness.take();
                    *held = LocalFacts { readiness, ..facts };
                });
                // Peers need not wait for the record: the endpoint of a live one follows what it receives.
                self.tunnel.announce();
            }
            Ok(_) => {}
            // What is published stays: a cable that is out for a moment moves no node.
            Err(error) => tracing::warn!(%error, "cannot read the underlay"),
        }
    }
}

/// What a pass found of other programs, and of settings that are theirs.
fn found(report: &Report) -> Vec<Problem> {
    let mut problems = Vec::new();
    if let Some(interface) = &report.not_forwarding {
        let (cause, remedy) = not_forwarding(interface.as_str());
        problems.push(Problem::new(ProblemCode::ForwardingOff, cause, remedy));
    }
    for met in &report.met {
        let (source, destination) = met.packet;
        let at = format!("chain {} of table {}", met.chain, met.table);
        let unused = "so direct paths cannot be used";
        let (code, cause) = match met.effect {
            kernel::Effect::Translates => {
                let effect = "the receiver sees an address of this node, so policies by label match the wrong sender";
                let what = format!("rewrites the source of packets from {source} to {destination}: {effect}");
                (ProblemCode::PodsMasqueraded, what)
            }
            kernel::Effect::Drops => {
                (ProblemCode::ProbesDropped, format!("drops probes from {source} to {destination}, {unused}"))
            }
            kernel::Effect::Remarks => {
                let what = format!("rewrites the packet mark of probes from {source} to {destination}, {unused}");
                (ProblemCode::ProbesRemarked, what)
            }
        };
        let cause = format!("{at} {cause}");
        problems.push(Problem::new(code, cause, met.remedy.clone()));
    }
    for drop in &report.foreign_drops {
        let cause = format!("chain {} of table {} {} drops forwarded pod packets", drop.chain, drop.family, drop.table);
        problems.push(Problem::new(ProblemCode::ForeignForwardDrop, cause, drop.remedy.clone()));
    }
    problems
}
