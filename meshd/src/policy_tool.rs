//! `meshctl policy test`, `meshctl policy explain --offline` and `meshctl check`: the policy engine on files, without a
//! daemon.

mod check;
mod documents;
mod offline;

use std::{fmt::Write as _, io, path::Path, time::Instant};

use policy::expect;
use serde::{Deserialize, Serialize};

pub use check::{ValueError, check};
use documents::Format;
pub use documents::ReadError;
pub use offline::{ExplainError, explain};

/// The result of test files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct Tested {
    /// Worlds that were read.
    pub worlds: usize,
    /// Expectations that were checked.
    pub checked: usize,
    /// Expectations that did not come true, and worlds that could not be understood.
    pub differences: Vec<FailedExpectation>,
}

/// A failed expectation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedExpectation {
    /// The file.
    pub file: String,
    /// The world's name.
    pub world: String,
    /// The probe.
    pub probe: String,
    /// The expected verdict.
    pub expected: String,
    /// The actual verdict.
    pub got: String,
    /// The reason, as in `policy explain`.
    pub reason: String,
    /// The world's own description.
    pub why: Option<String>,
}

/// Checks all worlds of these files; `-` is standard input.
///
/// # Errors
/// When a file cannot be read or is neither JSON nor YAML.
pub fn test(files: &[impl AsRef<Path>], now: Instant) -> Result<Tested, ReadError> {
    let mut tested = Tested::default();
    for file in files {
        let file = file.as_ref();
        let name = file.display().to_string();
        let text = if file.as_os_str() == "-" {
            io::read_to_string(io::stdin()).map_err(|source| ReadError::File { file: name.clone(), source })?
        } else {
            documents::text(file)?
        };
        for world in documents::parse(&text, &name, Format::of(&text))? {
            tested.worlds += 1;
            match expect::run(&world, now) {
                Ok(outcome) => {
                    tested.checked += outcome.checked;
                    tested.differences.extend(outcome.differences.into_iter().map(|d| FailedExpectation {
                        file: name.clone(),
                        world: d.world,
                        probe: d.probe,
                        expected: d.expected,
                        got: d.got,
                        reason: d.reason,
                        why: d.why,
                    }));
                }
                Err(error) => {
                    tested.checked += 1;
                    tested.differences.push(FailedExpectation {
                        file: name.clone(),
                        world: error.world,
                        probe: error.at,
                        expected: "a valid test case".to_owned(),
                        got: "none".to_owned(),
                        reason: error.problem,
                        why: None,
                    });
                }
            }
        }
    }
    Ok(tested)
}

impl Tested {
    /// Whether everything was as expected.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.differences.is_empty()
    }

    /// One line for each difference, and a summary.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        for d in &self.differences {
            let why = d.why.as_ref().map_or_else(String::new, |why| format!(" [{why}]"));
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "{}: {}: {}: expected {}, got {}: {}{why}",
                d.file, d.world, d.probe, d.expected, d.got, d.reason
            );
        }
        let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let _ = writeln!(
            out,
            "{}, {}, {}",
            counted(self.worlds, "test case"),
            counted(self.checked, "expectation"),
            counted(self.differences.len(), "difference")
        );
        out
    }
}

#[cfg(test)]
mod tests;
