//! A TCP stream during a change, with every byte checked.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{Namespace, await_until};

/// Bytes per write; no power of two, so that the pattern does not line up with it.
const CHUNK: usize = 16_381;
/// The pattern's period, a prime: a lost, repeated or moved stretch shows.
const PERIOD: u64 = 251;
const TICK: Duration = Duration::from_millis(50);
const CONNECT: Duration = Duration::from_secs(30);
/// How long the last bytes may take when the stream ends.
const FINISH: Duration = Duration::from_secs(30);

/// One TCP connection that carries a known pattern, both ways at the same time, until [`finish`](Self::finish).
pub struct TcpCheck {
    name: String,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What a [`TcpCheck`] has seen.
#[derive(Debug, Clone)]
pub struct TcpReport {
    /// Bytes that arrived at the server, and at the client; all of them right up to a fault.
    pub received: [u64; 2],
    /// The longest time in which nothing arrived at the server.
    pub longest_gap: Duration,
    /// What went wrong: a reset, a wrong byte.
    pub fault: Option<String>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    sent: [AtomicU64; 2],
    received: [AtomicU64; 2],
    longest_gap: Mutex<Duration>,
    fault: Mutex<Option<String>>,
}

impl TcpCheck {
    /// Connects `from` to `address`, which must be one of `to`'s, and starts both streams, each with at most
    /// `bytes_per_second`.
    ///
    /// # Panics
    /// When the connection does not come about.
    #[must_use]
    #[track_caller]
    pub fn start(from: &Namespace, to: &Namespace, address: IpAddr, bytes_per_second: u64) -> Self {
        let name = format!("TCP from {} to {address}", from.name());
        let fail = |error: io::Error| -> ! { panic!("{name}: {error}") };
        let listener = to.enter(|| TcpListener::bind((address, 0))).unwrap_or_else(|error| fail(error));
        let target: SocketAddr = listener.local_addr().unwrap_or_else(|error| fail(error));
        let client = from.enter(|| TcpStream::connect_timeout(&target, CONNECT)).unwrap_or_else(|error| fail(error));
        let (server, _) = listener.accept().unwrap_or_else(|error| fail(error));
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for (nth, (sender, receiver)) in [(&client, &server), (&server, &client)].into_iter().enumerate() {
            let clone = |stream: &TcpStream| stream.try_clone().unwrap_or_else(|error| fail(error));
            let (sender, receiver) = (clone(sender), clone(receiver));
            receiver.set_read_timeout(Some(TICK)).unwrap_or_else(|error| fail(error));
            sender.set_write_timeout(Some(TICK)).unwrap_or_else(|error| fail(error));
            let (sends, receives) = (Arc::clone(&shared), Arc::clone(&shared));
            threads.push(from.thread(move || send(sender, nth, bytes_per_second, &sends)));
            threads.push(to.thread(move || receive(receiver, nth, &receives)));
        }
        Self { name, shared, threads }
    }

    /// Bytes that have arrived at the server, and at the client.
    #[must_use]
    pub fn received(&self) -> [u64; 2] {
        self.shared.received.each_ref().map(|count| count.load(Ordering::SeqCst))
    }

    /// What has gone wrong so far.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.shared.fault()
    }

    /// Waits until bytes arrive that were sent from now on, at both sides.
    ///
    /// # Panics
    /// When they do not by `deadline`, or the stream breaks.
    #[track_caller]
    pub fn await_progress(&self, deadline: Duration) {
        let sent = self.shared.sent.each_ref().map(|count| count.load(Ordering::SeqCst));
        await_until(&format!("progress of {}", self.name), deadline, || {
            if let Some(fault) = self.shared.fault() {
                panic!("{}: {fault}", self.name);
            }
            let received = self.received();
            (received[0] > sent[0] && received[1] > sent[1]).then_some(())
        });
    }

    /// Ends both streams in order, waits for the last bytes, and reports.
    #[must_use]
    pub fn finish(mut self) -> TcpReport {
        self.end();
        TcpReport {
            received: self.received(),
            longest_gap: *self.shared.longest_gap.lock().unwrap_or_else(PoisonError::into_inner),
            fault: self.shared.fault(),
        }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for TcpCheck {
    fn drop(&mut self) {
        self.end();
    }
}

impl TcpReport {
    /// # Panics
    /// When the stream broke, carried a wrong byte, or lost its end.
    #[track_caller]
    pub fn assert_intact(&self) {
        assert!(self.fault.is_none() && self.received.iter().all(|count| *count > 0), "{self:?}");
    }
}

impl Shared {
    fn fault(&self) -> Option<String> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the first fault: those after it follow from it.
    fn fail(&self, fault: String) {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn pattern(position: u64) -> u8 {
    (position % PERIOD) as u8
}

fn send(mut stream: TcpStream, nth: usize, bytes_per_second: u64, shared: &Shared) {
    let start = Instant::now();
    let mut sent = 0;
    let mut stopped = None;
    let mut chunk = vec![0; CHUNK];
    // After a stop, a write that the network does not take is given up once it has had its time.
    while !shared.stop.load(Ordering::SeqCst) {
        for (position, byte) in (sent..).zip(&mut chunk) {
            *byte = pattern(position);
        }
        match stream.write(&chunk) {
            Ok(count) => sent += count as u64,
            Err(error) if is_timeout(&error) => {
                if shared.stop.load(Ordering::SeqCst) && stopped.get_or_insert_with(Instant::now).elapsed() > FINISH {
                    break;
                }
            }
            Err(error) => return shared.fail(format!("write after {sent} bytes: {error}")),
        }
        shared.sent[nth].store(sent, Ordering::SeqCst);
        let due = Duration::from_secs_f64(sent as f64 / bytes_per_second.max(1) as f64);
        std::thread::sleep(due.saturating_sub(start.elapsed()).min(TICK));
    }
    let _ = stream.shutdown(Shutdown::Write);
}

fn receive(mut stream: TcpStream, nth: usize, shared: &Shared) {
    let mut received = 0;
    let mut last = Instant::now();
    let mut stopped = None;
    let mut bytes = vec![0; 4 * CHUNK];
    loop {
        let count = match stream.read(&mut bytes) {
            Ok(0) if shared.stop.load(Ordering::SeqCst) => break,
            Ok(0) => return shared.fail(format!("ended early, after {received} bytes")),
            Ok(count) => count,
            Err(error) if is_timeout(&error) => {
                if shared.stop.load(Ordering::SeqCst) && stopped.get_or_insert_with(Instant::now).elapsed() > FINISH {
                    return shared.fail(format!("the end did not arrive, after {received} bytes"));
                }
                continue;
            }
            Err(error) => return shared.fail(format!("read after {received} bytes: {error}")),
        };
        let wrong = (received..).zip(&bytes[..count]).find(|(position, byte)| pattern(*position) != **byte);
        if let Some((position, byte)) = wrong {
            return shared.fail(format!("byte {position} is {byte} in place of {}", pattern(position)));
        }
        received += count as u64;
        shared.received[nth].store(received, Ordering::SeqCst);
        if nth == 0 {
            let mut longest = shared.longest_gap.lock().unwrap_or_else(PoisonError::into_inner);
            *longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    // All that was sent must have arrived; the sender has ended, since its end did.
    let sent = shared.sent[nth].load(Ordering::SeqCst);
    if received != sent {
        shared.fail(format!("{received} of {sent} bytes arrived"));
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
