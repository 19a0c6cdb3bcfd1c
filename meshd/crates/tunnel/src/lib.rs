//! The data plane: a userspace WireGuard tunnel behind a TUN device.
//!
//! # Packet path
//!
//! `P` is the lock of one peer, held for one batch of that peer's packets; the tunnel takes no other lock per packet or
//! per batch, and none while a hook runs. Tables (prefixes, indices, own addresses) are an immutable snapshot, read once
//! per batch; so is the clock.
//!
//! Outbound:
//! 1. Read pending packets from the TUN into a [`Batch`]: up to 256 packets or 128 KiB. A packet may be a TCP or UDP
//!    super-packet of up to 64 KiB that the kernel left unsegmented, and may lack its transport checksum (`offload`).
//! 2. Parse each strictly ([`packet`]).
//! 3. [`Track::track`] processes the batch; it gets super-packets whole (`hooks`).
//! 4. Longest prefix of the destination → peer (`prefix`); group by peer, each group in the order read.
//! 5. `P`: split super-packets in place (`offload::split`) and seal each segment, padded, directly into the outgoing
//!    buffer with the newest session (`peer`, `engine`). Without a session, queue the packet (bounded) and initiate a
//!    handshake.
//! 6. Send the buffer: datagrams of one length to one peer are one message that the kernel segments (`UDP_SEGMENT`);
//!    messages to all peers are one system call (`sendmmsg`). Write ICMP errors for unroutable packets back to the TUN.
//!
//! Inbound:
//! 1. Receive pending datagrams of a socket in one call (`recvmmsg`): up to 64 messages, each with up to 64 KiB of
//!    datagrams of one sender (`UDP_GRO`). If messages are that large, receive a few at a time, so that they are opened
//!    while in the cache.
//! 2. Transport messages: receiver index → peer, group by peer, each group in the order received. Handshake messages:
//!    first MAC, load and source's share (`admission`), then to the control thread.
//! 3. `P`: open each message into a [`Batch`]; authenticated messages update the peer's endpoint. Of handshake
//!    messages, only a response does, since an initiation may be a replay. A message of an unknown session may trigger
//!    a handshake (`strangers`).
//! 4. Parse each inner packet strictly. The longest prefix of its source over all peers must be the sending peer's, and
//!    its destination must be this node's own.
//! 5. [`Judge::judge`] processes the batch; it gets every packet separately.
//! 6. Merge packets of a flow with valid checksums into super-packets (`offload::merge`) and write them to the TUN.
//!
//! No stage waits for more packets: a batch is what is pending. So a single packet is sent alone and at once, and
//! batches grow with the load.
//!
//! # Threads
//!
//! With up to three cores, one thread, `wg-data`, alternates between both directions; with more, `tun-out` and `udp-in`
//! serve one each. Thread `wg-control` processes admitted handshake messages and each peer's deadlines (retries,
//! rekeying, keepalives, path MTU), and holds `P` for one of them at a time. [`Tunnel::apply`] runs in its caller's
//! thread: it takes `P` of one peer after another and then replaces the snapshot.
//!
//! Order: packets of one peer leave and arrive in the order they were read, except that a flow's first packets may wait
//! for a handshake, and then go first. One thread per direction ensures this without sorting. It also limits a
//! direction to the speed of one core (docs/benchmarks.md has the figures). Sealing and opening take a third of that;
//! the rest is the kernel's work in that thread's time. Two changes would lift the limit: sealing one peer's packets on
//! several cores, which the crate's `&mut` session does not allow, or spreading peers over threads.
//!
//! # When the kernel refuses an offload
//!
//! Each offload has a switch ([`OffloadSettings`]) and is probed when device and sockets are opened. If the kernel
//! later refuses at run time, the offload is switched off for good ([`OffloadState::Refused`]). Datagrams of a refused
//! GSO send are sent again one by one; a refused super-packet to the TUN is lost, and TCP retransmits it.
//!
//! # Inside the boringtun crate
//!
//! It copies a payload once before sealing or opening it, takes an uncontended lock for its replay window (1024
//! packets), and reads its own clock in `engine` calls other than sealing and opening. It queues nothing here and sets
//! no timers: the control thread drives them.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may begin at any instant"))]

mod admission;
mod alarms;
mod batch;
mod core;
mod dice;
mod drops;
mod engine;
mod event;
#[cfg(any(test, feature = "testing"))]
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a run begins at any instant"))]
pub mod fuzzing;
mod hooks;
mod icmp;
mod inbound;
mod initiation;
mod offload;
mod outbound;
mod path;
mod peer;
mod peer_index;
mod prefix;
mod shared;
mod stamps;
#[cfg(any(test, feature = "testing"))]
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a benchmark begins at any instant"))]
pub mod steps;
mod strangers;
#[expect(unsafe_code, reason = "system calls")]
mod sys;
mod table;
mod tables;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock"))]
mod threads;
mod vnet;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Instant, SystemTime},
};

use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::broadcast;

pub use batch::{Batch, Slot};
pub use drops::{DropCounts, DropReason};
pub use event::{PeerStatus, TunnelEvent};
pub use hooks::{Judge, PassAll, Track};
use mesh::tunnel_table::TunnelTable;
pub use offload::{OffloadSetting, OffloadSettings, OffloadState, OffloadStatus};
pub use prefix::PrefixTable;
pub use shared::{Cached, Shared};
pub use stamps::{InvalidStamp, Stamp};
pub use table::{RefusedClaim, RefusedItem, RefusedReason};

use keys::PrivateKey;

use self::{
    batch::Outgoing,
    core::Core,
    drops::Drops,
    inbound::{HANDSHAKES, Inbound},
    offload::Switches,
    outbound::Outbound,
    sys::{Sender, TunDevice, UdpSockets, Waker},
    threads::{CONTROL, Data, Job, ThreadContext},
};

/// How a tunnel is to be started.
pub struct Options {
    /// Name of the TUN device, 1 to 15 bytes. It is made persistent if there is none, and stays when the tunnel stops;
    /// addresses, MTU and routes are others' business.
    pub tun_name: String,
    /// UDP port of both families; 0 draws a free one.
    pub listen_port: u16,
    /// This node's key.
    pub private_key: PrivateKey,
    /// Firewall mark of the outer packets.
    pub mark: Option<u32>,
    /// Which of the kernel's offloads to use.
    pub offloads: OffloadSettings,
    /// Sees packets on their way into the tunnel.
    pub track: Box<dyn Track>,
    /// Sees packets on their way out of the tunnel.
    pub judge: Box<dyn Judge>,
    /// The greatest time stamp that an earlier run saw in initiations of each key; those up to it are refused.
    pub seen: HashMap<etcd_schema::PublicKey, Stamp>,
}

impl Options {
    /// Options with the hooks that let everything pass, and without a mark.
    #[must_use]
    pub fn new(tun_name: impl Into<String>, listen_port: u16, private_key: PrivateKey) -> Self {
        Self {
            tun_name: tun_name.into(),
            listen_port,
            private_key,
            mark: None,
            offloads: OffloadSettings::default(),
            track: Box::new(PassAll),
            judge: Box::new(PassAll),
            seen: HashMap::new(),
        }
    }
}

/// Why a tunnel could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The TUN device could not be opened.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// The UDP port could not be bound.
    #[error("UDP port {port}: {source}")]
    Udp {
        /// The port.
        port: u16,
        /// The system's error.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread of the tunnel: {0}")]
    Thread(#[source] io::Error),
}

/// Why the TUN device could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("TUN device {name}: {source}{}", hint(source))]
pub struct TunError {
    /// The device's name.
    pub name: String,
    /// The system's error.
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EINVAL) => {
            " (a device of this name exists with other flags; delete it with `ip link del` or choose another name)"
        }
        Some(libc::EPERM) => " (CAP_NET_ADMIN is missing)",
        Some(libc::ENOENT) => " (/dev/net/tun is missing; load the tun module)",
        Some(libc::EBUSY) => " (a device of this name is in use by another program)",
        _ => "",
    }
}

/// A running tunnel. Clones are handles of the same one; it stops with [`shutdown`](Self::shutdown) or with the last
/// handle.
#[derive(Clone)]
pub struct Tunnel(Arc<Handle>);

struct Handle {
    shell: Arc<ThreadContext>,
    tun_name: String,
    control: SyncSender<Job>,
    two_data_threads: bool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The kernel's counter when the device was opened: the device outlives tunnels.
    queue_drops_before: AtomicU64,
    /// Buffers for datagrams that API callers cause.
    caller: Mutex<CallerBuffers>,
}

struct CallerBuffers {
    out: Outgoing,
    sender: Sender,
    drops: Arc<Drops>,
}

#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "a shell reads the clock, and draws the seed"))]
impl Tunnel {
    /// Opens device and sockets and starts the threads. No peer is known until [`apply`](Self::apply).
    ///
    /// # Errors
    /// See [`StartError`]; nothing keeps running then.
    pub fn start(options: Options) -> Result<Self, StartError> {
        Self::start_on(options, two_data_threads())
    }

    fn start_on(options: Options, two_data_threads: bool) -> Result<Self, StartError> {
        let switches = Switches::new(&options.offloads);
        let tun = open_tun(&options.tun_name, &switches)?;
        let udp = |source| StartError::Udp { port: options.listen_port, source };
        let sockets = UdpSockets::bind(options.listen_port, options.mark, &switches).map_err(udp)?;
        let rng = StdRng::from_rng(&mut rand::rng());
        let core = Arc::new(Core::with_seen(options.private_key.secret().clone(), rng, options.seen));
        let shell = Arc::new(ThreadContext {
            core: Arc::clone(&core),
            sockets,
            tun: Shared::new(Some(tun)),
            switches,
            stop: AtomicBool::new(false),
            turns: std::array::from_fn(|_| AtomicU64::new(0)),
            wake: [Waker::new().map_err(StartError::Thread)?, Waker::new().map_err(StartError::Thread)?],
        });
        let (control, jobs) = sync_channel(HANDSHAKES);
        let waker = control.clone();
        core.alarms.on_earlier_deadline(move || {
            // With the queue full the thread is awake, and looks at the alarms when it is through.
            let _ = waker.try_send(Job::Wake);
        });

        let outbound = Outbound::new(Instant::now(), Arc::clone(&core), options.track);
        let inbound = Inbound::new(Arc::clone(&core), options.judge);
        let queued = Arc::clone(&inbound.queued);
        let control_drops = core.drops.register();
        let tunnel = Self(Arc::new(Handle {
            caller: Mutex::new(CallerBuffers {
                out: Outgoing::new(),
                sender: Sender::new(),
                drops: core.drops.register(),
            }),
            shell: Arc::clone(&shell),
            queue_drops_before: AtomicU64::new(queue_drops(&options.tun_name)),
            tun_name: options.tun_name,
            control: control.clone(),
            two_data_threads,
            threads: Mutex::new(Vec::with_capacity(3)),
        }));
        let (outbound, inbound) = (Some(outbound), Some((inbound, control)));
        if two_data_threads {
            tunnel.spawn_data("tun-out", Data { outbound, inbound: None, waker: 0 })?;
            tunnel.spawn_data("udp-in", Data { outbound: None, inbound, waker: 1 })?;
        } else {
            tunnel.spawn_data("wg-data", Data { outbound, inbound, waker: 0 })?;
        }
        tunnel.spawn("wg-control", move || {
            threads::control(&shell, &jobs, &control_drops, &queued);
        })?;
        Ok(tunnel)
    }

    fn spawn_data(&self, name: &'static str, data: Data) -> Result<(), StartError> {
        let shell = Arc::clone(&self.0.shell);
        self.spawn(name, move || threads::data(&shell, data))
    }

    fn spawn(&self, name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let guard = ThreadGuard { name, core: Arc::clone(&self.0.shell.core) };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                let _guard = guard;
                run();
            })
            .map_err(StartError::Thread)?;
        self.0.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// The UDP port that the tunnel listens on.
    #[must_use]
    pub fn listen_port(&self) -> u16 {
        self.0.shell.sockets.port()
    }

    /// Applies `table` and returns the refused claims. Unchanged peers keep their sessions and endpoints; removed peers
    /// and keys lose their sessions before this returns. Another pre-shared key ends that peer's sessions. May be
    /// called from any thread; costs as much as the difference from the previous table, and some 50 µs for each new
    /// key.
    pub fn apply(&self, table: TunnelTable) -> Vec<RefusedClaim> {
        self.with_caller(|core, caller| core.apply(Instant::now(), table, &caller.drops, &mut caller.out))
    }

    /// How often each of the tunnel's threads came round, and has each come round once more. One that has not by the
    /// next call hangs, unless that comes within moments.
    #[must_use]
    pub fn heartbeats(&self) -> Vec<u64> {
        let shell = &self.0.shell;
        shell.wake.iter().for_each(Waker::wake);
        // With the queue full the thread is awake.
        let _ = self.0.control.try_send(Job::Wake);
        let threads = if self.0.two_data_threads { [0, 1, CONTROL].as_slice() } else { &[0, CONTROL] };
        threads.iter().map(|at| shell.turns[*at].load(Ordering::Relaxed)).collect()
    }

    /// The state of each peer, in no order.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let tables = self.0.shell.core.tables.get();
        tables
            .with_keys()
            .map(|(peer, keys)| {
                let state = peer.lock();
                let (rx_bytes, tx_bytes) = state.bytes();
                PeerStatus {
                    name: peer.name.to_string(),
                    keys: keys.to_vec(),
                    endpoint: state.endpoint(),
                    latest_handshake: state
                        .latest_handshake()
                        .and_then(|at| wall.checked_sub(now.saturating_duration_since(at))),
                    rx_bytes,
                    tx_bytes,
                    session: state.session(now),
                    inner_mtu: state.inner_mtu(),
                    without_df: state.without_df(),
                }
            })
            .collect()
    }

    /// When an authentic packet of the peer called `name` last came: evidence about the past only.
    #[must_use]
    pub fn heard(&self, name: &str) -> Option<Instant> {
        let tables = self.0.shell.core.tables.get();
        tables.named(name).and_then(|peer| peer.lock().heard())
    }

    /// The peers that something authentic came from, with the address that the last one came from and when: in no order.
    #[must_use]
    pub fn heard_from(&self) -> Vec<(String, SocketAddr, Instant)> {
        let tables = self.0.shell.core.tables.get();
        let peers = tables.with_keys().map(|(peer, _)| peer);
        peers
            .filter_map(|peer| {
                let state = peer.lock();
                Some((peer.name.to_string(), state.heard_from()?, state.heard()?))
            })
            .collect()
    }

    /// Bytes received in authentic messages and bytes sent, outer payload, since the start; with those of peers that are gone.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        self.0.shell.core.bytes()
    }

    /// Packets dropped since the start, by reason.
    #[must_use]
    pub fn drops(&self) -> DropCounts {
        let mut counts = self.0.shell.core.drops.sum();
        let before = self.0.queue_drops_before.load(Ordering::Relaxed);
        let of_device = queue_drops(&self.0.tun_name).saturating_sub(before);
        counts.add(DropReason::OutDeviceQueueFull, of_device);
        counts
    }

    /// Which of the kernel's offloads are in use.
    #[must_use]
    pub fn offloads(&self) -> OffloadStatus {
        self.0.shell.switches.status()
    }

    /// Events from now on. A receiver that falls behind by more than 1024 gets `Lagged`, and should read
    /// [`peers`](Self::peers).
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<TunnelEvent> {
        self.0.shell.core.events.subscribe()
    }

    /// Starts a handshake with the peer called `name` unless one was started within the last 5 seconds.
    pub fn initiate(&self, name: &str) {
        self.with_caller(|core, caller| {
            core.initiate(Instant::now(), name, &caller.drops, &mut caller.out);
        });
    }

    /// Calls the peers with these names although there may be a session with them: at once, or over a second if they are
    /// more than 100. One that was called within the last 5 seconds is not.
    pub fn call(&self, names: &[String]) {
        self.with_caller(|core, caller| core.call(Instant::now(), names, &caller.drops, &mut caller.out));
    }

    /// Takes in that the peer called `name` has restarted: calls it, at some time within a second if there are more
    /// than 100 peers, unless there is no session with it or one that came up within the last 10 seconds.
    pub fn restarted(&self, name: &str) {
        self.with_caller(|core, caller| core.restarted(Instant::now(), name, &caller.drops, &mut caller.out));
    }

    /// The latest timestamp in initiations of each key in the table, for [`Options::seen`] of the next start.
    #[must_use]
    pub fn seen_stamps(&self) -> HashMap<etcd_schema::PublicKey, Stamp> {
        self.0.shell.core.seen_stamps()
    }

    /// Sends an empty message over every session, so that peers learn where this node is. To be called when its own
    /// addresses have changed: a peer that has nothing to hear goes on sending to where this node was.
    pub fn announce(&self) {
        for peer in self.0.shell.core.tables.get().peers() {
            self.with_caller(|core, caller| core.announce(Instant::now(), peer, &caller.drops, &mut caller.out));
        }
    }

    /// Opens the TUN device again after [`TunnelEvent::TunGone`], making it if there is none. Does nothing while the
    /// device is there.
    ///
    /// # Errors
    /// When the device cannot be opened; the tunnel waits on.
    pub fn reopen_tun(&self) -> Result<(), TunError> {
        let shell = &self.0.shell;
        if shell.tun.get().is_some() {
            return Ok(());
        }
        let device = open_tun(&self.0.tun_name, &shell.switches)?;
        self.0.queue_drops_before.store(queue_drops(&self.0.tun_name), Ordering::Relaxed);
        shell.tun.set(Arc::new(Some(device)));
        shell.wake.iter().for_each(Waker::wake);
        Ok(())
    }

    /// Stops the threads and closes device and sockets; the device stays. Returns once no packet moves.
    pub fn shutdown(&self) {
        self.0.stop();
    }

    fn with_caller<T>(&self, act: impl FnOnce(&Core, &mut CallerBuffers) -> T) -> T {
        let mut caller = self.0.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&self.0.shell.core, &mut caller);
        let CallerBuffers { out, sender, drops } = &mut *caller;
        self.0.shell.flush(sender, out, drops);
        result
    }
}

/// Packets that found the queue of the device full since it was made; 0 where that cannot be read.
fn queue_drops(device: &str) -> u64 {
    let path = format!("/sys/class/net/{device}/statistics/tx_dropped");
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Whether each direction has its own thread. With few cores, applications need the others, and one thread for both
/// directions saves wakeups.
fn two_data_threads() -> bool {
    std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 3)
}

/// Reports a thread that ends by a panic.
struct ThreadGuard {
    name: &'static str,
    core: Arc<Core>,
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.core.events.send(TunnelEvent::Failed { thread: self.name });
        }
    }
}

impl Handle {
    fn stop(&self) {
        self.shell.stop.store(true, Ordering::Release);
        self.shell.wake.iter().for_each(Waker::wake);
        let _ = self.control.try_send(Job::Wake);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("tunnel thread panicked");
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_tun(name: &str, switches: &Switches) -> Result<TunDevice, TunError> {
    TunDevice::open(name, switches).map_err(|source| TunError { name: name.into(), source })
}

#[cfg(test)]
mod tests;
