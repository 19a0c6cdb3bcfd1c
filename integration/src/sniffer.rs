//! Watches all packets that enter a namespace for packets that must not appear there.

mod packet;

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    Namespace, await_until,
    sys::{FrameSocket, Slots},
};

/// Bytes of each frame that are looked at: room for every header and a quoted packet.
const SNAP: usize = 512;
/// Violations that are kept; all are counted.
const SAMPLES: usize = 16;
const POLL: Duration = Duration::from_millis(5);
const DRAIN: Duration = Duration::from_secs(60);

/// Watches all interfaces of a namespace for frames that show an address of some prefixes in the clear.
///
/// It looks at what comes in and is addressed to the namespace, or to everyone. A frame from one neighbour to another,
/// here only because a switch has forgotten where that one is, goes no further and is not looked at.
///
/// Dropping it fails the scenario when there was one, so it need only be kept;
/// [`take_violations`](Self::take_violations) is for scenarios that expect one. It also fails when it could not keep up
/// and frames escaped it.
#[must_use = "a sniffer watches as long as it lives"]
pub struct Sniffer {
    name: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A frame that should not have been seen.
#[derive(Clone)]
pub struct Violation {
    /// The address in the clear.
    pub address: IpAddr,
    /// The first bytes of the frame, from its Ethernet header on.
    pub frame: Vec<u8>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Raised by those who want to know that everything up to now has been seen, and answered in `drained`.
    asked: AtomicU64,
    drained: AtomicU64,
    frames: AtomicU64,
    violations: AtomicU64,
    lost: AtomicU64,
    samples: Mutex<Vec<Violation>>,
}

impl Sniffer {
    pub(crate) fn start(namespace: &Namespace, prefixes: &[IpNet]) -> Self {
        let name = namespace.name().to_owned();
        let socket = namespace
            .enter(|| FrameSocket::open(None))
            .unwrap_or_else(|error| panic!("{name}: cannot open a packet socket: {error}"));
        let shared = Arc::new(Shared::default());
        let prefixes = prefixes.to_vec();
        let watcher = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name(format!("sniffer {name}"))
            .spawn(move || watch(&socket, &prefixes, &watcher))
            .unwrap_or_else(|error| panic!("{name}: cannot start a thread: {error}"));
        Self { name, shared, thread: Some(thread) }
    }

    /// Frames seen so far, after everything that has arrived is counted.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.drain();
        self.shared.frames.load(Ordering::Relaxed)
    }

    /// Violations so far, after everything that has arrived is looked at.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.drain();
        self.shared.violations.load(Ordering::Relaxed)
    }

    /// # Panics
    /// When there was a violation, or frames escaped the sniffer. The message has the first ones.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.drain();
        if let Some(report) = self.report() {
            panic!("{report}");
        }
    }

    /// The first violations so far. Resets the count.
    #[must_use]
    pub fn take_violations(&self) -> Vec<Violation> {
        self.drain();
        self.shared.violations.store(0, Ordering::Relaxed);
        std::mem::take(&mut self.shared.samples.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until all that has arrived is looked at.
    fn drain(&self) {
        let question = self.shared.asked.fetch_add(1, Ordering::SeqCst) + 1;
        await_until(&format!("the sniffer on {} to keep up", self.name), DRAIN, || {
            (self.shared.drained.load(Ordering::SeqCst) >= question).then_some(())
        });
    }

    fn report(&self) -> Option<String> {
        let violations = self.shared.violations.load(Ordering::Relaxed);
        let lost = self.shared.lost.load(Ordering::Relaxed);
        if violations == 0 && lost == 0 {
            return None;
        }
        let samples = self.shared.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let samples: String = samples.iter().map(|sample| format!("\n    {sample:?}")).collect();
        Some(format!(
            "{}: {violations} frames showed a mesh address in the clear, {lost} escaped the sniffer{samples}",
            self.name
        ))
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let joined = self.thread.take().map(JoinHandle::join);
        let report = if matches!(joined, Some(Err(_))) { Some("it failed".to_owned()) } else { self.report() };
        match report {
            Some(report) if thread::panicking() => eprintln!("sniffer: {report}"),
            Some(report) => panic!("sniffer: {report}"),
            None => {}
        }
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in ", self.address)?;
        self.frame.iter().take(96).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn watch(socket: &FrameSocket, prefixes: &[IpNet], shared: &Shared) {
    let mut slots = Slots::new(SNAP);
    loop {
        // Read first: what arrived before the question or the stop is seen in this round.
        let stop = shared.stop.load(Ordering::SeqCst);
        let asked = shared.asked.load(Ordering::SeqCst);
        while socket.receive(&mut slots).expect("receive from the packet socket") {
            for frame in slots.frames().filter(|frame| !frame.to_another) {
                shared.frames.fetch_add(1, Ordering::Relaxed);
                inspect(frame.bytes, prefixes, shared);
            }
        }
        let lost = socket.lost().expect("statistics of the packet socket");
        shared.lost.fetch_add(lost, Ordering::Relaxed);
        shared.drained.store(asked, Ordering::SeqCst);
        if stop {
            return;
        }
        socket.await_readable(POLL).expect("poll the packet socket");
    }
}

fn inspect(frame: &[u8], prefixes: &[IpNet], shared: &Shared) {
    let seen = packet::clear_addresses(frame)
        .into_iter()
        .find(|address| prefixes.iter().any(|prefix| prefix.contains(address)));
    if let Some(address) = seen {
        shared.violations.fetch_add(1, Ordering::Relaxed);
        let mut samples = shared.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() < SAMPLES {
            samples.push(Violation { address, frame: frame.to_vec() });
        }
    }
}
