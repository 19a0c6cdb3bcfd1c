//! Flows: packets that pass because of an earlier one.
//!
//! A [`FlowTable`] is at the tunnel's end of a node. It sees both directions: [`inbound`](FlowTable::inbound) judges
//! packets from the tunnel, [`outbound`](FlowTable::outbound) records packets of local pods into it, which the kernel
//! has judged already. The [`Rules`] judge new flows; replies, and ICMP errors about allowed flows, pass.
//!
//! - The kernel's conntrack knows more flows: if a packet would be refused only because its flow is missing, the result
//!   is a [`Judgement::Ask`], at a limited rate; the caller queries the kernel and calls
//!   [`answered`](FlowTable::answered).
//! - The kernel's answer alone never allows a flow: the rules judge each one before, or with, its first packet from the
//!   tunnel.
//! - After a rule change, a flow is judged again at its next packet. A refused one stays as a tombstone, which stops
//!   both directions: otherwise the other end's retransmission would count as a new flow.
//! - If an address of a flow moves to another pod, the flow ends.
//! - Later fragments pass after their first one did, as long as its flow is allowed; never before it.
//! - The table is bounded, and so is the number of flows that one address may begin. If it is full, it keeps old flows
//!   and refuses new ones.
//!
//! Time is an argument; it need not be the same clock in two tables, but must not go backwards in one.

mod fragments;
mod icmp;
mod query_limiter;
mod state;
mod store;
mod tuple;

use std::time::Instant;

use fragments::Fragments;
use packet::{Fragment, Packet, Transport};
use query_limiter::ConntrackQueryLimiter;
use state::{FlowState, Step, step};
use store::{FETCHED, FORWARD, FlowEntry, FlowStore, LOCAL, STATE, TOMBSTONE};
use tuple::{Key, NO_PROTOCOL, quoted};

use crate::engine::{Classifier, Flow, Side, Verdict};

pub use query_limiter::ConntrackQueryLimits;
pub use tuple::Tuple;

/// The initiator of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A pod of this node, through the tunnel.
    Local,
    /// Something behind the tunnel.
    Remote,
}

/// The rules for new flows.
pub trait Rules {
    /// Differs whenever a judgement might.
    fn generation(&self) -> u64;
    /// Whether a flow may begin.
    fn judge(&self, origin: Origin, flow: &Flow) -> Verdict;
    /// Something that differs when an address has another owner, for source and destination.
    fn owners(&self, flow: &Flow) -> (u32, u32);
    /// A generation from which on this flow was judged as it is now, while its owners were the same.
    fn unchanged_since(&self, origin: Origin, flow: &Flow) -> u64;
}

impl Origin {
    /// The end whose policies judge.
    const fn side(self) -> Side {
        match self {
            Self::Local => Side::Egress,
            Self::Remote => Side::Ingress,
        }
    }
}

impl Rules for Classifier {
    fn generation(&self) -> u64 {
        Self::generation(self)
    }

    fn judge(&self, origin: Origin, flow: &Flow) -> Verdict {
        self.verdict(origin.side(), flow)
    }

    fn owners(&self, flow: &Flow) -> (u32, u32) {
        (self.owner_stamp(flow.source), self.owner_stamp(flow.destination))
    }

    fn unchanged_since(&self, origin: Origin, flow: &Flow) -> u64 {
        Self::unchanged_since(self, origin.side(), flow)
    }
}

/// The judgement of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// Let it pass.
    Pass(Passed),
    /// Drop it.
    Drop(Dropped),
    /// Ask the kernel whether this is a packet of a flow that it knows, then call [`FlowTable::answered`].
    Ask(Tuple),
}

/// Why a packet passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// Of a flow that was allowed.
    Established,
    /// Begins a flow that is allowed.
    New(Verdict),
    /// An ICMP error about a flow that was allowed.
    Related,
    /// A later fragment of a packet that passed.
    Fragment,
    /// Not in the table: sent by a local pod, so the kernel has judged it, and no flow can be made of it.
    Untracked,
}

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The packet would begin a denied flow.
    Policy(Verdict),
    /// Such a packet belongs to a flow, and there is none.
    NoFlow,
    /// Of a flow that policy has cut.
    Tombstone,
    /// A later fragment whose first one did not pass before it.
    Fragment,
    /// A new flow, but the table or the initiator's share is full.
    TableFull,
    /// Flags or types that no end sends, or that do not cross routers.
    Invalid,
    /// An ICMP error about no flow of the one it goes to.
    Unrelated,
}

impl Judgement {
    /// Whether the packet passes.
    #[must_use]
    pub const fn passes(&self) -> bool {
        matches!(self, Self::Pass(_))
    }
}

/// How much a table may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Flows, tombstones included; about 72 bytes each.
    pub flows: usize,
    /// Limit of flows that one address began; some addresses share one limit.
    pub per_source: u32,
    /// Fragmented packets at a time.
    pub fragments: usize,
    /// Questions to the kernel.
    pub asks: ConntrackQueryLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows: 262_144, per_source: 65_536, fragments: 8192, asks: ConntrackQueryLimits::default() }
    }
}

/// Counters of a table since its creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Flows that began.
    pub created: u64,
    /// New flows refused for want of room.
    pub refused_full: u64,
    /// Flows judged again.
    pub rejudged: u64,
    /// Flows that became tombstones.
    pub cut: u64,
    /// Questions to the kernel.
    pub asked: u64,
    /// Look-ups that the packet before had done already.
    pub shared_lookups: u64,
}

/// The state of a query to the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ConntrackAnswer {
    NotAsked { peer: u32 },
    SaidReply,
    SaidNo,
}

/// Flows through one node's tunnel.
#[derive(Debug)]
pub struct FlowTable {
    store: FlowStore,
    fragments: Fragments,
    asks: ConntrackQueryLimiter,
    begin: Instant,
    /// The flow of the packet before.
    last: Option<(Key, u32)>,
    counters: Counters,
}

impl FlowTable {
    /// An empty table. `seed` must be a secret random number: who knows it can make flows collide.
    #[must_use]
    pub fn new(limits: Limits, seed: u64, now: Instant) -> Self {
        Self {
            store: FlowStore::new(limits.flows, limits.per_source, seed),
            fragments: Fragments::new(limits.fragments),
            asks: ConntrackQueryLimiter::new(limits.asks),
            begin: now,
            last: None,
            counters: Counters::default(),
        }
    }

    /// Has the flows of a batch at hand before its packets are judged one by one: with many flows it is memory that a
    /// look-up waits for. Changes nothing.
    pub fn fetch<'p>(&self, packets: impl Iterator<Item = &'p Packet>) {
        /// Fewer flows than this are in the caches anyway.
        const MANY: usize = 16_384;
        if self.len() < MANY {
            return;
        }
        let mut keys = packets.map(|packet| Key::of(packet).0).peekable();
        while keys.peek().is_some() {
            self.store.fetch(keys.by_ref().take(FETCHED));
        }
    }

    /// Judges a packet from the tunnel, sent by `peer`; `packet` was parsed from `bytes`.
    pub fn inbound(&mut self, rules: &impl Rules, packet: &Packet, bytes: &[u8], peer: u32, now: Instant) -> Judgement {
        let now = self.ticks(now);
        self.judge(rules, packet, bytes, Origin::Remote, ConntrackAnswer::NotAsked { peer }, now)
    }

    /// Judges a packet again for which the kernel was asked: whether it is a reply in a flow that the kernel knows and
    /// that a local pod began.
    pub fn answered(
        &mut self,
        rules: &impl Rules,
        packet: &Packet,
        bytes: &[u8],
        is_reply: bool,
        now: Instant,
    ) -> Judgement {
        let now = self.ticks(now);
        let kernel = if is_reply { ConntrackAnswer::SaidReply } else { ConntrackAnswer::SaidNo };
        self.judge(rules, packet, bytes, Origin::Remote, kernel, now)
    }

    /// Notes a packet that a local pod sends into the tunnel, which the kernel has let pass. Only packets of a flow
    /// that policy has cut are dropped. The kernel's rules may be a moment older or newer than `rules`: a packet that
    /// `rules` refuse passes without a flow, and `rules` judge the reply.
    pub fn outbound(&mut self, rules: &impl Rules, packet: &Packet, bytes: &[u8], now: Instant) -> Judgement {
        let now = self.ticks(now);
        match self.judge(rules, packet, bytes, Origin::Local, ConntrackAnswer::SaidNo, now) {
            Judgement::Drop(Dropped::Tombstone) => Judgement::Drop(Dropped::Tombstone),
            Judgement::Drop(_) | Judgement::Ask(_) => Judgement::Pass(Passed::Untracked),
            passes @ Judgement::Pass(_) => passes,
        }
    }

    /// Inserts a flow that the kernel knows, in the direction of its first packet. It is judged at its next packet, and
    /// ends if one of its addresses has another owner in `rules` by then. `answered`: the kernel has seen both
    /// directions. Returns whether there was room.
    pub fn insert_known(
        &mut self,
        rules: &impl Rules,
        tuple: &Tuple,
        origin: Origin,
        answered: bool,
        now: Instant,
    ) -> bool {
        let now = self.ticks(now);
        let (key, forward) = Key::new(tuple);
        if let Some(place) = self.store.find(&key) {
            if self.store.get(place).expires > now {
                return true;
            }
            self.forget(place);
        }
        let state = if answered { FlowState::Answered } else { FlowState::Asked };
        let mut flags = state as u16;
        flags |= if forward { FORWARD } else { 0 };
        flags |= if origin == Origin::Local { LOCAL } else { 0 };
        let expires = now + ticks(state.timeout(tuple.protocol));
        // Never a classifier's generation.
        let entry = FlowEntry { key, expires, generation: u64::MAX, owners: rules.owners(&tuple.flow()), flags };
        self.last = None;
        self.store.insert(entry, now).is_some()
    }

    /// Removes expired flows among the next `count` places. Regular calls free memory; expired flows are ignored
    /// anyway.
    pub fn sweep(&mut self, now: Instant, count: usize) {
        let now = self.ticks(now);
        self.last = None;
        self.store.sweep(now, count);
    }

    /// Number of flows, tombstones and those that have expired since the last sweep included.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.store.len()
    }

    /// Whether there is no flow.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The counters.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    fn judge(
        &mut self,
        rules: &impl Rules,
        packet: &Packet,
        bytes: &[u8],
        origin: Origin,
        kernel: ConntrackAnswer,
        now: u32,
    ) -> Judgement {
        let place = (packet.source, packet.destination, packet.protocol);
        match packet.fragment {
            Fragment::Whole => self.judge_first(rules, packet, bytes, origin, kernel, now, None),
            Fragment::First(id) => {
                let mut tuple = None;
                let judgement = self.judge_first(rules, packet, bytes, origin, kernel, now, Some(&mut tuple));
                match (judgement, tuple) {
                    (Judgement::Pass(_), Some(tuple)) => self.fragments.passed(place, id, tuple, now),
                    (Judgement::Drop(_), _) => self.fragments.refused(place, id),
                    _ => {}
                }
                judgement
            }
            Fragment::Later(id) => {
                let Some(first) = self.fragments.first(place, id, now) else {
                    return Judgement::Drop(Dropped::Fragment);
                };
                match self.passing(rules, &first.tuple, now) {
                    Some(false) => Judgement::Drop(Dropped::Tombstone),
                    Some(true) => Judgement::Pass(Passed::Fragment),
                    None => Judgement::Drop(Dropped::Fragment),
                }
            }
        }
    }

    /// A whole packet or a first fragment. `flow`, if any, gets its flow, which costs as much as the judgement.
    #[expect(clippy::too_many_arguments, reason = "a packet and all that its judgement depends on")]
    #[inline]
    fn judge_first(
        &mut self,
        rules: &impl Rules,
        packet: &Packet,
        bytes: &[u8],
        origin: Origin,
        kernel: ConntrackAnswer,
        now: u32,
        flow: Option<&mut Option<Tuple>>,
    ) -> Judgement {
        if let Transport::Icmp { kind, .. } = packet.transport
            && icmp::IcmpKind::of(packet.source.is_ipv4(), kind) == Some(icmp::IcmpKind::Error)
        {
            let (judgement, quoted) = self.judge_error(rules, packet, bytes, now);
            if let Some(flow) = flow {
                *flow = quoted;
            }
            return judgement;
        }
        let Some(step) = step(packet, bytes) else { return Judgement::Drop(Dropped::Invalid) };
        if let Some(flow) = flow {
            *flow = Some(Tuple::of(packet));
        }
        let number = packet.protocol.unwrap_or(NO_PROTOCOL);
        let (key, forward) = Key::of(packet);
        let Some(place) = self.live(rules, key, now) else {
            return self.judge_new(rules, &Tuple::of(packet), step, origin, kernel, now);
        };
        let entry = self.store.get_mut(place);
        let reply = (entry.flags & FORWARD != 0) != forward;
        let state = FlowState::from_bits(entry.flags as u8);
        if entry.flags & TOMBSTONE != 0 {
            entry.expires = now + ticks(state.tombstone(number));
            return Judgement::Drop(Dropped::Tombstone);
        }
        if step == Step::Open && matches!(state, FlowState::Closed | FlowState::Closing) {
            // A new flow between the same ends.
            self.forget(place);
            return self.judge_new(rules, &Tuple::of(packet), step, origin, kernel, now);
        }
        if step == Step::Open && reply {
            return Judgement::Drop(Dropped::NoFlow);
        }
        let state = state.after(step, reply);
        entry.flags = (entry.flags & !STATE) | state as u16;
        entry.expires = now + ticks(state.timeout(number));
        Judgement::Pass(Passed::Established)
    }

    fn judge_new(
        &mut self,
        rules: &impl Rules,
        tuple: &Tuple,
        step: Step,
        origin: Origin,
        kernel: ConntrackAnswer,
        now: u32,
    ) -> Judgement {
        if kernel == ConntrackAnswer::SaidReply {
            return self.take_up(rules, &tuple.reversed(), FlowState::Answered.after(step, true), now);
        }
        let begins = matches!(step, Step::Open | Step::Any | Step::Middle);
        if origin == Origin::Local && !matches!(step, Step::Open | Step::Any) {
            // Which end began this flow only the kernel knows.
            return Judgement::Pass(Passed::Untracked);
        }
        let verdict = rules.judge(origin, &tuple.flow());
        let refused = !begins || !verdict.allowed || step == Step::Middle;
        if let ConntrackAnswer::NotAsked { peer } = kernel
            && refused
            && step != Step::Open
            && self.asks.may_ask(tuple, peer, now)
        {
            self.counters.asked += 1;
            return Judgement::Ask(*tuple);
        }
        if kernel == ConntrackAnswer::SaidNo && origin == Origin::Remote && step != Step::Open {
            self.asks.said_no(*tuple, now);
        }
        if begins && !verdict.allowed {
            return Judgement::Drop(Dropped::Policy(verdict));
        }
        if !begins {
            return Judgement::Drop(Dropped::NoFlow);
        }
        let state = if step == Step::Middle { FlowState::TakenUp } else { FlowState::Asked };
        match self.begin(rules, tuple, origin, state, now) {
            Some(_) => Judgement::Pass(Passed::New(verdict)),
            None => self.full(),
        }
    }

    /// Inserts a flow that a local pod began and only the kernel knows. The kernel may forget it before this table
    /// does, and nothing judges packets after the tunnel, so the rules judge it now, like its first packet.
    fn take_up(&mut self, rules: &impl Rules, begun: &Tuple, state: FlowState, now: u32) -> Judgement {
        let Some(place) = self.begin(rules, begun, Origin::Local, state, now) else { return self.full() };
        if rules.judge(Origin::Local, &begun.flow()).allowed {
            return Judgement::Pass(Passed::Established);
        }
        self.counters.cut += 1;
        let entry = self.store.get_mut(place);
        entry.flags |= TOMBSTONE;
        entry.expires = now + ticks(state.tombstone(begun.protocol));
        Judgement::Drop(Dropped::Tombstone)
    }

    fn full(&mut self) -> Judgement {
        self.counters.refused_full += 1;
        Judgement::Drop(Dropped::TableFull)
    }

    /// Inserts a flow as allowed; `None`: there is no room.
    fn begin(&mut self, rules: &impl Rules, tuple: &Tuple, origin: Origin, state: FlowState, now: u32) -> Option<u32> {
        let (key, forward) = Key::new(tuple);
        let mut flags = state as u16;
        flags |= if forward { FORWARD } else { 0 };
        flags |= if origin == Origin::Local { LOCAL } else { 0 };
        let entry = FlowEntry {
            key,
            expires: now + ticks(state.timeout(tuple.protocol)),
            generation: rules.generation(),
            owners: rules.owners(&tuple.flow()),
            flags,
        };
        let place = self.store.insert(entry, now);
        self.last = place.map(|place| (key, place));
        self.counters.created += u64::from(place.is_some());
        place
    }

    /// An ICMP error passes if it goes to an end of the allowed flow that it quotes a packet of, sent by that end.
    fn judge_error(
        &mut self,
        rules: &impl Rules,
        packet: &Packet,
        bytes: &[u8],
        now: u32,
    ) -> (Judgement, Option<Tuple>) {
        let inner = bytes
            .get(usize::from(packet.payload_offset) + 8..usize::from(packet.total_len))
            .and_then(quoted)
            .filter(|inner| inner.source == packet.destination);
        let Some(inner) = inner else { return (Judgement::Drop(Dropped::Unrelated), None) };
        match self.passing(rules, &inner, now) {
            None => (Judgement::Drop(Dropped::Unrelated), None),
            Some(false) => (Judgement::Drop(Dropped::Tombstone), None),
            Some(true) => (Judgement::Pass(Passed::Related), Some(inner)),
        }
    }

    /// The flow of this key, judged by the present rules.
    #[inline]
    fn live(&mut self, rules: &impl Rules, key: Key, now: u32) -> Option<u32> {
        let place = match &self.last {
            Some((last, place)) if *last == key => {
                self.counters.shared_lookups += 1;
                *place
            }
            _ => {
                let place = self.store.find(&key)?;
                self.last = Some((key, place));
                place
            }
        };
        let entry = self.store.get(place);
        if entry.expires <= now {
            self.forget(place);
            return None;
        }
        if entry.generation != rules.generation() && !self.rejudge(rules, place) {
            return None;
        }
        Some(place)
    }

    /// Whether the flow that `tuple` belongs to, whichever way it goes, is there and passes; `None`: it is not there.
    fn passing(&mut self, rules: &impl Rules, tuple: &Tuple, now: u32) -> Option<bool> {
        let place = self.live(rules, Key::new(tuple).0, now)?;
        Some(self.store.get(place).flags & TOMBSTONE == 0)
    }

    /// `false`: an address came to someone else, and the flow is gone.
    fn rejudge(&mut self, rules: &impl Rules, place: u32) -> bool {
        let entry = *self.store.get(place);
        let origin = if entry.flags & LOCAL != 0 { Origin::Local } else { Origin::Remote };
        let flow = entry.key.tuple(entry.flags & FORWARD != 0).flow();
        let owners = rules.owners(&flow);
        if owners != entry.owners {
            self.forget(place);
            return false;
        }
        if (rules.unchanged_since(origin, &flow)..rules.generation()).contains(&entry.generation) {
            self.store.get_mut(place).generation = rules.generation();
            return true;
        }
        let allowed = rules.judge(origin, &flow).allowed;
        self.counters.rejudged += 1;
        self.counters.cut += u64::from(!allowed && entry.flags & TOMBSTONE == 0);
        let entry = self.store.get_mut(place);
        entry.generation = rules.generation();
        entry.owners = owners;
        entry.flags = if allowed { entry.flags & !TOMBSTONE } else { entry.flags | TOMBSTONE };
        true
    }

    fn forget(&mut self, place: u32) {
        self.last = None;
        self.store.remove(place);
    }

    fn ticks(&self, now: Instant) -> u32 {
        // From 1 on: 0 marks a free place.
        1 + ticks(now.saturating_duration_since(self.begin))
    }
}

/// Ticks per second within a table. A finer resolution would overflow within years.
const SECOND: u32 = 16;

fn ticks(duration: std::time::Duration) -> u32 {
    /// So that sums with timeouts do not overflow: some four years.
    const MOST: u32 = u32::MAX / 2;
    let whole = u32::try_from(duration.as_secs()).unwrap_or(MOST).min(MOST / SECOND) * SECOND;
    whole + duration.subsec_nanos() / (1_000_000_000 / SECOND)
}

#[cfg(test)]
mod tests;
