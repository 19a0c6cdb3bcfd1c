//! The control plane of one node as a state machine: inputs from etcd and this node → effects.
//!
//! [`ControlCore::step`] joins the parts of this crate. After each input, in this order: records in force are
//! published, this node's own records are brought up to date by [`Membership`] and [`Endpoints`], status is shown, the
//! cache is written when it is time to, and what policies are made of is handed on.

mod interface;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_schema::Key;
use mesh::{
    problem::{Problem, ProblemCode},
    records::{Records, Revision},
};
use tracing::{debug, error, info, warn};

pub use self::interface::{CacheContent, CacheInfo, ControlStatus, Effect, Input, SessionNumber, Start};
use super::{
    cache_schedule::CacheSchedule,
    endpoints::Endpoints,
    look_back::HistorySearch,
    membership::{self, CallAnswer, Membership, MembershipState},
    store::Store,
    types::{CallError, EtcdFailure, KeyListing},
    unreachable::{self, LOST_CHANGES_SHOWN},
};

/// The control plane of one node.
pub struct ControlCore {
    store: Store,
    membership: Membership,
    endpoints: Endpoints,
    look_back: HistorySearch,
    cache: CacheSchedule,
    hands_on: bool,
    cache_usable: bool,
    /// The session in use, with its member.
    session: Option<(SessionNumber, String)>,
    /// Whether the membership knows of the session: it learns of it once the list is in.
    announced: bool,
    /// The same as a problem, until everything is known again.
    unreachable: Option<Problem>,
    /// When an audit last found differences.
    lost_changes: Option<Instant>,
    /// Since when the log calls etcd unreachable.
    away_since: Option<Instant>,
    /// The revision of the last complete set that was handed on.
    handed_on: Option<Revision>,
    /// A Kubernetes object was seen.
    kubernetes: bool,
    /// Whether RUN names this process as holder of the identity; `None`: it names an earlier one.
    noted: Option<bool>,
    /// The member in use, or used last.
    endpoint: Option<String>,
    /// Why there is no connection.
    error: Option<String>,
    known_until: Option<Instant>,
    records: Arc<Records>,
    /// As it was shown last.
    status: ControlStatus,
    stepped: Instant,
}

impl ControlCore {
    /// The control plane as it starts; [`Input::Started`] is its first input.
    #[must_use]
    pub fn new(now: Instant, start: Start) -> Self {
        let Start { store, membership, cache_usable, hands_on } = start;
        let status = ControlStatus {
            connected: false,
            endpoint: None,
            error: None,
            revision: store.revision(),
            known_until: None,
            state: membership.state().clone(),
            subnet: membership.subnet(),
            holds_identity: false,
            problems: Vec::new(),
            no_kubernetes_objects: false,
            copies: BTreeMap::new(),
            lists: 0,
            audit_differences: 0,
        };
        Self {
            endpoints: Endpoints::new(membership.id()),
            look_back: HistorySearch::default(),
            cache: CacheSchedule::new(now),
            hands_on,
            cache_usable,
            session: None,
            announced: true,
            unreachable: None,
            lost_changes: None,
            away_since: None,
            handed_on: None,
            kubernetes: false,
            noted: None,
            endpoint: None,
            error: None,
            known_until: None,
            records: store.records(),
            status,
            stepped: now,
            store,
            membership,
        }
    }

    /// Records in force.
    #[must_use]
    pub fn records(&self) -> Arc<Records> {
        Arc::clone(&self.records)
    }

    /// The last published status.
    #[must_use]
    pub const fn status(&self) -> &ControlStatus {
        &self.status
    }

    /// The cache for the next start.
    #[must_use]
    pub fn cache(&self) -> CacheContent {
        CacheContent {
            revision: self.store.revision(),
            lease_ttl: self.lease_ttl(),
            subnet: self.membership.subnet(),
            entries: self.store.cached().collect(),
            evidence: self.store.evidence(),
        }
    }

    /// Whether the cache on disk lacks something.
    #[must_use]
    pub const fn is_unsaved(&self) -> bool {
        self.cache.is_unsaved()
    }

    /// When [`step`](Self::step) wants to be called at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [
            self.store.next_deadline(),
            self.membership.next_deadline(),
            self.cache.next_deadline(),
            self.endpoints.next_deadline().filter(|_| self.may_write_endpoints(self.stepped)),
            self.look_back.next_deadline().filter(|_| self.looks_back()),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Processes an input and returns the effects, in order.
    pub fn step(&mut self, now: Instant, input: Input) -> Vec<Effect> {
        self.stepped = now;
        let mut out = Vec::new();
        if !matches!(input, Input::Started) {
            self.dispatch(now, input, &mut out);
            self.report(now, &mut out);
            self.write_endpoints(now, &mut out);
            if self.cache.begin(now, self.store.lists() > 0, self.is_connected(), self.lease_ttl()) {
                out.push(Effect::WriteCache);
            }
        }
        self.hand_on(&mut out);
        if self.looks_back()
            && let Some((key, at)) = self.look_back.next(now, &mut self.store)
        {
            out.push(Effect::LookBack { key, at });
        }
        out
    }

    fn dispatch(&mut self, now: Instant, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Started => {}
            Input::Connected { member, session } => {
                self.endpoint = Some(member.clone());
                self.error = None;
                self.session = Some((session, member));
                self.announced = false;
            }
            Input::Disconnected { member, error } => self.disconnected(now, &member, &error, out),
            Input::Listed(listing) => self.on_list(now, listing, out),
            Input::Changed(events) => {
                let records = self.store.changed(now, events);
                self.publish(records, out);
                self.step_membership(now, membership::Input::Store, out);
            }
            Input::Audited { listing, deleted_since } => self.audited(now, listing, &deleted_since, out),
            Input::Answer(call, answer, session) => {
                suspect(failure(&answer), session, out);
                self.step_membership(now, membership::Input::Answer(call, answer), out);
            }
            Input::EndpointsWritten(answer, session) => {
                suspect(answer.as_ref().err(), session, out);
                self.endpoints.answered(now, &self.store, &answer);
            }
            Input::Earlier(answer) => {
                let records = self.look_back.answered(now, &mut self.store, answer);
                self.publish(records, out);
            }
            Input::Facts(facts) => self.step_membership(now, membership::Input::Facts(facts), out),
            Input::Attached(attached) => self.step_membership(now, membership::Input::Attached(attached), out),
            Input::Idle(idle) => self.step_membership(now, membership::Input::Idle(idle), out),
            Input::EndpointsWanted(wanted) => self.endpoints.want(wanted),
            Input::Accept => self.accept(now, out),
            Input::CacheWritten(took) => self.cache.written(took),
            Input::Tick => {
                let records = self.store.tick(now);
                self.publish(records, out);
                self.step_membership(now, membership::Input::Tick, out);
            }
        }
    }

    fn disconnected(&mut self, now: Instant, member: &str, error: &EtcdFailure, out: &mut Vec<Effect>) {
        if self.session.take().is_some() {
            self.known_until = Some(now);
        }
        if self.away_since.is_none() {
            self.away_since = Some(now);
            warn!(endpoint = member, %error, "etcd unreachable");
        }
        self.announced = true;
        self.error = Some(format!("{member}: {error}"));
        self.unreachable = Some(unreachable::etcd_unreachable(member, error));
        self.step_membership(now, membership::Input::Disconnected, out);
    }

    fn on_list(&mut self, now: Instant, listing: KeyListing, out: &mut Vec<Effect>) {
        let revision = listing.revision;
        let records = self.store.on_list(now, listing);
        self.publish(records, out);
        if let (Some(since), Some((_, member))) = (self.away_since.take(), &self.session) {
            let away = Duration::from_secs(now.saturating_duration_since(since).as_secs());
            let after = humantime::format_duration(away);
            info!(endpoint = member, revision, %after, "etcd reachable");
        }
        self.list_again(out);
        // Which etcd it was that was listed must outlive a restart, also when no record differs.
        self.cache.changed();
        if !self.announced {
            self.announced = true;
            self.known_until = None;
            self.unreachable = None;
            self.step_membership(now, membership::Input::Connected, out);
        }
        self.step_membership(now, membership::Input::Store, out);
    }

    fn audited(&mut self, now: Instant, listing: KeyListing, deleted_since: &BTreeSet<String>, out: &mut Vec<Effect>) {
        let revision = listing.revision;
        let (records, lost) = self.store.audited(now, listing, deleted_since);
        if lost.is_empty() {
            debug!(revision, "audit: no change missed");
        } else {
            self.lost_changes = Some(now);
            error!(
                revision,
                keys = lost.iter().take(20).map(|key| &**key).collect::<Vec<&str>>().join(", "),
                count = lost.len(),
                "audit: watch missed changes; applied from the list"
            );
        }
        self.publish(records, out);
        self.list_again(out);
        self.step_membership(now, membership::Input::Store, out);
    }

    /// Requests the list that confirms the last one's missing keys.
    fn list_again(&self, out: &mut Vec<Effect>) {
        if self.store.awaits_list() {
            out.push(Effect::ListAgain);
        }
    }

    fn accept(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let (accepted, records) = self.store.accept();
        info!(withdrawn = accepted.withdrawn, changed = accepted.changed, "operator accepted the content of etcd");
        self.publish(records, out);
        self.cache.changed_now();
        self.step_membership(now, membership::Input::Store, out);
        out.push(Effect::Accepted(accepted));
    }

    /// Steps this node's own records.
    fn step_membership(&mut self, now: Instant, input: membership::Input, out: &mut Vec<Effect>) {
        let before = self.membership.state().clone();
        for effect in self.membership.step(now, input, &self.store) {
            match effect {
                membership::Effect::Call(id, call) => out.push(Effect::Call(id, call)),
                membership::Effect::Relist => {
                    out.extend(self.session.iter().map(|(number, _)| Effect::Suspect(*number)))
                }
            }
        }
        let after = self.membership.state();
        if before != *after {
            log_membership(after);
        }
    }

    fn publish(&mut self, records: Option<Arc<Records>>, out: &mut Vec<Effect>) {
        if let Some(records) = records {
            self.cache.changed();
            log_config_change(&self.records, &records);
            self.records = Arc::clone(&records);
            out.push(Effect::Publish(records));
        }
    }

    /// Whether there is a session and its list was read.
    const fn is_connected(&self) -> bool {
        self.session.is_some() && self.announced
    }

    const fn looks_back(&self) -> bool {
        self.hands_on && self.is_connected()
    }

    fn lease_ttl(&self) -> Option<Duration> {
        self.records.config.as_ref().map(|config| config.value.lease_ttl)
    }

    /// Whether this node has a place in the mesh whose `endpoints/` records are its own to write.
    fn may_write_endpoints(&self, now: Instant) -> bool {
        let joined = matches!(self.membership.state(), MembershipState::Joined { .. });
        // A copy of a node would withdraw the containers of the original.
        self.is_connected() && joined && self.membership.may_write(now)
    }

    /// Brings this node's `endpoints/` records up to date.
    fn write_endpoints(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.may_write_endpoints(now) {
            out.extend(self.endpoints.next(now, &self.store).map(Effect::WriteEndpoints));
        }
    }

    /// Hands on changed inputs of policies.
    fn hand_on(&mut self, out: &mut Vec<Effect>) {
        let changes = self.store.take_objects();
        if !changes.is_empty() {
            self.cache.changed();
        }
        let complete = self.store.lists() > 0 || self.cache_usable;
        let revision = self.store.revision();
        // A revision that changes nothing of it is handed on too: it is in force then.
        if self.hands_on && (!changes.is_empty() || (complete && self.handed_on != Some(revision))) {
            self.handed_on = complete.then_some(revision);
            out.push(Effect::HandOn { changes, revision, complete });
        }
    }

    /// The problems of this node itself.
    fn problems(&self, now: Instant) -> Vec<Problem> {
        let mut problems = self.membership.problems(self.store.prefix());
        // An unreadable or refused config is already a problem with its cause.
        let config = Some(Key::CONFIG);
        if self.records.problems.iter().any(|problem| problem.key.as_deref() == config) {
            problems.retain(|problem| problem.code != ProblemCode::NoConfig);
        }
        let mut refusals = self.membership.refusals();
        refusals.extend(self.endpoints.refusal());
        problems.extend(refusals.into_iter().map(|reason| unreachable::etcd_refuses(reason, self.membership.id())));
        problems.extend(self.unreachable.clone());
        if self.lost_changes.is_some_and(|at| now.saturating_duration_since(at) < LOST_CHANGES_SHOWN) {
            problems.push(unreachable::watch_lost_changes(self.store.audit_differences()));
        }
        problems
    }

    /// Tells the next start on this machine who held the identity last.
    fn note_identity(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let cloned = matches!(self.membership.state(), MembershipState::Cloned { .. });
        let holds = match cloned {
            true => Some(false),
            false => self.membership.may_write(now).then_some(true),
        };
        if holds.is_some() && self.noted != holds {
            self.noted = holds;
            out.extend(holds.map(Effect::NoteIdentity));
        }
    }

    fn report(&mut self, now: Instant, out: &mut Vec<Effect>) {
        self.note_identity(now, out);
        self.kubernetes |= self.store.has_kubernetes_objects();
        let status = ControlStatus {
            connected: self.is_connected(),
            endpoint: self.endpoint.clone(),
            error: self.error.clone(),
            revision: self.store.revision(),
            known_until: self.known_until,
            state: self.membership.state().clone(),
            subnet: self.membership.subnet(),
            holds_identity: self.membership.holds_identity(),
            problems: self.problems(now),
            no_kubernetes_objects: self.store.lists() > 0 && !self.kubernetes,
            copies: self.store.copies().clone(),
            lists: self.store.lists(),
            audit_differences: self.store.audit_differences(),
        };
        if status.subnet != self.status.subnet {
            self.cache.changed_now();
        }
        if status != self.status {
            self.status.clone_from(&status);
            out.push(Effect::Status(Box::new(status)));
        }
    }
}

/// A call without an answer may have happened: the session that it was made on is of no use.
fn suspect(error: Option<&CallError>, session: SessionNumber, out: &mut Vec<Effect>) {
    if let Some(error) = error {
        debug!(%error, session, "etcd call failed");
        if matches!(error, CallError::Indeterminate(_)) {
            out.push(Effect::Suspect(session));
        }
    }
}

fn failure(answer: &CallAnswer) -> Option<&CallError> {
    match answer {
        CallAnswer::Granted(result) | CallAnswer::KeptAlive(result) => result.as_ref().err(),
        CallAnswer::Committed(result) => result.as_ref().err(),
    }
}

fn log_membership(state: &MembershipState) {
    match state {
        MembershipState::Connecting => info!("waiting for etcd"),
        MembershipState::NoConfig => warn!("no valid config in etcd"),
        MembershipState::NoNetwork { cluster } => warn!(%cluster, "no network for this node's cluster"),
        MembershipState::AwaitingBlock { cluster } => info!(%cluster, "waiting for this node's podCIDRs"),
        MembershipState::Joining => info!("leasing a subnet"),
        MembershipState::Joined { subnet } => info!(%subnet, "subnet leased"),
        MembershipState::PoolExhausted { family, total } => warn!(%family, total, "no free subnet"),
        MembershipState::SubnetLost { subnet, reason } => error!(%subnet, reason, "subnet lost"),
        MembershipState::Removed => error!("node removed from the mesh"),
        MembershipState::Cloned { reason } => error!(reason, "identity in use by another daemon"),
    }
}

/// Logs what a new configuration changes at once, and what only with the nodes' next subnets.
fn log_config_change(before: &Records, after: &Records) {
    let (Some(old), Some(new)) = (&before.config, &after.config) else { return };
    if Arc::ptr_eq(&old.value, &new.value) {
        return;
    }
    if let Ok(change) = etcd_schema::config_change(&old.value, &new.value, &[]) {
        if !change.live.is_empty() {
            info!(fields = change.live.join(", "), "config changed");
        }
        if !change.with_next_subnet.is_empty() {
            warn!(
                fields = change.with_next_subnet.join(", "),
                "config changed in fields that take effect with a \
                 node's next subnet; to renew a node's subnet: drain \
                 it, stop meshd, delete its key below `subnets/`, \
                 start meshd"
            );
        }
    }
}

#[cfg(test)]
mod tests;
