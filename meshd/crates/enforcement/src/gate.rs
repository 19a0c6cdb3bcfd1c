//! The tunnel's hooks: judges flows from the tunnel, and records flows into it.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use api_types::SampledVerdict;
use ipnet::IpNet;
use packet::Packet;
use policy::{
    engine::{Cause, Classifier, Flow, Side, Verdict},
    flow::{Dropped, FlowTable, Judgement, Limits, Origin, Passed, Rules, Tuple},
};
use tunnel::{Batch, Cached, DropReason, Judge, Shared, Track};

use super::{
    ActivePolicy,
    conntrack::{Conntrack, KnownFlow},
    samples::{JudgedPacket, Samples, Why},
};

/// State of both hooks.
#[derive(Debug)]
pub(super) struct PolicyGate {
    in_force: Shared<Option<ActivePolicy>>,
    table: Mutex<FlowTable>,
    has_flows: AtomicBool,
    counts: [AtomicU64; GateReason::ALL.len()],
    samples: Samples,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// The outcome of a packet at this node's end of the tunnel.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum GateReason {
            $($(#[$doc])* $variant,)*
        }

        impl GateReason {
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
    /// A packet that belongs to no flow and begins none.
    NoFlow => "no_flow",
    /// A packet of a flow that policies have cut.
    Cut => "cut",
    /// A later fragment without its first one.
    Fragment => "fragment",
    /// A new flow while the table is full.
    TableFull => "table_full",
    /// Flags or types that no end sends, or that do not cross routers.
    Invalid => "invalid",
    /// An ICMP error about no flow of its recipient.
    Unrelated => "unrelated",
    /// The policies are not complete yet.
    NotReady => "not_ready",
    /// A flow was queried in the kernel.
    Asked => "asked_conntrack",
}

/// How often each [`GateReason`] applied since the start. Packets of flows that are going on are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateCounts([u64; GateReason::ALL.len()]);

impl GateCounts {
    /// Every reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (GateReason, u64)> + '_ {
        GateReason::ALL.iter().map(|reason| (*reason, self.0[*reason as usize]))
    }
}

impl PolicyGate {
    pub(super) fn new() -> Self {
        Self {
            in_force: Shared::new(None),
            table: Mutex::new(FlowTable::new(Limits::default(), rand::random(), Instant::now())),
            has_flows: AtomicBool::new(false),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            samples: Samples::default(),
        }
    }

    /// Judges by `in_force` from each hook's next batch on.
    pub(super) fn set(&self, mut in_force: ActivePolicy) {
        let before = self.in_force.get();
        let alike =
            |before: &&ActivePolicy| before.mesh.audit == in_force.mesh.audit && before.addresses == in_force.addresses;
        in_force.since =
            before.as_ref().as_ref().filter(alike).map_or_else(|| in_force.classifier.generation(), |like| like.since);
        self.in_force.set(Arc::new(Some(in_force)));
    }

    /// Nothing passes from each hook's next batch on.
    pub(super) fn close(&self) {
        self.in_force.set(Arc::new(None));
    }

    pub(super) fn in_force(&self) -> Arc<Option<ActivePolicy>> {
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

    /// Inserts a flow of a local pod that the kernel knows; `rules` know the addresses' owners.
    pub(super) fn insert_known(&self, rules: &Classifier, known: &KnownFlow, own: &[IpNet], now: Instant) {
        let is_own = |address: IpAddr| own.iter().any(|net| net.contains(&address));
        let origin = match (is_own(known.tuple.source), is_own(known.tuple.destination)) {
            (true, false) => Origin::Local,
            (false, true) => Origin::Remote,
            _ => return,
        };
        // Flows with NAT are judged by nftables.
        if known.rewritten {
            return;
        }
        self.lock().insert_known(rules, &known.tuple, origin, known.answered, now);
        self.has_flows.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, FlowTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, reason: GateReason) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the packet, and samples it if its verdict is new. Returns whether it passes.
    fn decide(
        &self,
        in_force: &ActivePolicy,
        side: Side,
        packet: &Packet,
        judgement: &Judgement,
        now: Instant,
    ) -> bool {
        let (reason, verdict) = match judgement {
            Judgement::Pass(Passed::New(verdict)) => (GateReason::Allowed, Some(verdict)),
            Judgement::Pass(_) => return true,
            Judgement::Drop(Dropped::Policy(verdict)) => (GateReason::Refused, Some(verdict)),
            Judgement::Drop(Dropped::NoFlow) | Judgement::Ask(_) => (GateReason::NoFlow, None),
            Judgement::Drop(Dropped::Tombstone) => (GateReason::Cut, None),
            Judgement::Drop(Dropped::Fragment) => (GateReason::Fragment, None),
            Judgement::Drop(Dropped::TableFull) => (GateReason::TableFull, None),
            Judgement::Drop(Dropped::Invalid) => (GateReason::Invalid, None),
            Judgement::Drop(Dropped::Unrelated) => (GateReason::Unrelated, None),
        };
        // In audit mode, denied packets pass, and so do packets without a flow because their first packet was denied.
        let audited =
            in_force.mesh.audit && matches!(reason, GateReason::Refused | GateReason::NoFlow | GateReason::Cut);
        let reason = if audited { GateReason::Audited } else { reason };
        self.count(reason);
        if let Some(sampled) = sampled(reason) {
            let why = if verdict.is_some() { Why::Policies } else { Why::Flow };
            let seen = JudgedPacket { at: "tunnel", side, packet, why };
            self.samples.take(in_force, &seen, sampled, now);
        }
        judgement.passes() || audited
    }
}

const fn sampled(reason: GateReason) -> Option<SampledVerdict> {
    match reason {
        GateReason::Allowed => Some(SampledVerdict::Allowed),
        GateReason::Refused | GateReason::Cut => Some(SampledVerdict::Denied),
        GateReason::Audited => Some(SampledVerdict::Audited),
        _ => None,
    }
}

/// The tunnel's rules: the policies, except for flows from this node, which nftables has judged.
///
/// - Processes of the node are judged at the far end only, whichever of the node's addresses they use. An address in
///   the node's subnet would otherwise count as an unknown pod's. No pod gains by it: nftables judges forwarded packets
///   from such a source as an unknown pod's.
/// - In audit mode nftables has reported denied flows of local pods. Their replies are not reported again.
impl Rules for ActivePolicy {
    fn generation(&self) -> u64 {
        self.classifier.generation()
    }

    fn judge(&self, origin: Origin, flow: &Flow) -> Verdict {
        let verdict = Rules::judge(&*self.classifier, origin, flow);
        match origin {
            Origin::Local if verdict.cause == Cause::UnknownPod && self.addresses.contains(&flow.source) => {
                Verdict { allowed: true, cause: Cause::NoPod }
            }
            Origin::Local if self.mesh.audit => Verdict { allowed: true, ..verdict },
            Origin::Local | Origin::Remote => verdict,
        }
    }

    fn owners(&self, flow: &Flow) -> (u32, u32) {
        self.classifier.owners(flow)
    }

    fn unchanged_since(&self, origin: Origin, flow: &Flow) -> u64 {
        self.since.max(Rules::unchanged_since(&*self.classifier, origin, flow))
    }
}

/// The hook for packets from local pods into the tunnel.
pub(super) struct Egress {
    gate: Arc<PolicyGate>,
    in_force: Cached<Option<ActivePolicy>>,
}

impl Egress {
    pub(super) fn new(gate: Arc<PolicyGate>) -> Self {
        Self { in_force: gate.in_force.cached(), gate }
    }
}

impl Track for Egress {
    fn track(&mut self, now: Instant, batch: &mut Batch) {
        let Some(in_force) = self.in_force.refresh(&self.gate.in_force).as_ref() else { return };
        let mut table = self.gate.lock();
        table.fetch(batch.slots().iter().filter_map(|slot| slot.packet.as_ref()));
        for (slot, bytes) in batch.iter_mut() {
            let (None, Some(packet)) = (slot.drop, &slot.packet) else { continue };
            // From the node itself: replies to it pass anyway.
            if in_force.mesh.overlay.contains(&packet.source) {
                continue;
            }
            let judgement = table.outbound(in_force, packet, bytes, now);
            if !judgement.passes() && !in_force.mesh.audit {
                self.gate.count(GateReason::Cut);
                slot.drop = Some(DropReason::OutRefused);
            }
        }
        self.gate.has_flows.store(true, Ordering::Relaxed);
    }
}

/// The hook that judges packets from the tunnel.
pub(super) struct Ingress {
    gate: Arc<PolicyGate>,
    in_force: Cached<Option<ActivePolicy>>,
    conntrack: Option<Conntrack>,
    /// Packets of the batch with a conntrack query, and the answers.
    asked: Vec<(usize, Tuple, bool)>,
}

impl Ingress {
    pub(super) fn new(gate: Arc<PolicyGate>) -> Self {
        Self { in_force: gate.in_force.cached(), gate, conntrack: None, asked: Vec::new() }
    }

    /// Queries the kernel's conntrack, with no lock held.
    fn ask(&mut self) {
        if self.conntrack.is_none() {
            self.conntrack = Conntrack::open().ok();
        }
        for (_, tuple, is_reply) in &mut self.asked {
            self.gate.count(GateReason::Asked);
            let Some(conntrack) = &mut self.conntrack else { continue };
            match conntrack.is_reply(tuple) {
                Ok(answer) => *is_reply = answer,
                // A socket with a malformed answer is replaced.
                Err(_) => self.conntrack = None,
            }
        }
    }
}

impl Judge for Ingress {
    fn judge(&mut self, now: Instant, batch: &mut Batch) {
        let cached = Arc::clone(self.in_force.refresh(&self.gate.in_force));
        let Some(in_force) = cached.as_ref() else {
            for slot in batch.slots_mut().iter_mut().filter(|slot| slot.drop.is_none()) {
                self.gate.count(GateReason::NotReady);
                slot.drop = Some(DropReason::InRefused);
            }
            return;
        };
        self.asked.clear();
        let mut table = self.gate.lock();
        table.fetch(batch.slots().iter().filter_map(|slot| slot.packet.as_ref()));
        for (at, (slot, bytes)) in batch.iter_mut().enumerate() {
            let peer = slot.peer();
            let (None, Some(packet)) = (slot.drop, &slot.packet) else { continue };
            // To a process of this node, or subject to NAT to a pod's address, and judged after it.
            if in_force.mesh.overlay.contains(&packet.destination) {
                continue;
            }
            let judgement = table.inbound(in_force, packet, bytes, peer, now);
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
            let judgement = table.answered(in_force, packet, batch.bytes(&slot), *is_reply, now);
            if !self.gate.decide(in_force, Side::Ingress, packet, &judgement, now) {
                batch.slots_mut()[*at].drop = Some(DropReason::InRefused);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use packet::tcp_flags::{ACK, SYN};
    use policy::{
        engine::{Engine, ObjectName, PolicyState},
        object::{NetworkPolicy, PodObject},
    };

    use super::*;
    use crate::MeshFacts;

    /// A node with the subnet 10.244.3.0/24, the pod 10.244.3.7 and the gateway 10.244.3.1 of its bridge. Pods may
    /// begin nothing; no policy isolates ingress.
    struct Node {
        engine: Engine,
        in_force: ActivePolicy,
        gate: PolicyGate,
        table: FlowTable,
    }

    impl Node {
        fn new(audit: bool) -> Self {
            let mut engine = Engine::new();
            engine.set_networks(vec!["10.244.0.0/16".parse().unwrap()].into());
            let pod = PodObject { addresses: vec!["10.244.3.7".parse().unwrap()], ..PodObject::default() };
            engine.put_pod(ObjectName::new("shop", "db"), pod, 1);
            let spec = serde_json::json!({"podSelector": {}, "policyTypes": ["Egress"]});
            let policy = PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap());
            engine.put_policy(ObjectName::new("shop", "p"), &policy);
            let mesh = MeshFacts { audit, own: vec!["10.244.3.0/24".parse().unwrap()], ..MeshFacts::default() };
            let addresses = Arc::new(["10.244.3.1".parse().unwrap()].into());
            let in_force = ActivePolicy::new(engine.commit(1), Arc::new(mesh), addresses);
            let table = FlowTable::new(Limits::default(), 1, Instant::now());
            let gate = PolicyGate::new();
            gate.set(in_force.clone());
            Self { engine, in_force, gate, table }
        }

        fn commit(&mut self) {
            self.in_force.classifier = self.engine.commit(2);
            self.gate.set(self.in_force.clone());
            self.in_force = Option::clone(&self.gate.in_force()).unwrap();
        }

        fn sends(&mut self, source: u8, flags: u8) -> bool {
            let bytes = tcp([3, source], [5, 7], flags);
            self.table.outbound(&self.in_force, &Packet::parse(&bytes).unwrap(), &bytes, Instant::now()).passes()
        }

        /// A packet from a pod behind the tunnel; `known`: conntrack knows it as a reply.
        fn gets(&mut self, destination: u8, flags: u8, known: bool) -> bool {
            let (bytes, now) = (tcp([5, 7], [3, destination], flags), Instant::now());
            let packet = Packet::parse(&bytes).unwrap();
            let mut judgement = self.table.inbound(&self.in_force, &packet, &bytes, 1, now);
            if let Judgement::Ask(_) = judgement {
                judgement = self.table.answered(&self.in_force, &packet, &bytes, known, now);
            }
            self.gate.decide(&self.in_force, Side::Ingress, &packet, &judgement, now)
        }

        fn count(&self, reason: GateReason) -> u64 {
            self.gate.counts().iter().find(|(counted, _)| *counted == reason).unwrap().1
        }
    }

    fn tcp(source: [u8; 2], destination: [u8; 2], flags: u8) -> Vec<u8> {
        let port = |[_, host]: [u8; 2]| 1000 + u16::from(host);
        let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 244];
        bytes.extend(source);
        bytes.extend([10, 244]);
        bytes.extend(destination);
        bytes.extend(port(source).to_be_bytes());
        bytes.extend(port(destination).to_be_bytes());
        bytes.resize(32, 0);
        bytes.extend([0x50, flags]);
        bytes.resize(40, 0);
        bytes
    }

    #[test]
    fn a_process_of_the_node_begins_flows_from_any_address_of_the_node() {
        let mut node = Node::new(false);
        assert!(node.sends(1, SYN) && node.gets(1, SYN | ACK, false), "a flow of its own needs no question");
        assert!(node.sends(1, ACK) && node.gets(1, ACK, false));
        // One that began before this table, and after other policies.
        let mut node = Node::new(false);
        assert!(node.gets(1, ACK, true));
        node.commit();
        assert!(node.gets(1, ACK, false));
    }

    #[test]
    fn an_address_of_the_node_is_no_way_around_policies() {
        // A pod that nothing is known of, and one that is known: nftables judges what they send, the table the replies.
        for address in [9, 7] {
            let mut node = Node::new(false);
            assert!(node.sends(address, SYN));
            assert!(!node.gets(address, SYN | ACK, true), "{address}");
            assert!(!node.sends(address, ACK), "{address}");
        }
        // A pod behind the tunnel cannot begin a flow to the gateway this way where policies isolate what is not known.
        let spec = serde_json::json!({"podSelector": {}, "policyTypes": ["Ingress"]});
        let mut node = Node::new(false);
        let policy = PolicyState::Valid(NetworkPolicy::parse(&spec).unwrap());
        node.engine.put_policy(ObjectName::new("shop", "in"), &policy);
        node.commit();
        assert!(!node.gets(1, SYN, false));
        assert!(!node.gets(1, ACK, false));
        // The address becomes a pod's: its policies apply, also to the flow that there is.
        assert!(node.sends(1, SYN) && node.gets(1, SYN | ACK, false));
        let pod = PodObject { addresses: vec!["10.244.3.1".parse().unwrap()], ..PodObject::default() };
        node.engine.put_pod(ObjectName::new("shop", "taker"), pod, 2);
        node.commit();
        assert!(!node.gets(1, ACK, true));
        // The node no longer has it: it is an unknown pod's.
        let mut node = Node::new(false);
        assert!(node.sends(1, SYN) && node.gets(1, SYN | ACK, false));
        node.in_force.addresses = Arc::default();
        node.commit();
        assert!(!node.gets(1, ACK, true));
    }

    #[test]
    fn in_audit_mode_replies_to_a_local_pod_are_no_refused_ingress() {
        let mut node = Node::new(true);
        assert!(node.sends(7, SYN));
        for flags in [SYN | ACK, ACK, ACK] {
            assert!(node.gets(7, flags, true) && node.sends(7, ACK));
        }
        // nftables has reported the egress of its first packet.
        assert_eq!((node.count(GateReason::Audited), node.gate.samples().after(0).len()), (0, 0));
        // A flow that began before this table.
        let mut node = Node::new(true);
        assert!(node.gets(7, ACK, true) && node.gets(7, ACK, true));
        assert_eq!(node.count(GateReason::Audited), 0);
        // Once policies are enforced, it is cut.
        node.in_force.mesh = Arc::new(MeshFacts { audit: false, ..MeshFacts::clone(&node.in_force.mesh) });
        node.commit();
        assert!(!node.gets(7, ACK, true) && !node.sends(7, ACK));
        assert_eq!(node.count(GateReason::Cut), 1);
    }
}
