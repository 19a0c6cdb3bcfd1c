//! Sends the probes that the path agents ask for, and reports the echoes: one task with a UDP socket per family. What they
//! prove is decided in [`mesh::path`].
//!
//! Probes run from overlay address to overlay address over the same path as packets: the sockets carry a mark, and a
//! rule before the main table leads the mark to a table that routes each eligible peer's overlay address via its
//! recorded interface address only. Datagrams from another interface, such as the TUN, are discarded: they prove
//! nothing.

mod probe;
mod socket;

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use etcd_schema::NodeId;
use keys::PrivateKey;
use mesh::{
    address::Family,
    path::{MacAddress, PathAgents, PathId, Targets},
};
use socket::{ProbeMeta, ProbeSocket};
use tokio::{sync::Notify, time::sleep_until};
use tokio_util::sync::CancellationToken;

use crate::probe::{LENGTH, MessageKind, ProbeKey};

/// Echoes that one peer may ask for in a second; more is no probing.
const ECHOES_PER_SECOND: u32 = 20;
/// Datagrams that are taken from a socket at once. After as many it rests, so that a flood costs little: the kernel drops
/// what is too much, probes among it, and packets take the tunnel.
const MAX_BURST: usize = 64;
/// How long a socket rests.
const REST: Duration = Duration::from_millis(10);
/// How old what the kernel has told of neighbours may be.
const NEIGHBOURS_FRESH: Duration = Duration::from_secs(1);

/// The link-layer addresses of the neighbours on an interface.
pub type Neighbours = HashMap<IpAddr, MacAddress>;

/// What the prober asks of the rest of the node.
pub trait ProbeEnv: Send + Sync + 'static {
    /// The neighbours of one family on `interface` that the kernel does not know to be gone.
    fn neighbours(&self, interface: u32, family: Family) -> impl Future<Output = Neighbours> + Send;
    /// When something authentic of the peer's last came through the tunnel.
    fn heard_in_tunnel(&self, peer: &NodeId) -> Option<Instant>;
    /// Calls the peer in the tunnel, to see whether it answers there. May be asked often.
    fn call_in_tunnel(&self, peer: &NodeId);
}

/// How the prober is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// UDP port of probes at this node.
    pub port: u16,
    /// Mark of the sockets.
    pub mark: u32,
    /// This node.
    pub own_id: NodeId,
    /// Its private key.
    pub private_key: PrivateKey,
}

/// The running prober; it stops when this is dropped.
#[derive(Debug)]
pub struct Prober {
    paths: Arc<Paths>,
    _stop: tokio_util::sync::DropGuard,
}

/// The path agents, which the node plans with and the task probes for.
#[derive(Debug)]
struct Paths {
    agents: Mutex<PathAgents>,
    /// A probe or its loss has changed a path.
    changed: Notify,
    /// The node has been at the agents: targets and deadlines may be others.
    planned: Notify,
}

impl Paths {
    fn lock(&self) -> MutexGuard<'_, PathAgents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the agent of a path.
    fn with<T>(&self, id: &PathId, change: impl FnOnce(&mut PathAgents) -> T) -> T {
        let mut agents = self.lock();
        let (before, waits) = (agents.state(id), agents.has_changed());
        let result = change(&mut agents);
        let after = agents.state(id);
        if before != after {
            tracing::debug!(peer = %id.0, family = ?id.1, ?before, ?after, "path changed");
        }
        if agents.has_changed() && !waits {
            self.changed.notify_one();
        }
        result
    }
}

impl Prober {
    /// Binds the sockets and starts the task that probes for `agents`.
    ///
    /// # Errors
    /// When no family's socket can be bound.
    pub fn start<W: ProbeEnv>(options: Options, agents: PathAgents, world: Arc<W>) -> io::Result<Self> {
        let bound = Family::BOTH.map(|family| ProbeSocket::bind(family, options.port, options.mark));
        if let [Err(error), Err(_)] = bound {
            return Err(error);
        }
        let sockets = bound.map(|bound| {
            bound.inspect_err(|error| tracing::info!(%error, "cannot open the probe socket of one address family")).ok()
        });
        let paths = Arc::new(Paths { agents: Mutex::new(agents), changed: Notify::new(), planned: Notify::new() });
        let stop = CancellationToken::new();
        let task = Task {
            options,
            world,
            sockets,
            paths: Arc::clone(&paths),
            revision: 0,
            targets: Targets::default(),
            peers: HashMap::new(),
            neighbours: HashMap::new(),
        };
        tokio::spawn(task.run(stop.clone()));
        Ok(Self { paths, _stop: stop.drop_guard() })
    }

    /// Does something with the agents; what is probed follows. The task waits meanwhile: for a computation only.
    pub fn with_agents<T>(&self, work: impl FnOnce(&mut PathAgents) -> T) -> T {
        let mut agents = self.paths.lock();
        let before = (agents.revision(), agents.next_timer());
        let result = work(&mut agents);
        if (agents.revision(), agents.next_timer()) != before {
            self.paths.planned.notify_one();
        }
        result
    }

    /// Waits until a path is another one than the node has planned with.
    pub async fn path_changed(&self) {
        self.paths.changed.notified().await;
    }
}

/// A peer that is probed.
struct ProbedPeer {
    id: PathId,
    keys: Vec<ProbeKey>,
    echoes: EchoBudget,
}

struct Task<W> {
    options: Options,
    world: Arc<W>,
    /// IPv4, IPv6.
    sockets: [Option<ProbeSocket>; 2],
    paths: Arc<Paths>,
    /// What the agents probe, as far as this task knows.
    revision: u64,
    targets: Targets,
    /// The peers of `targets` by their overlay addresses.
    peers: HashMap<IpAddr, ProbedPeer>,
    /// What the kernel last told, per interface and family, and when.
    neighbours: HashMap<(u32, Family), (Instant, Neighbours)>,
}

impl<W: ProbeEnv> Task<W> {
    async fn run(mut self, stop: CancellationToken) {
        let mut resting: [Option<Instant>; 2] = [None, None];
        let paths = Arc::clone(&self.paths);
        loop {
            let next = paths.lock().next_timer().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            // In this order: an echo that has come is taken before its probe is given up. What a flood of them can take is
            // bounded by the sockets' rests.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = paths.planned.notified() => self.follow_targets(),
                () = readable(self.sockets[0].as_ref(), resting[0]) => resting[0] = self.receive(0).await,
                () = readable(self.sockets[1].as_ref(), resting[1]) => resting[1] = self.receive(1).await,
                () = sleep_until(next.into()) => self.poll().await,
            }
        }
    }

    /// Derives the keys of new targets, and forgets those of others.
    fn follow_targets(&mut self) {
        let (revision, targets) = {
            let agents = self.paths.lock();
            if agents.revision() == self.revision {
                return;
            }
            (agents.revision(), agents.targets())
        };
        let mut before: HashMap<PathId, ProbedPeer> =
            self.peers.drain().map(|(_, peer)| (peer.id.clone(), peer)).collect();
        for (id, target) in &targets.peers {
            let same_keys = self.targets.peers.get(id).is_some_and(|old| old.keys == target.keys);
            let kept = before.remove(id).filter(|_| same_keys);
            let peer = kept.unwrap_or_else(|| ProbedPeer {
                id: id.clone(),
                keys: target.keys.iter().map(|key| ProbeKey::derive(&self.options.private_key, key)).collect(),
                echoes: EchoBudget::default(),
            });
            self.peers.insert(target.overlay, peer);
        }
        (self.revision, self.targets) = (revision, targets);
    }

    /// What the kernel holds for the next hop; not older than [`NEIGHBOURS_FRESH`].
    async fn neighbour(&mut self, id: &PathId, now: Instant) -> Option<MacAddress> {
        let target = self.targets.peers.get(id)?;
        let (interface, next_hop, family) = (target.interface.0, target.next_hop, id.1);
        let known = self.neighbours.get(&(interface, family));
        if known.is_none_or(|(at, _)| now.saturating_duration_since(*at) >= NEIGHBOURS_FRESH) {
            let neighbours = self.world.neighbours(interface, family).await;
            // Interfaces that are gone are not remembered for ever.
            self.neighbours.retain(|_, (at, _)| now.saturating_duration_since(*at) < 8 * NEIGHBOURS_FRESH);
            self.neighbours.insert((interface, family), (now, neighbours));
        }
        self.neighbours.get(&(interface, family)).and_then(|(_, all)| all.get(&next_hop).copied())
    }

    /// Sends what is due.
    async fn poll(&mut self) {
        let now = Instant::now();
        let due = self.paths.lock().due(now);
        for (id, at) in due {
            self.poll_one(&id, at).await;
        }
        self.paths.lock().polled(now);
    }

    async fn poll_one(&mut self, id: &PathId, now: Instant) {
        let in_doubt = self.paths.lock().is_in_doubt(now, id);
        let around = match in_doubt {
            true => Some((self.neighbour(id, now).await, self.world.heard_in_tunnel(&id.0))),
            false => None,
        };
        let due = self.paths.with(id, |agents| {
            if let Some((neighbour, heard)) = around {
                agents.on_neighbour(id, neighbour);
                heard.into_iter().for_each(|at| agents.on_authenticated(id, at));
            }
            agents.poll(now, id, rand::random())
        });
        if due.call {
            self.world.call_in_tunnel(&id.0);
        }
        let (Some(nonce), Some(target), Some(own)) =
            (due.probe, self.targets.peers.get(id), self.targets.own.get(&id.1))
        else {
            return;
        };
        let Some(key) = self.peers.get(&target.overlay).and_then(|peer| peer.keys.first()) else { return };
        let message = key.seal(MessageKind::Probe, id.1, nonce, &self.options.own_id, &id.0);
        if let Some(socket) = &self.sockets[socket_index(id.1)] {
            // A probe that cannot be sent is a probe that is lost.
            let _ = socket.send(&message, *own, target.overlay, target.port);
        }
    }

    /// Takes what has come. Returns until when the socket is to rest.
    async fn receive(&mut self, index: usize) -> Option<Instant> {
        let family = if index == 0 { Family::V4 } else { Family::V6 };
        for _ in 0..MAX_BURST {
            let socket = self.sockets[index].as_ref()?;
            let mut buffer = [0; LENGTH + 1];
            let arrival = socket.receive(&mut buffer).ok()?;
            self.arrived(family, &buffer[..arrival.length], arrival).await;
        }
        Some(Instant::now() + REST)
    }

    async fn arrived(&mut self, family: Family, message: &[u8], arrival: ProbeMeta) {
        let now = Instant::now();
        let Some(own) = self.targets.own.get(&family).copied() else { return };
        let Some(peer) = self.peers.get_mut(&arrival.from) else { return };
        let Some(target) = self.targets.peers.get(&peer.id) else { return };
        if arrival.to != own || arrival.interface != target.interface.0 {
            return;
        }
        let opened = peer.keys.iter().find_map(|key| {
            let (kind, nonce) = key.open(message, family, &peer.id.0, &self.options.own_id).ok()?;
            Some((key, kind, nonce))
        });
        match opened {
            Some((key, MessageKind::Probe, nonce)) if peer.echoes.take(now) => {
                let echo = key.seal(MessageKind::Echo, family, nonce, &self.options.own_id, &peer.id.0);
                if let Some(socket) = &self.sockets[socket_index(family)] {
                    // To its recorded port, by its recorded interface address: where the message came from is not asked.
                    let _ = socket.send(&echo, own, arrival.from, target.port);
                }
            }
            Some((_, MessageKind::Echo, nonce)) => {
                let (id, interface) = (peer.id.clone(), target.interface.0);
                self.echoed(now, &id, interface, nonce).await;
            }
            _ => {}
        }
    }

    /// An authentic echo has come over a path.
    async fn echoed(&mut self, now: Instant, id: &PathId, interface: u32, nonce: u128) {
        let awaited = self.paths.lock().awaits(id, nonce);
        if !awaited {
            return;
        }
        let mut neighbour = self.neighbour(id, now).await;
        if neighbour.is_none() {
            // What was told before the next hop had been found: an echo shows that it is known by now.
            self.neighbours.remove(&(interface, id.1));
            neighbour = self.neighbour(id, now).await;
        }
        self.paths.with(id, |agents| agents.on_echo(now, id, nonce, neighbour));
    }
}

/// Echoes that a peer may still have in the present second.
#[derive(Debug, Default)]
struct EchoBudget {
    since: Option<Instant>,
    taken: u32,
}

impl EchoBudget {
    fn take(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), taken: 0 };
        }
        self.taken += 1;
        self.taken <= ECHOES_PER_SECOND
    }
}

fn socket_index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

/// Waits until the socket has rested and can be read; for ever when there is none.
async fn readable(socket: Option<&ProbeSocket>, resting: Option<Instant>) {
    let Some(socket) = socket else { return std::future::pending().await };
    if let Some(until) = resting {
        sleep_until(until.into()).await;
    }
    socket.readable().await;
}

#[cfg(test)]
mod tests;
