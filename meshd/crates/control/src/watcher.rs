//! Keeps one session and one watch: lists, watches from there, and lists again if the watch cannot continue.
//!
//! ```text
//!            ┌──────────── failed, hung or suspected: next member, full-jitter backoff ───────────┐
//!            ▼                                                                                    │
//!     open ─▶ list at R ─▶ watch from R+1 ─▶ events … silent: ask for progress ─▶ unanswered ─────┤
//!                ▲                │                                                               │
//!                └─── compacted ──┘   every audit interval: list beside the watch and compare ────┘
//! ```
//!
//! The store downstream compares each list with its content, so a gap loses nothing and repeats nothing.

use std::{collections::BTreeSet, convert::Infallible, pin::Pin, time::Duration};

use control_core::{
    backoff::Backoff,
    types::{CallError, ClusterId, EtcdFailure, FailureKind, KeyListing, WatchEvent},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{debug, info, warn};

use super::{
    etcd_options::EtcdMember,
    session::{CALL_DEADLINE, ConnectionFiles, Dialer, OpenError, Session, Watch, WatchMessage, same_cluster},
};

/// Failures in a row between two warnings: some minutes.
const REMINDER: usize = 100;

/// How long a watch must stand, when it brings nothing, before the connection counts as good.
const STANDS: Duration = Duration::from_secs(10);

/// What the watcher tells the store. In order: `Connected`, `Listed`, any of `Changed`, `Listed`, `Audited`, then
/// `Disconnected`.
#[derive(Debug)]
pub(crate) enum StoreInput {
    /// A session stands; nothing is known through it yet.
    Connected(Box<Session>),
    /// Every key, as it stood at one revision.
    Listed(KeyListing),
    /// Changes of whole revisions, in order; the last one's revision is reached.
    Changed(Vec<WatchEvent>),
    /// Every key at one revision, read beside the watch; the watch has had time to bring all of it.
    Audited {
        listing: KeyListing,
        /// Keys that the watch reported as deleted since before the list was asked for.
        deleted_since: BTreeSet<String>,
    },
    /// The session is given up, or none came about.
    Disconnected {
        /// The member.
        endpoint: String,
        /// Why.
        error: EtcdFailure,
    },
}

/// What others tell the watcher.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WatcherRequest {
    /// A call on the session of this generation went without an answer.
    Suspect { generation: u64 },
    /// The last list lacked keys that the watch had not reported as deleted: audit soon.
    ListAgain,
}

/// How often things happen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WatchIntervals {
    /// Silence after which a sign of life is asked for.
    pub(crate) idle: Duration,
    /// Mean time between two audits; each is drawn within 20 % of it.
    pub(crate) audit: Duration,
    /// Time that the watch gets to bring what an audit has listed.
    pub(crate) audit_grace: Duration,
    /// Mean time until the audit that confirms what a list lacked; each is drawn within half of it, so that nodes that
    /// connect together do not list together.
    pub(crate) confirm: Duration,
}

impl Default for WatchIntervals {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(10),
            audit: Duration::from_secs(600),
            audit_grace: Duration::from_secs(5),
            confirm: Duration::from_secs(4),
        }
    }
}

pub(crate) struct Watcher {
    dialer: Dialer,
    pace: WatchIntervals,
    rng: StdRng,
    out: mpsc::Sender<StoreInput>,
    requests: mpsc::Receiver<WatcherRequest>,
    /// What the present session was opened with.
    files: ConnectionFiles,
    /// Whether a session served since the last failure was reported.
    served: bool,
    backoff: Backoff,
}

/// Whether a watch was worth its list. One that is refused or dies at once is not: starting over without a pause would
/// have every node read the whole store many times a second.
struct WatchTrial {
    opened: Instant,
    delivered: bool,
}

impl WatchTrial {
    const fn new(now: Instant) -> Self {
        Self { opened: now, delivered: false }
    }

    fn passed(&self, now: Instant) -> bool {
        self.delivered || now.saturating_duration_since(self.opened) >= STANDS
    }
}

/// Where the audit stands. Each state can be waited in, left for an event, and waited in again.
enum Audit {
    Waiting {
        until: Instant,
    },
    Listing(Pin<Box<dyn Future<Output = Result<KeyListing, CallError>> + Send>>),
    /// Listed; the watch gets time to bring what the list shows.
    Grace {
        until: Instant,
        listing: KeyListing,
    },
}

impl Audit {
    /// Waits until this state is over; what was listed, if it is that.
    async fn step(&mut self) -> Result<Option<KeyListing>, CallError> {
        match self {
            Self::Waiting { until } | Self::Grace { until, .. } => {
                tokio::time::sleep_until(*until).await;
                Ok(None)
            }
            Self::Listing(list) => list.await.map(Some),
        }
    }
}

/// Why a session ended.
enum SessionEnd {
    Failed(CallError),
    Suspected,
    /// There are other certificates, another password or other members, and they are good.
    Renewed,
    /// Nobody listens any more.
    Closed,
}

impl From<CallError> for SessionEnd {
    fn from(error: CallError) -> Self {
        Self::Failed(error)
    }
}

impl Watcher {
    pub(crate) fn new(
        dialer: Dialer,
        pace: WatchIntervals,
        out: mpsc::Sender<StoreInput>,
        requests: mpsc::Receiver<WatcherRequest>,
    ) -> Self {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let files = dialer.files();
        Self { dialer, pace, rng: StdRng::from_os_rng(), out, requests, files, served: false, backoff }
    }

    /// Runs until nobody listens.
    pub(crate) async fn run(mut self) {
        let mut members = self.members();
        let mut turn = 0;
        let mut generation = 0u64;
        let mut failures = 0usize;
        loop {
            if self.dialer.reread_members() {
                (members, turn) = (self.members(), 0);
            }
            let member = &members[turn % members.len()];
            turn += 1;
            generation += 1;
            self.files = self.dialer.files();
            let error = match self.dialer.open(member, generation).await {
                Ok(session) => match self.serve(&session).await {
                    SessionEnd::Closed => return,
                    SessionEnd::Failed(error) => EtcdFailure::from(&error),
                    SessionEnd::Suspected => EtcdFailure::new(FailureKind::Silent, "a call went without an answer"),
                    SessionEnd::Renewed => continue,
                },
                Err(error) => EtcdFailure::from(&error),
            };
            failures = if self.served { 1 } else { failures + 1 };
            self.served = false;
            // The control plane says that etcd is away. Then each further member once, and a reminder now and then: an outage
            // of days must not fill the log.
            if (2..=members.len()).contains(&failures) || failures.is_multiple_of(REMINDER) {
                warn!(endpoint = %member, %error, failures, "etcd member unavailable; trying the next");
            } else {
                debug!(endpoint = %member, %error, failures, "etcd member unavailable; trying the next");
            }
            let endpoint = member.to_string();
            if self.out.send(StoreInput::Disconnected { endpoint, error }).await.is_err() {
                return;
            }
            let delay = self.backoff.next(&mut self.rng);
            if self.unless_closed(tokio::time::sleep(delay)).await.is_err() {
                return;
            }
        }
    }

    /// Nodes spread over the members, and over the order in which they try them.
    fn members(&mut self) -> Vec<EtcdMember> {
        let mut members = self.dialer.members().to_vec();
        members.shuffle(&mut self.rng);
        members
    }

    async fn serve(&mut self, session: &Session) -> SessionEnd {
        match self.follow(session).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn follow(&mut self, session: &Session) -> Result<Infallible, SessionEnd> {
        let mut announced = false;
        loop {
            let listing = self.unless_closed(session.list()).await??;
            let (revision, cluster) = (listing.revision, listing.cluster);
            let mut watch = self.unless_closed(session.watch(revision + 1, cluster)).await??;
            if !announced {
                info!(endpoint = %session.member(), revision, keys = listing.entries.len(), "connected to etcd");
                self.send(StoreInput::Connected(Box::new(session.clone()))).await?;
                announced = true;
            }
            self.send(StoreInput::Listed(listing)).await?;
            let mut trial = WatchTrial::new(Instant::now());
            let ended = self.watch_until_compacted(session, cluster, &mut watch, &mut trial).await;
            if trial.passed(Instant::now()) {
                self.backoff.reset();
                self.served = true;
            }
            ended?;
            info!(endpoint = %session.member(), "watch fell behind a compaction; listing again");
            let delay = self.backoff.next(&mut self.rng);
            self.unless_closed(tokio::time::sleep(delay)).await?;
        }
    }

    async fn watch_until_compacted(
        &mut self,
        session: &Session,
        cluster: Option<ClusterId>,
        watch: &mut Watch,
        trial: &mut WatchTrial,
    ) -> Result<(), SessionEnd> {
        let mut last_sign = Instant::now();
        let mut asked = false;
        let mut audit = Audit::Waiting { until: Instant::now() + self.audit_interval() };
        let mut deleted_since = BTreeSet::new();
        let mut look_at_files = interval(self.pace.idle);
        look_at_files.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let silence_ends = last_sign + self.pace.idle + if asked { CALL_DEADLINE } else { Duration::ZERO };
            tokio::select! {
                message = watch.message() => {
                    last_sign = Instant::now();
                    asked = false;
                    match message? {
                        WatchMessage::Events(events) => {
                            if !matches!(audit, Audit::Waiting { .. }) {
                                deleted_since.extend(events.iter().filter_map(|event| match event {
                                    WatchEvent::Delete { key, .. } => Some(key.clone()),
                                    WatchEvent::Put(_) => None,
                                }));
                            }
                            self.send(StoreInput::Changed(events)).await?;
                            trial.delivered = true;
                        }
                        WatchMessage::Progress => trial.delivered = true,
                        WatchMessage::Compacted => return Ok(()),
                    }
                }
                () = tokio::time::sleep_until(silence_ends) => {
                    if asked {
                        let silent = EtcdFailure::new(FailureKind::Silent, "the watch gives no sign of life");
                        return Err(CallError::Indeterminate(silent).into());
                    }
                    debug!(endpoint = %session.member(), "watch silent; requesting progress");
                    watch.request_progress().await?;
                    asked = true;
                }
                _ = look_at_files.tick() => {
                    if self.renewed(session).await {
                        return Err(SessionEnd::Renewed);
                    }
                }
                step = audit.step() => {
                    let step = step?;
                    if let Some(listing) = &step {
                        same_cluster(cluster, listing.cluster)?;
                    }
                    audit = self.audit_on(session, audit, step, &mut deleted_since).await?;
                }
                request = self.requests.recv() => match request {
                    Some(WatcherRequest::Suspect { generation }) if generation == session.generation() => {
                        return Err(SessionEnd::Suspected);
                    }
                    Some(WatcherRequest::Suspect { .. }) => {}
                    Some(WatcherRequest::ListAgain) => {
                        if let Audit::Waiting { until } = &mut audit {
                            let soon = self.pace.confirm.mul_f64(self.rng.random_range(0.5..1.5));
                            *until = (*until).min(Instant::now() + soon);
                        }
                    }
                    None => return Err(SessionEnd::Closed),
                },
            }
        }
    }

    /// The stage of the audit behind `audit`, whose outcome is `step`.
    async fn audit_on(
        &mut self,
        session: &Session,
        audit: Audit,
        step: Option<KeyListing>,
        deleted_since: &mut BTreeSet<String>,
    ) -> Result<Audit, SessionEnd> {
        Ok(match (audit, step) {
            (Audit::Waiting { .. }, _) => {
                deleted_since.clear();
                let session = session.clone();
                Audit::Listing(Box::pin(async move { session.list().await }))
            }
            (Audit::Listing(_), Some(listing)) => {
                Audit::Grace { until: Instant::now() + self.pace.audit_grace, listing }
            }
            (Audit::Grace { listing, .. }, _) => {
                let deleted_since = std::mem::take(deleted_since);
                self.send(StoreInput::Audited { listing, deleted_since }).await?;
                Audit::Waiting { until: Instant::now() + self.audit_interval() }
            }
            (listing @ Audit::Listing(_), None) => listing,
        })
    }

    /// Whether the files have changed, and serve. If they do not, the session from before goes on.
    async fn renewed(&mut self, session: &Session) -> bool {
        let files = self.dialer.files();
        if files == self.files {
            return false;
        }
        self.files = files;
        let tried = async {
            let tried = self.dialer.open(session.member(), session.generation()).await?;
            tried.list_below("config").await.map_err(OpenError::from)
        };
        match tried.await {
            Ok(_) => {
                info!(endpoint = %session.member(), "etcd credentials or endpoints changed; reconnecting");
                true
            }
            Err(error) => {
                warn!(endpoint = %session.member(), %error, "new etcd credentials or endpoints rejected; keeping the current \
                    connection");
                false
            }
        }
    }

    fn audit_interval(&mut self) -> Duration {
        self.pace.audit.mul_f64(self.rng.random_range(0.8..1.2))
    }

    async fn send(&self, input: StoreInput) -> Result<(), SessionEnd> {
        self.out.send(input).await.map_err(|_| SessionEnd::Closed)
    }

    async fn unless_closed<T>(&self, call: impl Future<Output = T>) -> Result<T, SessionEnd> {
        tokio::select! {
            result = call => Ok(result),
            () = self.out.closed() => Err(SessionEnd::Closed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_counts_once_it_stood_or_brought_something() {
        let now = Instant::now();
        let mut trial = WatchTrial::new(now);
        assert!(!trial.passed(now));
        assert!(!trial.passed(now + STANDS - Duration::from_millis(1)));
        assert!(trial.passed(now + STANDS));
        trial.delivered = true;
        assert!(trial.passed(now));
    }
}
