//! A flow of numbered UDP datagrams at a given rate: counts arrivals and reordering, and finds the highest rate that a
//! path carries.
//!
//! One thread sends and one receives. The sender wakes a few thousand times per second and sends all datagrams that are
//! due, up to 64 per system call; it never waits for the path.

#[expect(unsafe_code, reason = "system calls")]
mod sys;

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    prctl,
    socket::{setsockopt, sockopt},
};

use super::Cost;
use crate::Namespace;
use sys::{BATCH, Buffers};

/// Between two looks whether something is due. At 200,000 datagrams a second twenty are.
const NAP: Duration = Duration::from_micros(100);
/// What is still under way when the sender stops has this long to arrive.
const DRAIN: Duration = Duration::from_millis(60);
/// Room for what the receiver has not read yet, in bytes; its own loss would count as the path's.
const RECEIVE_BUFFER: i32 = 16 << 20;
/// Largest payload of a datagram with segmentation offload; see `udp_sendmsg` in `net/ipv4/udp.c`.
const SUPER_DATAGRAM: usize = 65_507;
/// The kernel's own limit of segments is 128 today and was 64 before.
const SEGMENTS: usize = 64;

/// How the sender hands datagrams to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// One by one.
    Single,
    /// As many as fit in one super-datagram that the system cuts up (`UDP_SEGMENT`), as QUIC does; the receiver takes
    /// what was put together again (`UDP_GRO`).
    Segmented,
}

/// A flow of datagrams of one size.
#[derive(Debug, Clone)]
pub struct Datagrams {
    from: Namespace,
    to: Namespace,
    address: IpAddr,
    size: usize,
    packing: Packing,
}

/// What became of a flow.
#[derive(Debug, Clone, Copy)]
pub struct DatagramReport {
    /// Datagrams that were to be sent.
    pub wanted: u64,
    /// Datagrams that were sent.
    pub sent: u64,
    /// Datagrams that arrived.
    pub received: u64,
    /// Of those, the ones that came after a later one.
    pub overtaken: u64,
    /// What it cost the machine while it was sending and until the last had arrived.
    pub cost: Cost,
    /// For how long it was sending.
    pub sending: Duration,
}

/// What the receiver has counted.
#[derive(Default)]
struct Arrived {
    datagrams: u64,
    overtaken: u64,
    next: u64,
}

impl Datagrams {
    /// From a pod to another one's address, this many bytes of payload in each, at least 8.
    #[must_use]
    pub fn new(from: &Namespace, to: &Namespace, address: IpAddr, size: usize, packing: Packing) -> Self {
        Self { from: from.clone(), to: to.clone(), address, size: size.max(8), packing }
    }

    /// Sends this many datagrams a second for `length`.
    ///
    /// # Panics
    /// When the system refuses a socket.
    #[must_use]
    pub fn send(&self, per_second: f64, length: Duration) -> DatagramReport {
        let (receiver, target) = self.open_receiver().unwrap_or_else(|error| panic!("{}: {error}", self.to.name()));
        let sender = self.open_sender(target).unwrap_or_else(|error| panic!("{}: {error}", self.from.name()));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(&receiver, &stop));
            let ((wanted, sent, sending), cost) = Cost::of(|| {
                let sent = self.pace(&sender, per_second, length);
                thread::sleep(DRAIN);
                sent
            });
            stop.store(true, Ordering::Relaxed);
            let arrived = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            DatagramReport { wanted, sent, received: arrived.datagrams, overtaken: arrived.overtaken, cost, sending }
        })
    }

    /// The highest rate at which at most `loss` (from 0 to 1) of the datagrams are lost, and what it looked like:
    /// doubles the rate from `from` on until too much is lost, then halves the interval between `steps` times. None
    /// when `from` is too much already.
    #[must_use]
    pub fn highest_rate(&self, from: f64, loss: f64, length: Duration, steps: u32) -> Option<DatagramReport> {
        let carries = |rate: f64| Some(self.send(rate, length)).filter(|report| report.carried(loss));
        let mut best = carries(from)?;
        let (mut low, mut high) = (from, from * 2.0);
        while let Some(report) = carries(high) {
            (low, high, best) = (high, high * 2.0, report);
        }
        for _ in 0..steps {
            // Geometric: what counts are ratios.
            let middle = (low * high).sqrt();
            match carries(middle) {
                Some(report) => (low, best) = (middle, report),
                None => high = middle,
            }
        }
        Some(best)
    }

    fn segments(&self) -> usize {
        match self.packing {
            Packing::Single => 1,
            Packing::Segmented => (SUPER_DATAGRAM / self.size).clamp(1, SEGMENTS),
        }
    }

    fn open_receiver(&self) -> io::Result<(UdpSocket, SocketAddr)> {
        let socket = self.to.enter(|| UdpSocket::bind((self.address, 0)))?;
        sys::set_receive_buffer(&socket, RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(10)))?;
        if self.packing == Packing::Segmented {
            setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
        }
        let address = socket.local_addr()?;
        Ok((socket, address))
    }

    fn open_sender(&self, target: SocketAddr) -> io::Result<UdpSocket> {
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.from.enter(|| UdpSocket::bind(any))?;
        socket.connect(target)?;
        if self.packing == Packing::Segmented {
            let size = i32::try_from(self.size).map_err(io::Error::other)?;
            setsockopt(&socket, sockopt::UdpGsoSegment, &size)?;
        }
        Ok(socket)
    }

    /// Returns how many datagrams were due, how many were sent, and how long it took.
    fn pace(&self, socket: &UdpSocket, per_second: f64, length: Duration) -> (u64, u64, Duration) {
        // Else the kernel adds 50 µs to each nap.
        let _ = prctl::set_timerslack(1);
        let segments = self.segments();
        let mut buffers = Buffers::new(self.size * segments);
        let (mut number, mut sent) = (0u64, 0u64);
        let start = Instant::now();
        loop {
            let elapsed = start.elapsed();
            // Datagrams are due in whole packs: an unsent part of one is not lost.
            let due = (per_second * elapsed.as_secs_f64()) as u64 / segments as u64 * segments as u64;
            // A sender that the machine cannot keep up with must not save up a burst for later.
            let packs = (due.saturating_sub(sent) as usize / segments).min(BATCH);
            for buffer in buffers.each().take(packs) {
                for datagram in buffer.chunks_exact_mut(self.size) {
                    datagram[..8].copy_from_slice(&number.to_be_bytes());
                    number += 1;
                }
            }
            if packs > 0 {
                match sys::send(socket, &mut buffers, packs) {
                    Ok(count) => sent += (count * segments) as u64,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(error) => panic!("{}: cannot send: {error}", self.from.name()),
                }
            }
            if elapsed >= length {
                return (due, sent, elapsed);
            }
            if packs == 0 {
                thread::sleep(NAP);
            }
        }
    }

    fn receive(&self, socket: &UdpSocket, stop: &AtomicBool) -> Arrived {
        let mut buffers = Buffers::new(self.size * self.segments());
        let mut arrived = Arrived::default();
        loop {
            // Looked at before receiving: what had arrived by then is counted.
            let ended = stop.load(Ordering::Relaxed);
            let count = sys::receive(socket, &mut buffers)
                .unwrap_or_else(|error| panic!("{}: cannot receive: {error}", self.to.name()));
            for message in buffers.received(count) {
                message.chunks_exact(self.size).for_each(|datagram| arrived.count(datagram));
            }
            if ended && count == 0 {
                return arrived;
            }
        }
    }
}

impl Arrived {
    fn count(&mut self, datagram: &[u8]) {
        let Some(number) = datagram.first_chunk().map(|bytes| u64::from_be_bytes(*bytes)) else { return };
        self.datagrams += 1;
        if number < self.next {
            self.overtaken += 1;
        } else {
            self.next = number + 1;
        }
    }
}

impl DatagramReport {
    /// Datagrams a second that arrived.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.received as f64 / self.sending.as_secs_f64()
    }

    /// The part of what was to be sent that did not arrive, from 0 to 1. What the sender had no time to send is lost
    /// too: the machine could not carry it.
    #[must_use]
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / (self.wanted as f64).max(1.0)
    }

    fn carried(&self, loss: f64) -> bool {
        self.received > 0 && self.loss() <= loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overtaken_datagram_is_counted_once() {
        let mut arrived = Arrived::default();
        for number in [0u64, 1, 4, 2, 3, 5] {
            arrived.count(&number.to_be_bytes());
        }
        assert_eq!((arrived.datagrams, arrived.overtaken), (6, 2));
    }
}
