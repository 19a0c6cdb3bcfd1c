//! The tunnel beside other implementations of WireGuard, all over the same path:
//!
//! ```text
//!   pod ── host ── router ── host ── pod      one such pair of hosts per subject, the router is common
//! ```
//!
//! Subjects take turns, so that whatever else the machine does strikes all of them; see `turns.rs`. `cargo bench
//! --workspace --bench tunnel -- NAME…` runs the cells of these names, or whose name contains one of the words; without
//! words, all of them. `--list` prints the names. The variables that change a run are in `settings.rs`.

mod crowd;
mod echo;
mod hub;
mod line;
mod settings;
mod subject;
mod tcp;
mod turns;
mod udp;

use std::{process::ExitCode, time::Duration};

use integration::measure::{Comparison, Machine, Packing};
use line::Line;
use settings::Settings;

/// A cell of the comparison: what `cargo bench` can be asked for by name.
struct Cell {
    name: &'static str,
    run: fn(&Settings) -> Comparison,
}

const CELLS: &[Cell] = &[
    Cell { name: "tcp-1", run: |settings| tcp::streams(settings, "tcp-1", 1, tcp::Direction::Forth) },
    Cell { name: "tcp-1-back", run: |settings| tcp::streams(settings, "tcp-1-back", 1, tcp::Direction::Back) },
    Cell { name: "tcp-4", run: |settings| tcp::streams(settings, "tcp-4", 4, tcp::Direction::Forth) },
    Cell { name: "tcp-50", run: |settings| tcp::streams(settings, "tcp-50", 50, tcp::Direction::Forth) },
    Cell { name: "udp-64", run: |settings| udp::sweep(settings, "udp-64", 64, Packing::Single) },
    Cell { name: "udp-512", run: |settings| udp::sweep(settings, "udp-512", 512, Packing::Single) },
    Cell { name: "udp-1372", run: |settings| udp::sweep(settings, "udp-1372", 1372, Packing::Single) },
    Cell { name: "udp-gso", run: |settings| udp::sweep(settings, "udp-gso", 1372, Packing::Segmented) },
    Cell { name: "ping-idle", run: |settings| echo::row(settings, "ping-idle", echo::Beside::Nothing) },
    Cell { name: "ping-busy", run: |settings| echo::row(settings, "ping-busy", echo::Beside::Stream) },
    Cell { name: "hub-8", run: |settings| hub::peers(settings, "hub-8") },
    Cell { name: "relay-alone", run: |settings| line::relay_alone(settings, "relay-alone") },
    Cell { name: "line-20ms-0", run: |settings| line::stream(settings, "line-20ms-0", line(20, 0.0)) },
    Cell { name: "line-20ms-0.1", run: |settings| line::stream(settings, "line-20ms-0.1", line(20, 0.001)) },
    Cell { name: "line-20ms-1", run: |settings| line::stream(settings, "line-20ms-1", line(20, 0.01)) },
    Cell { name: "line-80ms-0", run: |settings| line::stream(settings, "line-80ms-0", line(80, 0.0)) },
    Cell { name: "line-80ms-0.1", run: |settings| line::stream(settings, "line-80ms-0.1", line(80, 0.001)) },
    Cell { name: "line-80ms-1", run: |settings| line::stream(settings, "line-80ms-1", line(80, 0.01)) },
    Cell { name: "idle-5000", run: |settings| crowd::idle(settings, "idle-5000") },
    Cell { name: "handshakes-5000", run: |settings| crowd::handshakes(settings, "handshakes-5000") },
    Cell { name: "forgeries", run: |settings| crowd::forgeries(settings, "forgeries") },
];

const fn line(milliseconds: u64, loss: f64) -> Line {
    Line { round_trip: Duration::from_millis(milliseconds), loss }
}

fn main() -> ExitCode {
    // cargo adds words of its own, with dashes.
    let words: Vec<String> = std::env::args().skip(1).collect();
    let wanted: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
    let cells: Vec<&Cell> = CELLS.iter().filter(|cell| wanted.is_empty() || chosen(cell, &wanted)).collect();
    if words.iter().any(|word| word == "--list") {
        cells.iter().for_each(|cell| println!("{}", cell.name));
        return ExitCode::SUCCESS;
    }
    if cells.is_empty() {
        eprintln!("no cell has such a name; --list prints them");
        return ExitCode::from(2);
    }
    let settings = Settings::read();
    let machine = Machine::this();
    println!("{}\n", machine.line());
    let versions = settings.versions();
    versions.iter().for_each(|version| println!("- {version}"));
    for cell in cells {
        let comparison = (cell.run)(&settings);
        println!("\n{comparison}");
        match comparison.write_json(&machine, &versions) {
            Ok(path) => println!("All values: {}", path.display()),
            Err(error) => eprintln!("{}: cannot write the values: {error}", cell.name),
        }
    }
    ExitCode::SUCCESS
}

/// Whether one of the words asks for the cell: its whole name, or a part of it that is no other cell's whole name.
fn chosen(cell: &Cell, wanted: &[&str]) -> bool {
    wanted.iter().any(|word| match CELLS.iter().any(|cell| cell.name == *word) {
        true => cell.name == *word,
        false => cell.name.contains(word),
    })
}
