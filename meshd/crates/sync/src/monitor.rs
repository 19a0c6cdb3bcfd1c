//! `/metrics`, `/livez` and `/readyz` over TCP: they change nothing and reveal no secret.

use std::{fmt::Write as _, net::SocketAddr};

use anyhow::Context as _;
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use etcd_schema::Cluster;
use sync_core::state::SyncState;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

/// The exported metrics.
#[derive(Debug, Default)]
pub(crate) struct SyncMetrics {
    /// The mesh's etcd answers.
    pub(crate) reaches_etcd: bool,
    pub(crate) leads: bool,
    /// Of the leader, once it knows the cluster.
    pub(crate) report: Option<SyncState>,
}

/// Serves it at `address` until `stop`.
///
/// # Errors
/// When the address cannot be had.
pub(crate) async fn serve(
    address: SocketAddr,
    cluster: Cluster,
    shown: watch::Receiver<SyncMetrics>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let ready = shown.clone();
    let router = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(async move || readyz(&ready.borrow())))
        .route(
            "/metrics",
            get(async move || {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics(&cluster, &shown.borrow()))
            }),
        );
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = served.await {
            tracing::warn!(%error, "metrics no longer served");
        }
    });
    Ok(())
}

/// Leading or standing by: both need etcd alone.
fn readyz(shown: &SyncMetrics) -> Response {
    if shown.reaches_etcd {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "etcd does not answer").into_response()
    }
}

/// In Prometheus' text format. A standby exports no figures of the copy, so that the leader's are the only ones.
fn metrics(cluster: &Cluster, shown: &SyncMetrics) -> String {
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, samples: &[(String, u64)]| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "# HELP meshd_sync_{name} {help}\n# TYPE meshd_sync_{name} gauge");
        for (label, value) in samples {
            let _ = writeln!(text, "meshd_sync_{name}{{cluster=\"{cluster}\"{label}}} {value}");
        }
    };
    let plain = |value: u64| vec![(String::new(), value)];
    gauge("leading", "1 on the process that copies the cluster, 0 on those that stand by.", &plain(shown.leads.into()));
    let Some(report) = shown.report.as_ref().filter(|_| shown.leads) else { return text };
    let help = "Time up to which the copy is known to be complete, in seconds since 1970.";
    gauge("current_timestamp_seconds", help, &plain(report.current_at));
    gauge("held", "Findings that wait for a confirmation.", &plain(report.held.len() as u64));
    let counts: Vec<_> =
        report.counts.iter().map(|(kind, count)| (format!(",kind=\"{kind}\""), *count as u64)).collect();
    gauge("objects", "Objects of each kind in etcd.", &counts);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_exports_no_figures_of_the_copy() {
        let cluster = "east".parse().unwrap();
        let report = SyncState {
            uid: "u".to_owned(),
            holder: String::new(),
            written_at: 20,
            current_at: 12,
            resource_versions: Default::default(),
            counts: [("pods".to_owned(), 7)].into(),
            held: Vec::new(),
            copies_policies: true,
        };
        let mut shown = SyncMetrics { reaches_etcd: true, leads: true, report: Some(report) };
        let text = metrics(&cluster, &shown);
        for line in [
            "meshd_sync_leading{cluster=\"east\"} 1\n",
            "meshd_sync_current_timestamp_seconds{cluster=\"east\"} 12\n",
            "meshd_sync_held{cluster=\"east\"} 0\n",
            "meshd_sync_objects{cluster=\"east\",kind=\"pods\"} 7\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        shown.leads = false;
        let text = metrics(&cluster, &shown);
        assert!(text.contains("meshd_sync_leading{cluster=\"east\"} 0\n") && !text.contains("objects"), "{text}");
    }
}
