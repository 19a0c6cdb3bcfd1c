//! TCP listeners, for endpoints that no packet of the mesh depends on.

use std::{io, net::SocketAddr, time::Duration};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::connection;

/// Between two tries to have an address that is not to be had.
const RETRY: Duration = Duration::from_secs(5);

/// Serves `router` at `address` until `stop`. An address that cannot be had is tried for again and again; `tell` hears
/// why, and `None` once it is had.
pub(super) fn serve(
    address: SocketAddr,
    router: Router,
    stop: CancellationToken,
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
        connection::serve(listener, router, stop).await;
    });
}
