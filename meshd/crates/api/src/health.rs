//! Liveness and readiness: `/livez` and `/readyz`, in the style of Kubernetes' components.

use std::fmt::Write as _;

use text::printable;

/// One health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Stable, in snake case.
    pub name: &'static str,
    /// Why it does not hold; `None`: it does.
    pub failure: Option<String>,
}

impl Check {
    /// A check, which passes without a `failure`.
    #[must_use]
    pub const fn new(name: &'static str, failure: Option<String>) -> Self {
        Self { name, failure }
    }
}

/// Whether all hold.
pub(super) fn all_hold(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.failure.is_none())
}

/// The answer: `ok`, or each check by itself where that is asked for or one fails.
pub(super) fn text(name: &str, checks: &[Check], verbose: bool) -> String {
    let holds = all_hold(checks);
    if holds && !verbose {
        return "ok".to_owned();
    }
    let mut text = String::new();
    for check in checks {
        // Writing to a string does not fail.
        let _ = match &check.failure {
            None => writeln!(text, "[+]{} ok", check.name),
            Some(failure) => writeln!(text, "[-]{} failed: {}", check.name, printable(failure)),
        };
    }
    let _ = writeln!(text, "{name} check {}", if holds { "passed" } else { "failed" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_named_also_where_nobody_asked() {
        let holds = Check::new("subnet", None);
        let fails = Check::new("policy", Some("no complete picture yet".to_owned()));
        assert_eq!(text("readyz", std::slice::from_ref(&holds), false), "ok");
        assert_eq!(text("readyz", std::slice::from_ref(&holds), true), "[+]subnet ok\nreadyz check passed\n");
        let both = text("readyz", &[holds, fails], false);
        assert_eq!(both, "[+]subnet ok\n[-]policy failed: no complete picture yet\nreadyz check failed\n");
    }
}
