//! A flood of forged handshake initiations.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use blake2::{
    Blake2s256, Blake2sMac, Digest as _,
    digest::{FixedOutput as _, KeyInit as _, Update as _, consts::U16},
};
use nix::sys::prctl;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::Namespace;

/// Of a handshake initiation, in bytes.
const INITIATION: usize = 148;
/// Up to here its first MAC covers it; the MAC follows.
const COVERED: usize = 116;
/// Different messages; they are sent over and over.
const MESSAGES: usize = 4096;
/// Addresses that they come from.
const SOURCES: u32 = 256;
const NAP: Duration = Duration::from_micros(200);
/// Messages that are sent without a look at the clock.
const BURST: usize = 64;

/// What a forger knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forger {
    /// Nothing: the first MAC is wrong, which the server finds out by one hash.
    Stranger,
    /// The server's public key: the first MAC is right, and only what it covers is nonsense.
    KnowsTheKey([u8; 32]),
}

/// A flood towards one server.
#[derive(Debug, Clone)]
pub struct Forgeries {
    messages: Vec<[u8; INITIATION]>,
}

impl Forgeries {
    /// Prepares it.
    #[must_use]
    pub fn new(forger: Forger) -> Self {
        let mut random = StdRng::seed_from_u64(0);
        let messages = (0..MESSAGES).map(|_| {
            let mut message = [0; INITIATION];
            random.fill(&mut message[4..COVERED + 16]);
            message[0] = 1;
            if let Forger::KnowsTheKey(key) = forger {
                let (covered, rest) = message.split_at_mut(COVERED);
                rest[..16].copy_from_slice(&first_mac(&key, covered));
            }
            message
        });
        Self { messages: messages.collect() }
    }

    /// Sends this many a second for `length` from inside `place`, from 256 addresses counted from `first`, all of which
    /// must be local there. Returns how many were sent.
    ///
    /// # Panics
    /// When the system refuses a socket.
    #[must_use]
    pub fn send(
        &self,
        place: &Namespace,
        first: Ipv4Addr,
        server: SocketAddr,
        per_second: f64,
        length: Duration,
    ) -> u64 {
        let sockets = place.enter(|| open(first, server));
        let sockets = sockets.unwrap_or_else(|error| panic!("{}: {error}", place.name()));
        // Else the kernel adds 50 µs to each nap.
        let _ = prctl::set_timerslack(1);
        let mut rounds = self.messages.iter().zip(sockets.iter().cycle()).cycle();
        let (start, mut sent) = (Instant::now(), 0u64);
        loop {
            let elapsed = start.elapsed();
            if elapsed >= length {
                return sent;
            }
            let due = ((per_second * elapsed.as_secs_f64()) as u64).saturating_sub(sent);
            if due == 0 {
                thread::sleep(NAP);
                continue;
            }
            for (message, socket) in rounds.by_ref().take(BURST.min(usize::try_from(due).unwrap_or(BURST))) {
                // What the system does not take is not part of the flood.
                sent += u64::from(socket.send(message).is_ok());
            }
        }
    }
}

fn open(first: Ipv4Addr, server: SocketAddr) -> io::Result<Vec<UdpSocket>> {
    (0..SOURCES)
        .map(|number| {
            let socket = UdpSocket::bind((IpAddr::from(Ipv4Addr::from(u32::from(first) + number)), 0))?;
            socket.connect(server)?;
            Ok(socket)
        })
        .collect()
}

/// WireGuard's `mac1`: BLAKE2s of 16 bytes, keyed with a hash of the server's public key.
fn first_mac(server_key: &[u8; 32], covered: &[u8]) -> [u8; 16] {
    let key = Blake2s256::new().chain(b"mac1----").chain(server_key).finalize_fixed();
    let mac = Blake2sMac::<U16>::new_from_slice(&key).expect("a key of 32 bytes").chain(covered);
    mac.finalize_fixed().into()
}

#[cfg(test)]
mod tests {
    use boringtun::{
        noise::{Tunn, TunnResult},
        x25519::{PublicKey, StaticSecret},
    };

    use super::*;

    #[test]
    fn the_mac_is_that_of_a_real_client() {
        let server = PublicKey::from(&StaticSecret::from([1; 32]));
        let mut client = Tunn::new(StaticSecret::from([2; 32]), server, None, None, 7, None);
        let mut room = [0; 256];
        let TunnResult::WriteToNetwork(message) = client.format_handshake_initiation(&mut room, false) else {
            panic!("no initiation");
        };
        assert_eq!(message.len(), INITIATION);
        assert_eq!(message[COVERED..COVERED + 16], first_mac(&server.to_bytes(), &message[..COVERED]));
    }

    #[test]
    fn a_stranger_gets_it_wrong() {
        let key = [3; 32];
        let wrong = |message: &[u8; INITIATION]| message[COVERED..COVERED + 16] != first_mac(&key, &message[..COVERED]);
        assert!(Forgeries::new(Forger::Stranger).messages.iter().all(wrong));
        assert!(!Forgeries::new(Forger::KnowsTheKey(key)).messages.iter().any(wrong));
    }
}
