//! Drivers of the fuzz targets: two connected nodes and an attacker between and beside them; splitting and merging of
//! packets.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use ipnet::IpNet;
use keys::PrivateKey;
use mesh::tunnel_table::{PeerConfig, TunnelTable};
use rand::{SeedableRng as _, rngs::StdRng};
use x25519_dalek::StaticSecret;

use super::{
    PassAll,
    batch::{BATCH, Batch, HEADROOM, MAX_PACKET, Outgoing, PADDING},
    core::Core,
    drops::Drops,
    inbound::{Admitted, HandshakeQueue, Inbound, Received},
    offload::{Joinable, Merger, Segments, split},
    outbound::Outbound,
    vnet::Vnet,
};

pub(super) struct FuzzNode {
    pub(super) address: SocketAddr,
    local: IpNet,
    core: Arc<Core>,
    drops: Arc<Drops>,
    pub(super) inbound: Inbound,
    pub(super) outbound: Outbound,
    pub(super) batch: Batch,
    pub(super) back: Batch,
    pub(super) out: Outgoing,
    pub(super) queue: Queue,
}

#[derive(Default)]
pub(super) struct Queue(VecDeque<Admitted>);

impl HandshakeQueue for Queue {
    fn offer(&mut self, message: Admitted) -> bool {
        self.0.push_back(message);
        true
    }
}

type Datagrams = Vec<(SocketAddr, Vec<u8>)>;

impl FuzzNode {
    fn new(now: Instant, number: u8) -> Self {
        let key = |number: u8| PrivateKey::from_bytes([number; 32]);
        let local = |number: u8| IpNet::new(IpAddr::from([10, number, 0, 0]), 24).ok();
        let address = |number: u8| SocketAddr::from(([192, 0, 2, number], 1));
        let secret = StaticSecret::from([number; 32]);
        let far = 3 - number;
        let core = Arc::new(Core::new(secret, StdRng::seed_from_u64(0)));
        let mut node = Self {
            address: address(number),
            local: local(number).unwrap_or_default(),
            drops: core.drops.register(),
            inbound: Inbound::new(Arc::clone(&core), Box::new(PassAll)),
            outbound: Outbound::new(now, Arc::clone(&core), Box::new(PassAll)),
            batch: Batch::new(),
            back: Batch::new(),
            out: Outgoing::new(),
            queue: Queue::default(),
            core,
        };
        let table = TunnelTable {
            peers: [PeerConfig {
                name: "far".into(),
                keys: vec![key(far).public()],
                preshared_key: None,
                allowed: local(far).into_iter().collect(),
                candidates: vec![address(far)],
                keepalive: None,
                call_out: false,
            }]
            .into_iter()
            .collect(),
            local: vec![node.local],
            overlay: Vec::new(),
            mtu: 1420,
        };
        node.core.apply(now, table, &node.drops, &mut node.out);
        node
    }

    fn send(&mut self, now: Instant, packet: &[u8]) -> Datagrams {
        self.batch.clear();
        self.back.clear();
        self.batch.spare()[HEADROOM..][..packet.len()].copy_from_slice(packet);
        self.batch.push(packet.len(), 0);
        self.outbound.process(now, &mut self.batch, &mut self.out, &mut self.back, &mut |_| panic!("full"));
        self.take_out()
    }

    fn receive(&mut self, now: Instant, from: SocketAddr, far: IpNet, datagram: &[u8]) -> Datagrams {
        let received = Received { bytes: datagram, stride: datagram.len().max(1), from, to: None };
        self.batch.clear();
        self.inbound.process(now, &[received], &mut self.batch, &mut self.out, &mut self.queue);
        for slot in self.batch.slots().iter().filter(|s| s.drop.is_none()) {
            let packet = slot.packet.as_ref();
            assert!(
                packet.is_some_and(|p| far.contains(&p.source)
                    && self.local.contains(&p.destination)
                    && usize::from(p.total_len) == self.batch.bytes(slot).len()),
                "delivered what is not the peer's or not ours"
            );
        }
        assert!(self.batch.len() <= BATCH);
        while let Some(admitted) = self.queue.0.pop_front() {
            let (message, from) = (admitted.message(), admitted.from);
            self.core.handshake(now, &self.drops, message, from, &mut self.out);
        }
        self.take_out()
    }

    fn take_out(&mut self) -> Datagrams {
        let sent = self.out.runs().iter().flat_map(|run| self.out.datagrams(run).map(|d| (run.to.remote, d.to_vec())));
        let sent = sent.collect();
        self.out.clear();
        sent
    }
}

/// Two nodes with a session between them.
pub struct Pair {
    now: Instant,
    nodes: [FuzzNode; 2],
}

impl Pair {
    /// The nodes; the first one has 10.1.0.0/24, the other one 10.2.0.0/24.
    pub(super) fn nodes(&mut self) -> &mut [FuzzNode; 2] {
        &mut self.nodes
    }

    /// Makes the nodes and lets them shake hands.
    #[must_use]
    pub fn connected() -> Self {
        let now = Instant::now();
        let mut pair = Self { now, nodes: [FuzzNode::new(now, 1), FuzzNode::new(now, 2)] };
        let mut hello = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0];
        hello.extend([10, 1, 0, 1, 10, 2, 0, 1]);
        let sent = pair.nodes[0].send(now, &hello);
        pair.settle(0, sent);
        pair
    }

    /// Plays `input`: steps of one byte that says what, two that say how long, and that many bytes.
    pub fn play(&mut self, mut input: &[u8]) {
        while let Some((&[what, low, high], rest)) = input.split_first_chunk() {
            let len = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
            let (bytes, rest) = rest.split_at(len);
            input = rest;
            let at = usize::from(what & 1);
            let stranger = SocketAddr::from(([203, 0, 113, what], 9));
            match what >> 1 & 3 {
                // Anything at all arrives from anywhere.
                0 => {
                    let far = self.nodes[1 - at].local;
                    let sent = self.nodes[at].receive(self.now, stranger, far, bytes);
                    self.settle(at, sent);
                }
                // The TUN gives out anything.
                1 => {
                    let sent = self.nodes[at].send(self.now, bytes);
                    self.settle(at, sent);
                }
                // What one node sends arrives spoilt.
                _ => {
                    let mut hello = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0];
                    let far = 2 - at as u8;
                    hello.extend([10, 3 - far, 0, 1, 10, far, 0, 1]);
                    let sent = self.nodes[at].send(self.now, &hello);
                    for (_, mut datagram) in sent {
                        for (byte, spoil) in datagram.iter_mut().zip(bytes) {
                            *byte ^= spoil;
                        }
                        let from = self.nodes[at].local;
                        let sent = self.nodes[1 - at].receive(self.now, stranger, from, &datagram);
                        self.settle(1 - at, sent);
                    }
                }
            }
        }
    }

    fn settle(&mut self, sender: usize, sent: Datagrams) {
        let mut under_way: VecDeque<_> = sent.into_iter().map(|d| (sender, d)).collect();
        for _ in 0..1000 {
            let Some((sender, (to, bytes))) = under_way.pop_front() else {
                return;
            };
            let (from, prefix) = (self.nodes[sender].address, self.nodes[sender].local);
            if to == self.nodes[1 - sender].address {
                let sent = self.nodes[1 - sender].receive(self.now, from, prefix, &bytes);
                under_way.extend(sent.into_iter().map(|d| (1 - sender, d)));
            }
        }
        panic!("the nodes never come to rest");
    }
}

/// Cuts what `input` says is a super-packet: ten bytes of `virtio_net_hdr`, then the packet.
///
/// # Panics
/// When a segment is no packet, or the segments are not what the super-packet held.
pub fn cut(input: &[u8]) {
    let Some((header, packet)) = input.split_first_chunk() else { return };
    let packet = &packet[..packet.len().min(MAX_PACKET)];
    let vnet = Vnet::read(header);
    let mut whole = packet.to_vec();
    let _ = split::complete_checksum(&mut whole, &vnet);
    let (Ok(Some(kind)), Ok(parsed)) = (vnet.kind(), packet::Packet::parse(packet)) else { return };
    let packet = &packet[..usize::from(parsed.total_len)];
    let Ok(mut segments) = Segments::new(packet, &parsed, &vnet, kind) else { return };
    let mut bytes = packet.to_vec();
    bytes.resize(bytes.len() + PADDING, 0);
    let (mut payload, mut header_len) = (Vec::<u8>::new(), 0);
    while let Some(segment) = segments.next(&mut bytes, |segment| segment.packet().to_vec()) {
        let of_segment = packet::Packet::parse(&segment);
        assert!(of_segment.is_ok_and(|p| usize::from(p.total_len) == segment.len()), "a segment that is no packet");
        header_len = segments.header_len();
        payload.extend(&segment[header_len..]);
    }
    assert_eq!(payload, packet[header_len..], "payload lost, gained or moved");
}

/// Joins the packets of `input`, each behind two bytes that say how long it is, and cuts what was joined again.
///
/// # Panics
/// When that does not give back as many bytes of payload as there were.
pub fn join(mut input: &[u8]) {
    let mut batch = Batch::new();
    while let Some((len, rest)) = input.split_first_chunk::<2>() {
        let (packet, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
        input = rest;
        let parsed = packet::Packet::parse(packet).ok();
        let Some(parsed) = parsed.filter(|p| usize::from(p.total_len) == packet.len() && batch.has_room()) else {
            continue;
        };
        batch.spare()[HEADROOM..][..packet.len()].copy_from_slice(packet);
        batch.push(packet.len(), 0);
        if let Some(slot) = batch.slots_mut().last_mut() {
            slot.packet = Some(parsed);
        }
    }
    let before = batch.len();
    let mut merger = Merger::new();
    merger.merge(&mut batch, Joinable { tcp: true, udp: true });
    let mut after = 0;
    for group in merger.groups() {
        let mut bytes = Vec::new();
        for at in merger.slots(group) {
            bytes.extend(batch.bytes_from(at, if bytes.is_empty() { 0 } else { group.header_len() }));
        }
        let vnet = group.vnet();
        let Ok(Some(kind)) = vnet.kind() else {
            after += 1;
            continue;
        };
        let parsed = packet::Packet::parse(&bytes);
        let Ok(parsed) = parsed else { panic!("what was joined is no packet") };
        let segments = Segments::new(&bytes, &parsed, &vnet, kind);
        let Ok(mut segments) = segments else { panic!("what was joined cannot be cut") };
        bytes.resize(bytes.len() + PADDING, 0);
        while segments.next(&mut bytes, |_| ()).is_some() {
            after += 1;
        }
    }
    assert_eq!(before, after, "packets lost or gained");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cuts_and_joins_anything(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            cut(&bytes);
            join(&bytes);
        }

        #[test]
        fn plays_anything(
            steps in prop::collection::vec(
                (any::<u8>(), prop::collection::vec(any::<u8>(), 0..160)), 0..6)
        ) {
            let mut input = Vec::new();
            for (what, bytes) in steps {
                input.push(what);
                input.extend((bytes.len() as u16).to_le_bytes());
                input.extend(bytes);
            }
            Pair::connected().play(&input);
        }
    }
}
