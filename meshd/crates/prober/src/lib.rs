//! Proves direct paths: one task with a UDP socket per family, and one [`DirectPath`] per eligible peer and family.
//!
//! Probes run from overlay address to overlay address over the same path as packets: the sockets carry a mark, and a
//! rule before the main table leads the mark to a table that routes each eligible peer's overlay address via its
//! recorded interface address only. Datagrams from another interface, such as the TUN, are discarded: they prove
//! nothing.

mod probe;
mod socket;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_schema::NodeId;
use keys::PrivateKey;
use mesh::{
    address::Family,
    path::{DirectPath, MacAddress, Surroundings},
    target::{PathId, PathStates, Target, Targets},
};
use socket::{Arrival, ProbeSocket};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;

use crate::probe::{Kind, LENGTH, ProbeKey};

/// Echoes that one peer may ask for in a second; more is no probing.
const ECHOES_PER_SECOND: u32 = 20;
/// Datagrams that are taken from a socket at once. After as many it rests, so that a flood costs little: the kernel drops
/// what is too much, probes among it, and packets take the tunnel.
const MAX_BURST: usize = 64;
/// How long a socket rests.
const REST: Duration = Duration::from_millis(10);
/// Deadlines that lie as close together are met together.
const COALESCE: Duration = Duration::from_millis(20);
/// How old what the kernel has told of neighbours may be.
const NEIGHBOURS_FRESH: Duration = Duration::from_secs(1);

/// The link-layer addresses of the neighbours on an interface.
pub type Neighbours = HashMap<IpAddr, MacAddress>;

/// What the prober asks of the rest of the node.
pub trait World: Send + Sync + 'static {
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
    targets: mpsc::Sender<(Targets, oneshot::Sender<PathStates>)>,
    states: watch::Receiver<PathStates>,
    _stop: tokio_util::sync::DropGuard,
}

impl Prober {
    /// Binds the sockets and starts the task.
    ///
    /// # Errors
    /// When no family's socket can be bound.
    pub fn start<W: World>(options: Options, world: Arc<W>) -> io::Result<Self> {
        let bound = Family::BOTH.map(|family| ProbeSocket::bind(family, options.port, options.mark));
        if let [Err(error), Err(_)] = bound {
            return Err(error);
        }
        let sockets = bound.map(|bound| {
            bound
                .inspect_err(|error| {
                    tracing::info!(%error, "cannot open the probe socket of one \
                        address family")
                })
                .ok()
        });
        let (targets_in, targets) = mpsc::channel(4);
        let (states_in, states) = watch::channel(PathStates::new());
        let stop = CancellationToken::new();
        let task = Task {
            options,
            world,
            sockets,
            own: BTreeMap::new(),
            entries: BTreeMap::new(),
            by_overlay: HashMap::new(),
            neighbours: HashMap::new(),
            next: None,
            changed: false,
        };
        tokio::spawn(task.run(targets, states_in, stop.clone()));
        Ok(Self { targets: targets_in, states, _stop: stop.drop_guard() })
    }

    /// Replaces what is probed, and returns the state of each path of `targets`; paths that stay keep theirs.
    pub async fn set_targets(&self, targets: Targets) -> PathStates {
        let (answer_in, answer) = oneshot::channel();
        // The task ends only with this handle.
        let _ = self.targets.send((targets, answer_in)).await;
        answer.await.unwrap_or_default()
    }

    /// The state of each path, as it changes.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<PathStates> {
        self.states.clone()
    }
}

/// An eligible path.
struct Entry {
    target: Target,
    keys: Vec<ProbeKey>,
    path: DirectPath,
    echoes: EchoBudget,
}

struct Task<W> {
    options: Options,
    world: Arc<W>,
    /// IPv4, IPv6.
    sockets: [Option<ProbeSocket>; 2],
    own: BTreeMap<Family, IpAddr>,
    entries: BTreeMap<PathId, Entry>,
    by_overlay: HashMap<IpAddr, PathId>,
    /// What the kernel last told, per interface and family, and when.
    neighbours: HashMap<(u32, Family), (Instant, Neighbours)>,
    /// The earliest deadline, or an earlier time.
    next: Option<Instant>,
    /// A path's state is another one than was told.
    changed: bool,
}

impl<W: World> Task<W> {
    async fn run(
        mut self,
        mut targets: mpsc::Receiver<(Targets, oneshot::Sender<PathStates>)>,
        states: watch::Sender<PathStates>,
        stop: CancellationToken,
    ) {
        let mut resting: [Option<Instant>; 2] = [None, None];
        loop {
            let idle = Instant::now() + Duration::from_secs(3600);
            let next = self.next.unwrap_or(idle);
            // In this order: an echo that has come is taken before its probe is given up. What a flood of them can take is
            // bounded by the sockets' rests.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some((new, answer)) = targets.recv() => {
                    self.set_targets(new).await;
                    // Nobody waits any more when the daemon ends.
                    let _ = answer.send(self.states());
                }
                () = readable(self.sockets[0].as_ref(), resting[0]) => resting[0] = self.receive(0).await,
                () = readable(self.sockets[1].as_ref(), resting[1]) => resting[1] = self.receive(1).await,
                () = sleep_until(next.into()) => self.poll().await,
            }
            if std::mem::take(&mut self.changed) {
                let now = self.states();
                states.send_if_modified(|states| {
                    let changed = *states != now;
                    *states = now;
                    changed
                });
            }
        }
    }

    fn states(&self) -> PathStates {
        self.entries.iter().map(|(id, entry)| (id.clone(), entry.path.state())).collect()
    }

    async fn set_targets(&mut self, targets: Targets) {
        let now = Instant::now();
        self.own = targets.own;
        let mut before = std::mem::take(&mut self.entries);
        self.by_overlay.clear();
        for (id, target) in targets.peers {
            let entry = match before.remove(&id) {
                Some(entry)
                    if entry.target.next_hop == target.next_hop && entry.target.interface == target.interface =>
                {
                    let keys = if entry.target.keys == target.keys { entry.keys } else { self.derive(&target) };
                    Entry { keys, target, ..entry }
                }
                _ => {
                    let neighbour = if target.was_direct { self.neighbour(&target, now).await } else { None };
                    let path = DirectPath::resumed(now, neighbour);
                    Entry { keys: self.derive(&target), target, path, echoes: EchoBudget::default() }
                }
            };
            self.by_overlay.insert(entry.target.overlay, id.clone());
            self.entries.insert(id, entry);
        }
        self.next = self.entries.values().map(|entry| entry.path.deadline()).min();
        self.changed = true;
    }

    fn derive(&self, target: &Target) -> Vec<ProbeKey> {
        target.keys.iter().map(|key| ProbeKey::derive(&self.options.private_key, key)).collect()
    }

    /// What the kernel holds for the next hop; not older than [`NEIGHBOURS_FRESH`].
    async fn neighbour(&mut self, target: &Target, now: Instant) -> Option<MacAddress> {
        let (interface, family) = (target.interface.0, Family::of(target.next_hop));
        let known = self.neighbours.get(&(interface, family));
        if known.is_none_or(|(at, _)| now.saturating_duration_since(*at) >= NEIGHBOURS_FRESH) {
            let neighbours = self.world.neighbours(interface, family).await;
            // Interfaces that are gone are not remembered for ever.
            self.neighbours.retain(|_, (at, _)| now.saturating_duration_since(*at) < 8 * NEIGHBOURS_FRESH);
            self.neighbours.insert((interface, family), (now, neighbours));
        }
        self.neighbours.get(&(interface, family)).and_then(|(_, all)| all.get(&target.next_hop).copied())
    }

    /// Sends what is due.
    async fn poll(&mut self) {
        let now = Instant::now();
        let due: Vec<PathId> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.path.deadline() <= now + COALESCE)
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.poll_one(&id, now).await;
        }
        let next = self.entries.values().map(|entry| entry.path.deadline()).min();
        self.next = next.map(|next| next.max(now + COALESCE));
    }

    async fn poll_one(&mut self, id: &PathId, now: Instant) {
        let Some(entry) = self.entries.get(id) else { return };
        let now = now.max(entry.path.deadline());
        let mut around = Surroundings { heard_in_tunnel: None, neighbour: None };
        if entry.path.needs_surroundings(now) {
            let target = entry.target.clone();
            around.neighbour = self.neighbour(&target, now).await;
            around.heard_in_tunnel = self.world.heard_in_tunnel(&id.0);
        }
        let Some(entry) = self.entries.get_mut(id) else { return };
        let before = entry.path.state();
        let probe = entry.path.poll(now, around, rand::random());
        let after = entry.path.state();
        if after != before {
            self.changed = true;
            tracing::debug!(peer = %id.0, family = ?id.1, ?before, ?after, "path changed");
        }
        if entry.path.wants_tunnel(now, around.heard_in_tunnel) {
            self.world.call_in_tunnel(&id.0);
        }
        let (Some(probe), Some(key), Some(own)) = (probe, entry.keys.first(), self.own.get(&id.1)) else {
            return;
        };
        let message = key.seal(Kind::Probe, id.1, probe.nonce, &self.options.own_id, &id.0);
        if let Some(socket) = &self.sockets[socket_index(id.1)] {
            // A probe that cannot be sent is a probe that is lost.
            let _ = socket.send(&message, *own, entry.target.overlay, entry.target.port);
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

    async fn arrived(&mut self, family: Family, message: &[u8], arrival: Arrival) {
        let now = Instant::now();
        let Some(own) = self.own.get(&family).copied() else { return };
        let Some(id) = self.by_overlay.get(&arrival.from) else { return };
        let Some(entry) = self.entries.get_mut(id) else { return };
        if arrival.to != own || arrival.interface != entry.target.interface.0 {
            return;
        }
        let opened = entry.keys.iter().find_map(|key| {
            let (kind, nonce) = key.open(message, family, &id.0, &self.options.own_id).ok()?;
            Some((key, kind, nonce))
        });
        match opened {
            Some((key, Kind::Probe, nonce)) if entry.echoes.take(now) => {
                let echo = key.seal(Kind::Echo, family, nonce, &self.options.own_id, &id.0);
                if let Some(socket) = &self.sockets[socket_index(family)] {
                    // To its recorded port, by its recorded interface address: where the message came from is not asked.
                    let _ = socket.send(&echo, own, arrival.from, entry.target.port);
                }
            }
            Some((_, Kind::Echo, nonce)) if entry.path.awaits(nonce) => {
                let (id, target) = (id.clone(), entry.target.clone());
                let mut neighbour = self.neighbour(&target, now).await;
                if neighbour.is_none() {
                    // What was told before the next hop had been found: an echo shows that it is known by now.
                    self.neighbours.remove(&(target.interface.0, Family::of(target.next_hop)));
                    neighbour = self.neighbour(&target, now).await;
                }
                let Some(entry) = self.entries.get_mut(&id) else { return };
                let before = entry.path.state();
                entry.path.echoed(now, nonce, neighbour);
                let after = entry.path.state();
                if after != before {
                    self.changed = true;
                    tracing::debug!(peer = %id.0, family = ?id.1, ?before, ?after, "path changed");
                }
            }
            _ => {}
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
