//! Listening on TCP, for the ways of asking that no packet of the mesh waits for.

use std::{io, net::SocketAddr, time::Duration};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::connection::Bounded;

/// Between two tries to have an address that is not to be had.
const RETRY: Duration = Duration::from_secs(5);

/// Serves `router` at `address` until `stop`. An address that cannot be had is tried for again and again; `tell` hears
/// why, and `None` once it is had. `what` names it in the log.
pub(super) fn serve(
    address: SocketAddr,
    router: Router,
    stop: CancellationToken,
    what: &'static str,
    tell: impl Fn(Option<io::Error>) + Send + 'static,
) {
    tokio::spawn(async move {
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) => tell(Some(error)),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        };
        tell(None);
        let server = axum::serve(Bounded::new(listener), router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = server.await {
            tracing::error!(%error, "{what} is not served any more");
        }
    });
}
