//! This node's own records in etcd: identity, lease, subnet; a state machine without I/O or clock.
//!
//! [`Membership::step`] takes events and the current store, and returns the calls to make. It is level-triggered: each
//! step compares desired and actual records in etcd, and requests at most one call per lane. Three lanes run in
//! parallel:
//!
//! ```text
//! alive    grant 30 s ─▶ put alive/ID ─▶ keep alive; replaced: put back, or yield to an older clone
//! lease    taken up from our own keys, else granted with LeaseTTL ─▶ keep alive every TTL/3
//! records  subnets/… and nodes/ID: choose, allocate, put back, rewrite, each by one transaction with compares
//! ```
//!
//! Invariant: a key under `subnets/` is written only in a transaction that compares one of two things: that the key is
//! absent, or was given up, and nothing under `subnets/` changed since the revision of the choice; or that this very
//! key, which is ours, did not change. So a subnet never has two owners. A call without a response can be repeated once
//! the store has been listed again: of two such transactions, at most one takes effect.
//!
//! If etcd was replaced or restored, the lanes drop all earlier revisions, leases and calls.

mod alive;
mod lease;
mod problems;
mod records;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use etcd_schema::{Cluster, Key, NodeId, NodeName, PublicKey, Readiness, SiteName, SubnetKey, Vtep};
use ipnet::IpNet;
use mesh::records::LeaseId;
use rand::{SeedableRng as _, rngs::StdRng};

use self::{alive::AliveLane, lease::LeaseLane, records::RecordsLane};
use super::{
    allocator::PoolFamily,
    store::Store,
    types::{CallError, Committed, EtcdFailure, Granted, Transaction},
};

/// Time to live of `alive/ID`.
pub(crate) const ALIVE_TTL: Duration = Duration::from_secs(30);
/// How long a start waits for etcd to confirm that no other daemon has its identity.
const UNCONFIRMED: Duration = Duration::from_secs(5);
/// The same where a process before it ran here: only etcd could tell that the identity went elsewhere since.
const RESUMED: Duration = Duration::from_millis(400);

/// The identity of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The node's stable identity.
    pub id: NodeId,
    /// The kernel's boot id.
    pub boot_id: String,
    /// How often the state directory was started.
    pub start_count: u64,
    /// Random, one per process.
    pub incarnation: u64,
    /// The incarnation of the process that held the identity here before this one, and has ended; `None`: not known.
    pub predecessor: Option<u64>,
}

/// The facts that this node publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFacts {
    /// Its name, unique in the mesh.
    pub name: NodeName,
    /// Its site.
    pub site: Option<SiteName>,
    /// The cluster whose networks it draws its subnet from.
    pub cluster: Cluster,
    /// The WireGuard key in use.
    pub public_key: PublicKey,
    /// The key that follows it.
    pub next_public_key: Option<PublicKey>,
    /// UDP port of the tunnel.
    pub listen_port: u16,
    /// Where the tunnel may be reached, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Addresses of the underlay interface.
    pub addresses: Vec<IpNet>,
    /// The node's IPv4 address as flannel's readers use it.
    pub public_ipv4: Option<Ipv4Addr>,
    /// The node's IPv6 address as flannel's readers use it.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Its ends of VXLAN tunnels.
    pub vteps: Vec<Vtep>,
    /// Version of the daemon.
    pub version: String,
    /// Whether its pods are connected and protected; `None`: it does not know yet.
    pub readiness: Option<Readiness>,
}

/// The state of this node in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipState {
    /// Nothing was read from etcd yet.
    Connecting,
    /// There is no valid `config`; heals by itself.
    NoConfig,
    /// `config` has no network of this node's cluster; heals by itself.
    NoNetwork {
        /// The cluster.
        cluster: Cluster,
    },
    /// `"Allocate": "kubernetes"`, and no block is reserved for this node yet; heals by itself.
    AwaitingBlock {
        /// The cluster.
        cluster: Cluster,
    },
    /// A subnet is being taken.
    Joining,
    /// The subnet is this node's.
    Joined {
        /// The subnet.
        subnet: SubnetKey,
    },
    /// No subnet is free; heals by itself.
    PoolExhausted {
        /// The family that has none left.
        family: PoolFamily,
        /// How many its pool has.
        total: u128,
    },
    /// The subnet that this node used is another's now, or outside of the configuration: its routes must go. A new
    /// one is drawn once nothing is attached.
    SubnetLost {
        /// The lost subnet.
        subnet: SubnetKey,
        /// Why.
        reason: String,
    },
    /// An operator removed this node from the mesh.
    Removed,
    /// Another daemon runs with this identity and started earlier: this one must forward nothing. Ends once etcd holds
    /// no record of another daemon.
    Cloned {
        /// For the operator.
        reason: String,
    },
}

/// An input of the lanes.
#[derive(Debug, Clone)]
pub enum Input {
    /// A session with etcd is open, and its list is in the store.
    Connected,
    /// The session is gone.
    Disconnected,
    /// The store took something in.
    Store,
    /// This node changed.
    Facts(Box<LocalFacts>),
    /// Whether anything (a pod) has an address of this node's subnet.
    Attached(bool),
    /// Earlier subnets of this node, without an attached address.
    Idle(BTreeSet<SubnetKey>),
    /// Time passed.
    Tick,
    /// A call is over; each call gets exactly one answer.
    Answer(CallId, CallAnswer),
}

/// Tells answers apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(u64);

/// The outcome of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallAnswer {
    /// Of [`Call::Grant`].
    Granted(Result<Granted, CallError>),
    /// Of [`Call::KeepAlive`].
    KeptAlive(Result<Granted, CallError>),
    /// Of [`Call::Transact`].
    Committed(Result<Committed, CallError>),
}

/// A call to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make this call and answer with the id.
    Call(CallId, Call),
    /// List again: the outcome of a transaction is unknown.
    Relist,
}

/// A call to etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// A new lease.
    Grant {
        /// For how long.
        ttl: Duration,
    },
    /// Renewal of a lease.
    KeepAlive {
        /// Which.
        lease: LeaseId,
    },
    /// A transaction.
    Transact(Transaction),
}

/// This node's membership.
#[derive(Debug)]
pub struct Membership {
    identity: Identity,
    facts: LocalFacts,
    /// The violation in the facts, which then are not written.
    bad_facts: Option<String>,
    attached: bool,
    idle: BTreeSet<SubnetKey>,
    connected: bool,
    disconnected_at: Option<Instant>,
    holds_identity: bool,
    started: Instant,
    /// The time of the last step: earlier deadlines are done.
    stepped: Instant,
    /// When the identity is this daemon's although etcd has not confirmed it; `None`: never, for another one had it.
    presumed_at: Option<Instant>,
    /// The etcd history that the lanes go by, see [`Store::lineage_changes`].
    lineage: u64,
    next_call: u64,
    rng: StdRng,
    alive: AliveLane,
    lease: LeaseLane,
    records: RecordsLane,
    state: MembershipState,
}

/// Shared context of the lanes for one step.
struct Context<'a> {
    now: Instant,
    store: &'a Store,
    identity: &'a Identity,
    facts: &'a LocalFacts,
    attached: bool,
    idle: &'a BTreeSet<SubnetKey>,
    rng: &'a mut StdRng,
    next_call: &'a mut u64,
    effects: Vec<Effect>,
}

impl Context<'_> {
    fn call(&mut self, call: Call) -> CallId {
        let id = CallId(*self.next_call);
        *self.next_call += 1;
        self.effects.push(Effect::Call(id, call));
        id
    }
}

impl Membership {
    /// The membership of `identity`, which used `previous` before, if it did; `seed` is for its randomness.
    #[must_use]
    pub fn new(
        now: Instant,
        identity: Identity,
        facts: LocalFacts,
        previous: Option<SubnetKey>,
        attached: bool,
        seed: u64,
    ) -> Self {
        Self {
            holds_identity: false,
            started: now,
            stepped: now,
            presumed_at: Some(now + if identity.predecessor.is_some() { RESUMED } else { UNCONFIRMED }),
            identity,
            bad_facts: records::violations(&facts),
            facts,
            attached,
            idle: BTreeSet::new(),
            connected: false,
            disconnected_at: None,
            lineage: 0,
            next_call: 0,
            rng: StdRng::seed_from_u64(seed),
            alive: AliveLane::default(),
            lease: LeaseLane::default(),
            records: RecordsLane::new(previous),
            state: MembershipState::Connecting,
        }
    }

    /// Processes an input and returns the calls to make.
    pub fn step(&mut self, now: Instant, input: Input, store: &Store) -> Vec<Effect> {
        self.stepped = now;
        let yielded = self.alive.yielded().is_some();
        let effects = self.advance(now, input, store);
        if yielded || self.alive.yielded().is_some() {
            // From now on, this process must claim the identity like any other: a missing record does not prove that
            // the other process has ended, only our own lasting record does.
            self.identity.predecessor = None;
            self.holds_identity = false;
            self.presumed_at = None;
        } else {
            if !self.holds_identity && store.lists() > 0 && !self.resumes(store) && self.finds_another(store) {
                self.presumed_at = self.presumed_at.map(|at| at.max(self.started + UNCONFIRMED));
            }
            let presumed = self.presumed_at.is_some_and(|at| now >= at);
            self.holds_identity |= self.may_write(now) || presumed || self.resumes(store);
        }
        effects
    }

    /// Whether this daemon may act as the node: send, answer, make routes. Not before etcd has had the chance to show
    /// that another daemon has the identity; from then on until one proves to have it.
    #[must_use]
    pub const fn holds_identity(&self) -> bool {
        self.holds_identity
    }

    /// Whether etcd confirms that no other daemon has the identity, so that this node may write its records.
    pub(crate) fn may_write(&self, now: Instant) -> bool {
        self.alive.yielded().is_none() && self.alive.may_write(now)
    }

    /// Whether this process follows one that ran here, and none has taken the identity since.
    fn resumes(&self, store: &Store) -> bool {
        let found = store.get(&Key::Alive(self.identity.id.clone()).to_string());
        self.identity.predecessor.is_some()
            && store.lists() > 0
            && found.is_none_or(|kept| kept.alive().map(|alive| alive.incarnation) == self.identity.predecessor)
    }

    /// Whether etcd names another process as the one that has the identity.
    fn finds_another(&self, store: &Store) -> bool {
        let found = store.get(&Key::Alive(self.identity.id.clone()).to_string());
        found.is_some_and(|kept| kept.alive().map(|alive| alive.incarnation) != Some(self.identity.incarnation))
    }

    fn advance(&mut self, now: Instant, input: Input, store: &Store) -> Vec<Effect> {
        if self.lineage != store.lineage_changes() {
            self.lineage = store.lineage_changes();
            self.alive.lineage_changed(now);
            self.lease = LeaseLane::default();
            self.records.lineage_changed();
        }
        match input {
            Input::Connected => {
                let away = self.disconnected_at.take().map(|at| now.saturating_duration_since(at));
                if away.is_some_and(|away| away >= ALIVE_TTL) {
                    self.alive.forget();
                }
                self.alive.listed(store.revision());
                self.records.listed(store.revision());
                self.connected = true;
            }
            Input::Disconnected => {
                self.disconnected_at.get_or_insert(now);
                self.connected = false;
            }
            Input::Facts(facts) => {
                self.bad_facts = records::violations(&facts);
                self.facts = *facts;
            }
            Input::Attached(attached) => self.attached = attached,
            Input::Idle(idle) => {
                self.idle = idle;
                self.records.idle_changed();
            }
            Input::Store | Input::Tick => {}
            Input::Answer(call, answer) => self.answered(now, call, &answer, store),
        }
        let mut context = Context {
            now,
            store,
            identity: &self.identity,
            facts: &self.facts,
            attached: self.attached,
            idle: &self.idle,
            rng: &mut self.rng,
            next_call: &mut self.next_call,
            effects: Vec::new(),
        };
        if store.lists() == 0 {
            return context.effects;
        }
        if is_removed(&context) {
            self.state = MembershipState::Removed;
            return context.effects;
        }
        // A loss is noticed without a connection too, such as when a held record is released.
        self.records.observe(&mut context);
        if self.connected {
            self.alive.act(&mut context);
        }
        if let Some(reason) = self.alive.yielded() {
            self.state = MembershipState::Cloned { reason: reason.to_owned() };
            return context.effects;
        }
        if !self.connected {
            self.state = self.records.state(&context);
            return context.effects;
        }
        self.lease.act(&mut context, self.records.subnet());
        if self.alive.may_write(now) && self.bad_facts.is_none() {
            self.records.act(&mut context, self.lease.held());
        }
        self.state = self.records.state(&context);
        if self.records.wants_relist(context.now) {
            context.effects.push(Effect::Relist);
        }
        context.effects
    }

    /// The state of this node.
    #[must_use]
    pub const fn state(&self) -> &MembershipState {
        &self.state
    }

    /// The subnet that this node uses, or used when it last ran: `None` before the first one, and when it was lost.
    #[must_use]
    pub const fn subnet(&self) -> Option<SubnetKey> {
        self.records.subnet()
    }

    /// When [`step`](Self::step) wants to be called at the latest; in the past if something fell due since the last
    /// step.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let presumed = self.presumed_at.filter(|_| !self.holds_identity && self.alive.yielded().is_none());
        if !self.connected {
            return presumed;
        }
        if self.alive.yielded().is_some() {
            return self.alive.next_deadline(self.stepped);
        }
        // A step at or after `presumed` ends it; one that has passed already is due at once.
        let lanes = [self.alive.next_deadline(self.stepped), self.lease.next_deadline(), self.records.next_deadline()];
        lanes.into_iter().flatten().filter(|at| *at > self.stepped).chain(presumed).min()
    }

    /// This node.
    #[must_use]
    pub const fn id(&self) -> &NodeId {
        &self.identity.id
    }

    /// Why etcd refuses this node's records, each reason once.
    #[must_use]
    pub fn refusals(&self) -> BTreeSet<&EtcdFailure> {
        [self.alive.refusal(), self.lease.refusal(), self.records.refusal()].into_iter().flatten().collect()
    }

    fn answered(&mut self, now: Instant, call: CallId, answer: &CallAnswer, store: &Store) {
        let rng = &mut self.rng;
        let taken = self.alive.answered(now, call, answer, rng)
            || self.lease.answered(now, call, answer, rng)
            || self.records.answered(now, call, answer, store, rng);
        if taken && matches!(answer, CallAnswer::Committed(Err(CallError::LeaseNotFound))) {
            self.lease.gone_if(self.records.lease_used());
        }
    }
}

fn is_removed(context: &Context<'_>) -> bool {
    let records = context.store.records();
    let keys = [Some(context.facts.public_key), context.facts.next_public_key];
    records.removed.contains_key(&context.identity.id)
        || records
            .removed
            .values()
            .any(|removed| keys.iter().flatten().any(|key| removed.value.public_keys.contains(key)))
}

/// A call that is under way, and when the lane may make the next one.
#[derive(Debug)]
struct Flight {
    call: Option<CallId>,
    not_before: Option<Instant>,
    backoff: super::backoff::Backoff,
    refusal: Option<EtcdFailure>,
}

impl Flight {
    const fn new(first: Duration, max: Duration) -> Self {
        Self { call: None, not_before: None, backoff: super::backoff::Backoff::new(first, max), refusal: None }
    }

    /// Ignores the answer to a call in flight.
    fn abandon(&mut self) {
        self.call = None;
        self.succeeded();
    }

    fn is_free(&self, now: Instant) -> bool {
        self.call.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    /// Whether the answer is to this lane's call, which then is over.
    fn landed(&mut self, call: CallId) -> bool {
        let ours = self.call == Some(call);
        if ours {
            self.call = None;
        }
        ours
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        self.not_before = None;
        self.refusal = None;
    }

    fn failed(&mut self, now: Instant, error: &CallError, rng: &mut StdRng) {
        if let CallError::Refused(reason) = error {
            self.refusal = Some(reason.clone());
        }
        self.wait(now, rng);
    }

    fn wait(&mut self, now: Instant, rng: &mut StdRng) {
        self.not_before = Some(now + self.backoff.next(rng));
    }

    /// When a call that waits may be made.
    fn next_deadline(&self) -> Option<Instant> {
        if self.call.is_some() { None } else { self.not_before }
    }
}

#[cfg(test)]
pub(crate) mod tests;
