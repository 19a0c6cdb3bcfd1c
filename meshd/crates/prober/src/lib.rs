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
    path::{MacAddress, PathAgents, Surroundings},
    target::{PathId, PathStates, Target, Targets},
};
use socket::{ProbeMeta, ProbeSocket};
use tokio::{
    sync::{Notify, watch},
    time::sleep_until,
};
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

/// The path agents, between the node that says what there is to probe and the task that probes it.
#[derive(Debug)]
struct Paths {
    agents: Mutex<PathAgents>,
    /// Changed under the lock of the agents only, so that no older states come after newer ones.
    states: watch::Sender<PathStates>,
    /// The targets are others, or new ones may be probed.
    retargeted: Notify,
}

impl Paths {
    fn lock(&self) -> MutexGuard<'_, PathAgents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the states, if they have changed.
    fn publish(&self, agents: &mut PathAgents) {
        if !agents.take_changed() {
            return;
        }
        let now = agents.states();
        self.states.send_if_modified(|states| {
            log_changes(states, &now);
            let changed = *states != now;
            *states = now;
            changed
        });
    }
}

impl Prober {
    /// Binds the sockets and starts the task.
    ///
    /// # Errors
    /// When no family's socket can be bound.
    pub fn start<W: ProbeEnv>(options: Options, world: Arc<W>) -> io::Result<Self> {
        let bound = Family::BOTH.map(|family| ProbeSocket::bind(family, options.port, options.mark));
        if let [Err(error), Err(_)] = bound {
            return Err(error);
        }
        let sockets = bound.map(|bound| {
            bound.inspect_err(|error| tracing::info!(%error, "cannot open the probe socket of one address family")).ok()
        });
        let paths = Arc::new(Paths {
            agents: Mutex::default(),
            states: watch::Sender::new(PathStates::new()),
            retargeted: Notify::new(),
        });
        let stop = CancellationToken::new();
        let task = Task {
            options,
            world,
            sockets,
            paths: Arc::clone(&paths),
            targets: Targets::default(),
            peers: HashMap::new(),
            neighbours: HashMap::new(),
        };
        tokio::spawn(task.run(stop.clone()));
        Ok(Self { paths, _stop: stop.drop_guard() })
    }

    /// Replaces what is probed, and returns the state of each path of `targets`; paths that stay keep theirs. `neighbours`
    /// are those of each interface, by its index, that decide whether a path that was direct before this start stays so.
    pub fn set_targets(&self, targets: Targets, neighbours: &HashMap<u32, Neighbours>) -> PathStates {
        let mut agents = self.paths.lock();
        let known = |target: &Target| neighbours.get(&target.interface.0)?.get(&target.next_hop).copied();
        agents.set_targets(Instant::now(), targets, known);
        self.paths.publish(&mut agents);
        self.paths.retargeted.notify_one();
        agents.states()
    }

    /// The kernel has the probe routes of the targets: new ones are probed from now on. Before, a probe would take the
    /// route of an earlier next hop, whose echo would prove nothing about the new one.
    pub fn routes_applied(&self) {
        let mut agents = self.paths.lock();
        if agents.routes_applied(Instant::now()) {
            self.paths.retargeted.notify_one();
        }
    }

    /// The state of each path, as it changes.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<PathStates> {
        self.paths.states.subscribe()
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
                () = paths.retargeted.notified() => self.follow_targets(),
                () = readable(self.sockets[0].as_ref(), resting[0]) => resting[0] = self.receive(0).await,
                () = readable(self.sockets[1].as_ref(), resting[1]) => resting[1] = self.receive(1).await,
                () = sleep_until(next.into()) => self.poll().await,
            }
            paths.publish(&mut paths.lock());
        }
    }

    /// Derives the keys of new targets, and forgets those of others.
    fn follow_targets(&mut self) {
        let targets = self.paths.lock().targets().clone();
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
        self.targets = targets;
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
        let mut around = Surroundings { heard_in_tunnel: None, neighbour: None };
        let needed = self.paths.lock().needs_surroundings(now, id);
        if needed {
            around.neighbour = self.neighbour(id, now).await;
            around.heard_in_tunnel = self.world.heard_in_tunnel(&id.0);
        }
        let due = self.paths.lock().poll(now, id, around, rand::random());
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
        self.paths.lock().on_echo(now, id, nonce, neighbour);
    }
}

fn log_changes(before: &PathStates, after: &PathStates) {
    for (id, state) in after {
        let old = before.get(id);
        if old != Some(state) {
            tracing::debug!(peer = %id.0, family = ?id.1, before = ?old, after = ?state, "path changed");
        }
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
