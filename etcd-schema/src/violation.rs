//! A violation in a value, worded so that an operator can correct it.

use std::fmt;

/// Most violations named for a value; the rest are counted.
const MAX_NAMED: usize = 32;
/// Longest piece of a value that is repeated in a message, in characters.
const MAX_FOUND: usize = 64;
/// Longest field path in a message, in characters.
const MAX_FIELD: usize = 128;

/// A violation: the field, its value and the rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// JSON path of the field (`Backend.MTU`, `endpoints[2]`), empty for the value as a whole.
    pub field: String,
    /// The value, shortened; never a secret.
    pub found: String,
    /// The rule, and the remedy.
    pub expected: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}: {}", self.found, self.expected)
        } else {
            write!(f, "{} is {}: {}", self.field, self.found, self.expected)
        }
    }
}

/// All that is wrong with one value; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Violations(Vec<Violation>);

impl Violations {
    /// A value with one violation.
    #[must_use]
    pub fn one(field: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self(vec![Violation { field: field.into(), found: found.into(), expected: expected.into() }])
    }

    /// Each violation, in the order they were found.
    #[must_use]
    pub fn as_slice(&self) -> &[Violation] {
        &self.0
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, v) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            v.fmt(f)?;
        }
        Ok(())
    }
}

/// The violations found so far in one value; bounded however long the value is.
#[derive(Debug, Default)]
pub struct Report {
    named: Vec<Violation>,
    unnamed: usize,
}

impl Report {
    /// Notes one violation.
    pub fn add(&mut self, field: impl AsRef<str>, found: impl Into<String>, expected: impl Into<String>) {
        if self.named.len() >= MAX_NAMED {
            self.unnamed += 1;
            return;
        }
        self.named.push(Violation {
            field: shorten(field.as_ref(), MAX_FIELD),
            found: found.into(),
            expected: expected.into(),
        });
    }

    /// Number of violations so far, to see whether a part added any.
    #[must_use]
    pub fn count(&self) -> usize {
        self.named.len() + self.unnamed
    }

    /// The violations, if any.
    #[must_use]
    pub fn into_violations(self) -> Option<Violations> {
        self.finish(Some(())).err()
    }

    /// `value` when nothing was noted and there is one.
    ///
    /// # Errors
    /// The noted violations. A `None` without any is a bug of this crate, reported as an unreadable value.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<T, Violations> {
        if self.unnamed > 0 {
            let more = self.unnamed;
            self.named.push(Violation {
                field: String::new(),
                found: format!("{more} more mistakes"),
                expected: "fix those above first".into(),
            });
        }
        match value {
            Some(value) if self.named.is_empty() => Ok(value),
            _ if self.named.is_empty() => Err(Violations::one("", "the value cannot be read", "rewrite it")),
            _ => Err(Violations(self.named)),
        }
    }
}

/// `text` in quotes, shortened, with control characters escaped: fit for one line of a terminal or a log.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", shorten(text, MAX_FOUND))
}

/// The path of `name` below `path`.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else if name.is_empty() {
        path.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

fn shorten(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == limit {
            out.push('…');
            break;
        }
        if c.is_control() || is_invisible(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Characters that reorder or hide the text around them in a terminal.
const fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
    )
}
