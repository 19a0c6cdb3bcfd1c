//! One task a kind: list, then watch from where the list ended, and again when the history is gone.

use std::{sync::Arc, time::Duration};

use control_core::backoff::Backoff;
use futures_util::StreamExt as _;
use serde_json::value::RawValue;
use sync_core::{
    Input, ObjectKind,
    canonical::{self, CanonicalObject},
    conditions::NodeConditions,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use crate::api::{Api, ApiError, Resource, WatchLine};

/// How often a definition that the cluster lacks is looked for.
const DEFINITION_PERIOD: Duration = Duration::from_secs(10);

/// After a watch of this time, listing again is no repetition.
const LONG_WATCH: Duration = Duration::from_secs(60);

/// Events of a follower, with its number: those of a replaced follower are ignored.
pub(crate) struct WatchEvents {
    pub(crate) kind: ObjectKind,
    pub(crate) serial: u64,
    pub(crate) input: Input,
    /// The Nodes in `input`, with fields that the copy omits.
    pub(crate) nodes: Vec<NodeConditions>,
}

/// Follows one kind until the receiver is gone.
pub(crate) struct Follower {
    pub(crate) api: Arc<Api>,
    pub(crate) kind: ObjectKind,
    pub(crate) serial: u64,
    pub(crate) to: mpsc::Sender<WatchEvents>,
}

/// Why following stopped.
enum Stop {
    /// The receiver is gone.
    Closed,
    /// List again.
    Again,
    Failed(ApiError),
}

impl From<ApiError> for Stop {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Expired => Self::Again,
            error => Self::Failed(error),
        }
    }
}

impl Follower {
    pub(crate) async fn run(self, after: Duration) {
        sleep(after).await;
        let mut backoff = backoff();
        let mut failing = false;
        loop {
            let began = Instant::now();
            match self.list_and_watch(&mut failing).await {
                Stop::Closed => return,
                Stop::Again => {
                    if began.elapsed() >= LONG_WATCH {
                        backoff = self::backoff();
                    }
                    // A server whose history is always too short is not asked without a pause.
                    pause(&mut backoff).await;
                }
                Stop::Failed(error) => {
                    self.tell_failure(&error, &mut failing);
                    if self.send(Input::Interrupted { kind: self.kind }).await.is_err() {
                        return;
                    }
                    pause(&mut backoff).await;
                }
            }
        }
    }

    async fn list_and_watch(&self, failing: &mut bool) -> Stop {
        let result = async {
            let uid = self.api.cluster_uid().await?;
            self.send(Input::ListBegun { kind: self.kind, uid }).await?;
            if self.kind != ObjectKind::ClusterNetworkPolicy {
                return self.follow(&Resource::built_in(self.kind), failing).await;
            }
            let definition = self.api.policy_definition().await?;
            match definition.resource {
                Some(resource) => self.follow(&resource, failing).await,
                None => self.await_definition(definition.resource_version, failing).await,
            }
        };
        result.await.err().unwrap_or(Stop::Again)
    }

    /// There are no objects of a kind that is not defined.
    async fn await_definition(&self, resource_version: String, failing: &mut bool) -> Result<(), Stop> {
        let kind = self.kind;
        let page = Input::Page { kind, resource_version: resource_version.clone(), objects: Vec::new() };
        self.send(page).await?;
        self.send(Input::ListEnded { kind, uid: self.api.cluster_uid().await? }).await?;
        loop {
            self.tell_success(failing);
            self.send(Input::Watching { kind, uid: self.api.cluster_uid().await? }).await?;
            sleep(DEFINITION_PERIOD).await;
            let definition = self.api.policy_definition().await?;
            if definition.resource.is_some() {
                return Ok(());
            }
            // There is no watch to say so.
            self.send(Input::Bookmark { kind, resource_version: definition.resource_version }).await?;
        }
    }

    async fn follow(&self, resource: &Resource, failing: &mut bool) -> Result<(), Stop> {
        let kind = self.kind;
        let mut next = None;
        let mut version;
        loop {
            let page = self.api.page(resource, next.as_deref()).await?;
            version = page.resource_version;
            let objects = page.items.iter().filter_map(|item| self.read(resource, item)).collect();
            let nodes = page.items.iter().filter_map(|item| self.read_node(item)).collect();
            self.tell_with(Input::Page { kind, resource_version: version.clone(), objects }, nodes).await?;
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        self.send(Input::ListEnded { kind, uid: self.api.cluster_uid().await? }).await?;
        let mut backoff = backoff();
        loop {
            match self.watch(resource, &mut version, failing).await {
                Ok(()) => backoff = self::backoff(),
                Err(Stop::Failed(ApiError::NotFound)) => return Err(Stop::Failed(ApiError::NotFound)),
                Err(Stop::Failed(error)) => {
                    self.tell_failure(&error, failing);
                    self.send(Input::Interrupted { kind }).await?;
                    pause(&mut backoff).await;
                }
                Err(stop) => return Err(stop),
            }
        }
    }

    /// Runs one watch until the server ends it.
    async fn watch(&self, resource: &Resource, version: &mut String, failing: &mut bool) -> Result<(), Stop> {
        let kind = self.kind;
        let mut lines = std::pin::pin!(self.api.watch(resource, version).await?);
        // Whose events these are is asked after the connection is there.
        self.send(Input::Watching { kind, uid: self.api.cluster_uid().await? }).await?;
        self.tell_success(failing);
        while let Some(line) = lines.next().await {
            let mut nodes = Vec::new();
            let input = match line? {
                WatchLine::Bookmark { resource_version } => {
                    version.clone_from(&resource_version);
                    Some(Input::Bookmark { kind, resource_version })
                }
                WatchLine::Applied(raw) => {
                    nodes.extend(self.read_node(&raw));
                    self.read(resource, &raw).map(Input::Applied)
                }
                WatchLine::Deleted(raw) => self.read(resource, &raw).map(Input::Deleted),
            };
            let Some(input) = input else { continue };
            if let Input::Applied(object) | Input::Deleted(object) = &input {
                version.clone_from(&object.resource_version);
            }
            self.tell_with(input, nodes).await?;
        }
        Ok(())
    }

    fn read_node(&self, raw: &RawValue) -> Option<NodeConditions> {
        (self.kind == ObjectKind::Node).then(|| NodeConditions::read(raw.get()).ok()).flatten()
    }

    fn read(&self, resource: &Resource, raw: &RawValue) -> Option<CanonicalObject> {
        match canonical::read(resource.kind, &resource.api_version, raw.get()) {
            Ok(object) => {
                if object.verbatim {
                    tracing::warn!(kind = self.kind.name(), object = object.path, "unexpected shape; copied as it is");
                }
                Some(object)
            }
            Err(error) => {
                tracing::error!(%error, "object left out");
                None
            }
        }
    }

    async fn send(&self, input: Input) -> Result<(), Stop> {
        self.tell_with(input, Vec::new()).await
    }

    async fn tell_with(&self, input: Input, nodes: Vec<NodeConditions>) -> Result<(), Stop> {
        let heard = WatchEvents { kind: self.kind, serial: self.serial, input, nodes };
        self.to.send(heard).await.map_err(|_| Stop::Closed)
    }

    fn tell_failure(&self, error: &ApiError, failing: &mut bool) {
        if !std::mem::replace(failing, true) {
            tracing::warn!(kind = self.kind.name(), %error, "API server not followed; trying again");
        }
    }

    fn tell_success(&self, failing: &mut bool) {
        if std::mem::take(failing) {
            tracing::info!(kind = self.kind.name(), "API server followed again");
        }
    }
}

/// Waits before the next attempt.
pub(crate) async fn pause(backoff: &mut Backoff) {
    let delay = backoff.next(&mut rand::rng());
    sleep(delay).await;
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15))
}
