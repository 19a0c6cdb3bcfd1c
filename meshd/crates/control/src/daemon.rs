//! The control plane of this node: what it is started with, and the handle to it.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use control_core::{
    core::{CacheInfo, ControlCore, ControlStatus, Start},
    endpoints::EndpointRecords,
    membership::{Identity, LocalFacts, Membership},
    objects::ObjectSink,
    store::{Accepted, Store},
};
use etcd_schema::SubnetKey;
use mesh::records::Records;
use rand::Rng as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    cache::CachedRecords,
    etcd_options::{EtcdOptions, EtcdOptionsError},
    predecessor,
    session::Dialer,
    shell::{InputChannels, Shell},
    state_dir::StateDir,
    watcher::{WatchIntervals, Watcher},
};

/// Options of [`start`].
pub struct Options {
    /// Where etcd is.
    pub etcd: EtcdOptions,
    /// The locked state directory.
    pub state: StateDir,
    /// RUN, which no copy of the state directory comes with.
    pub run_dir: PathBuf,
    /// The facts that this node publishes; changes go through [`Control::facts`].
    pub facts: LocalFacts,
    /// Whether anything is attached to this node's subnet; changes go through [`Control::attached`].
    pub attached: bool,
    /// The reader of policies' inputs, which receives their changes.
    pub objects: Option<Arc<dyn ObjectSink>>,
    /// Mean time between two lists that prove that the watch loses nothing; 10 minutes by default.
    pub audit_interval: Duration,
}

/// The control plane of this node, running. Dropping it stops it; its keys stay in etcd.
#[derive(Debug)]
pub struct Control {
    /// All records in force. Starts with the cache (`Records::synced` is then false), or empty.
    pub records: watch::Receiver<Arc<Records>>,
    /// The status of this node.
    pub status: watch::Receiver<ControlStatus>,
    /// The facts that this node publishes.
    pub facts: watch::Sender<LocalFacts>,
    /// Whether anything is attached to this node's subnet.
    pub attached: watch::Sender<bool>,
    /// Earlier subnets of this node, without attachments.
    pub idle: watch::Sender<BTreeSet<SubnetKey>>,
    /// This node's `endpoints/` records; those in etcd are left alone until they are known.
    pub endpoints: watch::Sender<Option<EndpointRecords>>,
    /// Lets an operator accept this etcd.
    pub etcd_acceptor: EtcdAcceptor,
    /// The cache that the records started with.
    pub cached: Option<CacheInfo>,
    cancel: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// Lets go of records that stay in force without etcd, see [`Store::accept`].
#[derive(Debug, Clone)]
pub struct EtcdAcceptor(mpsc::Sender<oneshot::Sender<Accepted>>);

impl EtcdAcceptor {
    /// Accepts this etcd; `None`: the control plane has ended. Blocks until done: not for async code.
    #[must_use]
    pub fn accept(&self) -> Option<Accepted> {
        let (answer, answered) = oneshot::channel();
        self.0.blocking_send(answer).ok()?;
        answered.blocking_recv().ok()
    }
}
/// Starts the control plane; needs a tokio runtime. Returns at once: etcd may be away.
///
/// # Errors
/// Everything that is wrong with the etcd options.
pub fn start(options: Options) -> Result<Control, Vec<EtcdOptionsError>> {
    start_at_pace(options, None)
}

pub(crate) fn start_at_pace(options: Options, pace: Option<WatchIntervals>) -> Result<Control, Vec<EtcdOptionsError>> {
    let dialer = Dialer::new(&options.etcd)?;
    let pace = pace.unwrap_or_else(|| WatchIntervals { audit: options.audit_interval, ..WatchIntervals::default() });
    let mut identity = options.state.identity().clone();
    identity.predecessor = predecessor::load(&options.run_dir, &identity);
    let (core, cached) = core(&options, identity.clone());

    let (store_inputs_in, store_inputs) = mpsc::channel(64);
    let (requests, requests_out) = mpsc::channel(16);
    let (answers_in, answers) = mpsc::channel(16);
    let (acceptance_in, acceptance) = mpsc::channel(1);
    let (view_in, records) = watch::channel(core.records());
    let (status_in, status) = watch::channel(core.status().clone());
    let (facts, facts_out) = watch::channel(options.facts);
    let (attached, attached_out) = watch::channel(options.attached);
    let (idle, idle_out) = watch::channel(BTreeSet::new());
    let (endpoints, endpoints_out) = watch::channel(None);
    let cancel = CancellationToken::new();

    let watcher = tokio::spawn(Watcher::new(dialer, pace, store_inputs_in, requests_out).run());
    let shell = Shell {
        core,
        session: None,
        records: view_in,
        status: status_in,
        objects: options.objects,
        answers: answers_in,
        requests,
        accepting: None,
        state: Arc::new(options.state),
        writing: None,
        run_dir: options.run_dir,
        identity,
    };
    let inputs = InputChannels {
        store: store_inputs,
        answers,
        facts: facts_out,
        attached: attached_out,
        idle: idle_out,
        endpoints: endpoints_out,
        acceptance,
    };
    let stop = cancel.clone();
    let task = tokio::spawn(async move {
        shell.run(inputs, &stop).await;
        watcher.abort();
    });
    let etcd_acceptor = EtcdAcceptor(acceptance_in);
    Ok(Control { records, status, facts, attached, idle, endpoints, etcd_acceptor, cached, cancel, task: Some(task) })
}

/// The initial state machine, with the cache's content.
fn core(options: &Options, identity: Identity) -> (ControlCore, Option<CacheInfo>) {
    let cached = CachedRecords::load(options.state.path()).unwrap_or_else(|error| {
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
    let now = Instant::now();
    if let Some(cached) = cached {
        store = store.with_cache(cached.revision, cached.entries, now).recall(cached.evidence);
    }
    let seed = rand::rng().random();
    let start = Start {
        store,
        membership: Membership::new(now, identity, options.facts.clone(), previous, options.attached, seed),
        cache_usable: cache_info.is_some_and(|cache| cache.usable),
        hands_on: options.objects.is_some(),
    };
    (ControlCore::new(now, start), cache_info)
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
