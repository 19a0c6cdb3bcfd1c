//! The CNI plugin's requests; `cni::daemon` defines them.

use std::{sync::Arc, time::Duration};

use attachments::{AttachError, Attachments, addresses::AddressError};
use axum::{
    Json, Router,
    extract::{ConnectInfo, DefaultBodyLimit, Path, State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use cni::{
    daemon::{AddressRequest, Attach, Attached, BeginAdd, Begun, ENFORCEMENT, Network, Refusal, RefusalReason},
    environment::AttachmentName,
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{connection::Caller, source::Source};

/// Longest request in bytes; only labels can be long.
const MAX_REQUEST: usize = 256 << 10;
/// How long after its start the daemon may lack its subnets.
const STARTING: Duration = Duration::from_secs(3);
/// The interval of checks for them.
const PAUSE: Duration = Duration::from_millis(20);

/// State behind the requests.
struct Served {
    source: Arc<dyn Source>,
    attachments: Arc<Attachments>,
    started: Instant,
    /// How long an ADD waits for the Pod object.
    pod_wait: Duration,
}

type Shared = State<Arc<Served>>;

pub(super) fn router(source: Arc<dyn Source>, attachments: Arc<Attachments>, pod_wait: Duration) -> Router {
    let one = post(begin).put(attach).delete(detach).get(show);
    Router::new()
        .route("/v1/attachments", get(list))
        .route("/v1/attachments/{container}/{ifname}", one)
        .route("/v1/attachments-ready", get(ready).post(ready_with))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(Arc::new(Served { source, attachments, started: Instant::now(), pod_wait }))
}

async fn begin(
    State(served): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(name): Path<(String, String)>,
    begin: Result<Json<BeginAdd>, JsonRejection>,
) -> Result<Json<Begun>, RefusedRequest> {
    may_change(caller)?;
    let Json(begin) = begin.map_err(malformed)?;
    let network = served.await_network().await?;
    let attachments = Arc::clone(&served.attachments);
    blocking(move || {
        let addresses = attachments.begin(&attachment(name), begin, &network, caller.arrival)?;
        Ok(Json(Begun { network, addresses }))
    })
    .await
}

async fn attach(
    State(served): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(name): Path<(String, String)>,
    attach: Result<Json<Attach>, JsonRejection>,
) -> Result<StatusCode, RefusedRequest> {
    may_change(caller)?;
    let Json(attach) = attach.map_err(malformed)?;
    for prefix in &attach.allowed_sources {
        let conflict =
            served.source.source_conflict(prefix).map_err(|reason| refused(RefusalReason::NotInForce, &reason))?;
        if let Some(conflict) = conflict {
            let message = format!("allowedSources {prefix} overlaps {conflict}: remove it from the CNI configuration");
            return Err(refused(RefusalReason::Invalid, &message));
        }
    }
    let generation = served.attachments.attach(&attachment(name.clone()), attach)?;
    let (name, end) = (attachment(name), Instant::now() + ENFORCEMENT);
    if timeout_at(end, served.attachments.in_force(generation)).await.is_err() {
        return Err(refused(RefusalReason::NotInForce, "policy for this pod is not in force yet"));
    }
    // Without it, policies that may select the pod refuse its clients as soon as it is ready. It starts all the same.
    let end = end.min(Instant::now() + served.pod_wait);
    let _ = timeout_at(end, served.attachments.pod_in_force(&name)).await;
    Ok(StatusCode::NO_CONTENT)
}

async fn detach(
    State(served): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(name): Path<(String, String)>,
) -> Result<StatusCode, RefusedRequest> {
    may_change(caller)?;
    served.attachments.delete(&attachment(name), caller.arrival)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn show(State(served): Shared, Path(name): Path<(String, String)>) -> Result<Json<Attached>, RefusedRequest> {
    let name = attachment(name);
    let found = served.attachments.table().borrow().attachments.get(&name).cloned();
    let found = found.ok_or(AttachError::Unknown(name))?;
    Ok(Json(Attached::clone(&found)))
}

async fn list(State(served): Shared) -> Json<Vec<Attached>> {
    let table = served.attachments.table().borrow().clone();
    Json(table.attachments.values().map(|attached| Attached::clone(attached)).collect())
}

async fn ready(State(served): Shared) -> Result<Json<Network>, RefusedRequest> {
    if served.attachments.awaits_policy() {
        return Err(refused(RefusalReason::NotInForce, "policy is not in force on this node yet"));
    }
    Ok(Json(network(&served)?))
}

async fn ready_with(
    State(served): Shared,
    request: Result<Json<AddressRequest>, JsonRejection>,
) -> Result<Json<Network>, RefusedRequest> {
    let Json(request) = request.map_err(malformed)?;
    let Json(network) = ready(State(Arc::clone(&served))).await?;
    blocking(move || {
        served.attachments.has_addresses(&request, &network)?;
        Ok(Json(network))
    })
    .await
}

/// Runs work that may block on host-local's lock.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RefusedRequest> + Send + 'static,
) -> Result<T, RefusedRequest> {
    let worked = tokio::task::spawn_blocking(work).await;
    worked.unwrap_or_else(|_| Err(refused(RefusalReason::Failed, "the daemon is stopping")))
}

impl Served {
    /// The node's subnets and MTU. Waits a moment for them after the daemon's start.
    async fn await_network(&self) -> Result<Network, RefusedRequest> {
        loop {
            match network(self) {
                Err(_) if self.started.elapsed() < STARTING => sleep(PAUSE).await,
                network => return network,
            }
        }
    }
}

fn network(served: &Served) -> Result<Network, RefusedRequest> {
    served.source.network().map_err(|reason| refused(RefusalReason::NoSubnet, &reason))
}

fn attachment((container_id, ifname): (String, String)) -> AttachmentName {
    AttachmentName { container_id, ifname }
}

fn may_change(caller: Caller) -> Result<(), RefusedRequest> {
    if caller.may_change() { Ok(()) } else { Err(refused(RefusalReason::Denied, "only root may attach containers")) }
}

fn malformed(rejection: JsonRejection) -> RefusedRequest {
    RefusedRequest { status: rejection.status(), ..refused(RefusalReason::Invalid, &rejection.body_text()) }
}

/// An answer that is none.
struct RefusedRequest {
    status: StatusCode,
    refusal: Refusal,
}

fn refused(code: RefusalReason, message: &str) -> RefusedRequest {
    let status = match code {
        RefusalReason::Invalid => StatusCode::BAD_REQUEST,
        RefusalReason::Denied => StatusCode::FORBIDDEN,
        RefusalReason::NotFound => StatusCode::NOT_FOUND,
        RefusalReason::Conflict | RefusalReason::NoAddress => StatusCode::CONFLICT,
        RefusalReason::NoSubnet | RefusalReason::NotInForce => StatusCode::SERVICE_UNAVAILABLE,
        RefusalReason::Failed | RefusalReason::Other => StatusCode::INTERNAL_SERVER_ERROR,
    };
    RefusedRequest { status, refusal: Refusal { code, message: message.to_owned() } }
}

impl From<AttachError> for RefusedRequest {
    fn from(error: AttachError) -> Self {
        let code = match &error {
            AttachError::Invalid(_)
            | AttachError::BadName(_)
            | AttachError::BadInterface(_)
            | AttachError::SourceTaken { .. } => RefusalReason::Invalid,
            AttachError::Unknown(_) | AttachError::Deleted(_) => RefusalReason::NotFound,
            AttachError::Taken { .. } => RefusalReason::Conflict,
            AttachError::NoAddress(AddressError::Exhausted { .. } | AddressError::Taken { .. }) => {
                RefusalReason::NoAddress
            }
            AttachError::NoAddress(AddressError::TooSmall(_)) => RefusalReason::NoSubnet,
            AttachError::NoAddress(_) => RefusalReason::Invalid,
            AttachError::TooMany | AttachError::File { .. } => RefusalReason::Failed,
        };
        if code == RefusalReason::Failed {
            tracing::warn!(%error, "attachment refused");
        }
        refused(code, &error.to_string())
    }
}

impl IntoResponse for RefusedRequest {
    fn into_response(self) -> Response {
        (self.status, Json(self.refusal)).into_response()
    }
}
