//! Monitors progress of the daemon's threads, for systemd's watchdog and `/livez`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use api::Check;
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tunnel::Tunnel;

/// How often the tunnel's threads are asked.
const EVERY: Duration = Duration::from_secs(5);
/// A thread of the tunnel that was not seen to come round for this long hangs.
const TUNNEL_LATE: Duration = Duration::from_secs(20);
/// The loop looks over everything every 30 s; a kernel with many routes may keep it for a while.
const LOOP_LATE: Duration = Duration::from_secs(120);

/// When each was last seen to come round.
#[derive(Debug)]
pub(super) struct Watchdog(Mutex<Heartbeats>);

#[derive(Debug, Clone, Copy)]
struct Heartbeats {
    tunnel: Instant,
    loop_: Instant,
}

impl Watchdog {
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(Heartbeats { tunnel: now, loop_: now }))
    }

    /// The daemon's loop came round.
    pub(super) fn loop_alive(&self, now: Instant) {
        self.lock().loop_ = now;
    }

    /// The checks of `/livez`.
    pub(super) fn checks(&self, now: Instant) -> Vec<Check> {
        let seen = *self.lock();
        vec![check("tunnel_threads", seen.tunnel, TUNNEL_LATE, now), check("main_loop", seen.loop_, LOOP_LATE, now)]
    }

    /// Asks the tunnel's threads again and again until `stop`, and feeds systemd's watchdog while all come round.
    pub(super) fn spawn(self: Arc<Self>, tunnel: Tunnel, stop: CancellationToken) {
        let every = sd_notify::watchdog_enabled().map_or(EVERY, |watchdog| EVERY.min(watchdog / 3));
        tokio::spawn(async move {
            let mut clock = interval(every);
            clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut before = tunnel.heartbeats();
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = clock.tick() => {}
                }
                let heartbeats = tunnel.heartbeats();
                if heartbeats.iter().zip(&before).all(|(now, before)| now != before) {
                    self.lock().tunnel = Instant::now();
                }
                before = heartbeats;
                if self.checks(Instant::now()).iter().all(|check| check.failure.is_none()) {
                    // Nobody may be listening.
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                }
            }
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Heartbeats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(name: &'static str, seen: Instant, late: Duration, now: Instant) -> Check {
    let silent = now.saturating_duration_since(seen);
    let failure = (silent > late).then(|| format!("no progress for {} s", silent.as_secs()));
    Check::new(name, failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_hangs_is_named() {
        let start = Instant::now();
        let watchdog = Watchdog::new(start);
        let failed = |now| {
            let failed = watchdog.checks(now).into_iter().filter(|check| check.failure.is_some());
            failed.map(|check| check.name).collect::<Vec<_>>()
        };
        assert!(failed(start + TUNNEL_LATE).is_empty());
        assert_eq!(failed(start + LOOP_LATE), ["tunnel_threads"]);
        assert_eq!(failed(start + LOOP_LATE + Duration::from_secs(1)), ["tunnel_threads", "main_loop"]);
        watchdog.loop_alive(start + LOOP_LATE);
        assert_eq!(failed(start + LOOP_LATE + Duration::from_secs(1)), ["tunnel_threads"]);
    }
}
