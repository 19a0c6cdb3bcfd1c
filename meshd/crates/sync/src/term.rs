//! One term: followers of the API server, the copier, and its transactions.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use control::session::Session;
use control_core::types::{CallError, KeyListing, Transaction};
use humantime::format_rfc3339_seconds;
use sync_core::{
    ClusterKeys, Copier, Effect, Input, MeshNode, Notice, Now, ObjectKind, Refused, Resigned,
    blocks::{self, NodeBlocks},
    conditions::{Conditions, Patch},
    mesh_nodes, refused,
};
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{Api, ApiError},
    election::Leadership,
    follow::{Follower, WatchEvents},
    monitor::SyncMetrics,
};

/// How often the API server is asked whether it is there, and how long it may take.
const ASK_PERIOD: Duration = Duration::from_secs(10);
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// How often the nodes of the mesh are read.
const NODES_PERIOD: Duration = Duration::from_secs(2);

/// Messages of followers that wait; a page counts as one.
const QUEUE: usize = 16;

/// Events that wait to be made.
const EVENTS: usize = 256;

/// How a term ended.
#[derive(Debug)]
pub(crate) enum TermEnd {
    /// The process is to end.
    Stopped,
    /// The lease may be gone.
    Lost,
    /// The copier resigned.
    Resigned(Resigned),
    /// etcd did not answer at the term's begin.
    Etcd(CallError),
}

/// A running term.
struct Term<'a> {
    session: &'a Session,
    keys: &'a ClusterKeys,
    leadership: &'a mut Leadership,
    api: &'a Arc<Api>,
    copier: Copier,
    conditions: Conditions,
    followers: Followers,
    answers: mpsc::Sender<Input>,
    events: mpsc::Sender<Refused>,
    shown: &'a watch::Sender<SyncMetrics>,
    begun: Instant,
}

/// The followers of one term, or of a trial.
pub(crate) struct Followers {
    api: Arc<Api>,
    to: mpsc::Sender<WatchEvents>,
    running: HashMap<ObjectKind, (u64, AbortHandle)>,
    serial: u64,
}

impl Followers {
    /// No followers yet; their events arrive at the receiver.
    pub(crate) fn new(api: Arc<Api>) -> (Self, mpsc::Receiver<WatchEvents>) {
        let (to, heard) = mpsc::channel(QUEUE);
        (Self { api, to, running: HashMap::new(), serial: 0 }, heard)
    }

    /// Lists the kind after this time, in place of the follower that it has.
    pub(crate) fn start(&mut self, kind: ObjectKind, after: Duration) {
        self.serial += 1;
        let follower = Follower { api: Arc::clone(&self.api), kind, serial: self.serial, to: self.to.clone() };
        let task = tokio::spawn(follower.run(after)).abort_handle();
        if let Some((_, old)) = self.running.insert(kind, (self.serial, task)) {
            old.abort();
        }
    }

    /// The events, unless of a replaced follower.
    pub(crate) fn accept(&self, heard: WatchEvents) -> Option<WatchEvents> {
        let current = self.running.get(&heard.kind).is_some_and(|(serial, _)| *serial == heard.serial);
        current.then_some(heard)
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        for (_, task) in self.running.values() {
            task.abort();
        }
    }
}

/// Copies until the term ends.
pub(crate) async fn run(
    api: &Arc<Api>,
    session: &Session,
    keys: &ClusterKeys,
    holder: &str,
    leadership: &mut Leadership,
    shown: &watch::Sender<SyncMetrics>,
    stop: &CancellationToken,
) -> TermEnd {
    let begun = Instant::now();
    let listing = match session.list_below(keys.root()).await {
        Ok(listing) => listing,
        Err(error) => return TermEnd::Etcd(error),
    };
    let copier = Copier::new(keys.clone(), holder.to_owned(), leadership.fence, &listing, now(begun));
    drop(listing);
    let (mut followers, mut heard) = Followers::new(Arc::clone(api));
    for kind in ObjectKind::ALL {
        followers.start(kind, Duration::ZERO);
    }
    let (answers, mut answered) = mpsc::channel(4);
    let _asker = AbortOnDrop(tokio::spawn(ask(Arc::clone(api), answers.clone())).abort_handle());
    let conditions = Conditions::default();
    let (events, refused) = mpsc::channel(EVENTS);
    let (complete, nodes_complete) = watch::channel(false);
    let reader = NodesReader {
        session: session.clone(),
        keys: keys.clone(),
        blocks: NodeBlocks::new(keys.cluster().clone(), leadership.fence, now(begun)),
        complete: nodes_complete,
        events: events.clone(),
        begun,
    };
    let _reader = AbortOnDrop(tokio::spawn(reader.run(answers.clone())).abort_handle());
    let _teller = AbortOnDrop(tokio::spawn(tell_owners(Arc::clone(api), holder.to_owned(), refused)).abort_handle());
    let mut term =
        Term { session, keys, leadership, api, copier, conditions, followers, answers, events, shown, begun };
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let input = tokio::select! {
            biased;
            () = stop.cancelled() => return TermEnd::Stopped,
            () = term.leadership.lost() => return TermEnd::Lost,
            Some(answer) = answered.recv() => answer,
            _ = ticks.tick() => Input::Tick,
            Some(heard) = heard.recv() => match term.hear(heard) {
                Some(input) => input,
                None => continue,
            },
        };
        term.patch_nodes(&input);
        term.tell_owners(&input);
        let ticked = matches!(input, Input::Tick);
        if let Some(end) = term.step(input) {
            return end;
        }
        if ticked {
            let report = term.copier.report(now(begun));
            term.shown.send_modify(|shown| shown.report = report);
            complete.send_replace(term.copier.is_complete(ObjectKind::Node) && term.leadership.holds());
        }
    }
}

/// Checks that the API server answers: a connection to a hung one does not end.
async fn ask(api: Arc<Api>, answers: mpsc::Sender<Input>) {
    let mut period = interval(ASK_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let input = match timeout(ASK_DEADLINE, api.cluster_uid()).await {
            Ok(Ok(uid)) => Input::Answers { uid },
            Ok(Err(_)) | Err(_) => Input::Silent,
        };
        if answers.send(input).await.is_err() {
            return;
        }
    }
}

/// Reads the nodes of the mesh, and keeps their blocks of addresses.
struct NodesReader {
    session: Session,
    keys: ClusterKeys,
    blocks: NodeBlocks,
    /// Whether every Node object is copied, and nothing that is absent is doubted.
    complete: watch::Receiver<bool>,
    events: mpsc::Sender<Refused>,
    begun: Instant,
}

impl NodesReader {
    /// An etcd that does not answer ends the term by its lease.
    async fn run(mut self, answers: mpsc::Sender<Input>) {
        let mut period = interval(NODES_PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut failing, mut blocks_failing) = (false, false);
        loop {
            period.tick().await;
            // Read before the lists: they contain all that was complete then.
            let complete = *self.complete.borrow();
            let input = match list(&self.session, &mesh_nodes::LISTED).await {
                Ok(lists) => {
                    failing = false;
                    let nodes = mesh_nodes(&lists);
                    // Rights that are missing here stop no copy.
                    match self.keep_blocks(complete, &nodes, lists).await {
                        Ok(()) => blocks_failing = false,
                        Err(error) if std::mem::replace(&mut blocks_failing, true) => {
                            tracing::debug!(%error, "cannot keep blocks of addresses");
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot keep blocks of addresses: see meshctl etcd-roles --sync");
                        }
                    }
                    Input::Nodes(nodes)
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot read the nodes of the mesh: see meshctl etcd-roles --sync");
                    }
                    Input::NodesUnknown(format!("{error}; see meshctl etcd-roles --sync"))
                }
            };
            if answers.send(input).await.is_err() {
                return;
            }
        }
    }

    /// Reserves podCIDRs, and gives up blocks of nodes that are gone.
    async fn keep_blocks(
        &mut self,
        complete: bool,
        nodes: &[MeshNode],
        mut lists: Vec<KeyListing>,
    ) -> Result<(), CallError> {
        lists.extend(list(&self.session, &blocks::LISTED).await?);
        lists.extend(list(&self.session, &[&self.keys.directory(ObjectKind::Node)]).await?);
        let step = self.blocks.step(now(self.begun), complete, nodes, &lists);
        for notice in step.notices {
            tracing::error!("{notice}");
            let _full = self.events.try_send(notice.refused());
        }
        let Some(transaction) = step.transaction else { return Ok(()) };
        // If it fails, something changed meanwhile: the next lists have it.
        if self.session.transact(&transaction).await?.succeeded {
            tracing::info!(keys = transaction.writes.len(), "address blocks written");
        }
        Ok(())
    }
}

async fn list(session: &Session, prefixes: &[&str]) -> Result<Vec<KeyListing>, CallError> {
    let mut lists = Vec::new();
    for prefix in prefixes {
        lists.push(session.list_below(prefix).await?);
    }
    Ok(lists)
}

/// Sends a patch. A failed one is sent again once the next check finds the object unchanged.
async fn patch_node(api: Arc<Api>, patch: Patch, deadline: Duration) {
    let end = Instant::now() + deadline;
    let Patch { node, conditions, untaint } = &patch;
    let result = async {
        // First, because the other patch makes another resource version of it.
        if let Some(untaint) = untaint {
            api.patch_node(node, &untaint.patch(), end.saturating_duration_since(Instant::now())).await?;
        }
        if let Some(network) = conditions {
            let body = network.status_patch(&format_rfc3339_seconds(SystemTime::now()).to_string());
            api.patch_node_status(node, &body, end.saturating_duration_since(Instant::now())).await?;
        }
        Ok::<_, ApiError>(())
    };
    match result.await {
        Ok(()) => tracing::info!(node, conditions = ?conditions, untainted = untaint.is_some(), "node patched"),
        Err(error) => tracing::warn!(node, %error, "node not patched; trying again"),
    }
}

/// Makes Events, one after the other.
async fn tell_owners(api: Arc<Api>, holder: String, mut refused: mpsc::Receiver<Refused>) {
    while let Some(refused) = refused.recv().await {
        let event = refused.event(&holder, &format_rfc3339_seconds(SystemTime::now()).to_string());
        if let Err(error) = api.create_event(refused.namespace(), &event).await {
            tracing::warn!(object = refused.path, %error, "event not made");
        }
    }
}

/// Ends a task with its owner.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Term<'_> {
    /// Processes a follower's Node events; returns the copier's input.
    fn hear(&mut self, heard: WatchEvents) -> Option<Input> {
        let WatchEvents { input, nodes, .. } = self.followers.accept(heard)?;
        nodes.into_iter().for_each(|node| self.conditions.applied(node));
        match &input {
            Input::ListBegun { kind: ObjectKind::Node, .. } => self.conditions.list_begun(),
            Input::ListEnded { kind: ObjectKind::Node, .. } => self.conditions.list_ended(),
            Input::Deleted(object) if object.kind == ObjectKind::Node => self.conditions.deleted(&object.path),
            _ => {}
        }
        Some(input)
    }

    /// Patches Nodes, unless the copy is of another cluster.
    fn patch_nodes(&mut self, input: &Input) {
        match input {
            Input::Nodes(nodes) => self.conditions.mesh(nodes.clone()),
            Input::NodesUnknown(_) => self.conditions.mesh_unknown(),
            _ => return,
        }
        if self.copier.refusal().is_some() || !self.leadership.holds() {
            return;
        }
        for patch in self.conditions.step(now(self.begun).monotonic) {
            // A patch that would arrive later might be behind those of the next leader.
            tokio::spawn(patch_node(Arc::clone(self.api), patch, self.leadership.remaining()));
        }
    }

    /// Creates Events on objects that nodes refuse. With many at once, some follow at the next list.
    fn tell_owners(&self, input: &Input) {
        let objects = match input {
            Input::Page { objects, .. } => objects.as_slice(),
            Input::Applied(object) => std::slice::from_ref(object),
            _ => return,
        };
        if self.copier.refusal().is_none() {
            for refused in objects.iter().filter_map(|object| refused(self.keys, object)) {
                let Refused { kind, path, message, .. } = &refused;
                tracing::warn!(kind = kind.name(), object = path, message, "nodes refuse an object");
                let _full = self.events.try_send(refused);
            }
        }
    }

    fn step(&mut self, input: Input) -> Option<TermEnd> {
        for effect in self.copier.step(now(self.begun), input) {
            match effect {
                Effect::Write(transaction) => {
                    // The fence would stop it; a process that was paused need not even try.
                    if !self.leadership.holds() {
                        return Some(TermEnd::Lost);
                    }
                    self.write(transaction);
                }
                Effect::List { kind, after } => self.followers.start(kind, after),
                Effect::ReadConfirm => self.read_confirm(),
                Effect::Notice(notice) => log_notice(&notice),
                Effect::Resign(reason) => return Some(TermEnd::Resigned(reason)),
            }
        }
        None
    }

    fn write(&self, transaction: Transaction) {
        let (session, answers) = (self.session.clone(), self.answers.clone());
        tokio::spawn(async move {
            let result = session.transact(&transaction).await;
            // If the term is over, the receiver is gone.
            let _ = answers.send(Input::Written(result)).await;
        });
    }

    fn read_confirm(&self) {
        let (session, answers, key) = (self.session.clone(), self.answers.clone(), self.keys.confirm());
        tokio::spawn(async move {
            if let Ok(listing) = session.list_below(&key).await {
                let entry = listing.entries.into_iter().find(|entry| entry.key == key);
                let _ = answers.send(Input::Confirm(entry)).await;
            }
        });
    }
}

/// The time of a step; `begun` is any moment before.
pub(crate) fn now(begun: Instant) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Now { monotonic: begun.elapsed(), unix }
}

pub(crate) fn log_notice(notice: &Notice) {
    if notice.is_error() {
        tracing::error!(%notice, "copy refused");
    } else {
        tracing::warn!(%notice, "copy");
    }
}
