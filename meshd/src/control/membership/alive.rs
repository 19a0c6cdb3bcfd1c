//! `alive/ID`: says that a daemon runs, and finds out a second one with the same identity.
//!
//! A daemon that starts puts its record over whatever is there: after a kill -9 that is its own predecessor's. A
//! daemon that finds its record replaced was here first if it had put it where there was none, or more than
//! [`ALIVE_TTL`] ago: it puts it back. One that had put it over another's more lately is the newcomer, and refuses to
//! run. Boot ids are not asked: those of containers and snapshots are equal.

use std::time::{Duration, Instant};

use etcd_schema::{Alive, Key};
use rand::rngs::StdRng;

use super::{ALIVE_TTL, Answer, Call, CallId, Context, Flight};
use crate::control::types::{CallError, Compare, LeaseId, Revision, Transaction, Write};

/// How long a newcomer that found a record leaves the other keys alone: time for a live owner to answer.
const GRACE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct AliveLane {
    flight: Flight,
    lease: Option<(LeaseId, Instant)>,
    claim: Claim,
    /// A record of another incarnation was there when ours was put.
    found_another: bool,
}

/// What is known of our record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// It never stood in etcd, as far as is known; `since` is when a put was last tried.
    Unproven { since: Option<Instant> },
    /// It stood in etcd; it was first put at `since`, after there was none or another's.
    Stood {
        since: Instant,
        /// The store shows it from this revision on.
        revision: Revision,
    },
}

impl Default for AliveLane {
    fn default() -> Self {
        Self {
            flight: Flight::new(Duration::from_millis(100), Duration::from_secs(5)),
            lease: None,
            claim: Claim::Unproven { since: None },
            found_another: false,
        }
    }
}

impl AliveLane {
    /// The next call.
    ///
    /// # Errors
    /// When this daemon is the second with its identity; the reason.
    pub(super) fn act(&mut self, context: &mut Context<'_>) -> Result<(), String> {
        let key = Key::Alive(context.identity.id.clone()).to_string();
        let found = context.store.get(&key);
        let ours =
            found.and_then(|kept| kept.alive()).is_some_and(|alive| alive.incarnation == context.identity.incarnation);
        match self.claim {
            Claim::Unproven { since } if ours => {
                let revision = context.store.revision();
                self.claim = Claim::Stood { since: since.unwrap_or(context.now), revision };
            }
            // The answer was quicker than the watch: the store does not show the put yet.
            Claim::Stood { revision, .. } if context.store.revision() < revision => return Ok(()),
            // It ran out, or was deleted: what comes now is a new claim.
            Claim::Stood { .. } if found.is_none() => {
                self.claim = Claim::Unproven { since: None };
                self.found_another = false;
            }
            Claim::Stood { since, .. }
                if !ours && self.found_another && context.now.saturating_duration_since(since) <= ALIVE_TTL =>
            {
                return Err(format!(
                    "another meshd runs with this node's identity {} and has put its `{key}` back: \
                     the state directory was copied",
                    context.identity.id
                ));
            }
            Claim::Stood { .. } | Claim::Unproven { .. } => {}
        }
        if !self.flight.is_free(context.now) {
            return Ok(());
        }
        let Some((lease, renew_at)) = self.lease else {
            self.flight.call = Some(context.call(Call::Grant { ttl: ALIVE_TTL }));
            return Ok(());
        };
        if !ours {
            if let Claim::Unproven { since } = &mut self.claim {
                *since = Some(context.now);
                self.found_another |= found.is_some();
            }
            let alive = Alive {
                boot_id: context.identity.boot_id.clone(),
                start_count: context.identity.start_count,
                incarnation: context.identity.incarnation,
            };
            let transaction = Transaction {
                compares: vec![
                    Compare::ModRevision { equals: context.store.mod_revision(&key), key: key.clone() },
                    Compare::CreateRevision { key: Key::Removed(context.identity.id.clone()).to_string(), equals: 0 },
                ],
                writes: vec![Write::Put { key, value: alive.to_json(), lease: Some(lease) }],
            };
            self.flight.call = Some(context.call(Call::Transact(transaction)));
        } else if renew_at <= context.now {
            self.flight.call = Some(context.call(Call::KeepAlive { lease }));
        }
        Ok(())
    }

    /// Whether the node's other records may be written: our `alive` stands, and had time to be contradicted.
    pub(super) fn may_write(&self, now: Instant) -> bool {
        match self.claim {
            Claim::Stood { since, .. } => !self.found_another || now.saturating_duration_since(since) >= GRACE,
            Claim::Unproven { .. } => false,
        }
    }

    /// After a time without etcd in which the record must have run out, the next put is a new claim.
    pub(super) const fn forget(&mut self) {
        self.lease = None;
        self.found_another = false;
        self.claim = Claim::Unproven { since: None };
    }

    pub(super) fn answered(&mut self, now: Instant, call: CallId, answer: &Answer, rng: &mut StdRng) -> bool {
        if !self.flight.landed(call) {
            return false;
        }
        match answer {
            Answer::Granted(Ok(granted)) | Answer::KeptAlive(Ok(granted)) => {
                self.lease = Some((granted.lease, now + granted.ttl / 3));
                self.flight.succeeded();
            }
            Answer::Committed(Ok(committed)) => {
                if committed.succeeded {
                    let since = match self.claim {
                        Claim::Unproven { since } => since.unwrap_or(now),
                        Claim::Stood { since, .. } => since,
                    };
                    self.claim = Claim::Stood { since, revision: committed.revision };
                    self.flight.backoff.reset();
                    self.flight.refusal = None;
                }
                // The store shows the outcome in a moment; without the wait the put would be made again until then.
                self.flight.wait(now, rng);
            }
            Answer::Granted(Err(error)) | Answer::KeptAlive(Err(error)) | Answer::Committed(Err(error)) => {
                if *error == CallError::LeaseNotFound {
                    // It ran out: what stood is gone, and whoever came meanwhile was here first.
                    self.forget();
                    self.flight.wait(now, rng);
                } else {
                    self.flight.failed(now, error, rng);
                }
            }
        }
        true
    }

    pub(super) fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let grace = match self.claim {
            Claim::Stood { since, .. } if self.found_another => Some(since + GRACE),
            _ => None,
        };
        let call =
            if self.flight.call.is_some() { None } else { self.lease.map(|(_, at)| at).max(self.flight.not_before) };
        // A put that waits for its turn is due before the renewal.
        let put = self.flight.next_deadline();
        [grace, call, put].into_iter().flatten().filter(|at| *at > now).min()
    }

    pub(super) fn refusal(&self) -> Option<&str> {
        self.flight.refusal.as_deref()
    }
}
