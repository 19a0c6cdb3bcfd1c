//! Decisions of the policy thread: pure steps, without I/O or clock.
//!
//! [`PolicyCore::step`] takes what happened and returns what to do: [`Effect`]s at once and in order, then at most one
//! [`Work`], whose outcome is the next input. A pass over pending input:
//!
//! ```text
//! Received ─▶ Inspect ─▶ ReadHost ─▶ [first: Close] ─▶ Put ─▶ [moved: Forget] ─▶ [first: LoadFlows] ─▶ OpenGate, Publish
//!             (asked)    (asked, changed)               └─ refused: what is in force stays, again after 1 s
//! ```
//!
//! Invariants: the gate judges by a classifier only once the kernel has taken its rules and has no connections of
//! addresses with a new owner. Tables that are not what was put into them close the gate until they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use packet::protocol;
use policy::{
    engine::{Classifier, End, Flow, Side},
    nft::Ruleset,
};

use super::{
    ActivePolicy, Applied, MeshFacts, Options,
    host::Host,
    policy_inputs::{PendingInput, PolicyInputs},
    ruleset::{Frame, PodPort, RulesetError, isolated},
    unmatched::Unmatched,
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
/// Addresses of one subnet that are looked at for one that no pod has.
const LOOKED_AT: usize = 4096;

/// An input of the policy thread.
#[derive(Debug)]
pub(super) enum Input {
    /// The thread starts.
    Started,
    /// Input since the last pass; empty at a deadline.
    Received(Box<PendingInput>),
    /// The outcome of the work that the last step asked for.
    Done(Done),
}

/// Effects of a step: `at_once` in order, then `work`, whose outcome is the next input.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) at_once: Vec<Effect>,
    pub(super) work: Option<Work>,
}

/// An effect that cannot fail.
#[derive(Debug)]
pub(super) enum Effect {
    /// Nothing passes the tunnel's hooks.
    CloseGate,
    /// The tunnel's hooks judge by this.
    OpenGate(ActivePolicy),
    /// How far enforcement is.
    Publish(Applied),
    /// This machine as the kernel's rules know it.
    ShowHost(Host),
    /// Attachments without a Pod object.
    ShowUnmatched(Unmatched),
    /// Freed memory goes back to the system.
    GiveBackMemory,
    /// Looks at so many flows for some that have ended.
    Sweep(usize),
}

/// An operation with an outcome.
#[derive(Debug)]
pub(super) enum Work {
    /// Whether the kernel holds what was put into it.
    Inspect,
    /// Read the state of this machine; unreadable parts stay as seen before.
    ReadHost { ports: BTreeMap<String, PodPort>, own: Vec<IpNet>, before: Host },
    /// Rules that let nothing pass, unless those of an earlier run are there.
    Close(Box<Frame>),
    /// These rules.
    Put(Box<Frame>, Ruleset),
    /// Removes connections of these addresses.
    Forget(BTreeSet<IpAddr>),
    /// Takes up the flows that the kernel knows, so that a restart of the daemon cuts no flow.
    LoadFlows { own: Vec<IpNet>, classifier: Arc<Classifier> },
}

/// The outcome of the [`Work`] of the same name.
#[derive(Debug)]
pub(super) enum Done {
    Inspected(Result<bool, RulesetError>),
    HostRead(Host),
    Closed(Result<(), RulesetError>),
    Put(Result<(), RulesetError>),
    Forgotten(io::Result<()>),
    FlowsLoaded(io::Result<()>),
}

/// The operation in flight.
#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// `changed`: by the input, something is to be put in force.
    Inspecting {
        changed: bool,
    },
    /// `due`: whatever is read, something is to be put in force.
    ReadingHost {
        due: bool,
    },
    /// A mesh: what is known of it is to be put in force after that.
    Closing {
        began: Instant,
        mesh: Option<Arc<MeshFacts>>,
    },
    Putting(CandidatePolicy),
    Forgetting(CandidatePolicy),
    LoadingFlows(CandidatePolicy),
}

/// The policy that is about to be in force.
#[derive(Debug)]
struct CandidatePolicy {
    /// When the pass began to make it.
    began: Instant,
    classifier: Arc<Classifier>,
    mesh: Arc<MeshFacts>,
}

/// The state of the policy thread.
#[derive(Debug)]
pub(super) struct PolicyCore {
    judged_by_tunnel: Vec<String>,
    log_group: u16,
    /// Where this node's pods were in an earlier run: closed until policies are in force.
    last_subnets: Vec<IpNet>,
    world: PolicyInputs,
    /// The last seen state of this machine.
    seen: Host,
    /// The same for others, once the kernel has the rules that follow from it.
    shown: Host,
    unmatched: Unmatched,
    applied: Applied,
    /// Work whose outcome is awaited.
    stage: Stage,
    /// The time of the next try after a refusal by the kernel.
    retry_at: Option<Instant>,
    /// Memory is given back then.
    give_back_at: Option<Instant>,
    sweep_at: Instant,
    generation: u64,
    took: Duration,
}

impl PolicyCore {
    pub(super) fn new(now: Instant, options: Options) -> Self {
        let Options { node, judged_by_tunnel, table: _, last_subnets, log_group } = options;
        Self {
            judged_by_tunnel,
            log_group,
            last_subnets,
            world: PolicyInputs::new(node),
            seen: Host::default(),
            shown: Host::default(),
            unmatched: Unmatched::default(),
            applied: Applied::default(),
            stage: Stage::Idle,
            retry_at: None,
            give_back_at: None,
            sweep_at: now + SWEEP,
            generation: 0,
            took: Duration::ZERO,
        }
    }

    /// All that policies are made of, to look something up.
    pub(super) const fn world(&self) -> &PolicyInputs {
        &self.world
    }

    /// When [`step`](Self::step) wants to be called at the latest. A table without flows needs no sweeping, and an idle
    /// node no waking.
    pub(super) fn next_deadline(&self, has_flows: bool) -> Option<Instant> {
        let sweep = has_flows.then_some(self.sweep_at);
        [sweep, self.retry_at, self.give_back_at].into_iter().flatten().min()
    }

    /// Takes in what happened; what to do now. An outcome that no work awaits changes nothing.
    pub(super) fn step(&mut self, now: Instant, input: Input) -> Effects {
        let mut out = Effects::default();
        match (std::mem::take(&mut self.stage), input) {
            (Stage::Idle, Input::Started) => self.put_in_force(now, &mut out),
            (Stage::Idle, Input::Received(pending)) => self.received(now, *pending, &mut out),
            (Stage::Inspecting { changed }, Input::Done(Done::Inspected(whole))) => {
                let whole = inspected(whole, &mut out);
                self.read_host(changed || !whole, &mut out);
            }
            (Stage::ReadingHost { due }, Input::Done(Done::HostRead(host))) => {
                let seen = Host { refused_sources: self.world.refused_sources(), ..host };
                let moved = std::mem::replace(&mut self.seen, seen) != self.seen;
                self.decide(now, due || moved, &mut out);
            }
            (Stage::Closing { began, mesh }, Input::Done(Done::Closed(closed))) => {
                self.closed(now, closed, &mut out);
                match mesh.filter(|_| self.world.is_complete()) {
                    Some(mesh) => self.put(began, mesh, &mut out),
                    None => self.finish(now, &mut out),
                }
            }
            (Stage::Putting(candidate), Input::Done(Done::Put(put))) => self.after_put(now, candidate, put, &mut out),
            (Stage::Forgetting(candidate), Input::Done(Done::Forgotten(forgotten))) => match forgotten {
                Ok(()) => {
                    self.world.settled();
                    self.load_flows(now, candidate, &mut out);
                }
                Err(error) => {
                    tracing::error!(%error, "cannot remove connections of reassigned addresses from conntrack; retrying");
                    self.refused(now, &mut out);
                }
            },
            (Stage::LoadingFlows(candidate), Input::Done(Done::FlowsLoaded(loaded))) => {
                if let Err(error) = loaded {
                    tracing::warn!(%error, "cannot list conntrack; established flows are looked up one by one");
                }
                self.open(now, candidate, &mut out);
            }
            (stage, _) => self.stage = stage,
        }
        out
    }

    fn received(&mut self, now: Instant, pending: PendingInput, out: &mut Effects) {
        let look = pending.look;
        if pending.changes.len() >= MANY {
            self.give_back_at = Some(now + GIVE_BACK);
        }
        let changed = self.world.apply_pending(pending);
        // Before the first picture, making it whole is closing it. What the kernel has refused is made again in a moment.
        if look && self.generation > 0 && self.retry_at.is_none() {
            self.stage = Stage::Inspecting { changed };
            out.work = Some(Work::Inspect);
        } else if look || changed {
            self.read_host(changed || self.generation == 0, out);
        } else {
            self.decide(now, false, out);
        }
    }

    /// Whether what rules depend on has changed on this machine.
    fn read_host(&mut self, due: bool, out: &mut Effects) {
        let own = self.world.mesh().map(|mesh| mesh.own.clone()).unwrap_or_default();
        self.stage = Stage::ReadingHost { due };
        out.work = Some(Work::ReadHost { ports: self.world.ports(), own, before: self.seen.clone() });
    }

    fn decide(&mut self, now: Instant, due: bool, out: &mut Effects) {
        if due || self.retry_at.is_some_and(|at| at <= now) {
            self.put_in_force(now, out);
        } else {
            self.publish(out);
            self.finish(now, out);
        }
    }

    fn put_in_force(&mut self, now: Instant, out: &mut Effects) {
        self.retry_at = None;
        match self.world.mesh().map(Arc::clone) {
            // Also what another program has removed meanwhile.
            None => self.close(now, None, out),
            // Compiling may take a while.
            Some(mesh) if self.generation == 0 => self.close(now, Some(mesh), out),
            Some(mesh) => self.put(now, mesh, out),
        }
    }

    /// Before the first picture: nothing but what this node's processes send passes to the pods of its subnets, nor to
    /// those of an earlier run.
    fn close(&mut self, now: Instant, mesh: Option<Arc<MeshFacts>>, out: &mut Effects) {
        let own = mesh.iter().flat_map(|mesh| &mesh.own);
        let closed: BTreeSet<IpNet> = own.chain(&self.last_subnets).copied().collect();
        let frame = Frame {
            own: closed.into_iter().collect(),
            ports: self.world.ports(),
            bridges: self.seen.bridges.clone(),
            ..Frame::default()
        };
        self.stage = Stage::Closing { began: now, mesh };
        out.work = Some(Work::Close(Box::new(frame)));
    }

    fn closed(&mut self, now: Instant, closed: Result<(), RulesetError>, out: &mut Effects) {
        if let Err(error) = &closed {
            tracing::error!(%error, "cannot block traffic to this node's pods until policies are in force");
            self.retry_at = Some(now + RETRY);
        }
        self.show(Applied { guarded: closed.is_ok(), ..self.applied }, out);
    }

    fn put(&mut self, began: Instant, mesh: Arc<MeshFacts>, out: &mut Effects) {
        let classifier = self.world.commit();
        let ruleset = self.world.ruleset(&classifier);
        let mut frame = Frame {
            log_group: self.log_group,
            ports: self.world.ports(),
            bridges: self.seen.bridges.clone(),
            displaced: self.world.displaced(),
            switched_judged: self.seen.switched_judged,
            ..Frame::of(&mesh, &self.judged_by_tunnel, deny_unknown_pods(&classifier, &mesh.own))
        };
        frame.isolated = isolated(&frame, &ruleset);
        self.stage = Stage::Putting(CandidatePolicy { began, classifier, mesh });
        out.work = Some(Work::Put(Box::new(frame), ruleset));
    }

    fn after_put(
        &mut self,
        now: Instant,
        candidate: CandidatePolicy,
        put: Result<(), RulesetError>,
        out: &mut Effects,
    ) {
        if let Err(error) = put {
            tracing::error!(%error, "kernel refused policy rules; retrying");
            if matches!(error, RulesetError::Tampered) {
                // As when that is seen later: what is there may judge nothing.
                out.at_once.push(Effect::CloseGate);
            }
            self.refused(now, out);
        } else if self.world.moved().is_empty() {
            self.load_flows(now, candidate, out);
        } else {
            // Before anything is judged by these: else a reply to an address's previous owner would pass.
            self.stage = Stage::Forgetting(candidate);
            out.work = Some(Work::Forget(self.world.moved().clone()));
        }
    }

    fn load_flows(&mut self, now: Instant, candidate: CandidatePolicy, out: &mut Effects) {
        if self.generation > 0 {
            self.open(now, candidate, out);
            return;
        }
        let (own, classifier) = (candidate.mesh.own.clone(), Arc::clone(&candidate.classifier));
        self.stage = Stage::LoadingFlows(candidate);
        out.work = Some(Work::LoadFlows { own, classifier });
    }

    fn open(&mut self, now: Instant, candidate: CandidatePolicy, out: &mut Effects) {
        let CandidatePolicy { began, classifier, mesh } = candidate;
        out.at_once.push(Effect::OpenGate(ActivePolicy::new(classifier, mesh, Arc::clone(&self.seen.addresses))));
        let mut unmatched = self.unmatched.clone();
        unmatched.update(now, self.world.unmatched(), self.world.misplaced());
        unmatched.of_clusters = self.world.cluster_problems();
        unmatched.awaited = Arc::new(self.world.awaited());
        if unmatched != self.unmatched {
            self.unmatched.clone_from(&unmatched);
            out.at_once.push(Effect::ShowUnmatched(unmatched));
        }
        self.retry_at = None;
        self.generation += 1;
        self.took = now.saturating_duration_since(began);
        self.publish(out);
        tracing::debug!(
            revision = self.world.revision(),
            pods = self.world.pods(),
            policies = self.world.policies(),
            took = ?self.took,
            "policies in force"
        );
        self.finish(now, out);
    }

    /// Schedules another try after a refusal by the kernel.
    fn refused(&mut self, now: Instant, out: &mut Effects) {
        self.retry_at = Some(now + RETRY);
        self.show(Applied { refused: true, ..self.applied }, out);
        self.finish(now, out);
    }

    fn publish(&mut self, out: &mut Effects) {
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
            refused: false,
            guarded: true,
        };
        self.show(applied, out);
    }

    fn show(&mut self, applied: Applied, out: &mut Effects) {
        if self.applied != applied {
            self.applied = applied;
            out.at_once.push(Effect::Publish(applied));
        }
    }

    /// The end of a pass.
    fn finish(&mut self, now: Instant, out: &mut Effects) {
        // Status must not say that something is refused before it is.
        if self.retry_at.is_none() && self.shown != self.seen {
            self.shown.clone_from(&self.seen);
            out.at_once.push(Effect::ShowHost(self.seen.clone()));
        }
        if self.give_back_at.is_some_and(|at| at <= now) {
            self.give_back_at = None;
            out.at_once.push(Effect::GiveBackMemory);
        }
        if now >= self.sweep_at {
            self.sweep_at = now + SWEEP;
            out.at_once.push(Effect::Sweep(SWEPT));
        }
    }
}

/// Whether the kernel holds what was put into it. If not, nothing passes until it does again.
fn inspected(whole: Result<bool, RulesetError>, out: &mut Effects) -> bool {
    match &whole {
        Ok(true) => return true,
        Ok(false) => tracing::warn!("policy rules were removed by another program; restoring them"),
        Err(error) => tracing::error!(%error, "cannot read policy rules"),
    }
    out.at_once.push(Effect::CloseGate);
    false
}

/// Whether a pod of this node of which nothing is known may not receive, and may not send.
fn deny_unknown_pods(classifier: &Classifier, own: &[IpNet]) -> [bool; 2] {
    let is_unknown = |address: &IpAddr| classifier.end(*address) == End::UnknownPod;
    let stranger = own.iter().find_map(|net| net.hosts().take(LOOKED_AT).find(is_unknown));
    let Some(stranger) = stranger else { return [false; 2] };
    [Side::Ingress, Side::Egress].map(|side| {
        let flow = Flow { source: stranger, destination: stranger, protocol: protocol::TCP, port: Some(1) };
        !classifier.verdict(side, &flow).allowed
    })
}

#[cfg(test)]
mod tests;
