//! Hooks for batches of inner packets.
//!
//! Both hooks are called once per batch, by the one thread of their direction, while no lock of the tunnel is held, and
//! only for non-empty batches; `now` is the time of the batch. Every slot that is not yet dropped has its
//! [`packet`](super::batch::Slot::packet) parsed. A hook removes a packet with
//! [`Slot::drop`](super::batch::Slot::drop); it cannot change or add any.

use std::time::Instant;

use super::batch::Batch;

/// Sees packets from the TUN: after parsing, before routing, splitting and sealing.
///
/// A slot may be a super-packet: TCP or UDP of up to 64 KiB that leaves as several packets with the same addresses,
/// ports and traffic class. The hook sees it once: its length is that of all its payload with one set of headers, and
/// its TCP flags are the union of its segments' flags. Transport checksums may be incomplete.
pub trait Track: Send {
    /// Looks at the packets, in the order in which the TUN gave them out.
    fn track(&mut self, now: Instant, batch: &mut Batch);
}

/// Sees packets from the tunnel: after the checks of source (the sending peer's) and destination (this node's), before
/// packets of one flow are merged and written to the TUN.
///
/// Every packet is seen as its sender sealed it, each by itself: there are no super-packets here. One that is taken out
/// is not joined with others. Checksums have not been looked at; the kernel does so, or joining did.
pub trait Judge: Send {
    /// Looks at the packets; those of one peer are in the order in which they came.
    fn judge(&mut self, now: Instant, batch: &mut Batch);
}

/// Lets everything pass that the tunnel's own checks let pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassAll;

impl Track for PassAll {
    fn track(&mut self, _: Instant, _: &mut Batch) {}
}

impl Judge for PassAll {
    fn judge(&mut self, _: Instant, _: &mut Batch) {}
}
