//! The server, in the daemon.

use std::{fs, io, net::IpAddr, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use api_types::{FlowSample, Question, QuestionError};
use attachments::Attachments;
use axum::{
    Json, Router,
    extract::{self, ConnectInfo, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde::Serialize;
use tokio::{net::UnixListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{self, Caller},
    containers,
    source::Source,
};

/// The question in a query string; its parts need no escaping.
fn question(query: &str) -> Option<Question> {
    let part = |name: &str| part(query, name).map(str::to_owned);
    Some(Question { source: part("src")?, destination: part("dst")?, service: part("service")? })
}

/// The value of `name` in a query string whose parts need no escaping.
fn part<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Why the socket could not be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The socket could not be made.
    #[error("socket {path}: {source}")]
    Socket {
        /// Its path.
        path: String,
        /// The system's error.
        source: io::Error,
    },
}

/// Serves `source` and `attached` at `path` until `stop`. The socket's mode is 0660. An ADD waits for its Pod object
/// for `pod_wait` at most.
///
/// A socket that an earlier process left is replaced: the caller holds the lock of the state directory, so that process
/// has ended.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(
    path: &Path,
    source: Arc<dyn Source>,
    attached: Arc<Attachments>,
    pod_wait: Duration,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let failed = |error| ServeError::Socket { path: path.display().to_string(), source: error };
    // Bound beside and renamed, so that the socket has its mode once it is visible.
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&beside).map_err(failed)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    fs::rename(&beside, path).map_err(failed)?;
    let router = Router::new()
        .route("/v1/status", get(|State(source): State<Arc<dyn Source>>| async move { Json(source.status()) }))
        .route("/v1/peers", get(|State(source): State<Arc<dyn Source>>| async move { Json(source.peers()) }))
        .route("/v1/peers/{name}/config", get(peer_config))
        .route("/v1/routes", get(|State(source): State<Arc<dyn Source>>| async move { Json(source.routes()) }))
        .route("/v1/policies", get(policies))
        .route("/v1/policies/{*name}", get(policy))
        .route("/v1/policy/explain", get(explain))
        .route("/v1/ping", get(ping))
        .route("/v1/echo", get(echo))
        .route("/v1/doctor", get(diagnose))
        .route("/v1/flows", get(flows))
        .route("/v1/etcd/accept", post(accept_etcd))
        .with_state(Arc::clone(&source))
        .merge(containers::router(source, attached, pod_wait));
    tokio::spawn(connection::serve(listener, router, stop));
    Ok(())
}

async fn policies(State(source): State<Arc<dyn Source>>) -> Response {
    match tokio::task::spawn_blocking(move || source.policies()).await {
        Ok(policies) => Json(policies).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn policy(State(source): State<Arc<dyn Source>>, extract::Path(name): extract::Path<String>) -> Response {
    let known = tokio::task::spawn_blocking(move || source.policy(&name).ok_or(name)).await;
    match known {
        Ok(Ok(policy)) => Json(policy).into_response(),
        Ok(Err(name)) => (StatusCode::NOT_FOUND, format!("no policy {name} in force on this node\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Questions that wait for packets, at a time: each holds a thread.
static WAITING: Semaphore = Semaphore::const_new(8);

async fn ping(State(source): State<Arc<dyn Source>>, extract::RawQuery(query): extract::RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let Some(target) = part(&query, "target").map(str::to_owned) else {
        return (StatusCode::BAD_REQUEST, "the query needs a target\n").into_response();
    };
    answer(move || source.reach(&target)).await
}

/// `GET /v1/echo`
pub(super) async fn echo(
    State(source): State<Arc<dyn Source>>,
    extract::RawQuery(query): extract::RawQuery,
) -> Response {
    let query = query.unwrap_or_default();
    let address: Option<IpAddr> = part(&query, "address").and_then(|text| text.parse().ok());
    let size: Option<u16> = part(&query, "size").and_then(|text| text.parse().ok());
    let (Some(to), Some(packet)) = (address, size) else {
        return (StatusCode::BAD_REQUEST, "the query needs an address and a size in bytes\n").into_response();
    };
    // Whoever may open the socket may not have this node send to any address there is.
    let routes = source.routes();
    if !routes.iter().any(|route| route.dst.contains(&to)) {
        return (StatusCode::NOT_FOUND, format!("{to} is not an address of the mesh\n")).into_response();
    }
    answer(move || Ok(source.echo(to, packet))).await
}

async fn accept_etcd(State(source): State<Arc<dyn Source>>, ConnectInfo(caller): ConnectInfo<Caller>) -> Response {
    if !caller.may_change() {
        return (StatusCode::FORBIDDEN, "only root may accept the content of etcd: use sudo\n").into_response();
    }
    answer(move || source.accept_etcd()).await
}

async fn diagnose(State(source): State<Arc<dyn Source>>) -> Response {
    answer(move || Ok(source.diagnose())).await
}

/// Works an answer out in a thread that may wait.
async fn answer<T: Serialize + Send + 'static>(
    ask: impl FnOnce() -> Result<T, QuestionError> + Send + 'static,
) -> Response {
    let Ok(_permit) = WAITING.acquire().await else { return StatusCode::INTERNAL_SERVER_ERROR.into_response() };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(error @ QuestionError::NotFound(_))) => (StatusCode::NOT_FOUND, format!("{error}\n")).into_response(),
        Ok(Err(error)) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn explain(State(source): State<Arc<dyn Source>>, extract::RawQuery(query): extract::RawQuery) -> Response {
    let Some(question) = question(&query.unwrap_or_default()) else {
        return (StatusCode::BAD_REQUEST, "the query needs src, dst and service\n").into_response();
    };
    answer(move || source.explain(&question)).await
}

async fn flows(
    State(source): State<Arc<dyn Source>>,
    extract::RawQuery(query): extract::RawQuery,
) -> Json<Vec<FlowSample>> {
    let query = query.unwrap_or_default();
    let after = part(&query, "after").and_then(|number| number.parse().ok()).unwrap_or(0);
    Json(source.flows(after))
}

async fn peer_config(State(source): State<Arc<dyn Source>>, extract::Path(name): extract::Path<String>) -> Response {
    match source.outside_peer_config(&name) {
        Some(text) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response(),
        None => {
            let status = source.status();
            let key = format!("peers/{name}");
            let refused = status.problems.iter().find(|problem| problem.key.as_ref() == Some(&key));
            let why = match refused {
                Some(problem) => format!("external peer {name} is refused: {}", problem.cause),
                None => {
                    format!("no external peer {name} as of etcd revision {}: put {key} first", status.etcd.revision)
                }
            };
            (StatusCode::NOT_FOUND, format!("{why}\n")).into_response()
        }
    }
}
