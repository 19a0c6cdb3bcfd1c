//! A browser page on this machine: the mesh from this node's point of view. It reads the same JSON as `meshctl` and
//! changes nothing.
//!
//! Any web site can make a browser send requests to loopback. So the listener answers only to a loopback name or
//! address (a foreign name that resolves to loopback is refused), and only to its own page.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, StatusCode, Uri, header},
    middleware::{self, Next},
    response::IntoResponse as _,
    routing::get,
};
use tokio_util::sync::CancellationToken;

use super::{server::echo, source::Source, tcp};

const SCRIPT: &str = "text/javascript; charset=utf-8";
/// The page itself, each part with its type.
const PARTS: [(&str, &str, &str); 9] = [
    ("/", "text/html; charset=utf-8", include_str!("ui/page.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("ui/page.css")),
    ("/details.js", SCRIPT, include_str!("ui/details.js")),
    ("/dom.js", SCRIPT, include_str!("ui/dom.js")),
    ("/links.js", SCRIPT, include_str!("ui/links.js")),
    ("/map.js", SCRIPT, include_str!("ui/map.js")),
    ("/page.js", SCRIPT, include_str!("ui/page.js")),
    ("/table.js", SCRIPT, include_str!("ui/table.js")),
    ("/view.js", SCRIPT, include_str!("ui/view.js")),
];

/// Restrictions for the browser: no foreign content, nothing inline, no framing.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// Serves the page and its data from `source` at `address`, a loopback one, until `stop`. Retries an address that
/// cannot be bound; `tell` gets the reason, and `None` once it is bound.
pub fn page(
    address: SocketAddr,
    source: Arc<dyn Source>,
    stop: CancellationToken,
    tell: impl Fn(Option<io::Error>) + Send + 'static,
) {
    tcp::serve(address, router(address.port(), source), stop, tell);
}

fn router(port: u16, source: Arc<dyn Source>) -> Router {
    let mut router = Router::new()
        .route("/v1/status", get(|State(source): State<Arc<dyn Source>>| async move { Json(source.status()) }))
        .route("/v1/peers", get(|State(source): State<Arc<dyn Source>>| async move { Json(source.peers()) }))
        .route("/v1/echo", get(echo));
    for (path, kind, text) in PARTS {
        router = router.route(path, get(move || async move { ([(header::CONTENT_TYPE, kind)], text) }));
    }
    let judge = move |request: Request, next: Next| async move {
        let mut response = match refusal(port, request.uri(), request.headers()) {
            Some(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
            None => next.run(request).await,
        };
        for (name, value) in HEADERS {
            response.headers_mut().insert(name, header::HeaderValue::from_static(value));
        }
        response
    };
    router.layer(middleware::from_fn(judge)).with_state(source)
}

/// Why this request is not answered, if it is not.
fn refusal(port: u16, uri: &Uri, headers: &HeaderMap) -> Option<String> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().unwrap_or_default(),
        _ => "",
    };
    if !is_loopback(host, port) {
        return Some(format!(
            "this page is served at http://127.0.0.1:{port}/ and http://localhost:{port}/ only, not at {host:?}"
        ));
    }
    // Browsers name who asks. Another site may lead here by a link, but not ask on its own.
    let from = headers.get("sec-fetch-site").map(|value| value.to_str().unwrap_or_default());
    let asked_by_itself = matches!(from, None | Some("same-origin" | "none"));
    (!asked_by_itself && uri.path() != "/").then(|| "only this page itself may send requests here".to_owned())
}

/// Whether a `Host` (RFC 9110, 7.2) is a loopback name or address with this port.
fn is_loopback(host: &str, port: u16) -> bool {
    let Some((name, given)) = host.rsplit_once(':') else { return false };
    if given != port.to_string() {
        return false;
    }
    let address = match name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse().map(IpAddr::V6),
        None => name.parse().map(IpAddr::V4),
    };
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(uri: &str, headers: &[(&'static str, &'static str)]) -> bool {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), header::HeaderValue::from_static(value)));
        refusal(9474, &uri.parse().unwrap(), &headers.collect()).is_none()
    }

    #[test]
    fn it_answers_to_loopback_with_its_port() {
        for host in ["127.0.0.1:9474", "127.9.9.9:9474", "localhost:9474", "LocalHost:9474", "[::1]:9474"] {
            assert!(is_loopback(host, 9474), "{host}");
        }
        for host in [
            "",
            ":9474",
            "127.0.0.1",
            "127.0.0.1:9475",
            "127.0.0.1:09474",
            "localhost",
            "evil.example:9474",
            "localhost.evil.example:9474",
            "127.0.0.1.evil.example:9474",
            "10.0.0.1:9474",
            "::1:9474",
            "[::2]:9474",
            "[127.0.0.1]:9474",
            "[::1]",
            "0.0.0.0:9474",
            "[::ffff:127.0.0.1]:9474",
        ] {
            assert!(!is_loopback(host, 9474), "{host}");
        }
    }

    #[test]
    fn one_host_is_named_and_no_other_site_asks() {
        let host = ("host", "localhost:9474");
        assert!(judged("/v1/status", &[host]));
        assert!(judged("/v1/status", &[host, ("sec-fetch-site", "same-origin")]));
        assert!(judged("/", &[host, ("sec-fetch-site", "cross-site")]));
        assert!(!judged("/v1/status", &[]));
        assert!(!judged("/v1/status", &[host, ("host", "evil.example")]));
        for from in ["cross-site", "same-site", "anything"] {
            assert!(!judged("/v1/echo", &[host, ("sec-fetch-site", from)]), "{from}");
        }
    }
}
