//! Shared parts of the benchmarks: loads, the cost of an interval, and comparison tables of several subjects.
//!
//! Figures of different runs are not comparable. Therefore subjects take turns, repeatedly, and ratios are computed
//! within a turn.

mod comparison;
mod cost;
mod datagrams;
mod echoes;
mod forgeries;
mod handshakes;
mod machine;
mod series;

pub use comparison::{Better, Comparison, Metric};
pub use cost::{Cost, CpuTime, process_cpu, resident_bytes};
pub use datagrams::{DatagramReport, Datagrams, Packing};
pub use echoes::{EchoReport, Echoes};
pub use forgeries::{Forger, Forgeries};
pub use handshakes::{HandshakeReport, Handshakes};
pub use machine::Machine;
pub use series::Series;
