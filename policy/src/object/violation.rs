//! A violation in an object, worded so that an operator can correct it.

use std::fmt;

/// Most violations named for an object; the rest are counted.
const MAX_NAMED: usize = 32;
/// Longest piece of a value that is repeated in a message, in characters.
const MAX_FOUND: usize = 64;

/// A violation: the field, its value and the rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectViolation {
    /// JSON path of the field: `spec.ingress[0].from[1].ipBlock.cidr`.
    pub field: String,
    /// The value, shortened.
    pub found: String,
    /// The rule.
    pub expected: String,
}

impl fmt::Display for ObjectViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}: {}", self.field, self.found, self.expected)
    }
}

/// All that is wrong with one object; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectViolations(Vec<ObjectViolation>);

impl ObjectViolations {
    /// An object with one mistake.
    #[must_use]
    pub fn one(field: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self(vec![ObjectViolation { field: field.into(), found: found.into(), expected: expected.into() }])
    }

    /// Each violation, in the order they were found.
    #[must_use]
    pub fn as_slice(&self) -> &[ObjectViolation] {
        &self.0
    }
}

impl std::error::Error for ObjectViolations {}

impl fmt::Display for ObjectViolations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            violation.fmt(f)?;
        }
        Ok(())
    }
}

/// The violations found so far in one object; bounded however long the object is.
#[derive(Debug, Default)]
pub(super) struct ObjectReport {
    named: Vec<ObjectViolation>,
    unnamed: usize,
}

impl ObjectReport {
    pub(super) fn add(&mut self, field: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) {
        if self.named.len() < MAX_NAMED {
            self.named.push(ObjectViolation { field: field.into(), found: found.into(), expected: expected.into() });
        } else {
            self.unnamed += 1;
        }
    }

    /// Number of mistakes so far, to see whether a part added any.
    pub(super) fn count(&self) -> usize {
        self.named.len() + self.unnamed
    }

    /// The violations, if any.
    pub(super) fn into_violations(mut self) -> Option<ObjectViolations> {
        if self.unnamed > 0 {
            self.named.push(ObjectViolation {
                field: "spec".into(),
                found: format!("invalid in {} more places", self.unnamed),
                expected: "fix those above first".into(),
            });
        }
        (!self.named.is_empty()).then_some(ObjectViolations(self.named))
    }
}

/// `text` in quotes, shortened, without characters that would change a terminal.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for (i, c) in text.chars().enumerate() {
        if i == MAX_FOUND {
            out.push('…');
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.push('"');
    out
}
