//! Logs new and resolved problems.

use mesh::records::Problem;
use tracing::{info, warn};

/// Lines that one change may write; a last one tells how many more there were.
const MOST_LINES: usize = 20;

/// What changed from one list of problems to the next.
#[derive(Debug, PartialEq, Eq)]
struct Change<'a> {
    came: Vec<&'a Problem>,
    gone: Vec<&'a Problem>,
    left_out: usize,
}

/// Logs each problem once when it comes and once when it is gone.
pub(super) fn log(before: &[Problem], after: &[Problem]) {
    let change = change(before, after);
    for problem in &change.came {
        warn!(
            code = problem.code.as_str(),
            key = problem.key.as_deref(),
            cause = problem.cause,
            remedy = problem.remedy,
            "problem"
        );
    }
    for problem in &change.gone {
        info!(code = problem.code.as_str(), key = problem.key.as_deref(), "problem is gone");
    }
    if change.left_out > 0 {
        warn!(count = change.left_out, "more problems came or went; see `meshctl status`");
    }
}

fn change<'a>(before: &'a [Problem], after: &'a [Problem]) -> Change<'a> {
    // Of the same key with another cause: it came, and the one before is not gone.
    let same = |a: &Problem, b: &Problem| (a.code, &a.key) == (b.code, &b.key);
    let mut came: Vec<_> = after.iter().filter(|problem| !before.contains(problem)).collect();
    let mut gone: Vec<_> = before.iter().filter(|problem| !after.iter().any(|other| same(problem, other))).collect();
    let all = came.len() + gone.len();
    came.truncate(MOST_LINES);
    gone.truncate(MOST_LINES - came.len());
    Change { left_out: all - came.len() - gone.len(), came, gone }
}

#[cfg(test)]
mod tests {
    use mesh::records::ProblemCode;

    use super::*;

    fn problem(key: &str, cause: &str) -> Problem {
        let (key, cause) = (Some(key.to_owned()), cause.to_owned());
        Problem { code: ProblemCode::BadValue, key, cause, remedy: String::new() }
    }

    #[test]
    fn each_is_said_once_when_it_comes_and_once_when_it_goes() {
        let [a, a2, b] = [("a", "1"), ("a", "2"), ("b", "1")].map(|(key, cause)| problem(key, cause));
        let said = |before: &[Problem], after: &[Problem]| {
            let change = change(before, after);
            let keys = |list: Vec<&Problem>| list.iter().filter_map(|p| p.key.clone()).collect::<Vec<_>>().concat();
            (keys(change.came), keys(change.gone))
        };
        let said_is = |came: &str, gone: &str| (came.to_owned(), gone.to_owned());
        assert_eq!(said(&[], &[a.clone(), b.clone()]), said_is("ab", ""));
        assert_eq!(said(&[a.clone(), b.clone()], &[a.clone(), b.clone()]), said_is("", ""));
        assert_eq!(said(&[a.clone(), b.clone()], std::slice::from_ref(&b)), said_is("", "a"));
        assert_eq!(said(&[a, b.clone()], &[a2, b]), said_is("a", ""));
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let many: Vec<_> = (0..50).map(|i| problem(&i.to_string(), "")).collect();
        let others: Vec<_> = (50..60).map(|i| problem(&i.to_string(), "")).collect();
        let change = change(&many, &others);
        assert_eq!((change.came.len(), change.gone.len(), change.left_out), (10, 10, 40));
    }
}
