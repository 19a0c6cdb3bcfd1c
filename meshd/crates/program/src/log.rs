//! The log, on standard error. Untrusted text can neither control the terminal nor start a new line.
//!
//! Under systemd's journal, each line starts with its priority (`sd-daemon(3)`), which the journal strips, and has no
//! timestamp, because the journal adds one.

use std::{
    env,
    io::{self, Write},
    os::fd::AsFd as _,
};

use clap::ValueEnum;
use serde::Deserialize;
use text::{printable, printable_json, printable_lines};
use tracing::{Dispatch, Level, Metadata};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter, util::SubscriberInitExt as _};

/// Level and format of the log.
#[derive(Debug, Clone, Copy)]
pub struct Log {
    /// Least level that is logged.
    pub level: Level,
    /// How log lines look.
    pub format: LogFormat,
}

/// `--log-format`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl Log {
    /// Parses `--log-level` and `--log-format`; adds errors to `mistakes`.
    pub fn from_flags(level: Option<String>, format: Option<LogFormat>, mistakes: &mut Vec<String>) -> Self {
        let level = match level.as_deref().unwrap_or("info").parse() {
            Ok(level) => level,
            Err(_) => {
                let text = level.unwrap_or_default();
                mistakes.push(format!("--log-level {text}: must be error, warn, info, debug or trace"));
                Level::INFO
            }
        };
        Self { level, format: format.unwrap_or_default() }
    }
}

/// Logs to standard error from now on.
pub fn to_stderr(log: Log) {
    let to_journal = is_journal();
    dispatch(log, to_journal, LogWriter { format: log.format, to_journal }).init();
}

/// Prints an error before there is a log, or beside it; `text` may have several lines.
pub fn print_error(text: &str) {
    let priority = if is_journal() { priority(Level::ERROR) } else { "" };
    let lines: String = printable_lines(text).lines().map(|line| format!("{priority}{line}\n")).collect();
    // Nothing is left to tell it to when standard error is gone.
    let _ = io::stderr().lock().write_all(lines.as_bytes());
}

/// The crates that log by the level that is set; see the test that finds a missing one.
const OWN_CRATES: [&str; 12] = [
    "meshd",
    "api",
    "attachments",
    "control",
    "control_core",
    "enforcement",
    "kernel",
    "mesh_etcd",
    "prober",
    "program",
    "sync",
    "tunnel",
];

fn dispatch<W>(log: Log, to_journal: bool, lines: W) -> Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Libraries speak up from `warn` on; boringtun calls an idle peer's expired session an error.
    let own = OWN_CRATES.map(|name| format!(",{name}={}", log.level)).concat();
    let filter = EnvFilter::new(format!("warn,boringtun=off{own}"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines);
    match (log.format, to_journal) {
        (LogFormat::Text, false) => builder.with_target(false).with_ansi(false).into(),
        (LogFormat::Text, true) => builder.with_target(false).with_ansi(false).with_level(false).without_time().into(),
        (LogFormat::Json, _) => builder.json().flatten_event(true).into(),
    }
}

/// Whether standard error is the stream that systemd connected to its journal. A variable inherited with another
/// standard error does not count.
fn is_journal() -> bool {
    let Ok(stderr) = nix::sys::stat::fstat(io::stderr().as_fd()) else { return false };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// Makes a writer for each event, which is one line.
#[derive(Clone, Copy)]
struct LogWriter {
    format: LogFormat,
    to_journal: bool,
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = EventWriter;

    fn make_writer(&'a self) -> EventWriter {
        EventWriter { format: self.format, priority: "" }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> EventWriter {
        EventWriter { format: self.format, priority: if self.to_journal { priority(*event.level()) } else { "" } }
    }
}

/// As syslog(3) counts.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Takes one event as text with a line break at its end, in one write.
struct EventWriter {
    format: LogFormat,
    priority: &'static str,
}

impl EventWriter {
    fn shown(&self, event: &[u8]) -> String {
        let event = String::from_utf8_lossy(event);
        let event = event.strip_suffix('\n').unwrap_or(&event);
        let event = match self.format {
            LogFormat::Text => printable(event),
            LogFormat::Json => printable_json(event),
        };
        format!("{}{event}\n", self.priority)
    }
}

impl Write for EventWriter {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        io::stderr().lock().write_all(self.shown(event).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// The output of our formatting for an event.
    fn logged(format: LogFormat, to_journal: bool, log: impl FnOnce()) -> String {
        #[derive(Clone)]
        struct Kept(LogWriter, Arc<Mutex<String>>);
        struct KeptLine(EventWriter, Arc<Mutex<String>>);
        impl Write for KeptLine {
            fn write(&mut self, event: &[u8]) -> io::Result<usize> {
                self.1.lock().unwrap().push_str(&self.0.shown(event));
                Ok(event.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        impl<'a> MakeWriter<'a> for Kept {
            type Writer = KeptLine;

            fn make_writer(&'a self) -> KeptLine {
                KeptLine(self.0.make_writer(), Arc::clone(&self.1))
            }

            fn make_writer_for(&'a self, event: &Metadata<'_>) -> KeptLine {
                KeptLine(self.0.make_writer_for(event), Arc::clone(&self.1))
            }
        }
        let kept = Kept(LogWriter { format, to_journal }, Arc::default());
        let text = Arc::clone(&kept.1);
        tracing::dispatcher::with_default(&dispatch(Log { level: Level::INFO, format }, to_journal, kept), log);
        let text = text.lock().unwrap();
        text.clone()
    }

    #[test]
    fn each_crate_logs_by_the_level_that_is_set() {
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap() {
            let folder = entry.unwrap().path();
            let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            let name = folder.file_name().unwrap().to_str().unwrap().replace('-', "_");
            assert_eq!(manifest.contains("\ntracing.workspace"), OWN_CRATES.contains(&&*name), "{name}");
        }
        let text = logged(LogFormat::Text, false, || tracing::info!(target: "kernel::reconcile", "kernel changed"));
        assert!(text.contains("INFO kernel changed"), "{text}");
    }

    #[test]
    fn what_others_wrote_cannot_act_on_a_terminal_or_begin_a_line() {
        let hostile = "a\x1b[2J\r\n<0>faked\u{202e}\u{9b}";
        for (format, to_journal) in [(LogFormat::Text, false), (LogFormat::Text, true), (LogFormat::Json, false)] {
            let line = logged(format, to_journal, || {
                tracing::warn!(cause = hostile, shown = %hostile, "problem {hostile}");
            });
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert_eq!(printable(line.trim_end_matches('\n')), line.trim_end_matches('\n'), "{line:?}");
        }
    }

    #[test]
    fn the_journal_is_told_the_priority_and_no_time() {
        let line = logged(LogFormat::Text, true, || tracing::warn!(peer = "west1", "peer unreachable"));
        assert_eq!(line, "<4>peer unreachable peer=\"west1\"\n");
        let line = logged(LogFormat::Text, false, || tracing::info!("stopped"));
        assert!(line.starts_with("20") && line.ends_with(" INFO stopped\n"), "{line}");
    }
}
