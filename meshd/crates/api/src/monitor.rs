//! Monitoring over TCP: `/livez`, `/readyz`, `/metrics`. It changes nothing and reveals no secret, but names and
//! addresses of the mesh. So it listens on loopback by default.

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio_util::sync::CancellationToken;

use super::{
    health::{Check, all_hold, text},
    metrics,
    source::Source,
    tcp,
};

/// Serves `source` at `address` until `stop`. An address that cannot be had is tried for again and again; `tell` hears
/// why, and `None` once it is had.
pub fn monitor(
    address: SocketAddr,
    per_peer: bool,
    source: Arc<dyn Source>,
    stop: CancellationToken,
    tell: impl Fn(Option<io::Error>) + Send + 'static,
) {
    let router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(move |State(source): State<Arc<dyn Source>>| scrape(source, per_peer)))
        .with_state(source);
    tcp::serve(address, router, stop, tell);
}

async fn livez(State(source): State<Arc<dyn Source>>, RawQuery(query): RawQuery) -> Response {
    answer("livez", &source.liveness(), query.as_deref())
}

async fn readyz(State(source): State<Arc<dyn Source>>, RawQuery(query): RawQuery) -> Response {
    answer("readyz", &source.readiness(), query.as_deref())
}

fn answer(name: &str, checks: &[Check], query: Option<&str>) -> Response {
    let verbose = query.is_some_and(|query| query.split('&').any(|part| part.split('=').next() == Some("verbose")));
    let status = if all_hold(checks) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, text(name, checks, verbose)).into_response()
}

async fn scrape(source: Arc<dyn Source>, per_peer: bool) -> Response {
    match tokio::task::spawn_blocking(move || metrics::encode(&*source, per_peer)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
