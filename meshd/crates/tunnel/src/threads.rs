//! The thin shell around the core: the threads with the TUN queue, the sockets and the clock.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    time::{Duration, Instant},
};

use arrayvec::ArrayVec;

use super::{
    batch::{BATCH, BATCH_BYTES, Batch, Outgoing, Run},
    core::Core,
    drops::{DropReason, Drops},
    event::TunnelEvent,
    inbound::{Admitted, HandshakeQueue, Inbound, Received},
    offload::{Joinable, Merger, Switches, merge, merge::PacketGroup},
    outbound::Outbound,
    shared::{Cached, Shared},
    sys::{Lost, RECEIVE, ReceiveBuffers, SendError, Sender, TunDevice, UdpSockets, Waker, drain_errors, wait},
    vnet::{VNET_HEADER, Vnet},
};

/// After an error of the TUN that is neither "nothing there" nor "gone".
const TUN_PAUSE: Duration = Duration::from_millis(100);
/// Bytes read from the TUN after which they are sealed and sent. Two or three super-packets are enough to share a system
/// call, stay in the cache, and do not keep the far side waiting for long.
const TUN_BYTES: usize = 128 * 1024;
/// `linux/errno.h`: file descriptor in bad state, the error of reads from a deleted TUN device.
const EBADFD: i32 = 77;
/// Alarms further away than this are looked at again then.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// State shared by the threads and the handle.
pub(super) struct ThreadContext {
    pub(super) core: Arc<Core>,
    pub(super) sockets: UdpSockets,
    pub(super) tun: Shared<Option<TunDevice>>,
    pub(super) switches: Switches,
    pub(super) stop: AtomicBool,
    /// Wakes the data threads, each its own.
    pub(super) wake: [Waker; 2],
    /// How often each thread came round: the data threads, by waker, and the control thread.
    pub(super) turns: [AtomicU64; 3],
}

/// Where in [`ThreadContext::turns`] the control thread counts.
pub(super) const CONTROL: usize = 2;

/// A message to the control thread.
#[expect(
    clippy::large_enum_variant,
    reason = "the queue holds them in place, so that a handshake message costs no allocation"
)]
pub(super) enum Job {
    /// Work on a handshake message.
    Handshake(Admitted),
    /// Look at the alarms, or whether it is time to stop.
    Wake,
}

impl HandshakeQueue for SyncSender<Job> {
    fn offer(&mut self, message: Admitted) -> bool {
        !matches!(self.try_send(Job::Handshake(message)), Err(TrySendError::Full(_)))
    }
}

impl ThreadContext {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Notes that thread `at` came round.
    fn turn(&self, at: usize) {
        self.turns[at].fetch_add(1, Ordering::Relaxed);
    }

    /// Sends sealed datagrams.
    pub(super) fn flush(&self, sender: &mut Sender, out: &mut Outgoing, drops: &Drops) {
        if out.is_empty() {
            out.clear();
            return;
        }
        let mut too_big = false;
        sender.send(&self.sockets, &self.switches.udp_gso, out, |run: &Run, error, count| {
            let reason = match error {
                SendError::Full => DropReason::UdpSendFull,
                SendError::TooBig => DropReason::UdpSendTooBig,
                SendError::Failed => DropReason::UdpSendFailed,
                SendError::Fragmented => {
                    too_big = true;
                    return;
                }
                SendError::SourceGone => {
                    if let Some(peer) = run.peer {
                        self.core.source_failed(peer);
                    }
                    return;
                }
            };
            drops.add(reason, count as u64);
        });
        if too_big {
            self.learn_paths(drops, out);
        }
    }

    /// Reads path errors from the sockets' error queues.
    fn learn_paths(&self, drops: &Drops, out: &mut Outgoing) {
        let mut learned = ArrayVec::<(SocketAddr, u16), 64>::new();
        drain_errors(&self.sockets, |error| {
            let mtu = u16::try_from(error.mtu).unwrap_or(u16::MAX);
            let known = learned.contains(&(error.remote, mtu));
            if mtu != 0 && !known {
                let _ = learned.try_push((error.remote, mtu));
            }
        });
        for (remote, mtu) in learned {
            self.core.path_mtu(Instant::now(), remote, mtu, drops, out);
        }
    }

    /// Notes that `device` is gone, unless it has been replaced already.
    fn tun_gone(&self, device: &Arc<Option<TunDevice>>) {
        if Arc::ptr_eq(device, &self.tun.get()) {
            self.tun.set(Arc::new(None));
            tracing::warn!("TUN device removed");
            let _ = self.core.events.send(TunnelEvent::TunGone);
        }
    }

    /// Takes in that `packets` packets could not be written to the TUN.
    fn not_written(&self, device: &Arc<Option<TunDevice>>, errno: i32, packets: u64, drops: &Drops) {
        match errno {
            libc::EBADF | EBADFD => {
                drops.add(DropReason::TunGone, packets);
                self.tun_gone(device);
            }
            // There is none, or it is down.
            libc::ENODEV | libc::EIO => drops.add(DropReason::TunGone, packets),
            _ => drops.add(DropReason::TunWriteFailed, packets),
        }
    }
}

/// A data thread: one direction, or both in turn. In turn, neither direction waits for the other's lock or wakes
/// another thread; in two threads, each has its own core.
pub(super) struct Data {
    pub(super) outbound: Option<Outbound>,
    pub(super) inbound: Option<(Inbound, SyncSender<Job>)>,
    /// Which of the shell's wakers is this thread's.
    pub(super) waker: usize,
}

/// Moves packets until the shell stops.
pub(super) fn data(shell: &ThreadContext, data: Data) {
    let waker = &shell.wake[data.waker];
    let mut outbound = data.outbound.map(|worker| OutboundSide::new(shell, worker));
    let mut inbound = data.inbound.map(|(worker, control)| InboundSide::new(shell, worker, control));
    let [v4, v6] = shell.sockets.fds().map(|fd| fd.filter(|_| inbound.is_some()));
    while !shell.stopping() {
        shell.turn(data.waker);
        let device = outbound.as_mut().map(|side| Arc::clone(side.tun.refresh(&shell.tun)));
        let tun = device.as_ref().and_then(|d| d.as_ref().as_ref()).map(TunDevice::as_fd);
        let Ok([on_tun, on_v4, on_v6, woken]) = wait([tun, v4, v6, Some(waker.fd())], None) else {
            std::thread::sleep(TUN_PAUSE);
            continue;
        };
        if woken.readable {
            waker.clear();
            continue;
        }
        if let (Some(side), Some(device)) = (&mut outbound, &device) {
            if on_tun.failed {
                shell.tun_gone(device);
            } else if on_tun.readable {
                side.turn(shell, device);
            }
        }
        if let Some(side) = &mut inbound {
            if on_v4.failed || on_v6.failed {
                shell.learn_paths(&side.worker.drops, &mut side.out);
                shell.flush(&mut side.sender, &mut side.out, &side.worker.drops);
            }
            for (ready, is_v4) in [(on_v4, true), (on_v6, false)] {
                if ready.readable {
                    side.turn(shell, is_v4);
                }
            }
        }
    }
}

/// From the TUN to the network.
struct OutboundSide {
    worker: Outbound,
    batch: Batch,
    back: Batch,
    out: Outgoing,
    sender: Sender,
    tun: Cached<Option<TunDevice>>,
}

impl OutboundSide {
    fn new(shell: &ThreadContext, worker: Outbound) -> Self {
        Self {
            worker,
            batch: Batch::new(),
            back: Batch::new(),
            out: Outgoing::new(),
            sender: Sender::new(),
            tun: shell.tun.cached(),
        }
    }

    /// Processes one batch from the TUN.
    fn turn(&mut self, shell: &ThreadContext, device: &Arc<Option<TunDevice>>) {
        let Some(tun) = &**device else { return };
        self.batch.clear();
        if let Err(error) = fill(tun, &mut self.batch) {
            if matches!(error.raw_os_error(), Some(libc::EBADF | EBADFD)) {
                shell.tun_gone(device);
            } else {
                // Not known to pass by itself: do not spin.
                std::thread::sleep(TUN_PAUSE);
            }
            return;
        }
        let (sender, drops) = (&mut self.sender, Arc::clone(&self.worker.drops));
        self.worker.process(Instant::now(), &mut self.batch, &mut self.out, &mut self.back, &mut |out| {
            shell.flush(sender, out, &drops);
        });
        shell.flush(&mut self.sender, &mut self.out, &self.worker.drops);
        for at in 0..self.back.len() {
            self.back.write_vnet(at);
            if let Err(errno) = write(device, &[IoSlice::new(self.back.with_vnet(at))]) {
                shell.not_written(device, errno, 1, &self.worker.drops);
            }
        }
        self.back.clear();
    }
}

/// Reads pending packets from the TUN into `batch`, up to [`TUN_BYTES`].
fn fill(tun: &TunDevice, batch: &mut Batch) -> io::Result<()> {
    while batch.has_room() && batch.used() <= TUN_BYTES {
        match tun.read(batch.spare_with_vnet()) {
            Ok(len) if len > VNET_HEADER => batch.push_with_vnet(len - VNET_HEADER),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Packets already read are sent first; the error will recur.
            Err(_) if !batch.is_empty() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// From the network to the TUN.
struct InboundSide {
    worker: Inbound,
    control: SyncSender<Job>,
    buffers: ReceiveBuffers,
    batch: Batch,
    merger: Merger,
    out: Outgoing,
    sender: Sender,
    tun: Cached<Option<TunDevice>>,
}

impl InboundSide {
    fn new(shell: &ThreadContext, worker: Inbound, control: SyncSender<Job>) -> Self {
        Self {
            worker,
            control,
            buffers: ReceiveBuffers::new(),
            batch: Batch::new(),
            merger: Merger::new(),
            out: Outgoing::new(),
            sender: Sender::new(),
            tun: shell.tun.cached(),
        }
    }

    /// Processes the datagrams of one receive call on the socket of one family.
    fn turn(&mut self, shell: &ThreadContext, is_v4: bool) {
        let mut received = ArrayVec::<Received<'_>, RECEIVE>::new();
        let drops = Arc::clone(&self.worker.drops);
        self.buffers.receive(&shell.sockets, is_v4, &shell.switches.udp_gro, &mut received, |lost, count| {
            drops.add(
                match lost {
                    Lost::Truncated => DropReason::InTruncated,
                    Lost::Overflow => DropReason::UdpReceiveFull,
                },
                count,
            );
        });
        let mut rest = received.into_iter();
        let mut cut = None;
        loop {
            let chunk = chunk(&mut rest, &mut cut);
            if chunk.is_empty() {
                return;
            }
            self.batch.clear();
            self.worker.process(Instant::now(), &chunk, &mut self.batch, &mut self.out, &mut self.control);
            shell.flush(&mut self.sender, &mut self.out, &drops);
            write_merged(shell, self.tun.refresh(&shell.tun), &mut self.batch, &mut self.merger, &drops);
        }
    }
}

/// As much of `cut` and `rest` as fits a batch.
fn chunk<'a>(
    rest: &mut impl Iterator<Item = Received<'a>>,
    cut: &mut Option<Received<'a>>,
) -> ArrayVec<Received<'a>, RECEIVE> {
    let mut chunk = ArrayVec::new();
    let (mut count, mut bytes) = (0, 0);
    while count < BATCH && bytes < BATCH_BYTES && !chunk.is_full() {
        let Some(next) = cut.take().or_else(|| rest.next()) else { break };
        // A plaintext is shorter than its message by more than the space between two plaintexts.
        let fits = (BATCH - count).min((BATCH_BYTES - bytes).div_ceil(next.stride.max(1)));
        let (first, more) = next.split_at(fits);
        count += first.count();
        bytes += first.bytes.len();
        chunk.push(first);
        *cut = more;
    }
    chunk
}

/// Writes one packet, or several that are joined, to the TUN. The error is the system's number; `ENODEV` without a
/// device.
fn write(device: &Arc<Option<TunDevice>>, pieces: &[IoSlice<'_>]) -> Result<(), i32> {
    let Some(tun) = &**device else { return Err(libc::ENODEV) };
    let result = match pieces {
        [whole] => tun.write(whole),
        pieces => tun.write_pieces(pieces),
    };
    result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// Writes the packets of `batch` that are not dropped, those that can be joined in one piece.
pub(super) fn write_merged(
    shell: &ThreadContext,
    device: &Arc<Option<TunDevice>>,
    batch: &mut Batch,
    merger: &mut Merger,
    drops: &Drops,
) {
    let switches = &shell.switches;
    merger.merge(batch, Joinable { tcp: switches.tun_tcp.is_on(), udp: switches.tun_udp.is_on() });
    for group in merger.groups() {
        let mut slots = merger.slots(group);
        let Some(head) = slots.next() else { continue };
        batch.slots_mut()[head].vnet = group.vnet();
        batch.write_vnet(head);
        let mut pieces = ArrayVec::<IoSlice<'_>, { merge::MAX_GROUP }>::new();
        pieces.push(IoSlice::new(batch.with_vnet(head)));
        pieces.extend(slots.map(|at| IoSlice::new(batch.bytes_from(at, group.header_len()))));
        let Err(errno) = write(device, &pieces) else { continue };
        drop(pieces);
        if group.count() == 1 || !matches!(errno, libc::EINVAL | libc::EIO | libc::EMSGSIZE) {
            shell.not_written(device, errno, group.count() as u64, drops);
        } else if write_apart(shell, device, batch, merger.slots(group), group, drops) {
            // The kernel refuses an offload that it announced.
            let switch = if group.is_tcp() { &switches.tun_tcp } else { &switches.tun_udp };
            switch.refused(errno);
        }
    }
}

/// Writes the packets of a group, which are at `slots`, each by itself; returns whether all of them went.
fn write_apart(
    shell: &ThreadContext,
    device: &Arc<Option<TunDevice>>,
    batch: &mut Batch,
    slots: impl Iterator<Item = usize>,
    group: &PacketGroup,
    drops: &Drops,
) -> bool {
    let mut all = true;
    for (nth, at) in slots.enumerate() {
        if nth == 0 {
            group.restore_head(batch.bytes_mut(at));
        }
        batch.slots_mut()[at].vnet = Vnet::NOTHING;
        batch.write_vnet(at);
        if let Err(errno) = write(device, &[IoSlice::new(batch.with_vnet(at))]) {
            all = false;
            shell.not_written(device, errno, 1, drops);
        }
    }
    all
}

/// Handshakes and alarms, until the shell stops.
pub(super) fn control(
    shell: &ThreadContext,
    jobs: &Receiver<Job>,
    drops: &Drops,
    queued: &std::sync::atomic::AtomicUsize,
) {
    let mut out = Outgoing::new();
    let mut sender = Sender::new();
    while !shell.stopping() {
        shell.turn(CONTROL);
        let sleep = shell
            .core
            .alarms
            .next()
            .map_or(LONGEST_SLEEP, |at| at.saturating_duration_since(Instant::now()).min(LONGEST_SLEEP));
        match jobs.recv_timeout(sleep) {
            Ok(Job::Handshake(admitted)) => {
                queued.fetch_sub(1, Ordering::Relaxed);
                let now = Instant::now();
                shell.core.handshake(now, drops, admitted.message(), admitted.from, &mut out);
                shell.flush(&mut sender, &mut out, drops);
            }
            Ok(Job::Wake) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        while shell.core.run_deadlines(now, drops, &mut out) {
            shell.flush(&mut sender, &mut out, drops);
        }
    }
}
