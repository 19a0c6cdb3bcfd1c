//! Nodes without sockets: datagrams travel through memory, and the test controls time.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use mesh::tunnel_table::PeerConfig;
use rand::{SeedableRng as _, rngs::StdRng};

use super::super::{
    batch::{Batch, Outgoing, Run, SourceAddress},
    core::Core,
    drops::Drops,
    inbound::{Admitted, HANDSHAKES, HandshakeQueue, Inbound, Received},
    offload::{Joinable, Merger},
    outbound::Outbound,
    sys::count_allocations::allocations,
    vnet::{VNET_HEADER, Vnet},
    *,
};

/// A datagram between two nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wire {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) bytes: Vec<u8>,
}

#[derive(Default)]
struct Queue(VecDeque<Admitted>);

impl HandshakeQueue for Queue {
    fn offer(&mut self, message: Admitted) -> bool {
        let room = self.0.len() < HANDSHAKES;
        if room {
            self.0.push_back(message);
        }
        room
    }
}

pub(super) struct Node {
    pub(super) core: Arc<Core>,
    pub(super) key: PrivateKey,
    /// Where its datagrams come from.
    pub(super) address: SocketAddr,
    outbound: Outbound,
    inbound: Inbound,
    drops: Arc<Drops>,
    queue: Queue,
    batch: Batch,
    back: Batch,
    out: Outgoing,
    /// Inner packets that came out of the tunnel.
    pub(super) delivered: Vec<Vec<u8>>,
    /// ICMP errors that were written back.
    pub(super) answered: Vec<Vec<u8>>,
}

impl Node {
    pub(super) fn new(now: Instant, address: &str) -> Self {
        let key = PrivateKey::generate().unwrap();
        let core = Core::new(key.secret().clone(), StdRng::from_os_rng());
        Self::with_core(now, address, key, core)
    }

    pub(super) fn with_core(now: Instant, address: &str, key: PrivateKey, core: Core) -> Self {
        let core = Arc::new(core);
        Self {
            key,
            address: address.parse().unwrap(),
            outbound: Outbound::new(now, Arc::clone(&core), Box::new(PassAll)),
            inbound: Inbound::new(Arc::clone(&core), Box::new(PassAll)),
            drops: core.drops.register(),
            core,
            queue: Queue::default(),
            batch: Batch::new(),
            back: Batch::new(),
            out: Outgoing::new(),
            delivered: Vec::new(),
            answered: Vec::new(),
        }
    }

    pub(super) fn apply(&mut self, now: Instant, table: TunnelTable) -> Vec<RefusedClaim> {
        self.core.apply(now, table, &self.drops, &mut self.out)
    }

    /// Gives packets to the TUN; returns the datagrams that this leads to.
    pub(super) fn send(&mut self, now: Instant, packets: &[Vec<u8>]) -> Vec<Wire> {
        let whole: Vec<_> = packets.iter().map(|packet| (Vnet::NOTHING, packet.clone())).collect();
        self.send_uncut(now, &whole)
    }

    /// Gives packets to the TUN that the kernel left something to do at.
    pub(super) fn send_uncut(&mut self, now: Instant, packets: &[(Vnet, Vec<u8>)]) -> Vec<Wire> {
        self.batch.clear();
        self.back.clear();
        for (vnet, packet) in packets {
            self.push(vnet, packet);
        }
        let mut sent = Vec::new();
        let address = self.address;
        self.outbound.process(now, &mut self.batch, &mut self.out, &mut self.back, &mut |out| {
            sent.extend(take(address, out));
        });
        for slot in self.back.slots() {
            self.answered.push(self.back.bytes(slot).to_vec());
        }
        sent.extend(self.take_out());
        sent
    }

    fn push(&mut self, vnet: &Vnet, packet: &[u8]) {
        let room = self.batch.spare_with_vnet();
        vnet.write(room.first_chunk_mut().unwrap());
        room[VNET_HEADER..][..packet.len()].copy_from_slice(packet);
        self.batch.push_with_vnet(packet.len());
    }

    /// Gives datagrams to the socket, and does the handshakes that come of it.
    pub(super) fn receive(&mut self, now: Instant, datagrams: &[Wire]) -> Vec<Wire> {
        let mut sent = self.receive_without_handshakes(now, datagrams);
        sent.extend(self.do_handshakes(now));
        sent
    }

    pub(super) fn receive_without_handshakes(&mut self, now: Instant, datagrams: &[Wire]) -> Vec<Wire> {
        let received: Vec<Received<'_>> = datagrams
            .iter()
            .map(|d| Received {
                bytes: &d.bytes,
                stride: d.bytes.len(),
                from: d.from,
                to: Some(SourceAddress { address: d.to.ip(), interface: 0 }),
            })
            .collect();
        self.batch.clear();
        self.inbound.process(now, &received, &mut self.batch, &mut self.out, &mut self.queue);
        for slot in self.batch.slots().iter().filter(|s| s.drop.is_none()) {
            self.delivered.push(self.batch.bytes(slot).to_vec());
        }
        self.take_out()
    }

    pub(super) fn do_handshakes(&mut self, now: Instant) -> Vec<Wire> {
        let mut sent = Vec::new();
        while !self.queue.0.is_empty() {
            sent.extend(self.do_handshake(now));
        }
        sent
    }

    /// Works on the handshake message that came first.
    pub(super) fn do_handshake(&mut self, now: Instant) -> Vec<Wire> {
        let Some(admitted) = self.queue.0.pop_front() else { return Vec::new() };
        self.inbound.queued.fetch_sub(1, Ordering::Relaxed);
        self.core.handshake(now, &self.drops, admitted.message(), admitted.from, &mut self.out);
        self.take_out()
    }

    /// A handshake message comes while many wait: from now on the node is under load.
    pub(super) fn load(&mut self, now: Instant) {
        let waiting = self.inbound.queued.swap(HANDSHAKES, Ordering::Relaxed);
        let mut bytes = vec![0; 148];
        bytes[0] = 1;
        let initiation = Wire { from: "198.51.100.9:9".parse().unwrap(), to: self.address, bytes };
        assert_eq!(self.receive_without_handshakes(now, &[initiation]), []);
        self.inbound.queued.store(waiting, Ordering::Relaxed);
    }

    /// Does what is due at `now`.
    pub(super) fn ring(&mut self, now: Instant) -> Vec<Wire> {
        let mut sent = Vec::new();
        while self.core.run_deadlines(now, &self.drops, &mut self.out) {
            sent.extend(self.take_out());
        }
        sent
    }

    pub(super) fn initiate(&mut self, now: Instant, name: &str) -> Vec<Wire> {
        self.core.initiate(now, name, &self.drops, &mut self.out);
        self.take_out()
    }

    /// The node calls these peers; returns what is sent at once.
    pub(super) fn call(&mut self, now: Instant, names: &[&str]) -> Vec<Wire> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.core.call(now, &names, &self.drops, &mut self.out);
        self.ring(now)
    }

    /// The node hears that a peer has restarted; returns what is sent at once.
    pub(super) fn restarted(&mut self, now: Instant, name: &str) -> Vec<Wire> {
        self.core.restarted(now, name, &self.drops, &mut self.out);
        self.ring(now)
    }

    pub(super) fn announce(&mut self, now: Instant, name: &str) -> Vec<Wire> {
        let tables = self.core.tables.get();
        self.core.announce(now, tables.named(name).unwrap(), &self.drops, &mut self.out);
        self.take_out()
    }

    pub(super) fn path_mtu(&mut self, now: Instant, remote: SocketAddr, mtu: u16) {
        self.core.path_mtu(now, remote, mtu, &self.drops, &mut self.out);
        assert!(self.take_out().is_empty());
    }

    pub(super) fn dropped(&self, reason: DropReason) -> u64 {
        self.core.drops.sum().get(reason)
    }

    /// What was dropped, by reason.
    pub(super) fn all_dropped(&self) -> Vec<(DropReason, u64)> {
        self.core.drops.sum().iter().filter(|(_, count)| *count > 0).collect()
    }

    pub(super) fn endpoint_of(&self, name: &str) -> Option<SocketAddr> {
        self.core.tables.get().named(name).unwrap().lock().endpoint()
    }

    /// Takes `datagrams` in, joins what was in them, and sends `packets`; returns what that allocated.
    pub(super) fn allocations_of(&mut self, now: Instant, datagrams: &[Wire], packets: &[(Vnet, Vec<u8>)]) -> u64 {
        let received: Vec<Received<'_>> = datagrams
            .iter()
            .map(|d| Received {
                bytes: &d.bytes,
                stride: d.bytes.len(),
                from: d.from,
                to: Some(SourceAddress { address: d.to.ip(), interface: 0 }),
            })
            .collect();
        let mut merger = Merger::new();
        let before = allocations();
        self.batch.clear();
        self.inbound.process(now, &received, &mut self.batch, &mut self.out, &mut self.queue);
        let passed = self.batch.slots().iter().filter(|s| s.drop.is_none()).count();
        merger.merge(&mut self.batch, Joinable { tcp: true, udp: true });
        self.batch.clear();
        for (vnet, packet) in packets {
            self.push(vnet, packet);
        }
        self.outbound.process(now, &mut self.batch, &mut self.out, &mut self.back, &mut |_| panic!("full"));
        let allocated = allocations() - before;
        assert_eq!(passed, datagrams.len());
        assert!(self.out.runs().iter().map(Run::count).sum::<usize>() >= packets.len());
        self.out.clear();
        allocated
    }

    fn take_out(&mut self) -> Vec<Wire> {
        take(self.address, &mut self.out)
    }
}

fn take(from: SocketAddr, out: &mut Outgoing) -> Vec<Wire> {
    let of_run = |run: &Run| -> Vec<Wire> {
        out.datagrams(run).map(|d| Wire { from, to: run.to.remote, bytes: d.to_vec() }).collect()
    };
    let sent = out.runs().iter().flat_map(of_run).collect();
    out.clear();
    sent
}

/// Carries datagrams between the nodes until none is under way. Those for an address that no node has are lost.
pub(super) fn settle(now: Instant, nodes: &mut [&mut Node], first: Vec<Wire>) {
    let mut under_way = VecDeque::from(first);
    let mut hops = 0;
    while let Some(datagram) = under_way.pop_front() {
        hops += 1;
        assert!(hops < 10_000, "the nodes never come to rest");
        if let Some(node) = nodes.iter_mut().find(|n| n.address == datagram.to) {
            under_way.extend(node.receive(now, &[datagram]));
        }
    }
}

/// Two nodes that know each other, `a` knowing where `b` is.
///
/// `a` owns 10.1.0.0/24 and fd00:1::/64, `b` 10.2.0.0/24 and fd00:2::/64.
pub(super) fn pair(now: Instant) -> (Node, Node) {
    let mut a = Node::new(now, "192.0.2.1:51820");
    let mut b = Node::new(now, "192.0.2.2:51820");
    let to_b = peer("b", &b.key, &["10.2.0.0/24", "fd00:2::/64"], &["192.0.2.2:51820"]);
    assert_eq!(a.apply(now, table(1, vec![to_b])), []);
    let to_a = peer("a", &a.key, &["10.1.0.0/24", "fd00:1::/64"], &[]);
    assert_eq!(b.apply(now, table(2, vec![to_a])), []);
    (a, b)
}

pub(super) fn table(number: u8, peers: Vec<PeerConfig>) -> TunnelTable {
    TunnelTable {
        peers: peers.into_iter().collect(),
        local: vec![format!("10.{number}.0.0/24").parse().unwrap(), format!("fd00:{number}::/64").parse().unwrap()],
        overlay: vec![],
        mtu: 1420,
    }
}

pub(super) fn peer(name: &str, key: &PrivateKey, allowed: &[&str], candidates: &[&str]) -> PeerConfig {
    PeerConfig {
        name: name.into(),
        keys: vec![key.public()],
        preshared_key: None,
        allowed: allowed.iter().map(|p| p.parse().unwrap()).collect(),
        candidates: candidates.iter().map(|c| c.parse().unwrap()).collect(),
        keepalive: None,
        call_out: false,
    }
}

/// A UDP packet of `len` bytes, IPv4 without DF.
pub(super) fn packet(source: &str, destination: &str, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            packet[8..10].copy_from_slice(&[64, 17]);
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
            packet[24..26].copy_from_slice(&(len as u16 - 20).to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
            packet[6..8].copy_from_slice(&[17, 64]);
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
            packet[44..46].copy_from_slice(&(len as u16 - 40).to_be_bytes());
        }
        _ => panic!("two families"),
    }
    packet
}

pub(super) const SECOND: Duration = Duration::from_secs(1);
