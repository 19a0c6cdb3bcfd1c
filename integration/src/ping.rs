//! Pings, by the real `ping`.
//!
//! After its first reply, `ping` waits for the others only twice the longest round trip, or at least the interval: `-W`
//! applies only to hosts that never reply. On a busy machine, a reply may arrive after `ping` has ended. A second
//! socket receives it, so that it counts.

use std::{
    fmt::Display,
    io::{self, Read as _},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::Namespace;

/// Pings `destination` three times quickly, with its default size.
///
/// # Panics
/// When `ping` cannot be run at all.
#[track_caller]
pub fn ping(from: &Namespace, destination: impl Display) -> PingReport {
    Ping::new(destination).run(from)
}

/// How to ping.
#[derive(Debug, Clone)]
pub struct Ping {
    destination: String,
    count: u32,
    interval: Duration,
    size: u16,
    wait: Duration,
    identifier: Option<u16>,
    options: Vec<String>,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct PingReport {
    from: String,
    destination: String,
    /// How many were to be sent.
    pub sent: u32,
    /// Sequence number (from 1) and round-trip time of each answer, in the order of arrival; of one that came after
    /// `ping` had ended, the time since the start.
    pub answers: Vec<(u32, Duration)>,
    /// What `ping` printed, errors too.
    pub text: String,
}

impl Ping {
    /// Three packets of 56 bytes, 10 ms apart, each awaited for a second.
    #[must_use]
    pub fn new(destination: impl Display) -> Self {
        Self {
            destination: destination.to_string(),
            count: 3,
            interval: Duration::from_millis(10),
            size: 56,
            wait: Duration::from_secs(1),
            identifier: None,
            options: Vec::new(),
        }
    }

    /// How many packets.
    #[must_use]
    pub fn count(self, count: u32) -> Self {
        Self { count, ..self }
    }

    /// Time between two packets.
    #[must_use]
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Bytes of payload, without the ICMP and IP headers.
    #[must_use]
    pub fn size(self, size: u16) -> Self {
        Self { size, ..self }
    }

    /// How long to wait for answers after the last packet, when none have come.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        Self { wait, ..self }
    }

    /// The identifier of the echo requests, in place of one that no other ping has.
    #[must_use]
    pub fn identifier(self, identifier: u16) -> Self {
        Self { identifier: Some(identifier), ..self }
    }

    /// Any other words of `ping`'s: `option("-M do")`, `option("-I 192.0.2.1")`.
    #[must_use]
    pub fn option(mut self, words: &str) -> Self {
        self.options.extend(words.split_whitespace().map(str::to_owned));
        self
    }

    /// Pings from inside `from`.
    ///
    /// # Panics
    /// When `ping` cannot be run at all.
    #[track_caller]
    pub fn run(&self, from: &Namespace) -> PingReport {
        let count = self.count.to_string();
        let interval = self.interval.as_secs_f64().to_string();
        let wait = self.wait.as_secs_f64().to_string();
        let size = self.size.to_string();
        let mut command = vec!["ping", "-n", "-c", &count, "-i", &interval, "-W", &wait, "-s", &size];
        command.extend(self.options.iter().map(String::as_str));
        let identifier = self.identifier.unwrap_or_else(unused_identifier);
        let listener = Listener::open(from, self.destination.contains(':'), identifier)
            .unwrap_or_else(|error| panic!("{}: no socket for echo replies: {error}", from.name()));
        let identifier = identifier.to_string();
        command.extend(["-e", &identifier, &self.destination]);
        let start = Instant::now();
        let output = from.try_run(&command);
        let mut report = PingReport {
            from: from.name().to_owned(),
            destination: self.destination.clone(),
            sent: self.count,
            answers: output.stdout.lines().filter_map(answer).collect(),
            text: output.describe(),
        };
        // Without any answer `ping` has waited for as long as it was told, but may have had no processor to take what
        // came.
        let end = if report.answers.is_empty() { Instant::now() } else { Instant::now() + self.wait };
        while report.lost() > 0 {
            let Some(number) = listener.next_by(end) else { break };
            if number <= self.count && report.answers.iter().all(|(answered, _)| *answered != number) {
                report.text.push_str(&format!("icmp_seq={number} was answered after ping had ended\n"));
                report.answers.push((number, start.elapsed()));
            }
        }
        report
    }
}

/// Another one for each ping of this process.
fn unused_identifier() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let offset = NEXT.fetch_add(1, Ordering::Relaxed);
    // 0 means something else to `ping`.
    (std::process::id() as u16).wrapping_mul(31).wrapping_add(offset).max(1)
}

/// Hears the echo replies that come to a namespace.
struct Listener {
    socket: Socket,
    v6: bool,
    identifier: u16,
}

impl Listener {
    fn open(namespace: &Namespace, v6: bool, identifier: u16) -> io::Result<Self> {
        let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
        let socket = namespace.enter(|| Socket::new(domain, Type::RAW, Some(protocol)))?;
        Ok(Self { socket, v6, identifier })
    }

    /// The sequence number of the next reply with the identifier, of those that have come or come until `end`.
    fn next_by(&self, end: Instant) -> Option<u32> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            self.socket.set_nonblocking(left.is_zero()).ok()?;
            if !left.is_zero() {
                self.socket.set_read_timeout(Some(left)).ok()?;
            }
            // What is longer is cut off.
            let mut message = [0; 128];
            let number = match (&self.socket).read(&mut message) {
                Ok(length) => self.reply(&message[..length]),
                Err(_) if left.is_zero() => return None,
                Err(_) => None,
            };
            if number.is_some() {
                return number;
            }
        }
    }

    /// The sequence number of an echo reply with the identifier.
    fn reply(&self, message: &[u8]) -> Option<u32> {
        // An IPv4 socket hands over the header too.
        let start = if self.v6 { 0 } else { usize::from(message.first()? & 0xf) * 4 };
        let kind = if self.v6 { 129 } else { 0 };
        match message.get(start..start + 8)? {
            [is, _, _, _, i0, i1, s0, s1] if *is == kind && u16::from_be_bytes([*i0, *i1]) == self.identifier => {
                Some(u16::from_be_bytes([*s0, *s1]).into())
            }
            _ => None,
        }
    }
}

impl PingReport {
    /// How many were not answered.
    #[must_use]
    pub fn lost(&self) -> u32 {
        let mut answered: Vec<u32> = self.answers.iter().map(|(number, _)| *number).collect();
        answered.sort_unstable();
        answered.dedup();
        self.sent.saturating_sub(u32::try_from(answered.len()).unwrap_or(u32::MAX))
    }

    /// # Panics
    /// When one was not answered.
    #[track_caller]
    pub fn assert_all_answered(&self) {
        assert!(
            self.lost() == 0,
            "{} lost {} of {} pings to {}\n{}",
            self.from,
            self.lost(),
            self.sent,
            self.destination,
            self.text
        );
    }

    /// # Panics
    /// When one was answered.
    #[track_caller]
    pub fn assert_none_answered(&self) {
        assert!(self.answers.is_empty(), "{} reaches {} but should not\n{}", self.from, self.destination, self.text);
    }
}

/// Reads `64 bytes from 192.0.2.2: icmp_seq=1 ttl=64 time=0.041 ms`.
fn answer(line: &str) -> Option<(u32, Duration)> {
    let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
    let milliseconds: f64 = field("time=")?.parse().ok()?;
    Some((field("icmp_seq=")?.parse().ok()?, Duration::from_secs_f64(milliseconds / 1000.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_answers_and_nothing_else() {
        let line = "64 bytes from 2001:db8::2: icmp_seq=7 ttl=64 time=0.250 ms";
        assert_eq!(answer(line), Some((7, Duration::from_micros(250))));
        assert_eq!(answer("From 192.0.2.1 icmp_seq=1 Destination Host Unreachable"), None);
        assert_eq!(answer("rtt min/avg/max/mdev = 0.059/0.071/0.083/0.012 ms"), None);
    }
}
