//! Throughput, by the real `iperf3`.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::Namespace;

const LISTENING: Duration = Duration::from_secs(60);

/// How to measure: `Iperf::new(pod.v4()).seconds(3).run(&client, &server)`.
#[derive(Debug, Clone)]
pub struct Iperf {
    address: IpAddr,
    seconds: u16,
    streams: u16,
    options: Vec<String>,
}

/// What went through.
#[derive(Debug, Clone)]
pub struct Throughput {
    /// Payload that arrived, in bits per second.
    pub bits_per_second: f64,
    /// Segments that TCP sent again; none with UDP.
    pub retransmits: Option<u64>,
    /// Datagrams that did not arrive; none with TCP.
    pub lost_datagrams: Option<u64>,
    /// All that `iperf3 -J` said.
    pub report: Value,
}

impl Iperf {
    /// One TCP stream for two seconds to the server at this address.
    #[must_use]
    pub fn new(address: IpAddr) -> Self {
        Self { address, seconds: 2, streams: 1, options: Vec::new() }
    }

    /// For how long.
    #[must_use]
    pub fn seconds(self, seconds: u16) -> Self {
        Self { seconds, ..self }
    }

    /// Streams at the same time.
    #[must_use]
    pub fn streams(self, streams: u16) -> Self {
        Self { streams, ..self }
    }

    /// From the server to the client instead.
    #[must_use]
    pub fn reverse(self) -> Self {
        self.option("--reverse")
    }

    /// UDP with this many bits per second; 0 is as fast as it goes.
    #[must_use]
    pub fn udp(self, bits_per_second: u64) -> Self {
        self.option(&format!("--udp --bitrate {bits_per_second}"))
    }

    /// Any other words of `iperf3`'s client.
    #[must_use]
    pub fn option(mut self, words: &str) -> Self {
        self.options.extend(words.split_whitespace().map(str::to_owned));
        self
    }

    /// Starts a server in `server` for this one measurement, and measures from `client`.
    ///
    /// # Panics
    /// When the measurement does not come to its end.
    #[must_use]
    #[track_caller]
    pub fn run(&self, client: &Namespace, server: &Namespace) -> Throughput {
        // Each measurement has a port of its own, so that several can run between the same two.
        static PORT: AtomicU16 = AtomicU16::new(0);
        let port = (20_000 + PORT.fetch_add(1, Ordering::Relaxed) % 10_000).to_string();
        let address = self.address.to_string();
        let serving = server.spawn("iperf3", &["-s", "-1", "-B", &address, "-p", &port, "--forceflush"]);
        serving.await_log("listening", LISTENING);
        let (seconds, streams) = (self.seconds.to_string(), self.streams.to_string());
        // A client that is cut off would wait for ever for the server's summary.
        let limit = (self.seconds + 120).to_string();
        let mut command = vec!["timeout", &limit, "iperf3", "-J", "-c", &address, "-p", &port];
        command.extend(["-t", &seconds, "-P", &streams]);
        command.extend(self.options.iter().map(String::as_str));
        let output = client.try_run(&command);
        let report: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        assert!(output.success() && report["error"].is_null(), "{}", output.describe());
        let end = &report["end"];
        let udp = !end["sum"].is_null();
        let received = if udp { &end["sum"] } else { &end["sum_received"] };
        Throughput {
            bits_per_second: received["bits_per_second"].as_f64().unwrap_or_default(),
            retransmits: end["sum_sent"]["retransmits"].as_u64().filter(|_| !udp),
            lost_datagrams: end["sum"]["lost_packets"].as_u64(),
            report,
        }
    }
}
