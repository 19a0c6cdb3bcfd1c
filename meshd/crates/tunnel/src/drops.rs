//! Drop counters by reason.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why the tunnel dropped a packet or a datagram. The names are those of the metrics and do not change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// The stable snake_case name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

drop_reasons! {
    /// From the TUN: came faster than the tunnel took it, and found the device's queue full. The kernel counts these.
    OutDeviceQueueFull => "out_device_queue_full",
    /// From the TUN: not a well-formed IP packet.
    OutMalformed => "out_malformed",
    /// From the TUN: no peer owns the destination.
    OutNoPeer => "out_no_peer",
    /// From the TUN: for a multicast, broadcast or link-local address, as kernels send to any link.
    OutNotUnicast => "out_not_unicast",
    /// From the TUN: the peer has no endpoint and nothing to try.
    OutNoEndpoint => "out_no_endpoint",
    /// From the TUN: larger than the path to the peer carries.
    OutTooBig => "out_too_big",
    /// From the TUN: too much waits for handshakes already.
    OutQueueFull => "out_queue_full",
    /// From the TUN: waited for a handshake that never came about.
    OutHandshakeTimeout => "out_handshake_timeout",
    /// From the TUN: the peer went away while the packet was on its way.
    OutPeerRemoved => "out_peer_removed",
    /// The `track` hook refused it.
    OutRefused => "out_refused",
    /// The UDP socket took it neither at once nor after a wait.
    UdpSendFull => "udp_send_full",
    /// The UDP socket refused it: larger than the path's MTU.
    UdpSendTooBig => "udp_send_too_big",
    /// The UDP socket refused it: no route, no permission, no such address.
    UdpSendFailed => "udp_send_failed",
    /// From the network: came faster than this node took it, and found the UDP socket's buffer full.
    UdpReceiveFull => "udp_receive_full",
    /// From the network: not a WireGuard message.
    InMalformed => "in_malformed",
    /// From the network: larger than the receive buffer.
    InTruncated => "in_truncated",
    /// From the network: for a receiver index that is not ours.
    InUnknownIndex => "in_unknown_index",
    /// From the network: for a session that is gone.
    InNoSession => "in_no_session",
    /// From the network: does not authenticate.
    InUnauthentic => "in_unauthentic",
    /// From the network: a counter seen before or too old.
    InReplayed => "in_replayed",
    /// From the network: a counter past the end of a session's life.
    InCounterExhausted => "in_counter_exhausted",
    /// From the network: what a peer encrypted is not a well-formed IP packet.
    InInnerMalformed => "in_inner_malformed",
    /// From the network: the inner source is not the sending peer's.
    InWrongSource => "in_wrong_source",
    /// From the network: the inner destination is not this node's.
    InWrongDestination => "in_wrong_destination",
    /// The `judge` hook refused it.
    InRefused => "in_refused",
    /// A handshake message whose first MAC is wrong: made without knowing our public key.
    HandshakeBadMac => "handshake_bad_mac",
    /// A handshake message answered with a cookie, because of load.
    HandshakeCookieSent => "handshake_cookie_sent",
    /// A handshake message over the rate of its source.
    HandshakeRateLimited => "handshake_rate_limited",
    /// A handshake message that found the queue full.
    HandshakeQueueFull => "handshake_queue_full",
    /// An initiation by a key that is no peer's.
    HandshakeUnknownPeer => "handshake_unknown_peer",
    /// A handshake message that does not hold: replayed, wrong key, or for no handshake of ours.
    HandshakeRefused => "handshake_refused",
    /// To the TUN: the device is gone or down.
    TunGone => "tun_gone",
    /// To the TUN: the device's queue is full or it refused the packet.
    TunWriteFailed => "tun_write_failed",
}

const REASONS: usize = DropReason::ALL.len();

/// How many packets were dropped since the start, by reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropCounts([u64; REASONS]);

impl DropCounts {
    /// The count of one reason.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    pub(super) fn add(&mut self, reason: DropReason, n: u64) {
        let count = &mut self.0[reason as usize];
        *count = count.wrapping_add(n);
    }

    /// Every reason with its count, zeros too.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&r| (r, self.get(r)))
    }
}

/// The counters of one thread: written by that thread only, read by anyone.
#[derive(Debug)]
pub(super) struct Drops([AtomicU64; REASONS]);

impl Drops {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Counts one packet. One thread writes each block, so that load and store need not be one step.
    pub(super) fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts `n` packets.
    pub(super) fn add(&self, reason: DropReason, n: u64) {
        let counter = &self.0[reason as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// All threads' counters.
#[derive(Debug, Default)]
pub(super) struct DropRegistry(Mutex<Vec<Arc<Drops>>>);

impl DropRegistry {
    /// A new block of counters for the calling thread.
    pub(super) fn register(&self) -> Arc<Drops> {
        let drops = Arc::new(Drops::new());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&drops));
        drops
    }

    /// The sum over all threads.
    pub(super) fn sum(&self) -> DropCounts {
        let mut sum = [0u64; REASONS];
        for drops in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for (sum, counter) in sum.iter_mut().zip(&drops.0) {
                *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
            }
        }
        DropCounts(sum)
    }
}
