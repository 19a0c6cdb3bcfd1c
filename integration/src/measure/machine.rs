//! The machine that runs the benchmarks.

use std::{fs, thread};

use serde_json::{Value, json};

/// What the head of a table says about the machine.
#[derive(Debug, Clone)]
pub struct Machine {
    processor: String,
    cores: usize,
    memory_gib: f64,
    kernel: String,
    system: String,
    congestion_control: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, name: &str, separator: char| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim_start().trim_start_matches(separator).trim().trim_matches('"').to_owned()
        };
        let memory = value(&read("/proc/meminfo"), "MemTotal", ':');
        let kibibytes: f64 = memory.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default();
        Self {
            processor: value(&read("/proc/cpuinfo"), "model name", ':'),
            cores: thread::available_parallelism().map_or(0, usize::from),
            memory_gib: kibibytes / 1024.0 / 1024.0,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: value(&read("/etc/os-release"), "PRETTY_NAME", '='),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control").trim().to_owned(),
        }
    }

    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{} cores of {}, {:.0} GiB, Linux {}, {}, TCP with {}",
            self.cores, self.processor, self.memory_gib, self.kernel, self.system, self.congestion_control
        )
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "processor": self.processor,
            "cores": self.cores,
            "memoryGiB": self.memory_gib,
            "kernel": self.kernel,
            "system": self.system,
            "tcpCongestionControl": self.congestion_control,
        })
    }
}
