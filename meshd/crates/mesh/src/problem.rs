//! A problem with its cause and remedy.

use serde::Serialize;

/// One thing that is not as it should be, as `meshctl status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Stable, in snake case; for scripts and alerts.
    pub code: &'static str,
    /// What was found, with the value.
    pub cause: String,
    /// What to do.
    pub remedy: String,
}

impl Problem {
    /// A problem.
    #[must_use]
    pub fn new(code: &'static str, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, cause: cause.into(), remedy: remedy.into() }
    }
}

impl From<&crate::records::Problem> for Problem {
    fn from(problem: &crate::records::Problem) -> Self {
        let cause = match &problem.key {
            Some(key) => format!("{key}: {}", problem.cause),
            None => problem.cause.clone(),
        };
        Self { code: problem.code.as_str(), cause, remedy: problem.remedy.clone() }
    }
}
