//! What benchmarks share: loads, the cost of a stretch of time, and tables of several subjects side by side.
//!
//! Figures of different runs are not comparable. Everything here is therefore made for taking figures of several
//! subjects in turn, again and again, and for ratios within a turn.

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
