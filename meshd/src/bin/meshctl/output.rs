//! Output: tables for people, JSON for programs.
//!
//! Responses contain untrusted text from etcd. Only [`print`], [`print_lines`] and [`print_error`] write it to a
//! terminal. They escape it before a renderer adds colours and line breaks.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

use anyhow::Context as _;
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::{Serialize, de::DeserializeOwned};
use text::{printable, printable_json, printable_lines, printable_strings};

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

/// The severity of a word, shown as a colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tone {
    Good,
    Waiting,
    Bad,
    Quiet,
    /// As it is: for headings of columns that are coloured, since the table counts escapes as width.
    Plain,
}

/// Prints a value as JSON, or as the lines that `text` makes of it. `text` sees no string that could act on a terminal.
pub(crate) fn print<T: Serialize + DeserializeOwned>(
    output: Output,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    match output {
        Output::Json => write_out(&(printable_json(&serde_json::to_string_pretty(value)?).into_owned() + "\n")),
        Output::Table => write_out(&text_of(value, text)?),
    }
}

/// The lines that `text` makes of a value whose strings are harmless.
pub(crate) fn text_of<T: Serialize + DeserializeOwned>(
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<String> {
    Ok(text(&printable_strings(value)?))
}

/// Prints a value as one line of JSON.
pub(crate) fn print_json_line<T: Serialize>(value: &T) -> anyhow::Result<()> {
    write_out(&(printable_json(&serde_json::to_string(value)?).into_owned() + "\n"))
}

/// Prints a text that consists of lines.
pub(crate) fn print_lines(text: &str) -> anyhow::Result<()> {
    write_out(&printable_lines(text))
}

/// Prints an error, or a warning, beside the answer; each text is a line.
pub(crate) fn print_error(lines: &[String]) {
    let lines: Vec<_> = lines.iter().map(|line| printable(line)).collect();
    // Nothing is left to tell it to when standard error is gone too.
    let _ = writeln!(io::stderr(), "meshctl: {}", lines.join("\n"));
}

fn write_out(text: &str) -> anyhow::Result<()> {
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
