//! Validation of any value before `etcdctl put`.

use std::fmt::Display;

use crate::{Key, KeyError, UnknownField, Value, Violations, unknown::unknown_fields};

/// A valid key and its value.
#[derive(Debug)]
pub struct Checked {
    /// The parsed key.
    pub key: Key,
    /// A one-line summary for operators, without secrets and control characters.
    pub summary: String,
    /// Fields that are kept and not read.
    pub unknown: Vec<UnknownField>,
}

/// Why a key and its value do not hold.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The key is none of ours.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The value does not hold.
    #[error(transparent)]
    Value(#[from] Violations),
}

/// Judges `value` under `relative`, a key without its prefix, by itself (not against other records). The objects of
/// Kubernetes are left to `policy`.
///
/// # Errors
/// When either does not hold.
pub fn check(relative: &str, value: &[u8]) -> Result<Checked, CheckError> {
    let key = Key::parse(relative)?;
    let summary = match Value::parse(&key, value) {
        Some(read) => read?.summary(&key),
        None => format!("{key}; its value is not checked here"),
    };
    let unknown = unknown_fields(&key, value);
    Ok(Checked { key, summary, unknown })
}

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
