//! From the TUN to the network: parse, track, route, split and seal.

use std::{net::IpAddr, sync::Arc, time::Instant};

use super::{
    batch::{BATCH, Batch, HEADROOM, OVERHEAD, Outgoing},
    core::Core,
    drops::{DropReason, Drops},
    hooks::Track,
    icmp,
    offload::{Segments, split},
    peer::{PeerContext, PeerState, Sent},
    shared::Cached,
    tables::Tables,
};

/// State of the outbound thread between batches.
pub(super) struct Outbound {
    core: Arc<Core>,
    tables: Cached<Tables>,
    pub(super) drops: Arc<Drops>,
    track: Box<dyn Track>,
    /// Peer and slot of each packet, sorted so that a peer's packets stand together.
    order: Vec<(u32, u16)>,
    icmp: icmp::Limit,
}

/// Stands for the missing peer of a packet that is dropped.
const NO_PEER: u32 = u32::MAX;

impl Outbound {
    pub(super) fn new(now: Instant, core: Arc<Core>, track: Box<dyn Track>) -> Self {
        Self {
            tables: core.tables.cached(),
            drops: core.drops.register(),
            core,
            track,
            order: Vec::with_capacity(BATCH),
            icmp: icmp::Limit::new(now),
        }
    }

    /// Seals packets of `batch` into `out`, queues those that must wait for a handshake, and puts ICMP errors for the
    /// TUN into `back`. A full `out` goes to `send`, which must empty it; no lock is held then.
    pub(super) fn process(
        &mut self,
        now: Instant,
        batch: &mut Batch,
        out: &mut Outgoing,
        back: &mut Batch,
        send: &mut dyn FnMut(&mut Outgoing),
    ) {
        if batch.is_empty() {
            return;
        }
        for (slot, bytes) in batch.iter_mut() {
            match packet::Packet::parse(bytes) {
                Ok(packet) if usize::from(packet.total_len) == bytes.len() => {
                    slot.packet = Some(packet);
                }
                _ => slot.drop = Some(DropReason::OutMalformed),
            }
        }
        self.track.track(now, batch);
        let tables = Arc::clone(self.tables.refresh(&self.core.tables));
        self.route(&tables, batch);
        self.seal(now, &tables, batch, out, send);
        self.answer(now, &tables, batch, back);
    }

    fn route(&mut self, tables: &Tables, batch: &mut Batch) {
        self.order.clear();
        let mut last = None;
        for (at, slot) in batch.slots_mut().iter_mut().enumerate() {
            let (None, Some(packet)) = (slot.drop, &slot.packet) else {
                continue;
            };
            // Pending packets mostly have the same destination.
            let peer = match last {
                Some((address, peer)) if address == packet.destination => peer,
                _ => tables.prefixes.get(packet.destination).unwrap_or(NO_PEER),
            };
            last = Some((packet.destination, peer));
            slot.peer = peer;
            if peer == NO_PEER {
                slot.drop = Some(if is_for_one_host(packet.destination) {
                    DropReason::OutNoPeer
                } else {
                    DropReason::OutNotUnicast
                });
            } else {
                self.order.push((peer, at as u16));
            }
        }
        self.order.sort_unstable();
    }

    fn seal(
        &self,
        now: Instant,
        tables: &Tables,
        batch: &mut Batch,
        out: &mut Outgoing,
        send: &mut dyn FnMut(&mut Outgoing),
    ) {
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let Some(peer) = tables.at(group[0].0) else { continue };
            let mut rest = group.iter();
            let mut cut = None;
            loop {
                let mut peer = peer.lock();
                let mut cx = self.core.context(now, &self.drops, out);
                let mut sealing = Sealing {
                    key: peer.begin_batch(&mut cx),
                    mtu: usize::from(peer.inner_mtu()),
                    peer: &mut peer,
                    cx: &mut cx,
                };
                let full = sealing.packets(batch, &mut rest, &mut cut);
                peer.sent_batch(&mut cx);
                drop(peer);
                if !full {
                    break;
                }
                send(out);
            }
        }
    }

    /// Counts drops, and sends ICMP errors that senders can act on.
    fn answer(&mut self, now: Instant, tables: &Tables, batch: &Batch, back: &mut Batch) {
        for slot in batch.slots() {
            let Some(reason) = slot.drop else { continue };
            self.drops.count(reason);
            let Some(packet) = &slot.packet else { continue };
            let error = match reason {
                DropReason::OutNoPeer | DropReason::OutNoEndpoint => icmp::Error::Unreachable,
                DropReason::OutTooBig if packet.dont_fragment => {
                    let Some(peer) = tables.at(slot.peer) else { continue };
                    icmp::Error::TooBig(peer.lock().inner_mtu())
                }
                _ => continue,
            };
            if !back.has_room() || !self.icmp.allow(now) {
                continue;
            }
            let room = &mut back.spare()[HEADROOM..][..icmp::MAX_ERROR];
            if let Some(len) = icmp::write(error, packet, batch.bytes(slot), room) {
                back.push(len, slot.peer);
            }
        }
    }
}

/// A super-packet that is being split, and its index in the batch.
struct Segmenting {
    at: usize,
    segments: Segments,
}

/// Packets of one peer being sealed while its lock is held.
struct Sealing<'a, 'b> {
    peer: &'a mut PeerState,
    cx: &'a mut PeerContext<'b>,
    key: Option<usize>,
    mtu: usize,
}

impl Sealing<'_, '_> {
    /// Seals the rest of `cut`, then the packets at the indexes in `rest`. Returns whether it stopped at a full
    /// outgoing buffer; both then hold the rest.
    fn packets<'i>(
        &mut self,
        batch: &mut Batch,
        rest: &mut impl Iterator<Item = &'i (u32, u16)>,
        cut: &mut Option<Segmenting>,
    ) -> bool {
        loop {
            if let Some(being_cut) = cut {
                let at = being_cut.at;
                match self.segments(batch, being_cut) {
                    Ok(full) if full => return true,
                    Ok(_) => {}
                    Err(reason) => batch.slots_mut()[at].drop = Some(reason),
                }
                *cut = None;
            }
            if self.key.is_some() && !self.cx.out.has_room(self.mtu + OVERHEAD) {
                return true;
            }
            let Some((_, at)) = rest.next() else { return false };
            let at = usize::from(*at);
            match self.packet(batch, at) {
                Ok(more) => *cut = more,
                Err(reason) => batch.slots_mut()[at].drop = Some(reason),
            }
        }
    }

    /// Seals one packet, or begins to split it.
    fn packet(&mut self, batch: &mut Batch, at: usize) -> Result<Option<Segmenting>, DropReason> {
        let slot = batch.slots()[at];
        let kind = slot.vnet.kind().map_err(|_| DropReason::OutMalformed)?;
        if let (Some(kind), Some(packet)) = (kind, &slot.packet) {
            let segments = Segments::new(batch.bytes(&slot), packet, &slot.vnet, kind);
            let segments = segments.map_err(|_| DropReason::OutMalformed)?;
            if segments.longest() > self.mtu {
                return Err(DropReason::OutTooBig);
            }
            return Ok(Some(Segmenting { at, segments }));
        }
        if batch.bytes(&slot).len() > self.mtu {
            return Err(DropReason::OutTooBig);
        }
        if slot.vnet.needs_checksum {
            split::complete_checksum(batch.bytes_mut(at), &slot.vnet).map_err(|_| DropReason::OutMalformed)?;
        }
        match self.peer.send(self.cx, self.key, batch.bytes(&slot), batch.padded(&slot, self.mtu)) {
            Sent::Taken => Ok(None),
            Sent::Dropped(reason) => Err(reason),
        }
    }

    /// Seals the segments of a super-packet; returns whether it stopped at a full buffer.
    fn segments(&mut self, batch: &mut Batch, cut: &mut Segmenting) -> Result<bool, DropReason> {
        let bytes = batch.bytes_and_padding_mut(cut.at);
        while let Some(len) = cut.segments.next_len() {
            if self.key.is_some() && !self.cx.out.has_room(len + OVERHEAD) {
                return Ok(true);
            }
            let sent = cut
                .segments
                .next(bytes, |segment| self.peer.send(self.cx, self.key, segment.packet(), segment.padded(self.mtu)));
            if let Some(Sent::Dropped(reason)) = sent {
                return Err(reason);
            }
        }
        Ok(false)
    }
}

/// Whether an address may be a single host's somewhere in the mesh.
fn is_for_one_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => !a.is_multicast() && !a.is_broadcast() && !a.is_link_local(),
        IpAddr::V6(a) => !a.is_multicast() && !a.is_unicast_link_local(),
    }
}
