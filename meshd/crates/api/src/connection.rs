//! Connections: the peer's credentials, and limits per connection.
//!
//! Any permitted user could occupy all connections by sending nothing. So a request has a deadline, and if all places
//! are taken, a new connection replaces the oldest one without a complete request.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use attachments::Arrival;
use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Request},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    serve::Listener,
};
use hyper::{body::Incoming, server::conn::http1, service::Service as _};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Limits of the connections to one listener.
#[derive(Debug, Clone, Copy)]
struct ConnectionLimits {
    /// Most at one time. While all of them are being answered, more wait to be accepted.
    connections: usize,
    /// How long one may last. An ADD waits for policy on one, and `meshctl` makes one per request.
    lifetime: Duration,
    /// How long the head of a request may take, also the next one on the same connection, and then its body.
    request: Duration,
}

const LIMITS: ConnectionLimits =
    ConnectionLimits { connections: 256, lifetime: Duration::from_secs(60), request: Duration::from_secs(10) };
/// Most bytes of a request's body.
const MAX_BODY: usize = 1 << 20;

/// A stream that knows its peer's credentials.
pub(super) trait PeerCredentials {
    /// The user at the other end; `None` when the kernel does not say.
    fn uid(&self) -> Option<u32>;
}

impl PeerCredentials for UnixStream {
    fn uid(&self) -> Option<u32> {
        self.peer_cred().ok().map(|peer| peer.uid())
    }
}

impl PeerCredentials for TcpStream {
    fn uid(&self) -> Option<u32> {
        None
    }
}

/// The peer process, by the kernel's credentials.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    /// Its user; `None` when the kernel does not say.
    pub(super) uid: Option<u32>,
    /// When this listener accepted its connection.
    pub(super) arrival: Arrival,
}

impl Caller {
    /// Whether it may change something: it is root, or runs as the daemon does.
    pub(super) fn may_change(self) -> bool {
        self.uid.is_some_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw())
    }
}

/// Serves `router` on `listener` until `stop`. Handlers get the [`Caller`] as [`ConnectInfo`].
pub(super) async fn serve<L: Listener<Io: PeerCredentials>>(listener: L, router: Router, stop: CancellationToken) {
    serve_within(LIMITS, listener, router, stop).await;
}

async fn serve_within<L: Listener<Io: PeerCredentials>>(
    limits: ConnectionLimits,
    mut listener: L,
    router: Router,
    stop: CancellationToken,
) {
    let places = Arc::new(Places::default());
    let accept_all = async {
        loop {
            // It waits a moment when the process has no file left.
            let (stream, _) = listener.accept().await;
            places.make_room(limits.connections).await;
            tokio::spawn(attend(limits, stream, router.clone(), ConnectionSlot::take(&places), stop.clone()));
        }
    };
    tokio::select! {
        () = accept_all => {}
        () = stop.cancelled() => {}
    }
}

/// Answers one connection.
async fn attend<S>(limits: ConnectionLimits, stream: S, router: Router, place: ConnectionSlot, stop: CancellationToken)
where
    S: PeerCredentials + tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let caller = Caller { uid: stream.uid(), arrival: Arrival(place.number) };
    let (service, place) = (&TowerToHyperService::new(router), &place);
    let answer = move |request: hyper::Request<Incoming>| async move {
        let mut request = match whole(request, limits.request).await {
            Ok(request) => request,
            Err(status) => return Ok::<Response, Infallible>(status.into_response()),
        };
        request.extensions_mut().insert(ConnectInfo(caller));
        let _answering = place.answering();
        service.call(request).await
    };
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.request);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), hyper::service::service_fn(answer)));
    // How it ends is the other end's affair.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = place.evicted.cancelled() => {}
        () = sleep(limits.lifetime) => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(limits.request, connection).await;
        }
    }
}

/// The request with its body.
///
/// # Errors
/// The status of the answer if the body does not come in time or is too long.
async fn whole(request: hyper::Request<Incoming>, within: Duration) -> Result<Request, StatusCode> {
    let (head, body) = request.into_parts();
    let read = timeout(within, to_bytes(Body::new(body), MAX_BODY)).await.map_err(|_| StatusCode::REQUEST_TIMEOUT)?;
    let body = read.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
    Ok(Request::from_parts(head, Body::from(body)))
}

/// The connections to one listener.
#[derive(Default)]
struct Places {
    state: Mutex<PlacesState>,
    /// Notified when a connection ends, or waits for a request again.
    changed: Notify,
}

#[derive(Default)]
struct PlacesState {
    /// How many there ever were.
    count: u64,
    /// By number, so the oldest first.
    held: BTreeMap<u64, OpenConnection>,
}

struct OpenConnection {
    /// Its request is complete, and the answer is being worked out.
    answering: bool,
    evicted: CancellationToken,
}

/// The place of one connection; free when dropped.
struct ConnectionSlot {
    number: u64,
    evicted: CancellationToken,
    places: Arc<Places>,
}

/// While it lives, the connection has a complete request and keeps its place.
struct Answering<'a>(&'a ConnectionSlot);

impl Places {
    /// Waits until fewer than `most` places are taken; takes that of the oldest connection without a complete request.
    async fn make_room(&self, most: usize) {
        while !self.try_make_room(most) {
            self.changed.notified().await;
        }
    }

    fn try_make_room(&self, most: usize) -> bool {
        let mut state = self.lock();
        if state.held.len() < most {
            return true;
        }
        let oldest = state.held.iter().find(|(_, held)| !held.answering).map(|(number, _)| *number);
        let evicted = oldest.and_then(|number| state.held.remove(&number));
        if let Some(held) = &evicted {
            held.evicted.cancel();
        }
        evicted.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, PlacesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionSlot {
    fn take(places: &Arc<Places>) -> Self {
        let mut state = places.lock();
        state.count += 1;
        let (number, evicted) = (state.count, CancellationToken::new());
        state.held.insert(number, OpenConnection { answering: false, evicted: evicted.clone() });
        drop(state);
        Self { number, evicted, places: Arc::clone(places) }
    }

    fn answering(&self) -> Answering<'_> {
        self.set_answering(true);
        Answering(self)
    }

    fn set_answering(&self, answering: bool) {
        if let Some(held) = self.places.lock().held.get_mut(&self.number) {
            held.answering = answering;
        }
        self.places.changed.notify_one();
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.set_answering(false);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.places.lock().held.remove(&self.number);
        self.places.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, UnixListener},
    };

    use super::*;

    const FOREVER: Duration = Duration::from_secs(3600);
    const MOMENT: Duration = Duration::from_millis(300);

    fn router() -> Router {
        Router::new()
            .route("/", get(|| async { "here" }))
            .route("/never", get(std::future::pending::<()>))
            .route("/body", post(|body: String| async move { body }))
    }

    fn serve_at(path: &std::path::Path, limits: ConnectionLimits) {
        tokio::spawn(serve_within(limits, UnixListener::bind(path).unwrap(), router(), CancellationToken::new()));
    }

    async fn ask(path: &std::path::Path, request: &[u8]) -> String {
        read_after(UnixStream::connect(path).await.unwrap(), request).await
    }

    /// Asks until the answer is as wanted: on a busy machine a moment may be over before the request is looked at.
    async fn ask_until(path: &std::path::Path, request: &[u8], wanted: impl Fn(&str) -> bool) {
        let mut answers = Vec::new();
        for _ in 0..50 {
            let answer = ask(path, request).await;
            if wanted(&answer) {
                return;
            }
            answers.push(answer);
        }
        panic!("{answers:?}");
    }

    async fn read_after<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(
        mut stream: S,
        request: &[u8],
    ) -> String {
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        // One that is ended is an end of the stream, or a reset where something was left unread.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    const GET: &[u8] = b"GET / HTTP/1.0\r\n\r\n";
    const HALF_BODY: &[u8] = b"POST /body HTTP/1.1\r\nHost: m\r\nContent-Length: 9\r\n\r\nhalf";

    #[tokio::test]
    async fn an_incomplete_request_has_a_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        serve_at(&path, ConnectionLimits { connections: 2, lifetime: FOREVER, request: MOMENT });
        for request in [&b""[..], b"GET / HT", b"GET / HTTP/1.1\r\nHost: m\r\n"] {
            assert_eq!(ask(&path, request).await, "");
        }
        ask_until(&path, HALF_BODY, |answer| answer.starts_with("HTTP/1.1 408")).await;
        let whole = b"POST /body HTTP/1.0\r\nContent-Length: 4\r\n\r\nhalf";
        ask_until(&path, whole, |answer| answer.ends_with("half")).await;
    }

    #[tokio::test]
    async fn a_connection_ends_by_itself_also_while_it_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        serve_at(&path, ConnectionLimits { connections: 2, lifetime: MOMENT, request: FOREVER });
        assert_eq!(ask(&path, b"GET /never HTTP/1.1\r\nHost: m\r\n\r\n").await, "");
        // One request after the other is answered until the connection's time is over.
        ask_until(&path, b"GET / HTTP/1.1\r\nHost: m\r\n\r\n", |kept| kept.ends_with("here")).await;
    }

    #[tokio::test]
    async fn connections_without_a_request_keep_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let limits = ConnectionLimits { connections: 4, lifetime: FOREVER, request: FOREVER };
        serve_at(&path, limits);
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = tcp.local_addr().unwrap();
        tokio::spawn(serve_within(limits, tcp, router(), CancellationToken::new()));
        let mut idle = Vec::new();
        for half in [&b""[..], b"GET / HTTP/1.1\r\n", HALF_BODY] {
            for _ in 0..20 {
                let mut stream = UnixStream::connect(&path).await.unwrap();
                let mut over_tcp = TcpStream::connect(at).await.unwrap();
                // Those before may have been evicted meanwhile.
                let _ = (stream.write_all(half).await, over_tcp.write_all(half).await);
                idle.push((stream, over_tcp));
            }
            let answer = ask(&path, GET).await;
            assert!(answer.ends_with("here"), "{answer}");
            let answer = read_after(TcpStream::connect(at).await.unwrap(), GET).await;
            assert!(answer.ends_with("here"), "{answer}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_being_answered_keeps_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let asked = Arc::new(Notify::new());
        let tell = Arc::clone(&asked);
        let never = move || async move {
            tell.notify_one();
            std::future::pending::<()>().await;
        };
        let router = router().route("/asked", get(never));
        let limits = ConnectionLimits { connections: 2, lifetime: FOREVER, request: FOREVER };
        tokio::spawn(serve_within(limits, UnixListener::bind(&path).unwrap(), router, CancellationToken::new()));
        let mut waiting = UnixStream::connect(&path).await.unwrap();
        waiting.write_all(b"GET /asked HTTP/1.1\r\nHost: m\r\n\r\n").await.unwrap();
        asked.notified().await;
        let ended = tokio::spawn(async move { waiting.read_to_end(&mut Vec::new()).await });
        for _ in 0..20 {
            let answer = ask(&path, GET).await;
            assert!(answer.ends_with("here"), "{answer}");
        }
        assert!(!ended.is_finished());
    }
}
