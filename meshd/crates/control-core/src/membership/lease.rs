//! The etcd lease of this node's keys: resumed from them after a restart, else granted; kept alive.

use std::time::{Duration, Instant};

use etcd_schema::{Key, SubnetKey, SubnetLease};
use mesh::records::LeaseId;
use rand::rngs::StdRng;

use super::{Call, CallAnswer, CallId, Context, Flight};
use crate::types::{CallError, EtcdFailure};

/// Bounds of the time between two keepalives.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct LeaseLane {
    flight: Flight,
    held: Option<LeaseId>,
    /// When the held lease is renewed next.
    renew_at: Option<Instant>,
    /// The last lease that ran out: our keys may seem to hang on it until the watch brings their end.
    gone: Option<LeaseId>,
}

impl Default for LeaseLane {
    fn default() -> Self {
        Self {
            flight: Flight::new(Duration::from_millis(200), Duration::from_secs(10)),
            held: None,
            renew_at: None,
            gone: None,
        }
    }
}

impl LeaseLane {
    pub(super) fn act(&mut self, context: &mut Context<'_>, subnet: Option<SubnetKey>) {
        if let Some(found) = lease_of_own_keys(context, subnet)
            && self.held != Some(found)
            && self.gone != Some(found)
            && self.flight.call.is_none()
        {
            self.held = Some(found);
            self.renew_at = Some(context.now);
        }
        if !self.flight.is_free(context.now) {
            return;
        }
        match (self.held, self.renew_at) {
            (Some(lease), Some(at)) if at <= context.now => {
                self.flight.call = Some(context.call(Call::KeepAlive { lease }));
            }
            (Some(_), _) => {}
            (None, _) => {
                if let Some(config) = &context.store.records().config {
                    self.flight.call = Some(context.call(Call::Grant { ttl: config.value.lease_ttl }));
                }
            }
        }
    }

    /// The lease to put keys under.
    pub(super) const fn held(&self) -> Option<LeaseId> {
        self.held
    }

    /// etcd no longer knows this lease.
    pub(super) fn gone_if(&mut self, lease: Option<LeaseId>) {
        if lease.is_some() && self.held == lease {
            self.gone = self.held.take();
            self.renew_at = None;
        }
    }

    pub(super) fn answered(&mut self, now: Instant, call: CallId, answer: &CallAnswer, rng: &mut StdRng) -> bool {
        if !self.flight.landed(call) {
            return false;
        }
        match answer {
            CallAnswer::Granted(Ok(granted)) | CallAnswer::KeptAlive(Ok(granted)) => {
                self.held = Some(granted.lease);
                self.renew_at = Some(now + (granted.ttl / 3).clamp(SHORTEST, LONGEST));
                self.flight.succeeded();
            }
            CallAnswer::KeptAlive(Err(CallError::LeaseNotFound)) => {
                self.gone = self.held.take();
                self.renew_at = None;
                self.flight.succeeded();
            }
            CallAnswer::Granted(Err(error)) | CallAnswer::KeptAlive(Err(error)) | CallAnswer::Committed(Err(error)) => {
                self.flight.failed(now, error, rng);
            }
            CallAnswer::Committed(Ok(_)) => {}
        }
        true
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        if self.flight.call.is_some() {
            return None;
        }
        self.renew_at.max(self.flight.not_before)
    }

    pub(super) fn refusal(&self) -> Option<&EtcdFailure> {
        self.flight.refusal.as_ref()
    }
}

/// The lease that our keys in etcd hang on: the subnet's, else that of `nodes/ID`.
fn lease_of_own_keys(context: &Context<'_>, subnet: Option<SubnetKey>) -> Option<LeaseId> {
    let id = &context.identity.id;
    let of_subnet = match subnet {
        Some(subnet) => context
            .store
            .get(&Key::Subnet(subnet).to_string())
            .filter(|kept| kept.get::<SubnetLease>().is_some_and(|lease| lease.node.as_ref() == Some(id)))
            .and_then(|kept| kept.lease),
        None => context
            .store
            .subnets()
            .filter(|(_, _, lease)| lease.node.as_ref() == Some(id))
            .find_map(|(_, kept, _)| kept.lease),
    };
    of_subnet.or_else(|| context.store.get(&Key::Node(id.clone()).to_string())?.lease)
}
