//! Packets that wait for a handshake: bounded, oldest dropped first, sent in order once the session is up.

use std::sync::atomic::Ordering;

use super::{PeerContext, PeerState, Sent};
use crate::{
    batch::{OVERHEAD, PADDING},
    drops::DropReason,
};

/// Most packets that wait for one peer's handshake; the oldest is dropped first.
const MAX_WAITING: usize = 128;
const MAX_WAITING_BYTES: usize = 256 * 1024;
/// Most bytes that wait for all handshakes together.
const MAX_WAITING_TOTAL: usize = 16 * 1024 * 1024;

impl PeerState {
    /// Keeps a packet until there is a session.
    pub(super) fn wait(&mut self, cx: &mut PeerContext<'_>, packet: &[u8]) -> Sent {
        while self.waiting.len() >= MAX_WAITING
            || (self.waiting_bytes + packet.len() > MAX_WAITING_BYTES && !self.waiting.is_empty())
        {
            self.unwait(cx);
            cx.drops.count(DropReason::OutQueueFull);
        }
        let total = cx.waiting_total.load(Ordering::Relaxed);
        if total + packet.len() > MAX_WAITING_TOTAL {
            return Sent::Dropped(DropReason::OutQueueFull);
        }
        cx.waiting_total.fetch_add(packet.len(), Ordering::Relaxed);
        self.waiting_bytes += packet.len();
        self.waiting.push_back(packet.into());
        Sent::Taken
    }

    fn unwait(&mut self, cx: &PeerContext<'_>) -> Option<Box<[u8]>> {
        let packet = self.waiting.pop_front()?;
        self.waiting_bytes -= packet.len();
        cx.waiting_total.fetch_sub(packet.len(), Ordering::Relaxed);
        Some(packet)
    }

    /// Drops all that waits.
    pub(super) fn drop_waiting(&mut self, cx: &PeerContext<'_>, reason: DropReason) {
        while self.unwait(cx).is_some() {
            cx.drops.count(reason);
        }
    }

    /// Sends pending packets while there is room.
    pub(super) fn flush(&mut self, cx: &mut PeerContext<'_>) {
        if self.waiting.is_empty() {
            return;
        }
        let (Some(key), Some(to)) = (self.sending_key(), self.endpoint) else {
            return;
        };
        let limit = usize::from(self.path.inner());
        while let Some(front) = self.waiting.front() {
            let len = front.len();
            if cx.out.room(len + PADDING + OVERHEAD).is_none() {
                return;
            }
            let Some(packet) = self.unwait(cx) else { return };
            let mut padded = packet.into_vec();
            padded.resize(len.next_multiple_of(PADDING).min(limit).max(len), 0);
            self.seal(cx, key, &padded, to);
            self.busy = true;
            self.unanswered.get_or_insert(cx.now);
        }
        self.waiting.shrink_to_fit();
    }
}
