//! The task around [`ControlCore`]: takes to it what happens, and does what it decides. A call has a short-lived task
//! of its own.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use control_core::{
    core::{ControlCore, ControlStatus, Effect, Input},
    endpoints::EndpointRecords,
    membership::{Call, CallAnswer, CallId, Identity, LocalFacts},
    objects::ObjectSink,
    store::Accepted,
    types::CallError,
};
use etcd_schema::SubnetKey;
use mesh::records::Records;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    cache::CachedRecords,
    predecessor,
    session::Session,
    state_dir::StateDir,
    watcher::{StoreInput, WatcherRequest},
};

/// Where inputs come from.
pub(crate) struct InputChannels {
    pub(crate) store: mpsc::Receiver<StoreInput>,
    pub(crate) answers: mpsc::Receiver<Input>,
    pub(crate) facts: watch::Receiver<LocalFacts>,
    pub(crate) attached: watch::Receiver<bool>,
    pub(crate) idle: watch::Receiver<BTreeSet<SubnetKey>>,
    pub(crate) endpoints: watch::Receiver<Option<EndpointRecords>>,
    pub(crate) acceptance: mpsc::Receiver<oneshot::Sender<Accepted>>,
}

pub(crate) struct Shell {
    pub(crate) core: ControlCore,
    pub(crate) session: Option<Session>,
    pub(crate) records: watch::Sender<Arc<Records>>,
    pub(crate) status: watch::Sender<ControlStatus>,
    pub(crate) objects: Option<Arc<dyn ObjectSink>>,
    /// Answers to calls.
    pub(crate) answers: mpsc::Sender<Input>,
    pub(crate) requests: mpsc::Sender<WatcherRequest>,
    /// The waiting caller of an acceptance.
    pub(crate) accepting: Option<oneshot::Sender<Accepted>>,
    pub(crate) state: Arc<StateDir>,
    /// The cache write in flight; returns its duration.
    pub(crate) writing: Option<JoinHandle<Duration>>,
    pub(crate) run_dir: PathBuf,
    pub(crate) identity: Identity,
}

impl Shell {
    pub(crate) async fn run(mut self, mut inputs: InputChannels, stop: &CancellationToken) {
        self.step(Input::Started);
        loop {
            let input = tokio::select! {
                input = inputs.store.recv() => match input {
                    Some(input) => self.store_input(input),
                    None => break,
                },
                Some(answer) = inputs.answers.recv() => answer,
                Ok(()) = inputs.facts.changed() => Input::Facts(Box::new(inputs.facts.borrow_and_update().clone())),
                Ok(()) = inputs.attached.changed() => Input::Attached(*inputs.attached.borrow_and_update()),
                Ok(()) = inputs.idle.changed() => Input::Idle(inputs.idle.borrow_and_update().clone()),
                Ok(()) = inputs.endpoints.changed() => {
                    Input::EndpointsWanted(inputs.endpoints.borrow_and_update().clone())
                }
                Some(waits) = inputs.acceptance.recv() => {
                    self.accepting = Some(waits);
                    Input::Accept
                }
                () = sleep_until(self.core.next_deadline()) => Input::Tick,
                took = written(&mut self.writing) => Input::CacheWritten(took),
                () = stop.cancelled() => break,
            };
            self.step(input);
        }
        // The lock on the state directory goes only after the last write to it.
        if self.writing.is_some() {
            written(&mut self.writing).await;
        }
        if self.core.is_unsaved() {
            self.write_cache();
            written(&mut self.writing).await;
        }
    }

    fn store_input(&mut self, input: StoreInput) -> Input {
        match input {
            StoreInput::Connected(session) => {
                let connected =
                    Input::Connected { member: session.member().to_string(), session: session.generation() };
                self.session = Some(*session);
                connected
            }
            StoreInput::Disconnected { endpoint, error } => {
                self.session = None;
                Input::Disconnected { member: endpoint, error }
            }
            StoreInput::Listed(listing) => Input::Listed(listing),
            StoreInput::Changed(events) => Input::Changed(events),
            StoreInput::Audited { listing, deleted_since } => Input::Audited { listing, deleted_since },
        }
    }

    fn step(&mut self, input: Input) {
        for effect in self.core.step(Instant::now(), input) {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Publish(records) => drop(self.records.send_replace(records)),
            Effect::Status(status) => drop(self.status.send_replace(*status)),
            Effect::Call(id, call) => self.call(id, call),
            Effect::WriteEndpoints(transaction) => self.ask(async move |session| {
                let written = match &session {
                    Some(session) => session.transact(&transaction).await,
                    None => Err(not_connected()),
                };
                Input::EndpointsWritten(written, number(session.as_ref()))
            }),
            Effect::LookBack { key, at } => self.ask(async move |session| {
                Input::Earlier(match session {
                    Some(session) => session.get_at(&key, at).await,
                    None => Err(not_connected()),
                })
            }),
            Effect::Suspect(generation) => self.request(WatcherRequest::Suspect { generation }),
            Effect::ListAgain => self.request(WatcherRequest::ListAgain),
            Effect::HandOn { changes, revision, complete } => {
                if let Some(objects) = &self.objects {
                    objects.changed(changes, revision, complete);
                }
            }
            Effect::WriteCache => self.write_cache(),
            Effect::NoteIdentity(true) => predecessor::save(&self.run_dir, &self.identity),
            Effect::NoteIdentity(false) => predecessor::remove(&self.run_dir),
            Effect::Accepted(accepted) => {
                // The caller may have gone.
                let _gone = self.accepting.take().map(|waits| waits.send(accepted));
            }
        }
    }

    fn call(&self, id: CallId, call: Call) {
        self.ask(async move |session| {
            let answer = match (&session, call) {
                (Some(session), Call::Grant { ttl }) => CallAnswer::Granted(session.grant(ttl).await),
                (Some(session), Call::KeepAlive { lease }) => CallAnswer::KeptAlive(session.keep_alive(lease).await),
                (Some(session), Call::Transact(transaction)) => {
                    CallAnswer::Committed(session.transact(&transaction).await)
                }
                (None, Call::Grant { .. }) => CallAnswer::Granted(Err(not_connected())),
                (None, Call::KeepAlive { .. }) => CallAnswer::KeptAlive(Err(not_connected())),
                (None, Call::Transact(_)) => CallAnswer::Committed(Err(not_connected())),
            };
            Input::Answer(id, answer, number(session.as_ref()))
        });
    }

    /// Has the answer of a call on the session in use come in as an input.
    fn ask<F>(&self, call: impl FnOnce(Option<Session>) -> F)
    where
        F: Future<Output = Input> + Send + 'static,
    {
        let (call, answers) = (call(self.session.clone()), self.answers.clone());
        tokio::spawn(async move {
            // An answer has no reader only when everything is being stopped.
            let _stopped = answers.send(call.await).await;
        });
    }

    fn request(&self, request: WatcherRequest) {
        // A full queue already holds the same suspicion, and a list follows from that as well.
        let _full = self.requests.try_send(request);
    }

    fn write_cache(&mut self) {
        let begin = Instant::now();
        let content = self.core.cache();
        let (collected, state) = (begin.elapsed(), Arc::clone(&self.state));
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let begin = Instant::now();
            if let Err(error) = CachedRecords::of(content, SystemTime::now()).save(state.path()) {
                warn!(%error, "cannot write the cache; a start without etcd would use the previous one");
            }
            collected + begin.elapsed()
        }));
    }
}

fn not_connected() -> CallError {
    CallError::Indeterminate("not connected to etcd".into())
}

/// 0 is the number of no session.
fn number(session: Option<&Session>) -> u64 {
    session.map_or(0, Session::generation)
}

/// Waits for the end of the write under way; for ever without one.
async fn written(writing: &mut Option<JoinHandle<Duration>>) -> Duration {
    match writing {
        Some(write) => {
            // A panic in it has been printed.
            let took = write.await.unwrap_or_default();
            *writing = None;
            took
        }
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
