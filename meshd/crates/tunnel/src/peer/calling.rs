//! Initiation of handshakes: when, to which endpoint, with which key; due actions and the next deadline.

use std::time::{Duration, Instant};

use mesh::tunnel_table::CALL_OUT_KEEPALIVE;

use super::{PeerContext, PeerState};
use crate::{batch::Endpoint, dice::Dice, drops::DropReason, engine::Tick};

/// An initiation is not followed by another one for this long (WireGuard's REKEY_TIMEOUT).
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// A session is renewed after this long by who initiated it (REKEY_AFTER_TIME) …
const REKEY_AFTER: Duration = Duration::from_secs(120);
/// … and by the other side, if it wants one up, when nothing came of that.
const REKEY_AFTER_AS_RESPONDER: Duration = Duration::from_secs(150);
/// The timer interval of engines with a handshake in flight, and of those with an established session.
const TICK: Duration = Duration::from_millis(250);
const TICK_IDLE: Duration = Duration::from_secs(1);
/// How far apart the ticks of peers that were called at once are drawn.
const TICK_SPREAD: Duration = Duration::from_millis(100);
/// Beyond this, time must pass in an engine before it may do anything.
const STALE: Duration = Duration::from_millis(1500);
/// First byte of an initiation.
const INITIATION: u8 = 1;
/// A peer that was heard within this time has a session with us, or has just lost it.
const HEARD_LATELY: Duration = Duration::from_secs(10);

impl PeerState {
    /// Initiates soon, if the peer wants a session and has none.
    pub(in super::super) fn start(&mut self, cx: &mut PeerContext<'_>) {
        if self.wants_session() && self.sending_key().is_none() && !self.is_ticking() {
            let spread = Duration::from_millis(cx.dice.draw(0..333));
            self.next_attempt = Some(cx.now + spread);
        }
        self.schedule(cx);
    }

    /// Initiates a handshake unless one was initiated within the last 5 seconds.
    pub(in super::super) fn initiate(&mut self, cx: &mut PeerContext<'_>) {
        let recent = |at: Instant| cx.now.saturating_duration_since(at) < REKEY_TIMEOUT;
        if self.removed || !self.has_target() || self.last_attempt.is_some_and(recent) {
            return;
        }
        self.next_attempt = None;
        self.attempt(cx, self.key_to_try(), true);
        self.schedule(cx);
    }

    /// Calls the peer at `at`, or when it is to be called already, though there may be a session.
    pub(in super::super) fn call_at(&mut self, cx: &mut PeerContext<'_>, at: Instant) {
        if self.has_target() {
            self.call_at = Some(self.call_at.map_or(at, |before| before.min(at)));
            self.schedule(cx);
        }
    }

    /// Takes in that the peer has restarted: calls it at `at`, unless there is no session that may be gone, or one that
    /// came up since.
    pub(in super::super) fn restarted(&mut self, cx: &mut PeerContext<'_>, at: Instant) {
        let lately = |up: Instant| cx.now.saturating_duration_since(up) < HEARD_LATELY;
        if self.sending_key().is_some() && !self.latest_handshake().is_some_and(lately) {
            self.call_at(cx, at);
        }
    }

    /// Takes in that a datagram for a session that we do not have came from where the peer is, or an initiation of the
    /// peer's that is not newer than one before, from anywhere: calls the peer where it was last, unless a session
    /// opened something lately or it was called within the last 5 seconds. Returns whether it is called.
    pub(in super::super) fn stranger(&mut self, cx: &mut PeerContext<'_>) -> bool {
        let now = cx.now;
        let within = |at: Option<Instant>, limit| at.is_some_and(|at| now.saturating_duration_since(at) < limit);
        let heard = within(self.last_rx, HEARD_LATELY);
        let called = self.call_at.is_some() || within(self.last_attempt, REKEY_TIMEOUT);
        if self.removed || heard || called || !self.has_target() {
            return false;
        }
        self.call_at(cx, cx.now);
        true
    }

    /// Lets the peer know where this node is now: sends an empty message if there is a session.
    pub(in super::super) fn announce(&mut self, cx: &mut PeerContext<'_>) {
        if let (Some(key), Some(to)) = (self.sending_key(), self.endpoint) {
            self.seal(cx, key, &[], to);
        }
    }

    /// Sends an initiation for one key. `insist`: with retries every 5 seconds for 90; else the next one comes after
    /// the long interval.
    pub(super) fn attempt(&mut self, cx: &mut PeerContext<'_>, at: usize, insist: bool) {
        if at >= self.keys.len() {
            return;
        }
        let before = self.attempts;
        self.catch_up(cx, at);
        self.engine(cx, at);
        self.keys[at].ticking = insist;
        if self.attempts == before {
            let Some(out) = cx.out.room(0) else { return };
            if let Some(len) = self.keys[at].engine.as_mut().and_then(|e| e.initiate(out)) {
                self.transmit_initiation(cx, len);
            }
        }
        if !insist {
            self.next_attempt = Some(cx.now + slow_interval(cx.dice));
        }
    }

    pub(super) fn wants_session(&self) -> bool {
        self.call_out || self.keepalive.is_some()
    }

    fn is_ticking(&self) -> bool {
        self.keys.iter().any(|k| k.ticking)
    }

    pub(super) fn has_target(&self) -> bool {
        !self.keys.is_empty() && (self.endpoint.is_some() || !self.candidates.is_empty())
    }

    /// Where initiation number `attempts` goes: where the peer was last, then each candidate, and so on. Both keys
    /// are tried at one place before the next. A live peer's first two renewals go nowhere but to its endpoint.
    fn target(&self) -> Option<Endpoint> {
        if let Some(endpoint) = self.endpoint
            && self.attempts < 2
        {
            return Some(endpoint);
        }
        let here = self.endpoint.map(|e| e.remote);
        let others = self.candidates.iter().filter(|c| Some(**c) != here);
        let total = others.clone().count() + usize::from(here.is_some());
        let turn = self.attempts as usize / self.keys.len().max(1) % total.max(1);
        match (self.endpoint, turn) {
            (Some(endpoint), 0) => Some(endpoint),
            (here, turn) => {
                others.copied().nth(turn - usize::from(here.is_some())).map(|remote| Endpoint { remote, source: None })
            }
        }
    }

    /// The key of the newest session, also if that is over, and the other one every other time.
    pub(super) fn key_to_try(&self) -> usize {
        let newest = self.keys.iter().map(|k| k.session).max();
        let newest = self.keys.iter().position(|k| Some(k.session) == newest);
        (newest.unwrap_or(0) + self.attempts as usize) % self.keys.len().max(1)
    }

    pub(super) fn engine(&mut self, cx: &PeerContext<'_>, at: usize) {
        let key = &mut self.keys[at];
        if key.engine.is_none() {
            key.engine = Some(cx.factory.make(&key.public, self.preshared_key.as_ref(), key.index));
            key.ticked = cx.now;
        }
    }

    /// Advances the clock of an engine that was idle for long, so that its next message has the right time.
    pub(super) fn catch_up(&mut self, cx: &mut PeerContext<'_>, at: usize) {
        let key = &self.keys[at];
        if key.engine.is_some() && cx.now.saturating_duration_since(key.ticked) > STALE {
            // Expired or not: the caller is about to start something new.
            let _ = self.let_time_pass(cx, at);
        }
    }

    pub(super) fn tick(&mut self, cx: &mut PeerContext<'_>, at: usize) {
        let before = self.attempts;
        if self.let_time_pass(cx, at) == Tick::Expired {
            self.keys[at].ticking = false;
            if !self.is_ticking() {
                self.give_up(cx);
            }
        } else if self.attempts != before && self.sending_key().is_none() {
            // No answer for this key: the peer may have gone over to its other one.
            for other in 0..self.keys.len() {
                if !self.keys[other].ticking {
                    self.attempt(cx, other, true);
                }
            }
        }
    }

    fn let_time_pass(&mut self, cx: &mut PeerContext<'_>, at: usize) -> Tick {
        let key = &mut self.keys[at];
        let Some(engine) = key.engine.as_mut() else {
            return Tick::Expired;
        };
        let Some(out) = cx.out.room(0) else {
            return Tick::Nothing;
        };
        key.ticked = cx.now;
        let tick = engine.tick(out);
        if let Tick::Send(len) = tick {
            if out[0] == INITIATION {
                self.transmit_initiation(cx, len);
            } else if let Some(to) = self.endpoint {
                self.transmit(cx, len, to);
            }
        }
        tick
    }

    /// After the engines have given up: drops pending packets, and retries peers that must stay up at long, jittered
    /// intervals.
    fn give_up(&mut self, cx: &mut PeerContext<'_>) {
        self.drop_waiting(cx, DropReason::OutHandshakeTimeout);
        self.unanswered = None;
        if self.wants_session() {
            self.given_up = true;
            self.next_attempt = Some(cx.now + slow_interval(cx.dice));
        }
    }

    /// Renews a session that is wanted up also when no data flows; with data the engines do it.
    pub(super) fn renew(&mut self, cx: &mut PeerContext<'_>) {
        let Some(at) = self.sending_key() else {
            if self.wants_session() && !self.is_ticking() && self.next_attempt.is_none() {
                self.next_attempt = Some(cx.now);
            }
            return;
        };
        let key = &self.keys[at];
        let limit = if key.initiator { REKEY_AFTER } else { REKEY_AFTER_AS_RESPONDER };
        let old = |since: Instant| cx.now.saturating_duration_since(since) >= limit;
        if self.wants_session() && key.established.is_some_and(old) {
            self.initiate(cx);
        }
    }

    fn keepalive_interval(&self) -> Option<Duration> {
        self.keepalive.or_else(|| self.call_out.then_some(CALL_OUT_KEEPALIVE))
    }

    pub(super) fn keep_alive(&mut self, cx: &mut PeerContext<'_>) {
        let Some(interval) = self.keepalive_interval() else { return };
        let quiet = |at: Instant| cx.now.saturating_duration_since(at) >= interval;
        if self.last_tx.is_none_or(quiet)
            && let (Some(key), Some(to)) = (self.sending_key(), self.endpoint)
        {
            self.seal(cx, key, &[], to);
        }
    }

    fn transmit_initiation(&mut self, cx: &mut PeerContext<'_>, len: usize) {
        if let Some(to) = self.target() {
            self.transmit(cx, len, to);
        }
        self.attempts = self.attempts.wrapping_add(1);
        self.last_attempt = Some(cx.now);
    }

    /// Sets the alarm for whatever comes next, if it is earlier than the one that is set.
    pub(super) fn schedule(&mut self, cx: &PeerContext<'_>) {
        if self.removed {
            return;
        }
        let session = self.sending_key().is_some();
        let tick = self.is_ticking().then(|| {
            let calm = session && !self.busy && self.attempts == 0 && self.waiting.is_empty();
            cx.now + if calm { TICK_IDLE } else { TICK }
        });
        // Retries follow the ticks, so jitter keeps peers from retrying all at once. An alarm within the jitter is
        // kept, so that not every packet draws a new one.
        let tick = tick
            .filter(|tick| self.due.is_none_or(|due| *tick + TICK_SPREAD < due))
            .map(|tick| tick + cx.dice.draw(Duration::ZERO..TICK_SPREAD));
        let keepalive = self
            .keepalive_interval()
            .filter(|_| session)
            .map(|interval| self.last_tx.map_or(cx.now, |at| at + interval));
        let flush = (session && !self.waiting.is_empty()).then(|| cx.now + Duration::from_millis(1));
        let next =
            [tick, keepalive, flush, self.next_attempt, self.call_at, self.path.retry_at()].into_iter().flatten().min();
        if let Some(next) = next
            && self.due.is_none_or(|due| next < due)
        {
            self.due = Some(next);
            cx.alarms.set(next, self.id);
        }
    }
}

/// Between two calls to a peer that does not answer.
fn slow_interval(dice: &Dice) -> Duration {
    Duration::from_millis(dice.draw(15_000..30_000))
}
