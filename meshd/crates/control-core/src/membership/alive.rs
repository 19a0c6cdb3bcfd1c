//! `alive/ID`: the liveness record of a daemon; detects a second daemon with the same identity.
//!
//! A daemon overwrites any other record: after a kill -9 that of its predecessor, later any foreign one. A single
//! foreign write proves nothing. If an incarnation writes again within [`ALIVE_TTL`] of being overwritten, it belongs
//! to a running daemon: one of the two is a clone. Both compare the two records ([`Alive::started_before`]) with the
//! same result. The one that started earlier restores its record. The other *yields*: it makes no call until etcd holds
//! no record of another daemon.
//!
//! Boot ids are not compared, because those of containers and of restored snapshots are equal.

use std::time::{Duration, Instant};

use etcd_schema::{Alive, Key, NodeId};
use mesh::{
    problem::{Problem, ProblemCode},
    records::{LeaseId, Revision},
};
use rand::rngs::StdRng;

use super::{ALIVE_TTL, Call, CallAnswer, CallId, Context, Flight};
use crate::{
    store::StoredKey,
    types::{CallError, Compare, EtcdFailure, Transaction, Write},
};

/// How long a newcomer that found a record leaves the other keys alone: time for a live owner to answer.
const GRACE: Duration = Duration::from_secs(1);
/// Most foreign incarnations tracked at one time.
const MAX_FOREIGN: usize = 8;

#[derive(Debug)]
pub(super) struct AliveLane {
    flight: Flight,
    lease: Option<(LeaseId, Instant)>,
    claim: Claim,
    /// A record of another incarnation was there when ours was put.
    found_another: bool,
    /// etcd's revision when this process first read it; lower once etcd itself went back.
    start_revision: Option<Revision>,
    /// Other incarnations whose records were seen within [`ALIVE_TTL`], the latest last.
    foreign: Vec<ForeignAlive>,
    yielded: Option<Yielded>,
}

/// Knowledge of our record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Not known to have been in etcd; `since` is the time of the last put.
    Unproven { since: Option<Instant> },
    /// In etcd since `since`, when it was put over none or another's.
    Stood {
        since: Instant,
        /// The store shows it from this revision on.
        revision: Revision,
    },
}

/// A record of another incarnation, which ours replaced or is about to replace.
#[derive(Debug)]
struct ForeignAlive {
    /// `None`: a value that cannot be read.
    alive: Option<Alive>,
    mod_revision: Revision,
    seen: Instant,
    /// It replaced our record. Otherwise it is older, most likely a predecessor's.
    replaced_ours: bool,
    /// Its process wrote again after it had been overwritten.
    runs: bool,
}

/// This daemon left the identity to another one.
#[derive(Debug)]
struct Yielded {
    /// For the operator.
    reason: String,
    /// A record without a lease, which no daemon writes, since when it has been unchanged.
    without_lease: Option<(Revision, Instant)>,
    /// etcd was replaced, or went back: until then the other daemon has time to put its record there.
    absent_until: Option<Instant>,
}

impl Default for AliveLane {
    fn default() -> Self {
        Self {
            flight: Flight::new(Duration::from_millis(100), Duration::from_secs(5)),
            lease: None,
            claim: Claim::Unproven { since: None },
            found_another: false,
            start_revision: None,
            foreign: Vec::new(),
            yielded: None,
        }
    }
}

impl AliveLane {
    /// Makes the next call. While [`yielded`](Self::yielded), none is made, and the other lanes must make none either.
    pub(super) fn act(&mut self, context: &mut Context<'_>) {
        let revision = context.store.revision();
        let start = self.start_revision.map_or(revision, |start| start.min(revision));
        self.start_revision = Some(start);
        let own = Alive {
            boot_id: context.identity.boot_id.clone(),
            start_count: context.identity.start_count,
            start_revision: u64::try_from(start).ok(),
            incarnation: context.identity.incarnation,
            reads: vec![Alive::KUBERNETES.to_owned()],
            readiness: context.facts.readiness.clone(),
        };
        let key = Key::Alive(context.identity.id.clone()).to_string();
        let found = context.store.get(&key);
        let ours = found.and_then(StoredKey::alive).is_some_and(|alive| alive.incarnation == own.incarnation);
        self.foreign.retain(|foreign| context.now.saturating_duration_since(foreign.seen) < ALIVE_TTL);
        match self.claim {
            Claim::Unproven { since } if ours => {
                self.claim = Claim::Stood { since: since.unwrap_or(context.now), revision };
            }
            // The answer was quicker than the watch: the store does not show the put yet.
            Claim::Stood { revision: put_at, .. } if revision < put_at => return,
            // It expired or was deleted: the next put is a new claim.
            Claim::Stood { .. } if found.is_none() => self.claim_anew(),
            Claim::Stood { .. } | Claim::Unproven { .. } => {}
        }
        if self.still_yields(context.now, found) {
            return;
        }
        if let Some(other) = found.filter(|_| !ours) {
            self.meet(context.now, &key, &own, other, context.identity.predecessor);
            if self.yielded.is_some() {
                return;
            }
        }
        if !self.flight.is_free(context.now) {
            return;
        }
        let Some((lease, renew_at)) = self.lease else {
            self.flight.call = Some(context.call(Call::Grant { ttl: ALIVE_TTL }));
            return;
        };
        // Our value without our lease, as a restore by hand leaves it, would outlive this daemon.
        let stale = found.is_some_and(|kept| {
            let written = kept.alive().map(|alive| (&alive.reads, &alive.readiness));
            kept.lease != Some(lease) || written != Some((&own.reads, &own.readiness))
        });
        if ours && renew_at <= context.now {
            // First: an etcd that refuses puts takes this, and the record must not expire meanwhile.
            self.flight.call = Some(context.call(Call::KeepAlive { lease }));
        } else if !ours || stale {
            if let Claim::Unproven { since } = &mut self.claim {
                *since = Some(context.now);
                let predecessor = found.and_then(StoredKey::alive).map(|alive| alive.incarnation);
                self.found_another |=
                    found.is_some() && (predecessor.is_none() || predecessor != context.identity.predecessor);
            }
            let transaction = Transaction {
                compares: vec![
                    Compare::ModRevision { equals: context.store.mod_revision(&key), key: key.clone() },
                    Compare::CreateRevision { key: Key::Removed(context.identity.id.clone()).to_string(), equals: 0 },
                ],
                writes: vec![Write::Put { key, value: own.to_json(), lease: Some(lease) }],
            };
            self.flight.call = Some(context.call(Call::Transact(transaction)));
        }
    }

    /// Whether this daemon goes on leaving the identity to another one: until etcd holds no record of one. An etcd
    /// that is not the one before proves that only after [`ALIVE_TTL`]. A record without a lease never goes by itself,
    /// but only somebody's hand writes one: after [`ALIVE_TTL`] it is put to the proof again.
    fn still_yields(&mut self, now: Instant, found: Option<&StoredKey>) -> bool {
        let Some(yielded) = &mut self.yielded else { return false };
        let over = match found {
            None => yielded.absent_until.is_none_or(|until| until <= now),
            Some(kept) if kept.lease.is_some() => {
                yielded.without_lease = None;
                false
            }
            Some(kept) => {
                let same = yielded.without_lease.filter(|(revision, _)| *revision == kept.mod_revision);
                let since = same.map_or(now, |(_, since)| since);
                yielded.without_lease = Some((kept.mod_revision, since));
                now.saturating_duration_since(since) >= ALIVE_TTL
            }
        };
        if over {
            self.yielded = None;
            self.foreign.clear();
            self.claim_anew();
        }
        !over
    }

    /// Takes in that etcd holds a record of another incarnation; yields if its process runs and is the older one.
    fn meet(&mut self, now: Instant, key: &str, own: &Alive, found: &StoredKey, predecessor: Option<u64>) {
        let other = found.alive();
        let replaced_ours = matches!(self.claim, Claim::Stood { .. });
        let mod_revision = found.mod_revision;
        let incarnation = |alive: &Alive| alive.incarnation;
        let same = |known: &&mut ForeignAlive| known.alive.as_ref().map(incarnation) == other.map(incarnation);
        match self.foreign.iter_mut().find(same) {
            Some(known) if known.mod_revision != mod_revision => {
                known.mod_revision = mod_revision;
                known.seen = now;
                known.replaced_ours |= replaced_ours;
                // A write of the process that ran here before may arrive after its end; against ours it writes no more.
                let late = !known.replaced_ours && other.map(incarnation) == predecessor && predecessor.is_some();
                known.runs = other.is_some() && !late;
                if let Some(other) = other.filter(|other| !late && other.started_before(own)) {
                    let reason = format!(
                        "another meshd runs with this node's identity (boot {}, start {}); it started earlier and \
                         restored its `{key}`",
                        other.boot_id, other.start_count
                    );
                    self.yielded = Some(Yielded { reason, without_lease: None, absent_until: None });
                }
            }
            // It is about to be overwritten.
            Some(_) => {}
            None => {
                if self.foreign.len() == MAX_FOREIGN {
                    self.foreign.remove(0);
                }
                self.foreign.push(ForeignAlive {
                    alive: other.cloned(),
                    mod_revision,
                    seen: now,
                    replaced_ours,
                    runs: false,
                });
            }
        }
    }

    /// Why this daemon leaves the identity to another one, if it does.
    pub(super) fn yielded(&self) -> Option<&str> {
        self.yielded.as_ref().map(|yielded| yielded.reason.as_str())
    }

    /// Problems: other recent writers of this node's record.
    pub(super) fn problems(&self, id: &NodeId) -> impl Iterator<Item = Problem> {
        let key = Key::Alive(id.clone()).to_string();
        self.foreign.iter().filter(|foreign| foreign.replaced_ours && self.yielded.is_none()).map(move |foreign| {
            let (cause, remedy) = match &foreign.alive {
                Some(other) if foreign.runs => (
                    format!(
                        "another meshd runs with this node's identity (boot {}, start {}); it started later, and this \
                         node restored its `{key}`",
                        other.boot_id, other.start_count
                    ),
                    "stop meshd on the copy, delete its state directory, and start it again to let it join as a new node",
                ),
                Some(other) => (
                    format!(
                        "`{key}` was overwritten (boot {}, start {}); this node restored its record",
                        other.boot_id, other.start_count
                    ),
                    "find the other writer of this key: only this node may write it; if this machine was cloned with \
                     its state directory, delete that directory on the clone",
                ),
                None => (
                    format!("`{key}` was overwritten with an unreadable value; this node restored its record"),
                    "find the other writer of this key: only this node may write it",
                ),
            };
            Problem {
                code: ProblemCode::AliveOverwritten,
                key: Some(key.clone()),
                cause,
                remedy: remedy.to_owned(),
            }
        })
    }

    /// Whether the node's other records may be written: our `alive` is in etcd, and had time to be contradicted.
    pub(super) fn may_write(&self, now: Instant) -> bool {
        match self.claim {
            Claim::Stood { since, .. } => !self.found_another || now.saturating_duration_since(since) >= GRACE,
            Claim::Unproven { .. } => false,
        }
    }

    /// After a time without etcd in which the record must have expired, the next put is a new claim.
    pub(super) const fn forget(&mut self) {
        self.lease = None;
        self.claim_anew();
    }

    /// etcd is not the one that the record was put into; nothing is known of who else wrote it there.
    pub(super) fn lineage_changed(&mut self, now: Instant) {
        self.forget();
        self.flight.abandon();
        self.foreign.clear();
        if let Some(yielded) = &mut self.yielded {
            yielded.without_lease = None;
            yielded.absent_until = Some(now + ALIVE_TTL);
        }
    }

    /// A list of a new session is in, up to `revision`. etcd may have lost its last writes, those that it had answered
    /// too: a put that the list does not reach up to is to be shown again, or made again.
    pub(super) const fn listed(&mut self, revision: Revision) {
        if let Claim::Stood { since, revision: put_at } = self.claim
            && put_at > revision
        {
            self.claim = Claim::Unproven { since: Some(since) };
        }
    }

    const fn claim_anew(&mut self) {
        self.found_another = false;
        self.claim = Claim::Unproven { since: None };
    }

    pub(super) fn answered(&mut self, now: Instant, call: CallId, answer: &CallAnswer, rng: &mut StdRng) -> bool {
        if !self.flight.landed(call) {
            return false;
        }
        match answer {
            CallAnswer::Granted(Ok(granted)) | CallAnswer::KeptAlive(Ok(granted)) => {
                self.lease = Some((granted.lease, now + granted.ttl / 3));
                self.flight.succeeded();
            }
            CallAnswer::Committed(Ok(committed)) => {
                if committed.succeeded {
                    let since = match self.claim {
                        Claim::Unproven { since } => since.unwrap_or(now),
                        Claim::Stood { since, .. } => since,
                    };
                    self.claim = Claim::Stood { since, revision: committed.revision };
                    self.flight.refusal = None;
                    // Two that overwrite each other, because one of them is an old daemon, do so ever more slowly.
                    if !self.foreign.iter().any(|foreign| foreign.replaced_ours) {
                        self.flight.backoff.reset();
                    }
                }
                // The store shows the outcome in a moment; without the wait the put would be made again until then.
                self.flight.wait(now, rng);
            }
            CallAnswer::Granted(Err(error)) | CallAnswer::KeptAlive(Err(error)) | CallAnswer::Committed(Err(error)) => {
                if *error == CallError::LeaseNotFound {
                    // It expired: our record is gone, and a daemon that came meanwhile was here first.
                    self.forget();
                    self.flight.wait(now, rng);
                } else {
                    self.flight.failed(now, error, rng);
                }
            }
        }
        true
    }

    /// `stepped`: when [`act`](Self::act) last had its turn.
    pub(super) fn next_deadline(&self, stepped: Instant) -> Option<Instant> {
        if let Some(yielded) = &self.yielded {
            let tried_again = yielded.without_lease.map(|(_, since)| since + ALIVE_TTL);
            return [tried_again, yielded.absent_until].into_iter().flatten().filter(|at| *at > stepped).min();
        }
        let grace = match self.claim {
            Claim::Stood { since, .. } if self.found_another => Some(since + GRACE),
            _ => None,
        };
        let call =
            if self.flight.call.is_some() { None } else { self.lease.map(|(_, at)| at).max(self.flight.not_before) };
        // A put that waits for its turn is due before the renewal.
        let put = self.flight.next_deadline();
        let forgotten = self.foreign.iter().map(|foreign| foreign.seen + ALIVE_TTL).min();
        [grace, call, put, forgotten].into_iter().flatten().filter(|at| *at > stepped).min()
    }

    pub(super) fn refusal(&self) -> Option<&EtcdFailure> {
        self.flight.refusal.as_ref()
    }
}
