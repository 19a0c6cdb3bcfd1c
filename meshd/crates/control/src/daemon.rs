//! The shell around the pure parts: one task that owns store and membership, one that watches, and a short-lived one
//! for each pending call.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use control_core::{
    endpoints::{EndpointRecords, Endpoints},
    membership::{Answer, Call, CallId, Effect, Identity, Input, LocalFacts, Membership, MembershipState},
    objects::ObjectSink,
    store::{Accepted, Store, Wanted},
    types::{CallError, Committed, Entry},
};
use etcd_schema::{Key, SubnetKey};
use mesh::problem::{Problem, ProblemCode};
use mesh::records::{Revision, View};
use rand::Rng as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    cache::{CacheWriter, Cached},
    etcd_options::{EtcdOptions, EtcdOptionsError},
    predecessor,
    session::{Dialer, Session},
    state_dir::StateDir,
    unreachable::{self, LOST_CHANGES_SHOWN},
    watcher::{Pace, StoreInput, Watcher, WatcherRequest},
};

/// What [`start`] needs.
pub struct Options {
    /// Where etcd is.
    pub etcd: EtcdOptions,
    /// The locked state directory.
    pub state: StateDir,
    /// RUN, which no copy of the state directory comes with.
    pub run_dir: PathBuf,
    /// What this node says about itself; changes go through [`Control::facts`].
    pub facts: LocalFacts,
    /// Whether anything is attached to this node's subnet; changes go through [`Control::attached`].
    pub attached: bool,
    /// Reads what policies are made of, and takes what changed.
    pub objects: Option<Arc<dyn ObjectSink>>,
    /// Mean time between two lists that prove that the watch loses nothing; 10 minutes by default.
    pub audit_interval: Duration,
}

/// The control plane of this node, running. Dropping it stops it; its keys stay in etcd.
#[derive(Debug)]
pub struct Control {
    /// Every record in force. Starts with what the cache held (`View::synced` is then false), or empty.
    pub view: watch::Receiver<Arc<View>>,
    /// How this node stands.
    pub status: watch::Receiver<ControlStatus>,
    /// What this node says about itself.
    pub facts: watch::Sender<LocalFacts>,
    /// Whether anything is attached to this node's subnet.
    pub attached: watch::Sender<bool>,
    /// This node's `endpoints/` records; those in etcd are left alone until they are known.
    pub endpoints: watch::Sender<Option<EndpointRecords>>,
    /// Takes the operator's word that what etcd holds is right.
    pub etcd_acceptor: EtcdAcceptor,
    /// The cache that the view started with.
    pub cached: Option<CacheInfo>,
    cancel: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// Lets go of records that stay in force without etcd, see [`Store::accept`].
#[derive(Debug, Clone)]
pub struct EtcdAcceptor(mpsc::Sender<oneshot::Sender<Accepted>>);

impl EtcdAcceptor {
    /// Accepts what etcd holds; `None`: the control plane has ended. Blocks until that is done: not for async code.
    #[must_use]
    pub fn accept(&self) -> Option<Accepted> {
        let (answer, answered) = oneshot::channel();
        self.0.blocking_send(answer).ok()?;
        answered.blocking_recv().ok()
    }
}

/// What was known at the start without etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheInfo {
    /// How old it was then.
    pub age: Duration,
    /// Whether it may be forwarded by: it is not older than `LeaseTTL`. Otherwise wait for `View::synced`.
    pub usable: bool,
}

/// How this node stands with etcd and in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlStatus {
    /// Whether a session stands and everything up to it is known.
    pub connected: bool,
    /// The member in use, or used last.
    pub endpoint: Option<String>,
    /// Why there is no connection.
    pub error: Option<String>,
    /// The last revision taken in.
    pub revision: Revision,
    /// Until when everything in etcd was known; `None` while connected, and before the first connection.
    pub known_until: Option<Instant>,
    /// This node's place in the mesh.
    pub state: MembershipState,
    /// The subnet in use: also while etcd is away; `None` before the first and when it is lost.
    pub subnet: Option<SubnetKey>,
    /// Whether this daemon may act as the node, see [`Membership::holds_identity`].
    pub holds_identity: bool,
    /// Problems of this node itself, its connection to etcd among them; those of records are in [`View::problems`].
    pub problems: Vec<Problem>,
    /// Whether etcd was read, and has never had a Kubernetes object since the start.
    pub no_kubernetes_objects: bool,
    /// Lists read so far.
    pub lists: u64,
    /// Records that an audit found changed and the watch had not brought: a fault of etcd or of this program.
    pub audit_differences: u64,
}

impl ControlStatus {
    /// How long ago everything in etcd was known; `None` when it never was.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        if self.connected {
            Some(Duration::ZERO)
        } else {
            self.known_until.map(|until| now.saturating_duration_since(until))
        }
    }
}

/// Starts the control plane; needs a tokio runtime. Returns at once: etcd may be away.
///
/// # Errors
/// Everything that is wrong with the etcd options.
pub fn start(options: Options) -> Result<Control, Vec<EtcdOptionsError>> {
    start_at_pace(options, None)
}

pub(crate) fn start_at_pace(options: Options, pace: Option<Pace>) -> Result<Control, Vec<EtcdOptionsError>> {
    let dialer = Dialer::new(&options.etcd)?;
    let pace = pace.unwrap_or_else(|| Pace { audit: options.audit_interval, ..Pace::default() });
    let cached = Cached::load(options.state.path()).unwrap_or_else(|error| {
        warn!(%error, "cache not used");
        None
    });
    let cache_info = cached.as_ref().map(|cached| {
        let now = SystemTime::now();
        CacheInfo { age: cached.age(now), usable: cached.is_usable(now) }
    });
    let previous = cached.as_ref().and_then(|cached| cached.subnet);
    let mut store = Store::new(&options.etcd.prefix);
    if let Some(objects) = &options.objects {
        store = store.with_reader(Arc::clone(objects) as _);
    }
    let store = match cached {
        Some(cached) => store.with_cache(cached.revision, cached.entries, Instant::now()).recall(cached.evidence),
        None => store,
    };
    let mut identity = options.state.identity().clone();
    identity.predecessor = predecessor::load(&options.run_dir, &identity);
    let own = identity.clone();
    let membership = Membership::new(
        Instant::now(),
        identity,
        options.facts.clone(),
        previous,
        options.attached,
        rand::rng().random(),
    );

    let (store_inputs_in, store_inputs) = mpsc::channel(64);
    let (suspects, suspects_out) = mpsc::channel(16);
    let (answers_in, answers) = mpsc::channel(16);
    let (view_in, view) = watch::channel(store.view());
    let (facts, facts_out) = watch::channel(options.facts);
    let (attached, attached_out) = watch::channel(options.attached);
    let (endpoints, endpoints_out) = watch::channel(None);
    let (endpoint_answers_in, endpoint_answers) = mpsc::channel(1);
    let cancel = CancellationToken::new();
    let (acceptance_in, acceptance) = mpsc::channel(1);
    let (earlier_in, earlier) = mpsc::channel(16);
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
        lists: 0,
        audit_differences: 0,
    };
    let (status_in, status) = watch::channel(status);

    let watcher = tokio::spawn(Watcher::new(dialer, pace, store_inputs_in, suspects_out).run());
    let daemon = Daemon {
        store,
        membership,
        session: None,
        announced: true,
        endpoint: None,
        error: None,
        unreachable: None,
        lost_changes: None,
        known_until: None,
        away_since: None,
        view: view_in,
        status: status_in,
        answers: answers_in,
        endpoints: Endpoints::new(&options.state.identity().id),
        endpoint_answers: endpoint_answers_in,
        suspects,
        cache: CacheWriter::new(options.state),
        objects: options.objects,
        cache_usable: cache_info.is_some_and(|cache| cache.usable),
        told: None,
        earlier: earlier_in,
        looking_back: false,
        kubernetes: false,
        run_dir: options.run_dir,
        identity: own,
        noted: None,
    };
    let stop = cancel.clone();
    let task = tokio::spawn(async move {
        let mut inputs = Inputs {
            store: store_inputs,
            answers,
            facts: facts_out,
            attached: attached_out,
            endpoints: endpoints_out,
            endpoint_answers,
            earlier,
            acceptance,
        };
        daemon.run(&mut inputs, &stop).await;
        watcher.abort();
    });
    let etcd_acceptor = EtcdAcceptor(acceptance_in);
    Ok(Control {
        view,
        status,
        facts,
        attached,
        endpoints,
        etcd_acceptor,
        cached: cache_info,
        cancel,
        task: Some(task),
    })
}

impl Control {
    /// Stops and waits for the end. This node's keys stay in etcd, so that a restart takes over.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        if let Some(task) = self.task.take() {
            // It ends by itself; a panic in it has been printed.
            let _ended = task.await;
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

struct Inputs {
    store: mpsc::Receiver<StoreInput>,
    answers: mpsc::Receiver<(CallId, Answer)>,
    facts: watch::Receiver<LocalFacts>,
    attached: watch::Receiver<bool>,
    earlier: mpsc::Receiver<Earlier>,
    acceptance: mpsc::Receiver<oneshot::Sender<Accepted>>,
    endpoints: watch::Receiver<Option<EndpointRecords>>,
    endpoint_answers: mpsc::Receiver<Result<Committed, CallError>>,
}

/// What the history of a key has brought.
enum Earlier {
    /// A value from before the one that cannot be read.
    Found(Wanted, Entry),
    /// There was no answer: it is to be asked for again.
    Unanswered(Vec<Wanted>),
    /// All has been looked for.
    Done,
}

struct Daemon {
    store: Store,
    membership: Membership,
    session: Option<Session>,
    /// Whether the membership knows of the session: it is told once the list is in.
    announced: bool,
    endpoint: Option<String>,
    error: Option<String>,
    /// The same as a problem, until everything is known again.
    unreachable: Option<Problem>,
    /// When an audit last found differences.
    lost_changes: Option<Instant>,
    known_until: Option<Instant>,
    /// Since when the log calls etcd unreachable.
    away_since: Option<Instant>,
    view: watch::Sender<Arc<View>>,
    status: watch::Sender<ControlStatus>,
    answers: mpsc::Sender<(CallId, Answer)>,
    endpoints: Endpoints,
    endpoint_answers: mpsc::Sender<Result<Committed, CallError>>,
    suspects: mpsc::Sender<WatcherRequest>,
    cache: CacheWriter,
    objects: Option<Arc<dyn ObjectSink>>,
    /// The cache that the store started with may be acted on.
    cache_usable: bool,
    /// The revision that the sink was told last, of a complete picture.
    told: Option<Revision>,
    earlier: mpsc::Sender<Earlier>,
    /// A task looks for earlier values.
    looking_back: bool,
    /// A Kubernetes object was seen.
    kubernetes: bool,
    run_dir: PathBuf,
    identity: Identity,
    /// Whether RUN says that this process holds the identity; `None`: it says what an earlier one left.
    noted: Option<bool>,
}

impl Daemon {
    async fn run(mut self, inputs: &mut Inputs, stop: &CancellationToken) {
        loop {
            self.hand_on_objects();
            self.look_back();
            let deadlines = [
                self.store.next_deadline(),
                self.membership.next_deadline(),
                self.cache.next_deadline(),
                self.endpoints.next_deadline().filter(|_| self.may_write_endpoints()),
            ];
            let deadline = deadlines.into_iter().flatten().min();
            tokio::select! {
                input = inputs.store.recv() => match input {
                    Some(input) => self.on_store_input(input),
                    None => break,
                },
                Some((call, answer)) = inputs.answers.recv() => self.step(Input::Answer(call, answer)),
                Ok(()) = inputs.facts.changed() => {
                    let facts = inputs.facts.borrow_and_update().clone();
                    self.step(Input::Facts(Box::new(facts)));
                }
                Ok(()) = inputs.attached.changed() => {
                    let attached = *inputs.attached.borrow_and_update();
                    self.step(Input::Attached(attached));
                }
                Ok(()) = inputs.endpoints.changed() => {
                    let wanted = inputs.endpoints.borrow_and_update().clone();
                    self.endpoints.want(wanted);
                }
                Some(answer) = inputs.endpoint_answers.recv() => self.endpoints.answered(Instant::now(), &self.store, &answer),
                () = sleep_until(deadline) => {
                    let view = self.store.tick(Instant::now());
                    self.publish(view);
                    self.step(Input::Tick);
                }
                Some(earlier) = inputs.earlier.recv() => self.on_earlier(earlier),
                Some(answer) = inputs.acceptance.recv() => self.accept(answer),
                () = self.cache.written() => {}
                () = stop.cancelled() => break,
            }
            self.report();
            let connected = self.session.is_some() && self.announced;
            self.write_endpoints();
            self.cache.write_if_due(Instant::now(), &self.store, self.membership.subnet(), connected);
        }
        // The lock on the state directory goes only after the last write to it.
        self.cache.finish(&self.store, self.membership.subnet()).await;
    }

    fn on_store_input(&mut self, input: StoreInput) {
        let now = Instant::now();
        match input {
            StoreInput::Connected(session) => {
                self.endpoint = Some(session.member().to_string());
                self.error = None;
                self.session = Some(*session);
                self.announced = false;
            }
            StoreInput::Disconnected { endpoint, error } => {
                if self.session.take().is_some() {
                    self.known_until = Some(now);
                }
                if self.away_since.is_none() {
                    self.away_since = Some(now);
                    warn!(endpoint, error, "etcd unreachable");
                }
                self.announced = true;
                self.error = Some(format!("{endpoint}: {error}"));
                self.unreachable = Some(unreachable::etcd_unreachable(&endpoint, &error));
                self.step(Input::Disconnected);
            }
            StoreInput::Listed(listing) => {
                let revision = listing.revision;
                let view = self.store.listed(now, listing);
                self.publish(view);
                if let (Some(since), Some(session)) = (self.away_since.take(), &self.session) {
                    let after = humantime::format_duration(Duration::from_secs(since.elapsed().as_secs()));
                    info!(endpoint = %session.member(), revision, %after, "etcd reachable");
                }
                self.list_again();
                // Which etcd it was that was listed must outlive a restart, also when no record differs.
                self.cache.changed();
                if !self.announced {
                    self.announced = true;
                    self.known_until = None;
                    self.unreachable = None;
                    self.step(Input::Connected);
                }
                self.step(Input::Store);
            }
            StoreInput::Changed(events) => {
                let view = self.store.changed(now, events);
                self.publish(view);
                self.step(Input::Store);
            }
            StoreInput::Audited { listing, deleted_since } => {
                let revision = listing.revision;
                let (view, lost) = self.store.audited(now, listing, &deleted_since);
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
                self.publish(view);
                self.list_again();
                self.step(Input::Store);
            }
        }
    }

    /// Asks for the list that confirms what the last one lacked.
    fn list_again(&self) {
        if self.store.awaits_list() {
            // A full queue holds a suspicion: a list follows from that as well.
            let _full = self.suspects.try_send(WatcherRequest::ListAgain);
        }
    }

    fn accept(&mut self, answer: oneshot::Sender<Accepted>) {
        let (accepted, view) = self.store.accept();
        info!(withdrawn = accepted.withdrawn, changed = accepted.changed, "operator accepted the content of etcd");
        self.publish(view);
        self.cache.changed_now();
        self.step(Input::Store);
        // The caller may have gone.
        let _gone = answer.send(accepted);
    }

    /// Tells whoever enforces policies what changed.
    fn hand_on_objects(&mut self) {
        let changes = self.store.take_objects();
        if !changes.is_empty() {
            self.cache.changed();
        }
        let complete = self.store.lists() > 0 || self.cache_usable;
        let Some(sink) = &self.objects else { return };
        let revision = self.store.revision();
        // A revision that changes nothing of it is told too: it is in force then.
        if !changes.is_empty() || (complete && self.told != Some(revision)) {
            self.told = complete.then_some(revision);
            sink.changed(changes, revision, complete);
        }
    }

    /// Looks for earlier values of what cannot be read; one key after another.
    fn look_back(&mut self) {
        if self.looking_back || !self.announced {
            return;
        }
        let (Some(session), Some(reader)) = (self.session.clone(), self.objects.clone()) else { return };
        let wanted = self.store.take_wanted();
        if wanted.is_empty() {
            return;
        }
        self.looking_back = true;
        let answers = self.earlier.clone();
        tokio::spawn(async move {
            let mut wanted = wanted.into_iter();
            while let Some(one) = wanted.next() {
                let answer = match earlier_value(&session, &*reader, &one).await {
                    Ok(Some(entry)) => Earlier::Found(one, entry),
                    Ok(None) => continue,
                    Err(error) => {
                        debug!(%error, key = one.key, "cannot read the history of a key");
                        let rest = std::iter::once(one).chain(wanted.by_ref()).collect();
                        // Not at once again: the member may be refusing.
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        Earlier::Unanswered(rest)
                    }
                };
                // Nobody waits for the answer only when everything is being stopped.
                let _stopped = answers.send(answer).await;
            }
            let _stopped = answers.send(Earlier::Done).await;
        });
    }

    fn on_earlier(&mut self, earlier: Earlier) {
        match earlier {
            Earlier::Found(wanted, entry) => {
                info!(key = wanted.key, revision = entry.mod_revision, "earlier value stays in force");
                let view = self.store.earlier(&wanted, &entry);
                self.publish(view);
            }
            Earlier::Unanswered(wanted) => self.store.want_again(wanted),
            Earlier::Done => self.looking_back = false,
        }
    }

    fn step(&mut self, input: Input) {
        let before = self.membership.state().clone();
        for effect in self.membership.step(Instant::now(), input, &self.store) {
            match effect {
                Effect::Call(id, call) => self.call(id, call),
                Effect::Relist => {
                    if let Some(session) = &self.session {
                        suspect(&self.suspects, session.generation());
                    }
                }
            }
        }
        let after = self.membership.state();
        if before != *after {
            log_membership(after);
        }
    }

    fn call(&self, id: CallId, call: Call) {
        let session = self.session.clone();
        let (answers, suspects) = (self.answers.clone(), self.suspects.clone());
        tokio::spawn(async move {
            let answer = match &session {
                Some(session) => perform(session, call).await,
                None => refuse(&call),
            };
            let failed = match &answer {
                Answer::Granted(result) | Answer::KeptAlive(result) => result.as_ref().err(),
                Answer::Committed(result) => result.as_ref().err(),
            };
            if let (Some(error), Some(session)) = (failed, &session) {
                debug!(%error, endpoint = %session.member(), "etcd call failed");
                if matches!(error, CallError::Indeterminate(_)) {
                    suspect(&suspects, session.generation());
                }
            }
            // Nobody waits for the answer only when everything is being stopped.
            let _stopped = answers.send((id, answer)).await;
        });
    }

    /// Whether this node has a place in the mesh whose `endpoints/` records are its own to write.
    fn may_write_endpoints(&self) -> bool {
        let joined = matches!(self.membership.state(), MembershipState::Joined { .. });
        // A copy of a node would withdraw the containers of the original.
        self.session.is_some() && self.announced && joined && self.membership.may_write(Instant::now())
    }

    /// Brings this node's `endpoints/` records up to date.
    fn write_endpoints(&mut self) {
        let Some(session) = self.session.clone().filter(|_| self.may_write_endpoints()) else { return };
        let Some(transaction) = self.endpoints.next(Instant::now(), &self.store) else { return };
        let (answers, suspects) = (self.endpoint_answers.clone(), self.suspects.clone());
        tokio::spawn(async move {
            let answer = session.transact(&transaction).await;
            if let Err(error) = &answer {
                debug!(%error, endpoint = %session.member(), "cannot write endpoint records");
                if matches!(error, CallError::Indeterminate(_)) {
                    suspect(&suspects, session.generation());
                }
            }
            // Nobody waits for the answer only when everything is being stopped.
            let _stopped = answers.send(answer).await;
        });
    }

    fn publish(&mut self, view: Option<Arc<View>>) {
        if let Some(view) = view {
            self.cache.changed();
            {
                let before = self.view.borrow();
                log_config_change(&before, &view);
            }
            self.view.send_replace(view);
        }
    }

    /// The problems of this node itself.
    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.membership.problems(self.store.prefix());
        // A config that cannot be read, or is refused, is named already, with what is wrong with it.
        let config = Some(Key::CONFIG);
        if self.store.view().problems.iter().any(|problem| problem.key.as_deref() == config) {
            problems.retain(|problem| problem.code != ProblemCode::NoConfig);
        }
        let mut refusals = self.membership.refusals();
        refusals.extend(self.endpoints.refusal());
        problems.extend(refusals.into_iter().map(|reason| unreachable::etcd_refuses(reason, self.membership.id())));
        problems.extend(self.unreachable.clone());
        if self.lost_changes.is_some_and(|at| at.elapsed() < LOST_CHANGES_SHOWN) {
            problems.push(unreachable::watch_lost_changes(self.store.audit_differences()));
        }
        problems
    }

    /// Tells the next start on this machine who held the identity last.
    fn note_identity(&mut self) {
        let cloned = matches!(self.membership.state(), MembershipState::Cloned { .. });
        if cloned && self.noted != Some(false) {
            self.noted = Some(false);
            predecessor::remove(&self.run_dir);
        } else if !cloned && self.noted != Some(true) && self.membership.may_write(Instant::now()) {
            self.noted = Some(true);
            predecessor::save(&self.run_dir, &self.identity);
        }
    }

    fn report(&mut self) {
        self.note_identity();
        self.kubernetes |= self.store.has_kubernetes_objects();
        let status = ControlStatus {
            connected: self.session.is_some() && self.announced,
            endpoint: self.endpoint.clone(),
            error: self.error.clone(),
            revision: self.store.revision(),
            known_until: self.known_until,
            state: self.membership.state().clone(),
            subnet: self.membership.subnet(),
            holds_identity: self.membership.holds_identity(),
            problems: self.problems(),
            no_kubernetes_objects: self.store.lists() > 0 && !self.kubernetes,
            lists: self.store.lists(),
            audit_differences: self.store.audit_differences(),
        };
        self.status.send_if_modified(|current| {
            if status.subnet != current.subnet {
                self.cache.changed_now();
            }
            let modified = status != *current;
            *current = status;
            modified
        });
    }
}

fn log_membership(state: &MembershipState) {
    match state {
        MembershipState::Connecting => info!("waiting for etcd"),
        MembershipState::NoConfig => warn!("no valid config in etcd"),
        MembershipState::Joining => info!("leasing a subnet"),
        MembershipState::Joined { subnet } => info!(%subnet, "subnet leased"),
        MembershipState::PoolExhausted { family, total } => warn!(%family, total, "no free subnet"),
        MembershipState::SubnetLost { subnet, reason } => error!(%subnet, reason, "subnet lost"),
        MembershipState::Removed => error!("node removed from the mesh"),
        MembershipState::Cloned { reason } => error!(reason, "identity in use by another daemon"),
    }
}

/// Says what a new configuration changes at once, and what only with the nodes' next subnets.
fn log_config_change(before: &View, after: &View) {
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

/// How many earlier values of a key are looked at.
const LOOK_BACK: usize = 8;

/// The newest value of a key before the unreadable one that can be read, if etcd still has it.
async fn earlier_value(
    session: &Session,
    reader: &dyn ObjectSink,
    wanted: &Wanted,
) -> Result<Option<Entry>, CallError> {
    let Ok(key) = Key::parse(&wanted.key) else { return Ok(None) };
    let mut before = wanted.before;
    for _ in 0..LOOK_BACK {
        if before <= 1 {
            break;
        }
        let Some(entry) = session.get_at(&wanted.key, before - 1).await? else { break };
        if reader.read(&key, &entry.value, false).is_ok() {
            return Ok(Some(entry));
        }
        before = entry.mod_revision;
    }
    Ok(None)
}

async fn perform(session: &Session, call: Call) -> Answer {
    match call {
        Call::Grant { ttl } => Answer::Granted(session.grant(ttl).await),
        Call::KeepAlive { lease } => Answer::KeptAlive(session.keep_alive(lease).await),
        Call::Transact(transaction) => Answer::Committed(session.transact(&transaction).await),
    }
}

fn refuse(call: &Call) -> Answer {
    let error = CallError::Indeterminate("not connected to etcd".into());
    match call {
        Call::Grant { .. } => Answer::Granted(Err(error)),
        Call::KeepAlive { .. } => Answer::KeptAlive(Err(error)),
        Call::Transact(_) => Answer::Committed(Err(error)),
    }
}

fn suspect(suspects: &mpsc::Sender<WatcherRequest>, generation: u64) {
    // A full queue already holds the same suspicion.
    let _full = suspects.try_send(WatcherRequest::Suspect { generation });
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
