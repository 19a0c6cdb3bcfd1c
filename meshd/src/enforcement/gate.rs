//! The tunnel's hooks: flows that come out of the tunnel are judged, those that go into it are noted.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use ipnet::IpNet;
use policy::{
    engine::{Classifier, Side},
    flow::{Dropped, FlowTable, Judgement, Limits, Origin, Passed, Tuple},
    packet::Packet,
};

use super::{
    InForce,
    conntrack::{Conntrack, KnownFlow},
    samples::{SampledVerdict, Samples, Seen},
};
use crate::tunnel::{
    Batch, DropReason, Judge, Track,
    shared::{Cached, Shared},
};

/// What both hooks share.
#[derive(Debug)]
pub(super) struct Gate {
    in_force: Shared<Option<InForce>>,
    table: Mutex<FlowTable>,
    has_flows: AtomicBool,
    counts: [AtomicU64; Reason::ALL.len()],
    samples: Samples,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// What became of a packet at the tunnel's end of this node.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// The stable snake_case name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// A new flow that policies allow.
    Allowed => "allowed",
    /// A new flow that policies refuse.
    Refused => "refused",
    /// Would have been refused, but for audit mode.
    Audited => "audited",
    /// A packet of no flow, that does not begin one.
    NoFlow => "no_flow",
    /// A packet of a flow that policies have cut.
    Cut => "cut",
    /// A later fragment without its first one.
    Fragment => "fragment",
    /// A new flow while the table is full.
    TableFull => "table_full",
    /// Flags or types that no end sends, or that do not cross routers.
    Invalid => "invalid",
    /// An ICMP error about no flow of whom it goes to.
    Unrelated => "unrelated",
    /// There is no complete picture of the policies yet.
    NotReady => "not_ready",
    /// The kernel was asked for a flow.
    Asked => "asked_conntrack",
}

/// How often each [`Reason`] applied since the start. Packets of flows that are going on are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateCounts([u64; Reason::ALL.len()]);

impl GateCounts {
    /// Every reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        Reason::ALL.iter().map(|reason| (*reason, self.0[*reason as usize]))
    }
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            in_force: Shared::new(None),
            table: Mutex::new(FlowTable::new(Limits::default(), rand::random(), Instant::now())),
            has_flows: AtomicBool::new(false),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            samples: Samples::default(),
        }
    }

    /// Judges by this from each hook's next batch on.
    pub(super) fn set(&self, in_force: InForce) {
        self.in_force.set(Arc::new(Some(in_force)));
    }

    /// Nothing passes from each hook's next batch on.
    pub(super) fn close(&self) {
        self.in_force.set(Arc::new(None));
    }

    pub(super) fn in_force(&self) -> Arc<Option<InForce>> {
        self.in_force.get()
    }

    pub(super) fn counts(&self) -> GateCounts {
        GateCounts(std::array::from_fn(|at| self.counts[at].load(Ordering::Relaxed)))
    }

    pub(super) const fn samples(&self) -> &Samples {
        &self.samples
    }

    /// Whether there may be flows to sweep.
    pub(super) fn has_flows(&self) -> bool {
        self.has_flows.load(Ordering::Relaxed)
    }

    pub(super) fn sweep(&self, now: Instant, count: usize) {
        let mut table = self.lock();
        table.sweep(now, count);
        self.has_flows.store(!table.is_empty(), Ordering::Relaxed);
    }

    /// Takes up a flow that the kernel knows between a local pod and something else; `rules` know whose addresses they are.
    pub(super) fn know(&self, rules: &Classifier, known: &KnownFlow, own: &[IpNet], now: Instant) {
        let is_own = |address: IpAddr| own.iter().any(|net| net.contains(&address));
        let origin = match (is_own(known.tuple.source), is_own(known.tuple.destination)) {
            (true, false) => Origin::Local,
            (false, true) => Origin::Remote,
            _ => return,
        };
        // One that is rewritten is nftables' to judge.
        if known.rewritten {
            return;
        }
        self.lock().know(rules, &known.tuple, origin, known.answered, now);
        self.has_flows.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, FlowTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, reason: Reason) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts and samples what is worth it. Returns whether the packet passes.
    fn decide(&self, in_force: &InForce, side: Side, packet: &Packet, judgement: &Judgement, now: Instant) -> bool {
        let (reason, verdict) = match judgement {
            Judgement::Pass(Passed::New(verdict)) => (Reason::Allowed, Some(verdict)),
            Judgement::Pass(_) => return true,
            Judgement::Drop(Dropped::Policy(verdict)) => (Reason::Refused, Some(verdict)),
            Judgement::Drop(Dropped::NoFlow) | Judgement::Ask(_) => (Reason::NoFlow, None),
            Judgement::Drop(Dropped::Tombstone) => (Reason::Cut, None),
            Judgement::Drop(Dropped::Fragment) => (Reason::Fragment, None),
            Judgement::Drop(Dropped::TableFull) => (Reason::TableFull, None),
            Judgement::Drop(Dropped::Invalid) => (Reason::Invalid, None),
            Judgement::Drop(Dropped::Unrelated) => (Reason::Unrelated, None),
        };
        // What policies refuse passes in audit mode, and so does what only has no flow because its first packet did.
        let audited = in_force.mesh.audit && matches!(reason, Reason::Refused | Reason::NoFlow | Reason::Cut);
        let reason = if audited { Reason::Audited } else { reason };
        self.count(reason);
        if let Some(sampled) = sampled(reason) {
            let seen = Seen { at: "tunnel", side, packet, explained: verdict.is_some() };
            self.samples.take(in_force, &seen, sampled, now);
        }
        judgement.passes() || audited
    }
}

const fn sampled(reason: Reason) -> Option<SampledVerdict> {
    match reason {
        Reason::Allowed => Some(SampledVerdict::Allowed),
        Reason::Refused | Reason::Cut => Some(SampledVerdict::Denied),
        Reason::Audited => Some(SampledVerdict::Audited),
        _ => None,
    }
}

/// Sees what local pods send into the tunnel.
pub(super) struct Egress {
    gate: Arc<Gate>,
    in_force: Cached<Option<InForce>>,
}

impl Egress {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        Self { in_force: gate.in_force.cached(), gate }
    }
}

impl Track for Egress {
    fn track(&mut self, batch: &mut Batch) {
        let Some(in_force) = self.in_force.refresh(&self.gate.in_force).as_ref() else { return };
        let now = Instant::now();
        let mut table = self.gate.lock();
        table.fetch(batch.slots().iter().filter_map(|slot| slot.packet.as_ref()));
        for (slot, bytes) in batch.iter_mut() {
            let (None, Some(packet)) = (slot.drop, &slot.packet) else { continue };
            // The node's own; answers to it pass anyway.
            if in_force.mesh.overlay.contains(&packet.source) {
                continue;
            }
            let judgement = table.outbound(&*in_force.classifier, packet, bytes, now);
            if !judgement.passes() && !in_force.mesh.audit {
                self.gate.count(Reason::Cut);
                slot.drop = Some(DropReason::OutRefused);
            }
        }
        self.gate.has_flows.store(true, Ordering::Relaxed);
    }
}

/// Judges what comes out of the tunnel.
pub(super) struct Ingress {
    gate: Arc<Gate>,
    in_force: Cached<Option<InForce>>,
    conntrack: Option<Conntrack>,
    /// Packets of the batch for which the kernel is asked, with what it said.
    asked: Vec<(usize, Tuple, bool)>,
}

impl Ingress {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        Self { in_force: gate.in_force.cached(), gate, conntrack: None, asked: Vec::new() }
    }

    /// Asks the kernel, with no lock held.
    fn ask(&mut self) {
        if self.conntrack.is_none() {
            self.conntrack = Conntrack::open().ok();
        }
        for (_, tuple, is_reply) in &mut self.asked {
            self.gate.count(Reason::Asked);
            let Some(conntrack) = &mut self.conntrack else { continue };
            match conntrack.is_reply(tuple) {
                Ok(answer) => *is_reply = answer,
                // A socket that says what it should not is left for a new one.
                Err(_) => self.conntrack = None,
            }
        }
    }
}

impl Judge for Ingress {
    fn judge(&mut self, batch: &mut Batch) {
        let cached = Arc::clone(self.in_force.refresh(&self.gate.in_force));
        let Some(in_force) = cached.as_ref() else {
            for slot in batch.slots_mut().iter_mut().filter(|slot| slot.drop.is_none()) {
                self.gate.count(Reason::NotReady);
                slot.drop = Some(DropReason::InRefused);
            }
            return;
        };
        let now = Instant::now();
        let rules = &*in_force.classifier;
        self.asked.clear();
        let mut table = self.gate.lock();
        table.fetch(batch.slots().iter().filter_map(|slot| slot.packet.as_ref()));
        for (at, (slot, bytes)) in batch.iter_mut().enumerate() {
            let peer = slot.peer();
            let (None, Some(packet)) = (slot.drop, &slot.packet) else { continue };
            // A process of this node, or rewritten to a pod's address, and judged behind that.
            if in_force.mesh.overlay.contains(&packet.destination) {
                continue;
            }
            let judgement = table.inbound(rules, packet, bytes, peer, now);
            if let Judgement::Ask(tuple) = judgement {
                self.asked.push((at, tuple, false));
            } else if !self.gate.decide(in_force, Side::Ingress, packet, &judgement, now) {
                slot.drop = Some(DropReason::InRefused);
            }
        }
        drop(table);
        self.gate.has_flows.store(true, Ordering::Relaxed);
        if self.asked.is_empty() {
            return;
        }
        self.ask();
        let mut table = self.gate.lock();
        for (at, _, is_reply) in &self.asked {
            let slot = batch.slots()[*at];
            let Some(packet) = &slot.packet else { continue };
            let judgement = table.answered(rules, packet, batch.bytes(&slot), *is_reply, now);
            if !self.gate.decide(in_force, Side::Ingress, packet, &judgement, now) {
                batch.slots_mut()[*at].drop = Some(DropReason::InRefused);
            }
        }
    }
}
