//! Echo requests at a steady pace, with the round trip of each.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, ppoll};
use socket2::{Domain, Protocol, Socket, Type};

use super::Series;
use crate::Namespace;

/// For an answer after the last request.
const GRACE: Duration = Duration::from_secs(1);
const REQUEST_V4: u8 = 8;
const REQUEST_V6: u8 = 128;
/// Header and a payload of 56 bytes, as `ping` sends it.
const MESSAGE: usize = 64;

/// A row of echo requests that does not wait for answers before it goes on, so that a slow answer does not hide how
/// slow the next would have been.
#[derive(Debug, Clone)]
pub struct Echoes {
    from: Namespace,
    to: IpAddr,
    interval: Duration,
}

/// What came back.
#[derive(Debug, Clone, Default)]
pub struct EchoReport {
    /// Requests sent.
    pub sent: usize,
    /// Round-trip times in microseconds, in order of arrival.
    pub microseconds: Series,
}

impl Echoes {
    /// One request per `interval`.
    #[must_use]
    pub fn new(from: &Namespace, to: IpAddr, interval: Duration) -> Self {
        Self { from: from.clone(), to, interval }
    }

    /// Sends this many, at most 65,536.
    ///
    /// # Panics
    /// When the system refuses.
    #[must_use]
    pub fn run(&self, count: u16) -> EchoReport {
        let result = self.from.enter(|| self.exchange(count));
        result.unwrap_or_else(|error| panic!("{}: echo requests to {}: {error}", self.from.name(), self.to))
    }

    fn exchange(&self, count: u16) -> io::Result<EchoReport> {
        let (domain, protocol, kind) = match self.to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, REQUEST_V4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, REQUEST_V6),
        };
        // The standard library's type fits: the kernel keeps the echo id, as it keeps a UDP port.
        let socket = UdpSocket::from(Socket::new(domain, Type::DGRAM, Some(protocol))?);
        socket.connect(SocketAddr::new(self.to, 0))?;
        socket.set_nonblocking(true)?;
        let mut message = [0; MESSAGE];
        message[0] = kind;
        let mut sent_at: Vec<Instant> = Vec::with_capacity(usize::from(count));
        let mut answered = vec![false; usize::from(count)];
        let mut report = EchoReport::default();
        let start = Instant::now();
        let end = start + self.interval * u32::from(count) + GRACE;
        loop {
            let now = Instant::now();
            let due = start + self.interval * u32::try_from(sent_at.len()).unwrap_or(u32::MAX);
            let all_sent = sent_at.len() == usize::from(count);
            if all_sent && (now >= end || report.microseconds.values().len() == usize::from(count)) {
                report.sent = sent_at.len();
                return Ok(report);
            }
            if !all_sent && now >= due {
                let number = u16::try_from(sent_at.len()).unwrap_or(u16::MAX);
                message[6..8].copy_from_slice(&number.to_be_bytes());
                sent_at.push(Instant::now());
                socket.send(&message)?;
                continue;
            }
            let until = if all_sent { end } else { due };
            await_readable(&socket, until.saturating_duration_since(now))?;
            while let Some(number) = receive(&socket)? {
                let arrived = Instant::now();
                let place = usize::from(number);
                // A second answer to the same request says nothing new.
                if let (Some(sent), Some(false)) = (sent_at.get(place), answered.get(place)) {
                    answered[place] = true;
                    report.microseconds.push((arrived - *sent).as_secs_f64() * 1e6);
                }
            }
        }
    }
}

impl EchoReport {
    /// Adds what another row of requests brought.
    pub fn extend(&mut self, other: &Self) {
        self.sent += other.sent;
        other.microseconds.values().iter().for_each(|value| self.microseconds.push(*value));
    }

    /// Requests without an answer.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.sent - self.microseconds.values().len()
    }
}

/// The number in the next answer, if one is there.
fn receive(socket: &UdpSocket) -> io::Result<Option<u16>> {
    let mut answer = [0; MESSAGE];
    match socket.recv(&mut answer) {
        Ok(length) if length >= 8 => Ok(Some(u16::from_be_bytes([answer[6], answer[7]]))),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn await_readable(socket: &UdpSocket, limit: Duration) -> io::Result<()> {
    let mut poll = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut poll, Some(limit.into()), None) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
