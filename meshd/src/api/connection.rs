//! Connections: who is at the other end, and what each may cost.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{extract::connect_info::Connected, serve::IncomingStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};

/// Most connections at one time; more wait to be accepted.
const CONNECTIONS: usize = 256;
/// How long one may last. An ADD waits for policy on one, and `meshctl` makes one per request.
const LIFETIME: Duration = Duration::from_secs(60);

/// A listener, with bounds on its connections.
pub(super) struct Bounded<L> {
    listener: L,
    free: Arc<Semaphore>,
    lifetime: Duration,
}

/// What can say who is at its other end.
pub(super) trait Accepted {
    fn caller(&self) -> Caller;
}

impl Accepted for UnixStream {
    fn caller(&self) -> Caller {
        Caller { uid: self.peer_cred().ok().map(|peer| peer.uid()) }
    }
}

impl Accepted for TcpStream {
    fn caller(&self) -> Caller {
        Caller { uid: None }
    }
}

/// The process at the other end, as the kernel tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    /// Its user; `None` when the kernel does not say.
    pub(super) uid: Option<u32>,
}

/// A connection that ends by itself.
pub(super) struct Connection<S> {
    stream: S,
    end: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl<L> Bounded<L> {
    pub(super) fn new(listener: L) -> Self {
        Self::with(listener, CONNECTIONS, LIFETIME)
    }

    fn with(listener: L, connections: usize, lifetime: Duration) -> Self {
        Self { listener, free: Arc::new(Semaphore::new(connections)), lifetime }
    }
}

impl<L> axum::serve::Listener for Bounded<L>
where
    L: axum::serve::Listener<Io: Accepted>,
{
    type Io = Connection<L::Io>;
    type Addr = Caller;

    async fn accept(&mut self) -> (Connection<L::Io>, Caller) {
        // The semaphore is never closed.
        let place = Arc::clone(&self.free).acquire_owned().await.ok();
        // It waits a moment when the process has no file left.
        let (stream, _) = self.listener.accept().await;
        let caller = stream.caller();
        (Connection { stream, end: Box::pin(sleep(self.lifetime)), _place: place }, caller)
    }

    fn local_addr(&self) -> io::Result<Caller> {
        Ok(Caller { uid: None })
    }
}

impl Connected<IncomingStream<'_, Bounded<UnixListener>>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Bounded<UnixListener>>) -> Self {
        *stream.remote_addr()
    }
}

impl Caller {
    /// Whether it may change something: it is root, or runs as the daemon does.
    pub(super) fn may_change(self) -> bool {
        self.uid.is_some_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw())
    }
}

impl<S> Connection<S> {
    fn check_end(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_end(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.check_end(context)?;
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Serves at most two connections at a time, each for a moment.
    fn serve(path: &std::path::Path) {
        let router =
            Router::new().route("/", get(|| async { "here" })).route("/never", get(std::future::pending::<()>));
        let listener = UnixListener::bind(path).unwrap();
        let bounded = Bounded::with(listener, 2, Duration::from_millis(300));
        let service = router.into_make_service_with_connect_info::<Caller>();
        tokio::spawn(async move { axum::serve(bounded, service).await });
    }

    async fn ask(path: &std::path::Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        // One that is ended is an end of the stream, or a reset where something was left unread.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn whoever_says_nothing_or_half_or_waits_for_ever_is_hung_up_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        serve(&path);
        for request in [&b""[..], b"GET / HT", b"GET /never HTTP/1.1\r\nHost: m\r\n\r\n"] {
            assert_eq!(ask(&path, request).await, "");
        }
        // One after the other is answered until the connection's time is over, and then it ends.
        let kept = ask(&path, b"GET / HTTP/1.1\r\nHost: m\r\n\r\n").await;
        assert!(kept.ends_with("here"), "{kept}");
    }

    #[tokio::test]
    async fn idle_connections_keep_others_out_for_no_longer_than_they_may_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        serve(&path);
        let mut idle = Vec::new();
        for _ in 0..4 {
            idle.push(UnixStream::connect(&path).await.unwrap());
        }
        let answer = ask(&path, b"GET / HTTP/1.0\r\n\r\n").await;
        assert!(answer.ends_with("here"), "{answer}");
        drop(idle);
    }
}
