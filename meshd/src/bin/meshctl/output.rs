//! How answers are printed: tables for people, JSON for programs.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

use anyhow::Context as _;
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

/// What a word means for the operator; shown as a colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tone {
    Good,
    Waiting,
    Bad,
    Quiet,
    /// As it is: for headings of columns that are coloured, since the table counts escapes as width.
    Plain,
}

pub(crate) fn print<T: Serialize>(output: Output, value: &T, text: impl Fn(&T) -> String) -> anyhow::Result<()> {
    match output {
        Output::Json => write_out(&(serde_json::to_string_pretty(value)? + "\n")),
        Output::Table => write_out(&text(value)),
    }
}

pub(crate) fn write_out(text: &str) -> anyhow::Result<()> {
    // A reader that closes the pipe early ends us quietly, as it would any tool.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

/// Coloured on a terminal, unless NO_COLOR is set to something (<https://no-color.org>).
pub(crate) fn toned(text: &str, tone: Tone) -> String {
    if !in_colour() {
        return text.to_owned();
    }
    let colour = match tone {
        Tone::Good => 32,
        Tone::Waiting => 33,
        Tone::Bad => 31,
        Tone::Quiet => 2,
        Tone::Plain => 0,
    };
    // Two digits for each tone, so that all cells of a column are longer by the same.
    format!("\x1b[{colour:02}m{text}\x1b[0m")
}

fn in_colour() -> bool {
    io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
