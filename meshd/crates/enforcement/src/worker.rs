//! The policy thread: takes pending input, compiles it, and puts it in force.

use std::{
    collections::BTreeSet,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use packet::protocol;
use policy::engine::{Classifier, End, Flow, Side};
use tokio::sync::watch;

use super::{
    Applied, InForce, Options,
    conntrack::Conntrack,
    gate::Gate,
    host::Host,
    mailbox::Mailbox,
    ruleset::{Frame, RuleTable, RulesetError, isolated},
    sys::give_back_memory,
    unmatched::Unmatched,
    world::World,
};

/// How often flows that have ended are swept out of the tunnel's table, a part at a time.
const SWEEP: Duration = Duration::from_secs(1);
/// Most flows that one sweep looks at.
const SWEPT: usize = 4096;

/// So many changes at once leave much memory behind.
const MANY: usize = 4096;
/// When it is given back: once those that handed them over are done with them as well.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// How long to wait before trying again what the kernel refused.
const RETRY: Duration = Duration::from_secs(1);
/// Addresses of one subnet that are looked at for one that is nobody's.
const LOOKED_AT: usize = 4096;

pub(super) struct Worker {
    tun: String,
    table: RuleTable,
    log_group: u16,
    /// What was last seen of this machine.
    seen: Host,
    /// The same for others, once the kernel has the rules that follow from it.
    host: watch::Sender<Host>,
    unmatched: watch::Sender<Unmatched>,
    /// Where this node's pods were in an earlier run: closed until policies are in force.
    last_subnets: Vec<IpNet>,
    /// What the kernel refused is tried again then.
    retry_at: Option<Instant>,
    /// Memory is given back then.
    give_back_at: Option<Instant>,
    mailbox: Arc<Mailbox>,
    gate: Arc<Gate>,
    applied: watch::Sender<Applied>,
    world: World,
    generation: u64,
    took: Duration,
}

impl Worker {
    /// Closes the way to pods, unless rules of an earlier run stand in it.
    pub(super) fn start(
        options: Options,
        mailbox: Arc<Mailbox>,
        gate: Arc<Gate>,
        applied: watch::Sender<Applied>,
        host: watch::Sender<Host>,
        unmatched: watch::Sender<Unmatched>,
    ) -> Self {
        let Options { node, tun, table, last_subnets, log_group } = options;
        let mut worker = Self {
            world: World::new(node),
            tun,
            table: RuleTable::new(table),
            log_group,
            seen: Host::default(),
            host,
            unmatched,
            last_subnets,
            retry_at: None,
            give_back_at: None,
            mailbox,
            gate,
            applied,
            generation: 0,
            took: Duration::ZERO,
        };
        worker.put_in_force(Instant::now());
        worker
    }

    /// Until the mailbox is stopped.
    pub(super) fn run(mut self) {
        let mut sweep_at = Instant::now() + SWEEP;
        loop {
            // A table without flows needs no sweeping, and an idle node no waking.
            let sweep = self.gate.has_flows().then_some(sweep_at);
            let deadline = [sweep, self.retry_at, self.give_back_at].into_iter().flatten().min();
            let Some(mut letter) = self.mailbox.wait(deadline) else { return };
            let questions = std::mem::take(&mut letter.questions);
            let look = letter.look;
            if letter.changes.len() >= MANY {
                self.give_back_at = Some(Instant::now() + GIVE_BACK);
            }
            let changed = self.world.take(letter);
            let whole = !look || self.is_whole();
            let moved = (look || changed) && self.look_at_host();
            let now = Instant::now();
            if changed || moved || !whole || self.retry_at.is_some_and(|at| at <= now) {
                self.put_in_force(now);
            } else {
                self.publish();
            }
            // Status must not say that something is refused before it is.
            if self.retry_at.is_none() {
                self.host.send_if_modified(|held| {
                    *held != self.seen && {
                        held.clone_from(&self.seen);
                        true
                    }
                });
            }
            for question in questions {
                (question.0)(&self.world);
            }
            if self.give_back_at.is_some_and(|at| at <= now) {
                self.give_back_at = None;
                give_back_memory();
            }
            if now >= sweep_at {
                self.gate.sweep(now, SWEPT);
                sweep_at = now + SWEEP;
            }
        }
    }

    /// Whether what rules depend on has changed on this machine.
    fn look_at_host(&mut self) -> bool {
        let own = self.world.mesh().map(|mesh| mesh.own.as_slice()).unwrap_or_default();
        let prepared = Host::prepared(&self.world.ports(), own, &self.seen);
        let seen = Host { refused_sources: self.world.refused_sources(), ..prepared };
        std::mem::replace(&mut self.seen, seen) != self.seen
    }

    /// Whether the kernel holds what was put into it. If not, nothing passes until it does again.
    fn is_whole(&mut self) -> bool {
        if self.generation == 0 {
            // Making it whole is closing it.
            return false;
        }
        if self.retry_at.is_some() {
            // The kernel has refused a part of our own change: what it holds is made again in a moment.
            return true;
        }
        match self.table.is_whole() {
            Ok(true) => true,
            Ok(false) => {
                tracing::warn!("policy rules were removed by another program; restoring them");
                self.gate.close();
                false
            }
            Err(error) => {
                tracing::error!(%error, "cannot read policy rules");
                self.gate.close();
                false
            }
        }
    }

    fn put_in_force(&mut self, now: Instant) {
        self.retry_at = None;
        let Some(mesh) = self.world.mesh().map(Arc::clone) else {
            // Also what somebody has removed meanwhile.
            self.close(&[], now);
            return;
        };
        if self.generation == 0 {
            // Compiling may take a while.
            self.close(&mesh.own, now);
        }
        if !self.world.is_complete() {
            return;
        }
        let classifier = self.world.commit();
        let ruleset = self.world.ruleset(&classifier);
        let mut frame = Frame {
            log_group: self.log_group,
            ports: self.world.ports(),
            bridges: self.seen.bridges.clone(),
            displaced: self.world.displaced(),
            switched_judged: self.seen.switched_judged,
            ..Frame::of(&mesh, &self.tun, closed_to_strangers(&classifier, &mesh.own))
        };
        frame.isolated = isolated(&frame, &ruleset);
        if let Err(error) = self.table.put(&frame, ruleset) {
            tracing::error!(%error, "kernel refused policy rules; retrying");
            if matches!(error, RulesetError::Tampered) {
                // As when that is seen later: what is there may judge nothing.
                self.gate.close();
            }
            self.refused(now);
            return;
        }
        // Before anything is judged by these: else a reply to whoever had the address would pass.
        if let Err(error) = self.forget_moved() {
            tracing::error!(%error, "cannot remove connections of reassigned addresses from conntrack; retrying");
            self.refused(now);
            return;
        }
        if self.generation == 0 {
            self.know_flows(&mesh.own, &classifier);
        }
        self.gate.set(InForce { classifier, mesh, addresses: Arc::clone(&self.seen.addresses) });
        let world = &self.world;
        self.unmatched.send_modify(|unmatched| {
            unmatched.update(now, world.unmatched(), world.misplaced());
            unmatched.of_clusters = world.cluster_problems();
        });
        self.retry_at = None;
        self.generation += 1;
        self.took = now.elapsed();
        self.publish();
        tracing::debug!(
            revision = self.world.revision(),
            pods = self.world.pods(),
            policies = self.world.policies(),
            took = ?self.took,
            "policies in force"
        );
    }

    /// What the kernel has not taken is tried again in a moment.
    fn refused(&mut self, now: Instant) {
        self.retry_at = Some(now + RETRY);
        self.applied.send_modify(|applied| applied.refused = true);
    }

    /// Removes connections of addresses whose owner has changed.
    fn forget_moved(&mut self) -> io::Result<()> {
        if !self.world.moved().is_empty() {
            Conntrack::open()?.forget(self.world.moved())?;
            self.world.settled();
        }
        Ok(())
    }

    /// Before the first picture: nothing but what this node's processes send passes to the pods of these subnets, nor to
    /// those of an earlier run.
    fn close(&mut self, own: &[IpNet], now: Instant) {
        let closed: BTreeSet<IpNet> = own.iter().chain(&self.last_subnets).copied().collect();
        let frame = Frame {
            own: closed.into_iter().collect(),
            ports: self.world.ports(),
            bridges: self.seen.bridges.clone(),
            ..Frame::default()
        };
        let closed = self.table.close(&frame);
        if let Err(error) = &closed {
            tracing::error!(%error, "cannot block traffic to this node's pods until policies are in force");
            self.retry_at = Some(now + RETRY);
        }
        let guarded = closed.is_ok();
        self.applied.send_if_modified(|applied| std::mem::replace(&mut applied.guarded, guarded) != guarded);
    }

    fn publish(&self) {
        if self.generation == 0 || self.retry_at.is_some() {
            return;
        }
        let applied = Applied {
            revision: self.world.revision(),
            generation: self.generation,
            pods: self.world.pods(),
            policies: self.world.policies(),
            took: self.took,
            attachments: self.world.attachments(),
            refused: self.retry_at.is_some(),
            guarded: true,
        };
        self.applied.send_if_modified(|held| std::mem::replace(held, applied) != applied);
    }

    /// Takes up the flows that the kernel knows, so that a restart of the daemon cuts none.
    fn know_flows(&self, own: &[IpNet], classifier: &Classifier) {
        let known = Conntrack::open()
            .and_then(|mut conntrack| conntrack.dump(|flow| self.gate.know(classifier, &flow, own, Instant::now())));
        if let Err(error) = known {
            tracing::warn!(%error, "cannot list conntrack; established flows are looked up one by one");
        }
    }
}

/// Whether a pod of this node of which nothing is known may not receive, and may not send.
fn closed_to_strangers(classifier: &Classifier, own: &[IpNet]) -> [bool; 2] {
    let is_nobodys = |address: &std::net::IpAddr| classifier.end(*address) == End::UnknownPod;
    let stranger = own.iter().find_map(|net| net.hosts().take(LOOKED_AT).find(is_nobodys));
    let Some(stranger) = stranger else { return [false; 2] };
    [Side::Ingress, Side::Egress].map(|side| {
        let flow = Flow { source: stranger, destination: stranger, protocol: protocol::TCP, port: Some(1) };
        !classifier.verdict(side, &flow).allowed
    })
}
