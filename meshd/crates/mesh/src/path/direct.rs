//! The direct path to a peer in one family: proven by echoes, left when they stay out.
//!
//! ```text
//!                  first echo
//!    ┌──────────┐ ─────────────────────────▶ ┌────────┐ ◀─┐ neither path answers (its daemon restarts): stay while
//!    │  Tunnel  │      30 s of echoes         │ Direct │   │ the neighbour keeps the MAC of the last good echo, at
//!    └──────────┘ ◀───────────────────────── └────────┘ ──┘ most 5 min; three more losses count once it is heard again
//!      ▲      │    3 losses, and it is heard      │  ▲
//!      │      │    in the tunnel since            │  │ first echo
//!      │      │ nothing is heard for 45 s         ▼  │
//!      │      └──────────────────────────▶ ┌──────────┐
//!      └────────────────────────────────── │  Silent  │
//!             heard in the tunnel again    └──────────┘
//! ```
//!
//! A peer is *eligible* for direct if both records name the same site and each one's interface address is in a
//! connected prefix that the other's record also states. Only an authenticated echo over that path proves it: clouds
//! answer ARP and drop foreign sources, and two homes both have 192.168.1.0/24.
//!
//! The tunnel also counts as alive only by packets that arrived since the direct path came into doubt: an established
//! session is no sign of life.

use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use etcd_schema::MacAddress;

/// Time between probes of a path whose echoes come back.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);
/// Time after which a probe without an echo counts as lost; the next one is sent at once.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Losses in a row after which the direct path is left.
const LOSSES: u32 = 3;
/// The same for a path that was never proven.
const FIRST_TIMEOUT: Duration = Duration::from_millis(250);
/// Losses in a row after which such a path is asked at the usual pace.
const FIRST_LOSSES: u32 = 40;
/// Losses in a row after which the peer is called in the tunnel, too: most paths prove themselves before.
const FIRST_CALL: u32 = 8;
/// How long echoes must come back before a path that failed is used again.
const PROVING: Duration = Duration::from_secs(30);
/// How long a path whose peer answers nowhere is kept while its neighbour entry still holds.
const GRACE: Duration = Duration::from_secs(300);
/// How old the last word in the tunnel may be before the peer is asked there again, while the direct path is not in use.
const TUNNEL_FRESH: Duration = Duration::from_secs(25);
/// How old it may be before the peer counts as silent.
const TUNNEL_SILENT: Duration = Duration::from_secs(45);

/// What the path is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectState {
    /// Packets go through the tunnel; the direct path is being probed.
    Tunnel(NotDirect),
    /// Packets go direct.
    Direct,
    /// Neither path answers.
    Silent,
}

/// Why an eligible peer is not direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotDirect {
    /// No echo has come back yet.
    Unproven,
    /// It failed, and echoes have not yet come back for long enough.
    Failed,
}

/// What is known of the rest of the world when a probe is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Surroundings {
    /// When something authentic of the peer's last came through the tunnel.
    pub(super) heard_in_tunnel: Option<Instant>,
    /// Link-layer address that the kernel has for the next hop, when it holds.
    pub(super) neighbour: Option<MacAddress>,
}

/// The state machine of one peer and family that is eligible for direct.
#[derive(Debug, Clone)]
pub(super) struct DirectPath {
    state: DirectState,
    /// MAC of the neighbour when the last echo came.
    last_mac: Option<MacAddress>,
    /// Losses in a row.
    losses: u32,
    /// Since when the peer must have been heard in the tunnel to count as there: when the first probe of the present run
    /// of losses was sent, or when it became silent.
    doubted: Option<Instant>,
    /// In use although neither path answers.
    in_grace: bool,
    /// First echo of the present run of echoes.
    proving_since: Option<Instant>,
    last_echo: Option<Instant>,
    /// The direct path has failed before: it must prove itself.
    failed: bool,
    outstanding: Option<Outstanding>,
    /// Nonces of the newest probes that count as lost: an echo that comes late still proves the path.
    late: ArrayVec<u128, { LOSSES as usize }>,
    next_probe: Instant,
}

/// A probe that was sent and whose echo has not come back.
#[derive(Debug, Clone, Copy)]
struct Outstanding {
    nonce: u128,
    sent: Instant,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    /// Fresh and random; its echo proves the path.
    pub(super) nonce: u128,
}

impl DirectPath {
    /// A path that has become eligible: it is probed at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: DirectState::Tunnel(NotDirect::Unproven),
            last_mac: None,
            losses: 0,
            doubted: None,
            in_grace: false,
            proving_since: None,
            last_echo: None,
            failed: false,
            outstanding: None,
            late: ArrayVec::new(),
            next_probe: now,
        }
    }

    /// A path that was in use before the daemon was restarted: it stays in use while it proves itself, as long as the
    /// neighbour entry holds.
    pub(super) fn resumed(now: Instant, neighbour: Option<MacAddress>) -> Self {
        let mut path = Self::new(now);
        if neighbour.is_some() {
            path.state = DirectState::Direct;
            path.last_mac = neighbour;
            path.last_echo = Some(now);
        }
        path
    }

    /// The first probe is sent at `at`, no earlier.
    pub(super) fn probe_at(&mut self, at: Instant) {
        self.next_probe = at;
    }

    /// What packets do now.
    pub(super) fn state(&self) -> DirectState {
        self.state
    }

    /// When [`Self::poll`] has something to do.
    pub(super) fn deadline(&self) -> Instant {
        match self.outstanding {
            Some(probe) => probe.sent + self.timeout(),
            None => self.next_probe,
        }
    }

    /// Whether a call into the tunnel should show now that the peer is there: a path in use is in doubt, or one that is
    /// not has nothing fresh to show that the tunnel carries.
    pub(super) fn wants_tunnel(&self, now: Instant, heard_in_tunnel: Option<Instant>) -> bool {
        let Some(doubted) = self.doubted else { return false };
        match self.state {
            DirectState::Tunnel(NotDirect::Unproven) if self.losses < FIRST_CALL => false,
            DirectState::Direct => heard_in_tunnel.is_none_or(|heard| heard < doubted),
            DirectState::Tunnel(_) | DirectState::Silent => {
                heard_in_tunnel.is_none_or(|heard| now.saturating_duration_since(heard) >= TUNNEL_FRESH)
            }
        }
    }

    /// Whether [`Self::poll`] makes use of [`Surroundings`]; what is given may be anything otherwise.
    pub(super) fn needs_surroundings(&self, now: Instant) -> bool {
        self.doubted.is_some() || self.outstanding.is_some_and(|probe| now >= probe.sent + self.timeout())
    }

    /// Time has passed. Gives the probe to send, if one is due. `nonce` must be fresh and random.
    pub(super) fn poll(&mut self, now: Instant, around: Surroundings, nonce: u128) -> Option<Probe> {
        if let Some(probe) = self.outstanding {
            if now < probe.sent + self.timeout() {
                return None;
            }
            self.outstanding = None;
            self.losses = self.losses.saturating_add(1);
            self.doubted.get_or_insert(probe.sent);
            if self.late.is_full() {
                self.late.remove(0);
            }
            self.late.push(probe.nonce);
            self.proving_since = None;
            // A loss on a path in use, or on one that has not had its chance yet, is followed up at once; else the usual
            // pace will do.
            let in_question = matches!(self.state, DirectState::Direct | DirectState::Tunnel(NotDirect::Unproven));
            if in_question && self.losses < self.allowed() {
                self.next_probe = now;
            }
        }
        self.fall_back(now, around);
        if now < self.next_probe {
            return None;
        }
        self.outstanding = Some(Outstanding { nonce, sent: now });
        self.next_probe = now + PROBE_INTERVAL;
        Some(Probe { nonce })
    }

    /// Whether an echo of `nonce` is awaited.
    pub(super) fn awaits(&self, nonce: u128) -> bool {
        self.outstanding.is_some_and(|probe| probe.nonce == nonce) || self.late.contains(&nonce)
    }

    /// An authenticated echo of `nonce` has come back over the path. `false` if no such probe is under way.
    pub(super) fn echoed(&mut self, now: Instant, nonce: u128, neighbour: Option<MacAddress>) -> bool {
        if !self.awaits(nonce) {
            return false;
        }
        if self.outstanding.is_some_and(|probe| probe.nonce == nonce) {
            self.outstanding = None;
        }
        self.late.clear();
        self.losses = 0;
        self.doubted = None;
        self.in_grace = false;
        self.last_echo = Some(now);
        self.last_mac = neighbour.or(self.last_mac);
        let since = *self.proving_since.get_or_insert(now);
        let proven = !self.failed || now.duration_since(since) >= PROVING || self.state == DirectState::Silent;
        if proven {
            self.state = DirectState::Direct;
        }
        true
    }

    /// Time that an echo has. The other end of a path that was never proven may not be listening yet: it is asked often.
    fn timeout(&self) -> Duration {
        match self.state {
            DirectState::Tunnel(NotDirect::Unproven) => FIRST_TIMEOUT,
            _ => PROBE_TIMEOUT,
        }
    }

    /// Losses in a row that say something about the path.
    fn allowed(&self) -> u32 {
        match self.state {
            DirectState::Tunnel(NotDirect::Unproven) => FIRST_LOSSES,
            _ => LOSSES,
        }
    }

    /// Leaves a path that has been lost, or comes back from silence into the tunnel.
    fn fall_back(&mut self, now: Instant, around: Surroundings) {
        let Some(doubted) = self.doubted else { return };
        let heard = around.heard_in_tunnel.filter(|heard| *heard >= doubted);
        match self.state {
            DirectState::Direct if self.losses >= LOSSES => {
                if heard.is_some() && self.in_grace {
                    // It was away and is back: its prober gets its chance before the path is called broken.
                    self.in_grace = false;
                    self.losses = 0;
                    self.doubted = None;
                } else if heard.is_some() {
                    self.failed = true;
                    self.state = DirectState::Tunnel(NotDirect::Failed);
                } else {
                    let same_neighbour = around.neighbour.is_some() && around.neighbour == self.last_mac;
                    let time_left = self.last_echo.is_some_and(|echo| now.duration_since(echo) < GRACE);
                    self.in_grace = same_neighbour && time_left;
                    if !self.in_grace {
                        self.fall_silent(now);
                    }
                }
            }
            DirectState::Tunnel(_) if self.losses >= self.allowed() => {
                let newest = around.heard_in_tunnel.map_or(doubted, |heard| heard.max(doubted));
                if now.saturating_duration_since(newest) >= TUNNEL_SILENT {
                    self.fall_silent(now);
                }
            }
            DirectState::Silent if heard.is_some() => {
                self.state = DirectState::Tunnel(NotDirect::Failed);
            }
            _ => {}
        }
    }

    fn fall_silent(&mut self, now: Instant) {
        self.failed = true;
        self.in_grace = false;
        self.doubted = Some(now);
        self.state = DirectState::Silent;
    }
}

#[cfg(test)]
mod tests;
