//! Many WireGuard clients that initiate handshakes at the same moment.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use boringtun::{
    noise::{Tunn, TunnResult},
    x25519::{PublicKey, StaticSecret},
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::Series;
use crate::Namespace;

/// Kind of a message, its first byte.
const RESPONSE: u8 = 2;
/// Largest message of a handshake, with room to spare.
const MESSAGE: usize = 512;
/// How often clients without a session look whether they should try again.
const TIMERS: Duration = Duration::from_millis(250);
/// Initiations between two looks for answers.
const BURST: usize = 32;

/// Clients with a key each, all for one server.
pub struct Handshakes {
    keys: Vec<StaticSecret>,
}

/// What became of them.
#[derive(Debug, Clone)]
pub struct HandshakeReport {
    /// Clients that wanted a session.
    pub wanted: usize,
    /// Seconds from the start until each of those that got one had it, in order.
    pub seconds: Series,
}

struct Client {
    tunnel: Tunn,
    socket: UdpSocket,
    up: bool,
}

impl Handshakes {
    /// This many clients; always the same keys.
    #[must_use]
    pub fn new(clients: usize) -> Self {
        let mut random = StdRng::seed_from_u64(0);
        Self { keys: (0..clients).map(|_| StaticSecret::from(random.random::<[u8; 32]>())).collect() }
    }

    /// The clients' public keys.
    pub fn public_keys(&self) -> impl Iterator<Item = [u8; 32]> {
        self.keys.iter().map(|key| PublicKey::from(key).to_bytes())
    }

    /// Lets all of them initiate at once from inside `place`, each from an address of its own, counted from `first`,
    /// all of which must be local there. Ends when all have a session, or after `limit`.
    ///
    /// # Panics
    /// When the system refuses.
    #[must_use]
    pub fn run(
        &self,
        place: &Namespace,
        first: Ipv4Addr,
        server: SocketAddr,
        server_key: [u8; 32],
        limit: Duration,
    ) -> HandshakeReport {
        let result = place.enter(|| self.exchange(first, server, server_key, limit));
        result.unwrap_or_else(|error| panic!("{}: handshakes with {server}: {error}", place.name()))
    }

    fn exchange(
        &self,
        first: Ipv4Addr,
        server: SocketAddr,
        server_key: [u8; 32],
        limit: Duration,
    ) -> io::Result<HandshakeReport> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut clients = Vec::with_capacity(self.keys.len());
        for (key, number) in self.keys.iter().zip(0u32..) {
            let socket = UdpSocket::bind((IpAddr::from(Ipv4Addr::from(u32::from(first) + number)), 0))?;
            socket.connect(server)?;
            socket.set_nonblocking(true)?;
            epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, u64::from(number)))?;
            let tunnel = Tunn::new(key.clone(), PublicKey::from(server_key), None, None, number, None);
            clients.push(Client { tunnel, socket, up: false });
        }
        let mut seconds = Series::default();
        let mut events = [EpollEvent::empty(); 256];
        let start = Instant::now();
        let (mut initiated, mut timers) = (0, start + TIMERS);
        while seconds.values().len() < clients.len() && start.elapsed() < limit {
            for client in clients.iter_mut().skip(initiated).take(BURST) {
                client.initiate();
            }
            initiated = (initiated + BURST).min(clients.len());
            let wait = if initiated < clients.len() { 0 } else { 20u8 };
            let count = match epoll.wait(&mut events, EpollTimeout::from(wait)) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..count] {
                let Some(client) = usize::try_from(event.data()).ok().and_then(|number| clients.get_mut(number)) else {
                    continue;
                };
                if client.receive() {
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
            if Instant::now() >= timers {
                timers += TIMERS;
                clients[..initiated].iter_mut().filter(|client| !client.up).for_each(Client::try_again);
            }
        }
        Ok(HandshakeReport { wanted: clients.len(), seconds })
    }
}

impl Client {
    fn initiate(&mut self) {
        let mut room = [0; MESSAGE];
        if let TunnResult::WriteToNetwork(message) = self.tunnel.format_handshake_initiation(&mut room, false) {
            let _ = self.socket.send(message);
        }
    }

    /// As the protocol's timers want it.
    fn try_again(&mut self) {
        let mut room = [0; MESSAGE];
        if let TunnResult::WriteToNetwork(message) = self.tunnel.update_timers(&mut room) {
            let _ = self.socket.send(message);
        }
    }

    /// Takes what has come. Returns whether that made the first session.
    fn receive(&mut self) -> bool {
        let (mut datagram, mut room) = ([0; MESSAGE], [0; MESSAGE]);
        let mut new = false;
        while let Ok(length) = self.socket.recv(&mut datagram) {
            // A response that fits is answered with a first, empty packet: the session is up.
            if let TunnResult::WriteToNetwork(message) = self.tunnel.decapsulate(None, &datagram[..length], &mut room) {
                let _ = self.socket.send(message);
                new |= datagram[0] == RESPONSE && !self.up;
                self.up = true;
            }
        }
        new
    }
}
