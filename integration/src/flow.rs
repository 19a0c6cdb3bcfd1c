//! A steady flow of numbered packets during a change: counts losses and measures the interruption.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Namespace, await_until};

/// How long a socket is listened to before the thread looks whether it is to stop.
const TICK: Duration = Duration::from_millis(20);
/// How long answers are still awaited once the last packet has been answered: others may be on a slower path.
const GRACE: Duration = Duration::from_secs(2);
/// How long an answer to the last packet is awaited, on a machine that is busy.
const LAST: Duration = Duration::from_secs(10);
/// Room for what a thread that has to wait for a processor has not read yet, in bytes; its own loss would count as the
/// path's.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Gives a socket room for what comes while the thread that reads it has to wait for a processor.
///
/// # Panics
/// When the kernel refuses it.
pub fn enlarge_receive_buffer(socket: &impl AsFd) {
    setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
        .unwrap_or_else(|error| panic!("receive buffer of a socket: {error}"));
}

/// Packets that are sent at a steady pace and answered by the other side, until [`finish`](Self::finish).
pub struct Flow {
    name: String,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What a [`Flow`] has seen.
#[derive(Debug, Clone)]
pub struct FlowReport {
    /// Packets sent.
    pub sent: u64,
    /// Packets answered, each counted once.
    pub answered: u64,
    /// Packets never answered.
    pub lost: u64,
    /// Answers that came a second time.
    pub duplicates: u64,
    /// Answers that came after that of a later packet.
    pub late: u64,
    /// The longest time without an answer, between the first and the last one.
    pub longest_gap: Duration,
    /// Packets that the sender's own kernel refused to send (unreachable); they count as sent, too.
    pub refused: u64,
}

#[derive(Default)]
struct Shared {
    /// Nothing more is sent.
    stop: AtomicBool,
    /// Nothing more is received.
    received: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    /// Number of each answered packet, and how often.
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    counts: BTreeMap<u64, u64>,
    late: u64,
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Flow {
    /// UDP from `from` to `address`, which must be one of `to`'s; an echo server is started there.
    ///
    /// # Panics
    /// When a socket cannot be opened.
    #[must_use]
    pub fn udp(from: &Namespace, to: &Namespace, address: IpAddr, interval: Duration) -> Self {
        let server = to
            .enter(|| UdpSocket::bind((address, 0)))
            .and_then(|socket| Ok((socket.local_addr()?, socket)))
            .unwrap_or_else(|error| panic!("{}: cannot serve on {address}: {error}", to.name()));
        let (target, server) = server;
        enlarge_receive_buffer(&server);
        let client = from
            .enter(|| UdpSocket::bind((unspecified(address), 0)))
            .unwrap_or_else(|error| panic!("{}: cannot open a UDP socket: {error}", from.name()));
        let mut flow = Self::start(from, format!("UDP from {} to {target}", from.name()), client, target, interval, 0);
        let shared = Arc::clone(&flow.shared);
        flow.threads.push(to.thread(move || serve(&server, &shared)));
        flow
    }

    /// Echo requests from `from` to `address`; nothing is needed there.
    ///
    /// # Panics
    /// When a socket cannot be opened.
    #[must_use]
    pub fn icmp(from: &Namespace, address: IpAddr, interval: Duration) -> Self {
        let (domain, protocol) = match address {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = from
            .enter(|| Socket::new(domain, Type::DGRAM, Some(protocol)))
            .unwrap_or_else(|error| panic!("{}: cannot open an echo socket: {error}", from.name()));
        // The standard library's type fits: the kernel keeps the echo id, as it keeps a UDP port.
        let socket = UdpSocket::from(socket);
        let name = format!("echo requests from {} to {address}", from.name());
        Self::start(from, name, socket, SocketAddr::new(address, 0), interval, 8)
    }

    /// What has been seen so far. Packets under way count as lost.
    #[must_use]
    pub fn so_far(&self) -> FlowReport {
        self.shared.report()
    }

    /// Waits until a packet sent from now on is answered.
    ///
    /// # Panics
    /// When none is by `deadline`.
    #[track_caller]
    pub fn await_answer(&self, deadline: Duration) {
        let now = self.shared.sent.load(Ordering::SeqCst);
        await_until(&format!("an answer to {}", self.name), deadline, || {
            let answers = self.shared.answers();
            answers.counts.last_key_value().is_some_and(|(last, _)| *last >= now).then_some(())
        });
    }

    /// Stops sending, gives the last packets time to be answered, and reports.
    #[must_use]
    pub fn finish(mut self) -> FlowReport {
        self.end();
        self.shared.report()
    }

    /// `header` bytes stand before the number, as the protocol wants them.
    fn start(
        from: &Namespace,
        name: String,
        socket: UdpSocket,
        target: SocketAddr,
        interval: Duration,
        header: usize,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        enlarge_receive_buffer(&socket);
        let receiver = socket.try_clone().unwrap_or_else(|error| panic!("{name}: {error}"));
        for socket in [&socket, &receiver] {
            socket.set_read_timeout(Some(TICK)).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let (sends, receives) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            from.thread(move || send(&socket, target, interval, header, &sends)),
            from.thread(move || receive(&receiver, header, &receives)),
        ];
        Self { name, shared, threads }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.end();
    }
}

impl FlowReport {
    /// # Panics
    /// When a packet was lost.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        assert!(self.lost == 0 && self.sent > 0, "{self}");
    }
}

impl fmt::Display for FlowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} packets lost ({} refused at the sender), {} twice, {} late, longest gap {:?}",
            self.lost, self.sent, self.refused, self.duplicates, self.late, self.longest_gap
        )
    }
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> FlowReport {
        let sent = self.sent.load(Ordering::SeqCst);
        let answers = self.answers();
        let answered = answers.counts.len() as u64;
        FlowReport {
            sent,
            answered,
            lost: sent.saturating_sub(answered),
            duplicates: answers.counts.values().map(|count| count - 1).sum(),
            late: answers.late,
            longest_gap: answers.longest_gap,
            refused: self.refused.load(Ordering::SeqCst),
        }
    }
}

fn send(socket: &UdpSocket, target: SocketAddr, interval: Duration, header: usize, shared: &Shared) {
    // An echo request: type, code 0, and a checksum and id that the kernel fills in.
    let mut packet = vec![0; header + 8];
    if header > 0 {
        packet[0] = if target.is_ipv6() { 128 } else { 8 };
    }
    let mut next = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        let number = shared.sent.load(Ordering::SeqCst);
        packet[header..].copy_from_slice(&number.to_be_bytes());
        // Counted first: an answer must never be to a packet that is not yet counted.
        shared.sent.store(number + 1, Ordering::SeqCst);
        if let Err(error) = socket.send_to(&packet, target) {
            // What an ICMP error told of an earlier packet is reported here too, and this packet is not sent.
            if error.kind() == io::ErrorKind::ConnectionRefused {
                continue;
            }
            shared.refused.fetch_add(1, Ordering::SeqCst);
        }
        next += interval;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive(socket: &UdpSocket, header: usize, shared: &Shared) {
    let mut bytes = [0; 2048];
    let mut stopped = None;
    loop {
        if shared.stop.load(Ordering::SeqCst) {
            let (complete, last_answered) = {
                let (answers, sent) = (shared.answers(), shared.sent.load(Ordering::SeqCst));
                let last = answers.counts.last_key_value().map(|(last, _)| last + 1);
                (answers.counts.len() as u64 >= sent, last == Some(sent))
            };
            let grace = if last_answered { GRACE } else { LAST };
            if complete || stopped.get_or_insert_with(Instant::now).elapsed() > grace {
                shared.received.store(true, Ordering::SeqCst);
                return;
            }
        }
        let Ok((length, _)) = socket.recv_from(&mut bytes) else {
            continue;
        };
        let Some(number) = bytes[..length].get(header..header + 8).and_then(|number| number.try_into().ok()) else {
            continue;
        };
        let number = u64::from_be_bytes(number);
        let now = Instant::now();
        let mut answers = shared.answers();
        if let Some(last) = answers.last {
            answers.longest_gap = answers.longest_gap.max(now - last);
        }
        answers.last = Some(now);
        if answers.counts.last_key_value().is_some_and(|(last, _)| number < *last) {
            answers.late += 1;
        }
        *answers.counts.entry(number).or_default() += 1;
    }
}

fn serve(socket: &UdpSocket, shared: &Shared) {
    if socket.set_read_timeout(Some(TICK)).is_err() {
        return;
    }
    let mut bytes = [0; 2048];
    while !shared.received.load(Ordering::SeqCst) {
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            // An answer that cannot be sent counts as lost at the other side.
            drop(socket.send_to(&bytes[..length], from));
        }
    }
}

fn unspecified(family: IpAddr) -> IpAddr {
    match family {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}
