//! This node's own records in etcd: identity, lease, subnet; a state machine without I/O or clock.
//!
//! [`Membership::step`] takes what happened and the store as it is now, and says which calls to make. It is
//! level-triggered: each step compares what should stand in etcd with what does, and asks for at most one call per
//! lane. Three lanes run beside each other:
//!
//! ```text
//! alive    grant 30 s ─▶ put alive/ID ─▶ keep alive; replaced: put back, or refuse to run (clone detection)
//! lease    taken up from our own keys, else granted with LeaseTTL ─▶ keep alive every TTL/3
//! records  subnets/… and nodes/ID: choose, allocate, put back, rewrite, each by one transaction with compares
//! ```
//!
//! What holds whatever happens: a key under `subnets/` is written only in a transaction that compares either that
//! nothing under `subnets/` changed since the revision the choice was made from, or that this very key, which is
//! ours, did not. So a subnet never has two owners, and a call whose answer was lost can be made again once the
//! store has been listed anew: of two such transactions at most one takes effect.

mod alive;
mod lease;
mod records;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use etcd_schema::{Key, NodeId, NodeName, PublicKey, SiteName, SubnetKey};
use ipnet::IpNet;
use rand::{SeedableRng as _, rngs::StdRng};

use self::{alive::AliveLane, lease::LeaseLane, records::RecordsLane};
use super::{
    allocator::Family,
    store::Store,
    types::{CallError, Committed, Granted, LeaseId, Transaction},
    view::{Problem, ProblemCode},
};

/// Time to live of `alive/ID`.
pub const ALIVE_TTL: Duration = Duration::from_secs(30);

/// Who this process is.
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
}

/// What this node says about itself to the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFacts {
    /// Its name, unique in the mesh.
    pub name: NodeName,
    /// Its site.
    pub site: Option<SiteName>,
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
    /// Version of the daemon.
    pub version: String,
}

/// How this node stands in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MembershipState {
    /// Nothing was read from etcd yet.
    Connecting,
    /// There is no `config`, or none that holds; heals by itself.
    NoConfig,
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
        family: Family,
        /// How many its pool has.
        total: u128,
    },
    /// The subnet that this node used is another's now, or outside of the configuration: its routes must go. A new
    /// one is drawn once nothing is attached.
    SubnetLost {
        /// What was lost.
        subnet: SubnetKey,
        /// Why.
        reason: String,
    },
    /// An operator removed this node from the mesh.
    Removed,
    /// Another daemon runs with this identity: this one must exit, with code 1.
    Refused {
        /// For the operator.
        reason: String,
    },
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A session with etcd stands; it will be followed by a list.
    Connected,
    /// The session is gone.
    Disconnected,
    /// The store took something in.
    Store,
    /// This node changed.
    Facts(Box<LocalFacts>),
    /// Whether anything (a pod) has an address of this node's subnet.
    Attached(bool),
    /// Time passed.
    Tick,
    /// A call is over; each call gets exactly one answer.
    Answer(CallId, Answer),
}

/// Tells answers apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(u64);

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Of [`Call::Grant`].
    Granted(Result<Granted, CallError>),
    /// Of [`Call::KeepAlive`].
    KeptAlive(Result<Granted, CallError>),
    /// Of [`Call::Transact`].
    Committed(Result<Committed, CallError>),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make this call and answer with the id.
    Call(CallId, Call),
    /// List the store anew: a transaction may have happened or not.
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
    /// What is wrong with the facts, which then are not written.
    bad_facts: Option<String>,
    attached: bool,
    connected: bool,
    disconnected_at: Option<Instant>,
    next_call: u64,
    rng: StdRng,
    alive: AliveLane,
    lease: LeaseLane,
    records: RecordsLane,
    state: MembershipState,
}

/// What the lanes need of the rest for one step.
struct Context<'a> {
    now: Instant,
    store: &'a Store,
    identity: &'a Identity,
    facts: &'a LocalFacts,
    attached: bool,
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
    pub fn new(identity: Identity, facts: LocalFacts, previous: Option<SubnetKey>, attached: bool, seed: u64) -> Self {
        Self {
            identity,
            bad_facts: records::violations(&facts),
            facts,
            attached,
            connected: false,
            disconnected_at: None,
            next_call: 0,
            rng: StdRng::seed_from_u64(seed),
            alive: AliveLane::default(),
            lease: LeaseLane::default(),
            records: RecordsLane::new(previous),
            state: MembershipState::Connecting,
        }
    }

    /// Takes in what happened; what to do now.
    pub fn step(&mut self, now: Instant, input: Input, store: &Store) -> Vec<Effect> {
        match input {
            Input::Connected => {
                let away = self.disconnected_at.take().map(|at| now.saturating_duration_since(at));
                if away.is_some_and(|away| away >= ALIVE_TTL) {
                    self.alive.forget();
                }
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
            Input::Store | Input::Tick => {}
            Input::Answer(call, answer) => self.answered(now, call, &answer, store),
        }
        let mut context = Context {
            now,
            store,
            identity: &self.identity,
            facts: &self.facts,
            attached: self.attached,
            rng: &mut self.rng,
            next_call: &mut self.next_call,
            effects: Vec::new(),
        };
        if matches!(self.state, MembershipState::Refused { .. }) || store.lists() == 0 {
            return context.effects;
        }
        if is_removed(&context) {
            self.state = MembershipState::Removed;
            return context.effects;
        }
        // What is lost is seen without a connection too (a withheld record may be let go then).
        self.records.observe(&mut context);
        if !self.connected {
            self.state = self.records.state(&context);
            return context.effects;
        }
        if let Err(reason) = self.alive.act(&mut context) {
            self.state = MembershipState::Refused { reason };
            return context.effects;
        }
        self.lease.act(&mut context, self.records.subnet());
        if self.alive.may_write(context.now) && self.bad_facts.is_none() {
            self.records.act(&mut context, self.lease.held());
        }
        self.state = self.records.state(&context);
        if self.records.wants_relist(context.now) {
            context.effects.push(Effect::Relist);
        }
        context.effects
    }

    /// How this node stands.
    #[must_use]
    pub const fn state(&self) -> &MembershipState {
        &self.state
    }

    /// The subnet that this node uses, or used when it last ran: `None` before the first one, and when it was lost.
    #[must_use]
    pub const fn subnet(&self) -> Option<SubnetKey> {
        self.records.subnet()
    }

    /// When [`step`](Self::step) wants to be called at the latest.
    #[must_use]
    pub fn next_deadline(&self, now: Instant) -> Option<Instant> {
        if !self.connected || matches!(self.state, MembershipState::Refused { .. }) {
            return None;
        }
        [self.alive.next_deadline(now), self.lease.next_deadline(), self.records.next_deadline()]
            .into_iter()
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// What an operator should know about this node.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |code, cause: String, remedy: &str| Problem { code, key: None, cause, remedy: remedy.to_owned() };
        let mut problems = Vec::new();
        match &self.state {
            MembershipState::NoConfig => problems.push(problem(
                ProblemCode::NoConfig,
                "there is no valid network configuration".into(),
                "put one under `config` (`meshctl check config FILE` judges it); if one is there, another problem says \
                 why it is not taken",
            )),
            MembershipState::PoolExhausted { family, total } => problems.push(problem(
                ProblemCode::PoolExhausted,
                format!("all {total} {family} subnets are taken"),
                "remove nodes that are gone (meshctl node remove NAME), or widen SubnetMin to SubnetMax",
            )),
            MembershipState::SubnetLost { subnet, reason } => problems.push(problem(
                ProblemCode::SubnetLost,
                format!("{} is not this node's any more: {reason}", Key::Subnet(*subnet)),
                "drain this node: it draws a new subnet once no pod is attached",
            )),
            MembershipState::Removed => problems.push(problem(
                ProblemCode::NodeRemoved,
                "this node, or its key, was removed from the mesh by an operator".into(),
                "stop meshd here; to let the node in again delete its key under `removed/`",
            )),
            MembershipState::Refused { reason } => problems.push(problem(
                ProblemCode::Cloned,
                reason.clone(),
                "give this machine a state directory of its own (delete node-id and key there)",
            )),
            MembershipState::Connecting | MembershipState::Joining | MembershipState::Joined { .. } => {}
        }
        if let (MembershipState::Joined { subnet }, true) = (&self.state, self.records.is_outdated()) {
            problems.push(problem(
                ProblemCode::SubnetOutdated,
                format!("`{}` is not what `config` deals out now; it stays in use", Key::Subnet(*subnet)),
                "to get another one: drain this node, stop meshd, delete that key, start meshd",
            ));
        }
        if let Some(cause) = &self.bad_facts {
            problems.push(problem(
                ProblemCode::BadFacts,
                format!("this node's record would not be readable, so it is not written: {cause}"),
                "correct the flags or the configuration file of meshd on this node",
            ));
        }
        let refusals = [self.alive.refusal(), self.lease.refusal(), self.records.refusal()];
        problems.extend(refusals.into_iter().flatten().map(|refusal| {
            problem(
                ProblemCode::EtcdRefuses,
                refusal.to_owned(),
                "check the rights of the node's etcd user below the prefix, and etcd's alarms (etcdctl alarm list)",
            )
        }));
        problems
    }

    fn answered(&mut self, now: Instant, call: CallId, answer: &Answer, store: &Store) {
        let rng = &mut self.rng;
        let taken = self.alive.answered(now, call, answer, rng)
            || self.lease.answered(now, call, answer, rng)
            || self.records.answered(now, call, answer, store, rng);
        if taken && matches!(answer, Answer::Committed(Err(CallError::LeaseNotFound))) {
            self.lease.gone_if(self.records.lease_used());
        }
    }
}

fn is_removed(context: &Context<'_>) -> bool {
    let view = context.store.view();
    let keys = [Some(context.facts.public_key), context.facts.next_public_key];
    view.removed.contains_key(&context.identity.id)
        || view.removed.values().any(|removed| keys.iter().flatten().any(|key| removed.value.public_keys.contains(key)))
}

/// A call that is under way, and when the lane may make the next one.
#[derive(Debug)]
struct Flight {
    call: Option<CallId>,
    not_before: Option<Instant>,
    backoff: super::backoff::Backoff,
    refusal: Option<String>,
}

impl Flight {
    const fn new(first: Duration, max: Duration) -> Self {
        Self { call: None, not_before: None, backoff: super::backoff::Backoff::new(first, max), refusal: None }
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
mod model;
#[cfg(test)]
mod tests;
