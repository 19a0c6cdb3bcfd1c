//! Counts and short lists, in one line for operators.

use std::fmt::Display;

/// Number and noun, such as `2 labels`.
pub fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// The first few of `items`, and how many follow.
pub fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 4;
    let mut items = items.into_iter();
    let shown: Vec<String> = items.by_ref().take(SHOWN).map(|i| i.to_string()).collect();
    match items.count() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
