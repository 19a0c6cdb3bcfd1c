use super::*;

fn problem(key: &str, cause: &str) -> Problem {
    Problem::new(ProblemCode::BadValue, cause, "").about(key)
}

#[test]
fn codes_are_stable_words_in_order() {
    let words: Vec<&str> = ProblemCode::ALL.iter().map(|code| code.as_str()).collect();
    let distinct: BTreeSet<&str> = words.iter().copied().collect();
    assert_eq!(distinct.len(), words.len());
    for word in words {
        assert!(word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{word}");
    }
}

/// The page holds a row for each code, with the same words.
#[test]
fn the_page_lists_every_code_with_its_meaning() {
    let mut codes: Vec<ProblemCode> = ProblemCode::ALL.to_vec();
    codes.sort_by_key(|code| code.as_str());
    let rows: Vec<String> = codes.iter().map(|code| format!("| `{code}` | {} |", code.meaning())).collect();
    let page = include_str!("../../../../../docs/problems.md");
    let listed: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    assert!(listed == rows, "docs/problems.md must hold these rows:\n{}", rows.join("\n"));
}

#[test]
fn each_is_logged_once_when_it_appears_and_once_when_it_is_gone() {
    let [a, a2, b] = [("a", "1"), ("a", "2"), ("b", "1")].map(|(key, cause)| problem(key, cause));
    let mut log = ProblemLog::default();
    assert_eq!(log.update([b.clone(), a.clone()]), [LogLine::Appeared(a.clone()), LogLine::Appeared(b.clone())]);
    assert_eq!(log.update([a, b.clone()]), []);
    assert_eq!(log.update([a2.clone(), b.clone()]), [LogLine::Appeared(a2.clone())], "the same with another cause");
    assert_eq!(log.update([b.clone()]), [LogLine::Gone(a2)]);
    assert_eq!(log.update([]), [LogLine::Gone(b)]);
}

#[test]
fn a_flood_is_cut_and_counted() {
    let mut log = ProblemLog::default();
    let lines = log.update((0..50).map(|n| problem(&n.to_string(), "")));
    assert_eq!((lines.len(), lines.last()), (21, Some(&LogLine::More(30))));
}
